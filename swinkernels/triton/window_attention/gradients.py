"""Steps that the kernels of the backward pass share: loading a tile's inputs and computing its gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from swinkernels.triton._window_address import locate
from swinkernels.triton.window_attention.call import K, Q, V
from swinkernels.triton.window_attention.key_windows import locate_keys
from swinkernels.triton.window_attention.mask import region_of
from swinkernels.triton.window_attention.rows import load_dense, load_lse, load_rows
from swinkernels.triton.window_attention.scores import LN_100, inverse_norm, probabilities, products

_LARGEST_INVERSE = tl.constexpr(1e12)


class Queries(NamedTuple):
    """The queries of a tile: positions, seam bits, rows of q, their inverse norms, rows of dout, and lse."""

    at: Any
    beyond: Any
    q: Any
    inverse: Any
    dout: Any
    lse: Any


class Keys(NamedTuple):
    """The keys of a tile: positions, seam bits, rows of k, their inverse norms, and rows of v."""

    at: Any
    beyond: Any
    k: Any
    inverse: Any
    v: Any


@triton.jit
def load_queries(window, number, token, beyond, dout, lse, head, call, STATIC: tl.constexpr):
    at = locate(window, token, call, STATIC)
    q = load_rows(call, Q, at, head, STATIC)
    dout_tile = load_dense(dout, at, head, call, STATIC)
    lse_tile = load_lse(lse, number, head, token, call, STATIC)
    return Queries(at, beyond, q, inverse_norm(q, call), dout_tile, lse_tile)


@triton.jit
def load_keys(window, token, beyond, head, call, STATIC: tl.constexpr):
    at = locate_keys(window, token, call, STATIC)
    k = load_rows(call, K, at, head, STATIC)
    v = load_rows(call, V, at, head, STATIC)
    return Keys(at, beyond, k, inverse_norm(k, call), v)


@triton.jit
def recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC: tl.constexpr):
    """Return the scores of a tile before bias and mask, times UNIT, and P recomputed from lse."""
    scores = products(queries.q, keys.k, queries.inverse, keys.inverse, unit_scale, call, STATIC)
    query_region = region_of(window, queries.at.token, queries.beyond, seams, call, STATIC)
    key_region = region_of(window, keys.at.token, keys.beyond, seams, call, STATIC)
    return scores, probabilities(scores, bias, queries.lse, seams, query_region, key_region, call, STATIC)


@triton.jit
def dprobs_of(queries, keys, keep, call, STATIC: tl.constexpr):
    """Return dP of a tile, with dropout applied."""
    dprobs = tl.dot(queries.dout, tl.trans(keys.v), input_precision=STATIC.PRECISION)
    if keep is not None:
        dprobs = tl.where(keep, dprobs * call.keep_scale, 0.0)
    return dprobs


@triton.jit
def excess_of(dscores, dtype: tl.constexpr):
    """Return the divisor that brings a tile of dS into float16's range, or None for dtypes with float32's range.

    The divisor is needed because dq and dk can be in range although dS is not.
    """
    if dtype == tl.float16:
        excess = tl.maximum(tl.max(tl.max(tl.abs(dscores), axis=1), axis=0) * (1 / 32768), 1.0)
    else:
        excess = None
    return excess


@triton.jit
def narrow(dscores, excess, dtype: tl.constexpr):
    """Divide dS by ``excess`` and round it to ``dtype``; products of the result must be multiplied by ``excess``."""
    return (dscores if excess is None else dscores * (1.0 / excess)).to(dtype)


@triton.jit
def unit_rows(x, inverse, call):
    """Return ``x``, rows of q or k, in the form that dS is multiplied by: in v2, divided by their norms."""
    return x if call.logit_scale is None else (x.to(tl.float32) * inverse[:, None]).to(x.dtype)


@triton.jit
def add_product(total, a, b, factor, STATIC: tl.constexpr):
    """Return total + factor a b; a ``factor`` of None is 1."""
    if factor is None:
        total = tl.dot(a, b, total, input_precision=STATIC.PRECISION)
    else:
        total += tl.dot(a, b, input_precision=STATIC.PRECISION) * factor
    return total


@triton.jit
def row_gradient(d, x, inverse, scale, call):
    """Return the gradient of rows of q or k, given d, the sum of dS times the rows of k or q.

    In v2 the component of d along the row is subtracted: it would only change the row's length, which normalising
    removes.
    """
    d *= scale
    if call.logit_scale is not None:
        unit = x.to(tl.float32) * inverse[:, None]
        along = tl.where(inverse < _LARGEST_INVERSE, tl.sum(unit * d, axis=1), 0.0)
        d = (d - unit * along[:, None]) * inverse[:, None]
    return d


@triton.jit
def store_dlogit_scale(dlogit_scale, rows, program, head, call, STATIC: tl.constexpr):
    """Store a program's share of the gradient of a logit scale, which is zero if the scale is clamped.

    The float32 number nearest to ln 100 is above ln 100, so it counts as clamped, as in torch.clamp.
    """
    total = tl.sum(rows, axis=0) * (1.0 / STATIC.UNIT)
    clamped = tl.load(call.logit_scale + head) >= LN_100
    tl.store(dlogit_scale + program, tl.where(clamped, 0.0, total))


@triton.jit
def store_dbias(dbias, tile, group, query, key, head, call, STATIC: tl.constexpr):
    """Store a tile of a group's sums in dbias (groups, heads, N, M)."""
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    inside = (query < VOLUME)[:, None] & (key < KEY_VOLUME)[None, :]
    at = dbias + (group.to(tl.int64) * call.num_heads + head) * (VOLUME * KEY_VOLUME)
    tl.store(at + query[:, None] * KEY_VOLUME + key[None, :], tile, mask=inside)
