"""The functional entry points, one file per op."""

from swinkernels.ops.attention_half import attention_half
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.mlp_half import mlp_half
from swinkernels.ops.patch_expanding import patch_expanding
from swinkernels.ops.patch_merging import patch_merging
from swinkernels.ops.residual_layer_norm import residual_layer_norm, residual_post_norm
from swinkernels.ops.window_attention import window_attention, window_attention_qkvpacked
from swinkernels.ops.window_partition import window_partition, window_reverse

import swinkernels.ops._position_bias  # isort: skip  defines an op
import swinkernels.triton  # isort: skip  implements the ops defined above
import swinkernels.ops._flops  # isort: skip
from swinkernels.ops._decompositions import decompositions  # isort: skip

__all__ = [
    "attention_half",
    "decompositions",
    "layer_norm",
    "mlp_half",
    "patch_expanding",
    "patch_merging",
    "residual_layer_norm",
    "residual_post_norm",
    "window_attention",
    "window_attention_qkvpacked",
    "window_partition",
    "window_reverse",
]
