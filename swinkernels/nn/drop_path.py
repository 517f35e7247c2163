"""The module for stochastic depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DropPath(nn.Module):
    """Drop a residual branch for whole samples in training, and scale it up for the others: stochastic depth.

    Args:
        drop_prob: the probability, 0..1.

    Source: Deep Networks with Stochastic Depth (Huang et al., 2016); timm's ``DropPath``, which draws the same numbers.
    """

    def __init__(self, drop_prob: float = 0.0) -> None:
        super().__init__()
        if not 0.0 <= drop_prob <= 1.0:
            raise ValueError(f"DropPath: drop_prob must be in 0..1, got {drop_prob!r}")
        self.drop_prob = float(drop_prob)

    def scale(self, y: Tensor, dtype: torch.dtype | None = None) -> Tensor | None:
        """Draw the factor of each sample of y, (B,): 0 if the sample is dropped, else 1 / (1 - p); None means 1.

        If y is not the branch itself, pass the branch's ``dtype``, because a GPU's draws depend on the dtype.
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
