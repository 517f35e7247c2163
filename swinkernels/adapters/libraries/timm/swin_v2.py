"""Runs timm's Swin Transformer V2 with this package's ops: cosine attention, norms and patch merging.

The module's own layers compute the table of the continuous position bias, and the op gathers from the table's sigmoid;
timm gathers first and then takes the sigmoid. The norms follow the branches, so timm pads the residual stream with zero
rows; q and v of a pad token are the biases, and its k is 0. A residual connection's sum and the norm before it are one
op, and so is patch merging: gather, reduction and norm.

Source: timm.models.swin_transformer_v2, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models.swin_transformer_v2 import PatchMerging, SwinTransformerV2Block, WindowAttention
from torch import Tensor

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import child, first_weight, watch
from swinkernels.adapters.checks import settled
from swinkernels.adapters.libraries.timm import _blocks
from swinkernels.adapters.microsoft_attention import position_bias, why_layers_are_called
from swinkernels.adapters.norms import Merging
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops._fused_linear import linear

watch(SwinTransformerV2Block, methods=("_attn", "get_attn_mask"))
watch(WindowAttention)


def _why_not_attention(block: SwinTransformerV2Block) -> str | None:
    """Return the reason why timm's own code currently has to run the block's attention, or None."""
    reason = _blocks.why_not_attention(block, WindowAttention)
    if reason is not None:
        return reason
    attn = child(block, "attn")
    if child(attn, "qkv").bias is not None:
        return "attn.qkv has a bias in addition to q_bias and v_bias"
    if attn.logit_scale is None:
        return "attn.logit_scale is None"
    height, width = block.window_size
    coords: Any = attn._buffers["relative_coords_table"]
    if coords is None or coords.shape[1:3] != (2 * height - 1, 2 * width - 1):
        return "attn.relative_coords_table is not the table of window_size"
    return None


def _why_not_half(block: SwinTransformerV2Block) -> str | None:
    """Return the reason why the op attention_half cannot replace the block's attention and norm1, or None."""
    return _why_not_attention(block) or why_layers_are_called(child(block, "attn"), None)


def _is_fused(block: Any, x: Tensor) -> bool:
    return settled(block, _why_not_attention) is None and _blocks.mask_fits(block, x)


def _arguments(block: SwinTransformerV2Block) -> dict[str, Any]:
    """Return the op's arguments for pad tokens, bias, scale, heads, windows and mask."""
    attn = child(block, "attn")
    return {
        "pad_qkv": _bias(attn),
        "bias_table": position_bias(block, "attn", "cpb_mlp"),
        "logit_scale": attn.logit_scale,
        **_blocks.shifted_windows(block),
    }


def _bias(attn: Any) -> Tensor | None:
    return None if attn.q_bias is None else torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))


def _qkv(attn: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return q, k and v of the map ``x``."""
    if bias is None:
        return attn.qkv(x)
    if getattr(attn, "qkv_bias_separate", False):
        qkv = attn.qkv(x)
        qkv += bias  # in place, as in timm: under autocast, the sum has the dtype of the product
        return qkv
    return linear(x, attn.qkv.weight, bias)


def _attention(block: AcceleratedSwinTransformerV2Block, x: Tensor) -> Tensor:
    attn = child(block, "attn")
    arguments = _arguments(block)
    qkv = _qkv(attn, x, arguments["pad_qkv"])
    p = _blocks.dropout_p(block) if attn.attn_drop.training else 0.0
    return _blocks.attend(block, qkv, p, **arguments)


_MERGING = Merging("post", lambda merging: merging.out_dim)


class AcceleratedSwinTransformerV2Block(_blocks.ShiftedWindowBlock, SwinTransformerV2Block):
    """timm's v2 block, with its attention computed by a window attention op, and its norms by other ops."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x)
        batch, height, width, channels = x.shape
        s = _blocks.add_attention_half(self, x, _why_not_half, _arguments)
        if s is None:
            y = _attention(self, x) if _is_fused(self, x) else self._attn(x)
            s = _blocks.add_normed(self, x, y, 1)
        s = s.flatten(1, 2)
        return _blocks.add_mlp_half(self, s).reshape(batch, height, width, channels)

    def _attn(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or not _is_fused(self, x):
            return super()._attn(x)
        return _attention(self, x)


class AcceleratedPatchMergingV2(Accelerated, PatchMerging):
    """timm's v2 patch merging, computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or x.dim() != 4 else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


def _reason_to_skip(block: SwinTransformerV2Block) -> str | None:
    reason = _blocks.why_not_block(block, "_attn")
    if reason is not None:
        return reason
    reasons = [_why_not_attention(block), *(residual.why_not(block) for residual in _blocks.RESIDUALS)]
    return None if None in reasons else "; ".join(map(str, reasons))


ADAPTERS = (
    Adapter(
        name="timm",
        original=SwinTransformerV2Block,
        accelerated=AcceleratedSwinTransformerV2Block,
        reason_to_skip=_reason_to_skip,
        parts=(
            window_attention_part(
                _blocks.qkv_weight, _blocks.map_size, _blocks.shifted_windows, _blocks.dropout_p, _why_not_attention
            ),
            *(residual.part(first_weight) for residual in _blocks.RESIDUALS),
        ),
        input_shape=_blocks.block_shape,
        weight=first_weight,
        why_not_recompute=_blocks.MLP_HALF.why_not_in_training,
    ),
    _MERGING.adapter("timm", PatchMerging, AcceleratedPatchMergingV2, _blocks.merging_shape),
)
