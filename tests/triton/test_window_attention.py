"""Tests the Triton backend of window attention against the float64 reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swinkernels
from swinkernels import reference
from swinkernels.reference.window_attention import relative_position_index, shift_region
from swinkernels.testing import (
    SMALL_WINDOW,
    assert_within_budget,
    check_window_attention,
    op_arguments,
    opcheck_forward_and_backward,
    run_case,
)
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.triton.window_attention import tuning
from tests.support.attention_cases import cases
from tests.support.philox import kept_by_triton
from tests.support.triton_checks import DEVICE, DTYPES, ON_GPU, Checks

CASES = {
    "n4": Case(1, (4, 6), 2, 8, 2, 1),
    "n9": Case(2, (6, 3), 1, 16, 3, 1),
    "n49": Case(1, (14, 7), 2, 32, 7, 3),
    "n49_no_shift_no_bias": Case(1, (7, 14), 1, 32, 7, has_table=False),
    "n64": Case(1, (8, 16), 1, 64, 8, 4),
    "n64_head_dim_128": Case(1, (8, 8), 1, 128, 8, 4),
    "n100": Case(1, (10, 20), 1, 32, 10, 5),
    "rectangular_window": Case(1, (10, 6), 2, 24, (5, 3), (2, 1)),
    "rectangular_window_tiled": Case(1, (8, 18), 1, 16, (8, 9), (3, 4)),
    "pad_then_roll": Case(2, (5, 7), 2, 8, 4, 2, has_pad_qkv=True),
    "roll_then_pad": Case(2, (5, 7), 2, 8, 4, 2, has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    "pad_with_zeros": Case(1, (5, 6), 2, 8, 4, (1, 2)),
    "map_smaller_than_shift": Case(
        2, (4, 9), 2, 8, 7, (5, 2), has_pad_qkv=True, options={"pad_order": "roll_then_pad", "mask_value": -1.0}
    ),
    "nearly_all_pads": Case(
        1, (16, 1), 1, 32, (7, 6), has_table=False, has_pad_qkv=True, options={"pad_order": "roll_then_pad"}
    ),
    "nearly_all_pads_tiled": Case(1, (1, 11), 1, 24, (9, 16), has_pad_qkv=True, options={"scale": 0.1}),
    "pad_tiled": Case(1, (9, 11), 1, 8, (10, 9), (4, 3), has_pad_qkv=True),
    "pad_before": Case(
        1, (5, 6), 2, 8, 4, (2, 1), has_pad_qkv=True, options={"pad_before": (1, 2), "pad_order": "pad_then_roll"}
    ),
    "pad_before_roll_then_pad": Case(
        1, (5, 6), 2, 8, 4, (2, 1), has_pad_qkv=True, options={"pad_before": (2, 1), "pad_order": "roll_then_pad"}
    ),
    "pad_before_tiled": Case(
        1, (8, 8), 1, 8, (8, 9), (3, 4), has_pad_qkv=True, options={"pad_before": (0, 1), "pad_order": "roll_then_pad"}
    ),
    "periodic": Case(1, (6, 9), 2, 8, 3, 1, options={"periodic": (False, True)}),
    "periodic_tiled": Case(1, (8, 9), 1, 8, (8, 9), (3, 4), options={"periodic": (True, False)}),
    "grid": Case(1, (6, 8), 2, 8, (3, 4), options={"grid": True}),
    "grid_padded": Case(1, (5, 7), 1, 8, (3, 4), has_pad_qkv=True, options={"grid": True}),
    "grid_tiled": Case(1, (16, 9), 1, 8, (8, 9), options={"grid": True}),
    "region_map": Case(
        1, (6, 6), 2, 8, 3, 1, options={"region_map": torch.arange(36).reshape(6, 6).remainder(5).div(2).floor().int()}
    ),
    "region_map_tiled": Case(
        1, (10, 10), 1, 8, 10, options={"region_map": torch.arange(100).reshape(10, 10).remainder(7).div(4).int()}
    ),
    "masked_out": Case(1, (7, 8), 2, 8, 3, 1, has_pad_qkv=True, options={"mask_value": -math.inf}),
    "mask_value_and_scale": Case(1, (6, 6), 2, 8, 3, 1, options={"mask_value": -1.5, "scale": 0.7}),
    "three_axes": Case(1, (2, 4, 6), 2, 8, (2, 2, 3), (1, 1, 1)),
    "three_axes_padded": Case(1, (3, 5, 4), 1, 8, (2, 4, 3), (1, 2, 0), has_pad_qkv=True),
    "three_axes_tiled": Case(1, (4, 5, 4), 1, 16, (4, 5, 4), (2, 2, 1)),
    "table_window": Case(1, (2, 6, 6), 2, 8, (2, 3, 3), (1, 1, 1), options={"table_window": (4, 3, 3)}),
    "table_window_of_other_axes": Case(1, (6, 3), 1, 8, (2, 3), (1, 0), options={"table_window": (4, 5)}),
    "table_window_tiled": Case(1, (8, 9), 1, 8, (8, 9), options={"table_window": (9, 12)}),
    "head_dim_1": Case(1, (6, 9), 2, 1, 3, 1),
    "head_dim_10": Case(1, (8, 4), 2, 10, 4, 2),
    "head_dim_12_tiled": Case(1, (8, 9), 1, 12, (8, 9), 4),
    "head_dim_20": Case(1, (6, 9), 2, 20, 3, 1),
    "head_dim_5_padded": Case(1, (5, 7), 2, 5, 4, 2, has_pad_qkv=True),
    "head_dim_30_tiled": Case(1, (8, 9), 1, 30, 9, 4, has_pad_qkv=True),
    "cosine": Case(2, (5, 7), 2, 8, 4, 2, has_pad_qkv=True, has_logit_scale=True),
    "cosine_n64": Case(1, (8, 8), 2, 32, 8, 4, has_logit_scale=True),
    "cosine_tiled": Case(1, (6, 11), 2, 20, (6, 12), (2, 3), has_pad_qkv=True, has_logit_scale=True),
    "cosine_of_three_axes": Case(1, (3, 5, 4), 2, 10, (2, 4, 3), (1, 2, 0), has_pad_qkv=True, has_logit_scale=True),
    "cosine_grid": Case(
        1, (7, 8), 2, 12, 4, has_table=False, has_pad_qkv=True, has_logit_scale=True, bias_types=2,
        options={"grid": True},
    ),
    "dense": Case(1, (5, 7), 2, 8, 4, 2, has_table=False, bias_types=0, has_pad_qkv=True),
    "types": Case(2, (4, 6, 3), 2, 8, (2, 2, 3), (1, 1, 1), has_table=False, bias_types=3),
    "dense_tiled": Case(1, (8, 9), 1, 8, (8, 9), (3, 4), has_table=False, has_logit_scale=True, bias_types=0),
    "types_tiled": Case(1, (16, 9), 1, 8, (8, 9), (3, 4), has_table=False, bias_types=2),
    "many_windows_of_a_program": Case(40, (4, 4), 32, 8, 4, 2) if ON_GPU else Case(3, (6, 4), 1, 8, 2, 1),
}  # fmt: skip


DROPPED = {
    "dropout": Case(2, (6, 6), 2, 8, 3, 1, has_logit_scale=True, options={"dropout_p": 0.4}),
    "dropout_tiled": Case(1, (8, 9), 1, 8, (8, 9), (3, 4), options={"dropout_p": 0.25}),
}  # fmt: skip

FORMS = ("window_attention_qkvpacked", "window_attention")

check = Checks(__name__)


def on_device(case: Case) -> Case:
    options = {k: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for k, v in case.options.items()}
    return Case(**{**case.__dict__, "options": options})


def packed(**arguments):
    return swinkernels.window_attention_qkvpacked(backend="triton", **arguments)


def split(qkv, num_heads):
    return qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)


@check(*CASES, in_turn=True)
def matches_reference(name, dtype):
    check_window_attention(packed, on_device(CASES[name]), dtype, DEVICE)


# Interpreted cases have one image of one window, and one head.
FEW, HEADS, WIDTH = (2, 3, 32) if ON_GPU else (1, 1, 8)
LONG = {
    "n392": Case(FEW, (8, 7, 6), HEADS, WIDTH, (8, 7, 7), (4, 3, 3), has_pad_qkv=True),
    "n576": Case(FEW, (48 if ON_GPU else 24, 24), HEADS, WIDTH, 24, 12, has_logit_scale=True),
    "n1024": Case(FEW, (60 if ON_GPU else 31, 32), HEADS, WIDTH, 32, 16, has_pad_qkv=True),
    "n1024_types": Case(
        FEW, (8 if ON_GPU else 4, 16, 16), HEADS, WIDTH, (4, 16, 16), (2, 8, 8), has_table=False,
        bias_types=2 if ON_GPU else 1,
    ),
}  # fmt: skip


@check(*LONG, dtypes=DTYPES if ON_GPU else (torch.float16,))
def long_windows_match_reference(name, dtype):
    """In the interpreter, which takes the same time for any tile size, windows have fewer and larger tiles."""
    large = {} if ON_GPU else {"side_effect": lambda *_: tuning.Tiles(256, 256, 4, 1)}
    with mock.patch.object(tuning, "tiles", wraps=tuning.tiles, **large):
        check_window_attention(packed, on_device(LONG[name]), dtype, DEVICE)


# "whole": a program processes several windows. "tiled": small windows have several tiles, which take the interpreter a
# fraction of the time of large windows.
REGIMES = {
    "whole": {"FORWARD_PROGRAMS": 4, "BACKWARD_PROGRAMS": 4},
    "tiled": {"is_whole": lambda *_: False, "tiles": lambda *_: tuning.Tiles(32, 32, 4, 1)},
}


@check(*REGIMES)
def random_cases_match_reference(regime, dtype):
    """Random cases, which combine all arguments including dropout, match the reference."""
    most = 1 if regime == "tiled" and not ON_GPU else 2
    of_few = cases(
        longest=5, beyond=0, most=most, head_dims=(4, 5, 10, 12, 20, 30, 32), tokens=64,
        # v2 multiplies a cosine's rounding errors by up to 100, which is too much for random cases in float32. Other
        # tests cover v2 in float32 with chosen cases.
        cosine=dtype != torch.float32,
    )  # fmt: skip

    # Rounding alone puts about one interpreted float16 case in fifty above the budget, so the examples are always the
    # same.
    @settings(max_examples=300 if ON_GPU else 8, deadline=None, database=None, derandomize=not ON_GPU)
    @given(of_few, st.sampled_from([0.0, 0.0, 0.3]), st.integers(0, 9))
    def run(case, dropout_p, seed):
        with mock.patch.multiple(tuning, **REGIMES[regime]):
            case = dataclasses.replace(case, options={**case.options, "dropout_p": dropout_p})
            # The sum over a few pad tokens may cancel to a hundredth of its terms, and v2's normalised rows are
            # rounded, so each term is inexact.
            frame = math.prod(-(-s // w) * w for s, w in zip(case.size, case.window_tuple, strict=True))
            has_few_pads = case.has_pad_qkv and frame - math.prod(case.size) < SMALL_WINDOW
            check_with_dropout(case, dtype, seed, cancels=case.has_logit_scale and has_few_pads)

    run()


@check("cosine", "types", "types_tiled", dtypes=DTYPES[1:])
def matches_reference_with_few_programs(name, dtype):
    """Results are correct if a program processes several windows, and several programs share the windows of a type."""
    case = dataclasses.replace(on_device(CASES[name]), batch=2)
    with mock.patch.multiple(tuning, FORWARD_PROGRAMS=6, BACKWARD_PROGRAMS=6):
        check_window_attention(packed, case, dtype, DEVICE)


@check(*FORMS)
def opcheck(form, dtype):
    case = Case(1, (1, 3), 1, 4, 2, 1, has_pad_qkv=True)
    opcheck_forward_and_backward(form, "_triton", op_arguments(case, form, dtype, DEVICE))


@check(*(FORMS if ON_GPU else FORMS[:1]), dtypes=DTYPES[1:])
def opcheck_of_v2_types_and_dropout(form, dtype):
    case = Case(
        1, (1, 4), 1, 4, 2, has_table=False, has_pad_qkv=True, has_logit_scale=True, bias_types=2,
        options={"dropout_p": 0.4},
    )  # fmt: skip
    opcheck_forward_and_backward(form, "_triton", op_arguments(case, form, dtype, DEVICE))


@check("n49", "rectangular_window_tiled", "pad_before", "three_axes_padded", "cosine", "types", in_turn=True)
def separate_form_matches_reference(name, dtype):
    """window_attention matches the reference if q, k and v are strided views of one map."""

    def separate(qkv, num_heads, **arguments):
        q, k, v = split(qkv, num_heads)
        return swinkernels.window_attention(q, k, v, num_heads=num_heads, backend="triton", **arguments)

    check_window_attention(separate, on_device(CASES[name]), dtype, DEVICE)


@check("rectangular_window", "rectangular_window_tiled", in_turn=True)
def every_map_has_its_own_strides(name, dtype):
    """Channels-first q, k sliced from a wider map, strided v and expanded dout give the results of contiguous maps."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    q, k, v = (x.contiguous() for x in split(inputs["qkv"], case.num_heads))
    bias_table = inputs["bias_table"]
    wide_k = torch.cat([k, k, k], dim=-1)
    strided = (
        q.permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2),
        wide_k[..., case.head_dim : 2 * case.head_dim],
        v.repeat_interleave(2, dim=-1)[..., ::2],
    )
    results = []
    for maps in ((q, k, v), strided):
        leaves = [x.detach().requires_grad_() for x in (*maps, bias_table)]
        out = swinkernels.window_attention(*leaves, backend="triton", **case.arguments())
        results.append([out.detach(), *torch.autograd.grad(out.sum(), leaves)])
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)


@check(*(CASES if ON_GPU else ("pad_then_roll", "pad_tiled", "n49", "cosine")), in_turn=True)
def same_bits_twice(name, dtype):
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    first, second = (run_case(packed, inputs, case.arguments()) for _ in range(2))
    for key in first:
        assert torch.equal(first[key], second[key]), key


@check()
def inputs_are_not_modified(dtype):
    case = on_device(CASES["pad_then_roll"])
    inputs = case.inputs(dtype, DEVICE)
    before = {name: x.clone() for name, x in inputs.items()}
    run_case(packed, inputs, case.arguments())
    for name in inputs:
        assert torch.equal(inputs[name], before[name]), name


@check("n9", "n100", "pad_then_roll", "types_tiled", in_turn=True)
def empty_batch(name, dtype):
    case = on_device(Case(**{**CASES[name].__dict__, "batch": 0}))
    results = run_case(packed, case.inputs(dtype, DEVICE), case.arguments())
    assert results["out"].shape == (0, *case.size, case.num_heads * case.head_dim)
    for key, x in results.items():
        assert x.numel() == 0 or key in ("dbias_table", "dbias", "dlogit_scale", "dpad_qkv")
        assert not x.any()


@check("n9", "n100", "pad_then_roll", in_turn=True)
def lse_is_the_log_sum_exp_of_the_scores(name, dtype):
    """If q is zero, the scores are bias plus mask, so their log-sum-exp is known exactly."""
    case = on_device(CASES[name])
    case = dataclasses.replace(case, has_pad_qkv=False)
    qkv, bias_table, *arguments = op_arguments(case, "window_attention_qkvpacked", dtype, DEVICE)
    qkv = qkv.detach().clone()
    qkv.select(-3, 0).zero_()
    _, lse = torch.ops.swinkernels.window_attention_qkvpacked_fwd_triton(qkv, bias_table, *arguments)
    rank = len(case.size)
    window, shift = (v if isinstance(v, tuple) else (v,) * rank for v in (case.window_size, case.shift_size))
    scores = bias_table.detach().double()[relative_position_index(window, device=DEVICE)].permute(2, 0, 1)
    region = shift_region(case.size, window, shift, periodic=(False,) * rank, device=DEVICE)
    mask = -100.0 * (region[:, :, None] != region[:, None, :]).double()
    exact = torch.logsumexp(scores + mask[:, None], dim=-1).expand(case.batch, -1, -1, -1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-5)


@check("cosine", "types_tiled", dtypes=DTYPES[:1])
def gradients_that_are_not_needed_are_empty(name, dtype):
    case = on_device(CASES[name])
    arguments = op_arguments(case, "window_attention_qkvpacked", dtype, DEVICE)
    qkv, *arguments = (x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    ops = torch.ops.swinkernels
    out, lse = ops.window_attention_qkvpacked_fwd_triton(qkv, *arguments)
    given = sum(1 << i for i, table in enumerate(arguments[:4]) if table is not None)
    full = ops.window_attention_qkvpacked_bwd_triton(out, qkv, lse, *arguments, given)
    dqkv, *sums = ops.window_attention_qkvpacked_bwd_triton(out, qkv, lse, *arguments, 0)
    assert torch.equal(dqkv, full[0])
    assert all(x.shape == (0,) and x.dtype == torch.float32 for x in sums)
    assert all(x.numel() > 0 for i, x in enumerate(full[1:]) if given >> i & 1)
    assert all(x.dtype == torch.float32 for x in full[1:])
    assert not full[4][:1].any()  # a pad token's query has no gradient


# ---- v2 --------------------------------------------------------------------------------------------------------------


@check("cosine", "cosine_tiled", dtypes=DTYPES[:1])
def rows_of_zeros_have_cosine_zero(name, dtype):
    """Rows of zeros have correct gradients, which are of the order of 1e12, and no result is infinite or NaN."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    qkv = inputs["qkv"].unflatten(-1, (3, case.num_heads, case.head_dim))
    qkv[:, 1, :, 0, 0] = 0  # queries
    qkv[:, 2, :, 1, 1] = 0  # keys
    got = run_case(packed, inputs, case.arguments())
    wide = {key: x.double().cpu() for key, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, CASES[name].arguments())
    assert exact["dqkv"].abs().max() > 1e9
    for key, x in exact.items():
        # Rounding errors are relative to the row, because rows of zeros have far larger gradients than the others.
        scale = x.abs().amax(dim=-1, keepdim=True) if key == "dqkv" else x.abs().amax()
        assert ((got[key].double().cpu() - x).abs() <= 1e-3 * scale + 1e-5).all(), key


@check(dtypes=DTYPES[:1])
def the_clamp_is_that_of_torch(dtype):
    """A logit_scale of ln 100 in float32 exceeds ln 100 and has no gradient; the next lower number has one."""
    case = on_device(Case(1, (4, 4), 3, 8, 4, has_logit_scale=True))
    inputs = case.inputs(dtype, DEVICE)
    edge = torch.tensor(math.log(100.0), device=DEVICE)
    below = torch.nextafter(edge, torch.zeros_like(edge))
    inputs["logit_scale"] = torch.stack([edge, below, -3 * edge])
    got = run_case(packed, inputs, case.arguments())
    expected = run_case(reference.window_attention_qkvpacked, inputs, case.arguments())
    assert got["dlogit_scale"][0] == 0
    assert got["dlogit_scale"][1] != 0
    for key, x in expected.items():
        torch.testing.assert_close(got[key], x, rtol=1e-3, atol=1e-4)


# ---- range -----------------------------------------------------------------------------------------------------------

# Factors for q, k, v and dout, at least one of which is large.
LARGE = {
    "values": (1, 1, 15000, 1),
    "queries": (15000, 1e-4, 1, 1),
    "keys": (1e-4, 15000, 1, 1),
    "gradients": (1e-3, 1e-3, 1000, 15000),
    "scores": (60, 60, 1, 1),
}


@check(*((name, case) for name in LARGE for case in ("n9", "pad_tiled", "cosine", "cosine_tiled")), dtypes=(None,))
def float16_is_finite_where_the_result_is(name, case):
    case = on_device(dataclasses.replace(CASES[case], batch=1, num_heads=1, size=CASES[case].window_tuple))
    inputs = case.inputs(torch.float16)
    factors = torch.tensor(LARGE[name][:3]).repeat_interleave(case.head_dim)
    inputs["qkv"] = (inputs["qkv"].float() * factors).clamp(-60000, 60000).half()
    inputs["dout"] = (inputs["dout"].float() * LARGE[name][3]).half()
    got = run_case(packed, {key: x.to(DEVICE) for key, x in inputs.items()}, case.arguments())
    exact, f32 = (
        run_case(
            reference.window_attention_qkvpacked, {key: x.to(dtype) for key, x in inputs.items()}, case.arguments()
        )
        for dtype in (torch.float64, torch.float32)
    )
    for key, x in got.items():
        finite = exact[key].to(x.dtype).isfinite() & f32[key].to(x.dtype).isfinite()
        assert finite.any(), key
        x = x.cpu()
        assert x[finite].isfinite().all(), key
        # With large scores P is less exact: it is recomputed from a rounded lse of up to 2 ** 14, with a relative error
        # of about |lse| * 2 ** -22.
        slack = 16 if name == "scores" else 4
        error = (x.double() - exact[key])[finite].abs().max()
        largest = exact[key][finite].abs().max()
        assert error <= slack * 2**-11 * largest + 8 * (f32[key] - exact[key])[finite].abs().max() + 2**-9, key


@check("n9", "pad_tiled", dtypes=(torch.float16,))
def scores_of_any_size_give_finite_results(name, dtype):
    """If float32 cannot distinguish the scores, the softmax is arbitrary, but finite."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    inputs["bias_table"] *= 1e9
    inputs["qkv"][..., : 2 * case.num_heads * case.head_dim] *= 8
    for key, x in run_case(packed, inputs, case.arguments()).items():
        assert x.isfinite().all(), key


@check("n9", "rectangular_window_tiled", dtypes=DTYPES[:1])
def masks_of_any_size(name, dtype):
    """A mask_value of float32's lowest number, which other code uses as minus infinity, gives the results of -1e4."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype, DEVICE)
    lowest, low = (
        run_case(packed, inputs, {**case.arguments(), "mask_value": value})
        for value in (torch.finfo(torch.float32).min, -1e4)
    )
    for key, x in low.items():
        assert torch.equal(lowest[key], x), key


@check("dense", "dense_tiled", "types_tiled", dtypes=DTYPES[:1])
def bias_of_minus_infinity_excludes_pairs(name, dtype):
    """The bias excludes every third key and, for every other query, the first half of the keys (at most 32, a tile)."""
    case = on_device(CASES[name])
    inputs = case.inputs(dtype)
    n = math.prod(case.window_tuple)
    inputs["bias"][..., 1::2, : min(n // 2, 32)] = -math.inf
    inputs["bias"][..., 2::3] = -math.inf
    got = run_case(packed, {key: x.to(DEVICE) for key, x in inputs.items()}, case.arguments())
    exact, f32 = (
        run_case(
            reference.window_attention_qkvpacked, {key: x.to(dtype) for key, x in inputs.items()}, case.arguments()
        )
        for dtype in (torch.float64, torch.float32)
    )
    for key, x in got.items():
        assert_within_budget(x.cpu(), exact[key], f32[key], eps=2**-20, name=key)


# ---- dropout ---------------------------------------------------------------------------------------------------------


def philox_pairs(case: Case, seed: int) -> torch.Tensor:
    """Return the mask (B, num_windows, num_heads, N, M) of the attention weights to keep, computed in NumPy."""
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    p, n, m = case.options["dropout_p"], math.prod(case.window_tuple), math.prod(case.key_window_tuple)
    return kept_by_triton(seed, p, case.batch, windows, case.num_heads, n, m)


def check_with_dropout(case: Case, dtype: torch.dtype, seed: int, **options: Any) -> None:
    """Call check_window_attention; if the case has dropout, the reference keeps the pairs that ``seed`` determines."""
    torch.manual_seed(seed)
    drawn = torch.randint(-(2**63), 2**63 - 1, (1,), device=DEVICE).item()

    def seeded(**arguments):
        torch.manual_seed(seed)
        return packed(**arguments)

    def draw(x, p, generator=None):
        assert p == 1.0 - case.options["dropout_p"]
        return x.copy_(philox_pairs(case, drawn))

    with mock.patch.object(torch.Tensor, "bernoulli_", draw):  # only in the reference
        check_window_attention(seeded, case, dtype, DEVICE, **options)


def kept_pairs(case: Case, **arguments: Any) -> torch.Tensor:
    """Return the mask (B, num_windows, num_heads, N, N) of the attention weights that the kernel keeps.

    The scores are zero and the values are unit vectors, so the output is the attention weights. The mask depends on
    neither scores nor values.
    """
    n = math.prod(case.window_tuple)
    windows = case.batch * math.prod(case.size) // n
    values = torch.eye(n, dtype=torch.float16, device=DEVICE).repeat(windows, 1, case.num_heads)
    geometry = {"window_size": case.window_size, "shift_size": case.shift_size}
    v = swinkernels.window_reverse(values, size=case.size, backend="reference", **geometry)
    qkv = torch.cat([torch.zeros_like(v), torch.zeros_like(v), v], dim=-1)
    arguments = {**geometry, "mask_value": 0.0, "dropout_p": case.options["dropout_p"], **arguments}
    out = packed(qkv=qkv, num_heads=case.num_heads, **arguments)
    weights = swinkernels.window_partition(out, backend="reference", **geometry)
    return (weights.reshape(case.batch, -1, n, case.num_heads, n).transpose(2, 3) != 0).cpu()


@check(*DROPPED)
def dropout_matches_reference_with_the_same_pairs(name, dtype):
    check_with_dropout(DROPPED[name], dtype, seed=5)


@check(*DROPPED, dtypes=(None,))
def dropout_is_drawn_by_philox(name):
    case = dataclasses.replace(DROPPED[name], has_logit_scale=False)
    for seed in (5, 6):
        drawn = torch.randint(
            -(2**63), 2**63 - 1, (1,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(seed)
        )
        kept = kept_pairs(case, generator=torch.Generator(DEVICE).manual_seed(seed))
        assert torch.equal(kept, philox_pairs(case, drawn.item()))


@check(dtypes=(None,))
def dropout_draws_independently():
    """The dropout rate is correct, attention weights are dropped independently, and the generator determines which."""
    case = Case(1, (7, 14), 2, 8, 7, options={"dropout_p": 0.25})
    p = case.options["dropout_p"]
    generator = torch.Generator(DEVICE).manual_seed(2)
    first, second = (kept_pairs(case, generator=generator) for _ in range(2))
    assert torch.equal(first, kept_pairs(case, generator=generator.manual_seed(2)))
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    of_default = kept_pairs(case)
    torch.manual_seed(3)
    assert torch.equal(of_default, kept_pairs(case))
    assert not torch.equal(of_default, kept_pairs(case))
    kept = first.flatten(0, 1).double()  # (windows, heads, N, N)
    assert abs(kept.mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    for axis in range(kept.dim()):  # attention weights up to 8 elements apart are kept independently
        size = kept.shape[axis]
        for step in range(1, min(size, 9)):
            both = kept.narrow(axis, step, size - step) * kept.narrow(axis, 0, size - step)
            assert abs(both.mean() - (1 - p) ** 2) < 5 * math.sqrt((1 - p) ** 2 / both.numel()), (axis, step)


@check(*DROPPED)
def dropout_of_everything_gives_zeros(name, dtype):
    case = on_device(dataclasses.replace(DROPPED[name], options={"dropout_p": 1.0}))
    for key, x in run_case(packed, case.inputs(dtype, DEVICE), case.arguments()).items():
        assert torch.equal(x, torch.zeros_like(x)), key


@check(dtypes=DTYPES[:1])
def dropout_of_nearly_nothing_keeps_everything(dtype):
    case = on_device(DROPPED["dropout"])
    inputs, arguments = case.inputs(dtype, DEVICE), {**case.arguments(), "dropout_p": 1e-12}
    got = run_case(packed, inputs, arguments)
    for key, x in run_case(packed, inputs, {**arguments, "dropout_p": 0.0}).items():
        torch.testing.assert_close(got[key], x, msg=key)


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)
