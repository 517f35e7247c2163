"""Tests periodic axes: the first and last tokens are neighbours, so the ops refuse pad tokens between the two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from swinkernels.ops import window_attention, window_attention_qkvpacked

LONGITUDES, WINDOW, SHIFT = 25, 6, 3


def call(qkv: Tensor, **options) -> Tensor:
    given = {"num_heads": 2, "window_size": (2, WINDOW), "shift_size": (0, SHIFT), "periodic": (False, True)}
    return window_attention_qkvpacked(qkv, **{**given, **options})


def neighbours(backend: str, longitude: int, **options) -> set[int]:
    """Return the longitudes that the tokens at ``longitude`` attend to: those whose v has a non-zero gradient."""
    qkv = torch.randn(1, 2, LONGITUDES, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    qkv.requires_grad_()
    call(qkv, backend=backend, **options)[0, :, longitude].sum().backward()
    return set(qkv.grad[0, :, :, 16:].abs().sum((0, 2)).nonzero().flatten().tolist())


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_padding_between_the_ends_is_refused_in_words(backend):
    qkv = torch.zeros(1, 2, LONGITUDES, 24)
    with pytest.raises(
        ValueError, match="window_attention_qkvpacked: a shifted periodic axis must consist of"
    ) as error:
        call(qkv, backend=backend)
    for words in ("S = (2, 25)", "window (2, 6)", "roll_then_pad", "region_map", "pad_before"):
        assert words in str(error.value)
    q = torch.zeros(1, 2, LONGITUDES, 2, 4)
    with pytest.raises(ValueError, match="window_attention: a shifted periodic axis"):
        window_attention(q, q, q, num_heads=2, window_size=(2, 6), shift_size=(0, 3), periodic=True, backend=backend)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_remedy_joins_the_ends(backend):
    assert neighbours(backend, 0, pad_order="roll_then_pad") == {21, 22, 23, 24, 0, 1}
    assert neighbours(backend, 24, pad_order="roll_then_pad") == {21, 22, 23, 24, 0, 1}


@pytest.mark.parametrize(
    "options",
    [{"window_size": (2, 5), "shift_size": (0, 2)}, {"shift_size": 0}, {"periodic": (True, False)}],
    ids=["whole windows", "no shift", "another axis"],
)
def test_what_has_no_padding_between_the_ends_is_accepted(options):
    assert call(torch.zeros(1, 2, LONGITUDES, 24), **options).shape == (1, 2, LONGITUDES, 8)
