"""Reference definitions of all ops in plain PyTorch: slow, simple, differentiable, in float64 for float64 inputs."""

from swinkernels.reference.attention_half import attention_half
from swinkernels.reference.layer_norm import layer_norm
from swinkernels.reference.mlp_half import mlp_half
from swinkernels.reference.patch_embed import patch_embed
from swinkernels.reference.patch_expanding import patch_expanding
from swinkernels.reference.patch_merging import patch_merging
from swinkernels.reference.residual_layer_norm import residual_layer_norm, residual_post_norm
from swinkernels.reference.window_attention import window_attention, window_attention_qkvpacked
from swinkernels.reference.window_partition import window_partition, window_reverse

__all__ = [
    "attention_half",
    "layer_norm",
    "mlp_half",
    "patch_embed",
    "patch_expanding",
    "patch_merging",
    "residual_layer_norm",
    "residual_post_norm",
    "window_attention",
    "window_attention_qkvpacked",
    "window_partition",
    "window_reverse",
]
