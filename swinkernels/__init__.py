"""Fused CUDA, Triton and C++ kernels for shifted-window attention, as PyTorch ops and as drop-in Swin modules."""

from swinkernels import nn, reference
from swinkernels._version import __version__
from swinkernels.adapters import accelerate, restore
from swinkernels.ops import (
    attention_half,
    decompositions,
    layer_norm,
    mlp_half,
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
    "__version__",
    "accelerate",
    "attention_half",
    "decompositions",
    "layer_norm",
    "mlp_half",
    "nn",
    "patch_expanding",
    "patch_merging",
    "reference",
    "residual_layer_norm",
    "residual_post_norm",
    "restore",
    "window_attention",
    "window_attention_qkvpacked",
    "window_partition",
    "window_reverse",
]
