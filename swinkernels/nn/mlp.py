"""The MLP of a transformer block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.nn._inner import is_bare
from swinkernels.ops.mlp_half import mlp_half


class Mlp(nn.Module):
    """An MLP: Linear, activation and Linear, with dropout after the activation and after the second Linear.

    Args:
        in_features: channels of a token.
        hidden_features, out_features: ``in_features`` by default.
        act_layer: class or function that creates the activation.
        drop: probability of dropout.
        device, dtype: device and dtype of the parameters.

    Parameters: ``fc1.weight``, ``fc1.bias``, ``fc2.weight``, ``fc2.bias``.

    Source: ``Mlp`` of Microsoft's Swin-Transformer and timm.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int | None = None,
        out_features: int | None = None,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        drop: float = 0.0,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_features = in_features if hidden_features is None else hidden_features
        self.fc1 = nn.Linear(in_features, hidden_features, **factory)
        self.act: Any = act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features if out_features is None else out_features, **factory)
        self.drop = nn.Dropout(drop)

    def is_half(self) -> bool:
        """Return True if ``mlp_half`` can replace the modules: GELU, no hooks and no active dropout."""
        modules: Any = self._modules  # bypasses __getattr__, which is slow
        drop = modules["drop"]
        return (
            is_bare(modules["fc1"], nn.Linear)
            and is_bare(modules["act"], nn.GELU)
            and is_bare(modules["fc2"], nn.Linear)
            and is_bare(drop, nn.Dropout)
            and not (drop.training and drop.p > 0.0)
        )

    def run_half(self, x: Tensor, layer_norm: nn.LayerNorm, **options: Any) -> Tensor:
        """Run a block's MLP half with ``mlp_half``, given the block's norm and further ``options``."""
        modules: Any = self._modules
        fc1, fc2 = modules["fc1"], modules["fc2"]
        return mlp_half(
            x, layer_norm.weight, layer_norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, eps=layer_norm.eps,
            approximate=modules["act"].approximate, **options,
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))
