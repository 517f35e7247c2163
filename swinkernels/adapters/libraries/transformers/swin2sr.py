"""Runs the layers and patch merging of Swin2SR (transformers 5) with this package's ops."""

from __future__ import annotations

from transformers.models.swin2sr.modeling_swin2sr import (
    Swin2SRAttention,
    Swin2SRDropPath,
    Swin2SRIntermediate,
    Swin2SRLayer,
    Swin2SROutput,
    Swin2SRPatchMerging,
    Swin2SRSelfAttention,
    Swin2SRSelfOutput,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PostNormLayer,
    PostNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedSwin2SRLayer(PostNormLayer, Swin2SRLayer):  # type: ignore[misc]  # the base class's return annotation is too narrow
    """Swin2SR's layer, with its attention computed by a window attention op, and its norms by other ops."""


class AcceleratedSwin2SRPatchMerging(PostNormMerging, Swin2SRPatchMerging):
    """Swin2SR's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        Swin2SRLayer,
        AcceleratedSwin2SRLayer,
        {"attention": Swin2SRAttention, "attention.self": Swin2SRSelfAttention, "attention.output": Swin2SRSelfOutput},
        (Swin2SRIntermediate, Swin2SROutput),
        Swin2SRDropPath,
        ("hidden_states", "input_dimensions", "output_attentions"),
        Swin2SRSelfAttention,
    ),
    merging_adapter(Swin2SRPatchMerging, AcceleratedSwin2SRPatchMerging),
)
