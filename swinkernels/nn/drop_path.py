"""Stochastic depth as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a residual branch for random samples and scales it up for the others.

    Args:
        drop_prob: the probability that the branch of a sample is dropped, 0..1.

    Source: Deep Networks with Stochastic Depth (Huang et al., 2016); timm's ``DropPath``, with the same random draws.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"DropPath: drop_prob must be in 0..1, got {drop_prob!r}")
        self.drop_prob = float(drop_prob)

    def scale(self, y: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Draw per-sample factors (B,) for ``y``: 0 with probability drop_prob, else 1 / (1 - drop_prob).

        Return None if all factors are 1. If ``y`` is not the branch itself, pass the branch's ``dtype``, because the
        random numbers on a GPU depend on it.
        """
        if self.drop_prob == 0.0 or not self.training:
            return None
        keep = 1.0 - self.drop_prob
        scale = y.new_empty(y.shape[0], dtype=dtype).bernoulli_(keep)
        return scale.div_(keep) if keep > 0.0 else scale

    def forward(self, y: Tensor) -> Tensor:
        scale = self.scale(y)
        return y if scale is None else y * scale.reshape(-1, *(1,) * (y.dim() - 1))

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob:g}"
