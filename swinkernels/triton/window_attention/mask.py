"""The mask of shifted windows: ``mask_value`` is added to scores of pairs of tokens from different regions."""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import coordinates


@triton.jit
def beyond_seam(token, call, STATIC: tl.constexpr):
    """Return a bit per axis, set for tokens at or beyond ``call.cut``, where the shift's seam crosses a window."""
    WINDOW: tl.constexpr = STATIC.WINDOW
    t0, t1, t2 = coordinates(token, WINDOW)
    cut = call.cut
    bits = (t0 >= cut[0]).to(tl.int32) + (t1 >= cut[1]).to(tl.int32) * 2
    return bits + (t2 >= cut[2]).to(tl.int32) * 4


@triton.jit
def seams_of(window, call, STATIC: tl.constexpr):
    """Return a bit per axis, set if the window contains the seam; with a region_map, return a nonzero number.

    The seam is in the last window of an axis.
    """
    size, cut = call.size, call.cut
    WINDOW: tl.constexpr = STATIC.WINDOW
    if call.region_map is not None:
        bits = window.n0 * 0 + 1
    else:
        bits = ((window.n0 == tl.cdiv(size[0], WINDOW[0]) - 1) & (cut[0] < WINDOW[0])).to(tl.int32)
        bits += ((window.n1 == tl.cdiv(size[1], WINDOW[1]) - 1) & (cut[1] < WINDOW[1])).to(tl.int32) * 2
        bits += ((window.n2 == tl.cdiv(size[2], WINDOW[2]) - 1) & (cut[2] < WINDOW[2])).to(tl.int32) * 4
    return bits


@triton.jit
def region_of(window, token, beyond, seams, call, STATIC: tl.constexpr):
    """Return the regions of tokens; pairs of tokens from different regions are masked."""
    if not STATIC.HAS_MASK:
        region = token
    elif call.region_map is None:
        region = beyond & seams
    else:
        size = call.size
        WINDOW: tl.constexpr = STATIC.WINDOW
        t0, t1, t2 = coordinates(token, WINDOW)
        num0, num1, num2 = tl.cdiv(size[0], WINDOW[0]), tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
        g0 = t0 * num0 + window.n0 if STATIC.GRID else window.n0 * WINDOW[0] + t0
        g1 = t1 * num1 + window.n1 if STATIC.GRID else window.n1 * WINDOW[1] + t1
        g2 = t2 * num2 + window.n2 if STATIC.GRID else window.n2 * WINDOW[2] + t2
        at = (g0.to(tl.int64) * (num1 * WINDOW[1]) + g1) * (num2 * WINDOW[2]) + g2
        region = tl.load(call.region_map + at, mask=token < STATIC.VOLUME, other=0)
    return region


@triton.jit
def masked(scores, query_region, key_region, call):
    """Add the mask, times UNIT, to the scores of a tile."""
    return tl.where(query_region[:, None] != key_region[None, :], scores + call.unit_mask, scores)
