"""The form of ViTDet's layers, which have channels-first maps, unshifted windows and decomposed relative positions.

Source: transformers.models.vitdet.modeling_vitdet, transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.vitdet.modeling_vitdet import VitDetLayer

from swinkernels.adapters.forms.decomposed import decomposed_attention, sizes_of, small_tables
from swinkernels.adapters.forms.form import Form


def _forward(layer: Any, attend: Any, hidden_states: Tensor, output_attentions: bool = False) -> Any:
    if output_attentions:
        return "its attention weights are requested"
    attn = layer.attention
    x = hidden_states.permute(0, 2, 3, 1)
    uses_tables = attn.use_relative_position_embeddings
    y = decomposed_attention(attn, attend, layer.norm1(x), layer.window_size, attn.num_heads, uses_tables, attn.scale)
    if isinstance(y, str):
        return y
    x = x + layer.drop_path(attn.proj(y))
    x = (x + layer.drop_path(layer.mlp(layer.norm2(x)))).permute(0, 3, 1, 2)
    return (layer.residual(x) if layer.use_residual_block else x,)


def _sizes(layer: Any) -> tuple[tuple[int, ...], ...]:
    attn = layer.attention
    sizes = sizes_of(layer.window_size, attn, attn.use_relative_position_embeddings)
    return tuple((c, h, w) for h, w, c in sizes)


ADAPTERS = (
    Form(
        name="transformers ViTDet",
        of=VitDetLayer,
        forward=_forward,
        sizes=_sizes,
        call=lambda layer, x: type(layer).forward(layer, x)[0],
        absorbs=("attention",),
        small=lambda layer: small_tables(
            "attention", layer.window_size, layer.attention, layer.attention.use_relative_position_embeddings
        ),
    ),
)
