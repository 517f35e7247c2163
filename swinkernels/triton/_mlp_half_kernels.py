"""The Triton kernel of an MLP half: norm, both products with GELU between them, and residual connection, in one pass.

Maths     pre:  y = s + fc2(gelu(fc1(norm(s)))), post: y = s + norm(fc2(gelu(fc1(s)))), with s = x + branch.
          The statistics (two passes over registers), GELU and the sums of both products are float32. The left operands
          of both products are rounded to the weights' dtype; the result is rounded once, to the dtype of x.
Tiling    a program processes ROWS tokens with all C channels. A tile's width must be a power of two, and C is not, so
          each token is split into WIDE and C - WIDE channels. A program computes CHUNK hidden channels per step: fc1
          sums over both parts, and the result of GELU, in registers, is the left operand of fc2. On Hopper, four warps
          together execute each tensor core instruction, for 64 tokens.
Traffic   x and branch are read once from memory, and a second time, for the residual connection, from the L2 cache,
          because keeping them would take as many registers as the left operand of fc1. y is written once. Each program
          reads both weights once, from the L2 cache.
Roofline  B=128, 56x56, C=96, bf16, H100 SXM (published peaks): 154 MB, 46 us at 3.35 TB/s; 59 GFLOP, 60 us at 989
          TFLOP/s. C=192 at 28x28 has half of the bytes and as many flops. docs/dev/memory-bound.md has predictions.
Limits    rows below 2^31; C a sum of two powers of two; the hidden channels a multiple of CHUNK.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Coefficients, lowest power first, of a polynomial p(t) that approximates log2 of the standard normal CDF at -t. Up to
# t = 5.25, exp2(p) has a relative error of at most 1.4e-4. For larger t, p falls to minus infinity, and t exp2(p) has
# an absolute error of at most 3e-10.
_TAIL_0 = tl.constexpr(-1.00020398)
_TAIL_1 = tl.constexpr(-1.14807992)
_TAIL_2 = tl.constexpr(-0.466375237)
_TAIL_3 = tl.constexpr(-0.0466448444)
_TAIL_4 = tl.constexpr(0.00537467162)
_TAIL_5 = tl.constexpr(-0.000275963182)
_TAIL_END = tl.constexpr(20.0)  # upper limit of t: exp2(p) is zero there, and infinity times zero would be NaN
_TANH_SLOPE = tl.constexpr(-2.302208198)  # -2 log2(e) sqrt(2 / pi)
_TANH_CUBE = tl.constexpr(-2.302208198 * 0.044715)


@triton.jit
def gelu(x, FORM: tl.constexpr):
    """Return GELU of ``x`` in float32; FORM is "erf" (exact), "tail" (for 16-bit results) or "tanh" (as in torch)."""
    if FORM == "erf":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif FORM == "tail":
        t = tl.minimum(tl.abs(x), _TAIL_END)
        p = t * _TAIL_5 + _TAIL_4
        p = p * t + _TAIL_3
        p = p * t + _TAIL_2
        p = p * t + _TAIL_1
        p = p * t + _TAIL_0
        y = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - t * tl.exp2(p)
    else:  # x (1 + tanh(u)) / 2 = x / (1 + exp(-2 u))
        y = x / (1.0 + tl.exp2(x * (x * x * _TANH_CUBE + _TANH_SLOPE)))
    return y


@triton.jit
def _load_rows(x, branch, row, count, column, C: tl.constexpr, LAST: tl.constexpr):
    """Load columns of x + branch for a program's tokens, in float32; LAST is False if they will be loaded again.

    The cache hints of the two loads differ. With equal hints the compiler would merge the loads and keep the tokens in
    registers throughout the loop.
    """
    eviction: tl.constexpr = "evict_first" if LAST else "evict_last"
    at, there = row[:, None] * C + column[None, :], (row < count)[:, None]
    part = tl.load(x + at, mask=there, other=0.0, eviction_policy=eviction).to(tl.float32)
    if branch is not None:
        part += tl.load(branch + at, mask=there, other=0.0, eviction_policy=eviction).to(tl.float32)
    return part


@triton.jit
def _store_rows(y, part, row, count, column, C: tl.constexpr):
    at, there = row[:, None] * C + column[None, :], (row < count)[:, None]
    tl.store(y + at, part.to(y.dtype.element_ty), mask=there)


@triton.jit
def _add_columns(part, values, column):
    return part if values is None else part + tl.load(values + column).to(tl.float32)[None, :]


@triton.jit
def _scale_columns(part, values, column):
    return part if values is None else part * tl.load(values + column).to(tl.float32)[None, :]


@triton.jit
def _norm(a, b, weight, bias, eps, column_a, column_b):
    """Return the layer norm of tokens whose channels are split into ``a`` and ``b``, in the same two parts."""
    C: tl.constexpr = a.shape[1] + b.shape[1]
    mean = (tl.sum(a, axis=1) + tl.sum(b, axis=1)) / C
    a, b = a - mean[:, None], b - mean[:, None]
    rstd = tl.rsqrt((tl.sum(a * a, axis=1) + tl.sum(b * b, axis=1)) / C + eps)
    a = _add_columns(_scale_columns(a * rstd[:, None], weight, column_a), bias, column_a)
    b = _add_columns(_scale_columns(b * rstd[:, None], weight, column_b), bias, column_b)
    return a, b


@triton.jit(do_not_specialize=["rows"])  # otherwise a new batch size could trigger a recompilation
def fwd(
    x, branch, norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias, y, eps, rows,
    C: tl.constexpr, HIDDEN: tl.constexpr, POST: tl.constexpr, FORM: tl.constexpr, WIDE: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = fc1_weight.dtype.element_ty
    first = tl.program_id(0) * ROWS
    row, count = tl.arange(0, ROWS), rows - first
    x += first.to(tl.int64) * C
    y += first.to(tl.int64) * C
    if branch is not None:
        branch += first.to(tl.int64) * C
    column_a, column_b = tl.arange(0, WIDE), WIDE + tl.arange(0, C - WIDE)
    a = _load_rows(x, branch, row, count, column_a, C, False)
    b = _load_rows(x, branch, row, count, column_b, C, False)
    if not POST:
        a, b = _norm(a, b, norm_weight, norm_bias, eps, column_a, column_b)
    z_a, z_b = a.to(dtype), b.to(dtype)

    a, b = tl.zeros([ROWS, WIDE], tl.float32), tl.zeros([ROWS, C - WIDE], tl.float32)
    hidden = tl.arange(0, CHUNK)
    for first_hidden in range(0, HIDDEN, CHUNK):
        from_hidden = fc1_weight + first_hidden * C + hidden[None, :] * C  # (C, hidden), the transpose
        h = tl.dot(z_a, tl.load(from_hidden + column_a[:, None]), input_precision=PRECISION)
        h = tl.dot(z_b, tl.load(from_hidden + column_b[:, None]), h, input_precision=PRECISION)
        h = gelu(_add_columns(h, fc1_bias, first_hidden + hidden), FORM).to(dtype)
        to_hidden = fc2_weight + first_hidden + hidden[:, None]  # (hidden, C), the transpose
        a = tl.dot(h, tl.load(to_hidden + column_a[None, :] * HIDDEN), a, input_precision=PRECISION)
        b = tl.dot(h, tl.load(to_hidden + column_b[None, :] * HIDDEN), b, input_precision=PRECISION)

    if POST:
        a, b = _add_columns(a, fc2_bias, column_a), _add_columns(b, fc2_bias, column_b)
        a, b = _norm(a, b, norm_weight, norm_bias, eps, column_a, column_b)
    s = _load_rows(x, branch, row, count, column_a, C, True)
    _store_rows(y, a + (s if POST else _add_columns(s, fc2_bias, column_a)), row, count, column_a, C)
    s = _load_rows(x, branch, row, count, column_b, C, True)
    _store_rows(y, b + (s if POST else _add_columns(s, fc2_bias, column_b)), row, count, column_b, C)
