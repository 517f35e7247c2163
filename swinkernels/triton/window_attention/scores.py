"""Computes scores and probabilities of a tile: bias, cosines, mask and dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from swinkernels.triton._window_address import coordinates
from swinkernels.triton.window_attention.call import LN_2, LOG2_E
from swinkernels.triton.window_attention.mask import masked

LN_100 = tl.constexpr(4.605170185988092)


@triton.jit
def _table_position(t0, t1, t2, STATIC: tl.constexpr):
    """Return the index of a row of bias_table, given its index on each axis."""
    ROWS: tl.constexpr = STATIC.TABLE_ROWS
    return (t0 * ROWS[1] + t1) * ROWS[2] + t2


@triton.jit
def _query_position(token, STATIC: tl.constexpr):
    """Return r(i), where the bias of query i and key j is row r(i) - r'(j) + r_0 of the table."""
    WINDOW: tl.constexpr = STATIC.TABLE_WINDOW
    t0, t1, t2 = coordinates(token, WINDOW)
    return _table_position(t0, t1, t2, STATIC)


@triton.jit
def _key_position(token, STATIC: tl.constexpr):
    """Return r'(j), which is r(j) except on axes with table_pairs, where the row index is i + window * j."""
    WINDOW: tl.constexpr = STATIC.TABLE_KEY_WINDOW
    PAIRS: tl.constexpr = STATIC.TABLE_PAIRS
    t0, t1, t2 = coordinates(token, WINDOW)
    t0 *= -WINDOW[0] if PAIRS[0] else 1
    t1 *= -WINDOW[1] if PAIRS[1] else 1
    t2 *= -WINDOW[2] if PAIRS[2] else 1
    return _table_position(t0, t1, t2, STATIC)


@triton.jit
def _first_position(STATIC: tl.constexpr):
    """Return r_0, the row of query 0 and key 0."""
    WINDOW: tl.constexpr = STATIC.TABLE_KEY_WINDOW
    PAIRS: tl.constexpr = STATIC.TABLE_PAIRS
    t0 = 0 if PAIRS[0] else WINDOW[0] - 1
    t1 = 0 if PAIRS[1] else WINDOW[1] - 1
    t2 = 0 if PAIRS[2] else WINDOW[2] - 1
    return _table_position(t0, t1, t2, STATIC)


@triton.jit
def bias_tile(kind, query, key, head, call, STATIC: tl.constexpr):
    """Return UNIT times the bias of a tile in a window of type ``kind``, minus infinity for keys beyond the window."""
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    inside = (query < VOLUME)[:, None] & (key < KEY_VOLUME)[None, :]
    if call.bias_table is not None:
        r_0 = _first_position(STATIC)
        row = _query_position(query, STATIC)[:, None] - _key_position(key, STATIC)[None, :] + r_0
        if call.table_columns is None:
            at = call.bias_table + row * call.num_heads + head
        else:
            at = call.bias_table + row * call.table_columns + (kind * call.num_heads + head)
        bias = tl.load(at, mask=inside, other=0.0) * STATIC.UNIT
    elif call.dense_bias is not None:
        tile = call.dense_bias + (kind * call.num_heads + head).to(tl.int64) * (VOLUME * KEY_VOLUME)
        bias = tl.load(tile + query[:, None] * KEY_VOLUME + key[None, :], mask=inside, other=0.0) * STATIC.UNIT
    else:
        bias = tl.zeros([query.shape[0], key.shape[0]], tl.float32)
    return tl.where((key < KEY_VOLUME)[None, :], bias, float("-inf"))


@triton.jit
def head_unit_scale(head, call, STATIC: tl.constexpr):
    """Return UNIT times the factor of a head's products: the scale or, for cosines, exp(min(logit_scale, ln 100))."""
    unit_scale = call.unit_scale
    if call.logit_scale is not None:
        x = tl.load(call.logit_scale + head)
        x = tl.where(x > LN_100, LN_100, x)  # tl.minimum would hide a NaN
        # tl.exp rounds x log2(e), which would cost three bits at a factor of 100. Here ln 2 is split into two parts:
        # the product of the first part and an integer of at most three bits is exact.
        whole = tl.floor(x * LOG2_E + 0.5)
        rest = x - whole * 0.693359375 + whole * 2.12194440e-4
        unit_scale = tl.exp2(whole) * tl.exp2(rest * LOG2_E) * STATIC.UNIT
    return unit_scale


@triton.jit
def head_scale(unit_scale, call, STATIC: tl.constexpr):
    """Return the factor of a head's products, without UNIT."""
    return call.scale if call.logit_scale is None else unit_scale * (1.0 / STATIC.UNIT)


@triton.jit
def inverse_norm(x, call):
    """Return 1 / max(norm, 1e-12) for each row of q or k.

    Without logit_scale, return an unused 0.0, because before Triton 3.8 a tuple that contains None cannot be returned.
    """
    if call.logit_scale is None:
        inverse = 0.0
    else:
        x = x.to(tl.float32)
        inverse = tl.div_rn(1.0, tl.maximum(tl.sqrt_rn(tl.sum(x * x, axis=1)), 1e-12))
    return inverse


@triton.jit
def exp_units(scores, STATIC: tl.constexpr):
    """Return exp(scores / UNIT)."""
    UNIT: tl.constexpr = STATIC.UNIT
    return tl.exp2(scores * LOG2_E if UNIT == 1.0 else scores)


@triton.jit
def log_sum_exp(top, total, STATIC: tl.constexpr):
    """Return top / UNIT + ln(total)."""
    UNIT: tl.constexpr = STATIC.UNIT
    return top + tl.log2(total) * LN_2 if UNIT == 1.0 else (top + tl.log2(total)) * LN_2


@triton.jit
def products(q, k, q_inverse, k_inverse, unit_scale, call, STATIC: tl.constexpr):
    """Return UNIT times the scores of a tile before bias and mask. Cosines are divided in float32."""
    tile = tl.dot(q, tl.trans(k), input_precision=STATIC.PRECISION)
    if call.logit_scale is not None:
        tile *= (q_inverse * unit_scale)[:, None]
        tile *= k_inverse[None, :]
    else:
        tile *= unit_scale
    return tile


@triton.jit
def probabilities(
    tile, bias, lse, seams, query_region, key_region, call, STATIC: tl.constexpr
):  # fmt: skip
    """Return P of a tile, recomputed from lse and the scores before bias and mask."""
    scores = tile + bias
    if STATIC.HAS_MASK:
        if seams != 0:
            scores = masked(scores, query_region, key_region, call)
    scores -= (lse * STATIC.UNIT)[:, None]
    if (
        call.maps[0].dtype.element_ty == tl.float16
    ):  # because lse is rounded, scores beyond 1e7 could give an infinite P instead of about one
        scores = tl.minimum(scores, 0.0)
    return exp_units(scores, STATIC)


@triton.jit
def load_seed(call):
    """Load the seed of a call's random numbers, or return None without dropout."""
    if call.dropout_seed is None:
        seed = None
    else:
        seed = tl.load(call.dropout_seed)
    return seed


@triton.jit
def _above(random, drop_below):
    return (random.to(tl.int32, bitcast=True) >= drop_below).to(tl.int8)


@triton.jit
def kept_pairs(seed, number, head, query, start, call, BLOCK_K: tl.constexpr):
    """Return a mask of the pairs that dropout keeps, for BLOCK_K keys from ``start`` on, or None without a ``seed``.

    The mask comes from Philox numbers keyed by ``seed``. The counter, four words of 32 bits, is (key / 4, query,
    window, head), so it never repeats in a call. Each counter gives four numbers, one for each of four consecutive
    keys.
    """
    if seed is None:
        keep = None
    else:
        below = call.drop_below
        quad = start // 4 + tl.arange(0, BLOCK_K // 4)
        r0, r1, r2, r3 = tl.philox(seed, quad[None, :], query[:, None], number, head)
        k0, k1, k2, k3 = _above(r0, below), _above(r1, below), _above(r2, below), _above(r3, below)
        keep = tl.reshape(tl.join(tl.join(k0, k2), tl.join(k1, k3)), (query.shape[0], BLOCK_K)) != 0
    return keep


@triton.jit
def drop(probs, keep):
    """Return P with the dropped pairs set to zero, but not scaled: scaled_by_keep scales the sums over kept pairs."""
    return probs if keep is None else tl.where(keep, probs, 0.0)


@triton.jit
def scaled_by_keep(tile, call):
    """Multiply sums over the kept pairs by 1 / (1 - p), for dropout."""
    return tile if call.dropout_seed is None else tile * call.keep_scale
