"""Runs timm's Swin Transformer with this package's ops: attention, norms and patch merging.

A residual connection's sum and the norm after it are one op. Under autocast this op directly writes the half-precision
input of the next Linear, and so does norm1. Patch merging is one op: gather, norm and reduction.

Source: timm.models.swin_transformer, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import (
    child,
    first_weight,
    watch,
    why_not_absorbed,
    why_not_linear,
    why_not_norm,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, attention_branch
from swinkernels.adapters.libraries.timm import _blocks
from swinkernels.adapters.linear_layers import call_linear
from swinkernels.adapters.microsoft_attention import attention_layers, why_layers_are_called
from swinkernels.adapters.norms import Merging, Residual, norm_for_linear
from swinkernels.adapters.part import window_attention_part

watch(SwinTransformerBlock, methods=("_attn", "get_attn_mask"))
watch(WindowAttention, methods=("_get_rel_pos_bias",))


def _why_not_attention(block: SwinTransformerBlock) -> str | None:
    """Return the reason why timm's own code currently has to run the block's attention, or None."""
    reason = _blocks.why_not_attention(block, WindowAttention, takes_lora=True)
    if reason is not None:
        return reason
    attn = child(block, "attn")
    if not isinstance(attn.scale, float):
        return f"attn.scale is a {type(attn.scale).__name__}, not a float"
    height, width = block.window_size
    if attn.relative_position_bias_table.shape[0] != (2 * height - 1) * (2 * width - 1):
        return "attn.relative_position_bias_table is not the table of window_size"
    return None


def _arguments(block: SwinTransformerBlock) -> dict[str, Any]:
    attn = child(block, "attn")
    return {
        "bias_table": attn.relative_position_bias_table,
        # scaled_dot_product_attention, which timm calls if fused_attn is set, uses its default scale.
        "scale": None if getattr(attn, "fused_attn", False) else attn.scale,
        "pad_qkv": child(attn, "qkv").bias,
        **_blocks.shifted_windows(block),
    }


def _dropout_is_on(block: SwinTransformerBlock) -> bool:
    attn = child(block, "attn")
    return attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training


def _is_fused(block: AcceleratedSwinTransformerBlock, x: Tensor) -> bool:
    return settled(block, _why_not_attention) is None and _blocks.mask_fits(block, x)


def _attended(block: AcceleratedSwinTransformerBlock, x: Tensor) -> Tensor:
    """Return the attention op's output for the map ``x`` (B, H, W, C), before the projection."""
    p = _blocks.dropout_p(block) if _dropout_is_on(block) else 0.0
    qkv = call_linear("attn.qkv", child(child(block, "attn"), "qkv"), x)
    return _blocks.attended(block, qkv, p, **_arguments(block))


def _casts_its_input(block: Any) -> bool:
    """Return True if, under autocast, a Linear casts the MLP's input before other code can read it."""
    mlp = child(block, "mlp")
    return (
        why_not_absorbed("mlp", mlp, Mlp, "timm's Mlp") is None and why_not_linear("mlp.fc1", child(mlp, "fc1")) is None
    )


_RESIDUAL = Residual("norm2", "drop_path1", DropPath, "timm's DropPath", _casts_its_input)
_MERGING = Merging("pre", lambda merging: 4 * merging.dim)


def _first_half(block: AcceleratedSwinTransformerBlock, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the residual stream s = x + drop_path1(attention) and z = norm2(s) for the MLP, each (B, H * W, C)."""
    if _is_fused(block, x):
        out = _attended(block, norm_for_linear(block, "norm1", x, block.dim))
        s = _blocks.add_projected(block, x, out)
        if s is not None:
            s = s.flatten(1, 2)
            return s, child(block, "norm2")(s)
        y = _blocks.projected(block, out)
    else:
        y = block._attn(block.norm1(x))
    fused = _RESIDUAL.add_then_norm(block, x, y)
    if fused is not None:
        return fused[0].flatten(1, 2), fused[1].flatten(1, 2)
    s = (x + child(block, "drop_path1")(y)).flatten(1, 2)
    return s, child(block, "norm2")(s)


def _why_not_half(block: SwinTransformerBlock, training: bool | None) -> str | None:
    """Return the reason why the op attention_half cannot replace the block's attention and norm1, or None."""
    reason = _why_not_attention(block) or why_not_norm("norm1", child(block, "norm1"), block.dim)
    if reason is not None:
        return reason
    return why_layers_are_called(child(block, "attn"), training)


_HALVES = Halves(_RESIDUAL, _blocks.MLP, "pre", _why_not_half)


def _branch(block: AcceleratedSwinTransformerBlock, x: Tensor, residual: bool) -> Tensor | None:
    """Return the attention branch of ``x``, plus x if ``residual``, or None if attention_half cannot compute it."""
    if x.dim() != 4 or not _blocks.mask_fits(block, x):
        return None
    p = _blocks.dropout_p(block) if _dropout_is_on(block) else 0.0
    given = {**_arguments(block), "dropout_p": p}
    return attention_branch(block, x, attention_layers, block._swinkernels_backend, given, residual)


class AcceleratedSwinTransformerBlock(_blocks.ShiftedWindowBlock, SwinTransformerBlock):
    """timm's block, with its attention half computed by a window attention op, and its norms by other ops."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x)
        out = _HALVES.run(self, x, lambda residual: _branch(self, x, residual), repeats=True)
        if out is not None:
            return out
        s, z = _first_half(self, x)
        return _blocks.MLP.added(self, s, z).reshape(x.shape)

    def _attn(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or not _is_fused(self, x):
            return super()._attn(x)
        return _blocks.projected(self, _attended(self, x))


class AcceleratedPatchMerging(Accelerated, PatchMerging):
    """timm's patch merging, computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or x.dim() != 4 else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


def _reason_to_skip(block: SwinTransformerBlock) -> str | None:
    return _blocks.why_not_block(block, "_attn") or _why_not_attention(block)


ADAPTERS = (
    Adapter(
        name="timm",
        original=SwinTransformerBlock,
        accelerated=AcceleratedSwinTransformerBlock,
        reason_to_skip=_reason_to_skip,
        parts=(
            window_attention_part(
                _blocks.qkv_weight, _blocks.map_size, _blocks.shifted_windows, _blocks.dropout_p, _why_not_attention
            ),
            _RESIDUAL.part(first_weight),
        ),
        input_shape=_blocks.block_shape,
        weight=_blocks.qkv_weight,
        why_not_recompute=_HALVES.why_not_in_training,
    ),
    _MERGING.adapter("timm", PatchMerging, AcceleratedPatchMerging, _blocks.merging_shape),
)
