"""Runs the layers and patch merging of Donut's Swin encoder (transformers 5) with this package's ops."""

from __future__ import annotations

from transformers.models.donut.modeling_donut_swin import (
    DonutDropPath,
    DonutSwinAttention,
    DonutSwinIntermediate,
    DonutSwinLayer,
    DonutSwinOutput,
    DonutSwinPatchMerging,
    DonutSwinSelfAttention,
    DonutSwinSelfOutput,
)

from swinkernels.adapters.libraries.transformers._layers import (
    PreNormLayerOfAnyMap,
    PreNormMerging,
    layer_adapter,
    merging_adapter,
)


class AcceleratedDonutSwinLayer(PreNormLayerOfAnyMap, DonutSwinLayer):  # type: ignore[misc]  # the base class's return annotation is too narrow
    """Donut's layer, with its attention computed by a window attention op, and its norms by other ops."""


class AcceleratedDonutSwinPatchMerging(PreNormMerging, DonutSwinPatchMerging):
    """Donut's patch merging, computed by the patch_merging op."""


ADAPTERS = (
    layer_adapter(
        DonutSwinLayer,
        AcceleratedDonutSwinLayer,
        {
            "attention": DonutSwinAttention,
            "attention.self": DonutSwinSelfAttention,
            "attention.output": DonutSwinSelfOutput,
        },
        (DonutSwinIntermediate, DonutSwinOutput),
        DonutDropPath,
        ("hidden_states", "input_dimensions", "output_attentions", "always_partition"),
    ),
    merging_adapter(DonutSwinPatchMerging, AcceleratedDonutSwinPatchMerging),
)
