"""The decomposed relative position of SAM and ViTDet: ``axis_tables``.

Maths     score(i, j) += sum over axes a of q_i . table_a[i_a - j_a + window_a - 1], with q unscaled. The tables of all
          axes are stacked. A column c is a coordinate of a key on one axis; the columns of all axes are concatenated.
          A[i, c] = q_i . table[row(i, c)] is (N, sum of the window's sizes), with 28 columns at SAM's window 14, and
          the bias is A E, where E[c, j] is one if key j has coordinate c, else zero. Backward: dA = dS E^T; with
          dR[i, r] = dA[i, c] for row(i, c) = r: dq += dR table, and dtable = dR^T q, summed over windows and heads.
Steps     A query tile is multiplied by all rows of the tables once, and a gather along each row picks A from the
          products; every tile of keys then needs one more matrix product. The bias itself is never in memory. The
          backward pass stores A for the kernel of dk and dv, and dA for the kernel of the tables' gradients.
Rounding  The tables and A are float32. With 16-bit maps each value is split into two numbers of the map's dtype, whose
          sum has twice the precision; in float16 the values are first divided by a factor that brings them into range.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from swinkernels.triton._window_address import coordinates
from swinkernels.triton.window_attention.gradients import add_product, excess_of, narrow


class Split(NamedTuple):
    """A float32 tile, stored as factor * (high + low) in two 16-bit tiles; if the maps are float32, just ``high``."""

    high: Any
    low: Any
    factor: Any


@triton.jit
def _split(x, dtype: tl.constexpr):
    excess = excess_of(x, dtype)
    factor = 1.0 if excess is None else excess
    if dtype == tl.float32:
        high = x
        low = 0.0
    else:
        scaled = x if excess is None else x * (1.0 / excess)
        high = scaled.to(dtype)
        low = (scaled - high.to(tl.float32)).to(dtype)
    return Split(high, low, factor)


@triton.jit
def _add_split(total, a, b, STATIC: tl.constexpr):
    """Return total + a b, where a is a Split."""
    if b.dtype == tl.float32:
        total = tl.dot(a.high, b, total, input_precision=STATIC.PRECISION)
    elif b.dtype == tl.float16:
        total += tl.dot(a.low, b, tl.dot(a.high, b)) * a.factor
    else:
        total = tl.dot(a.low, b, tl.dot(a.high, b, total))
    return total


@triton.jit
def _row_and_column(query, at, OF_AXIS: tl.constexpr, STATIC: tl.constexpr):
    """Return, for each query, column + row(query, column), which is the same for all columns of an axis.

    ``at`` contains rows or columns, of which each axis has OF_AXIS. The result is (queries, len(at)).
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    COLUMNS: tl.constexpr = STATIC.AXIS_COLUMNS
    ROWS: tl.constexpr = STATIC.AXIS_ROWS
    t0, t1, t2 = coordinates(query, WINDOW)
    of_0 = t0 + (COLUMNS[0] - 1)
    of_1 = t1 + (ROWS[0] + COLUMNS[0] + COLUMNS[1] - 1)
    of_2 = t2 + (ROWS[0] + ROWS[1] + COLUMNS[0] + COLUMNS[1] + COLUMNS[2] - 1)
    later = tl.where((at < OF_AXIS[0] + OF_AXIS[1])[None, :], of_1[:, None], of_2[:, None])
    return tl.where((at < OF_AXIS[0])[None, :], of_0[:, None], later)


@triton.jit
def _rows_met(query, column, STATIC: tl.constexpr):
    """Return the table row for each query and column, and a mask of the rows that exist: (queries, columns)."""
    COLUMNS: tl.constexpr = STATIC.AXIS_COLUMNS
    row = _row_and_column(query, column, COLUMNS, STATIC) - column[None, :]
    met = (query < STATIC.VOLUME)[:, None] & (column < COLUMNS[0] + COLUMNS[1] + COLUMNS[2])[None, :]
    return row, met


@triton.jit
def columns_met(query, row, STATIC: tl.constexpr):
    """Return the column for each query and table row, and a mask of the columns that exist: (queries, rows)."""
    COLUMNS: tl.constexpr = STATIC.AXIS_COLUMNS
    ROWS: tl.constexpr = STATIC.AXIS_ROWS
    column = _row_and_column(query, row, ROWS, STATIC) - row[None, :]
    later = row >= ROWS[0] + ROWS[1]
    first = tl.where(row < ROWS[0], 0, tl.where(later, COLUMNS[0] + COLUMNS[1], COLUMNS[0]))
    count = tl.where(row < ROWS[0], COLUMNS[0], tl.where(later, COLUMNS[2], COLUMNS[1]))
    met = (query < STATIC.VOLUME)[:, None] & (row < ROWS[0] + ROWS[1] + ROWS[2])[None, :]
    return column, met & (column >= first[None, :]) & (column < (first + count)[None, :])


@triton.jit
def _load_tables(row, call, STATIC: tl.constexpr):
    """Load rows of the tables; rows beyond the last are zero."""
    ROWS: tl.constexpr = STATIC.AXIS_ROWS
    d = tl.arange(0, STATIC.BLOCK_D)
    mask = (row < ROWS[0] + ROWS[1] + ROWS[2])[:, None] & (d < STATIC.HEAD_DIM)[None, :]
    return tl.load(call.axis_tables + row[:, None] * STATIC.HEAD_DIM + d[None, :], mask=mask, other=0.0)


@triton.jit
def _has_coordinate(key, dtype: tl.constexpr, STATIC: tl.constexpr):
    """Return E for a tile of keys: (columns, keys)."""
    WINDOW: tl.constexpr = STATIC.WINDOW
    COLUMNS: tl.constexpr = STATIC.AXIS_COLUMNS
    column = tl.arange(0, STATIC.BLOCK_COLUMNS)[:, None]
    t0, t1, t2 = coordinates(key, WINDOW)
    of_0 = (column == t0[None, :]) & (column < COLUMNS[0])
    of_1 = column == (t1 + COLUMNS[0])[None, :]
    of_2 = column == (t2 + (COLUMNS[0] + COLUMNS[1]))[None, :]
    return (of_0 | of_1 | of_2).to(dtype)


@triton.jit
def axis_products(q, query, call, STATIC: tl.constexpr):
    """Return A times UNIT for a tile of queries: (queries, columns)."""
    BLOCK_COLUMNS: tl.constexpr = STATIC.BLOCK_COLUMNS
    BLOCK_ROWS: tl.constexpr = STATIC.BLOCK_ROWS
    ROWS: tl.constexpr = STATIC.AXIS_ROWS
    row, met = _rows_met(query, tl.arange(0, BLOCK_COLUMNS), STATIC)
    total = tl.zeros([query.shape[0], BLOCK_COLUMNS], tl.float32)
    for start in range(0, ROWS[0] + ROWS[1] + ROWS[2], BLOCK_ROWS):
        tables = _split(_load_tables(start + tl.arange(0, BLOCK_ROWS), call, STATIC), q.dtype)
        none = tl.zeros([BLOCK_ROWS, query.shape[0]], tl.float32)
        of_rows = tl.trans(_add_split(none, tables, tl.trans(q), STATIC))
        here = met & (row >= start) & (row < start + BLOCK_ROWS)
        total += tl.where(here, tl.gather(of_rows, tl.where(here, row - start, 0), 1), 0.0)
    return total * STATIC.UNIT


@triton.jit
def split_products(products, call):
    return _split(products, call.maps[0].dtype.element_ty)


@triton.jit
def add_axis_bias(bias, products, key, call, STATIC: tl.constexpr):
    """Add A E to the bias of a tile, both times UNIT; ``products`` is the result of split_products."""
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    return _add_split(bias, products, _has_coordinate(key, dtype, STATIC), STATIC)


@triton.jit
def add_dproducts(total, dscores, excess, key, STATIC: tl.constexpr):
    """Add a tile's dS E^T to dA. ``dscores`` is dS divided by ``excess``, as returned by ``narrow``."""
    return add_product(total, dscores, tl.trans(_has_coordinate(key, dscores.dtype, STATIC)), excess, STATIC)


@triton.jit
def add_axis_query_gradient(dq, dproducts, query, call, STATIC: tl.constexpr):
    """Add the product of dR and the tables to dq; ``dproducts`` is dA."""
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    BLOCK_ROWS: tl.constexpr = STATIC.BLOCK_ROWS
    ROWS: tl.constexpr = STATIC.AXIS_ROWS
    for start in range(0, ROWS[0] + ROWS[1] + ROWS[2], BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)
        column, met = columns_met(query, row, STATIC)
        of_rows = tl.where(met, tl.gather(dproducts, tl.where(met, column, 0), 1), 0.0)
        excess = excess_of(of_rows, dtype)
        tables = _split(tl.trans(_load_tables(row, call, STATIC)), dtype)
        none = tl.zeros([dq.shape[1], dq.shape[0]], tl.float32)
        share = tl.trans(_add_split(none, tables, tl.trans(narrow(of_rows, excess, dtype)), STATIC))
        dq += share if excess is None else share * excess
    return dq


@triton.jit
def product_rows(data, number, head, token, call, STATIC: tl.constexpr):
    """Return the addresses of the rows of tokens in ``data``, which is A or dA: (windows, heads, N, columns)."""
    COLUMNS: tl.constexpr = STATIC.AXIS_COLUMNS
    row = (number.to(tl.int64) * call.num_heads + head) * STATIC.VOLUME + token
    return data + row[:, None] * (COLUMNS[0] + COLUMNS[1] + COLUMNS[2])


@triton.jit
def load_products(data, number, head, token, call, STATIC: tl.constexpr):
    column = tl.arange(0, STATIC.BLOCK_COLUMNS)
    _, met = _rows_met(token, column, STATIC)
    return tl.load(product_rows(data, number, head, token, call, STATIC) + column[None, :], mask=met, other=0.0)


@triton.jit
def store_products(data, values, number, head, token, call, STATIC: tl.constexpr):
    column = tl.arange(0, STATIC.BLOCK_COLUMNS)
    _, met = _rows_met(token, column, STATIC)
    tl.store(product_rows(data, number, head, token, call, STATIC) + column[None, :], values, mask=met)
