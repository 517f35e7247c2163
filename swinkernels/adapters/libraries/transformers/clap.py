"""Runs the layers and patch merging of CLAP's audio encoder (transformers 5) with this package's ops."""

from __future__ import annotations

from transformers.models.clap.modeling_clap import (
    ClapAudioAttention,
    ClapAudioIntermediate,
    ClapAudioLayer,
    ClapAudioOutput,
    ClapAudioPatchMerging,
    ClapAudioSelfAttention,
    ClapAudioSelfOutput,
    ClapDropPath,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PreNormLayerOfAnyMap,
    PreNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedClapAudioLayer(PreNormLayerOfAnyMap, ClapAudioLayer):  # type: ignore[misc]  # the base class's return annotation is too narrow
    """CLAP's layer, with its attention computed by a window attention op, and its norms by other ops."""


class AcceleratedClapAudioPatchMerging(PreNormMerging, ClapAudioPatchMerging):
    """CLAP's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        ClapAudioLayer,
        AcceleratedClapAudioLayer,
        {
            "attention": ClapAudioAttention,
            "attention.self": ClapAudioSelfAttention,
            "attention.output": ClapAudioSelfOutput,
        },
        (ClapAudioIntermediate, ClapAudioOutput),
        ClapDropPath,
        ("hidden_states", "input_dimensions", "output_attentions", "always_partition"),
    ),
    merging_adapter(ClapAudioPatchMerging, AcceleratedClapAudioPatchMerging),
)
