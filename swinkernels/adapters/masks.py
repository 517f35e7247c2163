"""Masks and position indices as libraries store them or hand them on, by the formulas that the ops follow: whoever
finds other values has the library's own code run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def frame_of(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """The map's size rounded up to whole windows, per axis."""
    return tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))


def differs(x: Tensor | None, expected: Tensor | None) -> bool:
    """Whether one of two is missing, or their values are not the same. ``expected`` is on the CPU."""
    if x is None or expected is None:
        return x is not expected
    if x.shape != expected.shape:
        return True
    return not x.is_meta and not torch.equal(x.to("cpu", expected.dtype), expected)  # meta tensors have no values


def shift_regions(
    frame: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """The region number of every token of every window, (num_windows, N)."""
    rank = len(frame)
    region = torch.zeros([1] * rank, dtype=torch.long, device=device)
    for axis, (p, w, s) in enumerate(zip(frame, window, shift, strict=True)):
        g = torch.arange(p, device=device)
        on_axis = (g >= p - w).long() + (g >= p - s).long() if s > 0 else torch.zeros_like(g)
        region = 3 * region + on_axis.reshape([-1 if i == axis else 1 for i in range(rank)])
    cut = [n for p, w in zip(frame, window, strict=True) for n in (p // w, w)]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return region.reshape(cut).permute(order).reshape(-1, math.prod(window))


def shift_mask(
    frame: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """The mask that libraries add to the scores, (num_windows, N, N): -100 between tokens of different regions."""
    region = shift_regions(frame, window, shift, device)
    return -100.0 * (region[:, :, None] != region[:, None, :])


def window_index(window: Sequence[int]) -> Tensor:
    """relative_position_index, (N, N): the row of the bias table by (query - key) + window - 1, row-major."""
    tokens = torch.cartesian_prod(*(torch.arange(w, device="cpu") for w in window))
    tokens = tokens.reshape(-1, len(window))
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long, device="cpu")
    for axis, w in enumerate(window):
        index = (2 * w - 1) * index + tokens[:, None, axis] - tokens[None, :, axis] + w - 1
    return index


# Masks that a model was seen to hand on: version and geometry for which they are the standard one.
_SEEN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def is_shift_mask(mask: Any, frame: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Whether a mask that a module is called with is :func:`shift_mask`. Where its values cannot be looked at, it is
    taken for another one.

    It is read once, however many modules get it: on a GPU that is a synchronisation.
    """
    if torch.compiler.is_compiling() or type(mask) is not Tensor or mask.is_meta or mask.requires_grad:
        return False
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    geometry = tuple(frame), tuple(window), tuple(shift)
    version = None if mask.is_inference() else mask._version  # of an inference tensor nobody knows whether it changed
    if version is not None and _SEEN.get(mask) == (version, geometry):
        return True
    n = math.prod(window)
    if mask.shape != (math.prod(frame) // n, n, n):
        return False
    same = torch.equal(mask, shift_mask(frame, window, shift, mask.device).to(mask.dtype))
    if same:
        _SEEN[mask] = version, geometry
    return same
