"""Index arithmetic of all window ops: finds the tokens of shifted windows in a map, and the pad tokens.

The geometry has three axes; in 2D the first has length one. ``roll`` is the shift; with ``roll_then_pad``, the shift
modulo the map's size, since a map may be smaller than the shift. ``before`` is the number of pad tokens before the
data. On each axis the shift is below the frame, so addresses wrap around at most once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Geometry(NamedTuple):
    """The geometry of a map's windows, as passed to ``locate``."""

    size: Any
    roll: Any
    before: Any


class Window(NamedTuple):
    """A window of the batch: its image, and its coordinates among the windows of the image."""

    image: Any
    n0: Any
    n1: Any
    n2: Any


class Place(NamedTuple):
    """A position in the batch: an image and coordinates in the map."""

    image: Any
    y0: Any
    y1: Any
    y2: Any


class Tokens(NamedTuple):
    """Tokens of a window: indices in the window, image, coordinates in the map, and a mask of tokens in the map."""

    token: Any
    image: Any
    y0: Any
    y1: Any
    y2: Any
    real: Any


@triton.jit
def coordinates(token, WINDOW: tl.constexpr):
    """Return the window coordinates of indices ``token``; for an index past the window, the first is out of range."""
    return token // (WINDOW[1] * WINDOW[2]), token // WINDOW[2] % WINDOW[1], token % WINDOW[2]


@triton.jit
def _source(n, t, size, roll, before, WINDOW: tl.constexpr, ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr):
    """Return, on one axis, the map coordinate of token ``t`` of window ``n``, and a mask, False for pad tokens."""
    num_windows = tl.cdiv(size, WINDOW)
    g = t * num_windows + n if GRID else n * WINDOW + t
    if ROLL_THEN_PAD:
        y = g - before
        real = (y >= 0) & (y < size)
        y += roll
        y = tl.where(y >= size, y - size, y)
    else:
        frame = num_windows * WINDOW
        y = g + roll
        y = tl.where(y >= frame, y - frame, y) - before
        real = (y >= 0) & (y < size)
    return y, real


@triton.jit
def locate(window, token, geometry, STATIC: tl.constexpr):
    """Return the Tokens of ``window`` with the row-major indices ``token``.

    ``geometry`` has the fields of Geometry; STATIC has at least WINDOW, ROLL_THEN_PAD, GRID and HAS_PADDING.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    ROLL_THEN_PAD: tl.constexpr = STATIC.ROLL_THEN_PAD
    GRID: tl.constexpr = STATIC.GRID
    size, roll, before = geometry.size, geometry.roll, geometry.before
    t0, t1, t2 = coordinates(token, WINDOW)
    y0, real0 = _source(window.n0, t0, size[0], roll[0], before[0], WINDOW[0], ROLL_THEN_PAD, GRID)
    y1, real1 = _source(window.n1, t1, size[1], roll[1], before[1], WINDOW[1], ROLL_THEN_PAD, GRID)
    y2, real2 = _source(window.n2, t2, size[2], roll[2], before[2], WINDOW[2], ROLL_THEN_PAD, GRID)
    real = token < WINDOW[0] * WINDOW[1] * WINDOW[2]
    if STATIC.HAS_PADDING:
        real = real & real0 & real1 & real2
    return Tokens(token, window.image, y0, y1, y2, real)


@triton.jit
def split_window(number, size, WINDOW: tl.constexpr):
    """Return the Window with the index ``number`` in the batch."""
    num1, num2 = tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
    num0 = tl.cdiv(size[0], WINDOW[0])
    n2 = number % num2
    n1 = number // num2 % num1
    n0 = number // (num2 * num1) % num0
    return Window(number // (num2 * num1 * num0), n0, n1, n2)


@triton.jit
def next_window(window, size, WINDOW: tl.constexpr):
    """Return the window after ``window``. Carries replace split_window's divisions, which every lane would execute."""
    n2 = window.n2 + 1
    wraps = n2 == tl.cdiv(size[2], WINDOW[2])
    n2 = tl.where(wraps, 0, n2)
    n1 = window.n1 + wraps.to(tl.int32)
    wraps = n1 == tl.cdiv(size[1], WINDOW[1])
    n1 = tl.where(wraps, 0, n1)
    n0 = window.n0 + wraps.to(tl.int32)
    wraps = n0 == tl.cdiv(size[0], WINDOW[0])
    n0 = tl.where(wraps, 0, n0)
    return Window(window.image + wraps.to(tl.int32), n0, n1, n2)


@triton.jit
def dense_row(at, size):
    """Return the row-major index of the token at ``at``, a Place or Tokens, in a contiguous (B, *S, ...) map."""
    first = at.image.to(tl.int64) * size[0]
    return ((first + at.y0) * size[1] + at.y1) * size[2] + at.y2
