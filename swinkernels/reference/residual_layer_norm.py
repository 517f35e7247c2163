"""A residual connection and the adjacent layer normalisation in plain PyTorch, in the orders of Swin v1 and v2."""

from __future__ import annotations

import torch
from torch import Tensor

from swinkernels.reference._block import add_residual
from swinkernels.reference.layer_norm import layer_norm


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and normalise the sum for the next branch (v1, norm before the branch).

    .. math:: s = x + d \cdot y, \quad z = LayerNorm(s)

    Args:
        x: (B, ..., C), the residual stream, any floating dtype.
        y: the result of the branch, of the same shape, any floating dtype.
        weight, bias: (C,) of the norm, or None for 1 and 0.
        eps: added to the variance of the norm.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.

    Returns:
        s in the dtype of x and z in the dtype of y, each (B, ..., C); z is the norm of the returned, rounded s.

    Raises:
        ValueError: mismatched shapes.

    Source: Swin Transformer (Liu et al., 2021), equation 3: a block's residual connection with the LN of its next half.
    """
    total = add_residual("residual_layer_norm", x, y, drop_path_scale)
    return total, layer_norm(total, weight, bias, eps=eps, dtype=y.dtype)


def residual_post_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
) -> Tensor:
    r"""Normalise the result of a branch and add it to the residual stream (v2, norm after the branch).

    .. math:: s = x + d \cdot LayerNorm(y)

    Args:
        x, y, weight, bias, eps, drop_path_scale: as for :func:`residual_layer_norm`.

    Returns:
        s, (B, ..., C) in the dtype of x.

    Raises:
        ValueError: mismatched shapes.

    Source: Swin Transformer V2 (Liu et al., 2022), section 3.2, res-post-norm.
    """
    branch = layer_norm(y, weight, bias, eps=eps, dtype=torch.promote_types(y.dtype, torch.float32))
    return add_residual("residual_post_norm", x, branch, drop_path_scale)
