"""Patch embedding in plain PyTorch: an image becomes a map of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from swinkernels.reference._block import linear
from swinkernels.reference._geometry import without_autocast
from swinkernels.reference.layer_norm import layer_norm


@without_autocast
def patch_embed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Tensor:
    r"""Project every patch of an image to one token and, if a norm is given, normalise it.

    .. math:: y_{b, i} = LayerNorm(W \cdot patch_{b, i} + bias)

    which is a convolution whose kernel size and stride are the patch size, with the channels moved last. An image whose
    size is not a multiple of the patch size is padded with zeros at its end.

    Args:
        x: (B, C_in, \*I), I = (H, W) or (D, H, W), channels first, any floating dtype.
        weight: (C, C_in, \*patch), as for a convolution; its shape gives the patch size.
        bias: (C,) or None.
        norm_weight, norm_bias: (C,), or both None for no norm.
        eps: added to the variance of the norm.

    Returns:
        (B, \*S, C), channels last, in the dtype of x, S = ceil(I / patch). An empty batch gives an empty result.

    Raises:
        ValueError: mismatched shapes.

    Source: Swin Transformer (Liu et al., 2021), section 3.1; ``PatchEmbed`` of timm, MONAI and Video-Swin.
    """
    op = "patch_embed"
    if x.dim() not in (4, 5) or weight.dim() != x.dim() or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"{op}: x must be (B, C_in, *I) with I = (H, W) or (D, H, W) and weight (C, C_in, *patch), "
            f"got shapes {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    patch = weight.shape[2:]
    for axis, p in enumerate(patch, start=2):
        if x.shape[axis] % p != 0:
            pad = list(x.shape)
            pad[axis] = p - x.shape[axis] % p
            x = torch.cat([x, x.new_zeros(pad)], dim=axis)
    rank = len(patch)
    cut = [n for length, p in zip(x.shape[2:], patch, strict=True) for n in (length // p, p)]
    x = x.reshape(*x.shape[:2], *cut)  # (B, C_in, S1, p1, S2, p2, ...)
    positions, offsets = range(2, 2 + 2 * rank, 2), range(3, 3 + 2 * rank, 2)
    x = x.permute(0, *positions, 1, *offsets).flatten(1 + rank)  # (B, *S, C_in * prod(patch))
    x = linear(x, weight.flatten(1), bias)
    if norm_weight is None and norm_bias is None:
        return x
    return layer_norm(x, norm_weight, norm_bias, eps=eps)
