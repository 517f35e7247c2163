"""The Triton kernel of window partition and window reverse; in 2D a map has a leading axis of length one.

Maths     windows[b * num_windows + w, t] = x[b, y(w, t)], zero if (w, t) is a pad token; the reverse assigns to x
          instead. y is one-to-one between the windows' real tokens and the tokens of the map, so one kernel
          serves both directions, and each direction writes every element of its result once.
Tiling    a token's channels are ROW chunks; a chunk is the widest access (up to 16 bytes) that the row, its strides and
          its address allow. A window is N * ROW contiguous chunks. A program copies the same BLOCK of chunks in several
          consecutive windows: it decodes its first window and the tokens of its lanes once. As rows are not padded to
          a power of two, lanes are idle only in the last tile of a window.
Traffic   every element is read once and written once; pad tokens are only written.
Roofline  memory bound. B=128, 56x56, C=96, bf16: 154 MB, 46 us at 3.35 TB/s (H100 SXM, published peak).
Limits    tiles of a call and chunks of a window below 2^31.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from swinkernels.triton._window_address import Geometry, locate, next_window, split_window


class Static(NamedTuple):
    """Compile-time arguments of the kernel."""

    WINDOW: Any
    VOLUME: Any  # tokens of a window
    ROLL_THEN_PAD: Any
    GRID: Any
    HAS_PADDING: Any


@triton.jit(do_not_specialize=["batch_windows", "windows_per_program"])  # no recompilation for a new batch size
def move_windows(
    x, windows, batch_windows, windows_per_program, size, roll, x_strides, window_strides,
    STATIC: tl.constexpr, ROW: tl.constexpr, VEC: tl.constexpr, BLOCK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Copy ``x`` to ``windows`` or, if REVERSE, ``windows`` to ``x``, in chunks of VEC elements.

    ``x_strides`` (batch, axes 0 to 2) and ``window_strides`` (window, token) are in units of chunks.
    """
    TILES: tl.constexpr = (STATIC.VOLUME * ROW + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    first = program // TILES * windows_per_program
    count = tl.minimum(windows_per_program, batch_windows - first)
    geometry = Geometry(size, roll, (0, 0, 0))
    window = split_window(first, size, STATIC.WINDOW)
    chunk = program % TILES * BLOCK + tl.arange(0, BLOCK)
    token = chunk // ROW
    element = (chunk % ROW * VEC)[:, None] + tl.arange(0, VEC)[None, :]
    in_window = (token < STATIC.VOLUME)[:, None]

    for i in range(count):
        at = locate(window, token, geometry, STATIC)
        here = at.y0.to(tl.int64) * x_strides[1] + at.y1.to(tl.int64) * x_strides[2] + at.y2.to(tl.int64) * x_strides[3]
        here += at.image.to(tl.int64) * x_strides[0]
        there = (first + i).to(tl.int64) * window_strides[0] + token.to(tl.int64) * window_strides[1]
        x_at = x + (here * VEC)[:, None] + element
        windows_at = windows + (there * VEC)[:, None] + element
        if REVERSE:
            tl.store(x_at, tl.load(windows_at, mask=at.real[:, None]), mask=at.real[:, None])
        else:
            tl.store(windows_at, tl.load(x_at, mask=at.real[:, None], other=0), mask=in_window)
        window = next_window(window, size, STATIC.WINDOW)
