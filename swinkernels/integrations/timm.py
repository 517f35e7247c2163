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

import torch
from timm.layers import DropPath, Mlp
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn

from swinkernels.integrations._adapter import Accelerated, Adapter
from swinkernels.integrations._backend_choice import fast_backend
from swinkernels.integrations._inner import (
    has_hooks,
    inner,
    is_traced,
    replaced_forward,
    why_not_absorbed,
    why_not_linear,
    why_not_norm,
)
from swinkernels.integrations._parts import Part, norm_part, window_attention_part
from swinkernels.ops import (
    layer_norm,
    patch_merging,
    residual_layer_norm,
    residual_post_norm,
    window_attention_qkvpacked,
)
from swinkernels.ops._backends import norm_reasons, patch_merging_reasons, residual_reasons
from swinkernels.ops._library import autocast_dtype

_MASK = "attn_mask"


# The attention half of a v1 block


def _why_not_attention(block: SwinTransformerBlock) -> str | None:
    """Why this block's attention has to be timm's own code at present."""
    attn = block._modules["attn"]
    if type(attn) is not WindowAttention:
        return f"attn is a {type(attn).__name__}, not timm's WindowAttention"
    if "forward" in attn.__dict__:
        return "attn.forward was replaced on the instance"
    # A hook would see other shapes (on qkv, proj, proj_drop: the map instead of windows) or no call (on the others).
    if has_hooks(attn):
        return "a hook is registered on attn"
    modules = attn._modules
    for name, module in modules.items():
        if module is not None and has_hooks(module):
            return f"a hook is registered on attn.{name}"
    # Any other layer may mix tokens, and what it makes of a pad token is not known.
    if type(modules["qkv"]) is not nn.Linear:
        return f"attn.qkv is a {type(modules['qkv']).__name__}, not an nn.Linear"
    if type(modules["proj"]) is not nn.Linear:
        return f"attn.proj is a {type(modules['proj']).__name__}, not an nn.Linear"
    if type(modules["softmax"]) is not nn.Softmax:
        return f"attn.softmax is a {type(modules['softmax']).__name__}, not an nn.Softmax"
    if type(modules["attn_drop"]) not in (nn.Dropout, nn.Identity):
        return f"attn.attn_drop is a {type(modules['attn_drop']).__name__}, not an nn.Dropout"
    if not isinstance(attn.scale, float):
        return f"attn.scale is a {type(attn.scale).__name__}, not a float"
    height, width = block.window_size
    if attn.relative_position_bias_table.shape[0] != (2 * height - 1) * (2 * width - 1):
        return "attn.relative_position_bias_table is not the table of window_size"
    return None


def _resolution(block: SwinTransformerBlock) -> tuple[int, int]:
    return cast("tuple[int, int]", block.input_resolution)  # timm's annotation allows an int, its code does not


def _frame(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def _mask_fits(block: SwinTransformerBlock, height: int, width: int) -> bool:
    """Whether the block's stored mask, which is for input_resolution, is that of this map."""
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True  # made from the map, or none
    window = block.window_size
    return _frame((height, width), window) == _frame(_resolution(block), window)


def _differs(x: Tensor | None, expected: Tensor | None) -> bool:
    if x is None or expected is None:
        return x is not expected
    if x.shape != expected.shape:
        return True
    return not x.is_meta and not torch.equal(x.to("cpu", expected.dtype), expected)  # meta tensors have no values


def _standard_mask(block: SwinTransformerBlock) -> Tensor | None:
    """The mask that timm computes for input_resolution, (num_windows, N, N), or None for a block without shift."""
    if not any(block.shift_size):
        return None
    window = block.window_size
    frame = _frame(_resolution(block), window)
    regions = []
    for p, w, s in zip(frame, window, block.shift_size, strict=True):
        g = torch.arange(p, device="cpu")
        regions.append((g >= p - w).long() + (g >= p - s).long() if s > 0 else torch.zeros_like(g))
    region = 3 * regions[0][:, None] + regions[1]
    region = region.reshape(frame[0] // window[0], window[0], frame[1] // window[1], window[1]).transpose(1, 2)
    region = region.reshape(-1, window[0] * window[1])
    return -100.0 * (region[:, :, None] != region[:, None, :])


def _has_own_mask(block: SwinTransformerBlock) -> bool:
    """Whether attn_mask holds other values than timm puts there, which the kernels would not read."""
    if getattr(block, "dynamic_mask", False):
        return False  # timm does not read it either
    return _differs(block._buffers.get(_MASK), _standard_mask(block))


def _window_index(block: SwinTransformerBlock) -> Tensor:
    """relative_position_index by the formula that the kernels compute: (query - key) + window - 1, row-major."""
    height, width = block.window_size
    token = torch.arange(height * width, device="cpu")
    offset = [c[:, None] - c[None, :] for c in (token // width, token % width)]
    return (offset[0] + height - 1) * (2 * width - 1) + offset[1] + width - 1


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


# Norms and residual connections, of both versions


def _why_not_residual(block: Any, norm: str, drop_path: str) -> str | None:
    """Why a residual connection and its norm have to be timm's own code at present, or None."""
    drop = inner(block, drop_path)
    kind = nn.Identity if type(drop) is nn.Identity else DropPath  # timm has an Identity for p = 0
    reason = why_not_norm(norm, inner(block, norm), block.dim)
    return reason or why_not_absorbed(drop_path, drop, kind, "timm's DropPath")


def _drop_path_scale(drop_path: Any, y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What timm's DropPath would multiply each sample of y, in that dtype, by: the same random numbers. None for 1."""
    if type(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    scale = y.new_empty(y.shape[0], dtype=dtype).bernoulli_(keep)
    return scale.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else scale


def _norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype that torch's LayerNorm returns where x is, for a dtype: autocast runs it in float32, but on a CPU."""
    return torch.float32 if autocast_dtype(x) is not None and x.device.type != "cpu" else dtype


def _casts_its_input(mlp: Any) -> bool:
    """Whether the first thing that happens to an MLP's input under autocast is a Linear's cast, seen by nobody."""
    return (
        why_not_absorbed("mlp", mlp, Mlp, "timm's Mlp") is None and why_not_linear("mlp.fc1", inner(mlp, "fc1")) is None
    )


def _norm1(block: AcceleratedSwinTransformerBlock, x: Tensor) -> Tensor:
    """norm1 for the QKV layer on the map: under autocast, in the dtype to which that would cast it."""
    norm, dtype = inner(block, "norm1"), autocast_dtype(x)
    if dtype is None:
        return norm(x)
    of = "layer_norm", block.dim, (x.dtype, dtype)
    backend = fast_backend(block._swinkernels_backend, norm_reasons, x.device, *of)
    if backend is None or why_not_norm("norm1", norm, block.dim) is not None:
        return norm(x)
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, backend=backend)


def _add_then_norm2(block: AcceleratedSwinTransformerBlock, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream s = x + drop_path1(y) and z = norm2(s) for the MLP, each (B, H * W, C)."""
    norm, drop_path = inner(block, "norm2"), inner(block, "drop_path1")
    # The op returns s in the dtype of x, and z in that of y, under autocast a narrower one than norm2's.
    if torch.promote_types(x.dtype, y.dtype) == x.dtype and (
        y.dtype == _norm_dtype(x, x.dtype) or (y.dtype == autocast_dtype(x) and _casts_its_input(block.mlp))
    ):
        of = block.dim, (x.dtype, y.dtype)
        backend = fast_backend(block._swinkernels_backend, residual_reasons, x.device, *of)
        if backend is not None and _why_not_residual(block, "norm2", "drop_path1") is None:
            d = _drop_path_scale(drop_path, y, y.dtype)
            s, z = residual_layer_norm(x, y, norm.weight, norm.bias, eps=norm.eps, drop_path_scale=d, backend=backend)
            return s.flatten(1, 2), z.flatten(1, 2)
    s = (x + drop_path(y)).flatten(1, 2)
    return s, norm(s)


def _add_normed(block: AcceleratedSwinTransformerV2Block, x: Tensor, y: Tensor, half: int) -> Tensor:
    """x + drop_path(norm(y)), with those of the first or the second half of a v2 block."""
    norm_name, drop_path_name = f"norm{half}", f"drop_path{half}"
    norm, drop_path = inner(block, norm_name), inner(block, drop_path_name)
    dtype = _norm_dtype(y, y.dtype)
    if torch.promote_types(x.dtype, dtype) == x.dtype:  # the dtype in which the op returns the sum
        of = block.dim, (x.dtype, y.dtype)
        backend = fast_backend(block._swinkernels_backend, residual_reasons, x.device, *of)
        if backend is not None and _why_not_residual(block, norm_name, drop_path_name) is None:
            d = _drop_path_scale(drop_path, y, dtype)
            return residual_post_norm(x, y, norm.weight, norm.bias, eps=norm.eps, drop_path_scale=d, backend=backend)
    return x + drop_path(norm(y))


# Patch merging, whose norm is before the reduction in v1 ("pre") and after it in v2 ("post")


def _norm_width(merging: Any, norm_at: str) -> int:
    return 4 * merging.dim if norm_at == "pre" else merging.out_dim


def _why_not_merging(merging: Any, norm_at: str) -> str | None:
    """Why patch merging has to be timm's own code at present, or None."""
    reduction = inner(merging, "reduction")
    reason = why_not_linear("reduction", reduction)
    if reason is None and reduction.bias is not None:
        reason = "reduction has a bias"
    return reason or why_not_norm("norm", inner(merging, "norm"), _norm_width(merging, norm_at))


def _merge(merging: Any, x: Tensor, norm_at: str) -> Tensor | None:
    """Patch merging by the op, or None where timm's own code has to run."""
    low = autocast_dtype(x)
    reduced = x.dtype if low is None else low
    dtypes = (x.dtype, reduced) if norm_at == "pre" else (reduced, x.dtype if low is None else torch.float32)
    of = norm_at, _norm_width(merging, norm_at), dtypes
    backend = fast_backend(merging._swinkernels_backend, patch_merging_reasons, x.device, *of)
    if backend is None or _why_not_merging(merging, norm_at) is not None:
        return None
    norm, weight = inner(merging, "norm"), inner(merging, "reduction").weight
    out = patch_merging(x, norm.weight, norm.bias, weight, eps=norm.eps, order="swin", norm=norm_at, backend=backend)
    return out if norm_at == "pre" else out.to(_norm_dtype(x, reduced))


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
            y = _attention(self, _norm1(self, x))
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
        out = None if is_traced(x) else _merge(self, x, "pre")
        return super().forward(x) if out is None else out


class AcceleratedPatchMergingV2(Accelerated, PatchMergingV2):
    """timm's patch merging of v2 on an op where a fast backend has it."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if is_traced(x) else _merge(self, x, "post")
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
    if _differs(block.attn._buffers["relative_position_index"], _window_index(block)):
        return "attn.relative_position_index holds other values than timm's"
    return None


def _reason_to_skip_v2(block: SwinTransformerV2Block) -> str | None:
    if not hasattr(block, "_attn"):
        return "this version of timm has no SwinTransformerV2Block._attn: it needs timm 0.9.16 or newer"
    reasons = [_why_not_residual(block, f"norm{half}", f"drop_path{half}") for half in (1, 2)]
    return None if None in reasons else "; ".join(map(str, reasons))


def _block_shape(block: Any) -> tuple[int, ...]:
    return (*_resolution(block), block.dim)


def _qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


def _first_weight(block: Any) -> Tensor:
    return next(p for p in block.parameters() if p.is_floating_point())


def _residual_part(norm: str, drop_path: str) -> Part:
    return norm_part(
        "residual and norm",
        _first_weight,
        residual_reasons,
        lambda block: (block.dim,),
        lambda block: replaced_forward(block) or _why_not_residual(block, norm, drop_path),
    )


def _merging_adapter(original: type[nn.Module], accelerated: type[nn.Module], norm_at: str) -> Adapter:
    def weight(merging: Any) -> Tensor:
        return merging.reduction.weight

    part = norm_part(
        "patch merging",
        weight,
        patch_merging_reasons,
        lambda merging: (norm_at, _norm_width(merging, norm_at)),
        lambda merging: replaced_forward(merging) or _why_not_merging(merging, norm_at),
    )
    return Adapter(
        name="timm",
        original=original,
        accelerated=accelerated,
        reason_to_skip=lambda merging: _why_not_merging(merging, norm_at),
        parts=(part,),
        # It does not know its map. An even one: not every version of timm merges an odd one.
        input_shape=lambda merging: (6, 10, merging.dim),
        weight=weight,
    )


ADAPTERS = (
    Adapter(
        name="timm",
        original=SwinTransformerBlock,
        accelerated=AcceleratedSwinTransformerBlock,
        reason_to_skip=_reason_to_skip,
        parts=(
            window_attention_part(_qkv_weight, _resolution, _attention_arguments, _dropout_p, _why_not_attention),
            _residual_part("norm2", "drop_path1"),
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
            _residual_part("norm1", "drop_path1"),
            _residual_part("norm2", "drop_path2"),
            Part("attention", lambda _: "v2's cosine attention is not replaced", lambda *_: []),
        ),
        input_shape=_block_shape,
        weight=_first_weight,
    ),
    _merging_adapter(PatchMerging, AcceleratedPatchMerging, "pre"),
    _merging_adapter(PatchMergingV2, AcceleratedPatchMergingV2, "post"),
)
