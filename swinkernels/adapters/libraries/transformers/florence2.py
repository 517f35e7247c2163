"""The form of the window attention, without a bias, in Florence-2's vision tower, which is a DaViT.

Source: transformers.models.florence2.modeling_florence2, transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.florence2.modeling_florence2 import Florence2VisionWindowAttention

from swinkernels.adapters.forms.form import Form


def _forward(attn: Any, attend: Any, hidden_states: Tensor) -> Any:
    if hidden_states.dim() != 4:
        return f"hidden_states has {hidden_states.dim()} axes"
    y = attend(
        attn.qkv(hidden_states),
        num_heads=attn.num_heads,
        window_size=attn.window_size,
        scale=attn.scale,
        pad_qkv=attn.qkv.bias,
    )
    return attn.proj(y).flatten(1, 2)


def _sizes(attn: Any) -> tuple[tuple[int, ...], ...]:
    w = attn.window_size
    return (w + 1, 2 * w + 1, attn.dim), (2 * w, w, attn.dim)


ADAPTERS = (Form("transformers Florence-2", Florence2VisionWindowAttention, _forward, _sizes),)
