"""Runs the layers and patch merging of Swin (transformers 5) with this package's ops."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.swin.modeling_swin import (
    SwinAttention,
    SwinDropPath,
    SwinLayer,
    SwinMLP,
    SwinPatchMerging,
    SwinRelativePositionBias,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PreNormLayer,
    PreNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedSwinLayer(PreNormLayer, SwinLayer):
    """Swin's layer, with its attention computed by a window attention op, and its norms by other ops.

    The layer returns None for the attention weights, as Swin's own layer does with "sdpa".
    """

    def forward(  # type: ignore[override]  # the base class is annotated to return one tensor
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], always_partition: bool = False, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if any(kwargs.get(name) for name in ("output_attentions", "is_causal")) or not self._is_ours(
            hidden_states, input_dimensions, always_partition
        ):
            return SwinLayer.forward(self, hidden_states, input_dimensions, always_partition, **kwargs)  # type: ignore[return-value]
        return self._both_halves(hidden_states, input_dimensions), None


class AcceleratedSwinPatchMerging(PreNormMerging, SwinPatchMerging):
    """Swin's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        SwinLayer,
        AcceleratedSwinLayer,
        {"attention": SwinAttention, "attention.relative_position_bias": SwinRelativePositionBias},
        SwinMLP,
        SwinDropPath,
        ("hidden_states", "input_dimensions", "always_partition", "kwargs"),
    ),
    merging_adapter(SwinPatchMerging, AcceleratedSwinPatchMerging),
)
