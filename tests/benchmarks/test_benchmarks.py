"""Tests the benchmarks of ops: results of the peers, numbers of bytes moved, and verdicts on goals.

The verdict on a goal is "not measured" if rows that the goal needs are missing.
"""

from __future__ import annotations

import csv
import functools
import math
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from torch import Tensor

import swinkernels
from benchmarks import attention, commit, contest, formulas, goals, host_cost, memory_bound, peers, record, shapes
from benchmarks.peers import KINDS, make_peer
from benchmarks.timing import Ceiling, Timing, time_on_cpu
from gpu import timing, variants
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase, run_case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timing: the tests check the rows, but not the times in them."""
    monkeypatch.setattr(contest, "SECONDS", 0.01)
    monkeypatch.setattr(contest, "QUICK_SECONDS", 0.01)
    monkeypatch.setattr(contest, "time_on_cpu", functools.partial(time_on_cpu, rounds=2))


def _triangle_attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: None = None, scale: float | None = None
) -> Tensor:
    """Compute triangle attention with the formula that cuEquivariance documents.

    q, k and v are (B, N, H, Q, D), and bias is (B, 1, H, Q, K).
    """
    batch, _, heads, n, d = q.shape
    assert bias.shape == (batch, 1, heads, n, n)
    scores = (d**-0.5 if scale is None else scale) * (q @ k.mT) + bias
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [
        WindowAttentionCase(2, (6, 9), 2, 8, 3, 1),
        WindowAttentionCase(2, (8, 6), 2, 8, (4, 3), (2, 1)),
        WindowAttentionCase(1, (8, 6), 3, 4, (4, 3), (0, 2)),
        WindowAttentionCase(2, (7, 7), 2, 8, 7, 0),
        WindowAttentionCase(2, (5, 10), 2, 8, 4, 2, has_pad_qkv=True),
        WindowAttentionCase(1, (5, 6), 2, 8, 3, 1),
        WindowAttentionCase(2, (6, 9), 2, 8, 3, 1, has_logit_scale=True),
        WindowAttentionCase(1, (5, 10), 3, 8, 4, 0, has_logit_scale=True, has_pad_qkv=True),
        WindowAttentionCase(2, (3, 5, 6), 2, 8, (2, 4, 3), (1, 2, 1), has_pad_qkv=True),
        WindowAttentionCase(1, (4, 6, 6), 2, 8, (2, 3, 3), (1, 1, 2), options={"periodic": (False, False, True)}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_equal_the_reference(case: WindowAttentionCase, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = types.SimpleNamespace(triangle_attention=_triangle_attention)
    monkeypatch.setitem(sys.modules, "cuequivariance_torch", stand_in)
    inputs = {name: x.double() for name, x in case.inputs(torch.float64).items()}
    exact = run_case(reference.window_attention_qkvpacked, inputs, case.arguments())
    peer = make_peer(case, torch.float64, CPU, kind)
    if kind == "flex":  # FlexAttention has no backward pass on CPUs
        with torch.no_grad():
            got = {"out": peer(**{name: x for name, x in inputs.items() if name != "dout"})}
        exact = {"out": exact["out"]}
    else:
        got = run_case(peer, inputs, {})
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_published_times_are_compared_with_right_results_at_their_shapes() -> None:
    """The published times are for 256 windows of 64, 256 and 576 tokens, v2, 6 heads of 32 channels."""
    for shape in peers.PUBLISHED:
        case = shapes.ATTENTION[shape]
        windows = math.prod(s // w for s, w in zip(case.size, case.window_tuple, strict=True))
        assert (case.batch * windows, case.num_heads, case.head_dim, case.has_logit_scale) == (256, 6, 32, True)
        assert math.prod(case.window_tuple) == int(shape.partition(".")[2])
    row = {"shape": "fwa2.64", "direction": "fwd", "backend": "cuda", "dtype": "bfloat16", "result": "ok"}
    rows = [
        {**row, "median_us": 14.0},
        {**row, "direction": "bwd", "median_us": 100.0},
        {**row, "result": "WRONG", "median_us": 1.0},
        {**row, "shape": "swin_t.1", "median_us": 1.0},
        {**row, "backend": "eager", "median_us": 1.0},
    ]
    judged = peers.against_published(rows)
    assert [(r["verdict"], round(r["reached"], 2), r["wanted"]) for r in judged] == [
        ("met", 5.21, 5.0),
        ("not met", 8.18, 10.0),
    ]


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = WindowAttentionCase(2, (6, 9), 2, 8, 3, 1)
    assert attention.verify("eager", case, torch.float32, CPU)[0]
    right = attention.make_peer

    def slightly_off(*args, **kwargs):
        peer = right(*args, **kwargs)
        return lambda qkv, bias_table: peer(qkv, bias_table * 1.01)

    monkeypatch.setattr(attention, "make_peer", slightly_off)
    assert not attention.verify("eager", case, torch.float32, CPU)[0]


@pytest.mark.parametrize("shape", ["weather.1", "swin_unetr128.1", "detection.1"])
def test_what_is_compared_on_a_cpu_fits_its_memory(shape: str) -> None:
    case = shapes.ATTENTION[shape]
    small = attention.to_verify(case, CPU)
    assert formulas.core_flops(small)["fwd"] <= 4 * case.head_dim * attention.MOST_SCORES_ON_CPU
    for whole, cut, window in zip(case.size, small.size, case.window_tuple, strict=True):
        assert cut % window == whole % window  # the same amount of padding
        assert cut >= 2 * window
    assert attention.to_verify(case, torch.device("cuda")) == shapes.with_batch(case, 2)


def test_rows_of_a_run_on_the_cpu(tmp_path: Path) -> None:
    names = attention.contestants(CPU, ("cpu", "eager"))
    assert "eager" in names
    assert "cuda" not in attention.contestants(CPU, ())
    case = WindowAttentionCase(1, (6, 6), 2, 8, 3, 1)
    rows = attention.benchmark("small", case, torch.float32, CPU, names)
    by_key = {(row["backend"], row["direction"]): row for row in rows}
    assert ("eager", "bwd") not in by_key  # only this package's backward op is timed on its own
    for name in names:
        assert by_key[name, "fwd"]["result"] == "ok"
        assert by_key[name, "fwd"]["median_us"] > 0
    if "cpu" in names:
        assert by_key["cpu", "bwd"]["result"] == "ok"
        assert by_key["cpu", "bwd"]["median_us"] > 0
    record.write_csv(tmp_path / "a.csv", rows, CPU)
    with (tmp_path / "a.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    assert written[0]["swinkernels"] == swinkernels.__version__
    assert all(written[0][column] for column in ("device", "torch", "commit", "date"))


def test_a_wrong_result_has_a_time_but_no_percentage() -> None:
    known = {"ceiling": Ceiling(1000.0, 1e6), "moved": 10**6, "flops": 10**9, "copy": Timing(500.0, 490.0, 510.0)}
    right, wrong = (record.row({}, result, 0.5, Timing(2000.0, 1990.0, 2010.0), **known) for result in ("ok", "WRONG"))
    assert (right["gb_per_s"], right["percent_of_roofline"], right["percent_of_copy"]) == (0.5, 50.0, 25.0)
    assert {key for key in right if right[key] != wrong[key]} == {
        "result", "gb_per_s", "percent_of_roofline", "percent_of_copy"
    }  # fmt: skip
    assert wrong["gb_per_s"] is wrong["percent_of_roofline"] is wrong["percent_of_copy"] is None


def test_one_failing_contestant_does_not_cost_the_others(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    case = WindowAttentionCase(1, (6, 6), 2, 8, 3, 1)
    make = attention.make_op

    def fail(name, *args):
        if name == "sdpa":
            raise RuntimeError("no memory")
        return make(name, *args)

    monkeypatch.setattr(attention, "make_op", fail)
    rows = attention.benchmark("small", case, torch.float32, CPU, ["eager", "sdpa"])
    assert {row["backend"]: row["result"] for row in rows} == {"eager": "ok", "sdpa": "FAILED"}
    assert all(row["median_us"] is None for row in rows if row["backend"] == "sdpa")
    assert "no memory" in capsys.readouterr().err


def test_moved_bytes_of_the_goal() -> None:
    moved = formulas.core_bytes(shapes.ATTENTION[shapes.GOAL], torch.bfloat16.itemsize)
    tokens = 128 * 56 * 56
    assert moved == {"fwd": tokens * 4 * 96 * 2, "bwd": tokens * 7 * 96 * 2, "fwd+bwd": tokens * 11 * 96 * 2}


def attention_row(shape: str, backend: str, direction: str, median: float | None, **labels) -> dict:
    row = {"shape": shape, "dtype": "bfloat16", "backend": backend, "direction": direction, "result": "ok"}
    return {**row, "median_us": median, "percent_of_copy": None, **labels}


def test_goals() -> None:
    def verdicts(rows: list[dict]) -> dict[str, str]:
        found = goals.goals(rows)
        return {row["goal"].partition(" (")[0] + row["goal"].partition(")")[2]: row["verdict"] for row in found}

    nothing = verdicts([])
    assert set(nothing.values()) == {"not measured"}
    assert len(nothing) == 10 * 4 + 6
    rows = [
        attention_row("swin_t.1", "cuda", "fwd", 120.0, percent_of_copy=85.0),
        attention_row("swin_t.1", "cuda", "bwd", None, percent_of_copy=69.9),
        attention_row("swin_t.1", "cuda", "fwd+bwd", 400.0),
        *(attention_row("swin_t.1", peer, "fwd", 600.0 + i) for i, peer in enumerate(attention.PEERS)),
        attention_row("swin_t.2", "cuda", "fwd", 60.0, percent_of_copy=None, result="WRONG"),
        attention_row("batch1.1", "cuda", "fwd", 6.0),
        attention_row("batch1.1", "cuda", "bwd", 12.1),
        attention_row("swin_t.1", "cuda", "fwd", 123.0, dtype="float16", percent_of_copy=84.0),
        attention_row("swin_t.1", "cuda", "fwd", 250.0, dtype="tf32", percent_of_copy=70.0),
        attention_row("swin_t.1", "triton", "fwd", 180.0, percent_of_copy=59.0),
    ]
    expected = {
        "fwd at swin_t.1": "met",
        "bwd at swin_t.1": "not met",
        "fwd at swin_t.1 against the best peer": "met",
        "fwd+bwd at swin_t.1 against the best peer": "not measured",
        "fwd at swin_t.2": "not met",
        "fwd at swin_t.2 against the best peer": "not met",  # a wrong result meets no goal
        "fwd at batch1.1": "met",
        "bwd at batch1.1": "not met",
        "float16 fwd at swin_t.1": "met",
        "TF32 fwd at swin_t.1": "met",
        "Triton fwd at swin_t.1": "not met",
    }
    got = verdicts(rows)
    assert {goal: verdict for goal, verdict in got.items() if verdict != "not measured"} | {
        "fwd+bwd at swin_t.1 against the best peer": "not measured"
    } == expected
    rows[3]["median_us"] = 599.0  # 599 / 120 is less than 5
    assert verdicts(rows)["fwd at swin_t.1 against the best peer"] == "not met"
    rows[3].update(result="WRONG")  # a wrong result does not count
    assert verdicts(rows)["fwd at swin_t.1 against the best peer"] == "met"
    del rows[4]
    assert verdicts(rows)["fwd at swin_t.1 against the best peer"] == "not measured"


def memory_row(op: str, backend: str, median: float | None, percent: float | None = None, **labels: str) -> dict:
    row = {"op": op, "shape": "swin_t.1", "dtype": "bfloat16", "backend": backend, "direction": "fwd", "result": "ok"}
    return {**row, "median_us": median, "percent_of_copy": percent, "copy_us": 50.0, **labels}


def test_goals_of_the_memory_bound_ops() -> None:
    def verdicts(rows: list[dict]) -> dict[str, str]:
        return {row["goal"]: row["verdict"] for row in goals.memory_goals(rows)}

    nothing = verdicts([])
    assert set(nothing.values()) == {"not measured"}
    # At each of three shapes: 8 goals relative to the speed of a copy, 6 ops x 2 peers x 2 directions, and 1 goal for
    # the whole patch merging.
    assert len(nothing) == 3 * (8 + 6 * 2 * 2 + 1)
    rows = [
        memory_row("patch_merging_norm", "cuda", 55.0, 90.9),
        memory_row("patch_merging_norm", "eager", 164.0),
        memory_row("patch_merging_norm", "eager-compiled", 80.0),
        memory_row("patch_merging_gemm", "eager", 100.0),
        memory_row("patch_merging", "cuda", 172.0),
        memory_row("window_partition", "cuda", 40.0, None, result="WRONG"),
    ]
    got = verdicts(rows)
    assert got["patch_merging_norm fwd at swin_t.1"] == "met"
    assert got["patch_merging_norm fwd at swin_t.1 against eager"] == "not met"
    assert got["patch_merging_norm fwd at swin_t.1 against eager-compiled"] == "met"
    # The limit is 1.15 * (100 for the Linear + 50 for the copy) = 172.5.
    assert got["patch_merging fwd at swin_t.1"] == "met"
    assert got["window_partition fwd at swin_t.1"] == "not met"
    assert got["window_partition fwd at swin_t.2"] == "not measured"
    rows[4]["median_us"] = 173.0
    assert verdicts(rows)["patch_merging fwd at swin_t.1"] == "not met"


SMALL = {
    "2D": shapes.MapCase(2, (6, 9), 16, window=3, shift=1),
    "padded": shapes.MapCase(2, (5, 7), 16, window=3, shift=1),
    "3D": shapes.MapCase(1, (4, 2, 6), 8, window=2, shift=1),
}


@pytest.mark.parametrize("pair", ["float32", "bfloat16", "float32-bfloat16"])
@pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)
@pytest.mark.parametrize("op", memory_bound.BENCHES)
def test_memory_bound_peers_and_ours_are_right(op: str, case: shapes.MapCase, pair: str) -> None:
    if op == "patch_expanding" and len(case.size) == 3:
        pytest.skip("Swin-Unet, the peer, is 2D")
    for name in memory_bound.contestants(op, CPU, ("reference", "eager")):
        assert memory_bound.verify(op, name, case, memory_bound.PAIRS[pair], CPU)[0], name


def test_a_wrong_memory_bound_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    right = swinkernels.residual_layer_norm

    def slightly_off(x, y, *arguments, **options):
        s, z = right(x, y, *arguments, **options)
        return s, z * 1.01

    monkeypatch.setattr(swinkernels, "residual_layer_norm", slightly_off)
    pair = memory_bound.PAIRS["bfloat16"]
    assert not memory_bound.verify("residual_layer_norm", "reference", SMALL["2D"], pair, CPU)[0]


@pytest.mark.parametrize("op", memory_bound.BENCHES)
def test_moved_bytes_are_those_of_the_tensors(op: str) -> None:
    """The forward pass moves the input maps and the results; ``expected`` lists what the backward pass moves."""
    case, pair = SMALL["padded"], memory_bound.PAIRS["float32-bfloat16"]
    inputs = memory_bound.draw(op, case, pair, CPU)
    with torch.no_grad():
        out = memory_bound.make_op(op, "eager", case, pair)(**inputs)
    results = [out] if isinstance(out, torch.Tensor) else list(out)
    maps = [x for x in inputs.values() if x.dim() > 1 and x.dim() + (op == "patch_merging_gemm") > 2]
    maps = [x for x in maps if x is not inputs.get("weight")]
    forward, backward = memory_bound.BENCHES[op].moved(case, pair)
    of = lambda tensors: sum(x.numel() * x.element_size() for x in tensors)  # noqa: E731
    between = of([inputs["x"].new_empty(2 * 3 * 4 * 64, dtype=pair[1])]) if op == "patch_merging" else 0
    unread = {"window_reverse": 2 * (6 * 9 - 5 * 7) * 16 * 4}.get(op, 0)  # pads, which are dropped
    assert forward == of(maps) + of(results) + 2 * between - unread
    expected = {
        "window_partition": 2 * of(maps),
        "window_reverse": of(maps) + of(results),
        "patch_merging_norm": of(results) + 2 * of(maps),
        "patch_merging": of(results) + 3 * between + 2 * of(maps),
        "patch_merging_gemm": of(results) + 2 * of(maps),
        "layer_norm": of(results) + 2 * of(maps),
        "patch_expanding": of(results) + 2 * of(maps),
        "residual_layer_norm": of(results) + of(results[:1]) + of(maps),
        "residual_layer_norm_drop_path": of(results) + of(results[:1]) + of(maps),
        "residual_post_norm": of(results) + 2 * of([inputs.get("y", results[0])]),
    }
    assert backward == expected[op]


def test_memory_bound_rows_on_the_cpu() -> None:
    rows = memory_bound.benchmark("layer_norm", "2D", SMALL["2D"], "float32", CPU, ["reference", "eager"])
    assert {(row["backend"], row["direction"], row["result"]) for row in rows} == {
        (name, direction, "ok") for name in ("reference", "eager") for direction in ("fwd", "fwd+bwd")
    }


def test_a_dropped_branch_has_a_gradient_of_its_own() -> None:
    """Residual stream and branch of the same dtype share one gradient tensor, unless drop path scales the branch."""
    case, pair = SMALL["2D"], memory_bound.PAIRS["bfloat16"]
    one_map = 2 * 6 * 9 * 16 * 2
    assert memory_bound.BENCHES["residual_layer_norm"].moved(case, pair) == (4 * one_map, 4 * one_map)
    assert memory_bound.BENCHES["residual_layer_norm_drop_path"].moved(case, pair) == (4 * one_map, 5 * one_map)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("op", [op for op, bench in memory_bound.BENCHES.items() if bench.bare_backward])
def test_backward_alone_is_the_gradient(op: str, backend: str, plain_kernels) -> None:
    """The call timed as "bwd" on a GPU is the backward op alone, repeated without autograd."""
    if backend not in _backends.IMPLEMENTED[memory_bound.BENCHES[op].implemented]:
        pytest.skip(f"{backend} does not implement {op}")
    case, pair = SMALL["padded"], memory_bound.PAIRS["float32-bfloat16"]
    inputs = memory_bound.draw(op, case, pair, CPU)
    mine = memory_bound.make_op(op, backend, case, pair)
    results = mine(**inputs)
    gradients = memory_bound.draw_gradients([results] if isinstance(results, torch.Tensor) else results)
    got = contest.make_calls(mine, [inputs], [gradients], bare_backward=True)["bwd"](0)
    got = [got] if isinstance(got, torch.Tensor) else list(got)
    expected = memory_bound.run_once(mine, inputs, gradients)
    moved = "windows" if op == "window_reverse" else "y" if op == "residual_post_norm" else "x"
    torch.testing.assert_close(got[0], expected[f"d{moved}"], rtol=0, atol=0)


def lines_of(step: str, directions: tuple[str, ...], *labels: tuple[str, str, str, str]) -> list[dict]:
    """Return result lines in gpu/timing.py's format, one for each of ``labels`` in each of ``directions``."""
    return [
        {"step": step, "op": op, "shape": shape, "dtype": dtype, "backend": backend, "direction": direction,
         "build": "shipped", "value": 100.0, "unit": "% of copy", "us": 5.0, "copy_us": 5.0, "result": "ok"}
        for op, shape, dtype, backend in labels
        for direction in directions
    ]  # fmt: skip


def test_a_whole_run_settles_every_goal_of_an_op() -> None:
    """The steps of `make gpu-bench` cover the shapes and contestants of all goals for ops."""
    of_attention = [
        ("window_attention", shape, "bfloat16", b) for shape in timing.ATTENTION for b in ("cuda", "triton")
    ]
    of_attention += [("window_attention", shapes.GOAL, a, "cuda") for a in ("float16", "tf32")]
    of_maps = [(op, shape, "bfloat16", "cuda") for op in timing.MEMORY for shape in shapes.MAP_GOALS]
    lines = lines_of("time", timing.DIRECTIONS, *of_attention, *of_maps)
    assert any(goal["verdict"] == "met" for goal in goals.of_lines(lines[:2]))  # two lines suffice for a verdict
    peers = [("window_attention", s, "bfloat16", b) for s in goals.ATTENTION_GOALS for b in ("cuda", *attention.PEERS)]
    of_copies = [(op, s, "bfloat16", b) for op in (*goals.PEER_OPS, "patch_merging_gemm") for s in shapes.MAP_GOALS
                 for b in ("cuda", *memory_bound.PEERS)]  # fmt: skip
    lines += lines_of("peers", contest.DIRECTIONS, *peers, *of_copies)
    found = goals.of_lines(lines)
    assert {x["goal"] for x in found if x["verdict"] == "not measured"} == {x["goal"] for x in goals.model_goals([])}
    assert {line["shape"] for line in lines} <= {*shapes.ATTENTION, *shapes.MAP_GOALS}


def test_a_goal_stands_beside_its_time() -> None:
    row = {"op": "window_attention", "shape": "swin_t.1", "backend": "cuda", "dtype": "bfloat16", "direction": "fwd"}
    assert goals.of_time(row) == 85
    assert goals.of_time({**row, "direction": "bwd"}) == 70
    assert goals.of_time({**row, "backend": "triton"}) == 60
    assert goals.of_time({**row, "dtype": "tf32"}) == 70
    assert goals.of_time({**row, "shape": "batch1.1"}) == 6
    assert goals.of_time({**row, "op": "window_partition"}) == 92
    assert goals.of_time({**row, "direction": "fwd+bwd"}) is None
    assert goals.of_time({**row, "backend": "eager"}) is None


def test_tf32_is_torchs_switch() -> None:
    """TF32 rows are measured with torch's TF32 switch on, and the switch is restored afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    case = WindowAttentionCase(1, (4, 4), 1, 8, 2, 1)
    seen = []

    class Noted(list):
        def __iter__(self):
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return super().__iter__()

    rows = attention.benchmark("small", case, torch.float32, CPU, Noted(["eager"]), tf32=True)
    assert seen == ["tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert {row["dtype"] for row in rows} == {"tf32"}


def test_commit_outside_a_repository_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("benchmarks.commit.ROOT", tmp_path)
    assert record.commit() == "unknown"
    (tmp_path / "COMMIT").write_text("0123456789ab\n")  # as in a bundle
    assert record.commit() == "0123456789ab"


def test_table_and_percentiles() -> None:
    header, _, first, second = record.table([{"name": "a", "us": 1234.5}, {"name": "bb", "us": None}]).splitlines()
    assert [header.split(), first.split(), second.split()] == [["name", "us"], ["a", "1234.50"], ["bb"]]
    assert record.table([]) == "(nothing)"
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Timing(3.5, 2.0, 5.0)


def test_variants_name_what_exists() -> None:
    """The sources read every macro that a variant sets; otherwise the variant would time the shipped kernels again."""
    kernels = commit.ROOT / "csrc/kernels/cuda"
    attention_traits = (kernels / "window_attention/traits.h").read_text()
    moving = (kernels / "window_partition/window_copy.cuh").read_text() + (kernels / "layer_norm/traits.h").read_text()
    assert {name.split()[0] for name in variants.CUDA} == {"attention", "memory"}
    for name, changes in variants.CUDA.items():
        sources = attention_traits if name.startswith("attention ") else moving
        for macro in changes:
            assert f"#ifndef {variants.PREFIX}{macro}\n" in sources
            assert sources.count(f"{variants.PREFIX}{macro}") >= 3  # the macro is used


@pytest.mark.parametrize("name", variants.TRITON)
def test_triton_variants_change_the_tuning(name: str) -> None:
    pytest.importorskip("triton")
    from swinkernels.triton.window_attention import tuning

    changes = variants.TRITON[name]
    copy = types.SimpleNamespace(**vars(tuning))
    variants.apply(copy, changes)
    for key, value in changes.items():
        if not isinstance(value, dict):
            assert getattr(copy, key) == value != getattr(tuning, key)
            continue
        shipped, changed = tuning.tiles(key, 49, 32, 2), copy.tiles(key, 49, 32, 2)
        assert changed == shipped._replace(**value) != shipped
    assert copy.tiles("fwd_tiled", 144, 32, 2) == tuning.tiles("fwd_tiled", 144, 32, 2)


def test_host_cost_counts_the_calling_thread() -> None:
    """The process time includes the CPU time of other threads, the thread time does not; neither includes waiting."""

    def busy(seconds: float) -> None:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass

    def elsewhere() -> None:
        thread = threading.Thread(target=busy, args=(0.004,))
        thread.start()
        thread.join()

    times = host_cost.host_times(
        {"here": lambda: busy(0.001), "elsewhere": elsewhere, "wait": lambda: time.sleep(0.001)}, loop=2, rounds=3
    )
    assert 900 < times["here"][0] < 3000
    assert times["elsewhere"][0] < 3000 < 3900 < times["elsewhere"][1]
    assert times["wait"][1] < 900


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
def test_host_cost_of_every_case() -> None:
    rows = host_cost.benchmark(CPU, torch.float32, "cpu", list(host_cost.CASES), loop=1, rounds=1)
    assert {row["case"] for row in rows} == set(host_cost.CASES)
    calls = ("forward", "forward, recorded", "forward + backward", "forward, op alone")
    assert [row["call"] for row in rows[:4]] == list(calls)
    assert set(host_cost.GOALS) < set(calls)
    assert all(row["thread_us"] > 0 and row["met"] is None for row in rows)  # goals exist for GPUs only
