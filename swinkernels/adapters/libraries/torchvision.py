"""Runs torchvision's Swin Transformers, v1 and v2, with this package's ops: attention, blocks and patch merging.

For attention, torchvision pads the map, rolls it, partitions it into windows and later undoes all of this, in one
function that reads weights and biases and calls no inner module. Linear layers process each token separately, so QKV
and the projection run on the map in image order, and the op addresses the windows. A pad token is a row of zeros, so
its q, k and v are the bias of the QKV layer. Windows never shrink; on an axis where the map is no longer than the
window, there is no shift.

In v2 the k part of the QKV bias counts as zero, whatever its values. The adapter applies the sigmoid of the position
bias to the bias table, before the op gathers from it; torchvision applies it to the dense bias.

Residual connections, norms and patch merging are computed by ops.

torch.fx traces torchvision's code. To keep the ops in a feature extractor, make the modules leaves of its graph:
``create_feature_extractor(model, nodes, tracer_kwargs={"leaf_modules": [ShiftedWindowAttention]})``.

Source: torchvision.models.swin_transformer, which is the same file in torchvision 0.26 to 0.29.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import MLP

from swinkernels.adapters.adapter import Accelerated, Adapter, original_class
from swinkernels.adapters.bypass import (
    child,
    class_of,
    replaced_method,
    watch,
    why_not_absorbed,
    why_not_accelerated,
    why_not_linear,
    why_not_norm,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, add_normed_attention, attention_branch
from swinkernels.adapters.linear_layers import Mlp, why_not_readable
from swinkernels.adapters.masks import is_window_index
from swinkernels.adapters.microsoft_attention import attention_layers, bias_table, score_factor
from swinkernels.adapters.norms import Merging, Residual, norm_for_linear, norm_row, residuals_adapter
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits
from swinkernels.ops._fused_linear import linear
from swinkernels.ops._library import autocast_dtype

watch(ShiftedWindowAttention, ShiftedWindowAttentionV2, methods=("get_relative_position_bias",))
watch(MLP, StochasticDepth)

# Attention


def _why_not_attention(attn: Any) -> str | None:
    """Return the reason why torchvision's own code currently has to run ``attn``, or None."""
    reason = replaced_method(attn, original_class(attn))
    if reason is not None:
        return reason
    height, width = attn.window_size
    if not all(0 <= s < w for s, w in zip(attn.shift_size, attn.window_size, strict=True)):
        return "shift_size is not smaller than window_size"
    if not isinstance(child(attn, "qkv").weight, Tensor) or not isinstance(child(attn, "proj").weight, Tensor):
        return "the weight of qkv or proj is not a tensor, as in a quantised layer"
    reason = why_beyond_limits(child(attn, "qkv").weight.shape[0] // (3 * attn.num_heads), (height, width))
    if reason is not None:
        return reason
    rows = (2 * height - 1) * (2 * width - 1)
    if isinstance(attn, ShiftedWindowAttentionV2):
        if getattr(attn.relative_coords_table, "shape", None) != (1, 2 * height - 1, 2 * width - 1, 2):
            return "relative_coords_table is not the table of window_size"
    elif getattr(attn.relative_position_bias_table, "shape", (0,))[0] != rows:
        return "relative_position_bias_table is not the table of window_size"
    if not is_window_index(_index(attn), attn.window_size):
        return "relative_position_index differs from torchvision's"
    return None


def _index(attn: Any) -> Tensor | None:
    return attn._buffers.get("relative_position_index")


def _attention_arguments(attn: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Return the op's arguments for bias, scale, dropout and geometry for a map of ``size``."""
    p = attn.attention_dropout if attn.training else 0.0
    return {"bias_table": bias_table(attn), "dropout_p": p, **score_factor(attn), **_geometry(attn, size)}


def _geometry(attn: Any, size: tuple[int, ...]) -> dict[str, Any]:
    """Return the op's arguments for heads, windows and mask for a map of ``size``."""
    window = tuple(attn.window_size)
    return {
        "num_heads": attn.num_heads,
        "window_size": window,
        "shift_size": tuple(0 if n <= w else s for n, w, s in zip(size, window, attn.shift_size, strict=True)),
        "pad_order": "pad_then_roll",
        "mask_value": -100.0,
    }


def _without_k(qkv_bias: Tensor | None) -> Tensor | None:
    """Return the QKV bias with zeros for k. The zeros are assigned, because NaN * 0 would stay NaN."""
    if qkv_bias is None:
        return None
    qkv_bias = qkv_bias.clone()
    third = qkv_bias.numel() // 3
    qkv_bias[third : 2 * third].zero_()
    return qkv_bias


def _attention(attn: Any, x: Tensor, qkv_bias: Tensor | None) -> Tensor:
    proj = child(attn, "proj")
    out = window_attention_qkvpacked(
        linear(x, child(attn, "qkv").weight, qkv_bias),
        **_attention_arguments(attn, tuple(x.shape[1:3])),
        pad_qkv=qkv_bias,
        backend=attn._swinkernels_backend,
    )
    return F.dropout(linear(out, proj.weight, proj.bias), p=attn.dropout, training=attn.training)


class _Attention(Accelerated):
    """Base class of torchvision's accelerated attention modules, which store an index into the bias table.

    Geometry, parameters and the index are read or compared at every call. torchvision's code runs if the op cannot
    replace it, for example while TorchScript or FX traces the code, or if the bias table or index fits another window.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        return (_index(self),)

    def _swinkernels_look(self) -> None:
        _why_not_attention(self)


class AcceleratedShiftedWindowAttention(_Attention, ShiftedWindowAttention):
    """torchvision's attention, computed by a window attention op."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or x.dim() != 4 or settled(self, _why_not_attention) is not None:
            return super().forward(x)
        return _attention(self, x, child(self, "qkv").bias)


class AcceleratedShiftedWindowAttentionV2(_Attention, ShiftedWindowAttentionV2):
    """torchvision's v2 attention, computed by a window attention op."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or x.dim() != 4 or settled(self, _why_not_attention) is not None:
            return super().forward(x)
        return _attention(self, x, _without_k(child(self, "qkv").bias))


# Residual connections and patch merging


def _stochastic_depth_scale(stochastic_depth: Any, y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the per-sample factors by which torchvision's StochasticDepth would multiply ``y``, or None if they are 1.

    The factors are computed from the same random numbers as in torchvision.
    """
    if class_of(stochastic_depth) is nn.Identity or stochastic_depth.p == 0.0 or not stochastic_depth.training:
        return None
    keep = 1.0 - stochastic_depth.p
    drawn = y.shape[0] if stochastic_depth.mode == "row" else 1
    scale = y.new_empty(drawn, dtype=dtype).bernoulli_(keep)
    if keep > 0.0:
        scale.div_(keep)
    return scale if drawn == y.shape[0] else scale.repeat(y.shape[0])


def _casts_its_input(block: Any) -> bool:
    mlp = child(block, "mlp")
    return (
        why_not_absorbed("mlp", mlp, MLP, "torchvision's MLP") is None
        and why_not_linear("mlp.0", child(mlp, "0")) is None
    )


def _residual(norm: str) -> Residual:
    return Residual(
        norm,
        "stochastic_depth",
        StochasticDepth,
        "torchvision's StochasticDepth",
        _casts_its_input,
        norm_row(norm),
        _stochastic_depth_scale,
    )


_MLP = Mlp((("mlp", MLP, ()),), drop="stochastic_depth", drop_kind=StochasticDepth)
_NORM1_ROW = norm_row("norm1")
_RESIDUAL = _residual("norm2")
_RESIDUALS_V2 = (_residual("norm1"), _residual("norm2"))
_MERGING = Merging("pre", lambda merging: 4 * merging.dim)
_MERGING_V2 = Merging("post", lambda merging: 2 * merging.dim)


def _why_not_op(block: Any) -> str | None:
    """Return the reason why the op cannot replace the call of a v1 block's attention, or None."""
    attn = child(block, "attn")
    return why_not_accelerated("attn", attn, AcceleratedShiftedWindowAttention) or _why_not_attention(attn)


def _norm1(block: Any, x: Tensor) -> Tensor:
    """Return norm1(x) of a v1 block.

    Under autocast, the result has QKV's input dtype if only accelerated attention reads it.
    """
    if autocast_dtype(x) is None or settled(block, _why_not_op) is not None:
        return child(block, "norm1")(x)
    return norm_for_linear(block, "norm1", x, _NORM1_ROW(block))


def _why_not_half(block: Any, training: bool | None) -> str | None:
    """Return the reason why the op attention_half cannot replace a v1 block's attention and norm1, or None.

    Attention of another class, as in Swin3D, is called as a module, and only the MLP half is recomputed.
    """
    attn = child(block, "attn")
    if class_of(attn) is not AcceleratedShiftedWindowAttention:
        return None
    reason = _why_not_op(block) or why_not_norm("norm1", child(block, "norm1"), _NORM1_ROW(block))
    return reason or _why_not_absorbed(attn, training)


def _why_not_absorbed(attn: Any, training: bool | None) -> str | None:
    """Return the reason why attention_half cannot replace the layers and the last dropout of ``attn``, or None."""
    if attn.dropout != 0.0 and (attn.training if training is None else training):
        return f"attn.dropout drops elements in training (p={attn.dropout})"
    return why_not_readable("attn.qkv", child(attn, "qkv")) or why_not_readable("attn.proj", child(attn, "proj"))


_HALVES = Halves(_RESIDUAL, _MLP, "pre", _why_not_half)
_HALVES_V2 = Halves(_RESIDUALS_V2[1], _MLP, "post")


def _branch(block: Any, x: Tensor, residual: bool) -> Tensor | None:
    """Return a v1 block's attention branch, plus x if ``residual``, or None if attention_half does not accept ``x``."""
    attn = child(block, "attn")
    if class_of(attn) is not AcceleratedShiftedWindowAttention:
        y = attn(child(block, "norm1")(x))
        return x + y if residual else y
    if x.dim() != 4:
        return None
    given = {"pad_qkv": child(attn, "qkv").bias, **_attention_arguments(attn, tuple(x.shape[1:3]))}
    return attention_branch(block, x, attention_layers, attn._swinkernels_backend, given, residual)


def _why_not_half_v2(block: Any) -> str | None:
    """Return the reason why the op attention_half cannot replace a v2 block's attention and norm1, or None."""
    attn = child(block, "attn")
    reason = why_not_accelerated("attn", attn, AcceleratedShiftedWindowAttentionV2) or _why_not_attention(attn)
    return reason or _why_not_absorbed(attn, None)


def _added_attention(block: Any, x: Tensor) -> Tensor | None:
    """Return the residual stream of a v2 block after attention, or None if that is not one op."""

    def branch() -> Tensor | None:
        attn = child(block, "attn")
        given = {"pad_qkv": _without_k(child(attn, "qkv").bias), **_attention_arguments(attn, tuple(x.shape[1:3]))}
        return attention_branch(block, x, attention_layers, attn._swinkernels_backend, given, True, "post")

    return add_normed_attention(block, x, _RESIDUALS_V2[0], _why_not_half_v2, branch) if x.dim() == 4 else None


class AcceleratedSwinTransformerBlock(Accelerated, SwinTransformerBlock):
    """torchvision's block, with its residual connection and norms computed by ops."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x)
        out = _HALVES.run(self, x, lambda residual: _branch(self, x, residual), repeats=True)
        if out is not None:
            return out
        attn = child(self, "attn")
        y = attn(_norm1(self, x))
        fused = _RESIDUAL.add_then_norm(self, x, y)
        if fused is None:
            s = x + child(self, "stochastic_depth")(y)
            z = child(self, "norm2")(s)
        else:
            s, z = fused
        return _MLP.added(self, s, z)


class AcceleratedSwinTransformerBlockV2(Accelerated, SwinTransformerBlockV2):
    """torchvision's v2 block, with its residual connections and norms computed by the residual_post_norm op."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x)
        for residual, branch in zip(_RESIDUALS_V2, ("attn", "mlp"), strict=True):
            out = _HALVES_V2.run(self, x) if branch == "mlp" else _added_attention(self, x)
            if out is not None:
                x = out
                continue
            y = child(self, "attn")(x) if branch == "attn" else _MLP.branch(self, x)
            fused = residual.add_normed(self, x, y)
            x = x + child(self, "stochastic_depth")(child(self, residual.norm)(y)) if fused is None else fused
        return x


class AcceleratedPatchMerging(Accelerated, PatchMerging):
    """torchvision's patch merging, computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or x.dim() != 4 else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


class AcceleratedPatchMergingV2(Accelerated, PatchMergingV2):
    """torchvision's v2 patch merging, computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or x.dim() != 4 else _MERGING_V2.run(self, x)
        return super().forward(x) if out is None else out


# The adapters


def _map_size(window: tuple[int, ...]) -> tuple[int, ...]:
    """Return a map size that needs padding and a shift on each axis; the module itself stores no map size."""
    return window[0] + 1, *(w + 2 for w in window[1:])


def _attention_size(attn: Any) -> tuple[int, ...]:
    return _map_size(tuple(attn.window_size))


def _qkv_weight(attn: Any) -> Tensor:
    return child(attn, "qkv").weight


def _attention_adapter(original: type[nn.Module], accelerated: type[nn.Module]) -> Adapter:
    part = window_attention_part(
        _qkv_weight,
        _attention_size,
        lambda attn: _geometry(attn, _attention_size(attn)),
        lambda attn: attn.attention_dropout,
        _why_not_attention,
    )
    return Adapter(
        name="torchvision",
        original=original,
        accelerated=accelerated,
        reason_to_skip=_why_not_attention,
        parts=(part,),
        input_shape=lambda attn: (*_attention_size(attn), _qkv_weight(attn).shape[1]),
        weight=_qkv_weight,
    )


def _window_of(attn: Any) -> tuple[int, ...]:
    return _map_size(tuple(getattr(attn, "window_size", (7, 7))))


def _merging_shape(merging: Any) -> tuple[int, ...]:
    return 6, 5, merging.dim


ADAPTERS = (
    _attention_adapter(ShiftedWindowAttention, AcceleratedShiftedWindowAttention),
    _attention_adapter(ShiftedWindowAttentionV2, AcceleratedShiftedWindowAttentionV2),
    residuals_adapter(
        "torchvision",
        SwinTransformerBlock,
        AcceleratedSwinTransformerBlock,
        (_RESIDUAL,),
        _window_of,
        why_not_recompute=_HALVES.why_not_in_training,
    ),
    residuals_adapter(
        "torchvision",
        SwinTransformerBlockV2,
        AcceleratedSwinTransformerBlockV2,
        _RESIDUALS_V2,
        _window_of,
        why_not_recompute=_HALVES_V2.why_not_in_training,
    ),
    _MERGING.adapter("torchvision", PatchMerging, AcceleratedPatchMerging, _merging_shape),
    _MERGING_V2.adapter("torchvision", PatchMergingV2, AcceleratedPatchMergingV2, _merging_shape),
)
