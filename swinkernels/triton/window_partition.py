"""Launches the Triton kernel of window partition and window reverse: what the ops with the suffix ``_triton`` run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from swinkernels.triton import _window_partition_kernels as kernels
from swinkernels.triton._launch import INT32_MAX, alignment, dense_strides, three, unit_stride

# Numbers to tune, reasoned, not measured. Four accesses a lane in blocks of two warps leave few lanes idle in the last
# tile of a window, and at 64 to 80 registers a lane 50 KB in flight on a multiprocessor, twice what hides the latency
# of memory. Decoding a window costs as much as moving it once; several a program, but not so few programs that the
# last of them run alone.
CHUNKS = 256
CHUNKS_PER_WARP = 128
PROGRAMS = 8192
MAX_WINDOWS = 4

WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # bytes are moved, whatever they mean


class Plan(NamedTuple):
    """All of a call that does not depend on the batch: computed once and kept."""

    volume: int
    windows: int  # per image
    tiles: int  # per window
    word: tl.dtype
    geometry: tuple[tuple[int, ...], ...]  # size, roll, x_strides, window_strides
    options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _plan(
    size: tuple[int, ...],
    channels: int,
    itemsize: int,
    strides: tuple[int, ...],  # of the input but its last axis: of the map, or of the windows if reverse
    address: int,  # modulo 16
    window: tuple[int, ...],
    shift: tuple[int, ...],
    roll_then_pad: bool,
    reverse: bool,
) -> Plan:
    row_bytes = channels * itemsize
    access = alignment((row_bytes, address, *(s * itemsize for s in strides)), 16)
    word = min(access, 8)
    volume, row = math.prod(window), row_bytes // access
    if volume * row > INT32_MAX:
        raise ValueError(
            f"window_{'reverse' if reverse else 'partition'}: backend='triton' takes windows of fewer than 2**31 "
            f"accesses, got {volume} tokens of {row} accesses of {access} bytes"
        )
    steps = tuple(s * itemsize // access for s in strides)
    if reverse:
        x_strides, window_strides = tuple(s * row for s in dense_strides((1, *size))), steps
    else:
        x_strides, window_strides = steps, (volume * row, row)
    size = three(size, 1)
    num_windows = [-(-s // w) for s, w in zip(size, window, strict=True)]
    block = min(CHUNKS, max(32, triton.next_power_of_2(volume * row)))
    return Plan(
        volume=volume,
        windows=math.prod(num_windows),
        tiles=-(-volume * row // block),
        word=WORDS[word],
        geometry=(
            size,
            tuple(x % s for x, s in zip(shift, size, strict=True)) if roll_then_pad else shift,
            (x_strides[0], *three(x_strides[1:], 0)),
            window_strides,
        ),
        options={
            "WINDOW": window,
            "ROW": row,
            "VEC": access // word,
            "BLOCK": block,
            "ROLL_THEN_PAD": roll_then_pad,
            "HAS_PADDING": any(n * w != s for n, w, s in zip(num_windows, window, size, strict=True)),
            "REVERSE": reverse,
            "num_warps": max(1, block // CHUNKS_PER_WARP),
        },
    )


def _launch(plan: Plan, x: Tensor, windows: Tensor, batch_windows: int) -> None:
    each = min(MAX_WINDOWS, max(1, -(-batch_windows * plan.tiles // PROGRAMS)))
    programs = -(-batch_windows // each) * plan.tiles
    if max(programs, batch_windows) > INT32_MAX:
        name = "window_reverse" if plan.options["REVERSE"] else "window_partition"
        raise ValueError(
            f"{name}: backend='triton' takes fewer than 2**31 windows and programs, got {batch_windows} and "
            f"{programs}: split the batch"
        )
    kernels.move_windows[(programs,)](
        triton.reinterpret(x, plan.word), triton.reinterpret(windows, plan.word), batch_windows, each,
        *plan.geometry, **plan.options,
    )  # fmt: skip


def partition(x: Tensor, window_size: Sequence[int], shift_size: Sequence[int], roll_then_pad: bool) -> Tensor:
    """(B, *S, C) to (B * num_windows, N, C)."""
    x = unit_stride(x)
    batch, *size, channels = x.shape
    address = x.data_ptr() % 16
    window, shift = tuple(window_size), tuple(shift_size)
    strides = x.stride()[:-1]
    plan = _plan(tuple(size), channels, x.element_size(), strides, address, window, shift, roll_then_pad, False)
    windows = x.new_empty((batch * plan.windows, plan.volume, channels))
    if windows.numel() > 0:
        _launch(plan, x, windows, batch * plan.windows)
    return windows


def reverse(
    windows: Tensor, size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int], roll_then_pad: bool
) -> Tensor:
    """(B * num_windows, N, C) to (B, *S, C); pad tokens are dropped."""
    windows = unit_stride(windows)
    batch_windows, _, channels = windows.shape
    address = windows.data_ptr() % 16
    window, shift = tuple(window_size), tuple(shift_size)
    strides = windows.stride()[:-1]
    plan = _plan(tuple(size), channels, windows.element_size(), strides, address, window, shift, roll_then_pad, True)
    x = windows.new_empty((batch_windows // plan.windows, *size, channels))
    if x.numel() > 0:
        _launch(plan, x, windows, batch_windows)
    return x
