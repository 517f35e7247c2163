"""Computes the attention of SAM's and ViTDet's blocks: unshifted windows with decomposed relative positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor

_MOST_TOKENS = {True: 4096, False: 1024}  # in a window, with (True) or without (False) tables


def decomposed_attention(
    attn: Any,
    attend: Any,
    x: Tensor,
    window: int,
    num_heads: int,
    uses_tables: bool,
    scale: float | None,
    dropout_p: float = 0.0,
) -> Tensor | str:
    """Return the attention output before the projection, or the reason why the module must run its own code.

    The output has the shape (B, H, W, C).

    Args:
        attn: the module with the layer qkv and, if ``uses_tables``, the tables rel_pos_h and rel_pos_w.
        attend: as in ``Form.forward``.
        x: the map after the norm, (B, H, W, C).
        window: the side of a window, or 0 for the whole map.
        num_heads: the number of heads.
        uses_tables: True if the module has a bias of decomposed relative positions.
        scale: the module's scale, or None (for head_dim ** -0.5) if the module's code reads no scale.
        dropout_p: the dropout probability of the attention weights.
    """
    if x.dim() != 4:
        return f"x has {x.dim()} axes"
    size = (window, window) if window > 0 else tuple(x.shape[1:3])
    if not window and not uses_tables:
        return "it attends to the whole map without a bias, for which torch's own attention is as fast"
    if size[0] * size[1] > _MOST_TOKENS[uses_tables]:
        return f"its windows have {size[0] * size[1]} tokens, and the op accepts at most {_MOST_TOKENS[uses_tables]}"
    tables = (attn.rel_pos_h, attn.rel_pos_w) if uses_tables else None
    if tables is not None and any(len(t) != 2 * n - 1 for t, n in zip(tables, size, strict=True)):
        return "its tables of relative position are for another map, and it interpolates them"
    return attend(
        attn.qkv(x),
        num_heads=num_heads,
        window_size=size,
        scale=scale,
        axis_tables=tables,
        pad_qkv=attn.qkv.bias,
        dropout_p=dropout_p,
    )


def sizes_of(window: int, attn: Any, uses_tables: bool) -> tuple[tuple[int, ...], ...]:
    """Return the map sizes for a trial.

    With windows, one size needs padding and one does not. Without windows, the only size fits the tables, if there are
    any.
    """
    channels = attn.qkv.in_features
    if window > 0:
        return (window + 1, 2 * window + 1, channels), (2 * window, window, channels)
    if not uses_tables:
        return ((4, 4, channels),)
    return (((len(attn.rel_pos_h) + 1) // 2, (len(attn.rel_pos_w) + 1) // 2, channels),)


def small_tables(name: str, window: int, attn: Any, uses_tables: bool) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tables, by parameter name, for a map of at most 7 x 6 tokens.

    The dict is empty if the module has windows or no tables.

    Args:
        name: the name of the module with the tables.
        window, attn, uses_tables: as in :func:`decomposed_attention`.
    """
    if window > 0 or not uses_tables:
        return {}
    tables = {"rel_pos_h": 13, "rel_pos_w": 11}
    return {f"{name}.{t}": (min(rows, len(getattr(attn, t))), getattr(attn, t).shape[1]) for t, rows in tables.items()}
