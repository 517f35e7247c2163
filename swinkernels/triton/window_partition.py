"""Launches the Triton kernel of the ops ``window_partition_triton`` and ``window_reverse_triton``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from swinkernels.triton import _window_partition_kernels as kernels
from swinkernels.triton._launch import INT32_MAX, alignment, dense_strides, pad_to_3d, unit_stride

# These values are derived, not tuned on a GPU. Four accesses per lane in blocks of two warps leave few lanes idle
# in a window's last tile. At 64 to 80 registers per lane, 50 KB are in flight per multiprocessor, twice the amount
# needed to hide the memory latency. Computing the addresses of a window costs as much as copying it once, so a program
# copies several windows, but not so many that few programs are left in the last wave.
CHUNKS = 256
CHUNKS_PER_WARP = 128
PROGRAMS = 8192
MAX_WINDOWS = 4

WORDS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # integer types, by size, that copy data of any dtype


class _Geometry(NamedTuple):
    """The values of a call that do not depend on the batch; they are computed once and cached."""

    volume: int
    windows: int  # per image
    tiles: int  # per window
    word: tl.dtype
    arguments: tuple[tuple[int, ...], ...]  # arguments of the kernel: size, roll, x_strides, window_strides
    options: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _geometry(
    size: tuple[int, ...],
    channels: int,
    itemsize: int,
    strides: tuple[int, ...],  # of the input (the map, or the windows if reverse), except its last axis
    address: int,  # modulo 16
    window: tuple[int, ...],
    shift: tuple[int, ...],
    roll_then_pad: bool,
    reverse: bool,
) -> _Geometry:
    row_bytes = channels * itemsize
    access = alignment((row_bytes, address, *(s * itemsize for s in strides)), 16)
    word = min(access, 8)
    volume, row = math.prod(window), row_bytes // access
    if volume * row > INT32_MAX:
        raise ValueError(
            f"window_{'reverse' if reverse else 'partition'}: backend='triton' supports windows of fewer than 2**31 "
            f"accesses, got {volume} tokens of {row} accesses of {access} bytes"
        )
    steps = tuple(s * itemsize // access for s in strides)
    if reverse:
        x_strides, window_strides = tuple(s * row for s in dense_strides((1, *size))), steps
    else:
        x_strides, window_strides = steps, (volume * row, row)
    size = pad_to_3d(size, 1)
    num_windows = [-(-s // w) for s, w in zip(size, window, strict=True)]
    block = min(CHUNKS, max(32, triton.next_power_of_2(volume * row)))
    return _Geometry(
        volume=volume,
        windows=math.prod(num_windows),
        tiles=-(-volume * row // block),
        word=WORDS[word],
        arguments=(
            size,
            tuple(x % s for x, s in zip(shift, size, strict=True)) if roll_then_pad else shift,
            (x_strides[0], *pad_to_3d(x_strides[1:], 0)),
            window_strides,
        ),
        options={
            "STATIC": kernels.Static(
                WINDOW=window,
                VOLUME=volume,
                ROLL_THEN_PAD=roll_then_pad,
                GRID=False,
                HAS_PADDING=any(n * w != s for n, w, s in zip(num_windows, window, size, strict=True)),
            ),
            "ROW": row,
            "VEC": access // word,
            "BLOCK": block,
            "REVERSE": reverse,
            "num_warps": max(1, block // CHUNKS_PER_WARP),
        },
    )


def _launch(geometry: _Geometry, x: Tensor, windows: Tensor, batch_windows: int) -> None:
    each = min(MAX_WINDOWS, max(1, -(-batch_windows * geometry.tiles // PROGRAMS)))
    programs = -(-batch_windows // each) * geometry.tiles
    if max(programs, batch_windows) > INT32_MAX:
        name = "window_reverse" if geometry.options["REVERSE"] else "window_partition"
        raise ValueError(
            f"{name}: backend='triton' supports fewer than 2**31 windows and programs, got {batch_windows} and "
            f"{programs}: split the batch"
        )
    kernels.move_windows[(programs,)](
        triton.reinterpret(x, geometry.word), triton.reinterpret(windows, geometry.word), batch_windows, each,
        *geometry.arguments, **geometry.options,
    )  # fmt: skip


def _geometry_of(
    data: Tensor,  # the map, or the windows if reverse
    size: Sequence[int],
    window_size: Sequence[int],
    shift_size: Sequence[int],
    roll_then_pad: bool,
    reverse: bool,
) -> _Geometry:
    return _geometry(
        tuple(size), data.shape[-1], data.element_size(), data.stride()[:-1], data.data_ptr() % 16,
        tuple(window_size), tuple(shift_size), roll_then_pad, reverse,
    )  # fmt: skip


def partition(x: Tensor, window_size: Sequence[int], shift_size: Sequence[int], roll_then_pad: bool) -> Tensor:
    """Cut a map (B, *S, C) into windows (B * num_windows, N, C)."""
    x = unit_stride(x)
    geometry = _geometry_of(x, x.shape[1:-1], window_size, shift_size, roll_then_pad, False)
    batch_windows = x.shape[0] * geometry.windows
    windows = x.new_empty((batch_windows, geometry.volume, x.shape[-1]))
    if windows.numel() > 0:
        _launch(geometry, x, windows, batch_windows)
    return windows


def reverse(
    windows: Tensor, size: Sequence[int], window_size: Sequence[int], shift_size: Sequence[int], roll_then_pad: bool
) -> Tensor:
    """Join windows (B * num_windows, N, C) into a map (B, *S, C); pad tokens are dropped."""
    windows = unit_stride(windows)
    geometry = _geometry_of(windows, size, window_size, shift_size, roll_then_pad, True)
    batch_windows, _, channels = windows.shape
    x = windows.new_empty((batch_windows // geometry.windows, *size, channels))
    if x.numel() > 0:
        _launch(geometry, x, windows, batch_windows)
    return x
