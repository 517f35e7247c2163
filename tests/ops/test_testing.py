"""Tests that the error budget accepts exact results and rejects wrong ones, with a message."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swinkernels.testing import Judged, assert_within_budget, judge

EXACT = torch.randn(4096, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
LARGEST = EXACT.abs().max().item()


def judged(got: Tensor, exact: Tensor = EXACT, f32: Tensor | None = None, terms: Tensor | None = None) -> Judged:
    """Judge ``got`` by the error budget; without ``f32``, ``exact`` also serves as the float32 result."""
    return judge(got, exact, exact if f32 is None else f32, terms=terms, name="out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_one_rounding_passes_and_nine_tenths_of_eps_do_not(dtype: torch.dtype) -> None:
    rounded, eps = EXACT.to(dtype), torch.finfo(dtype).eps
    assert judged(rounded).failure is None
    assert 0.15 < judged(rounded).rms_eps < 0.3
    assert judged((EXACT * (1 + 0.4 * eps)).to(dtype)).failure is None
    assert "out: RMS error" in (judged((EXACT * (1 + 0.9 * eps)).to(dtype)).failure or "")


def test_one_percent_is_found_in_bfloat16() -> None:
    with pytest.raises(AssertionError, match=r"dv: RMS error .*, at most .* \(1\.\d\d eps\)"):
        assert_within_budget((1.01 * EXACT).bfloat16(), EXACT, EXACT.float(), name="dv")


@pytest.mark.parametrize(("eps_of_the_largest", "passes"), [(1.9, True), (2.1, False)])
def test_no_element_is_off_by_more_than_two_eps_of_the_largest(eps_of_the_largest: float, passes: bool) -> None:
    got = EXACT.float()
    got[7] += eps_of_the_largest * torch.finfo(torch.float32).eps * LARGEST
    failure = judged(got).failure
    assert failure is None if passes else "out: largest error" in (failure or "")


def test_the_error_of_the_definition_in_float32_is_granted() -> None:
    """A result may be as inaccurate as the float32 reference, which has large errors if terms cancel."""
    got = EXACT.float() + 1e-4
    assert judged(got).failure is not None
    assert judged(got, f32=EXACT.float() - 1e-4).failure is None
    assert judged(EXACT.float() + 1e-3, f32=EXACT.float() - 1e-4).failure is not None


def test_errors_are_relative_to_the_terms_that_cancel() -> None:
    small = 1e-3 * EXACT
    got = small.float() + 0.2 * torch.finfo(torch.float32).eps
    assert judged(got, small).failure is not None
    assert judged(got, small, terms=EXACT).failure is None


def test_what_is_no_number_or_of_another_shape_fails() -> None:
    got = EXACT.float()
    got[-1] = torch.nan
    assert judged(got).failure is not None
    assert judged(got[:-1]).failure == "out: shape (4095,), expected (4096,)"
    assert judged(got[:0], EXACT[:0]) == Judged(0.0, 0.0, None)
