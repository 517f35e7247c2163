"""Tests decomposed relative positions (``axis_tables``) in Triton against the float64 reference."""

from __future__ import annotations

import dataclasses
import functools
import math
from unittest import mock

import pytest
import torch

import swinkernels
from swinkernels import reference
from swinkernels.testing import (
    WindowAttentionCase,
    check_window_attention,
    op_arguments,
    opcheck_forward_and_backward,
    run_case,
)
from swinkernels.triton.window_attention import tuning
from tests.support.triton_checks import DEVICE, DTYPES, ON_GPU, Checks
from tests.triton.test_window_attention import FORMS, check_with_dropout, packed, split

Case = functools.partial(WindowAttentionCase, has_table=False, has_axis_tables=True)
CASES = {
    "shifted": Case(1, (3, 7), 2, 8, (3, 4), (1, 2), has_pad_qkv=True, options={"scale": 0.3}),
    "roll_then_pad": Case(1, (7, 3), 1, 10, 4, (3, 1), has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    "three_axes": Case(1, (2, 3, 6), 1, 8, (2, 3, 4), (0, 1, 2), has_pad_qkv=True),
    "three_axes_of_which_one_is_a_token": Case(1, (2, 3, 4), 1, 8, (1, 3, 4)),
    "grid": Case(1, (6, 4), 1, 8, (3, 4), options={"grid": True}),
    "masked_out": Case(1, (4, 8), 1, 8, 4, 2, options={"mask_value": -math.inf}),
    "tiles": Case(1, (2, 35), 1, 20, (2, 36), (0, 12), has_pad_qkv=True),
}
# Interpreted cases have one image of one window, and one head.
FEW, HEADS = (2, 3) if ON_GPU else (1, 1)
GLOBAL = (64, 64) if ON_GPU else (36, 34)
LONG = {
    "SAM-B": Case(FEW, (56, 60) if ON_GPU else (14, 9), HEADS, 64, 14, has_pad_qkv=True),
    "SAM-H": Case(FEW, (28, 14) if ON_GPU else (14, 14), HEADS, 80, 14),
    "beyond_1024_tokens": Case(1, GLOBAL, 1, 8, GLOBAL),
}

check = Checks(__name__)


@check(*CASES, in_turn=True)
def matches_reference(name, dtype):
    check_window_attention(packed, CASES[name], dtype, DEVICE)


@check(*LONG, dtypes=DTYPES if ON_GPU else (torch.float16,))
def long_windows_match_reference(name, dtype):
    """In the interpreter, which takes the same time for any tile size, windows have fewer and larger tiles."""
    large = {} if ON_GPU else {"side_effect": lambda *_: tuning.Tiles(256, 256, 4, 1)}
    with mock.patch.object(tuning, "tiles", wraps=tuning.tiles, **large):
        check_window_attention(packed, LONG[name], dtype, DEVICE)


if not ON_GPU:
    check.long |= {"long_windows_match_reference-beyond_1024_tokens-float16", f"opcheck-{FORMS[0]}-float16"}


@check("shifted", dtypes=DTYPES[1:])
def a_program_takes_several_windows(name, dtype):
    with mock.patch.object(tuning, "BACKWARD_PROGRAMS", 2):
        check_window_attention(packed, dataclasses.replace(CASES[name], batch=2, num_heads=1), dtype, DEVICE)


@check(dtypes=DTYPES[1:])
def keeps_the_digits_of_float32(dtype):
    """Two scores of about 80, from the tables alone, differ by 1/3, which rounding to 16 bits would not preserve."""
    size, channels = (1, 2), 16
    q, k = torch.full((1, 1, 2, 1, channels), 2.0), torch.zeros(1, 1, 2, 1, channels)
    offset = 1 / 3
    tables = torch.zeros(1, channels), torch.zeros(3, channels)
    tables[1][0, 0], tables[1][1, 0], tables[1][2, 0] = 40 + offset / 2, 40.0, 40 - offset / 2
    v = torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1, 1).expand_as(q)
    maps = (x.to(DEVICE, dtype).contiguous() for x in (q, k, v))
    out = swinkernels.window_attention(
        *maps, num_heads=1, window_size=size, axis_tables=tuple(t.to(DEVICE) for t in tables), backend="triton"
    )
    # The rows of v are 1 and -1: the output is the tanh of half the difference between the scores.
    exact = math.tanh(offset / 2) * torch.tensor([-1.0, -1.0])
    torch.testing.assert_close(out[0, 0, :, 0].float().cpu(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@check("shifted", dtypes=DTYPES[:1])
def separate_form_matches_reference(name, dtype):
    def separate(qkv, num_heads, **arguments):
        return swinkernels.window_attention(*split(qkv, num_heads), num_heads=num_heads, backend="triton", **arguments)

    check_window_attention(separate, CASES[name], dtype, DEVICE)


@check(dtypes=DTYPES[:1])
def dropout_matches_reference_with_the_same_pairs(dtype):
    check_with_dropout(Case(1, (3, 4), 1, 8, (3, 4), options={"dropout_p": 0.3}), dtype, seed=5)


@check(*(FORMS if ON_GPU else FORMS[:1]), dtypes=DTYPES[1:])
def opcheck(form, dtype):
    opcheck_forward_and_backward(form, "_triton", op_arguments(Case(1, (2, 3), 1, 4, (2, 3)), form, dtype, DEVICE))


@check("grid", dtypes=DTYPES[:1])
def tables_without_a_gradient(name, dtype):
    """Repeated calls are bit-identical; without gradients of the tables, all other gradients stay bit-identical."""
    case = CASES[name]
    inputs = case.inputs(dtype, DEVICE)
    tables = [x for x in inputs if x.startswith("axis_tables")]
    first, second, without = (run_case(packed, inputs, case.arguments(), constant) for constant in ((), (), tables))
    for key, x in first.items():
        assert torch.equal(second[key], x), key
        assert key[1:] in tables or torch.equal(without[key], x), key


@check("queries", "tables", dtypes=(None,))
def float16_is_finite_where_the_result_is(large):
    """Results are finite even if float16 cannot represent the tables, or the products of q with them."""
    case = CASES["grid"]
    inputs = case.inputs(torch.float16)
    channels = case.num_heads * case.head_dim
    q = 10000.0 if large == "queries" else 1e-4
    inputs["qkv"][..., :channels] = (inputs["qkv"][..., :channels].float() * q).half()
    inputs["qkv"][..., channels : 2 * channels] *= 1e-3
    for axis in range(2):
        inputs[f"axis_tables.{axis}"] *= 10.0 if large == "queries" else 1e5
    got = run_case(packed, {key: x.to(DEVICE) for key, x in inputs.items()}, case.arguments())
    exact, f32 = (
        run_case(
            reference.window_attention_qkvpacked, {key: x.to(dtype) for key, x in inputs.items()}, case.arguments()
        )
        for dtype in (torch.float64, torch.float32)
    )
    for key, x in got.items():
        x = x.cpu()
        finite = exact[key].to(x.dtype).isfinite() & f32[key].to(x.dtype).isfinite()
        assert finite.any() and x[finite].isfinite().all(), key
        error, largest = (x.double() - exact[key])[finite].abs().max(), exact[key][finite].abs().max()
        # The bound is wide because scores are up to 2 ** 19, and P is recomputed from a rounded lse, with a relative
        # error of about |lse| * 2 ** -22.
        assert error <= 2**-6 * largest + 8 * (f32[key] - exact[key])[finite].abs().max(), (key, error, largest)


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)
