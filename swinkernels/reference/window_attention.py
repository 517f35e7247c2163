"""Window attention as DESIGN defines it, in plain PyTorch: every step is written out, nothing is optimised.

Works in any floating dtype, in float64 if the inputs are float64, and is differentiable by autograd (twice, too).
It shares no code with the fast paths, which are compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Ints = int | Sequence[int]


def _per_axis(value, rank: int) -> tuple:
    return tuple(value) if isinstance(value, Sequence) else (value,) * rank


def frame_size(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """The map's size rounded up to whole windows, per axis."""
    return tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))


def _window_coordinates(frame: Sequence[int], window: Sequence[int], grid: bool, device) -> list[Tensor]:
    """Frame coordinate of every token of every window, per axis: each (num_windows, N)."""
    axes = []
    for p, w in zip(frame, window, strict=True):
        g = torch.arange(p, device=device)
        # (windows, tokens) on this axis: consecutive tokens, or tokens strided over the map
        axes.append(g.reshape(w, p // w).T if grid else g.reshape(p // w, w))
    rank = len(axes)
    coordinates = []
    for i, g in enumerate(axes):
        shape = [1] * (2 * rank)
        shape[i], shape[rank + i] = g.shape
        full = [a.shape[0] for a in axes] + [a.shape[1] for a in axes]
        n = math.prod(full[:rank])
        coordinates.append(g.reshape(shape).expand(full).reshape(n, -1))
    return coordinates


def source_index(
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    *,
    pad_order: str = "pad_then_roll",
    pad_before: Sequence[int] | None = None,
    grid: bool = False,
    device=None,
) -> Tensor:
    """(num_windows, N): the token of the row-major map that each window token is; prod(size) for a pad token."""
    frame = frame_size(size, window)
    pad_before = pad_before or (0,) * len(size)
    source = torch.zeros((), dtype=torch.long, device=device)
    is_pad = torch.zeros((), dtype=torch.bool, device=device)
    for g, s, w_shift, p, before in zip(
        _window_coordinates(frame, window, grid, device), size, shift, frame, pad_before, strict=True
    ):
        if pad_order == "pad_then_roll":
            y = (g + w_shift) % p - before
            outside = (y < 0) | (y >= s)
        else:
            y = g - before
            outside = (y < 0) | (y >= s)
            y = (y + w_shift) % s
        source = source * s + y
        is_pad = is_pad | outside
    return torch.where(is_pad, math.prod(size), source)


def shift_region(
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    *,
    periodic: Sequence[bool],
    region_map: Tensor | None = None,
    grid: bool = False,
    device=None,
) -> Tensor:
    """(num_windows, N): the region number of each window token; tokens of different regions are masked."""
    frame = frame_size(size, window)
    coordinates = _window_coordinates(frame, window, grid, device)
    if region_map is not None:
        return region_map.to(device)[tuple(coordinates)]
    region = torch.zeros((), dtype=torch.long, device=device)
    for g, w, s, p, wraps in zip(coordinates, window, shift, frame, periodic, strict=True):
        on_axis = (g >= p - w).long() + (g >= p - s).long() if s > 0 and not wraps else torch.zeros_like(g)
        region = region * 3 + on_axis
    return region


def relative_position_index(window: Sequence[int], table_window: Sequence[int] | None = None, device=None) -> Tensor:
    """(N, N): the row of the bias table for query i and key j of a window."""
    table_window = table_window or window
    token = torch.arange(math.prod(window), device=device)
    index = torch.zeros(len(token), len(token), dtype=torch.long, device=device)
    for axis, w in enumerate(table_window):
        coordinate = token // math.prod(table_window[axis + 1 :]) % w  # decoded in the table's window
        index = index * (2 * w - 1) + coordinate[:, None] - coordinate[None, :] + w - 1
    return index


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
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Shifted-window attention of q, k, v: each (B, *S, num_heads, head_dim), S of two or three axes -> (B, *S, C).

    With ``return_attention`` also the probabilities after dropout, (B, num_windows, num_heads, N, N).
    The arguments are those of :func:`swinkernels.window_attention`, which documents them.
    """
    batch, *size, heads, head_dim = q.shape
    rank = len(size)
    window = _per_axis(window_size, rank)
    shift = _per_axis(shift_size, rank)
    device = q.device
    index = source_index(
        size, window, shift, pad_order=pad_order, pad_before=_per_axis(pad_before, rank), grid=grid, device=device
    )  # (num_windows, N)
    num_windows, n = index.shape

    # Gather the windows. The row after the last token is the pad token.
    pads = q.new_zeros(3, heads, head_dim) if pad_qkv is None else pad_qkv.to(q.dtype).reshape(3, heads, head_dim)

    def gather(x: Tensor, pad: Tensor) -> Tensor:
        tokens = x.reshape(batch, math.prod(size), heads, head_dim)
        tokens = torch.cat([tokens, pad.expand(batch, 1, heads, head_dim)], dim=1)
        return tokens[:, index].transpose(2, 3)  # (B, num_windows, heads, N, head_dim)

    q, k, v = (gather(x, pad) for x, pad in zip((q, k, v), pads, strict=True))

    at_least_float32 = torch.promote_types(q.dtype, torch.float32)
    if logit_scale is None:
        scores = (q * (head_dim**-0.5 if scale is None else scale)) @ k.transpose(-2, -1)
        scores = scores.to(at_least_float32)
    else:
        q, k = (torch.nn.functional.normalize(x.to(at_least_float32), dim=-1, eps=1e-12) for x in (q, k))
        factor = logit_scale.to(at_least_float32).reshape(heads, 1, 1).clamp(max=math.log(100.0)).exp()
        scores = q @ k.transpose(-2, -1) * factor

    if bias_table is not None:
        table = bias_table[relative_position_index(window, _per_axis(table_window or window, rank), device)]
        scores = scores + table.permute(2, 0, 1).to(at_least_float32)  # (heads, N, N)
    if bias is not None:
        if bias.dim() == 4:  # (window types, heads, N, N): types follow the slowest axes of the windows
            bias = bias.repeat_interleave(num_windows // bias.shape[0], dim=0)
        scores = scores + bias.to(at_least_float32)

    if region_map is not None or any(shift):
        region = shift_region(
            size, window, shift, periodic=_per_axis(periodic, rank), region_map=region_map, grid=grid, device=device
        )
        differs = region[:, :, None] != region[:, None, :]
        scores = scores + mask_value * differs.to(at_least_float32).unsqueeze(1)  # (num_windows, 1, N, N)

    probs = scores.softmax(dim=-1)
    if dropout_p > 0.0:
        keep = torch.empty_like(probs).bernoulli_(1.0 - dropout_p, generator=generator)
        probs = probs * keep / (1.0 - dropout_p) if dropout_p < 1.0 else probs * keep
    out = probs.to(v.dtype) @ v  # (B, num_windows, heads, N, head_dim)

    # Scatter: each token of the map is one token of one window, pad tokens are dropped.
    flat = index.reshape(-1)
    position = torch.empty(math.prod(size) + 1, dtype=torch.long, device=device)
    position[flat] = torch.arange(flat.numel(), device=device)
    out = out.transpose(2, 3).reshape(batch, num_windows * n, heads * head_dim)[:, position[:-1]]
    out = out.reshape(batch, *size, heads * head_dim)
    return (out, probs) if return_attention else out


def window_attention_qkvpacked(
    qkv: Tensor, bias_table: Tensor | None = None, *, num_heads: int, window_size: Ints, **kwargs
) -> Tensor | tuple[Tensor, Tensor]:
    """Shifted-window attention of a packed map: qkv (B, *S, 3, num_heads, head_dim) or (B, *S, 3C) -> (B, *S, C).

    The arguments are those of :func:`swinkernels.window_attention_qkvpacked`, which documents them.
    """
    if qkv.dim() in (4, 5):
        qkv = qkv.unflatten(-1, (3, num_heads, -1))
    q, k, v = qkv.unbind(-3)
    return window_attention(q, k, v, bias_table, num_heads=num_heads, window_size=window_size, **kwargs)
