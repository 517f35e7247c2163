"""Forms for torchvision's video Swin and MaxViT.

Video Swin has 3D windows. On an axis where the map is no longer than the window, the window shrinks to the map, is not
shifted, and uses the bias of the first tokens of a full window. MaxViT attends in windows or dilated grids, and
computes its scale from the total number of channels instead of the channels per head.

Source: torchvision.models.video.swin_transformer and torchvision.models.maxvit, torchvision 0.26 to 0.29.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torchvision.models.maxvit import PartitionAttentionLayer
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

from swinkernels.adapters.forms.form import Form
from swinkernels.ops._fused_linear import linear


def _swin3d(attn: Any, attend: Any, x: Tensor) -> Any:
    if x.dim() != 5:
        return f"x has {x.dim()} axes"
    size = x.shape[1:4]
    fits = [n > w for n, w in zip(size, attn.window_size, strict=True)]
    y = attend(
        linear(x, attn.qkv.weight, attn.qkv.bias),
        num_heads=attn.num_heads,
        bias_table=attn.relative_position_bias_table,
        table_window=tuple(attn.window_size),
        window_size=tuple(w if fit else n for n, w, fit in zip(size, attn.window_size, fits, strict=True)),
        shift_size=tuple(s if fit else 0 for s, fit in zip(attn.shift_size, fits, strict=True)),
        pad_qkv=attn.qkv.bias,
        dropout_p=attn.attention_dropout if attn.training else 0.0,
    )
    return F.dropout(linear(y, attn.proj.weight, attn.proj.bias), p=attn.dropout, training=attn.training)


def _swin3d_sizes(attn: Any) -> tuple[tuple[int, ...], ...]:
    """Return map sizes: three on which the window shrinks on one axis and, for a small window, one where it does not.

    For a large 3D window that does not shrink, the scores would take long to compute.
    """
    (d, h, w), channels = attn.window_size, attn.qkv.in_features
    few = [(d + 1, 2, w + 1, channels), (2, h + 1, w + 1, channels), (d + 1, h + 1, 1, channels)]
    return (*few, (d + 1, h + 1, w + 1, channels)) if d * h * w <= 64 else tuple(few)


SWIN3D = Form(name="torchvision Swin3D", of=ShiftedWindowAttention3d, forward=_swin3d, sizes=_swin3d_sizes)


def _maxvit(layer: Any, attend: Any, x: Tensor) -> Any:
    size = tuple(layer.grid_size)
    if x.dim() != 4 or tuple(x.shape[2:]) != size or any(n % layer.p for n in size) or size[0] != size[1]:
        return f"the map is not one of {size} in windows of {layer.p}"
    norm, attn, dropout = layer.attn_layer
    is_grid = layer.partition_type == "grid"
    x = x.permute(0, 2, 3, 1)
    y = attend(
        attn.to_qkv(norm(x)),
        num_heads=attn.n_heads,
        window_size=size[0] // layer.p if is_grid else layer.p,
        bias_table=attn.relative_position_bias_table,
        scale=attn.scale_factor,
        grid=is_grid,
    )
    x = x + layer.stochastic_dropout(dropout(attn.merge(y)))
    x = x + layer.stochastic_dropout(layer.mlp_layer(x))
    return x.permute(0, 3, 1, 2).contiguous()


MAXVIT = Form(
    name="torchvision MaxViT",
    of=PartitionAttentionLayer,
    forward=_maxvit,
    sizes=lambda layer: ((layer.n_heads * layer.head_dim, *layer.grid_size),),
    absorbs=("attn_layer", "mlp_layer", "partition_op", "departition_op", "partition_swap", "departition_swap"),
)

ADAPTERS = (SWIN3D, MAXVIT)
