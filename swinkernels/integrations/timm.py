"""timm's Swin Transformers, v1 and v2: blocks and patch merging on this package's ops.

Attention (v1). timm rolls the map, pads it, cuts it into windows and undoes it all afterwards. Linear layers act on
tokens one by one, so QKV and the projection run on the map as it lies, and the op addresses the windows. A pad token, a
zero row that timm inserts after norm1, has the bias of the QKV layer as its q, k and v.

Residual connections and norms. The sum with a branch and the norm after it (v1) or before it (v2) are one op. Under
autocast it writes the half-precision input of the next Linear at once, and so does norm1 of v1.

Patch merging. The gather of the neighbours and the norm are one op, before the reduction (v1) or around it (v2).

Norms and merging are timm's own code wherever no fast backend runs them.

Source: timm.models.swin_transformer and timm.models.swin_transformer_v2, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any, cast

from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from swinkernels.integrations._adapter import Accelerated, Adapter
from swinkernels.integrations._inner import (
    inner,
    is_traced,
    why_not_absorbed,
    why_not_linear,
    why_not_window_attention,
)
from swinkernels.integrations._norms import Merging, Residual, norm_for_linear
from swinkernels.integrations._parts import Part, window_attention_part
from swinkernels.integrations._windows import differs, frame_of, shift_mask, window_index
from swinkernels.ops import window_attention_qkvpacked

_MASK = "attn_mask"


# The attention half of a v1 block


def _why_not_attention(block: SwinTransformerBlock) -> str | None:
    """Why this block's attention has to be timm's own code at present."""
    attn = block._modules["attn"]
    if type(attn) is not WindowAttention:
        return f"attn is a {type(attn).__name__}, not timm's WindowAttention"
    reason = why_not_window_attention(attn)
    if reason is not None:
        return reason
    if not isinstance(attn.scale, float):
        return f"attn.scale is a {type(attn.scale).__name__}, not a float"
    height, width = block.window_size
    if attn.relative_position_bias_table.shape[0] != (2 * height - 1) * (2 * width - 1):
        return "attn.relative_position_bias_table is not the table of window_size"
    return None


def _resolution(block: SwinTransformerBlock) -> tuple[int, int]:
    return cast("tuple[int, int]", block.input_resolution)  # timm's annotation allows an int, its code does not


def _mask_fits(block: SwinTransformerBlock, height: int, width: int) -> bool:
    """Whether the block's stored mask, which is for input_resolution, is that of this map."""
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True  # made from the map, or none
    window = block.window_size
    return frame_of((height, width), window) == frame_of(_resolution(block), window)


def _has_own_mask(block: SwinTransformerBlock) -> bool:
    """Whether attn_mask holds other values than timm puts there, which the kernels would not read."""
    if getattr(block, "dynamic_mask", False):
        return False  # timm does not read it either
    expected = None
    if any(block.shift_size):
        expected = shift_mask(frame_of(_resolution(block), block.window_size), block.window_size, block.shift_size)
    return differs(block._buffers.get(_MASK), expected)


def _attention_arguments(block: SwinTransformerBlock) -> dict[str, Any]:
    attn = block.attn
    return {
        "bias_table": attn.relative_position_bias_table,
        "num_heads": attn.num_heads,
        "window_size": block.window_size,
        "shift_size": block.shift_size,
        # scaled_dot_product_attention, which timm calls if fused_attn is set, has its own scale.
        "scale": None if getattr(attn, "fused_attn", False) else attn.scale,
        "pad_qkv": attn.qkv.bias,
        "pad_order": "roll_then_pad",
        "mask_value": -100.0,
    }


def _dropout_p(block: SwinTransformerBlock) -> float:
    return getattr(block.attn.attn_drop, "p", 0.0)


def _dropout_is_on(block: SwinTransformerBlock) -> bool:
    attn = block.attn
    return attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training


def _attention_is_fused(block: AcceleratedSwinTransformerBlock, x: Tensor) -> bool:
    return not block._swinkernels_own_mask and _why_not_attention(block) is None and _mask_fits(block, *x.shape[1:3])


def _attention(block: AcceleratedSwinTransformerBlock, x: Tensor) -> Tensor:
    attn = block.attn
    out = window_attention_qkvpacked(
        attn.qkv(x),
        **_attention_arguments(block),
        dropout_p=_dropout_p(block) if _dropout_is_on(block) else 0.0,
        backend=block._swinkernels_backend,
    )
    return attn.proj_drop(attn.proj(out))


# Norms and residual connections, and patch merging, whose norm is before the reduction in v1 and after it in v2


def _casts_its_input(block: Any) -> bool:
    """Whether the first thing that happens to the MLP's input under autocast is a Linear's cast, seen by nobody."""
    mlp = inner(block, "mlp")
    return (
        why_not_absorbed("mlp", mlp, Mlp, "timm's Mlp") is None and why_not_linear("mlp.fc1", inner(mlp, "fc1")) is None
    )


_RESIDUAL = Residual("norm2", "drop_path1", DropPath, "timm's DropPath", _casts_its_input)
_RESIDUALS_V2 = tuple(Residual(f"norm{half}", f"drop_path{half}", DropPath, "timm's DropPath") for half in (1, 2))
_MERGING = Merging("pre", lambda merging: 4 * merging.dim)
_MERGING_V2 = Merging("post", lambda merging: merging.out_dim)


def _add_then_norm2(block: AcceleratedSwinTransformerBlock, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream s = x + drop_path1(y) and z = norm2(s) for the MLP, each (B, H * W, C)."""
    fused = _RESIDUAL.add_then_norm(block, x, y)
    if fused is not None:
        return fused[0].flatten(1, 2), fused[1].flatten(1, 2)
    s = (x + inner(block, "drop_path1")(y)).flatten(1, 2)
    return s, inner(block, "norm2")(s)


def _add_normed(block: AcceleratedSwinTransformerV2Block, x: Tensor, y: Tensor, half: int) -> Tensor:
    """x + drop_path(norm(y)), with those of the first or the second half of a v2 block."""
    fused = _RESIDUALS_V2[half - 1].add_normed(block, x, y)
    if fused is not None:
        return fused
    return x + inner(block, f"drop_path{half}")(inner(block, f"norm{half}")(y))


# The modules


class AcceleratedSwinTransformerBlock(Accelerated, SwinTransformerBlock):
    """timm's block with its attention half on a window attention op, and norms on ops where a fast backend has them.

    Geometry and parameters are read at every call, so ``set_input_size`` and anything else that changes them holds.
    Where an op cannot stand in for timm's code (a hook on an inner module, a layer that is not an nn.Linear, tracing
    by TorchScript or FX, a mask of the user's own), timm's code runs. Changing the values of ``attn_mask`` or
    ``relative_position_index`` in place goes unnoticed: assign a new tensor instead.
    """

    _swinkernels_own_mask = False

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return super().forward(x)
        batch, height, width, channels = x.shape
        if "_attn" not in self.__dict__ and _attention_is_fused(self, x):
            y = _attention(self, norm_for_linear(self, "norm1", x, self.dim))
        else:
            y = self._attn(self.norm1(x))
        s, z = _add_then_norm2(self, x, y)
        return (s + self.drop_path2(self.mlp(z))).reshape(batch, height, width, channels)

    def _attn(self, x: Tensor) -> Tensor:
        if is_traced(x) or not _attention_is_fused(self, x):
            return super()._attn(x)
        return _attention(self, x)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = _has_own_mask(self)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent=persistent)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = _has_own_mask(self)


class AcceleratedSwinTransformerV2Block(Accelerated, SwinTransformerV2Block):
    """timm's v2 block with its residual connections and norms on an op where a fast backend has it."""

    def forward(self, x: Tensor) -> Tensor:
        if is_traced(x):
            return super().forward(x)
        batch, height, width, channels = x.shape
        s = _add_normed(self, x, self._attn(x), 1).flatten(1, 2)
        return _add_normed(self, s, self.mlp(s), 2).reshape(batch, height, width, channels)


class AcceleratedPatchMerging(Accelerated, PatchMerging):
    """timm's patch merging on an op where a fast backend has it."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if is_traced(x) else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


class AcceleratedPatchMergingV2(Accelerated, PatchMergingV2):
    """timm's patch merging of v2 on an op where a fast backend has it."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if is_traced(x) else _MERGING_V2.run(self, x)
        return super().forward(x) if out is None else out


# The adapters


def _reason_to_skip(block: SwinTransformerBlock) -> str | None:
    if not hasattr(block, "_attn"):
        return "this version of timm has no SwinTransformerBlock._attn: it needs timm 0.9.16 or newer"
    if "_attn" in block.__dict__:
        return "its _attn was replaced on the instance"
    if _has_own_mask(block):
        return "attn_mask holds other values than timm's"
    reason = _why_not_attention(block)
    if reason is not None:
        return reason
    if differs(block.attn._buffers["relative_position_index"], window_index(block.window_size)):
        return "attn.relative_position_index holds other values than timm's"
    return None


def _reason_to_skip_v2(block: SwinTransformerV2Block) -> str | None:
    if not hasattr(block, "_attn"):
        return "this version of timm has no SwinTransformerV2Block._attn: it needs timm 0.9.16 or newer"
    reasons = [residual.why_not(block) for residual in _RESIDUALS_V2]
    return None if None in reasons else "; ".join(map(str, reasons))


def _block_shape(block: Any) -> tuple[int, ...]:
    return (*_resolution(block), block.dim)


def _qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


def _first_weight(block: Any) -> Tensor:
    return next(p for p in block.parameters() if p.is_floating_point())


def _merging_adapter(original: type[nn.Module], accelerated: type[nn.Module], merging: Merging) -> Adapter:
    return Adapter(
        name="timm",
        original=original,
        accelerated=accelerated,
        reason_to_skip=merging.why_not,
        parts=(merging.part(),),
        # It does not know its map. An even one: not every version of timm merges an odd one.
        input_shape=lambda module: (6, 10, module.dim),
        weight=lambda module: module.reduction.weight,
    )


ADAPTERS = (
    Adapter(
        name="timm",
        original=SwinTransformerBlock,
        accelerated=AcceleratedSwinTransformerBlock,
        reason_to_skip=_reason_to_skip,
        parts=(
            window_attention_part(_qkv_weight, _resolution, _attention_arguments, _dropout_p, _why_not_attention),
            _RESIDUAL.part(_first_weight),
        ),
        input_shape=_block_shape,
        weight=_qkv_weight,
    ),
    Adapter(
        name="timm",
        original=SwinTransformerV2Block,
        accelerated=AcceleratedSwinTransformerV2Block,
        reason_to_skip=_reason_to_skip_v2,
        parts=(
            *(residual.part(_first_weight) for residual in _RESIDUALS_V2),
            Part("attention", lambda _: "v2's cosine attention is not replaced", lambda *_: []),
        ),
        input_shape=_block_shape,
        weight=_first_weight,
    ),
    _merging_adapter(PatchMerging, AcceleratedPatchMerging, _MERGING),
    _merging_adapter(PatchMergingV2, AcceleratedPatchMergingV2, _MERGING_V2),
)
