"""Patch merging in plain PyTorch: two tokens per axis become one."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from swinkernels.reference._block import check_norm, linear
from swinkernels.reference._geometry import without_autocast
from swinkernels.reference.layer_norm import layer_norm

# Published channel orders: the neighbours, slowest axis first, in the order in which their channels are concatenated.
_MONAI_3D = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (1, 0, 1), (0, 1, 1), (1, 1, 1))
# MONAI up to 1.4 concatenates (0, 1, 0) and (0, 0, 1) twice and omits (1, 1, 0) and (0, 1, 1).
_MONAI_LEGACY_3D = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
ORDERS = ("swin", "row_major", "unfold", "monai", "monai_legacy")


def neighbours(order: str, rank: int) -> tuple[tuple[int, ...], ...]:
    """Return the offsets of the merged tokens, each slowest axis first, in the channel order named ``order``."""
    if order in ("row_major", "unfold"):
        return tuple(itertools.product((0, 1), repeat=rank))  # the last axis fastest
    if order in ("monai", "monai_legacy") and rank == 3:
        return _MONAI_3D if order == "monai" else _MONAI_LEGACY_3D
    return tuple(offset[::-1] for offset in itertools.product((0, 1), repeat=rank))  # the first axis fastest


@without_autocast
def patch_merging(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    order: str = "swin",
    norm: str = "pre",
) -> Tensor:
    r"""Concatenate the channels of neighbouring tokens, two per axis, normalise and reduce them linearly.

    .. math::
        y = W \cdot LayerNorm(concat(x_{2i + o})) \quad \text{(pre, v1)}

        y = LayerNorm(W \cdot concat(x_{2i + o})) \quad \text{(post, v2)}

    where concat is over the offsets o, 0 or 1 on each merged axis. An odd size is padded with zeros at its end *before*
    the norm, so the zeros enter the norm's statistics.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), any floating dtype.
        norm_weight, norm_bias: (K * C,) for "pre", (out,) for "post", or None for 1 and 0; K neighbours are merged.
        weight: (out, K * C), the reduction. Its width determines the merging: K = 4 merges the last two axes, a 3D map
            frame by frame (Video-Swin, Aurora); K = 8 merges all three.
        eps: added to the variance of the norm.
        order: order of the K * C channels.
            "swin": by neighbour, the first merged axis fastest: (0,0), (1,0), (0,1), (1,1). Microsoft, timm,
            torchvision, transformers, Video-Swin, MONAI in 2D.
            "row_major": by neighbour, the last axis fastest: (0,0), (0,1), (1,0), (1,1). Aurora, Pangu-Weather, MONAI's
            PatchMergingV2 in 3D.
            "unfold": by channel, then neighbours row-major, as torch.nn.Unfold. mmcv and mmpretrain.
            "monai": MONAI's PatchMerging since 1.5. For K = 4 as "swin"; for K = 8 the offsets are 000, 100, 010, 001,
            110, 101, 011, 111.
            "monai_legacy": MONAI's PatchMerging up to 1.4. For K = 4 as "swin"; for K = 8 the offsets are 000, 100,
            010, 001, 101, 010, 001, 111.
        norm: "pre" (v1) or "post" (v2).

    Returns:
        (B, \*S', out) in the dtype of x, S' = ceil(S / 2) on the merged axes. An empty batch gives an empty result.

    Raises:
        ValueError: an unknown order or norm, mismatched shapes.

    Source: Swin Transformer (Liu et al., 2021), section 3.1; Swin Transformer V2's code for "post"; the
    ``PatchMerging`` modules of the libraries named above.
    """
    op = "patch_merging"
    check_norm(op, norm)
    if order not in ORDERS:
        raise ValueError(f"{op}: order must be one of {ORDERS}, got {order!r}")
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be (B, *S, C) with S = (H, W) or (D, H, W), got shape {tuple(x.shape)}")
    channels = x.shape[-1]
    widths = {2**rank * channels: rank for rank in range(2, x.dim() - 1)}
    if weight.dim() != 2 or weight.shape[1] not in widths:
        raise ValueError(
            f"{op}: weight must be (out, K) with K one of {tuple(widths)} for {channels} channels, "
            f"got shape {tuple(weight.shape)}"
        )
    rank = widths[weight.shape[1]]

    for axis in range(x.dim() - 1 - rank, x.dim() - 1):
        if x.shape[axis] % 2 == 1:
            x = torch.cat([x, torch.zeros_like(x.narrow(axis, 0, 1))], dim=axis)
    parts = []
    for offset in neighbours(order, rank):
        index: tuple[Any, ...] = (..., *(slice(o, None, 2) for o in offset), slice(None))
        parts.append(x[index])
    if order == "unfold":
        merged = torch.stack(parts, dim=-1).flatten(-2)  # channel c of neighbour n is at index c * K + n
    else:
        merged = torch.cat(parts, dim=-1)
    if norm == "pre":
        return linear(layer_norm(merged, norm_weight, norm_bias, eps=eps), weight)
    return layer_norm(linear(merged, weight), norm_weight, norm_bias, eps=eps)
