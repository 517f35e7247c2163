"""The kernels for the gradients of ``axis_tables`` and ``bias_table``, whose rows are shared by pairs of tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import coordinates, locate, split_window
from swinkernels.triton.window_attention.axis_tables import columns_met, product_rows
from swinkernels.triton.window_attention.call import Q, kernel
from swinkernels.triton.window_attention.gradients import add_product, excess_of, narrow
from swinkernels.triton.window_attention.rows import load_rows
from swinkernels.triton.window_attention.windows import first_window, next_of_type, window_of_type


@kernel
def bwd_axis_tables(
    call, dproducts, dtables, batch_windows, windows_per_program,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dR^T q, summed over groups of windows: (groups, heads, rows, HEAD_DIM).

    A program owns BLOCK_ROWS rows of the tables and walks over a group of windows, for one head.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    VOLUME: tl.constexpr = STATIC.VOLUME
    BLOCK_ROWS: tl.constexpr = STATIC.BLOCK_ROWS
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    HEAD_DIM: tl.constexpr = STATIC.HEAD_DIM
    AXIS_ROWS: tl.constexpr = STATIC.AXIS_ROWS
    ROWS: tl.constexpr = AXIS_ROWS[0] + AXIS_ROWS[1] + AXIS_ROWS[2]
    ROW_TILES: tl.constexpr = (ROWS + BLOCK_ROWS - 1) // BLOCK_ROWS
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    program = tl.program_id(0)
    head = program % call.num_heads
    row = program // call.num_heads % ROW_TILES * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    group = program // (call.num_heads * ROW_TILES)
    kind, first, count = first_window(group, batch_windows, windows_per_program, call)
    window = split_window(window_of_type(kind, first, call, STATIC), call.size, WINDOW)

    total = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for i in range(count):
        number = window_of_type(kind, first + i, call, STATIC)
        for start in range(0, VOLUME, BLOCK_Q):
            query = start + tl.arange(0, BLOCK_Q)
            q = load_rows(call, Q, locate(window, query, call, STATIC), head, STATIC)
            column, met = columns_met(query, row, STATIC)
            of_rows = tl.load(product_rows(dproducts, number, head, query, call, STATIC) + column, mask=met, other=0.0)
            excess = excess_of(of_rows, dtype)
            total = add_product(total, tl.trans(narrow(of_rows, excess, dtype)), q, excess, STATIC)
        window = next_of_type(window, kind, first + i + 1, call, STATIC)
    d = tl.arange(0, BLOCK_D)
    to = dtables + ((group.to(tl.int64) * call.num_heads + head) * ROWS + row)[:, None] * HEAD_DIM + d[None, :]
    tl.store(to, total, mask=(row < ROWS)[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _query_of(row, key, WINDOW: tl.constexpr, PAIRS: tl.constexpr):
    """Return, on one axis, the query coordinate paired with each row and key, (rows, keys); out of range if none is."""
    if PAIRS:
        query = tl.where((row // WINDOW)[:, None] == key[None, :], (row % WINDOW)[:, None], -1)
    else:
        query = key[None, :] + (row - (WINDOW - 1))[:, None]
    return query


@kernel
def fold_dbias(dbias, dbias_table, num_heads, STATIC: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """Fold dbias (heads, N, M) onto (rows, heads): sum it over the pairs of query and key that use each row.

    ``num_heads`` is the number of heads of all window types together.
    """
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    WINDOW: tl.constexpr = STATIC.TABLE_WINDOW
    KEY_WINDOW: tl.constexpr = STATIC.TABLE_KEY_WINDOW
    PAIRS: tl.constexpr = STATIC.TABLE_PAIRS
    ROWS: tl.constexpr = STATIC.TABLE_ROWS
    program = tl.program_id(0)
    head = program % num_heads
    row = program // num_heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    r0, r1, r2 = row // (ROWS[1] * ROWS[2]), row // ROWS[2] % ROWS[1], row % ROWS[2]
    dbias += head.to(tl.int64) * (VOLUME * KEY_VOLUME)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, KEY_VOLUME, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k0, k1, k2 = coordinates(key, KEY_WINDOW)
        q0 = _query_of(r0, k0, KEY_WINDOW[0], PAIRS[0])
        q1 = _query_of(r1, k1, KEY_WINDOW[1], PAIRS[1])
        q2 = _query_of(r2, k2, KEY_WINDOW[2], PAIRS[2])
        query = (q0 * WINDOW[1] + q1) * WINDOW[2] + q2
        paired = (q0 >= 0) & (q1 >= 0) & (q2 >= 0) & (q1 < WINDOW[1]) & (q2 < WINDOW[2])
        paired = paired & (query < VOLUME) & (key < KEY_VOLUME)[None, :]
        values = tl.load(dbias + query * KEY_VOLUME + key[None, :], mask=paired, other=0.0)
        total += tl.sum(values, axis=1)
    tl.store(dbias_table + row * num_heads + head, total, mask=row < ROWS[0] * ROWS[1] * ROWS[2])
