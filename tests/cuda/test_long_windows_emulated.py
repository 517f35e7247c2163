"""Tests the plain CUDA kernels for long windows, run on the CPU by the emulator, against the float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from swinkernels import reference
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention, run_case
from tests import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}


def _regions(*frame: int) -> torch.Tensor:
    return torch.randint(0, 3, frame, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


# Windows of 81 to 1,024 tokens: even and odd sides, whole and partial steps of 16 keys, 1 to 64 strips of queries.
CASES = {
    "9 x 9, rolled first": Case(2, (9, 10), 2, 16, 9, 4, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "12 x 12, seam": Case(1, (12, 24), 2, 32, 12, 6),
    "12 x 12, pads": Case(2, (13, 12), 1, 32, 12, 5, has_pad_qkv=True),
    "14 x 14": Case(1, (14, 28), 1, 32, 14, 7),
    "16 x 16, pads, wide heads": Case(1, (16, 9), 1, 64, 16, 7, has_pad_qkv=True),
    "16 x 16, zero pads": Case(1, (16, 9), 1, 32, 16, 7),
    "7 x 7 x 7": Case(1, (7, 8, 7), 1, 16, 7, 3, has_pad_qkv=True),
    "8 x 7 x 7": Case(1, (8, 7, 7), 1, 32, (8, 7, 7), (4, 3, 3)),
    "24 x 24": Case(1, (24, 24), 1, 32, 24, 12),
    "32 x 32": Case(1, (32, 31), 1, 32, 32, 3, has_pad_qkv=True),
    "heads of 24": Case(1, (12, 12), 2, 24, 12, 6),
    "heads of 48": Case(1, (12, 12), 2, 48, 12, 6),
    "no bias": Case(1, (12, 12), 1, 32, 12, 0, has_table=False),
    "grid": Case(1, (20, 30), 1, 32, 10, 0, options={"grid": True}),
    "grid, pads": Case(1, (19, 29), 1, 32, 10, 0, has_pad_qkv=True, options={"grid": True}),
    "region map": Case(1, (18, 9), 1, 16, 9, 4, options={"region_map": _regions(18, 9)}),
    "table of a larger window": Case(1, (9, 10), 1, 16, (9, 10), 0, options={"table_window": (10, 12)}),
    "table of a larger window, odd": Case(1, (9, 10), 1, 16, (9, 10), 0, options={"table_window": (10, 13)}),
    "periodic axis": Case(1, (18, 18), 1, 32, 9, 4, options={"periodic": (False, True)}),
    "dense, seam": Case(1, (12, 24), 2, 32, 12, 6, has_table=False, bias_types=0),
    "dense, pads": Case(2, (13, 12), 2, 16, 12, 5, has_table=False, bias_types=0, has_pad_qkv=True),
    "dense, odd": Case(1, (9, 18), 2, 64, 9, 4, has_table=False, bias_types=0),
    "dense, zero pads, partial step": Case(1, (10, 9), 1, 48, 10, 3, has_table=False, bias_types=0),
    "dense, 3D": Case(1, (7, 8, 7), 1, 32, 7, 3, has_table=False, bias_types=0, has_pad_qkv=True),
    "v2, seam": Case(1, (12, 24), 2, 32, 12, 6, has_logit_scale=True),
    "v2, pads": Case(2, (13, 12), 2, 16, 12, 5, has_logit_scale=True, has_pad_qkv=True),
    "v2, odd": Case(1, (9, 18), 2, 64, 9, 4, has_logit_scale=True),
    "v2, zero pads, partial step": Case(1, (10, 9), 2, 24, 10, 3, has_logit_scale=True),
    "v2, no bias": Case(1, (12, 12), 2, 32, 12, 0, has_table=False, has_logit_scale=True),
    "v2, dense": Case(1, (12, 12), 2, 32, 12, 0, has_table=False, bias_types=0, has_logit_scale=True),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(library, name, dtype):
    check_window_attention(library.window_attention_qkvpacked, CASES[name], dtype, rounds_unit_rows=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["9 x 9, rolled first", "12 x 12, seam", "14 x 14", "7 x 7 x 7", "dense, seam", "v2, pads"]
)
def test_same_bits_whatever_the_schedule(library, name, dtype):
    inputs, arguments = CASES[name].inputs(dtype), CASES[name].arguments()
    library.check_schedules(lambda: run_case(library.window_attention_qkvpacked, inputs, arguments))


@pytest.mark.parametrize("multiprocessors", [1, 3, 200])
def test_any_number_of_multiprocessors(library, multiprocessors):
    """The grid ranges from blocks that loop over strips and windows to blocks with one strip of one window each."""
    library.configure(multiprocessors=multiprocessors)
    dense, v2 = {"has_table": False, "bias_types": 0}, {"has_logit_scale": True}
    for options in ({}, dense, v2):
        for case in (
            Case(2, (12, 24), 1, 32, 12, 5, **options),
            Case(3, (9, 16), 2, 16, 9, 4, has_pad_qkv=True, **options),
            Case(1, (14, 28), 2, 16, 14, 7, **options),
        ):
            check_window_attention(library.window_attention_qkvpacked, case, torch.bfloat16, rounds_unit_rows=True)


def test_the_parts_of_dlogit_scale_are_all_added(library):
    """With 1 and with 200 multiprocessors, the same terms are summed in one and in ten parts per head.

    A comparison with float64 would not detect a missing part, because the terms cancel and unit rows are rounded.
    """
    case = Case(1, (14, 28), 2, 16, 14, 7, has_logit_scale=True)
    inputs, found = case.inputs(torch.bfloat16), []
    for multiprocessors in (1, 200):
        library.configure(multiprocessors=multiprocessors)
        found.append(run_case(library.window_attention_qkvpacked, inputs, case.arguments())["dlogit_scale"])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
    assert found[0].count_nonzero() == 1  # the first head's logit_scale is clamped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("slope", [6.0, -6.0], ids=["rising", "falling"])
def test_scores_far_apart(library, dtype, slope):
    """Scores reach 132, and the largest scores of a row belong to its first or its last keys.

    In bfloat16, the sums would overflow if no maximum were subtracted. In float16, the running maximum changes from
    block to block.
    """
    case = Case(1, (12, 24), 1, 32, 12, 0)
    inputs = case.inputs(dtype)
    offset = torch.arange(23.0) - 11
    inputs["bias_table"] = -slope * (offset[:, None] + offset).reshape(-1, 1)
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
    eps = torch.finfo(dtype).eps
    for name, x in exact.items():
        error = got[name].double() - x
        assert error.square().mean().sqrt() <= 2 * eps * x.square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("window", [(9, 9), (14, 14)], ids=str)
def test_what_lies_past_the_window_takes_no_part(library, window, dtype):
    """The last step of 16 keys has 15 or 12 keys past the window. If they counted, rows of P would sum to over 1.06."""
    case = Case(1, window, 1, 32, window, 0)
    inputs = case.inputs(dtype)
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
    for name in ("out", "dqkv"):
        error = got[name].double() - exact[name]
        assert error.norm() <= 2 * torch.finfo(dtype).eps * exact[name].norm(), name


@pytest.mark.parametrize("window", [(9, 9), (14, 14), (7, 7, 7)], ids=str)
@pytest.mark.parametrize("options", [{}, {"has_table": False}, {"has_table": False, "bias_types": 0}], ids=str)
def test_low_scores_leave_the_gradient_of_keys_alone(library, options, window):
    """All scores are near -50, but keys past the window, which are zeros, would have scores near zero.

    In float16, dS is scaled by a factor that depends on its largest value, to which those keys must not contribute.
    """
    case = Case(1, window, 1, 32, window, 0, **options)
    inputs = case.inputs(torch.float16)
    inputs["qkv"] = inputs["qkv"] + torch.tensor([3.0, -3.0, 0.0]).repeat_interleave(32)
    inputs["qkv"] = inputs["qkv"].half()
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
    last = math.prod(window) // 16 * 16  # the first token of the last, partial step
    for name, x, y in (
        ("out", got["out"], exact["out"]),
        ("dk, dv", got["dqkv"][..., 32:], exact["dqkv"][..., 32:]),
        ("dk of the last tokens", *(results["dqkv"].flatten(0, -2)[last:, 32:64] for results in (got, exact))),
    ):
        denormal = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
        limit = 4 * torch.finfo(torch.float16).eps * y.norm() + denormal * y.numel() ** 0.5
        assert (x.double() - y).norm() <= limit, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_dense_bias_may_exclude_the_first_keys(library, dtype):
    case = Case(1, (12, 12), 2, 32, 12, 0, has_table=False, bias_types=0)
    inputs = case.inputs(dtype)
    inputs["bias"][..., :70] = -torch.inf
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
    for name, x in exact.items():
        assert (got[name].double() - x).norm() <= 2 * torch.finfo(dtype).eps * x.norm(), name


def test_what_is_not_finite_stays_in_its_window(library):
    """Infinities in one window do not reach later windows that the same block processes.

    The rows past the window in its last tile are zeroed for each window.
    """
    library.check_isolation(Case(2, (9, 18), 1, 24, 9, 0, has_table=False))


def test_dense_bias_at_an_odd_address(library, monkeypatch):
    """The bias may be a view that starts at an odd element of its storage, which rules out loads of 8 bytes."""
    aligned = library.copy

    def copy(x):
        if x.dim() != 3:
            return aligned(x)
        return library.empty((x.numel() + 1,), x.dtype, alignment=4)[:-1].reshape(x.shape).copy_(x)

    monkeypatch.setattr(library, "copy", copy)
    case = Case(1, (12, 12), 2, 16, 12, 0, has_table=False, bias_types=0)
    check_window_attention(library.window_attention_qkvpacked, case, torch.bfloat16, rounds_unit_rows=True)


def test_1024_tokens_take_no_memory_for_scores(library):
    """For batch 8 and 12 heads on 132 multiprocessors, workspace and lse need at most a fifth of the maps' bytes."""
    library.configure(multiprocessors=132)
    case = Case(8, (32, 32), 12, 32, 32, 0)
    qkv, table = torch.empty(8, 32, 32, 3 * 12 * 32, dtype=torch.bfloat16), torch.empty(63 * 63, 12)
    maps = 8 * qkv.numel() // 3 * qkv.element_size()  # q, k, v, out and their gradients
    lse = 8 * 12 * 1024 * 4
    workspace = library.workspace_bytes(qkv, ["bias_table"], bias_table=table, **case.arguments())
    assert 0 < workspace + lse <= 0.2 * maps
