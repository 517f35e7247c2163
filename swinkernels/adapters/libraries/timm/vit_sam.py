"""The form of timm's ViT for SAM and ViTDet, which has unshifted windows and decomposed relative positions.

timm's drop path drops windows instead of images, so the form partitions the map into windows before the drop path.

Source: timm.models.vision_transformer_sam, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from timm.models.vision_transformer_sam import Block
from torch import Tensor, nn

from swinkernels.adapters.forms.decomposed import decomposed_attention, sizes_of, small_tables
from swinkernels.adapters.forms.form import Form
from swinkernels.reference import window_partition, window_reverse


def _forward(block: Any, attend: Any, x: Tensor) -> Any:
    attn, window = block.attn, block.window_size
    if type(attn.q_norm) is not nn.Identity or type(attn.k_norm) is not nn.Identity or attn.rope is not None:
        return "it normalises or rotates its queries and keys"
    is_on = attn.training if attn.fused_attn else attn.attn_drop.training
    dropout_p = attn.attn_drop.p if is_on else 0.0
    scale = None if attn.fused_attn else attn.scale
    y = decomposed_attention(attn, attend, block.norm1(x), window, attn.num_heads, attn.use_rel_pos, scale, dropout_p)
    if isinstance(y, str):
        return y
    y = block.ls1(attn.proj_drop(attn.proj(y)))
    if window > 0 and block.training and type(block.drop_path1) is not nn.Identity:
        h, w = y.shape[1:3]
        padded = F.pad(y, (0, 0, 0, -w % window, 0, -h % window))
        windows = block.drop_path1(window_partition(padded, window))
        y = window_reverse(windows, window, tuple(padded.shape[1:3]))[:, :h, :w]
    else:
        y = block.drop_path1(y)
    x = (x + y).flatten(1, 2)
    x = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x.reshape(y.shape)


ADAPTERS = (
    Form(
        name="timm SAM ViT",
        of=Block,
        forward=_forward,
        sizes=lambda block: sizes_of(block.window_size, block.attn, block.attn.use_rel_pos),
        absorbs=("attn", "ls1", "drop_path1"),
        small=lambda block: small_tables("attn", block.window_size, block.attn, block.attn.use_rel_pos),
    ),
)
