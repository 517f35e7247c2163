"""Helpers for the functions that launch Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
# Launch options of all kernels with arithmetic: products and sums are contracted to fused multiply-adds, as by nvcc.
# The option is set explicitly because Triton 3.9 announces a change of the default.
ARITHMETIC = {"enable_fp_fusion": True}


def unit_stride(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if its last axis is not contiguous; the kernels accept any strides of the other axes."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def pad_to_3d(values: Sequence[int], leading: int) -> tuple[int, ...]:
    """Return three values, one per axis: ``values``, preceded by ``leading`` if the map is 2D."""
    return (leading,) * (3 - len(values)) + tuple(values)


def dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor of shape ``sizes``."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def alignment(values: Sequence[int], limit: int) -> int:
    """Return the largest power of two that divides all ``values`` and ``limit``, itself a power of two."""
    bits = limit
    for value in values:
        bits |= value
    return bits & -bits


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``, or that of an H100 (132) if ``device`` is not a GPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
