"""Window attention in plain PyTorch: every step is written out, and none is optimised.

The functions take any floating dtype, compute in float64 if the inputs are float64, and can be differentiated twice by
autograd. They share no code with the fast paths, which are tested against them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinkernels.reference._geometry import (
    Ints,
    check_window,
    frame_size,
    key_index,
    per_axis,
    shift_region,
    source_index,
    without_autocast,
)


def relative_position_index(
    window: Sequence[int],
    table_window: Sequence[int] | None = None,
    device=None,
    *,
    table_pairs: Sequence[bool] | None = None,
) -> Tensor:
    """Return the row index into the bias table for each query i and key j of a window, (N, N)."""
    table_window = table_window or window
    table_pairs = table_pairs or [False] * len(window)
    token = torch.arange(math.prod(window), device=device)
    index = torch.zeros(len(token), len(token), dtype=torch.long, device=device)
    for axis, (w, pairs) in enumerate(zip(table_window, table_pairs, strict=True)):
        coordinate = token // math.prod(table_window[axis + 1 :]) % w  # token indices are row-major in table_window
        i, j = coordinate[:, None], coordinate[None, :]
        index = index * w * w + i + w * j if pairs else index * (2 * w - 1) + i - j + w - 1
    return index


def key_window_index(window: Sequence[int], key_window: Sequence[int], device=None) -> Tensor:
    """Return the row index into the bias table for each query i of a window and key j of its key window, (N, M)."""
    query = torch.arange(math.prod(window), device=device)
    key = torch.arange(math.prod(key_window), device=device)
    index = torch.zeros(len(query), len(key), dtype=torch.long, device=device)
    for axis, (w, m) in enumerate(zip(window, key_window, strict=True)):
        i = query // math.prod(window[axis + 1 :]) % w
        j = key // math.prod(key_window[axis + 1 :]) % m
        index = index * (w + m - 1) + i[:, None] - j[None, :] + m - 1
    return index


def axis_scores(q: Tensor, axis_tables: Sequence[Tensor], window: Sequence[int]) -> Tensor:
    """Return the sum over axes a of q_i . axis_tables[a][i_a - j_a + window_a - 1], (..., N, N).

    ``q`` is (..., N, head_dim).
    """
    token = torch.arange(math.prod(window), device=q.device)
    scores: Any = 0
    for axis, (table, w) in enumerate(zip(axis_tables, window, strict=True)):
        coordinate = token // math.prod(window[axis + 1 :]) % w
        rows = table[coordinate[:, None] - torch.arange(w, device=q.device) + w - 1]  # (N, w, head_dim)
        scores = scores + torch.einsum("...id,iwd->...iw", q, rows.to(q.dtype))[..., coordinate]
    return scores


@without_autocast
def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Ints,
    shift_size: Ints = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    table_window: Ints | None = None,
    logit_scale: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    pad_order: str = "pad_then_roll",
    pad_before: Ints = 0,
    periodic: bool | Sequence[bool] = False,
    region_map: Tensor | None = None,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    grid: bool = False,
    axis_tables: Sequence[Tensor] | None = None,
    key_window: Ints | None = None,
    table_pairs: bool | Sequence[bool] = False,
    return_attention: bool = False,
    return_lse: bool = False,
) -> Any:  # a Tensor, or a tuple if further results are requested
    r"""Compute attention inside the shifted windows of a feature map, given q, k and v as separate tensors.

    In every window, for tokens i and j and each head,

    .. math:: out_i = \sum_j softmax_j(scale \cdot q_i \cdot k_j + bias_{r(i,j)} + mask_{ij}) \, v_j

    If ``logit_scale`` is given, the scaled product is replaced by ``exp(min(logit_scale, ln 100))`` times the cosine of
    q_i and k_j, whose norms are clamped to at least 1e-12. With ``axis_tables`` the bias is the sum over axes a of
    q_i . axis_tables[a][i_a - j_a + window_a - 1], with q unscaled. ``mask_ij`` is ``mask_value`` where the shift
    regions of the two tokens differ, else 0. Pad tokens are keys like any other; their rows of the output are dropped.

    Args:
        q, k, v: (B, \*S, num_heads, head_dim) each, S = (H, W) or (D, H, W), any floating dtype.
        return_attention: also return the attention weights after dropout, (B, num_windows, num_heads, N, N), in the
            dtype of q; with a ``key_window`` of M tokens (..., N, M).
        return_lse: also return, as the last result, the natural log-sum-exp of the final scores, (B, num_windows,
            num_heads, N).

        The other arguments are documented in :func:`swinkernels.window_attention`. Only mistakes that would silently
        give a wrong result raise an error here.

    Returns:
        (B, \*S, num_heads * head_dim) in the dtype of q, contiguous. The arithmetic is in float32, or in float64 if q
        is, also under autocast, and the result is rounded once. (The backward pass is autograd's; under autocast it
        rounds its products.) An empty batch gives an empty result.
        The gradient of ``logit_scale`` is zero above ln 100 but, as with torch.clamp, not at ln 100 itself. A pad token
        whose k is zero has cosine 0 with every query, and the gradient of that k, a part of ``pad_qkv``, is of the
        order of 1e12. In a model without a key bias, this gradient reaches no parameter.

    Raises:
        ValueError: an invalid geometry, or tables whose shape does not match it.

    Source: Swin Transformer (Liu et al., 2021), section 3.2; Swin Transformer V2 (Liu et al., 2022), section 3;
    checked against the modules of timm, torchvision, MONAI and transformers. ``axis_tables``: MViTv2 (Li et al., 2022),
    as in Segment Anything. ``key_window``: the overlapping cross-attention of HAT (Chen et al., 2023).
    """
    op = "window_attention"
    batch, *size, heads, head_dim = q.shape
    if heads != num_heads:
        raise ValueError(f"{op}: q has {heads} heads (shape {tuple(q.shape)}), but num_heads={num_heads}")
    rank = len(size)
    window = per_axis(op, "window_size", window_size, rank)
    shift = per_axis(op, "shift_size", shift_size, rank)
    before = per_axis(op, "pad_before", pad_before, rank)
    wraps = per_axis(op, "periodic", periodic, rank)
    check_window(op, size, window, shift, pad_order)
    pads_of_axis = tuple(p - s for p, s in zip(frame_size(size, window), size, strict=True))
    if any(not 0 <= b <= p for b, p in zip(before, pads_of_axis, strict=True)):
        raise ValueError(f"{op}: pad_before must be in 0..padding per axis, {pads_of_axis} here, got {before}")
    if grid and any(shift):
        raise ValueError(f"{op}: grid attention has no shift: shift_size must be 0, got {shift}")
    keys = window if key_window is None else per_axis(op, "key_window", key_window, rank)
    if keys != window and (grid or any(shift) or region_map is not None or axis_tables is not None):
        raise ValueError(
            f"{op}: shift_size, grid, region_map and axis_tables cannot be combined with key_window {keys}, which "
            f"differs from window_size {window}"
        )
    if any(m < w or (m - w) % 2 for m, w in zip(keys, window, strict=True)):
        raise ValueError(f"{op}: key_window must be window_size plus an even number per axis, got {keys} for {window}")
    if axis_tables is not None:
        if logit_scale is not None:
            raise ValueError(f"{op}: axis_tables (for v1) must be None with a logit_scale (v2), got both")
        shapes, expected = [tuple(t.shape) for t in axis_tables], [(2 * w - 1, head_dim) for w in window]
        if shapes != expected:
            raise ValueError(f"{op}: axis_tables must be {expected} for window {window}, got {shapes}")
    index = source_index(
        size, window, shift, pad_order=pad_order, pad_before=before, grid=grid, device=q.device
    )  # (num_windows, N)
    num_windows, n = index.shape

    # Gather the windows, in the dtype of the arithmetic. The row after the last token is the pad token.
    dtype, wide = q.dtype, torch.promote_types(q.dtype, torch.float32)
    pads = q.new_zeros(3, heads, head_dim) if pad_qkv is None else pad_qkv.to(dtype).reshape(3, heads, head_dim)

    def gather(x: Tensor, pad: Tensor, index: Tensor) -> Tensor:
        tokens = x.reshape(batch, math.prod(size), heads, head_dim)
        tokens = torch.cat([tokens, pad.expand(batch, 1, heads, head_dim)], dim=1).to(wide)
        return tokens[:, index].transpose(2, 3)  # (B, num_windows, heads, N, head_dim)

    of_keys = index if keys == window else key_index(size, window, keys, pad_before=before, device=q.device)
    q, k, v = (gather(x, pad, i) for x, pad, i in zip((q, k, v), pads, (index, of_keys, of_keys), strict=True))

    if logit_scale is None:
        scores = (q * (head_dim**-0.5 if scale is None else scale)) @ k.transpose(-2, -1)
    else:
        q, k = (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k))
        factor = logit_scale.to(wide).reshape(heads, 1, 1).clamp(max=math.log(100.0)).exp()
        scores = q @ k.transpose(-2, -1) * factor  # (B, num_windows, heads, N, N)

    if bias_table is not None:
        if keys != window:
            rows = bias_table[key_window_index(window, keys, q.device)]
        else:
            table_shape = window if table_window is None else per_axis(op, "table_window", table_window, rank)
            pairs = per_axis(op, "table_pairs", table_pairs, rank)
            rows = bias_table[relative_position_index(window, table_shape, q.device, table_pairs=pairs)]
        if bias_table.dim() == 3:  # (N, N, window types, heads)
            rows = rows.permute(2, 3, 0, 1).repeat_interleave(num_windows // bias_table.shape[1], dim=0)
        else:
            rows = rows.permute(2, 0, 1)
        scores = scores + rows.to(wide)
    if bias is not None:
        if bias.dim() == 4:  # (window types, heads, N, N); a type applies to a run of consecutive windows
            bias = bias.repeat_interleave(num_windows // bias.shape[0], dim=0)
        scores = scores + bias.to(wide)
    if axis_tables is not None:
        scores = scores + axis_scores(q, axis_tables, window)

    if region_map is not None or any(shift):
        region = shift_region(size, window, shift, periodic=wraps, region_map=region_map, grid=grid, device=q.device)
        differs = region[:, :, None] != region[:, None, :]
        mask = torch.zeros_like(differs, dtype=wide).masked_fill(differs, mask_value)
        scores = scores + mask.unsqueeze(1)  # (num_windows, 1, N, N)

    probs = scores.softmax(dim=-1)
    if dropout_p > 0.0:
        keep = torch.empty_like(probs).bernoulli_(1.0 - dropout_p, generator=generator)
        probs = probs * keep / (1.0 - dropout_p) if dropout_p < 1.0 else probs * keep
    out = (probs @ v).to(dtype)  # (B, num_windows, heads, N, head_dim)

    # Scatter: each token of the map belongs to exactly one window; pad tokens are dropped.
    flat = index.reshape(-1)
    position = torch.empty(math.prod(size) + 1, dtype=torch.long, device=q.device)
    position[flat] = torch.arange(flat.numel(), device=q.device)
    out = out.transpose(2, 3).reshape(batch, num_windows * n, heads * head_dim)[:, position[:-1]]
    out = out.reshape(batch, *size, heads * head_dim)
    extras = ([probs.to(dtype)] if return_attention else []) + ([scores.logsumexp(dim=-1)] if return_lse else [])
    return (out, *extras) if extras else out


def window_attention_qkvpacked(
    qkv: Tensor, bias_table: Tensor | None = None, *, num_heads: int, window_size: Ints, **kwargs
) -> Any:  # a Tensor, or a tuple if further results are requested
    r"""Compute attention inside the shifted windows of a feature map, given q, k and v in one tensor.

    Args:
        qkv: (B, \*S, 3C) or (B, \*S, 3, num_heads, head_dim), S = (H, W) or (D, H, W).

        The other arguments, the formula, the results and the errors are as for :func:`window_attention` above.

    Source: the output layout of the published qkv Linear, (3, num_heads, head_dim).
    """
    if qkv.dim() in (4, 5):
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.unbind(-3)
    return window_attention(q, k, v, bias_table, num_heads=num_heads, window_size=window_size, **kwargs)
