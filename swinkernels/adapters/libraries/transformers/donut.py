"""Runs the layers and patch merging of Donut's Swin encoder (transformers 5) on this package's ops."""

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
    """Donut's layer, run on ops."""


class AcceleratedDonutSwinPatchMerging(PreNormMerging, DonutSwinPatchMerging):
    """Donut's patch merging, run on an op."""


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
