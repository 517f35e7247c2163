"""Tests the benchmarks of whole models and of scaling: comparisons, verdicts, and formulas for operation counts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import swinkernels
from benchmarks import contest, formulas, goals, models, runtimes, scaling, shapes, timing
from benchmarks.shapes import ModelCase
from benchmarks.timing import Ceiling, Timing, input_sets, time_on_cpu, until_steady
from gpu import plan
from swinkernels import reference
from swinkernels.testing import WindowAttentionCase

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing: the tests check the rows, but not the times in them."""
    for module in (contest, models):
        monkeypatch.setattr(module, "time_on_cpu", lambda calls, **_: time_on_cpu(calls, seconds=0.01, rounds=2))


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> str:
    """Add a small timm Swin and one of its blocks to the benchmarks' cases; return the name of the model."""
    timm = pytest.importorskip("timm")
    swin = timm.models.swin_transformer.SwinTransformer
    build = functools.partial(swin, img_size=32, patch_size=4, window_size=4, embed_dim=16, depths=(2, 2))

    def make(case: ModelCase, fused: bool) -> nn.Module:
        model = build(num_heads=(1, 2), num_classes=5)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = fused
        return model

    monkeypatch.setitem(models._BUILDERS, "timm", make)
    monkeypatch.setitem(shapes.MODELS, "small", ModelCase("timm", "small", (3, 32, 32), 4))
    monkeypatch.setitem(shapes.BLOCKS, "small.block", ("small", "layers.0.blocks.1"))
    return "small"


def benchmark(name: str, **options: Any) -> dict[tuple[str, str], dict]:
    rows = models.benchmark("models", name, torch.float32, CPU, models.KINDS, **options)
    return {(row["backend"], row["direction"]): row for row in rows}


@pytest.mark.parametrize("how", ["", "compiled", "graphs"])
def test_a_training_step_is_compiled_into_cuda_graphs_by_name(small_model, how, monkeypatch) -> None:
    """The forward and backward passes run in the compiled module; "graphs" compiles it with reduce-overhead."""
    options: list[dict[str, Any]] = []

    def compiled(module: nn.Module, **given: Any) -> nn.Module:
        options.append(given)
        return module

    monkeypatch.setattr(torch, "compile", compiled)
    mine = models.subject(shapes.MODELS[small_model], "accelerate")
    assert mine is not None
    out, dx, grads = models.prepare(mine, CPU, torch.bfloat16, "training", how)()
    assert options == {"": [], "compiled": [{"dynamic": False}]}.get(
        how, [{"dynamic": False, "mode": "reduce-overhead"}]
    )
    assert out.isfinite().all() and dx.any() and all(g is not None for g in grads)
    assert {name.partition("-")[0] for name in models.GRAPHS} == set(models.KINDS)
    assert {"eager-graphs", "accelerate-graphs"} <= {*plan.TRAINING}


@pytest.mark.parametrize("runtime", runtimes.RUNTIMES)
def test_a_runtime_runs_the_inference_of_a_model(small_model: str, runtime: str) -> None:
    for package in runtimes._PACKAGES[runtime]:
        pytest.importorskip(package)
    assert runtime in models.contestants((), CPU, graphs=False)
    rows = models.benchmark("models", small_model, torch.float32, CPU, ["eager", runtime])
    found = {(row["backend"], row["direction"]): row for row in rows}
    assert set(found) == {("eager", "inference"), (runtime, "inference"), ("eager", "training")}
    assert found[runtime, "inference"]["result"] == "ok"
    assert found[runtime, "inference"]["median_us"] > 0


def test_what_a_runtime_does_not_run() -> None:
    half = runtimes.why_not("onnxruntime", CPU, torch.float16, "inference", 1)
    assert half is not None
    for name in runtimes.RUNTIMES:
        for device, mode, arguments in (("cuda", "inference", 1), ("cpu", "training", 1), ("cpu", "inference", 2)):
            assert runtimes.why_not(name, torch.device(device), torch.float32, mode, arguments) is not None


@pytest.mark.parametrize("name", ["small", "small.block"])
def test_rows_of_a_model(small_model: str, name: str) -> None:
    rows = benchmark(name)
    assert set(rows) == {(kind, mode) for kind in models.KINDS for mode in models.MODES}
    for row in rows.values():
        assert row["result"] == "ok"
        assert row["error_eps"] < 100
        assert min(row["median_us"], row["peak_mib"], row["first_call_s"]) > 0
        assert row["case"] == "timm-b4-3x32x32"
        assert row["gpu_busy_us"] is row["host_us"] is None
    assert rows["eager", "training"]["peak_mib"] > rows["eager", "inference"]["peak_mib"]


def test_memory_is_not_timed(small_model: str) -> None:
    row = benchmark(small_model, modes=("inference",), timed=False)["eager", "inference"]
    assert row["median_us"] is None
    assert row["peak_mib"] > 0


@pytest.mark.parametrize("mode", models.MODES)
def test_a_repeated_batch_gives_what_repeated_says(small_model: str, mode: str) -> None:
    case = ModelCase("timm", "small", (3, 32, 32), 2)
    few, whole = (models.subject(case, "eager", batch=batch) for batch in (2, 6))
    assert few is not None
    assert whole is not None
    assert whole.args[0].shape == (6, 3, 32, 32)
    got, expected = (models._flat(models.prepare(s, CPU, torch.float64, mode, "")()) for s in (whole, few))
    expected = models.repeated(expected, 3)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("wrong", ["output", "gradient", "one image"])
def test_a_wrong_model_is_called_wrong(small_model: str, monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    right = swinkernels.accelerate

    def spoil(model: nn.Module) -> Any:
        report = right(model)
        extra = torch.tensor([0.0, 0.0, 0.0, 0.01])[:, None] if wrong == "one image" else 0.01
        gone = torch.Tensor.detach if wrong == "gradient" else torch.zeros_like  # detach changes only the derivative
        model.register_forward_hook(lambda _module, _args, out: out + extra * (out - gone(out)))
        return report

    monkeypatch.setattr(swinkernels, "accelerate", spoil)
    rows = benchmark(small_model)
    expected = {"training"} if wrong == "gradient" else set(models.MODES)
    assert {mode for (kind, mode), row in rows.items() if row["result"] == "WRONG"} == expected
    assert all(rows["eager", mode]["result"] == "ok" for mode in models.MODES)


def test_one_that_fails_does_not_cost_the_others(small_model: str, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(swinkernels, "accelerate", lambda model: swinkernels.adapters.Report())
    rows = benchmark(small_model, modes=("inference",))
    assert {kind: row["result"] for (kind, _), row in rows.items()} == {
        "eager": "ok",
        "fused": "ok",
        "accelerate": "FAILED",
    }
    assert "accelerate did not replace all modules" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["swin_t", "swin_t.torchvision", "swin_t.transformers", "swin2sr.transformers"])
def test_every_module_of_a_model_is_accelerated(name: str) -> None:
    """The accelerated model does not have transformers' eager attention, which accelerate leaves as it is."""
    case = shapes.MODELS[name]
    pytest.importorskip(case.library)
    subject = models.subject(case, "accelerate")
    assert subject is not None
    swinkernels.restore(subject.module)
    report = swinkernels.accelerate(subject.module)
    assert report.replaced
    assert not report.skipped


def test_no_contestant_runs_eagerly_for_want_of_compilations(small_model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each contestant is compiled, even if there are more of them than dynamo's recompile limit."""
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Any:
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    names = models.PLAIN[3:]
    with torch._dynamo.config.patch(recompile_limit=2):
        rows = models.benchmark("models", small_model, torch.float32, CPU, names, modes=("inference",), batch=1)
    assert {row["backend"]: row["result"] for row in rows} == dict.fromkeys(names, "ok")
    assert len(compiled) == len(names)


def test_a_gradient_that_is_a_rounding_error_is_judged_beside_the_largest() -> None:
    exact = {"out": torch.ones(4), "input": torch.ones(4), "parameter 0": torch.ones(4), "parameter 1": torch.zeros(4)}
    got = {**exact, "parameter 1": torch.full((4,), 1e-8)}
    assert models.errors(got, exact)["parameters"] == pytest.approx(1e-5)
    with pytest.raises(AssertionError, match="only one of the compared results has gradients"):
        models.errors({k: v for k, v in got.items() if k != "parameter 0"}, exact)


def test_every_model_and_block_is_of_a_known_library() -> None:
    for case in shapes.MODELS.values():
        assert case.library in models._BUILDERS
    assert all(of in shapes.MODELS for of, _ in shapes.BLOCKS.values())
    assert shapes.MODEL_GOAL in shapes.MODELS
    assert models.not_installed(shapes.BLOCKS) in ({}, {"monai": ["swin_unetr96.stage1"]})


# Goals of a GPU run


def model_row(shape: str, backend: str, mode: str, us: float | None, **labels: Any) -> dict[str, Any]:
    row = {"suite": "models", "shape": shape, "dtype": "bfloat16", "backend": backend, "direction": mode}
    return {**row, "result": "ok", "median_us": us, "peak_mib": us, **labels}


def verdicts(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["goal"]: row["verdict"] for row in goals.model_goals(rows)}


def test_goals_of_models() -> None:
    nothing = verdicts([])
    assert set(nothing.values()) == {"not measured"}
    others = [
        model_row("swin_t", name, "training", us) for name, us in (("eager-compiled", 30.0), ("fused-compiled", 27.0))
    ]
    mine = model_row("swin_t", "accelerate-compiled", "training", 20.0, peak_mib=23.0)
    speed = "accelerate-compiled training of swin_t against eager-compiled and fused-compiled"
    peak = "peak memory of accelerate-compiled training of swin_t"
    got = verdicts([*others, mine])
    assert got[speed] == "met"  # 27 / 20 is 1.35
    assert got[peak] == "not met"  # 23 / 27 is more than 0.85
    assert got["accelerate-compiled training of swin_t is not slower"] == "met"
    assert got["accelerate inference of swin_t against eager"] == "not measured"
    mine.update(median_us=20.1, peak_mib=22.9)
    got = verdicts([*others, mine])
    assert (got[speed], got[peak]) == ("not met", "met")
    others[1]["result"] = "WRONG"  # a contestant with a wrong result is left out
    assert verdicts([*others, mine])[speed] == "met"
    mine["result"] = "WRONG"
    assert verdicts([*others, mine])[speed] == "not met"


def test_a_whole_run_settles_every_goal_of_models() -> None:
    groups = [group.name.split() for step in plan.steps(plan.Setting(whole=True), ("models",)) for group in step.groups
              if step.name == "models"]  # fmt: skip
    rows = [model_row(shape, name, mode, 50.0, suite=suite) for suite, shape, mode, name in groups]
    got = verdicts(rows)
    assert "not measured" not in got.values()
    assert len(got) == len(goals.MODEL_GOALS) + 1 + sum(len(modes) for *_, modes in goals.MODEL_CONTESTS)
    assert {name for *_, name in groups} <= {*models.CONTESTANTS}


# Formulas and scaling


def counted(function: Any, *args: Tensor) -> int:
    """Return the number of multiply-adds in the matrix products of ``function(*args)``."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function(*args)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("kind", scaling.LAYERS)
def test_formulas_of_the_paper_count_the_products(kind: str) -> None:
    side, c, w = 14, shapes.COMPLEXITY_CHANNELS, shapes.COMPLEXITY_WINDOW
    draw = functools.partial(torch.zeros, dtype=torch.float64)
    inputs = draw(1, side, side, c), draw(3 * c, c), draw(c, c), draw((2 * w - 1) ** 2, shapes.COMPLEXITY_HEADS)
    expected = {
        "global": formulas.msa_multiply_adds(side, side, c),
        "window": formulas.window_msa_multiply_adds(side, side, c, w),
    }[kind]
    assert counted(scaling.layer(kind, side), *inputs) == expected


def test_formulas_of_the_paper_by_hand() -> None:
    assert formulas.msa_multiply_adds(2, 3, 5) == 4 * 6 * 25 + 2 * 36 * 5
    assert formulas.window_msa_multiply_adds(4, 6, 5, 2) == 4 * 24 * 25 + 2 * 4 * 24 * 5
    # If the window is the whole map, both formulas agree.
    assert formulas.window_msa_multiply_adds(7, 7, 96, 7) == formulas.msa_multiply_adds(7, 7, 96)


@pytest.mark.parametrize(
    "case", [WindowAttentionCase(2, (5, 6), 2, 8, 4, 2), WindowAttentionCase(1, (4, 4, 6), 3, 4, 2)]
)
def test_flops_of_the_core_count_the_products(case: WindowAttentionCase) -> None:
    """core_flops counts the matrix products over the padded map."""
    qkv = case.inputs(torch.float64)["qkv"]
    found = counted(lambda x: reference.window_attention_qkvpacked(x, **case.arguments()), qkv)
    assert 2 * found == formulas.core_flops(case)["fwd"]
    flops = formulas.core_flops(case)
    assert flops["bwd"] * 2 == flops["fwd"] * 5  # five matrix products in backward, two in forward
    assert flops["fwd+bwd"] == flops["fwd"] + flops["bwd"]


def test_the_larger_of_bytes_and_flops_is_the_roofline() -> None:
    limits = Ceiling(bytes_per_us=100.0, flops_per_us=1000.0)
    assert limits.roofline_us(moved=500, flops=1000) == 5.0
    assert limits.roofline_us(moved=50, flops=3000) == 3.0


def test_noise_is_a_spread_of_over_a_tenth() -> None:
    assert not Timing(100.0, 96.0, 106.0).noisy
    assert Timing(100.0, 95.0, 105.1).noisy
    assert input_sets(10, CPU) == 1


@pytest.mark.parametrize(
    ("spreads", "measured", "kept"),
    [
        ([(2, 2)], 1, 0),
        ([(2, 30), (2, 3)], 2, 1),  # the second is steady
        ([(2, 30), (40, 2), (2, 20), (1, 1)], 3, 2),  # none is steady: the steadiest of three is kept
        ([(2, 12), (2, 13), (14, 2)], 3, 0),
        ([()], 1, 0),  # no contestant is left
    ],
)
def test_noisy_times_are_measured_again(spreads: list[tuple[int, ...]], measured: int, kept: int) -> None:
    """A noisy measurement is repeated for all contestants, and the times of one measurement are returned."""
    runs = [
        {f"{i}": Timing(100.0 + n, 100.0, 100.0 + width) for i, width in enumerate(of_run)}
        for n, of_run in enumerate(spreads)
    ]
    left = iter(runs)
    assert until_steady(lambda: next(left)) is runs[kept]
    assert len(list(left)) == len(runs) - measured


def test_a_cpu_timer_measures_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three measurements contain slow calls, so the third is kept. A fast call takes 1 s of the fake clock."""
    now, slow = [0.0], [0] * 4 + [9, 0] * 4 + [0] * 5

    def call(i: int) -> None:
        now[0] += 1.0 + slow.pop(0)

    def steady(i: int) -> None:
        now[0] += 1.0

    monkeypatch.setattr(timing, "CPU_CLOCK", [lambda: now[0]])
    times = time_on_cpu({"call": call, "steady": steady}, seconds=1.0, rounds=5)
    assert times == {name: Timing(1e6, 1e6, 1e6) for name in ("call", "steady")}
    assert not slow


def test_slope_of_a_power() -> None:
    assert scaling.slope([1, 2, 4, 8], [3 * v**1.5 for v in (1, 2, 4, 8)]) == pytest.approx(1.5)


def test_rows_of_a_sweep_and_of_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = {f"small {b}": WindowAttentionCase(b, (6, 6), 2, 8, 3, 1) for b in (1, 2, 64)}
    monkeypatch.setitem(scaling.SWEEPS, "small", (sweep, lambda case: case.batch, "images"))
    rows = scaling.sweep("small", torch.float32, CPU, ["reference", "eager"], largest=36 * 8)
    assert {row["suite"] for row in rows} == {"scaling"}
    assert {row["direction"] for row in rows} == {"fwd"}
    x, y = scaling.series(rows, "small")["eager"]
    assert x == [1, 2]  # 64 images exceed the limit
    assert len(y) == 2
    rows[0]["result"] = "WRONG"
    assert scaling.series(rows, "small")["reference"][0] == [2]
    rows = [row for side in (7, 14) for row in scaling.complexity(side, torch.float32, CPU)]
    assert {(row["backend"], row["result"]) for row in rows} == {("window", "ok"), ("global", "ok")}
    assert scaling.layers(rows)["global"][0] == [7, 14]


def test_a_wrong_layer_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = scaling.window_attention_qkvpacked
    monkeypatch.setattr(scaling, "window_attention_qkvpacked", lambda *args, **options: 1.01 * right(*args, **options))
    rows = scaling.complexity(14, torch.float32, CPU)
    assert {row["backend"]: row["result"] for row in rows} == {"window": "WRONG", "global": "ok"}
