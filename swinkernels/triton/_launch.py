"""What the launch functions of all ops share."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1
# Options of every launch with arithmetic: products and sums are contracted to fused multiply-adds, as by nvcc. Triton
# announces that it will do so only if told to.
ARITHMETIC = {"enable_fp_fusion": True}


def unit_stride(x: Tensor) -> Tensor:
    """x, copied only if its last axis is strided: kernels take all other strides as they are."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def three(values: Sequence[int], leading: int) -> tuple[int, ...]:
    """One value for each of three axes: of two, a leading one is added."""
    return (leading,) * (3 - len(values)) + tuple(values)


def dense_strides(sizes: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides, step = [], 1
    for size in reversed(sizes):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def alignment(values: Sequence[int], limit: int) -> int:
    """The largest power of two up to ``limit``, itself one, that divides all values."""
    bits = limit
    for value in values:
        bits |= value
    return bits & -bits


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere, where kernels are interpreted or only compiled, those of an H100."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132
