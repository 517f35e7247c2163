"""The Triton kernels of patch merging: the gather of neighbouring tokens and the layer norm over them, in one pass.

Maths     u = concat of K runs of C columns, one neighbour of a merged token each (zeros outside the map), L = K C;
          mean and variance of u, two passes over registers; z = (u - mean) rstd weight + bias. Backward, with
          h = (u - mean) rstd, g = dz weight: du = rstd (g - mean(g) - h mean(g h)), dweight = sum of dz h,
          dbias = sum of dz, over all tokens.
Tiling    a program holds ROWS merged tokens in registers. A token's L columns, rounded up to a power of two (padding
          each neighbour's channels would waste as much: K is a power of two), are cut into PARTS of WIDTH: row i of
          the tile (PARTS * ROWS, WIDTH) is part i // ROWS of merged token i % ROWS. Warps take the tile's rows in turn,
          so with accesses of 16 bytes and up to L = 512 a merged token belongs to one warp, and its sums need no
          barrier. The columns of a backward program are in the order of the map instead of the runs, so that each
          neighbour's gradient is written once, even if the neighbour is in two runs or in none.
Order     a program processes every PROGRAMS-th tile. Its columns and parameters are the same in all its tiles, and its
          rows advance with carries instead of divisions. A backward program sums its share of dweight and dbias in
          registers, and sum_shares adds the shares. The number of backward programs is the same on every GPU, and so
          is the order of the sums.
Traffic   forward reads x and writes z, backward reads x and dz and writes dx, each once. Each backward program also
          writes its share of dweight and dbias.
Roofline  memory bound. B=128, 56x56, C=96, bf16: forward 154 MB, 46 us, backward 231 MB, 69 us at 3.35 TB/s (H100 SXM,
          published peak).
Limits    L of at most 8192, at most 2^30 merged tokens in a call, no neighbour in more than two runs.

VEC is the number of elements in each 16-byte write of a lane. max_contiguous limits reads to VEC elements:
otherwise, if half precision is read and float32 written, Triton lets a lane read 16 bytes at a time,
and exchanges the tile between lanes. The map's strides are (batch, axis 0, axis 1, axis 2) in units of ALIGN elements,
which tells the compiler the alignment of addresses. A merged token is a window of FACTOR tokens. Tables with four bits
per entry, 64 bits in all, replace tuples, which a lane cannot index: RUNS contains the neighbour in each run of C
channels; FIRST and SECOND contain the first and second run of each neighbour, or NO_RUN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import Place, Window, dense_row, split_window

NO_RUN = 15
_NO_RUN = tl.constexpr(NO_RUN)
_SHARES = tl.constexpr(128)  # shares that sum_shares loads at a time

kernel = triton.jit(do_not_specialize=["rows"])  # otherwise a new batch size could trigger a recompilation


# ---- positions of rows and columns -----------------------------------------------------------------------------------


@triton.jit
def _entry(table: tl.constexpr, i):
    return ((table >> (i.to(tl.int64) * 4)) & 15).to(tl.int32)


@triton.jit
def _offsets(neighbour, FACTOR: tl.constexpr):
    """Return the offset of ``neighbour``, a row-major index, on each axis."""
    return neighbour // (FACTOR[1] * FACTOR[2]), neighbour // FACTOR[2] % FACTOR[1], neighbour % FACTOR[2]


@triton.jit
def _columns(PARTS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    part = tl.arange(0, PARTS * ROWS) // ROWS
    return part[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _advance(window, step, size, FACTOR: tl.constexpr):
    """Return ``window`` advanced by ``step``. Carries replace divisions, which every lane would execute."""
    num0, num1, num2 = tl.cdiv(size[0], FACTOR[0]), tl.cdiv(size[1], FACTOR[1]), tl.cdiv(size[2], FACTOR[2])
    n2 = window.n2 + step[3]
    carry = n2 >= num2
    n2 = tl.where(carry, n2 - num2, n2)
    n1 = window.n1 + (step[2] + carry.to(tl.int32))
    carry = n1 >= num1
    n1 = tl.where(carry, n1 - num1, n1)
    n0 = window.n0 + (step[1] + carry.to(tl.int32))
    carry = n0 >= num0
    n0 = tl.where(carry, n0 - num0, n0)
    return Window(window.image + step[0] + carry.to(tl.int32), n0, n1, n2)


@triton.jit
def _in_map(
    row, rows, origin, o0, o1, o2, column, size,
    LENGTH: tl.constexpr, HAS_PADDING: tl.constexpr,
):  # fmt: skip
    """Return a mask of the tile's elements that are in the map."""
    real = (row < rows)[:, None] & (column < LENGTH)
    if HAS_PADDING:
        real = real & (origin.y0[:, None] + o0 < size[0])
        real = real & (origin.y1[:, None] + o1 < size[1])
        real = real & (origin.y2[:, None] + o2 < size[2])
    return real


@triton.jit
def _strided(y0, y1, y2, strides):
    """Return the offset of a token in its image, in units of ALIGN elements."""
    return y0.to(tl.int64) * strides[1] + y1.to(tl.int64) * strides[2] + y2.to(tl.int64) * strides[3]


@triton.jit
def _origin(window, FACTOR: tl.constexpr):
    """Return the position in the map of the first neighbour of each merged token."""
    return Place(window.image, window.n0 * FACTOR[0], window.n1 * FACTOR[1], window.n2 * FACTOR[2])


@triton.jit
def _strided_row(at, strides):
    """Return the offset of a token in the strided map x, in units of ALIGN elements."""
    return at.image.to(tl.int64) * strides[0] + _strided(at.y0, at.y1, at.y2, strides)


@triton.jit
def _tile_rows(first, PARTS: tl.constexpr, ROWS: tl.constexpr):
    """Return the index of the merged token to which each row of the tile at token ``first`` belongs."""
    return first + tl.arange(0, PARTS * ROWS) % ROWS


@triton.jit
def _by_part(tile, PARTS: tl.constexpr):
    return tl.reshape(tile, (PARTS, tile.shape[0] // PARTS, tile.shape[1]))


@triton.jit
def _for_each_part(total, PARTS: tl.constexpr):
    """Repeat ``total``, one value per merged token, for all rows of the tile."""
    return tl.reshape(tl.broadcast_to(total[None, :], (PARTS, total.shape[0])), (PARTS * total.shape[0],))


@triton.jit
def _row_sum(tile, PARTS: tl.constexpr):
    return _for_each_part(tl.sum(tl.sum(_by_part(tile, PARTS), axis=0), axis=1), PARTS)


@triton.jit
def _row_sums(a, b, PARTS: tl.constexpr):
    """Compute the row sums of two tiles together: if rows span several warps, the warps exchange data only once."""
    in_lanes = tl.join(tl.sum(_by_part(a, PARTS), axis=0), tl.sum(_by_part(b, PARTS), axis=0))
    a, b = tl.split(tl.sum(in_lanes, axis=1))
    return _for_each_part(a, PARTS), _for_each_part(b, PARTS)


# ---- forward ---------------------------------------------------------------------------------------------------------


@kernel
def fwd(
    x, weight, bias, z, mean, rstd, eps, rows, size, strides, step,
    CHANNELS: tl.constexpr, FACTOR: tl.constexpr, RUNS: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr,
    WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, HAS_PADDING: tl.constexpr, PROGRAMS: tl.constexpr,
):  # fmt: skip
    LENGTH: tl.constexpr = FACTOR[0] * FACTOR[1] * FACTOR[2] * CHANNELS
    column = _columns(PARTS, ROWS, WIDTH)
    o0, o1, o2 = _offsets(_entry(RUNS, column // CHANNELS), FACTOR)
    offset = _strided(o0, o1, o2, strides) * ALIGN + column % CHANNELS
    if weight is not None:
        w = tl.load(weight + column, mask=column < LENGTH, other=0.0).to(tl.float32)
    if bias is not None:
        b = tl.load(bias + column, mask=column < LENGTH, other=0.0).to(tl.float32)
    row = _tile_rows(tl.program_id(0) * ROWS, PARTS, ROWS)
    window = split_window(row, size, FACTOR)

    for _ in range(tl.program_id(0) * ROWS, rows, PROGRAMS * ROWS):
        origin = _origin(window, FACTOR)
        real = _in_map(row, rows, origin, o0, o1, o2, column, size, LENGTH, HAS_PADDING)
        token = _strided_row(origin, strides)
        at = (token * ALIGN)[:, None] + offset
        if CHANNELS % VEC == 0:
            at = tl.max_contiguous(at, (1, VEC))
        u = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        centre = _row_sum(u, PARTS) / LENGTH
        u = tl.where(column < LENGTH, u - centre[:, None], 0.0)
        scale = tl.rsqrt(_row_sum(u * u, PARTS) / LENGTH + eps)
        u *= scale[:, None]
        if weight is not None:
            u *= w
        if bias is not None:
            u += b
        there = (row < rows)[:, None] & (column < LENGTH)
        tl.store(z + (row.to(tl.int64) * LENGTH)[:, None] + column, u.to(z.dtype.element_ty), mask=there)
        once = (row < rows) & (tl.arange(0, PARTS * ROWS) < ROWS)
        tl.store(mean + row, centre, mask=once)
        tl.store(rstd + row, scale, mask=once)
        row += PROGRAMS * ROWS
        window = _advance(window, step, size, FACTOR)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _load_run(data, run, channel, has, CHANNELS: tl.constexpr):
    """Load a parameter at the columns of a backward tile; the value is zero at columns that are in no run."""
    return tl.load(data + run * CHANNELS + channel, mask=has, other=0.0).to(tl.float32)


@triton.jit
def _load_dz(
    dz, row, rows, run, channel, has, LENGTH: tl.constexpr, CHANNELS: tl.constexpr, VEC: tl.constexpr
):  # fmt: skip
    at = (row.to(tl.int64) * LENGTH)[:, None] + (run * CHANNELS + channel)
    if CHANNELS % VEC == 0:
        at = tl.max_contiguous(at, (1, VEC))
    return tl.load(dz + at, mask=(row < rows)[:, None] & has, other=0.0)


@triton.jit
def _store_share(
    share, tile, RUNS: tl.constexpr, CHANNELS: tl.constexpr, LENGTH: tl.constexpr, PARTS: tl.constexpr
):  # fmt: skip
    """Sum ``tile`` over its merged tokens and store the result in ``share``, at the columns given by RUNS."""
    total = tl.sum(_by_part(tile, PARTS), axis=1)
    column = _columns(PARTS, 1, tile.shape[1])
    run = _entry(RUNS, column // CHANNELS)
    tl.store(share + run * CHANNELS + column % CHANNELS, total, mask=(column < LENGTH) & (run != _NO_RUN))


@triton.jit
def _sum_of_columns(shares, programs, column, LENGTH: tl.constexpr):
    share = tl.arange(0, _SHARES)
    total = tl.zeros([_SHARES, column.shape[0]], tl.float32)
    for first in range(0, programs, _SHARES):
        there = (first + share < programs)[:, None] & (column < LENGTH)[None, :]
        at = (first + share).to(tl.int64)[:, None] * LENGTH + column[None, :]
        total += tl.load(shares + at, mask=there, other=0.0)
    return tl.sum(total, axis=0)


@kernel
def bwd(
    dz, x, weight, mean, rstd, dx, dweight_shares, dbias_shares, rows, size, strides, step,
    CHANNELS: tl.constexpr, FACTOR: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, VEC: tl.constexpr, ALIGN: tl.constexpr, HAS_PADDING: tl.constexpr,
    PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Compute dx and each program's share of dweight and dbias, (programs, L).

    ``dweight_shares`` and ``dbias_shares`` may be None. SECOND is None if no neighbour is in two runs.
    """
    LENGTH: tl.constexpr = FACTOR[0] * FACTOR[1] * FACTOR[2] * CHANNELS
    program = tl.program_id(0)
    column = _columns(PARTS, ROWS, WIDTH)
    neighbour = column // CHANNELS
    channel = column % CHANNELS
    o0, o1, o2 = _offsets(neighbour, FACTOR)
    offset = _strided(o0, o1, o2, strides) * ALIGN + channel
    dense_offset = ((o0.to(tl.int64) * size[1] + o1) * size[2] + o2) * CHANNELS + channel
    run = _entry(FIRST, neighbour)
    has = (column < LENGTH) & (run != _NO_RUN)
    if SECOND is not None:
        run2 = _entry(SECOND, neighbour)
        has2 = (column < LENGTH) & (run2 != _NO_RUN)
        held = has.to(tl.float32) + has2.to(tl.float32)  # number of runs that contain this element
    if weight is not None:
        w = _load_run(weight, run, channel, has, CHANNELS)
        if SECOND is not None:
            w2 = _load_run(weight, run2, channel, has2, CHANNELS)
    if dweight_shares is not None:
        dweight = tl.zeros([PARTS * ROWS, WIDTH], tl.float32)
        dweight2 = tl.zeros([PARTS * ROWS, WIDTH], tl.float32) if SECOND is not None else None
    if dbias_shares is not None:
        dbias = tl.zeros([PARTS * ROWS, WIDTH], tl.float32)
        dbias2 = tl.zeros([PARTS * ROWS, WIDTH], tl.float32) if SECOND is not None else None

    row = _tile_rows(program * ROWS, PARTS, ROWS)
    window = split_window(row, size, FACTOR)

    for _ in range(program * ROWS, rows, PROGRAMS * ROWS):
        origin = _origin(window, FACTOR)
        real = _in_map(row, rows, origin, o0, o1, o2, column, size, LENGTH, HAS_PADDING)
        token = _strided_row(origin, strides)
        u = tl.load(x + (token * ALIGN)[:, None] + offset, mask=real, other=0.0).to(tl.float32)
        centre = tl.load(mean + row, mask=row < rows, other=0.0)
        scale = tl.load(rstd + row, mask=row < rows, other=0.0)[:, None]
        d = _load_dz(dz, row, rows, run, channel, has, LENGTH, CHANNELS, VEC).to(tl.float32)
        h = (u - centre[:, None]) * scale
        g = d * w if weight is not None else d
        if SECOND is not None:
            d2 = _load_dz(dz, row, rows, run2, channel, has2, LENGTH, CHANNELS, VEC).to(tl.float32)
            g += d2 * w2 if weight is not None else d2
        if dweight_shares is not None:
            dweight += d * h
            if SECOND is not None:
                dweight2 += d2 * h
        if dbias_shares is not None:
            dbias += d
            if SECOND is not None:
                dbias2 += d2
        constant, slope = _row_sums(g, g * h, PARTS)
        common = scale * (constant / LENGTH)[:, None] + h * (scale * (slope / LENGTH)[:, None])
        if SECOND is not None:
            common *= held
        dx_at = (dense_row(origin, size) * CHANNELS)[:, None] + dense_offset
        tl.store(dx + dx_at, (scale * g - common).to(dx.dtype.element_ty), mask=real)
        row += PROGRAMS * ROWS
        window = _advance(window, step, size, FACTOR)

    share = program.to(tl.int64) * LENGTH
    if dweight_shares is not None:
        _store_share(dweight_shares + share, dweight, FIRST, CHANNELS, LENGTH, PARTS)
        if SECOND is not None:
            _store_share(dweight_shares + share, dweight2, SECOND, CHANNELS, LENGTH, PARTS)
    if dbias_shares is not None:
        _store_share(dbias_shares + share, dbias, FIRST, CHANNELS, LENGTH, PARTS)
        if SECOND is not None:
            _store_share(dbias_shares + share, dbias2, SECOND, CHANNELS, LENGTH, PARTS)


@triton.jit(do_not_specialize=["programs"])
def sum_shares(dweight_shares, dbias_shares, dweight, dbias, programs, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """Sum the programs' shares (programs, L) of dweight and of dbias to (L,); either may be None."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if dweight is not None:
        tl.store(dweight + column, _sum_of_columns(dweight_shares, programs, column, LENGTH), mask=column < LENGTH)
    if dbias is not None:
        tl.store(dbias + column, _sum_of_columns(dbias_shares, programs, column, LENGTH), mask=column < LENGTH)
