"""Runs timm's relative position ViT with an op: global attention with a bias table, as a single window.

timm's own code runs if there is a class token or if the model passes one bias to all blocks, because the module then
has no bias table in the op's layout. timm's code also runs attention without a bias, because torch's attention is as
fast.

Source: timm.models.vision_transformer_relpos, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

from timm.models.vision_transformer_relpos import RelPosAttention
from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import child, class_of, has_hooks, replaced_method, watch, why_not_window_attention
from swinkernels.adapters.checks import settled
from swinkernels.adapters.libraries.timm._rel_pos import bias_table, stored, why_not_rel_pos
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention, window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits

watch(RelPosAttention)


def _why_not(attn: Any) -> str | None:
    """Return the reason why timm's own code currently has to run ``attn``, or None."""
    rel_pos = attn.rel_pos
    if rel_pos is None:
        return "it has no position bias of its own, and torch's attention is as fast as a window attention op"
    reason = replaced_method(attn, RelPosAttention) or why_beyond_limits(0, rel_pos.window_size)
    for name in ("q_norm", "k_norm"):
        norm = child(attn, name)
        reason = reason or replaced_method(norm, class_of(norm), name)
        if reason is None and has_hooks(norm):
            reason = f"a hook is registered on {name}"
    if reason is None:
        reason = why_not_window_attention(attn) or why_not_rel_pos(rel_pos, "rel_pos", rel_pos.window_size)
    return reason


def _map_size(attn: Any) -> tuple[int, int]:
    return attn.rel_pos.window_size


def _arguments(attn: Any) -> dict[str, Any]:
    """Return the op's arguments, except bias_table, dropout_p and backend."""
    return {
        "num_heads": attn.num_heads,
        "window_size": _map_size(attn),
        # If fused_attn is set, timm calls scaled_dot_product_attention with the default scale.
        "scale": None if getattr(attn, "fused_attn", False) else attn.scale,
    }


def _dropout_p(attn: Any) -> float:
    return getattr(attn.attn_drop, "p", 0.0)


class AcceleratedRelPosAttention(Accelerated, RelPosAttention):
    """timm's attention, computed by a window attention op.

    Parameters are read, and stored tensors are checked, at every call. timm's code runs if a hook is registered on an
    inner module, the class of a layer is unknown, a method was replaced, or the code is traced.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        return stored(self.rel_pos)

    def _swinkernels_look(self) -> None:
        _why_not(self)

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        rel_pos: Any = self.rel_pos
        if self._swinkernels_own_code(x) or settled(self, _why_not) is not None or x.shape[1] != rel_pos.window_area:
            return super().forward(x, shared_rel_pos)
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unflatten(1, _map_size(self))
        dropout_is_on = self.training if getattr(self, "fused_attn", False) else self.attn_drop.training
        arguments = {
            "bias_table": bias_table(rel_pos),
            "dropout_p": _dropout_p(self) if dropout_is_on else 0.0,
            "backend": self._swinkernels_backend,
            **_arguments(self),
        }
        if type(self.q_norm) is nn.Identity and type(self.k_norm) is nn.Identity:
            out = window_attention_qkvpacked(qkv, **arguments)
        else:
            q, k, v = qkv.unbind(-3)
            out = window_attention(self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype), v, **arguments)
        return self.proj_drop(self.proj(out.flatten(1, 2)))


def _weight(attn: Any) -> Tensor:
    return attn.qkv.weight


ADAPTERS = (
    Adapter(
        name="timm",
        original=RelPosAttention,
        accelerated=AcceleratedRelPosAttention,
        reason_to_skip=_why_not,
        parts=(window_attention_part(_weight, _map_size, _arguments, _dropout_p, _why_not),),
        input_shape=lambda attn: (attn.rel_pos.window_area, attn.qkv.weight.shape[1]),
        weight=_weight,
    ),
)
