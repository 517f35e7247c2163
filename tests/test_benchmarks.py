"""The benchmarks measure what they say: right peers, the right bytes, a verdict only for what was measured."""

from __future__ import annotations

import csv
import types
from pathlib import Path

import pytest
import torch

import swinkernels
from benchmarks import attention, gpu_suite, record, shapes, variants
from benchmarks.peers import make_peer
from benchmarks.timing import Timing
from swinkernels import reference
from swinkernels.testing import WindowAttentionCase, run_case

CPU = torch.device("cpu")


@pytest.mark.parametrize("sdpa", [False, True], ids=["eager", "sdpa"])
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
    ],
    ids=str,
)
def test_peers_equal_the_reference(case: WindowAttentionCase, sdpa: bool) -> None:
    inputs = {name: x.double() for name, x in case.inputs(torch.float64).items()}
    exact = run_case(reference.window_attention_qkvpacked, inputs, case.arguments())
    got = run_case(make_peer(case, torch.float64, CPU, sdpa=sdpa), inputs, {})
    for name, value in exact.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_a_wrong_result_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    case = WindowAttentionCase(2, (6, 9), 2, 8, 3, 1)
    assert attention.verify("eager", case, torch.float32, CPU)[0]
    right = attention.make_peer

    def slightly_off(*args, **kwargs):
        peer = right(*args, **kwargs)
        return lambda qkv, bias_table: peer(qkv, bias_table * 1.01)

    monkeypatch.setattr(attention, "make_peer", slightly_off)
    assert not attention.verify("eager", case, torch.float32, CPU)[0]


def test_rows_of_a_run_on_the_cpu(tmp_path: Path) -> None:
    names = attention.contestants(CPU, ("cpu", "eager"))
    assert "eager" in names
    assert "cuda" not in attention.contestants(CPU, ())
    case = WindowAttentionCase(1, (6, 6), 2, 8, 3, 1)
    rows = attention.benchmark("small", case, torch.float32, CPU, names)
    by_key = {(row["backend"], row["direction"]): row for row in rows}
    assert ("eager", "bwd") not in by_key  # alone, backward is timed for ours, as the bare op
    for name in names:
        assert by_key[name, "fwd"]["result"] == "ok"
        assert by_key[name, "fwd"]["median_us"] > 0
    if "cpu" in names:
        assert by_key["cpu", "bwd"]["median_us"] < by_key["cpu", "fwd+bwd"]["median_us"] * 2
    record.write_csv(tmp_path / "a.csv", rows, CPU)
    with (tmp_path / "a.csv").open() as file:
        written = list(csv.DictReader(file))
    assert len(written) == len(rows)
    assert written[0]["swinkernels"] == swinkernels.__version__
    assert all(written[0][column] for column in ("device", "torch", "commit", "date"))


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
    moved = attention.moved_bytes(shapes.ATTENTION[shapes.GOAL], torch.bfloat16)
    tokens = 128 * 56 * 56
    assert moved == {"fwd": tokens * 4 * 96 * 2, "bwd": tokens * 7 * 96 * 2, "fwd+bwd": tokens * 11 * 96 * 2}


def goal_row(direction: str, percent: float | None, result: str = "ok") -> dict:
    return {
        "shape": shapes.GOAL,
        "dtype": "bfloat16",
        "backend": "cuda",
        "direction": direction,
        "result": result,
        "percent_of_copy": percent,
    }


@pytest.mark.parametrize(
    ("rows", "verdicts"),
    [
        ([], ["not measured", "not measured"]),
        ([goal_row("fwd", 65.0), goal_row("bwd", 49.9)], ["met", "not met"]),
        ([goal_row("fwd", 90.0, "WRONG"), goal_row("bwd", None, "FAILED")], ["not met", "not measured"]),
    ],
)
def test_goals(rows: list[dict], verdicts: list[str]) -> None:
    assert [row["verdict"] for row in gpu_suite.goals(rows)] == verdicts


def test_plan_of_the_suite_starts_with_the_goal() -> None:
    plan = gpu_suite.plan()
    assert plan[0] == (shapes.GOAL, "bfloat16", True)
    assert len(plan) == len(set(plan))
    assert all(shape in shapes.ATTENTION and dtype in attention.DTYPES for shape, dtype, _ in plan)


def test_commit_outside_a_repository_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path)
    assert record.commit() == "unknown"


def test_table_and_percentiles() -> None:
    header, _, first, second = record.table([{"name": "a", "us": 1234.5}, {"name": "bb", "us": None}]).splitlines()
    assert [header.split(), first.split(), second.split()] == [["name", "us"], ["a", "1234.50"], ["bb"]]
    assert record.table([]) == "(nothing)"
    assert Timing.of([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == Timing(3.5, 2.0, 5.0)


def test_variants_name_what_exists() -> None:
    """A variant that sets a macro or an attribute that nothing reads would time the shipped kernels again."""
    traits = (variants.ROOT / "csrc/kernels/cuda/window_attention/traits.h").read_text()
    for changes in variants.CUDA.values():
        for macro in changes:
            assert f"#ifndef {variants.PREFIX}{macro}\n" in traits
            assert traits.count(f"{variants.PREFIX}{macro}") >= 3  # and it is used
    assert next(iter(variants.CUDA.values())) == next(iter(variants.TRITON.values())) == {}


@pytest.mark.parametrize("name", variants.TRITON)
def test_triton_variants_change_the_launcher(name: str) -> None:
    pytest.importorskip("triton")
    from swinkernels.triton import window_attention as launcher

    changes = variants.TRITON[name]
    copy = types.SimpleNamespace(**vars(launcher))
    variants.adjust(copy, changes)
    for key, value in changes.items():
        if not isinstance(value, dict):
            assert getattr(copy, key) == value != getattr(launcher, key)
            continue
        shipped, changed = launcher.tiles(key, 49, 32, 2), copy.tiles(key, 49, 32, 2)
        assert changed == shipped._replace(**value) != shipped
    assert copy.tiles("fwd_tiled", 144, 32, 2) == launcher.tiles("fwd_tiled", 144, 32, 2)
