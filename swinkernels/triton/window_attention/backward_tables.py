"""The kernel of the gradient of ``axis_tables``."""

from __future__ import annotations

import triton.language as tl

from swinkernels.triton._window_address import locate, split_window
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
    """dR^T q: a program owns BLOCK_ROWS rows of the tables, walks over a group of windows of a head, and writes their
    sum, (groups, heads, rows, HEAD_DIM).
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
