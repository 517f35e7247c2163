"""Tests key windows larger than the query windows (``key_window``, HAT) in Triton against the float64 reference."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest

import swinkernels
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention, run_case
from swinkernels.triton.window_attention import tuning
from tests.support.triton_checks import DEVICE, DTYPES, ON_GPU, Checks
from tests.triton.test_window_attention import check_with_dropout, packed, split

CASES = {
    "two_sizes": Case(1, (3, 8), 2, 8, (3, 4), options={"key_window": (7, 4)}),
    "padded": Case(1, (5, 4), 1, 8, 4, has_pad_qkv=True, options={"key_window": 6, "pad_before": (2, 0)}),
    "wider_than_the_map": Case(1, (2, 3), 1, 8, 2, has_pad_qkv=True, options={"key_window": 8}),
    "three_axes": Case(1, (4, 3, 4), 1, 8, (2, 3, 4), has_pad_qkv=True, options={"key_window": (4, 5, 4)}),
    "types": Case(1, (8, 4), 1, 8, 4, has_table=False, bias_types=2, options={"key_window": 6}),
    "types_of_a_table": Case(1, (8, 4), 1, 8, 4, table_types=2, options={"key_window": 6}),
    "no_bias": Case(1, (4, 4), 2, 8, 4, has_table=False, options={"key_window": 6}),
    "cosine": Case(1, (3, 4), 1, 8, 4, has_pad_qkv=True, has_logit_scale=True, options={"key_window": 6}),
}
HAT = Case(2, (64, 32), 6, 30, 16, options={"key_window": 24})

check = Checks(__name__)


@check(*CASES, in_turn=True)
def matches_reference(name, dtype):
    check_window_attention(packed, CASES[name], dtype, DEVICE)


if ON_GPU:

    @check()
    def hat_matches_reference(dtype):
        check_window_attention(packed, HAT, dtype, DEVICE)


@check("two_sizes", dtypes=DTYPES[1:])
def tiles_of_a_window_match_reference(name, dtype):
    """Results are correct and reproducible if a token is a key of several windows, and a window has several tiles."""
    case = dataclasses.replace(CASES[name], size=(9, 4), num_heads=1)
    with mock.patch.multiple(tuning, tiles=lambda *_: tuning.Tiles(16, 16, 4, 1), BACKWARD_PROGRAMS=2):
        first = check_window_attention(packed, case, dtype, DEVICE)
        second = run_case(packed, case.inputs(dtype, DEVICE), case.arguments())
    for key, x in first.items():
        assert x.equal(second[key]), key


@check(dtypes=DTYPES[:1])
def dropout_matches_reference_with_the_same_pairs(dtype):
    check_with_dropout(Case(1, (3, 4), 1, 8, (3, 4), options={"key_window": (5, 6), "dropout_p": 0.3}), dtype, seed=5)


@check("no_bias", dtypes=DTYPES[:1])
def separate_form_matches_reference(name, dtype):
    def separate(qkv, num_heads, **arguments):
        return swinkernels.window_attention(*split(qkv, num_heads), num_heads=num_heads, backend="triton", **arguments)

    check_window_attention(separate, CASES[name], dtype, DEVICE)


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)
