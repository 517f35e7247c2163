"""Creates the forms of SAM's vision layers and of their copies in other models of transformers.

Source: transformers.models of sam, sam_hq and got_ocr2, transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from swinkernels.adapters.adapter import original_class
from swinkernels.adapters.forms.decomposed import decomposed_attention, sizes_of, small_tables
from swinkernels.adapters.forms.form import Form


def _forward(layer: Any, attend: Any, hidden_states: Tensor) -> Any:
    attn = layer.attn
    # transformers calls torch's fused attention without dropout and with the default scale.
    is_fused = "Sdpa" in original_class(attn).__name__
    y = decomposed_attention(
        attn,
        attend,
        layer.layer_norm1(hidden_states),
        layer.window_size,
        attn.num_attention_heads,
        attn.use_rel_pos,
        None if is_fused else attn.scale,
        attn.dropout if attn.training and not is_fused else 0.0,
    )
    if isinstance(y, str):
        return y
    hidden_states = hidden_states + attn.proj(y)
    return hidden_states + layer.mlp(layer.layer_norm2(hidden_states))


def sam_form(name: str, kind: type[nn.Module]) -> Form:
    """Return the form of ``kind``, the layer class of the model ``name``."""
    return Form(
        name=f"transformers {name}",
        of=kind,
        forward=_forward,
        sizes=lambda layer: sizes_of(layer.window_size, layer.attn, layer.attn.use_rel_pos),
        absorbs=("attn",),
        small=lambda layer: small_tables("attn", layer.window_size, layer.attn, layer.attn.use_rel_pos),
        tolerance=1e-5,  # softmax runs in float32 in the eager attention
    )
