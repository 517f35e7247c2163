"""Runs a sample of the random calls, and tests that calls are repeatable, cover every argument, and are checked."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import swinkernels
from benchmarks import record
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention
from tests.cpu import random_cases
from tests.cpu.random_cases import Layout, check, draw_call

MISSING = _backends.unavailable("cpu")
needs_kernels = pytest.mark.skipif(MISSING is not None, reason=f"no CPU backend: {MISSING}")


@needs_kernels
def test_some_calls():
    failures, worst = check(0, range(300))
    assert not failures, "\n".join(failures)
    assert {dtype for dtype, _ in worst} == {"float32", "float16", "bfloat16"}
    of_tables = {f"d{name}" for name in random_cases.TABLES if name != "region_map"}
    assert {name for _, name in worst} == {"out", "dqkv", *of_tables}


# First case: v2 with one channel per head, where the gradients of q and k are zero up to rounding. Second case: under
# the mask of -100, pad tokens get a probability below 1e-19, so their gradients are almost zero.
ONCE_FAILED = {
    285228920: Case(
        3, (2, 1, 10), 2, 1, (4, 1, 5), (3, 0, 2), has_table=False, has_pad_qkv=True, has_logit_scale=True,
        bias_types=0,
        options={"pad_order": "roll_then_pad", "pad_before": (1, 0, 0), "periodic": (True, True, False)},
    ),
    2030088509: Case(2, (3, 4), 2, 22, (6, 1), (3, 0), has_table=False, has_pad_qkv=True, has_logit_scale=True),
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize("dtype", random_cases.DTYPES, ids=str)
@pytest.mark.parametrize("seed", ONCE_FAILED)
def test_calls_that_once_failed(seed, dtype):
    op = functools.partial(swinkernels.window_attention_qkvpacked, backend="cpu")
    check_window_attention(op, ONCE_FAILED[seed], dtype, seed=seed, sums_in_float32=True)


@pytest.mark.long
@needs_kernels
def test_many_calls():
    failures, _ = check(1, range(10_000))
    assert not failures, "\n".join(failures)


def test_a_call_follows_from_its_seed_and_number():
    assert str(draw_call(3, 14)) == str(draw_call(3, 14))
    assert draw_call(3, 14).layouts == draw_call(3, 14).layouts
    assert len({str(draw_call(3, n)) for n in range(20)} | {str(draw_call(4, n)) for n in range(20)}) > 35


def test_calls_are_of_every_kind():
    calls = [draw_call(0, n) for n in range(1500)]
    cases = [call.case for call in calls]
    volumes = [math.prod(case.window_tuple) for case in cases]
    found = {
        "2D": any(len(case.size) == 2 for case in cases),
        "3D": any(len(case.size) == 3 for case in cases),
        "one token": 1 in volumes,
        "long": max(volumes) > 128,
        "empty": any(case.batch == 0 for case in cases),
        "head_dim 1": any(case.head_dim == 1 for case in cases),
        "head_dim 128": any(case.head_dim == 128 for case in cases),
        "types": any((case.bias_types or 0) > 1 for case in cases),
        "dense": any(case.bias_types == 0 for case in cases),
        "axis tables": any(case.has_axis_tables for case in cases),
        "typed table": any((case.table_types or 0) > 1 for case in cases),
        "cosine": any(case.has_logit_scale for case in cases),
        "odd offset": any(layout.offset % 2 == 1 for call in calls for layout in call.layouts),
        "odd stride": any(gap % 2 == 1 for call in calls for gap in call.of_gradient.gaps),
        "rows apart": any(call.layouts[0].order[-1] != len(call.layouts[0].order) - 1 for call in calls),
        "constant tables": any(call.constant for call in calls),
    }
    given = {option for case in cases for option in case.options}
    for option in (
        "grid", "periodic", "region_map", "table_window", "table_pairs", "key_window", "pad_before", "mask_value",
        "scale",
    ):  # fmt: skip
        found[option] = option in given
    for form in random_cases.FORMS:
        found[form] = any(call.form == form for call in calls)
    assert all(found.values()), [kind for kind, is_found in found.items() if not is_found]


def test_a_tensor_is_placed_as_its_layout_says():
    x = torch.arange(6.0).reshape(2, 3)
    placed = Layout(offset=3, order=(1, 0), gaps=(1, 2)).place(x)
    assert torch.equal(placed, x)
    assert placed.stride() == (1, 3)  # 2 elements and a gap of 1
    assert placed.storage_offset() == 3
    memory = placed.as_strided((3 + 8,), (1,), 0)
    assert memory.numel() == placed.untyped_storage().nbytes() // 4  # nothing follows the last element
    assert memory.isnan().sum() == 5


@needs_kernels
def test_a_failure_prints_the_command_that_repeats_it(monkeypatch):
    """An output that is one percent too large exceeds the budget in every dtype."""
    attention = random_cases.swinkernels.window_attention
    monkeypatch.setattr(
        random_cases.swinkernels, "window_attention", lambda *a, **options: 1.01 * attention(*a, **options)
    )
    calls = {n: draw_call(0, n) for n in range(60)}
    wrong = {n for n, call in calls.items() if call.form == random_cases.SEPARATE and call.case.batch > 0}
    assert {calls[n].dtype for n in wrong} == {*random_cases.DTYPES}
    failures, _ = check(0, calls)
    commands = [line.partition("  # ")[0] for line in failures]
    assert commands == [f"python -m tests.cpu.random_cases --seed 0 --only {n}" for n in sorted(wrong)]
    assert all(" out: " in line for line in failures)


@needs_kernels
def test_the_command_adds_to_its_record(tmp_path, capsys):
    path, threads = tmp_path / "record.csv", torch.get_num_threads()
    try:
        for first in (10, 14):
            assert random_cases.main(["--cases", "4", "--first", str(first), "--record", str(path)]) == 0
            assert "4 calls in" in capsys.readouterr().out
        with pytest.raises(SystemExit, match="has calls 10 to 17 of seed 0"):
            random_cases.main(["--cases", "1", "--first", "17", "--record", str(path)])
    finally:
        torch.set_num_threads(threads)
    rows = record.read_csv(path)
    _, expected = check(0, range(10, 18))
    assert {(row["dtype"], row["result"]) for row in rows} == {*expected}
    for row in rows:
        found = expected[row["dtype"], row["result"]]
        assert (int(row["first"]), int(row["calls"]), int(row["failed"])) == (10, 8, 0)
        assert (int(row["results"]), int(row["rms_eps_of"])) == (found.results, found.rms_eps_of)
