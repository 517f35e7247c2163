"""The form of the blocks of SAM 2's Hiera: window attention without a bias.

Source: transformers.models.sam2.modeling_sam2, transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

from swinkernels.adapters.forms.form import Form


def _forward(block: Any, attend: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
    attn = block.attn
    if any(value is not None for value in kwargs.values()):
        return f"it is called with {', '.join(kwargs)}"
    if block.query_stride or block.dim != block.dim_out:
        return "it pools its queries or changes the number of channels"
    if not block.window_size > 0:
        return "it attends to the whole map without a bias, for which torch's own attention is as fast"
    if hidden_states.dim() != 4:
        return f"hidden_states has {hidden_states.dim()} axes"
    y = attend(
        attn.qkv(block.layer_norm1(hidden_states)),
        num_heads=attn.num_attention_heads,
        window_size=block.window_size,
        scale=attn.scale,
        pad_qkv=attn.qkv.bias,
    )
    hidden_states = hidden_states + attn.proj(y)
    return hidden_states + block.mlp(block.layer_norm2(hidden_states))


def _sizes(block: Any) -> tuple[tuple[int, ...], ...]:
    w = max(block.window_size, 4)
    return (w + 1, 2 * w + 1, block.dim), (2 * w, w, block.dim)


ADAPTERS = (Form("transformers SAM 2", Sam2MultiScaleBlock, _forward, _sizes, absorbs=("attn",)),)
