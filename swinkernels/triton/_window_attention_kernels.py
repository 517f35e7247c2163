"""The Triton kernels of window attention, 2D as 3D with a leading axis of one token.

Maths     S = scale q k^T + bias + mask, P = softmax(S), out = P v, lse = log sum exp S, per window and head. Backward,
          with P recomputed from lse: dv = P^T dout, dP = dout v^T, delta = rowsum(P dP), dS = P (dP - delta),
          dq = scale dS k, dk = scale dS^T q, dbias = dS summed over windows, folded onto the table's rows. In float32
          and float16 delta is rowsum(P dP) / rowsum(P): lse is rounded, so that P sums to one only nearly, and what is
          left over would have one sign in all of a row's dS. bfloat16 rounds off more than that.
Range     float16 results are finite where the exact ones are: sums and softmax are in float32, P is at most one, and dS
          enters its products divided by what brings it into range. P's relative error is about |lse| * 2^-22.
Cosine    v2, where logit_scale is not None: with u = q / |q|, w = k / |k| and f = exp(min(logit_scale, ln 100)), the
          first term of S is f q k^T / |q| |k|: products of q and k as they are, divided in float32, since f would
          multiply the error of rounded unit vectors. Backward: du = f dS w, dq = (du - u (u du)) / |q|, likewise k, and
          dlogit_scale = sum of dS f u w, in float32.
Dropout   out = (D P) v with D = 0 or 1 / (1 - p), so that dv = (D P)^T dout and dP = D (dout v^T); D comes from Philox
          with the key dropout_seed, a number in the GPU's memory, and is drawn again in the backward pass.
Tiling    N <= 64: a program owns one head and walks over several windows; a window is one tile, the bias and dbias
          tiles stay in registers from window to window. N > 64: query tiles by key tiles, a program per tile row,
          online softmax; backward in three kernels (dq and delta; dk and dv; dbias), none of which needs atomics.
Order     the head varies fastest over programs: neighbours read neighbouring parts of the same token rows, so that
          whole cache lines are used even where a head's row is half a line. The windows that a program walks over are
          of one type, image by image, where types of windows have a bias each.
Bias      gathered from the table in the kernel. The table (2 KB at window 7 and 3 heads) lives in L1; a dense fp32
          (heads, N, N) bias made of it would cost one more launch. One that is given is read as it is.
Traffic   forward 4 and backward 7 maps of B * S * C elements, each read or written once (N <= 64; backward of v2 reads
          q and k twice, from the cache). Sums over windows: a dbias of each program, 16 MB at most and one more.
Limits    N <= 1024; windows of a call below 2^31; sizes of tiles are powers of two, which at window 7 costs 64/49.

A map is (pointer, strides): strides = (batch, axis 0, axis 1, axis 2, head) in units of ALIGN elements, so that the
compiler knows how far addresses are aligned without being recompiled for every stride. ``roll`` is the shift as it
enters the addresses, ``cut`` the first token of an axis beyond the shift's seam (the window size where nothing is
masked). Scores are kept times log2(e), for exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import coordinates, dense_row, locate, next_window, split_window

LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)
_LN_2 = tl.constexpr(0.6931471805599453)
_LN_100 = tl.constexpr(4.605170185988092)
_LARGEST_INVERSE = tl.constexpr(1e12)
_LOWEST = tl.constexpr(-3.0e38)  # of a finite score

# Numbers that vary with the batch: specialised (on being 1, on being a multiple of 16), every batch size could
# recompile. Triton specialises the elements of tuples in any case. That is welcome: 2D, with its axis of size 1, is
# compiled without that axis, and maps of new sizes add a few variants at most.
_BATCH_INTEGERS = [
    "batch_windows",
    "windows_per_program",
    "type_windows",
    "drop_below",
    "num_heads",
    "packed_offset",
    "grad_row_heads",
    "grad_head_offset",
]
kernel = triton.jit(do_not_specialize=_BATCH_INTEGERS)


# ---- where tokens are ------------------------------------------------------------------------------------------------


@triton.jit
def _table_position(token, TABLE_WINDOW: tl.constexpr):
    """r(t): the bias of query i and key j is row r(i) - r(j) + r_max of the table."""
    t0, t1, t2 = coordinates(token, TABLE_WINDOW)
    return (t0 * (2 * TABLE_WINDOW[1] - 1) + t1) * (2 * TABLE_WINDOW[2] - 1) + t2


@triton.jit
def _beyond_seam(token, cut, WINDOW: tl.constexpr):
    """A bit per axis: the token is beyond the shift's seam, if its window has the seam. The same for all windows."""
    t0, t1, t2 = coordinates(token, WINDOW)
    bits = (t0 >= cut[0]).to(tl.int32) + (t1 >= cut[1]).to(tl.int32) * 2
    return bits + (t2 >= cut[2]).to(tl.int32) * 4


@triton.jit
def _seams(n0, n1, n2, size, cut, region_map, WINDOW: tl.constexpr):
    """A bit per axis: the window has the seam, which only the last one of an axis does. Zero: nothing to mask."""
    if region_map is not None:
        bits = n0 * 0 + 1
    else:
        bits = ((n0 == tl.cdiv(size[0], WINDOW[0]) - 1) & (cut[0] < WINDOW[0])).to(tl.int32)
        bits += ((n1 == tl.cdiv(size[1], WINDOW[1]) - 1) & (cut[1] < WINDOW[1])).to(tl.int32) * 2
        bits += ((n2 == tl.cdiv(size[2], WINDOW[2]) - 1) & (cut[2] < WINDOW[2])).to(tl.int32) * 4
    return bits


@triton.jit
def _region(n0, n1, n2, token, beyond, seams, size, region_map, WINDOW: tl.constexpr, GRID: tl.constexpr):
    """The region of tokens; tokens of a window that differ in it are masked."""
    if region_map is None:
        region = beyond & seams
    else:
        t0, t1, t2 = coordinates(token, WINDOW)
        num0, num1, num2 = tl.cdiv(size[0], WINDOW[0]), tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
        g0 = t0 * num0 + n0 if GRID else n0 * WINDOW[0] + t0
        g1 = t1 * num1 + n1 if GRID else n1 * WINDOW[1] + t1
        g2 = t2 * num2 + n2 if GRID else n2 * WINDOW[2] + t2
        at = (g0.to(tl.int64) * (num1 * WINDOW[1]) + g1) * (num2 * WINDOW[2]) + g2
        region = tl.load(region_map + at, mask=token < WINDOW[0] * WINDOW[1] * WINDOW[2], other=0)
    return region


# ---- the windows of a program ----------------------------------------------------------------------------------------


@triton.jit
def _windows_of_image(size, WINDOW: tl.constexpr):
    return tl.cdiv(size[0], WINDOW[0]) * tl.cdiv(size[1], WINDOW[1]) * tl.cdiv(size[2], WINDOW[2])


@triton.jit
def _type_of(window, type_windows, size, WINDOW: tl.constexpr):
    """The type of a window of the batch. An image has ``type_windows`` of a type, or None: all are of one."""
    return 0 if type_windows is None else window % _windows_of_image(size, WINDOW) // type_windows


@triton.jit
def _window_of_type(kind, i, type_windows, size, WINDOW: tl.constexpr):
    """The number in the batch of the i-th window of a type."""
    if type_windows is not None:
        image = i // type_windows
        i = image * _windows_of_image(size, WINDOW) + kind * type_windows + i % type_windows
    return i


@triton.jit
def _first_window(group, batch_windows, windows_per_program, type_windows):
    """Type and first window, and how many there are, of a group of windows of one type. batch_windows: those of one."""
    if type_windows is not None:
        groups = tl.cdiv(batch_windows, windows_per_program)
        kind, group = group // groups, group % groups
    else:
        kind = 0
    first = group * windows_per_program
    return kind, first, tl.minimum(windows_per_program, batch_windows - first)


@triton.jit
def _next_of_type(image, n0, n1, n2, kind, i, type_windows, size, WINDOW: tl.constexpr):
    """Image and window coordinates of the i-th window of a type, those of the one before being given."""
    if type_windows is None:
        image, n0, n1, n2 = next_window(image, n0, n1, n2, size, WINDOW)
    else:
        image, n0, n1, n2 = split_window(_window_of_type(kind, i, type_windows, size, WINDOW), size, WINDOW)
    return image, n0, n1, n2


# ---- reading and writing rows ----------------------------------------------------------------------------------------


@triton.jit
def _load_rows(
    data, offset, strides, image, head, y0, y1, y2, real,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One head's rows of a map at the given coordinates, zero where not real."""
    base = image.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[4] + offset
    row = y0.to(tl.int64) * strides[1] + y1.to(tl.int64) * strides[2] + y2.to(tl.int64) * strides[3]
    d = tl.arange(0, BLOCK_D)
    return tl.load(
        data + base * ALIGN + (row * ALIGN)[:, None] + d[None, :],
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _load_dense(data, row, real, num_heads, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = (row * num_heads + head) * HEAD_DIM
    return tl.load(data + at[:, None] + d[None, :], mask=real[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_dense(
    data, values, row, real, num_heads, head, row_heads, offset_heads, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Store one head's rows where a token has row_heads heads, this map's first being number offset_heads."""
    d = tl.arange(0, BLOCK_D)
    at = (row * row_heads + (offset_heads + head)) * HEAD_DIM
    tl.store(
        data + at[:, None] + d[None, :],
        values.to(data.dtype.element_ty),
        mask=real[:, None] & (d < HEAD_DIM)[None, :],
    )


@triton.jit
def _load_pad(pad_qkv, which: tl.constexpr, num_heads, head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """What q (0), k (1) or v (2) of a pad token holds."""
    d = tl.arange(0, BLOCK_D)
    return tl.load(pad_qkv + (which * num_heads + head) * HEAD_DIM + d, mask=d < HEAD_DIM, other=0.0)


@triton.jit
def _load_tokens(
    data, offset, strides, pad_qkv, which: tl.constexpr, num_heads, image, head, y0, y1, y2, token, real,
    VOLUME: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """_load_rows with pad tokens filled in."""
    rows = _load_rows(
        data, offset.to(tl.int64) * which, strides, image, head, y0, y1, y2, real, HEAD_DIM, BLOCK_D, ALIGN
    )
    if pad_qkv is not None:
        pad = _load_pad(pad_qkv, which, num_heads, head, HEAD_DIM, BLOCK_D)
        rows = tl.where(((token < VOLUME) & ~real)[:, None], pad[None, :], rows)
    return rows


# ---- scores ----------------------------------------------------------------------------------------------------------


@triton.jit
def _bias_tile(
    bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME: tl.constexpr, TABLE_WINDOW: tl.constexpr
):
    """log2(e) times the bias of a tile of a window of type ``kind``; minus infinity for keys beyond the window."""
    inside = (query < VOLUME)[:, None] & (key < VOLUME)[None, :]
    if bias_table is not None:
        r_max = _table_position(TABLE_WINDOW[0] * TABLE_WINDOW[1] * TABLE_WINDOW[2] - 1, TABLE_WINDOW)
        row = _table_position(query, TABLE_WINDOW)[:, None] - _table_position(key, TABLE_WINDOW)[None, :] + r_max
        bias = tl.load(bias_table + row * num_heads + head, mask=inside, other=0.0) * _LOG2_E
    elif dense_bias is not None:
        tile = dense_bias + (kind * num_heads + head).to(tl.int64) * (VOLUME * VOLUME)
        bias = tl.load(tile + query[:, None] * VOLUME + key[None, :], mask=inside, other=0.0) * _LOG2_E
    else:
        bias = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    return tl.where((key < VOLUME)[None, :], bias, float("-inf"))


@triton.jit
def _head_scale_log2(logit_scale, head, scale_log2):
    """log2(e) times the factor of a head's products: of its cosines exp(min(logit_scale, ln 100))."""
    if logit_scale is not None:
        x = tl.load(logit_scale + head)
        x = tl.where(x > _LN_100, _LN_100, x)  # tl.minimum would hide a NaN
        # tl.exp rounds x log2(e), of which a factor of 100 would lose three bits. A product with a whole number of
        # at most three bits and the first part of ln 2 is exact.
        whole = tl.floor(x * _LOG2_E + 0.5)
        rest = x - whole * 0.693359375 + whole * 2.12194440e-4
        scale_log2 = tl.exp2(whole) * tl.exp2(rest * _LOG2_E) * _LOG2_E
    return scale_log2


@triton.jit
def _inverse_norm(x):
    """1 / max(norm, 1e-12) of each row."""
    x = x.to(tl.float32)
    return tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), 1e-12))


@triton.jit
def _unit_rows(x, inverse):
    """The rows as the products of the backward pass have them: in v2, where ``inverse`` is not None, divided."""
    return x if inverse is None else (x.to(tl.float32) * inverse[:, None]).to(x.dtype)


@triton.jit
def _add_product(total, a, b, factor, PRECISION: tl.constexpr):
    """total + a b, the product multiplied by ``factor`` unless that is None."""
    if factor is None:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    else:
        total += tl.dot(a, b, input_precision=PRECISION) * factor
    return total


@triton.jit
def _row_gradient(d, x, inverse, scale):
    """The gradient of rows of q or k, where d is the sum of dS times what they meet in the products.

    In v2 what is along the unit vector is taken off again: it would only lengthen the row.
    """
    d *= scale
    if inverse is not None:
        unit = x.to(tl.float32) * inverse[:, None]
        along = tl.where(inverse < _LARGEST_INVERSE, tl.sum(unit * d, axis=1), 0.0)
        d = (d - unit * along[:, None]) * inverse[:, None]
    return d


@triton.jit
def _products(q, k, q_inverse, k_inverse, scale_log2, PRECISION: tl.constexpr):
    """log2(e) times the scores of a tile before bias and mask. Cosines are divided in float32, not as q and k are."""
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if q_inverse is not None:
        products *= (q_inverse * scale_log2)[:, None]
        products *= k_inverse[None, :]
    else:
        products *= scale_log2
    return products


@triton.jit
def _mask_tile(scores, query_region, key_region, mask_log2):
    return tl.where(query_region[:, None] != key_region[None, :], scores + mask_log2, scores)


@triton.jit
def _probs(
    products, bias, lse, seams, query_region, key_region, mask_log2, dtype: tl.constexpr, HAS_MASK: tl.constexpr
):  # fmt: skip
    """P of a tile, recomputed from lse."""
    scores = products + bias
    if HAS_MASK:
        if seams != 0:
            scores = _mask_tile(scores, query_region, key_region, mask_log2)
    scores -= (lse * _LOG2_E)[:, None]
    if dtype == tl.float16:  # lse is rounded: of scores beyond 1e7, P above one could be infinite
        scores = tl.minimum(scores, 0.0)
    return tl.exp2(scores)


@triton.jit
def _dprobs(dout, v, keep, keep_scale, PRECISION: tl.constexpr):
    """dP of a tile."""
    dprobs = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if keep is not None:
        dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
    return dprobs


@triton.jit
def _excess(dscores, dtype: tl.constexpr):
    """The divisor that brings a tile of dS into float16's range, where dq and dk may be though dS is beyond it.

    None for dtypes whose range is float32's.
    """
    if dtype == tl.float16:
        excess = tl.maximum(tl.max(tl.max(tl.abs(dscores), axis=1), axis=0) * (1 / 32768), 1.0)
    else:
        excess = None
    return excess


@triton.jit
def _narrow(dscores, excess, dtype: tl.constexpr):
    """dS as it enters the products with q and k, which are to be multiplied by ``excess``."""
    return (dscores if excess is None else dscores * (1.0 / excess)).to(dtype)


@triton.jit
def _store_dlogit_scale(dlogit_scale, total_log2, at, logit_scale, head):
    """A program's share of the gradient of a logit scale, which is zero where that is clamped.

    As torch.clamp has it: ln 100 rounded to float32 is above ln 100.
    """
    clamped = tl.load(logit_scale + head) >= _LN_100
    tl.store(dlogit_scale + at, tl.where(clamped, 0.0, total_log2 * _LN_2))


# ---- dropout ---------------------------------------------------------------------------------------------------------


@triton.jit
def _above(random, drop_below):
    return (random.to(tl.int32, bitcast=True) >= drop_below).to(tl.int8)


@triton.jit
def _kept(seed, window, head, query, start, drop_below, BLOCK_K: tl.constexpr):
    """Which of the keys from ``start`` on a query keeps: a tile of Philox numbers with the key ``seed``.

    The counter, four words of 32 bits, is (key / 4, query, window, head), so that it never repeats in a call; its four
    numbers are those of four neighbouring keys.
    """
    quad = start // 4 + tl.arange(0, BLOCK_K // 4)
    r0, r1, r2, r3 = tl.philox(seed, quad[None, :], query[:, None], window, head)
    k0, k1, k2, k3 = _above(r0, drop_below), _above(r1, drop_below), _above(r2, drop_below), _above(r3, drop_below)
    return tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (query.shape[0], BLOCK_K)) != 0


@triton.jit
def _drop(probs, keep):
    """P without what dropout drops, still to be multiplied by the scale of what is kept."""
    return probs if keep is None else tl.where(keep, probs, 0.0)


# ---- N <= 64: a window is one tile -----------------------------------------------------------------------------------


@kernel
def fwd_whole(
    q, k, v, out, lse, bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale_log2, mask_log2, drop_below, keep_scale,
    batch_windows, windows_per_program, type_windows, num_heads, size, roll, cut, before,
    q_strides, k_strides, v_strides, packed_offset,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr, ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    program = tl.program_id(0)
    head = program % num_heads
    kind, first, count = _first_window(program // num_heads, batch_windows, windows_per_program, type_windows)
    image, n0, n1, n2 = split_window(_window_of_type(kind, first, type_windows, size, WINDOW), size, WINDOW)
    token = tl.arange(0, BLOCK_N)
    beyond = _beyond_seam(token, cut, WINDOW)
    bias = _bias_tile(bias_table, dense_bias, kind, token, token, num_heads, head, VOLUME, TABLE_WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    seed = tl.load(dropout_seed) if dropout_seed is not None else None

    for i in range(count):
        window = _window_of_type(kind, first + i, type_windows, size, WINDOW)
        y0, y1, y2, real = locate(
            n0, n1, n2, token, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING
        )  # fmt: skip
        q_tile = _load_tokens(
            q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        scores = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION) + bias
        if HAS_MASK:
            seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
            if seams != 0:
                region = _region(n0, n1, n2, token, beyond, seams, size, region_map, WINDOW, GRID)
                scores = _mask_tile(scores, region, region, mask_log2)
        top = tl.max(scores, axis=1)
        probs = tl.exp2(scores - top[:, None])
        total = tl.sum(probs, axis=1)
        keep = _kept(seed, window, head, token, 0, drop_below, BLOCK_N) if seed is not None else None
        kept = _drop(probs, keep).to(v_tile.dtype)
        result = tl.dot(kept, v_tile, input_precision=PRECISION) / total[:, None]
        if seed is not None:
            result *= keep_scale
        row = dense_row(image, y0, y1, y2, size)
        _store_dense(out, result, row, real, num_heads, head, num_heads, 0, HEAD_DIM, BLOCK_D)
        if lse is not None:
            lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
            tl.store(lse + lse_row + token, (top + tl.log2(total)) * _LN_2, mask=token < VOLUME)
        image, n0, n1, n2 = _next_of_type(image, n0, n1, n2, kind, first + i + 1, type_windows, size, WINDOW)


@kernel
def bwd_whole(
    q, k, v, dout, lse, dq, dk, dv, dbias, dlogit_scale, dpad,
    bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale, scale_log2, mask_log2, drop_below, keep_scale,
    batch_windows, windows_per_program, type_windows, num_heads, size, roll, cut, before,
    q_strides, k_strides, v_strides, packed_offset, grad_row_heads, grad_head_offset,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr, ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr,
    HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums over a program's windows: dbias (groups, heads, N, N), dlogit_scale (groups, heads) and dpad (groups, 2,
    heads, HEAD_DIM); or None.
    """
    NORMALISED: tl.constexpr = q.dtype.element_ty != tl.bfloat16
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    program = tl.program_id(0)
    head = program % num_heads
    group = program // num_heads
    kind, first, count = _first_window(group, batch_windows, windows_per_program, type_windows)
    image, n0, n1, n2 = split_window(_window_of_type(kind, first, type_windows, size, WINDOW), size, WINDOW)
    token = tl.arange(0, BLOCK_N)
    beyond = _beyond_seam(token, cut, WINDOW)
    bias = _bias_tile(bias_table, dense_bias, kind, token, token, num_heads, head, VOLUME, TABLE_WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    if logit_scale is not None:
        scale = scale_log2 * _LN_2
    seed = tl.load(dropout_seed) if dropout_seed is not None else None
    if dbias is not None:
        dbias_tile = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    if dlogit_scale is not None:
        dlogit_rows = tl.zeros([BLOCK_N], tl.float32)
    if dpad is not None:
        dpad_k = tl.zeros([BLOCK_D], tl.float32)
        dpad_v = tl.zeros([BLOCK_D], tl.float32)

    for i in range(count):
        window = _window_of_type(kind, first + i, type_windows, size, WINDOW)
        y0, y1, y2, real = locate(
            n0, n1, n2, token, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING
        )  # fmt: skip
        q_tile = _load_tokens(
            q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, y0, y1, y2, token, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        row = dense_row(image, y0, y1, y2, size)
        dout_tile = _load_dense(dout, row, real, num_heads, head, HEAD_DIM, BLOCK_D)
        lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
        lse_tile = tl.load(lse + lse_row + token, mask=token < VOLUME, other=0.0)
        seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
        region = _region(n0, n1, n2, token, beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else token
        q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        products = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION)
        probs = _probs(products, bias, lse_tile, seams, region, region, mask_log2, q_tile.dtype, HAS_MASK)
        keep = _kept(seed, window, head, token, 0, drop_below, BLOCK_N) if seed is not None else None
        dv_tile = tl.dot(tl.trans(_drop(probs, keep).to(q_tile.dtype)), dout_tile, input_precision=PRECISION)
        if seed is not None:
            dv_tile *= keep_scale
        _store_dense(dv, dv_tile, row, real, num_heads, head, grad_row_heads, 2 * grad_head_offset, HEAD_DIM, BLOCK_D)
        dprobs = _dprobs(dout_tile, v_tile, keep, keep_scale, PRECISION)
        delta_tile = tl.sum(probs * dprobs, axis=1)
        if NORMALISED:
            delta_tile /= tl.maximum(tl.sum(probs, axis=1), 1e-30)
        dscores = probs * (dprobs - delta_tile[:, None])
        if dbias is not None:
            dbias_tile += dscores
        if dlogit_scale is not None:
            dlogit_rows += tl.sum(dscores * products, axis=1)
        excess = _excess(dscores, q_tile.dtype)
        rounded = _narrow(dscores, excess, q_tile.dtype)
        row_scale = scale if excess is None else scale * excess
        if logit_scale is not None:  # read again, from the cache: kept until here they would be spilled
            q_tile = _load_tokens(
                q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, token, real,
                VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
            )  # fmt: skip
            k_tile = _load_tokens(
                k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, y0, y1, y2, token, real,
                VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
            )  # fmt: skip
            q_inverse, k_inverse = _inverse_norm(q_tile), _inverse_norm(k_tile)
        dk_tile = tl.dot(tl.trans(rounded), _unit_rows(q_tile, q_inverse), input_precision=PRECISION)
        dk_tile = _row_gradient(dk_tile, k_tile, k_inverse, row_scale)
        _store_dense(dk, dk_tile, row, real, num_heads, head, grad_row_heads, grad_head_offset, HEAD_DIM, BLOCK_D)
        dq_tile = tl.dot(rounded, _unit_rows(k_tile, k_inverse), input_precision=PRECISION)
        dq_tile = _row_gradient(dq_tile, q_tile, q_inverse, row_scale)
        _store_dense(dq, dq_tile, row, real, num_heads, head, grad_row_heads, 0, HEAD_DIM, BLOCK_D)
        if dpad is not None:
            is_pad = ((token < VOLUME) & ~real)[:, None]
            dpad_k += tl.sum(tl.where(is_pad, dk_tile, 0.0), axis=0)
            dpad_v += tl.sum(tl.where(is_pad, dv_tile, 0.0), axis=0)
        image, n0, n1, n2 = _next_of_type(image, n0, n1, n2, kind, first + i + 1, type_windows, size, WINDOW)

    if dbias is not None:
        tile = dbias + program.to(tl.int64) * (VOLUME * VOLUME)
        inside = (token < VOLUME)[:, None] & (token < VOLUME)[None, :]
        tl.store(tile + token[:, None] * VOLUME + token[None, :], dbias_tile, mask=inside)
    if dlogit_scale is not None:
        _store_dlogit_scale(dlogit_scale, tl.sum(dlogit_rows, axis=0), program, logit_scale, head)
    if dpad is not None:
        d = tl.arange(0, BLOCK_D)
        at = (group.to(tl.int64) * 2 * num_heads + head) * HEAD_DIM + d
        tl.store(dpad + at, dpad_k, mask=d < HEAD_DIM)
        tl.store(dpad + at + num_heads * HEAD_DIM, dpad_v, mask=d < HEAD_DIM)


# ---- N > 64: query tiles by key tiles --------------------------------------------------------------------------------


@kernel
def fwd_tiled(
    q, k, v, out, lse, bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale_log2, mask_log2, drop_below, keep_scale,
    type_windows, num_heads, size, roll, cut, before, q_strides, k_strides, v_strides, packed_offset,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
    ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    Q_TILES: tl.constexpr = (VOLUME + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    head = program % num_heads
    window = program // num_heads // Q_TILES
    query = program // num_heads % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_beyond = _beyond_seam(query, cut, WINDOW)
    image, n0, n1, n2 = split_window(window, size, WINDOW)
    seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
    y0, y1, y2, real = locate(n0, n1, n2, query, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
    q_tile = _load_tokens(
        q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, query, real,
        VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip
    q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
    kind = _type_of(window, type_windows, size, WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    seed = tl.load(dropout_seed) if dropout_seed is not None else None

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        key_beyond = _beyond_seam(key, cut, WINDOW)
        z0, z1, z2, has = locate(n0, n1, n2, key, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        bias = _bias_tile(bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME, TABLE_WINDOW)
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        scores = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION) + bias
        if HAS_MASK:
            if seams != 0:
                query_region = _region(n0, n1, n2, query, query_beyond, seams, size, region_map, WINDOW, GRID)
                key_region = _region(n0, n1, n2, key, key_beyond, seams, size, region_map, WINDOW, GRID)
                scores = _mask_tile(scores, query_region, key_region, mask_log2)
        higher = tl.maximum(top, tl.max(scores, axis=1))  # finite: every key tile holds at least one token
        if dense_bias is not None:  # unless the bias excludes all of its tokens by minus infinity
            higher = tl.maximum(higher, _LOWEST)
        probs = tl.exp2(scores - higher[:, None])
        rescale = tl.exp2(top - higher)
        total = total * rescale + tl.sum(probs, axis=1)
        keep = _kept(seed, window, head, query, start, drop_below, BLOCK_K) if seed is not None else None
        kept = _drop(probs, keep).to(v_tile.dtype)
        result = tl.dot(kept, v_tile, result * rescale[:, None], input_precision=PRECISION)
        top = higher

    row = dense_row(image, y0, y1, y2, size)
    result /= total[:, None]
    if seed is not None:
        result *= keep_scale
    _store_dense(out, result, row, real, num_heads, head, num_heads, 0, HEAD_DIM, BLOCK_D)
    if lse is not None:
        lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
        tl.store(lse + lse_row + query, (top + tl.log2(total)) * _LN_2, mask=query < VOLUME)


@kernel
def bwd_tiled_dq(
    q, k, v, dout, lse, delta, dq, dlogit_scale,
    bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale, scale_log2, mask_log2, drop_below, keep_scale,
    type_windows, num_heads, size, roll, cut, before, q_strides, k_strides, v_strides, packed_offset, grad_row_heads,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
    ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Also writes delta, in the layout of lse, for the two kernels that follow.

    dlogit_scale: (windows * query tiles, heads), each program's sum; or None.
    """
    NORMALISED: tl.constexpr = q.dtype.element_ty != tl.bfloat16
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    Q_TILES: tl.constexpr = (VOLUME + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    head = program % num_heads
    window = program // num_heads // Q_TILES
    query = program // num_heads % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_beyond = _beyond_seam(query, cut, WINDOW)
    image, n0, n1, n2 = split_window(window, size, WINDOW)
    seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
    y0, y1, y2, real = locate(n0, n1, n2, query, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
    q_tile = _load_tokens(
        q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, query, real,
        VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip
    row = dense_row(image, y0, y1, y2, size)
    dout_tile = _load_dense(dout, row, real, num_heads, head, HEAD_DIM, BLOCK_D)
    lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
    lse_tile = tl.load(lse + lse_row + query, mask=query < VOLUME, other=0.0)
    query_region = (
        _region(n0, n1, n2, query, query_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else query
    )
    q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
    kind = _type_of(window, type_windows, size, WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    if logit_scale is not None:
        scale = scale_log2 * _LN_2
    seed = tl.load(dropout_seed) if dropout_seed is not None else None

    delta_tile = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        key_beyond = _beyond_seam(key, cut, WINDOW)
        z0, z1, z2, has = locate(n0, n1, n2, key, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        bias = _bias_tile(bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME, TABLE_WINDOW)
        key_region = _region(n0, n1, n2, key, key_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else key
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        products = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION)
        probs = _probs(products, bias, lse_tile, seams, query_region, key_region, mask_log2, q_tile.dtype, HAS_MASK)
        keep = _kept(seed, window, head, query, start, drop_below, BLOCK_K) if seed is not None else None
        dprobs = _dprobs(dout_tile, v_tile, keep, keep_scale, PRECISION)
        delta_tile += tl.sum(probs * dprobs, axis=1)
        if NORMALISED:
            total += tl.sum(probs, axis=1)
    if NORMALISED:
        delta_tile /= tl.maximum(total, 1e-30)
    tl.store(delta + lse_row + query, delta_tile, mask=query < VOLUME)

    if dlogit_scale is not None:
        dlogit_rows = tl.zeros([BLOCK_Q], tl.float32)
    dq_tile = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        key_beyond = _beyond_seam(key, cut, WINDOW)
        z0, z1, z2, has = locate(n0, n1, n2, key, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        bias = _bias_tile(bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME, TABLE_WINDOW)
        key_region = _region(n0, n1, n2, key, key_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else key
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        products = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION)
        probs = _probs(products, bias, lse_tile, seams, query_region, key_region, mask_log2, q_tile.dtype, HAS_MASK)
        keep = _kept(seed, window, head, query, start, drop_below, BLOCK_K) if seed is not None else None
        dprobs = _dprobs(dout_tile, v_tile, keep, keep_scale, PRECISION)
        dscores = probs * (dprobs - delta_tile[:, None])
        if dlogit_scale is not None:
            dlogit_rows += tl.sum(dscores * products, axis=1)
        excess = _excess(dscores, k_tile.dtype)
        rounded = _narrow(dscores, excess, k_tile.dtype)
        dq_tile = _add_product(dq_tile, rounded, _unit_rows(k_tile, k_inverse), excess, PRECISION)
    if dlogit_scale is not None:
        _store_dlogit_scale(dlogit_scale, tl.sum(dlogit_rows, axis=0), program, logit_scale, head)
    dq_tile = _row_gradient(dq_tile, q_tile, q_inverse, scale)
    _store_dense(dq, dq_tile, row, real, num_heads, head, grad_row_heads, 0, HEAD_DIM, BLOCK_D)


@kernel
def bwd_tiled_dkdv(
    q, k, v, dout, lse, delta, dk, dv, dpad,
    bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale, scale_log2, mask_log2, drop_below, keep_scale,
    type_windows, num_heads, size, roll, cut, before,
    q_strides, k_strides, v_strides, packed_offset, grad_row_heads, grad_head_offset,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
    ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dpad: (windows * key tiles, 2, heads, HEAD_DIM), each program's sum over its pad tokens; or None."""
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    K_TILES: tl.constexpr = (VOLUME + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head = program % num_heads
    group = program // num_heads
    window = group // K_TILES
    first_key = group % K_TILES * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    key_beyond = _beyond_seam(key, cut, WINDOW)
    image, n0, n1, n2 = split_window(window, size, WINDOW)
    seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
    z0, z1, z2, has = locate(n0, n1, n2, key, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
    k_tile = _load_tokens(
        k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, z0, z1, z2, key, has,
        VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip
    v_tile = _load_tokens(
        v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, z0, z1, z2, key, has,
        VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
    )  # fmt: skip
    key_region = _region(n0, n1, n2, key, key_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else key
    lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
    k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
    kind = _type_of(window, type_windows, size, WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    if logit_scale is not None:
        scale = scale_log2 * _LN_2
    seed = tl.load(dropout_seed) if dropout_seed is not None else None

    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, VOLUME, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        query_beyond = _beyond_seam(query, cut, WINDOW)
        y0, y1, y2, real = locate(n0, n1, n2, query, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        q_tile = _load_tokens(
            q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, query, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        dout_tile = _load_dense(
            dout, dense_row(image, y0, y1, y2, size), real, num_heads, head, HEAD_DIM, BLOCK_D
        )  # fmt: skip
        lse_tile = tl.load(lse + lse_row + query, mask=query < VOLUME, other=0.0)
        delta_tile = tl.load(delta + lse_row + query, mask=query < VOLUME, other=0.0)
        bias = _bias_tile(bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME, TABLE_WINDOW)
        query_region = (
            _region(n0, n1, n2, query, query_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else query
        )
        q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
        products = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION)
        probs = _probs(products, bias, lse_tile, seams, query_region, key_region, mask_log2, q_tile.dtype, HAS_MASK)
        keep = _kept(seed, window, head, query, first_key, drop_below, BLOCK_K) if seed is not None else None
        dprobs = _dprobs(dout_tile, v_tile, keep, keep_scale, PRECISION)
        dscores = probs * (dprobs - delta_tile[:, None])
        kept = _drop(probs, keep).to(q_tile.dtype)
        dv_tile = tl.dot(tl.trans(kept), dout_tile, dv_tile, input_precision=PRECISION)
        excess = _excess(dscores, q_tile.dtype)
        rounded = _narrow(dscores, excess, q_tile.dtype)
        dk_tile = _add_product(dk_tile, tl.trans(rounded), _unit_rows(q_tile, q_inverse), excess, PRECISION)

    dk_tile = _row_gradient(dk_tile, k_tile, k_inverse, scale)
    if seed is not None:
        dv_tile *= keep_scale
    row = dense_row(image, z0, z1, z2, size)
    _store_dense(dk, dk_tile, row, has, num_heads, head, grad_row_heads, grad_head_offset, HEAD_DIM, BLOCK_D)
    _store_dense(dv, dv_tile, row, has, num_heads, head, grad_row_heads, 2 * grad_head_offset, HEAD_DIM, BLOCK_D)
    if dpad is not None:
        d = tl.arange(0, BLOCK_D)
        is_pad = ((key < VOLUME) & ~has)[:, None]
        at = (group.to(tl.int64) * 2 * num_heads + head) * HEAD_DIM + d
        tl.store(dpad + at, tl.sum(tl.where(is_pad, dk_tile, 0.0), axis=0), mask=d < HEAD_DIM)
        tl.store(
            dpad + at + num_heads * HEAD_DIM, tl.sum(tl.where(is_pad, dv_tile, 0.0), axis=0), mask=d < HEAD_DIM
        )  # fmt: skip


@kernel
def bwd_tiled_dbias(
    q, k, v, dout, lse, delta, dbias,
    bias_table, dense_bias, logit_scale, pad_qkv, region_map, dropout_seed,
    scale_log2, mask_log2, drop_below, keep_scale,
    batch_windows, windows_per_program, type_windows, num_heads, size, roll, cut, before,
    q_strides, k_strides, v_strides, packed_offset,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, PACKED: tl.constexpr,
    ROLL_THEN_PAD: tl.constexpr, GRID: tl.constexpr, HAS_PADDING: tl.constexpr, HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dbias: (groups, heads, N, N). A program owns one tile of one head and walks over a group of windows."""
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    if PACKED:  # the rows of q, k and v then share their address arithmetic
        k_strides, v_strides = q_strides, q_strides
    Q_TILES: tl.constexpr = (VOLUME + BLOCK_Q - 1) // BLOCK_Q
    K_TILES: tl.constexpr = (VOLUME + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head = program % num_heads
    tile = program // num_heads
    first_key = tile % K_TILES * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    key_beyond = _beyond_seam(key, cut, WINDOW)
    query = tile // K_TILES % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_beyond = _beyond_seam(query, cut, WINDOW)
    group = tile // (K_TILES * Q_TILES)
    kind, first, count = _first_window(group, batch_windows, windows_per_program, type_windows)
    image, n0, n1, n2 = split_window(_window_of_type(kind, first, type_windows, size, WINDOW), size, WINDOW)
    bias = _bias_tile(bias_table, dense_bias, kind, query, key, num_heads, head, VOLUME, TABLE_WINDOW)
    scale_log2 = _head_scale_log2(logit_scale, head, scale_log2)
    seed = tl.load(dropout_seed) if dropout_seed is not None else None

    dbias_tile = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i in range(count):
        window = _window_of_type(kind, first + i, type_windows, size, WINDOW)
        y0, y1, y2, real = locate(n0, n1, n2, query, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        z0, z1, z2, has = locate(n0, n1, n2, key, size, roll, before, WINDOW, ROLL_THEN_PAD, GRID, HAS_PADDING)
        q_tile = _load_tokens(
            q, packed_offset, q_strides, pad_qkv, 0, num_heads, image, head, y0, y1, y2, query, real,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        k_tile = _load_tokens(
            k, packed_offset, k_strides, pad_qkv, 1, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        v_tile = _load_tokens(
            v, packed_offset, v_strides, pad_qkv, 2, num_heads, image, head, z0, z1, z2, key, has,
            VOLUME, HEAD_DIM, BLOCK_D, ALIGN,
        )  # fmt: skip
        dout_tile = _load_dense(
            dout, dense_row(image, y0, y1, y2, size), real, num_heads, head, HEAD_DIM, BLOCK_D
        )  # fmt: skip
        lse_row = (window.to(tl.int64) * num_heads + head) * VOLUME
        lse_tile = tl.load(lse + lse_row + query, mask=query < VOLUME, other=0.0)
        delta_tile = tl.load(delta + lse_row + query, mask=query < VOLUME, other=0.0)
        seams = _seams(n0, n1, n2, size, cut, region_map, WINDOW)
        query_region = (
            _region(n0, n1, n2, query, query_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else query
        )
        key_region = _region(n0, n1, n2, key, key_beyond, seams, size, region_map, WINDOW, GRID) if HAS_MASK else key
        q_inverse = _inverse_norm(q_tile) if logit_scale is not None else None
        k_inverse = _inverse_norm(k_tile) if logit_scale is not None else None
        products = _products(q_tile, k_tile, q_inverse, k_inverse, scale_log2, PRECISION)
        probs = _probs(products, bias, lse_tile, seams, query_region, key_region, mask_log2, q_tile.dtype, HAS_MASK)
        keep = _kept(seed, window, head, query, first_key, drop_below, BLOCK_K) if seed is not None else None
        dprobs = _dprobs(dout_tile, v_tile, keep, keep_scale, PRECISION)
        dscores = probs * (dprobs - delta_tile[:, None])
        dbias_tile += dscores
        image, n0, n1, n2 = _next_of_type(image, n0, n1, n2, kind, first + i + 1, type_windows, size, WINDOW)

    inside = (query < VOLUME)[:, None] & (key < VOLUME)[None, :]
    at = dbias + (group.to(tl.int64) * num_heads + head) * (VOLUME * VOLUME)
    tl.store(at + query[:, None] * VOLUME + key[None, :], dbias_tile, mask=inside)


# ---- dbias onto the table --------------------------------------------------------------------------------------------


@kernel
def fold_dbias(
    dbias, dbias_table, num_heads,
    WINDOW: tl.constexpr, TABLE_WINDOW: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """dbias (heads, N, N) onto (rows, heads): an entry is the sum over all pairs of its relative offset."""
    VOLUME: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    ROWS: tl.constexpr = (2 * TABLE_WINDOW[0] - 1) * (2 * TABLE_WINDOW[1] - 1) * (2 * TABLE_WINDOW[2] - 1)
    program = tl.program_id(0)
    head = program % num_heads
    row = program // num_heads * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d0 = row // ((2 * TABLE_WINDOW[1] - 1) * (2 * TABLE_WINDOW[2] - 1)) - (TABLE_WINDOW[0] - 1)
    d1 = row // (2 * TABLE_WINDOW[2] - 1) % (2 * TABLE_WINDOW[1] - 1) - (TABLE_WINDOW[1] - 1)
    d2 = row % (2 * TABLE_WINDOW[2] - 1) - (TABLE_WINDOW[2] - 1)
    dbias += head.to(tl.int64) * (VOLUME * VOLUME)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    for start in range(0, VOLUME, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        k0, k1, k2 = coordinates(key, TABLE_WINDOW)
        q0 = k0[None, :] + d0[:, None]  # (BLOCK_ROWS, BLOCK_N): the query that lies at this offset from the key
        q1 = k1[None, :] + d1[:, None]
        q2 = k2[None, :] + d2[:, None]
        query = (q0 * TABLE_WINDOW[1] + q1) * TABLE_WINDOW[2] + q2
        paired = (q0 >= 0) & (q1 >= 0) & (q2 >= 0) & (q1 < TABLE_WINDOW[1]) & (q2 < TABLE_WINDOW[2])
        paired = paired & (query < VOLUME) & (key < VOLUME)[None, :]
        values = tl.load(dbias + query * VOLUME + key[None, :], mask=paired, other=0.0)
        total += tl.sum(values, axis=1)
    tl.store(dbias_table + row * num_heads + head, total, mask=row < ROWS)
