"""Finds the windows that a program processes, by their index in the batch and their type."""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import next_window, split_window


@triton.jit
def _windows_of_image(call, STATIC: tl.constexpr):
    size = call.size
    WINDOW: tl.constexpr = STATIC.WINDOW
    return tl.cdiv(size[0], WINDOW[0]) * tl.cdiv(size[1], WINDOW[1]) * tl.cdiv(size[2], WINDOW[2])


@triton.jit
def type_of(number, call, STATIC: tl.constexpr):
    """Return the type of the window with index ``number`` in the batch."""
    return 0 if call.type_windows is None else number % _windows_of_image(call, STATIC) // call.type_windows


@triton.jit
def window_of_type(kind, i, call, STATIC: tl.constexpr):
    """Return the index in the batch of the ``i``-th window of type ``kind``."""
    if call.type_windows is not None:
        image = i // call.type_windows
        i = image * _windows_of_image(call, STATIC) + kind * call.type_windows + i % call.type_windows
    return i


@triton.jit
def first_window(group, batch_windows, windows_per_program, call):
    """Return the type, first window and number of windows of ``group``; each type has ``batch_windows`` windows."""
    if call.type_windows is not None:
        groups = tl.cdiv(batch_windows, windows_per_program)
        kind, group = group // groups, group % groups
    else:
        kind = 0
    first = group * windows_per_program
    return kind, first, tl.minimum(windows_per_program, batch_windows - first)


@triton.jit
def next_of_type(window, kind, i, call, STATIC: tl.constexpr):
    """Return the ``i``-th window of type ``kind``, given ``window``, the previous window of that type."""
    WINDOW: tl.constexpr = STATIC.WINDOW
    if call.type_windows is None:
        window = next_window(window, call.size, WINDOW)
    else:
        window = split_window(window_of_type(kind, i, call, STATIC), call.size, WINDOW)
    return window
