"""Keys from a window larger than that of the queries (``key_window``, as in HAT); keys outside the map are pad tokens.

A token is a key of several windows. The backward pass first stores, in float32, the gradients of each window's keys. A
second kernel then sums them for every token of the map, always in the same order.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import Tokens, coordinates, locate
from swinkernels.triton.window_attention.call import K


@triton.jit
def locate_keys(window, token, call, STATIC: tl.constexpr):
    """Return the positions of the keys with indices ``token`` in the key window of ``window``, as Tokens."""
    if STATIC.HAS_KEY_WINDOW:
        WINDOW: tl.constexpr = STATIC.WINDOW
        KEY_WINDOW: tl.constexpr = STATIC.KEY_WINDOW
        size, before = call.size, call.before
        t0, t1, t2 = coordinates(token, KEY_WINDOW)
        y0 = window.n0 * WINDOW[0] + t0 - (KEY_WINDOW[0] - WINDOW[0]) // 2 - before[0]
        y1 = window.n1 * WINDOW[1] + t1 - (KEY_WINDOW[1] - WINDOW[1]) // 2 - before[1]
        y2 = window.n2 * WINDOW[2] + t2 - (KEY_WINDOW[2] - WINDOW[2]) // 2 - before[2]
        real = (y0 >= 0) & (y0 < size[0]) & (y1 >= 0) & (y1 < size[1]) & (y2 >= 0) & (y2 < size[2])
        at = Tokens(token, window.image, y0, y1, y2, real & (token < STATIC.KEY_VOLUME))
    else:
        at = locate(window, token, call, STATIC)
    return at


@triton.jit
def key_rows(data, number, head, which: tl.constexpr, key, call, STATIC: tl.constexpr):
    """Return the addresses of rows of dk or dv in ``data``, of shape (windows, heads, 2, M, HEAD_DIM)."""
    first = ((number.to(tl.int64) * call.num_heads + head) * 2 + (which - K)) * STATIC.KEY_VOLUME
    return data + (first + key)[:, None] * STATIC.HEAD_DIM + tl.arange(0, STATIC.BLOCK_D)[None, :]


@triton.jit
def store_of_window(data, which: tl.constexpr, values, number, head, key, call, STATIC: tl.constexpr):
    """Store rows of a window's dk or dv in ``data``, which holds the gradients of the keys of all windows."""
    inside = (key < STATIC.KEY_VOLUME)[:, None] & (tl.arange(0, STATIC.BLOCK_D) < STATIC.HEAD_DIM)[None, :]
    tl.store(key_rows(data, number, head, which, key, call, STATIC), values, mask=inside)
