"""Converts timm's relative position modules (timm.layers.pos_embed_rel) to the op's bias table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import Tensor
from torch.nn import functional

from swinkernels.adapters.bypass import has_hooks, replaced_method, watch
from swinkernels.adapters.masks import holds, is_window_index

_KINDS = (RelPosBias, RelPosBiasTf, RelPosMlp)
watch(*_KINDS, methods=("get_bias",))


def why_not_rel_pos(rel_pos: Any, name: str, window: Sequence[int]) -> str | None:
    """Return the reason why timm's own code currently has to add the bias of ``rel_pos``, or None."""
    kind = type(rel_pos)
    if kind not in _KINDS:
        return f"{name} is a {kind.__name__}, not one of timm's RelPosBias, RelPosBiasTf and RelPosMlp"
    reason = replaced_method(rel_pos, kind, name)
    if reason is not None:
        return reason
    if has_hooks(rel_pos):
        return f"a hook is registered on {name}"
    if tuple(rel_pos.window_size) != tuple(window):
        return f"{name} is for windows of {tuple(rel_pos.window_size)} tokens, not {tuple(window)}"
    if getattr(rel_pos, "prefix_tokens", 0):
        return f"{name} has a row for a class token"
    if kind is not RelPosMlp and rel_pos.relative_position_bias_table is None:
        return f"{name} has no bias table"
    if kind is not RelPosBiasTf:
        heads = rel_pos.num_heads if kind is RelPosMlp else rel_pos.relative_position_bias_table.shape[-1]
        shape = (window[0] * window[1],) * 2 + (heads,)
        if tuple(getattr(rel_pos, "bias_shape", shape)) != shape:
            return f"{name}.bias_shape is {rel_pos.bias_shape}, not {shape}"  # timm's own code fails
    return _why_not_stored(rel_pos, name)


def offsets_of_axis(window: tuple[int], device: Any = "cpu") -> Tensor:
    """Return RelPosBiasTf's one-hot lookup for an axis, (w, w, 2 w - 1), with ones at (i, j, j - i + w - 1)."""
    (w,) = window
    token = torch.arange(w, device=device)
    return functional.one_hot(token[None, :] - token[:, None] + w - 1, 2 * w - 1).float()


def stored(rel_pos: Any) -> tuple[Tensor | None, ...]:
    """Return the index or lookup buffers of ``rel_pos``. The op computes their values instead of reading them."""
    if rel_pos is None:
        return ()
    names = ("height_lookup", "width_lookup") if type(rel_pos) is RelPosBiasTf else ("relative_position_index",)
    return tuple(rel_pos._buffers.get(name) for name in names)


def _why_not_stored(rel_pos: Any, name: str) -> str | None:
    buffers, window = stored(rel_pos), rel_pos.window_size
    if type(rel_pos) is RelPosBiasTf:
        same = all(holds(x, (offsets_of_axis, (w,))) for x, w in zip(buffers, window, strict=True))
    else:
        same = is_window_index(buffers[0], window)
    return None if same else f"{name} numbers tokens in another order than timm"


def bias_table(rel_pos: Any) -> Tensor:
    """Return the bias table, ((2 * height - 1) * (2 * width - 1), num_heads), in row-major order of query - key."""
    kind = type(rel_pos)
    if kind is RelPosBias:
        return rel_pos.relative_position_bias_table
    if kind is RelPosBiasTf:  # stored heads first, in the order of key - query
        return rel_pos.relative_position_bias_table.flatten(1).flip(1).t()
    # timm's MLP, which has dropout in training, is called as in timm. timm applies bias_act after the lookup; here it
    # comes first, which gives the same result because bias_act is elementwise.
    table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).view(-1, rel_pos.num_heads))
    return table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
