"""Norms, and what is fused with them, for the modules here: an op where a fast backend runs it, else torch's own code.

The ops fall back on the reference, which computes in float32 step by step. Where it alone is left (on a CPU, in
float64, on a GPU without this package's CUDA kernels), plain PyTorch is faster, so "auto" means that here. A backend
that was named is handed to the op, which runs on it or says why it cannot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.ops._arguments import frame_size
from swinkernels.ops._backends import IMPLEMENTED, fast_backend, norm_reasons, patch_merging_reasons, residual_reasons
from swinkernels.ops._library import autocast_dtype, linear
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.patch_expanding import patch_expanding
from swinkernels.ops.patch_merging import RUNS, patch_merging
from swinkernels.ops.residual_layer_norm import residual_layer_norm, residual_post_norm


def backend_for(op: str, backend: str) -> str:
    """The backend of a module's attention for an op beside it, which not every backend implements: else "auto"."""
    return backend if backend in ("auto", "reference", *IMPLEMENTED[op]) else "auto"


def linear_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a Linear reads x and writes its result."""
    return autocast_dtype(x) or x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a norm whose result a module returns: under autocast float32, as torch's LayerNorm on a GPU."""
    return x.dtype if autocast_dtype(x) is None else torch.float32


def normalise(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype, backend: str) -> Tensor:
    """norm(x) in a dtype."""
    of = "layer_norm", norm.normalized_shape[0], (x.dtype, dtype)
    if backend != "auto" or fast_backend(backend, norm_reasons, x.device, *of) is not None:
        return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, backend=backend)
    return _torch_norm(x, norm, dtype)


def add_then_normalise(
    x: Tensor, y: Tensor, norm: nn.LayerNorm, drop_path_scale: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """s = x + drop_path_scale * y in the dtype of x, and norm(s) in that of y (v1)."""
    of = norm.normalized_shape[0], (x.dtype, y.dtype)
    if backend != "auto" or fast_backend(backend, residual_reasons, x.device, *of) is not None:
        parameters = norm.weight, norm.bias
        return residual_layer_norm(x, y, *parameters, eps=norm.eps, drop_path_scale=drop_path_scale, backend=backend)
    s = add(x, y, drop_path_scale)
    return s, _torch_norm(s, norm, y.dtype)


def add_normalised(x: Tensor, y: Tensor, norm: nn.LayerNorm, drop_path_scale: Tensor | None, backend: str) -> Tensor:
    """x + drop_path_scale * norm(y) in the dtype of x (v2)."""
    of = norm.normalized_shape[0], (x.dtype, y.dtype)
    if backend != "auto" or fast_backend(backend, residual_reasons, x.device, *of) is not None:
        parameters = norm.weight, norm.bias
        return residual_post_norm(x, y, *parameters, eps=norm.eps, drop_path_scale=drop_path_scale, backend=backend)
    return add(x, _torch_norm(y, norm, torch.promote_types(x.dtype, y.dtype)), drop_path_scale)


def add(x: Tensor, y: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """x + drop_path_scale * y in the dtype of x."""
    if drop_path_scale is not None:
        y = y * drop_path_scale.reshape(-1, *(1,) * (y.dim() - 1))
    return (x + y).to(x.dtype)


def merge(x: Tensor, norm: nn.LayerNorm, weight: Tensor, order: str, norm_at: str, backend: str) -> Tensor:
    """Patch merging, with its norm before the reduction ("pre") or after it ("post")."""
    between = linear_dtype(x)
    dtypes = (x.dtype, between) if norm_at == "pre" else (between, norm_dtype(x))
    of = norm_at, norm.normalized_shape[0], dtypes
    if backend != "auto" or fast_backend(backend, patch_merging_reasons, x.device, *of) is not None:
        parameters = norm.weight, norm.bias, weight
        return patch_merging(x, *parameters, eps=norm.eps, order=order, norm=norm_at, backend=backend)
    neighbours = _neighbours(x, order, rank=(weight.shape[1] // x.shape[-1]).bit_length() - 1)
    if norm_at == "pre":
        return linear(_torch_norm(neighbours, norm, between), weight)
    return _torch_norm(linear(neighbours, weight), norm, dtypes[1])


def expand(x: Tensor, weight: Tensor, norm: nn.LayerNorm, factor: Sequence[int], backend: str) -> Tensor:
    """Patch expanding by a factor for each axis of the map."""
    dtype = norm_dtype(x)
    of = "layer_norm", norm.normalized_shape[0], (linear_dtype(x), dtype)
    if backend != "auto" or fast_backend(backend, norm_reasons, x.device, *of) is not None:
        return patch_expanding(x, weight, norm.weight, norm.bias, factor=tuple(factor), eps=norm.eps, backend=backend)
    rank, size = len(factor), x.shape[1:-1]
    parts = linear(x, weight).unflatten(-1, (*factor, -1))
    order = [0, *(axis for i in range(1, 1 + rank) for axis in (i, i + rank)), 1 + 2 * rank]
    laid_out = parts.permute(order).reshape(
        x.shape[0], *(s * f for s, f in zip(size, factor, strict=True)), weight.shape[0] // math.prod(factor)
    )
    return _torch_norm(laid_out, norm, dtype)


def _torch_norm(x: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
    """torch's norm of x in a dtype. It wants one dtype for rows and parameters."""
    weight: Tensor = norm.weight
    bias: Tensor = norm.bias
    wide = x.dtype
    if weight.dtype != wide:
        wide = torch.promote_types(wide, weight.dtype)
        x, weight, bias = x.to(wide), weight.to(wide), bias.to(wide)
    return F.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps).to(dtype)


def _neighbours(x: Tensor, order: str, rank: int) -> Tensor:
    """The channels of neighbouring tokens, two on each of the last ``rank`` axes, side by side; zeros past the end."""
    size = x.shape[-1 - rank : -1]
    pads = [p - s for p, s in zip(frame_size(size, [2] * rank), size, strict=True)]
    if any(pads):
        x = F.pad(x, [0, 0, *(amount for pad in reversed(pads) for amount in (0, pad))])
    # The number of a neighbour has a bit for each axis, the last axis lowest.
    offsets = [[number >> (rank - 1 - axis) & 1 for axis in range(rank)] for number in RUNS[order, rank]]
    every: list[tuple[Any, ...]] = [(Ellipsis, *(slice(o, None, 2) for o in offset), slice(None)) for offset in offsets]
    parts = [x[part] for part in every]
    return torch.stack(parts, dim=-1).flatten(-2) if order == "unfold" else torch.cat(parts, dim=-1)
