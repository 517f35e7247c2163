"""The form of Hiera's attention inside mask units. Consecutive tokens belong to different mask units.

Source: transformers.models.hiera.modeling_hiera, transformers 5.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.hiera.modeling_hiera import HieraMaskUnitAttention

from swinkernels.adapters.forms.form import Form


def _forward(attn: Any, attend: Any, hidden_states: Tensor, output_attentions: bool = False) -> Any:
    if output_attentions:
        return "its attention weights are requested"
    if attn.query_stride > 1:
        return "it pools its queries"
    if not attn.use_mask_unit_attn:
        return "it attends to the whole map without a bias, for which torch's own attention is as fast"
    if hidden_states.dim() != 3 or hidden_states.shape[1] % attn.window_size:
        return "the tokens do not form whole mask units"
    # Each mask unit becomes a column of the op's map.
    qkv = attn.qkv(hidden_states).unflatten(1, (attn.window_size, -1))
    y = attend(qkv, num_heads=attn.num_heads, window_size=(attn.window_size, 1), scale=attn.scale)
    return attn.proj(y.flatten(1, 2)), None


ADAPTERS = (
    Form(
        name="transformers Hiera",
        of=HieraMaskUnitAttention,
        forward=_forward,
        sizes=lambda attn: ((3 * attn.query_stride * max(attn.window_size, 1), attn.qkv.in_features),),
        call=lambda attn, x: type(attn).forward(attn, x)[0],
    ),
)
