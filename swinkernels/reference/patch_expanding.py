"""Patch expanding in plain PyTorch: one token becomes several per axis, the inverse of patch merging."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swinkernels.reference._block import linear
from swinkernels.reference._geometry import Ints, per_axis, without_autocast
from swinkernels.reference.layer_norm import layer_norm


@without_autocast
def patch_expanding(
    x: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    factor: Ints = 2,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Expand every token linearly into several neighbouring tokens and normalise each of them.

    .. math:: y_{b, i \cdot f + o} = LayerNorm((W x_{b, i})_{o})

    where W x is divided into f_1 f_2 ... parts of contiguous channels, in row-major order of their offset o.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), any floating dtype.
        weight: (K * out, C), K the product of the factors: K * out = 2C with factor 2 in Swin-Unet's ``PatchExpand``
            (out = C / 2), 16C with factor 4 in its ``FinalPatchExpand_X4`` (out = C). None for no linear layer.
        norm_weight, norm_bias: (out,), or None for 1 and 0.
        factor: tokens per axis that one token becomes, an int or one per axis; (1, 2, 2) keeps a 3D map's depth.
        eps: added to the variance of the norm.
        dtype: dtype of the result; by default the dtype of x.

    Returns:
        (B, \*(S * factor), out) in ``dtype``. An empty batch gives an empty result.

    Raises:
        ValueError: a factor below 1, a number of channels that prod(factor) does not divide, mismatched shapes.

    Source: Swin-Unet (Cao et al., 2021), section 3.4; ``PatchExpand`` and ``FinalPatchExpand_X4`` of its code.
    """
    op = "patch_expanding"
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be (B, *S, C) with S = (H, W) or (D, H, W), got shape {tuple(x.shape)}")
    size = x.shape[1:-1]
    factors = per_axis(op, "factor", factor, len(size))
    if any(f < 1 for f in factors):
        raise ValueError(f"{op}: factor must be positive, got {factors}")
    if weight is not None:
        x = linear(x, weight)
    if x.shape[-1] % math.prod(factors) != 0:
        raise ValueError(
            f"{op}: the number of channels to divide among tokens must be a multiple of prod(factor) = "
            f"{math.prod(factors)} for factor {factors}, got {x.shape[-1]}"
        )
    rank = len(size)
    x = x.unflatten(-1, (*factors, -1))  # (B, *S, *factors, out)
    interleaved = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    x = x.permute(0, *interleaved, 2 * rank + 1)  # (B, S1, f1, S2, f2, ..., out)
    x = x.reshape(x.shape[0], *(s * f for s, f in zip(size, factors, strict=True)), x.shape[-1])
    return layer_norm(x, norm_weight, norm_bias, eps=eps, dtype=dtype)
