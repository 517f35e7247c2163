"""Loads and stores the rows of one head for the tokens at given positions (``at``, of class ``Tokens``)."""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import dense_row
from swinkernels.triton.window_attention.call import Q


@triton.jit
def load_rows(call, which: tl.constexpr, at, head, STATIC: tl.constexpr):
    """Load rows of q, k or v. Rows beyond the window are zero; pad tokens have the row of pad_qkv, by default zero."""
    PACKED: tl.constexpr = len(call.maps) == 1
    MAP: tl.constexpr = 0 if PACKED else which
    VOLUME: tl.constexpr = STATIC.VOLUME if which == Q else STATIC.KEY_VOLUME
    strides = call.strides[MAP]
    base = at.image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4]
    if PACKED:
        base += tl.cast(which, tl.int64) * strides[5]
    row = at.y0.to(tl.int64) * strides[1] + at.y1.to(tl.int64) * strides[2] + at.y2.to(tl.int64) * strides[3]
    d = tl.arange(0, STATIC.BLOCK_D)
    rows = tl.load(
        call.maps[MAP] + base * STATIC.ALIGN + (row * STATIC.ALIGN)[:, None] + d[None, :],
        mask=at.real[:, None] & (d < STATIC.HEAD_DIM)[None, :],
        other=0.0,
    )
    if call.pad_qkv is not None:
        pad_at = (which * call.num_heads + head) * STATIC.HEAD_DIM + d
        pad = tl.load(call.pad_qkv + pad_at, mask=d < STATIC.HEAD_DIM, other=0.0)
        rows = tl.where(is_pad(at, VOLUME)[:, None], pad[None, :], rows)
    return rows


@triton.jit
def is_pad(at, VOLUME: tl.constexpr):
    return (at.token < VOLUME) & ~at.real


@triton.jit
def load_dense(data, at, head, call, STATIC: tl.constexpr):
    """Load rows of a contiguous map."""
    d = tl.arange(0, STATIC.BLOCK_D)
    first = (dense_row(at, call.size) * call.num_heads + head) * STATIC.HEAD_DIM
    mask = at.real[:, None] & (d < STATIC.HEAD_DIM)[None, :]
    return tl.load(data + first[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_dense(data, values, at, head, row_heads, call, STATIC: tl.constexpr):
    """Store rows of a contiguous map whose tokens have ``row_heads`` heads."""
    d = tl.arange(0, STATIC.BLOCK_D)
    first = (dense_row(at, call.size) * row_heads + head) * STATIC.HEAD_DIM
    mask = at.real[:, None] & (d < STATIC.HEAD_DIM)[None, :]
    tl.store(data + first[:, None] + d[None, :], values.to(data.dtype.element_ty), mask=mask)


@triton.jit
def store_gradient(dmaps, which: tl.constexpr, values, at, head, call, STATIC: tl.constexpr):
    """Store rows of dq, dk or dv."""
    PACKED: tl.constexpr = len(dmaps) == 1
    MAP: tl.constexpr = 0 if PACKED else which
    row_head = which * call.num_heads + head if PACKED else head
    store_dense(dmaps[MAP], values, at, row_head, call.map_heads, call, STATIC)


@triton.jit
def store_dpad(dpad, dk, dv, group, head, call, STATIC: tl.constexpr):
    """Store a program's sums of dk and dv over pad tokens in dpad (groups, 2, heads, HEAD_DIM)."""
    d = tl.arange(0, STATIC.BLOCK_D)
    at = (group.to(tl.int64) * 2 * call.num_heads + head) * STATIC.HEAD_DIM + d
    tl.store(dpad + at, dk, mask=d < STATIC.HEAD_DIM)
    tl.store(dpad + at + call.num_heads * STATIC.HEAD_DIM, dv, mask=d < STATIC.HEAD_DIM)


@triton.jit
def load_lse(data, number, head, token, call, STATIC: tl.constexpr):
    """Load lse or delta, (windows, heads, N), for tokens of window ``number``."""
    first = (number.to(tl.int64) * call.num_heads + head) * STATIC.VOLUME
    return tl.load(data + first + token, mask=token < STATIC.VOLUME, other=0.0)


@triton.jit
def store_lse(data, values, number, head, token, call, STATIC: tl.constexpr):
    first = (number.to(tl.int64) * call.num_heads + head) * STATIC.VOLUME
    tl.store(data + first + token, values, mask=token < STATIC.VOLUME)
