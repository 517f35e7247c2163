"""Fused kernels for shifted-window attention and the memory-bound ops of Swin models, as PyTorch ops and layers."""

from . import layers, reference
from .ops import (
    decompositions,
    layer_norm,
    patch_expanding,
    patch_merging,
    residual_layer_norm,
    residual_post_norm,
    window_attention,
    window_attention_qkvpacked,
    window_partition,
    window_reverse,
)

__all__ = [
    "decompositions",
    "layer_norm",
    "layers",
    "patch_expanding",
    "patch_merging",
    "reference",
    "residual_layer_norm",
    "residual_post_norm",
    "window_attention",
    "window_attention_qkvpacked",
    "window_partition",
    "window_reverse",
]
