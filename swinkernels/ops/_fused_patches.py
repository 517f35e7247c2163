"""Computes Linear layers of patches in inference on a CPU: patch embedding, and patch merging.

A patch is a block of pixels of an image, or of tokens of a map. The op ``fused_patch_linear`` of
``torch.ops.swinkernels`` (csrc/kernels/cpu/linear.inl) reads the patches where they lie, so that they are never
gathered in memory, and computes the norm before or after the layer. It has no derivative.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops._fused_linear import NO_NORM, Norm, fit_kernels, run, run_on_kernels
from swinkernels.ops._library import define, register_without_derivative, three

# With channels_first, x is (B, C, *S), S is a multiple of factor, and a row of the layer's input is (C, *factor). Else
# x is (B, *S, C), a row consists of the channels of the tokens of a block whose row-major numbers are neighbours, and
# tokens outside the map are zeros.
define(
    "fused_patch_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, int[] factor, "
    "int[] neighbours, bool channels_first, str norm, float eps) -> Tensor"
)


def _fake(x, weight, bias, norm_weight, norm_bias, factor, neighbours, channels_first, norm, eps):
    size = x.shape[2:] if channels_first else x.shape[1:-1]
    grid = [(s + f - 1) // f for s, f in zip(size, factor[-len(size) :], strict=True)]
    return x.new_empty((x.shape[0], *grid, weight.shape[0]))


_OP = register_without_derivative("fused_patch_linear", _fake, "torch's functions")


def projects_patches(conv: Any, patch_size: Sequence[int]) -> bool:
    """Return True if an nn.Conv2d or nn.Conv3d is a Linear layer of patches, which neither overlap nor are padded."""
    patch, rank = tuple(patch_size), len(patch_size)
    usual = (patch, patch, (0,) * rank, (1,) * rank, 1)
    return (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups) == usual


def patch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Norm | None,
    factor: Sequence[int],
    neighbours: Sequence[int] | None = None,
) -> Tensor | None:
    """Return the Linear layer of patches, (B, *S', out) with S' = ceil(S / factor), or None if the op cannot run.

    Args:
        x: a map (B, *S, C) or, without ``neighbours``, an image (B, C, *S) of whole patches, with two or three axes S.
        weight, bias: (out, K * C), (out,), of the dtype of x; with ``neighbours``, K is their number.
        norm: the norm before or after the layer, or None.
        factor: tokens or pixels of a patch on each axis S.
        neighbours: row-major numbers of the tokens of a block, in the order of their channels in a row.
    """
    norm = norm or NO_NORM
    tensors = (x, weight, bias, norm.weight, norm.bias)
    if not (fit_kernels(x, tensors) and run_on_kernels(x, (weight,), tensors)):
        return None
    # In bfloat16 the kernels of some CPUs read the numbers of a piece of a patch, and of a row that they normalise, in
    # pairs.
    paired = [factor[-1] if neighbours is None else x.shape[-1], weight.shape[0] if norm.place == "post" else 0]
    if x.dtype == torch.bfloat16 and any(count % 2 == 1 for count in paired):
        return None
    return run(
        _OP, x, weight, bias, norm.weight, norm.bias, three(factor, 1), list(neighbours or ()), neighbours is None,
        norm.place, norm.eps,
    )  # fmt: skip
