"""Named tuples with the arguments that all kernels of window attention share."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
Q = tl.constexpr(0)
K = tl.constexpr(1)
V = tl.constexpr(2)

# Triton compiles variants of a kernel for integers that are 1 or a multiple of 16. Arguments that vary with the batch
# are exempt, because a new batch size could trigger a recompilation. Elements of tuples cannot be exempted, which helps
# here: 2D kernels are compiled without the axis of size 1, and maps of new sizes add a few variants at most.
kernel = triton.jit(do_not_specialize=["batch_windows", "windows_per_program"])


class Call(NamedTuple):
    """The arguments of a call that are passed to the kernels at launch.

    Their order matters: with the strides or the tables first, ptxas uses more instructions or registers.
    """

    maps: Any  # q, k and v, or one map of all three
    num_heads: Any
    type_windows: Any  # windows of each type per image, or None for a single type
    size: Any
    roll: Any  # the shift; with ROLL_THEN_PAD, modulo the map's size
    before: Any  # number of pad tokens before the data, per axis
    cut: Any  # per axis, the first token beyond the shift's seam; the window size if nothing is masked
    strides: Any  # per map: batch, axes 0 to 2, head and, if q, k and v are one map, part; in units of ALIGN elements
    map_heads: Any  # heads in a token's row of a map: three times num_heads if q, k and v are one map
    bias_table: Any
    table_columns: Any  # number of columns of bias_table, num_heads per window type; None for one type
    dense_bias: Any
    axis_tables: Any
    logit_scale: Any
    pad_qkv: Any
    region_map: Any
    dropout_seed: Any
    scale: Any
    unit_scale: Any  # scale times UNIT
    unit_mask: Any  # the mask's value times UNIT
    drop_below: Any  # pairs with a random number below this bound are dropped
    keep_scale: Any


class Static(NamedTuple):
    """The arguments of a call that are constants of the compiled kernels.

    Before Triton 3.8 a field is a plain number or tuple in a kernel. It must be assigned to a separate ``tl.constexpr``
    before it is passed to another function or put into a list.
    """

    WINDOW: Any
    VOLUME: Any  # tokens of a window
    KEY_WINDOW: Any  # the keys' window, with the same centre
    KEY_VOLUME: Any
    HAS_KEY_WINDOW: Any  # True if KEY_WINDOW is larger than WINDOW
    TABLE_WINDOW: Any  # the window that gives query coordinates for bias_table
    TABLE_KEY_WINDOW: Any  # the window that gives key coordinates for bias_table
    TABLE_ROWS: Any  # rows of bias_table on each axis
    TABLE_PAIRS: Any  # per axis, True if bias_table has a row for each pair of coordinates
    AXIS_COLUMNS: Any  # per axis, number of columns of A: the window size, or 0 without axis_tables
    AXIS_ROWS: Any  # per axis, number of rows of its table, or 0 without axis_tables
    BLOCK_COLUMNS: Any  # the columns of all axes, padded to a power of two
    BLOCK_ROWS: Any  # rows of axis_tables processed at a time
    HEAD_DIM: Any
    BLOCK_D: Any  # HEAD_DIM, padded to a power of two
    ALIGN: Any  # unit of the strides, in elements; it tells the compiler the alignment of addresses
    ROLL_THEN_PAD: Any
    GRID: Any
    HAS_PADDING: Any
    HAS_MASK: Any
    PRECISION: Any
    # The kernels' scores are multiplied by UNIT: log2(e), for exp2, or 1 with float32 maps, because rounding a large
    # bias times log2(e) would exceed the error budget of float32.
    UNIT: Any
