"""Layer normalisation over the last axis in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Normalise the last axis to mean 0 and variance 1, then scale and shift it.

    .. math:: y = (x - mean(x)) / \sqrt{var(x) + eps} \cdot weight + bias

    where the mean and the biased variance are over the C channels of a token.

    Args:
        x: (..., C), any floating dtype.
        weight: (C,) or None for 1.
        bias: (C,) or None for 0.
        eps: added to the variance; 1e-5 in the Swin models.
        dtype: dtype of the result; by default the dtype of x.

    Returns:
        (..., C) in ``dtype``. The arithmetic is in float32, or in float64 if x is; the result is rounded once.

    Raises:
        ValueError: weight or bias is not (C,).

    Source: Layer Normalization (Ba et al., 2016); torch.nn.LayerNorm.
    """
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != x.shape[-1:]:
            raise ValueError(
                f"layer_norm: {name} must be ({x.shape[-1]},) for x of shape {tuple(x.shape)}, "
                f"got shape {tuple(parameter.shape)}"
            )
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    centred = y - y.mean(dim=-1, keepdim=True)
    y = centred / (centred.square().mean(dim=-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * weight.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype if dtype is None else dtype)
