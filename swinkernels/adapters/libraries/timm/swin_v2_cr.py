"""Runs timm's own Swin Transformer V2 ("CR") with this package's ops: cosine attention, norms and patch merging.

The bias comes from an MLP on the log coordinates of every pair of tokens. The MLP has a Dropout, active in training, so
the module's own method computes the bias at every call, and the op receives a dense bias. Patch merging is as in v1.

Source: timm.models.swin_transformer_v2_cr, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

from timm.models.swin_transformer_v2_cr import PatchMerging, SwinTransformerV2CrBlock, WindowMultiHeadAttention
from torch import Tensor

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import child, first_weight, watch
from swinkernels.adapters.checks import settled
from swinkernels.adapters.libraries.timm import _blocks
from swinkernels.adapters.linear_layers import call_linear
from swinkernels.adapters.microsoft_attention import why_layers_are_called
from swinkernels.adapters.norms import Merging
from swinkernels.adapters.part import window_attention_part

watch(SwinTransformerV2CrBlock, methods=("_shifted_window_attn", "get_attn_mask"))
watch(WindowMultiHeadAttention)


def _why_not_attention(block: SwinTransformerV2CrBlock) -> str | None:
    """Return the reason why timm's own code currently has to run the block's attention, or None."""
    reason = _blocks.why_not_attention(block, WindowMultiHeadAttention)
    if reason is None and tuple(child(block, "attn").window_size) != tuple(block.window_size):
        reason = "attn.window_size is not the window_size of the block"
    return reason


def _why_not_half(block: SwinTransformerV2CrBlock) -> str | None:
    """Return the reason why the op attention_half cannot replace the block's attention and norm1, or None."""
    return _why_not_attention(block) or why_layers_are_called(child(block, "attn"), None)


def _is_fused(block: Any, x: Tensor) -> bool:
    return settled(block, _why_not_attention) is None and _blocks.mask_fits(block, x)


def _arguments(block: SwinTransformerV2CrBlock) -> dict[str, Any]:
    """Return the op's arguments, except dropout_p."""
    attn = child(block, "attn")
    return {
        "bias": attn._relative_positional_encodings().squeeze(0),
        "logit_scale": attn.logit_scale,
        "pad_qkv": attn.qkv.bias,
        **_blocks.shifted_windows(block),
    }


def _attention(block: AcceleratedSwinTransformerV2CrBlock, x: Tensor) -> Tensor:
    attn = child(block, "attn")
    qkv = call_linear("attn.qkv", child(attn, "qkv"), x)
    p = _blocks.dropout_p(block) if attn.attn_drop.training else 0.0
    return _blocks.attend(block, qkv, p, **_arguments(block))


# A reduction without in_features is not an nn.Linear, so Merging.why_not rejects it.
_MERGING = Merging("pre", lambda merging: getattr(merging.reduction, "in_features", 0))


class AcceleratedSwinTransformerV2CrBlock(_blocks.ShiftedWindowBlock, SwinTransformerV2CrBlock):
    """timm's v2-CR block, with its attention computed by a window attention op, and its norms by other ops."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x)
        batch, height, width, channels = x.shape
        s = _blocks.add_attention_half(self, x, _why_not_half, _arguments)
        if s is None:
            y = _attention(self, x) if _is_fused(self, x) else self._shifted_window_attn(x)
            s = _blocks.add_normed(self, x, y, 1)
        s = s.flatten(1, 2)
        return self.norm3(_blocks.add_mlp_half(self, s)).reshape(batch, height, width, channels)

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or not _is_fused(self, x):
            return super()._shifted_window_attn(x)
        return _attention(self, x)


class AcceleratedPatchMergingV2Cr(Accelerated, PatchMerging):
    """timm's v2-CR patch merging, computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or x.dim() != 4 else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


def _reason_to_skip(block: SwinTransformerV2CrBlock) -> str | None:
    reason = _blocks.why_not_block(block, "_shifted_window_attn")
    if reason is not None:
        return reason
    reasons = [_why_not_attention(block), *(residual.why_not(block) for residual in _blocks.RESIDUALS)]
    return None if None in reasons else "; ".join(map(str, reasons))


ADAPTERS = (
    Adapter(
        name="timm",
        original=SwinTransformerV2CrBlock,
        accelerated=AcceleratedSwinTransformerV2CrBlock,
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
    _MERGING.adapter("timm", PatchMerging, AcceleratedPatchMergingV2Cr, _blocks.merging_shape),
)
