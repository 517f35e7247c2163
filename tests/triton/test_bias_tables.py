"""Tests bias tables with window types and coordinate pairs (Pangu-Weather) in Triton against the float64 reference."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest

from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention, run_case
from swinkernels.triton.window_attention import tuning
from tests.support.triton_checks import DEVICE, DTYPES, Checks
from tests.triton.test_window_attention import packed

PANGU = {"table_pairs": (True, True, False)}
CASES = {
    "types": Case(1, (4, 6), 2, 8, (4, 3), (2, 1), table_types=2),
    "pangu": Case(1, (2, 5, 3), 2, 8, (2, 3, 3), (1, 1, 1), has_pad_qkv=True, table_types=2, options=PANGU),
    "pairs": Case(1, (3, 4), 1, 8, (3, 4), (1, 2), options={"table_pairs": (False, True)}),
}

check = Checks(__name__)


@check(*CASES, in_turn=True)
def matches_reference(name, dtype):
    check_window_attention(packed, CASES[name], dtype, DEVICE)


@check("pangu", dtypes=DTYPES[1:])
def windows_of_several_tiles_match_reference(name, dtype):
    with mock.patch.multiple(tuning, is_whole=lambda *_: False, tiles=lambda *_: tuning.Tiles(16, 16, 4, 1)):
        check_window_attention(packed, dataclasses.replace(CASES[name], num_heads=1), dtype, DEVICE)


@check("types", dtypes=DTYPES[:1])
def windows_of_a_type_are_dealt_out(name, dtype):
    """Results are correct and reproducible if several programs share a type's windows, and each processes several."""
    case = dataclasses.replace(CASES[name], batch=4, num_heads=1)
    with mock.patch.multiple(tuning, FORWARD_PROGRAMS=4, BACKWARD_PROGRAMS=4):
        first = check_window_attention(packed, case, dtype, DEVICE)
        second = run_case(packed, case.inputs(dtype, DEVICE), case.arguments())
    for key, x in first.items():
        assert x.equal(second[key]), key


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)
