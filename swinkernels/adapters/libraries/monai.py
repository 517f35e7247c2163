"""Runs MONAI's SwinUNETR and SwinTransformer, 2D and 3D, with this package's ops: blocks, stages and patch merging.

For attention, MONAI pads the map, rolls it, partitions it into windows and later undoes all of this. Linear layers
process each token separately, so QKV and the projection run on the map in image order, and the op addresses the
windows. A pad token is a row of zeros that MONAI inserts after norm1, so its q, k and v are the bias of the QKV layer.
On an axis where the map is no larger than the window, the window shrinks to the map and is not shifted; its token t
(row-major) then uses the bias table's entries for token t of the full window.

MONAI computes the mask of a stage's shifted windows, (num_windows, N, N) in float32, at every call. If all blocks of a
stage use ops, the stage does not compute the mask.

Residual connections, norms and patch merging are also computed by ops.

Source: monai.networks.nets.swin_unetr, MONAI 1.3 and newer.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import torch
from monai.networks.blocks import MLPBlock
from monai.networks.layers import DropPath
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    PatchMerging,
    PatchMergingV2,
    SwinTransformerBlock,
    WindowAttention,
    compute_mask,
    get_window_size,
)
from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import (
    child,
    class_of,
    first_weight,
    has_hooks,
    replaced_forward,
    replaced_method,
    watch,
    why_not_absorbed,
    why_not_linear,
    why_not_norm,
    why_not_window_attention,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, attention_branch
from swinkernels.adapters.linear_layers import Mlp, call_linear
from swinkernels.adapters.masks import frame_of, is_shift_mask, is_window_index
from swinkernels.adapters.microsoft_attention import attention_layers, why_layers_are_called
from swinkernels.adapters.norms import Merging, Residual, norm_for_linear, norm_row
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits
from swinkernels.ops._library import constant_when_compiled
from swinkernels.ops.patch_merging import ORDERS
from swinkernels.reference.patch_merging import neighbours

watch(SwinTransformerBlock, methods=("forward_part1", "forward_part2"))
watch(BasicLayer, DropPath, MLPBlock, WindowAttention)

# Passed to a block instead of the mask that compute_mask would return.
STANDARD_MASK = type("StandardMask", (), {"__repr__": lambda self: "STANDARD_MASK"})()


# The attention half of a block


def _why_not_attention(block: SwinTransformerBlock) -> str | None:
    """Return the reason why MONAI's own code currently has to run the block's attention, or None."""
    reason = replaced_method(block, SwinTransformerBlock)
    if reason is not None:
        return reason
    attn: Any = block._modules["attn"]
    if class_of(attn) is not WindowAttention:
        return f"attn is a {type(attn).__name__}, not MONAI's WindowAttention"
    reason = why_not_window_attention(attn, takes_lora=True)
    if reason is not None:
        return reason
    if not isinstance(attn.scale, float):
        return f"attn.scale is a {type(attn.scale).__name__}, not a float"
    if len(block.window_size) != len(attn.window_size):
        return "window_size has more or fewer axes than attn.window_size"
    if any(w > full for w, full in zip(block.window_size, attn.window_size, strict=True)):
        return "window_size is larger than attn.window_size, for which the bias table was made"
    if attn.relative_position_bias_table.shape[0] != math.prod([2 * w - 1 for w in attn.window_size]):
        return "attn.relative_position_bias_table is not the table of attn.window_size"
    if not is_window_index(_index(block), attn.window_size):
        return "attn.relative_position_index differs from MONAI's"
    return None


def _index(block: Any) -> Tensor | None:
    return child(block, "attn")._buffers.get("relative_position_index")


def _why_not_window(block: Any, window: tuple[int, ...]) -> str | None:
    """Return the reason why the op does not accept ``window`` unless a small map shrinks it, or None."""
    reason = why_beyond_limits(0, window)
    return reason if reason is None else f"{reason}; the op runs on maps so small that windows shrink to this limit"


def _attention_arguments(block: SwinTransformerBlock, size: tuple[int, ...]) -> dict[str, Any]:
    attn = block.attn
    return {
        "bias_table": attn.relative_position_bias_table,
        "table_window": tuple(attn.window_size),
        "scale": attn.scale,
        "pad_qkv": attn.qkv.bias,
        **_geometry(block, size),
    }


def _geometry(block: SwinTransformerBlock, size: tuple[int, ...]) -> dict[str, Any]:
    """Return the op's arguments for heads, windows and mask for a map of ``size``."""
    window, shift = get_window_size(size, block.window_size, block.shift_size)
    return {
        "num_heads": block.attn.num_heads,
        "window_size": window,
        "shift_size": shift,
        "pad_order": "pad_then_roll",
        "mask_value": -100.0,
    }


def _dropout_p(block: SwinTransformerBlock) -> float:
    return getattr(block.attn.attn_drop, "p", 0.0)


def _dropout_is_on(block: SwinTransformerBlock) -> bool:
    attn = block.attn
    # With gradients disabled, MONAI may call scaled_dot_product_attention, to which it then passes no dropout.
    sdpa = getattr(attn, "use_flash_attention", False) and not torch.is_grad_enabled()
    return attn.attn_drop.training and not sdpa


def _size_fits(block: SwinTransformerBlock, size: tuple[int, ...]) -> bool:
    """Return True if a map of ``size`` has as many axes as the block's windows, and the op accepts the windows."""
    if len(size) != len(block.window_size):
        return False
    if why_beyond_limits(0, block.window_size) is None:
        return True
    return why_beyond_limits(0, get_window_size(size, block.window_size)) is None


def _call_arguments(block: AcceleratedSwinTransformerBlock, x: Tensor, mask_matrix: Any) -> dict[str, Any] | None:
    """Return the op's arguments for a call of the block's attention, or None if MONAI's own code must run."""
    size = tuple(x.shape[1:-1])
    if not _size_fits(block, size) or settled(block, _why_not_attention) is not None:
        return None
    arguments = _attention_arguments(block, size)
    window, shift = arguments["window_size"], arguments["shift_size"]
    if mask_matrix is None:
        arguments["mask_value"] = 0.0
    elif mask_matrix is not STANDARD_MASK and any(shift):  # without a shift, MONAI ignores the mask
        if not is_shift_mask(mask_matrix, frame_of(size, window), window, shift):
            return None
    arguments["dropout_p"] = _dropout_p(block) if _dropout_is_on(block) else 0.0
    return arguments


def _attention(block: AcceleratedSwinTransformerBlock, x: Tensor, mask_matrix: Any) -> Tensor | None:
    """Return the result of forward_part1, or None if MONAI's own code must run."""
    arguments = _call_arguments(block, x, mask_matrix)
    if arguments is None:
        return None
    attn = block.attn
    out = window_attention_qkvpacked(
        call_linear("attn.qkv", attn.qkv, norm_for_linear(block, "norm1", x, block.dim)),
        **arguments,
        backend=block._swinkernels_backend,
    )
    return attn.proj_drop(call_linear("attn.proj", attn.proj, out))


# Residual connections and patch merging, computed by ops


def _casts_its_input(block: Any) -> bool:
    mlp = child(block, "mlp")
    return (
        why_not_absorbed("mlp", mlp, MLPBlock, "MONAI's MLPBlock") is None
        and why_not_linear("mlp.linear1", child(mlp, "linear1")) is None
    )


_MLP = Mlp((("mlp", MLPBlock, ("linear1", "fn", "drop1", "linear2", "drop2")),), drop="drop_path", drop_kind=DropPath)
_RESIDUAL = Residual("norm2", "drop_path", DropPath, "MONAI's DropPath", _casts_its_input)


def _why_not_half(block: SwinTransformerBlock, training: bool | None) -> str | None:
    """Return the reason why attention_half cannot replace a block's attention and norm1, or None."""
    if block.use_checkpoint:
        return "use_checkpoint is set, so the block checkpoints its branches"
    reason = _why_not_attention(block) or why_not_norm("norm1", child(block, "norm1"), block.dim)
    reason = reason or why_layers_are_called(child(block, "attn"), training)
    # For the report; at a call, the size of the map decides.
    return _why_not_window(block, tuple(block.window_size)) if reason is None and training else reason


_HALVES = Halves(_RESIDUAL, _MLP, "pre", _why_not_half)


def _branch(block: AcceleratedSwinTransformerBlock, x: Tensor, mask_matrix: Any, residual: bool) -> Tensor | None:
    """Return the block's attention branch, plus x if ``residual``, or None if attention_half cannot compute it."""
    arguments = _call_arguments(block, x, mask_matrix)
    if arguments is None:
        return None
    return attention_branch(block, x, attention_layers, block._swinkernels_backend, arguments, residual)


@constant_when_compiled
def _order(kind: Any, axes: int) -> str | None:
    """Return the order in which the class ``kind`` merges neighbours, or None if the order is unknown.

    The order is found by calling a module of the class, because MONAI 1.5 changed it.
    """
    return _find_order(kind, axes)


@functools.cache
def _find_order(kind: Any, axes: int) -> str | None:
    with torch.device("meta"):  # where the initialisation of parameters draws no random numbers
        merging: Any = kind(1, spatial_dims=axes)
    merging.norm = merging.reduction = nn.Identity()
    with torch.no_grad(), torch.device("cpu"):
        merged = merging(torch.arange(2.0**axes).reshape(1, *(2,) * axes, 1))
    row_major = list(itertools.product((0, 1), repeat=axes))
    found = tuple(row_major[int(number)] for number in merged.flatten())
    return next((order for order in ORDERS if order != "unfold" and neighbours(order, axes) == found), None)


def _merging_width(merging: PatchMergingV2) -> int:
    return norm_row("norm")(merging)


def _merging_axes(merging: PatchMergingV2) -> int:
    return 3 if child(merging, "reduction").in_features == 8 * merging.dim else 2


# The modules


class AcceleratedSwinTransformerBlock(Accelerated, SwinTransformerBlock):
    """MONAI's block, with the attention half computed by a window attention op and the norms by other ops.

    Geometry and parameters are read, and the index into the bias table is checked, at every call. MONAI's code runs if
    a hook is registered on an inner module, a layer is not an nn.Linear, a method was replaced, the mask differs from
    compute_mask's, or TorchScript or FX traces the code.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        return (_index(self),)

    def _swinkernels_look(self) -> None:
        _why_not_attention(self)

    def forward_part1(self, x: Tensor, mask_matrix: Any) -> Tensor:
        out = None if self._swinkernels_own_code(x) else _attention(self, x, mask_matrix)
        return super().forward_part1(x, _as_tensor(self, x, mask_matrix)) if out is None else out

    def forward(self, x: Tensor, mask_matrix: Any) -> Tensor:
        if (
            self._swinkernels_own_code(x)
            or self.use_checkpoint
            or settled(self, replaced_method, SwinTransformerBlock) is not None
        ):
            return super().forward(x, mask_matrix)
        out = _HALVES.run(self, x, lambda residual: _branch(self, x, mask_matrix, residual))
        if out is not None:
            return out
        y = self.forward_part1(x, mask_matrix)
        fused = _RESIDUAL.add_then_norm(self, x, y)
        drop_path = child(self, "drop_path")
        if fused is None:
            s = x + drop_path(y)
            z = child(self, "norm2")(s)
        else:
            s, z = fused
        return _MLP.added(self, s, z)


class AcceleratedBasicLayer(Accelerated, BasicLayer):
    """MONAI's stage, which computes no mask if all of its blocks use ops."""

    def forward(self, x: Tensor) -> Tensor:
        if self._swinkernels_own_code(x) or not all(_needs_no_mask(block, x) for block in self.blocks):
            return super().forward(x)
        axes = x.dim() - 2
        size = x.shape[2:]
        x = x.permute(0, *range(2, 2 + axes), 1)
        for block in self.blocks:
            x = block(x, STANDARD_MASK)
        x = x.view(x.shape[0], *size, -1)
        if self.downsample is not None:
            x = self.downsample(x)
        return x.permute(0, 1 + axes, *range(1, 1 + axes))


class AcceleratedPatchMergingV2(Accelerated, PatchMergingV2):
    """MONAI's patch merging "mergingv2", computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or not _merging_fits(self, x) else _MERGING_V2.run(self, x)
        return super().forward(x) if out is None else out


class AcceleratedPatchMerging(Accelerated, PatchMerging):
    """MONAI's patch merging "merging", computed by the patch_merging op."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) or not _merging_fits(self, x) else _MERGING.run(self, x)
        return super().forward(x) if out is None else out


def _needs_no_mask(block: Any, x: Tensor) -> bool:
    """Return True if a call of ``block`` will not read the mask passed to it."""
    return (
        class_of(block) is AcceleratedSwinTransformerBlock
        and not has_hooks(block)
        and replaced_method(block, SwinTransformerBlock, "block") is None
        and _size_fits(block, tuple(x.shape[2:]))
        and _why_not_attention(block) is None
    )


def _as_tensor(block: SwinTransformerBlock, x: Any, mask_matrix: Any) -> Any:
    """Return the mask as MONAI's own code expects it: a tensor instead of ``STANDARD_MASK``."""
    if mask_matrix is not STANDARD_MASK:
        return mask_matrix
    size = tuple(x.shape[1:-1])
    window, shift = get_window_size(size, block.window_size, block.shift_size)
    return compute_mask(list(frame_of(size, window)), window, shift, x.device)


def _merging_fits(merging: Any, x: Tensor) -> bool:
    return x.dim() - 2 == _merging_axes(merging)


_MERGING = Merging("pre", _merging_width, lambda axes: _order(PatchMerging, axes) or "")
_MERGING_V2 = Merging("pre", _merging_width, lambda axes: _order(PatchMergingV2, axes) or "")


# The adapters


def _reason_to_skip_stage(stage: BasicLayer) -> str | None:
    for block in stage.blocks:
        if type(block) not in (SwinTransformerBlock, AcceleratedSwinTransformerBlock):
            return f"it contains a block of the class {type(block).__name__}"
    return replaced_forward(stage)


def _map_to_report_on(block: Any) -> tuple[int, ...]:
    """Return a map size on which windows do not shrink, because full windows are the most demanding for the op."""
    return tuple(w + 1 for w in block.window_size)


def _map_to_verify(block: Any) -> tuple[int, ...]:
    """Return a map size with padding and a shift on two axes. In 3D, the window shrinks on the third, to save time."""
    window = tuple(block.window_size)
    return (window[0] + 1, window[1] + 2, *(3 for _ in window[2:]))


def _run_block(block: Any, x: Tensor) -> Tensor:
    mask = STANDARD_MASK if isinstance(block, Accelerated) else _as_tensor(block, x, STANDARD_MASK)
    return type(block).forward(block, x, mask)


def _run_stage(stage: Any, x: Tensor) -> Tensor:
    return type(stage).forward(stage, x.movedim(-1, 1))


def _merging_adapter(original: type[nn.Module], accelerated: type[nn.Module], merging: Merging) -> Adapter:
    def reason_to_skip(module: Any) -> str | None:
        reason = merging.why_not(module)
        if reason is None and not merging.order(_merging_axes(module)):
            reason = "this version of MONAI merges neighbours in an unknown order"
        return reason

    def input_shape(module: Any) -> tuple[int, ...]:
        return *(6, 5, 3)[: _merging_axes(module)], module.dim

    return merging.adapter("monai", original, accelerated, input_shape, reason_to_skip=reason_to_skip)


def _qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


ADAPTERS = (
    Adapter(
        name="monai",
        original=SwinTransformerBlock,
        accelerated=AcceleratedSwinTransformerBlock,
        reason_to_skip=_why_not_attention,
        parts=(
            window_attention_part(
                _qkv_weight,
                _map_to_report_on,
                lambda block: _geometry(block, _map_to_report_on(block)),
                _dropout_p,
                lambda block: _why_not_attention(block) or _why_not_window(block, tuple(block.window_size)),
            ),
            _RESIDUAL.part(_qkv_weight),
        ),
        input_shape=lambda block: (*_map_to_verify(block), block.dim),
        weight=_qkv_weight,
        run=_run_block,
        why_not_recompute=_HALVES.why_not_in_training,
    ),
    Adapter(
        name="monai",
        original=BasicLayer,
        accelerated=AcceleratedBasicLayer,
        reason_to_skip=_reason_to_skip_stage,
        parts=(),
        input_shape=lambda stage: (*_map_to_verify(stage), stage.blocks[0].dim),
        weight=first_weight,
        run=_run_stage,
        looks_inside=True,
    ),
    _merging_adapter(PatchMerging, AcceleratedPatchMerging, _MERGING),
    _merging_adapter(PatchMergingV2, AcceleratedPatchMergingV2, _MERGING_V2),
)
