"""Runs the layers and patch merging of MaskFormer's Swin backbone (transformers 5) with this package's ops."""

from __future__ import annotations

from torch import Tensor
from transformers.models.maskformer.modeling_maskformer_swin import (
    MaskFormerDropPath,
    MaskFormerSwinAttention,
    MaskFormerSwinIntermediate,
    MaskFormerSwinLayer,
    MaskFormerSwinOutput,
    MaskFormerSwinPatchMerging,
    MaskFormerSwinSelfAttention,
    MaskFormerSwinSelfOutput,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PreNormLayer,
    PreNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedMaskFormerSwinLayer(PreNormLayer, MaskFormerSwinLayer):
    """MaskFormer's layer, with its attention computed by a window attention op, and its norms by other ops.

    The window size never changes; maps smaller than the window are padded.
    """

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or not self._is_ours(hidden_states, input_dimensions):
            return MaskFormerSwinLayer.forward(self, hidden_states, input_dimensions, output_attentions)
        return (self._both_halves(hidden_states, input_dimensions),)


class AcceleratedMaskFormerSwinPatchMerging(PreNormMerging, MaskFormerSwinPatchMerging):
    """MaskFormer's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        MaskFormerSwinLayer,
        AcceleratedMaskFormerSwinLayer,
        {
            "attention": MaskFormerSwinAttention,
            "attention.self": MaskFormerSwinSelfAttention,
            "attention.output": MaskFormerSwinSelfOutput,
        },
        (MaskFormerSwinIntermediate, MaskFormerSwinOutput),
        MaskFormerDropPath,
        ("hidden_states", "input_dimensions", "output_attentions"),
    ),
    merging_adapter(MaskFormerSwinPatchMerging, AcceleratedMaskFormerSwinPatchMerging),
)
