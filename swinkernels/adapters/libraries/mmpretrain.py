"""Runs mmpretrain's Swin Transformers, v1 and v2, with this package's ops: attention, blocks and patch merging.

ShiftWindowMSA pads the map, rolls it, partitions it into windows, runs WindowMSA or WindowMSAV2 inside them and undoes
all of this. Linear layers process each token separately, so QKV and the projection run on the map in image order, and
the op addresses the windows. A pad token is a row of zeros, so its q, k and v are the bias of the QKV layer. If the
shorter side of the map equals the window, there is no shift on either axis, unless pad_small_map is set.

Residual connections, norms and patch merging are also computed by ops. mmcv's patch merging orders channels as
torch.nn.Unfold does. ShiftWindowMSA includes the drop path of a block's attention half.

Source: mmpretrain.models 1.0 and newer (utils/attention.py, utils/embed.py, backbones/swin_transformer.py and
swin_transformer_v2.py) and mmcv.cnn.bricks.transformer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.utils.checkpoint
from mmcv.cnn.bricks import Linear
from mmcv.cnn.bricks.drop import DropPath
from mmcv.cnn.bricks.transformer import FFN, AdaptivePadding
from mmcv.cnn.bricks.transformer import PatchMerging as MMCVPatchMerging
from mmengine.model import Sequential
from mmpretrain.models.backbones.swin_transformer import SwinBlock
from mmpretrain.models.backbones.swin_transformer_v2 import SwinBlockV2
from mmpretrain.models.utils.attention import ShiftWindowMSA, WindowMSA, WindowMSAV2
from mmpretrain.models.utils.embed import PatchMerging
from mmpretrain.models.utils.helpers import to_2tuple
from torch import Tensor, nn

from swinkernels.adapters import linear_layers
from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import (
    child,
    class_of,
    has_hooks,
    replaced_method,
    watch,
    why_not_absorbed,
    why_not_accelerated,
    why_not_norm,
    why_not_window_attention,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, add_normed_attention, attention_branch
from swinkernels.adapters.linear_layers import drops_nothing, why_not_left_out
from swinkernels.adapters.masks import is_window_index
from swinkernels.adapters.microsoft_attention import (
    bias_table,
    dropout_at_call,
    dropout_p,
    projected,
    qkv_bias,
    qkv_of,
    score_factor,
    why_layers_are_called,
)
from swinkernels.adapters.norms import (
    Merging,
    Residual,
    floored_drop_path_scale,
    norm_for_linear,
    norm_row,
    residuals_adapter,
)
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits
from swinkernels.ops._library import autocast_dtype

watch(ShiftWindowMSA, methods=("get_attn_mask", "window_partition", "window_reverse"))
watch(
    AdaptivePadding,
    DropPath,
    FFN,
    MMCVPatchMerging,
    PatchMerging,
    Sequential,
    SwinBlock,
    SwinBlockV2,
    WindowMSA,
    WindowMSAV2,
)
linear_layers.know_linear(Linear)

# Attention


def _why_not_attention(attn: Any) -> str | None:
    """Return the reason why mmpretrain's own code currently has to run ``attn``, or None."""
    w_msa = child(attn, "w_msa")
    reason = replaced_method(attn, ShiftWindowMSA)
    if reason is not None:
        return reason
    if class_of(w_msa) not in (WindowMSA, WindowMSAV2):
        return f"w_msa is a {type(w_msa).__name__}, not mmpretrain's WindowMSA or WindowMSAV2"
    reason = why_not_window_attention(w_msa, "w_msa", takes_lora=class_of(w_msa) is WindowMSA)
    if reason is not None:
        return reason
    window = attn.window_size
    reason = why_beyond_limits(0, (window, window))
    if reason is not None:
        return reason
    if tuple(w_msa.window_size) != (window, window):
        return "window_size is not the window_size of w_msa"
    if not is_window_index(_index(attn), (window, window)):
        return "w_msa.relative_position_index differs from mmpretrain's"
    if class_of(w_msa) is WindowMSAV2:
        if w_msa.relative_coords_table.shape != (1, 2 * window - 1, 2 * window - 1, 2):
            return "w_msa.relative_coords_table is not the table of window_size"
        return None
    if not isinstance(w_msa.scale, (int, float)):
        return f"w_msa.scale is a {type(w_msa.scale).__name__}, not a float"
    if w_msa.relative_position_bias_table.shape[0] != (2 * window - 1) ** 2:
        return "w_msa.relative_position_bias_table is not the table of window_size"
    return None


def _index(attn: Any) -> Tensor | None:
    return child(attn, "w_msa")._buffers.get("relative_position_index")


def _attention_arguments(attn: Any, height: int, width: int) -> dict[str, Any]:
    """Return the op's arguments for bias, scale and geometry for a map of ``height`` x ``width``."""
    w_msa = child(attn, "w_msa")
    return {"bias_table": bias_table(attn, "w_msa"), **score_factor(w_msa), **_geometry(attn, height, width)}


def _geometry(attn: Any, height: int, width: int) -> dict[str, Any]:
    """Return the op's arguments for heads, windows and mask for a map of ``height`` x ``width``."""
    in_one_window = min(height, width) == attn.window_size
    return {
        "num_heads": attn.w_msa.num_heads,
        "window_size": attn.window_size,
        "shift_size": 0 if in_one_window and not attn.pad_small_map else attn.shift_size,
        "pad_order": "pad_then_roll",
        "mask_value": -100.0,
    }


def _map_fits(attn: Any, x: Tensor, height: int, width: int) -> bool:
    """Return True if mmpretrain's code accepts ``x`` as a map of ``height`` x ``width``."""
    return (
        x.dim() == 3 and x.shape[1] == height * width and (attn.pad_small_map or min(height, width) >= attn.window_size)
    )


class AcceleratedShiftWindowMSA(Accelerated, ShiftWindowMSA):
    """mmpretrain's attention, computed by a window attention op.

    Geometry and parameters are read, and the index into the bias table is checked, at every call. mmpretrain's code
    runs if a hook is registered on an inner module, a layer is not an nn.Linear, the class of w_msa is unknown, a
    method was replaced, or the code is traced.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        return (_index(self),)

    def _swinkernels_look(self) -> None:
        _why_not_attention(self)

    def forward(self, query: Tensor, hw_shape: Any) -> Tensor:
        if (
            self._swinkernels_own_code(query)
            or not _map_fits(self, query, *hw_shape)
            or settled(self, _why_not_attention) is not None
        ):
            return super().forward(query, hw_shape)
        height, width = hw_shape
        w_msa = child(self, "w_msa")
        bias = qkv_bias(w_msa)
        out = window_attention_qkvpacked(
            qkv_of(w_msa, query.view(query.shape[0], height, width, query.shape[2]), bias),
            **_attention_arguments(self, height, width),
            pad_qkv=bias,
            dropout_p=dropout_at_call(w_msa),
            backend=self._swinkernels_backend,
        )
        return child(self, "drop")(projected(w_msa, out).flatten(1, 2))


# Residual connections and patch merging, computed by ops


def _casts_its_input(block: Any) -> bool:
    ffn = child(block, "ffn")
    if why_not_absorbed("ffn", ffn, FFN, "mmcv's FFN") is not None or has_hooks(ffn.layers) or has_hooks(ffn.layers[0]):
        return False
    return why_not_absorbed("ffn.layers.0.0", ffn.layers[0][0], Linear, "mmcv's Linear") is None


_NORM1_ROW = norm_row("norm1")
_RESIDUAL = Residual("norm2", casts_its_input=_casts_its_input, width=norm_row("norm2"), scale=floored_drop_path_scale)
_RESIDUALS_V2 = tuple(Residual(norm, width=norm_row(norm)) for norm in ("norm1", "norm2"))


def _why_not_op(block: Any) -> str | None:
    """Return the reason why ops cannot replace the call of a block's attention, or None."""
    attn = child(block, "attn")
    return why_not_accelerated("attn", attn, AcceleratedShiftWindowMSA) or _why_not_attention(attn)


def _norm1(block: Any, x: Tensor, hw_shape: Any) -> Tensor:
    """Return norm1(x) of a v1 block.

    Under autocast, the result has QKV's input dtype if only accelerated attention reads it.
    """
    if autocast_dtype(x) is None or settled(block, _why_not_op) or not _map_fits(child(block, "attn"), x, *hw_shape):
        return child(block, "norm1")(x)
    return norm_for_linear(block, "norm1", x, _NORM1_ROW(block))


_MLP = linear_layers.Mlp((("layers", Sequential, ()),), drop="dropout_layer", drop_kind=DropPath)


def _why_not_layers(ffn: Any, adds: bool) -> str | None:
    """Return the reason why FFN(z) differs from the results of its layers and drop path, or None.

    ``adds`` is True if the FFN has to add its second argument.
    """
    reason = why_not_absorbed("ffn", ffn, FFN, "mmcv's FFN")
    if reason is not None:
        return reason
    if bool(ffn.add_identity) is not adds:
        return f"ffn.add_identity is {ffn.add_identity}"
    return why_not_left_out("ffn.gamma2", child(ffn, "gamma2"), nn.Identity)  # or it is layer scale


def _why_not_drop_path(ffn: Any, training: bool | None) -> str | None:
    """Return the reason why the FFN's drop path, which precedes the norm in v2, cannot be left out, or None."""
    return why_not_left_out("ffn.dropout_layer", child(ffn, "dropout_layer"), DropPath, training)


def _ffn(block: Any, z: Tensor, s: Tensor | None = None) -> Tensor:
    """Return FFN(z), or s + FFN(z) if ``s`` is given."""
    ffn = child(block, "ffn")
    if linear_layers.replaces_modules(z) and _why_not_layers(ffn, s is not None) is None:
        if s is not None:
            return _MLP.added(ffn, s, z)
        if _why_not_drop_path(ffn, None) is None:
            return _MLP.branch(ffn, z)
    return ffn(z) if s is None else ffn(z, identity=s)


def _why_not_halves(block: Any, training: bool | None) -> str | None:
    """Return the reason why attention_half and mlp_half cannot replace a v1 block's code, or None."""
    reason = why_not_norm("norm1", child(block, "norm1"), _NORM1_ROW(block)) or _why_not_read(block, training)
    return reason or _why_not_layers(child(block, "ffn"), True)


def _why_not_read(block: Any, training: bool | None = None) -> str | None:
    """Return the reason why attention_half cannot replace the call of a block's attention, or None."""
    return _why_not_op(block) or why_layers_are_called(child(child(block, "attn"), "w_msa"), training, "attn.w_msa")


def _why_not_second_half(block: Any, training: bool | None) -> str | None:
    """Return the reason why mlp_half cannot replace the second half of a v2 block, or None."""
    ffn = child(block, "ffn")
    return _why_not_layers(ffn, False) or _why_not_drop_path(ffn, training)


def _owner(block: Any) -> Any:
    return child(block, "ffn")


_HALVES = Halves(_RESIDUAL, _MLP, "pre", _why_not_halves, _owner)
_HALVES_V2 = Halves(_RESIDUALS_V2[1], _MLP, "post", _why_not_second_half, _owner)


def _attention_layers(block: Any) -> tuple[Any, Sequence[Any], Any]:
    w_msa = child(child(block, "attn"), "w_msa")
    return child(block, "norm1"), (child(w_msa, "qkv"),), child(w_msa, "proj")


def _branch(block: Any, x: Tensor, hw_shape: Any, residual: bool, place: str = "pre") -> Tensor | None:
    """Return a block's attention branch, plus x if ``residual``, or None if attention_half cannot compute it."""
    attn = child(block, "attn")
    if not _map_fits(attn, x, *hw_shape):
        return None
    if residual and not drops_nothing("attn.drop", child(attn, "drop"), DropPath):
        return None
    w_msa, x = child(attn, "w_msa"), x.view(x.shape[0], *hw_shape, x.shape[2])
    given = {**_attention_arguments(attn, *hw_shape), "pad_qkv": qkv_bias(w_msa), "dropout_p": dropout_at_call(w_msa)}
    y = attention_branch(block, x, _attention_layers, attn._swinkernels_backend, given, residual, place)
    if y is None:
        return None
    return y.flatten(1, 2) if residual else child(attn, "drop")(y.flatten(1, 2))


def _added_attention(block: Any, x: Tensor, hw_shape: Any) -> Tensor | None:
    """Return the residual stream of a v2 block after attention, or None if that is not one op."""
    return add_normed_attention(
        block, x, _RESIDUALS_V2[0], _why_not_read, lambda: _branch(block, x, hw_shape, True, "post")
    )


class AcceleratedSwinBlock(Accelerated, SwinBlock):
    """mmpretrain's v1 block, with one residual connection and the norms computed by ops."""

    def forward(self, x: Tensor, hw_shape: Any) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x, hw_shape)
        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(self._halves, x, hw_shape, use_reentrant=False)
        return self._halves(x, hw_shape)

    def _halves(self, x: Tensor, hw_shape: Any) -> Tensor:
        out = _HALVES.run(self, x, lambda residual: _branch(self, x, hw_shape, residual))
        if out is not None:
            return out
        attn = child(self, "attn")
        y = attn(_norm1(self, x, hw_shape), hw_shape)
        fused = _RESIDUAL.add_then_norm(self, x, y)
        if fused is None:
            s = y + x
            z = child(self, "norm2")(s)
        else:
            s, z = fused
        return _ffn(self, z, s)


class AcceleratedSwinBlockV2(Accelerated, SwinBlockV2):
    """mmpretrain's v2 block, with both residual connections and their norms computed by the residual_post_norm op."""

    def forward(self, x: Tensor, hw_shape: Any) -> Tensor:
        if self._swinkernels_own_code(x):
            return super().forward(x, hw_shape)
        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(self._halves, x, hw_shape, use_reentrant=False)
        return self._halves(x, hw_shape)

    def _halves(self, x: Tensor, hw_shape: Any) -> Tensor:
        for residual, branch in zip(_RESIDUALS_V2, ("attn", "ffn"), strict=True):
            out = _HALVES_V2.run(self, x) if branch == "ffn" else _added_attention(self, x, hw_shape)
            if out is None:
                y = child(self, "attn")(x, hw_shape) if branch == "attn" else _ffn(self, x)
                out = residual.add_normed(self, x, y)
            x = child(self, residual.norm)(y) + x if out is None else out
        return child(self, "norm3")(x) if self.extra_norm else x


def _why_not_usual(merging: Any) -> str | None:
    """Return the reason why ``merging`` does not merge 2x2 tokens with nn.Unfold and a norm, or None."""
    sampler = child(merging, "sampler")
    reason = why_not_absorbed("sampler", sampler, nn.Unfold, "an nn.Unfold")
    if reason is not None:
        return reason
    how = sampler.kernel_size, sampler.stride, sampler.dilation, sampler.padding
    if tuple(map(to_2tuple, how)) != ((2, 2), (2, 2), (1, 1), (0, 0)):
        return "it does not merge blocks of 2x2 tokens"
    if merging.norm is None:
        return "it has no norm"
    # For 2x2 tokens both kinds of padding, "corner" and "same", pad at the end.
    return why_not_absorbed("adaptive_padding", merging.adaptive_padding, AdaptivePadding, "mmcv's AdaptivePadding")


def _why_not_usual_v2(merging: Any) -> str | None:
    return _why_not_usual(merging) if merging.use_post_norm else "use_post_norm is False"


_MERGING = Merging("pre", lambda merging: 4 * merging.in_channels, lambda axes: "unfold", _why_not_usual)
_MERGING_V2 = Merging("post", lambda merging: merging.out_channels, lambda axes: "unfold", _why_not_usual_v2)


def _merge(how: Merging, merging: Any, x: Tensor, input_size: Any) -> tuple[Tensor, tuple[int, int]] | None:
    """Return the op's merged tokens (B, L, C) and their map's size, or None if the library's own code has to run."""
    if merging._swinkernels_own_code(x) or x.dim() != 3 or not isinstance(input_size, Sequence):
        return None
    height, width = input_size
    if x.shape[1] != height * width:
        return None
    out = how.run(merging, x.view(x.shape[0], height, width, x.shape[2]))
    return None if out is None else (out.flatten(1, 2), (out.shape[1], out.shape[2]))


class AcceleratedMMCVPatchMerging(Accelerated, MMCVPatchMerging):
    """mmcv's patch merging, used in v1, computed by the patch_merging op."""

    def forward(self, x: Tensor, input_size: Any) -> tuple[Tensor, tuple[int, int]]:
        return _merge(_MERGING, self, x, input_size) or super().forward(x, input_size)


class AcceleratedPatchMerging(Accelerated, PatchMerging):
    """mmpretrain's patch merging, used in v2, computed by the patch_merging op."""

    def forward(self, x: Tensor, input_size: Any) -> tuple[Tensor, tuple[int, int]]:
        return _merge(_MERGING_V2, self, x, input_size) or super().forward(x, input_size)


# The adapters


def _attention_size(attn: Any) -> tuple[int, int]:
    """Return a map size that needs padding and a shift on both axes; ``attn`` itself stores no map size."""
    return attn.window_size + 1, attn.window_size + 2


def _qkv_weight(attn: Any) -> Tensor:
    return attn.w_msa.qkv.weight


def _run_with_size(module: Any, x: Tensor) -> Tensor:
    out = type(module).forward(module, x.flatten(1, 2), tuple(x.shape[1:3]))
    return out if isinstance(out, Tensor) else out[0]


def _merging_shape(merging: Any) -> tuple[int, ...]:
    return 6, 5, merging.in_channels


ADAPTERS = (
    Adapter(
        name="mmpretrain",
        original=ShiftWindowMSA,
        accelerated=AcceleratedShiftWindowMSA,
        reason_to_skip=_why_not_attention,
        parts=(
            window_attention_part(
                _qkv_weight,
                _attention_size,
                lambda attn: _geometry(attn, *_attention_size(attn)),
                lambda attn: dropout_p(attn.w_msa),
                _why_not_attention,
            ),
        ),
        input_shape=lambda attn: (*_attention_size(attn), _qkv_weight(attn).shape[1]),
        weight=_qkv_weight,
        run=_run_with_size,
    ),
    residuals_adapter(
        "mmpretrain",
        SwinBlock,
        AcceleratedSwinBlock,
        (_RESIDUAL,),
        _attention_size,
        run=_run_with_size,
        why_not_recompute=_HALVES.why_not_in_training,
    ),
    residuals_adapter(
        "mmpretrain",
        SwinBlockV2,
        AcceleratedSwinBlockV2,
        _RESIDUALS_V2,
        _attention_size,
        run=_run_with_size,
        why_not_recompute=_HALVES_V2.why_not_in_training,
    ),
    _MERGING.adapter("mmpretrain", MMCVPatchMerging, AcceleratedMMCVPatchMerging, _merging_shape, run=_run_with_size),
    _MERGING_V2.adapter("mmpretrain", PatchMerging, AcceleratedPatchMerging, _merging_shape, run=_run_with_size),
)
