"""Positions of window tokens in a feature map, with shift and padding, for the reference ops."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Ints = int | Sequence[int]
PAD_ORDERS = ("pad_then_roll", "roll_then_pad")


Function = TypeVar("Function", bound=Callable[..., Any])


def without_autocast(function: Function) -> Function:
    """Wrap ``function`` to run with autocast disabled: autocast would round float32 products to half precision."""

    @functools.wraps(function)
    def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if x.device.type == "meta":  # the meta device has no autocast
            return function(x, *args, **kwargs)
        with torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return run  # type: ignore[return-value]


def per_axis(op: str, name: str, value: Any, rank: int) -> tuple:
    """Expand ``value``, one value for all axes or a sequence of one per axis, to a tuple of ``rank`` values."""
    values = tuple(value) if isinstance(value, Sequence) else (value,) * rank
    if len(values) != rank:
        raise ValueError(f"{op}: {name} must have one value for each of the {rank} axes of the map, got {value!r}")
    return values


def check_window(
    op: str,
    size: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    *,
    below_frame: bool = False,
) -> None:
    """Raise ValueError for an invalid geometry.

    ``shift`` must be smaller than the window or, if ``below_frame`` is True, smaller than the frame.
    """
    if len(size) not in (2, 3) or any(s < 1 for s in size):
        raise ValueError(f"{op}: the map must have two or three axes of at least one token, got S = {tuple(size)}")
    if any(w < 1 for w in window):
        raise ValueError(f"{op}: window_size must be positive, got {tuple(window)}")
    limits, name = (frame_size(size, window), "frame") if below_frame else (window, "window_size")
    if any(not 0 <= s < limit for s, limit in zip(shift, limits, strict=True)):
        raise ValueError(
            f"{op}: shift_size must be in 0..{name} - 1 per axis, got {tuple(shift)} for {name} {tuple(limits)}"
        )
    if pad_order not in PAD_ORDERS:
        raise ValueError(f"{op}: pad_order must be one of {PAD_ORDERS}, got {pad_order!r}")


def frame_size(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Return the frame: ``size`` rounded up to a multiple of ``window`` on every axis."""
    return tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))


def window_coordinates(frame: Sequence[int], window: Sequence[int], grid: bool, device) -> list[Tensor]:
    """Return the frame coordinates of every token of every window: one tensor (num_windows, N) per axis."""
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
    """Return each window token's row-major index in the map, (num_windows, N); prod(size) for a pad token."""
    frame = frame_size(size, window)
    pad_before = pad_before or (0,) * len(size)
    coordinates = window_coordinates(frame, window, grid, device)
    source = torch.zeros_like(coordinates[0])
    is_pad = torch.zeros_like(source, dtype=torch.bool)
    for axis, g in enumerate(coordinates):
        length = size[axis]
        if pad_order == "pad_then_roll":
            y = (g + shift[axis]) % frame[axis] - pad_before[axis]
            outside = (y < 0) | (y >= length)
        else:
            y = g - pad_before[axis]
            outside = (y < 0) | (y >= length)
            y = (y + shift[axis]) % length  # the shift may exceed the map's length
        source = source * length + y
        is_pad = is_pad | outside
    return source.masked_fill(is_pad, math.prod(size))


def key_index(
    size: Sequence[int], window: Sequence[int], key_window: Sequence[int], *, pad_before: Sequence[int], device=None
) -> Tensor:
    """Return each key's row-major index in the map, (num_windows, M); prod(size) for a key outside the map.

    The keys of a window are the tokens of a larger window with the same centre.
    """
    rank, frame = len(size), frame_size(size, window)
    axes = []
    for p, w, m, before in zip(frame, window, key_window, pad_before, strict=True):
        first = torch.arange(0, p, w, device=device) - (m - w) // 2 - before
        axes.append(first[:, None] + torch.arange(m, device=device))  # (windows, keys) on this axis
    source: Any = 0
    outside: Any = False
    for axis, (y, length) in enumerate(zip(axes, size, strict=True)):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = y.shape
        y = y.reshape(shape)
        source, outside = source * length + y, outside | (y < 0) | (y >= length)
    return source.masked_fill(outside, math.prod(size)).flatten(rank).flatten(0, rank - 1)


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
    """Return each window token's region, (num_windows, N); attention between different regions is masked."""
    frame = frame_size(size, window)
    coordinates = window_coordinates(frame, window, grid, device)
    if region_map is not None:
        return region_map[tuple(coordinates)]
    region = torch.zeros_like(coordinates[0])
    for g, w, s, p, wraps in zip(coordinates, window, shift, frame, periodic, strict=True):
        on_axis = (g >= p - w).long() + (g >= p - s).long() if s > 0 and not wraps else torch.zeros_like(g)
        region = region * 3 + on_axis
    return region
