"""timm's relative position modules (timm.layers.pos_embed_rel) as the bias table that the op looks up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import RelPosBias, RelPosBiasTf, RelPosMlp
from torch import Tensor
from torch.nn import functional

from swinkernels.adapters.bypass import has_hooks
from swinkernels.adapters.masks import differs, window_index

_KINDS = (RelPosBias, RelPosBiasTf, RelPosMlp)


def why_not_rel_pos(rel_pos: Any, name: str, window: Sequence[int]) -> str | None:
    """Why the bias of such a module has to be added by timm's own code at present, or None."""
    kind = type(rel_pos)
    if kind not in _KINDS:
        return f"{name} is a {kind.__name__}, not one of timm's RelPosBias, RelPosBiasTf and RelPosMlp"
    if "forward" in rel_pos.__dict__ or "get_bias" in rel_pos.__dict__:
        return f"a method of {name} was replaced on the instance"
    if has_hooks(rel_pos):
        return f"a hook is registered on {name}"
    if tuple(rel_pos.window_size) != tuple(window):
        return f"{name} is for windows of {tuple(rel_pos.window_size)} tokens, not {tuple(window)}"
    return f"{name} has a row for a class token" if getattr(rel_pos, "prefix_tokens", 0) else None


def has_own_index(rel_pos: Any) -> bool:
    """Whether a module, one that :func:`why_not_rel_pos` has no reason against, numbers tokens otherwise than timm."""
    if type(rel_pos) is not RelPosBiasTf:
        index = window_index(rel_pos.window_size)
        return differs(rel_pos._buffers["relative_position_index"].reshape(-1), index.reshape(-1))
    for name, w in zip(("height_lookup", "width_lookup"), rel_pos.window_size, strict=True):
        token = torch.arange(w, device="cpu")
        offset = token[None, :] - token[:, None] + w - 1  # key - query
        lookup = getattr(rel_pos, name)
        if differs(lookup, functional.one_hot(offset, 2 * w - 1).to(lookup.dtype)):
            return True
    return False


def bias_table(rel_pos: Any) -> Tensor:
    """The bias by (query - key), ((2 * height - 1) * (2 * width - 1), num_heads)."""
    kind = type(rel_pos)
    if kind is RelPosBias:
        return rel_pos.relative_position_bias_table
    if kind is RelPosBiasTf:  # heads first, by key - query
        return rel_pos.relative_position_bias_table.flatten(1).flip(1).t()
    # In training there is dropout inside. timm gathers before bias_act, which acts on numbers one by one.
    table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).view(-1, rel_pos.num_heads))
    return table if rel_pos.bias_gain is None else rel_pos.bias_gain * table
