"""Runs timm's MaxViT with this package's ops: attention in windows, in grids, or in both in parallel.

timm partitions the map into windows or dilated grids. The layers before and after attention (Linear or 1x1 convolution)
process each token separately, so they run on the map in image order, and the op addresses windows and grids. q, k and v
are views of the QKV layer's output; in models with ``head_first``, the q, k and v of each head are adjacent.

Source: timm.models.maxxvit, timm 0.9.16 and newer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from timm.models.maxxvit import (
    Attention2d,
    AttentionCl,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
)
from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, Adapter, original_class
from swinkernels.adapters.bypass import replaced_method, watch, why_not_window_attention
from swinkernels.adapters.checks import settled
from swinkernels.adapters.libraries.timm._rel_pos import bias_table, stored, why_not_rel_pos
from swinkernels.adapters.part import op_on, window_attention_part
from swinkernels.ops._arguments import why_beyond_limits

watch(Attention2d, AttentionCl)
watch(ParallelPartitionAttention, PartitionAttention2d, PartitionAttentionCl, methods=("_partition_attn",))


def why_not_attention(attn: Any, name: str, window: tuple[int, int]) -> str | None:
    """Return the reason why timm's own code currently has to run ``attn``, or None."""
    kind = original_class(attn)
    if kind is AttentionCl:
        reason = why_not_window_attention(attn, name)
    elif kind is Attention2d:
        reason = why_not_window_attention(attn, name, nn.Conv2d, "an nn.Conv2d") or _why_not_pointwise(attn, name)
    else:
        return f"{name} is a {kind.__name__}, not timm's AttentionCl or Attention2d"
    if reason is not None:
        return reason
    if getattr(attn, "fused_attn", False) and not hasattr(attn.attn_drop, "p"):
        return f"{name}.attn_drop has no p, which timm's fused attention reads"
    reason = why_beyond_limits(0, window)
    if reason is not None:
        return reason
    rel_pos = attn.rel_pos
    return None if rel_pos is None else why_not_rel_pos(rel_pos, f"{name}.rel_pos", window)


def _why_not_pointwise(attn: Any, name: str) -> str | None:
    for child in ("qkv", "proj"):
        conv = attn._modules[child]
        if (conv.kernel_size, conv.stride, conv.padding) != ((1, 1), (1, 1), (0, 0)):
            return f"{name}.{child} is not a 1x1 convolution"
    return None


def _arguments(attn: Any, window: tuple[int, int], grid: bool) -> dict[str, Any]:
    """Return the op's arguments, except bias_table and dropout_p."""
    return {
        "num_heads": attn.num_heads,
        "window_size": window,
        # If fused_attn is set, timm calls scaled_dot_product_attention with the default scale.
        "scale": None if getattr(attn, "fused_attn", False) else attn.scale,
        "grid": grid,
    }


def _dropout_p(attn: Any) -> float:
    return getattr(attn.attn_drop, "p", 0.0)


def attend(attn: Any, x: Tensor, window: tuple[int, int], grid: bool, op: Callable[..., Tensor]) -> Tensor:
    """Return the output of ``attn`` for the map ``x``, computed in windows or, if ``grid`` is True, in dilated grids.

    The output has the layout of ``x``. ``op(qkv, **arguments)`` and ``op(q, k, v, **arguments)`` are the two window
    attention ops.
    """
    qkv = attn.qkv(x)
    if isinstance(attn, Attention2d):
        qkv = qkv.permute(0, 2, 3, 1)
    dropout_is_on = attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training
    arguments = {
        "bias_table": None if attn.rel_pos is None else bias_table(attn.rel_pos),
        "dropout_p": _dropout_p(attn) if dropout_is_on else 0.0,
        **_arguments(attn, window, grid),
    }
    if attn.head_first:
        q, k, v = qkv.unflatten(-1, (attn.num_heads, 3 * attn.dim_head)).chunk(3, dim=-1)
        out = op(q, k, v, **arguments)
    else:
        out = op(qkv, **arguments)
    if isinstance(attn, Attention2d):
        out = out.permute(0, 3, 1, 2)
    return attn.proj_drop(attn.proj(out))


def _divides(size: torch.Size | tuple[int, ...], window: tuple[int, int]) -> bool:
    return size[0] % window[0] == 0 and size[1] % window[1] == 0  # timm refuses other maps


class _Partition(Accelerated):
    """Base class of accelerated blocks with one or two attention modules.

    Geometry and parameters are read, and stored tensors are checked, at every call, so ``set_input_size`` takes effect.
    timm's code runs if a hook is registered on an inner module, the class of a layer is unknown, a method was replaced,
    or the code is traced.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        names = [name for name, _ in _attentions(self)]
        return sum((stored(getattr(self._modules[name], "rel_pos", None)) for name in names), ())

    def _swinkernels_look(self) -> None:
        _why_not_block(self)


class AcceleratedPartitionAttentionCl(_Partition, PartitionAttentionCl):
    """timm's block for channels-last maps, with its attention computed by a window attention op."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        attn, window = self._modules["attn"], self.partition_size
        if (
            self._swinkernels_own_code(x)
            or not _divides(x.shape[1:3], window)
            or settled(self, _why_not_block) is not None
        ):
            return super()._partition_attn(x)
        return attend(attn, x, window, not self.partition_block, op_on(self._swinkernels_backend))


class AcceleratedPartitionAttention2d(_Partition, PartitionAttention2d):
    """timm's block for channels-first maps, with its attention computed by a window attention op."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        attn, window = self._modules["attn"], self.partition_size
        if (
            self._swinkernels_own_code(x)
            or not _divides(x.shape[2:], window)
            or settled(self, _why_not_block) is not None
        ):
            return super()._partition_attn(x)
        return attend(attn, x, window, not self.partition_block, op_on(self._swinkernels_backend))


class AcceleratedParallelPartitionAttention(_Partition, ParallelPartitionAttention):
    """timm's block with attention in windows and in grids in parallel, each computed by a window attention op."""

    def _partition_attn(self, x: Tensor) -> Tensor:
        window = self.partition_size
        if (
            self._swinkernels_own_code(x)
            or not _divides(x.shape[1:3], window)
            or settled(self, _why_not_block) is not None
        ):
            return super()._partition_attn(x)
        op = op_on(self._swinkernels_backend)
        outs = [attend(self.attn_block, x, window, False, op), attend(self.attn_grid, x, window, True, op)]
        return torch.cat(outs, dim=-1)


def _attentions(block: Any) -> list[tuple[str, bool]]:
    """Return, for each attention module of ``block``, its name and whether it attends in grids."""
    if "attn" in block._modules:
        return [("attn", not block.partition_block)]
    return [("attn_block", False), ("attn_grid", True)]


def _why_not_block(block: Any) -> str | None:
    reason = replaced_method(block, original_class(block))
    if reason is not None:
        return reason
    reasons = (why_not_attention(block._modules[name], name, block.partition_size) for name, _ in _attentions(block))
    return next((reason for reason in reasons if reason is not None), None)


def _first(block: Any) -> Any:
    return block._modules[_attentions(block)[0][0]]


def _weight(block: Any) -> Tensor:
    return _first(block).qkv.weight


def _map_size(block: Any) -> tuple[int, int]:
    """Return the size of a map of 2 x 3 windows; ``block`` itself stores no map size."""
    height, width = block.partition_size
    return 2 * height, 3 * width


def _adapter(original: type[nn.Module], accelerated: type[nn.Module], channels_first: bool = False) -> Adapter:
    def input_shape(block: Any) -> tuple[int, ...]:
        channels = _weight(block).shape[1]
        return (channels, *_map_size(block)) if channels_first else (*_map_size(block), channels)

    return Adapter(
        name="timm",
        original=original,
        accelerated=accelerated,
        reason_to_skip=_why_not_block,
        parts=(
            window_attention_part(
                _weight,
                _map_size,
                lambda block: _arguments(_first(block), block.partition_size, _attentions(block)[0][1]),
                lambda block: _dropout_p(_first(block)),
                _why_not_block,
            ),
        ),
        input_shape=input_shape,
        weight=_weight,
    )


ADAPTERS = (
    _adapter(PartitionAttentionCl, AcceleratedPartitionAttentionCl),
    _adapter(PartitionAttention2d, AcceleratedPartitionAttention2d, channels_first=True),
    _adapter(ParallelPartitionAttention, AcceleratedParallelPartitionAttention),
)
