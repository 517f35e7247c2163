"""Runs the layers and patch merging of Swin v2 (transformers 5) with this package's ops."""

from __future__ import annotations

from transformers.models.swinv2.modeling_swinv2 import (
    Swinv2Attention,
    Swinv2DropPath,
    Swinv2Intermediate,
    Swinv2Layer,
    Swinv2Output,
    Swinv2PatchMerging,
    Swinv2SelfAttention,
    Swinv2SelfOutput,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PostNormLayer,
    PostNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedSwinv2Layer(PostNormLayer, Swinv2Layer):  # type: ignore[misc]  # the base class's return annotation is too narrow
    """Swin v2's layer, with its attention computed by a window attention op, and its norms by other ops."""


class AcceleratedSwinv2PatchMerging(PostNormMerging, Swinv2PatchMerging):
    """Swin v2's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        Swinv2Layer,
        AcceleratedSwinv2Layer,
        {"attention": Swinv2Attention, "attention.self": Swinv2SelfAttention, "attention.output": Swinv2SelfOutput},
        (Swinv2Intermediate, Swinv2Output),
        Swinv2DropPath,
        ("hidden_states", "input_dimensions", "output_attentions"),
        Swinv2SelfAttention,
    ),
    merging_adapter(Swinv2PatchMerging, AcceleratedSwinv2PatchMerging),
)
