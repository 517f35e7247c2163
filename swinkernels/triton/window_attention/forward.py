"""The kernels of the forward pass; they compute out and, unless it is None, lse."""

from __future__ import annotations

import triton.language as tl

from swinkernels.triton._window_address import locate, split_window
from swinkernels.triton.window_attention.axis_tables import add_axis_bias, axis_products, split_products
from swinkernels.triton.window_attention.call import K, Q, V, kernel
from swinkernels.triton.window_attention.key_windows import locate_keys
from swinkernels.triton.window_attention.mask import beyond_seam, masked, region_of, seams_of
from swinkernels.triton.window_attention.rows import load_rows, store_dense, store_lse
from swinkernels.triton.window_attention.scores import (
    bias_tile,
    drop,
    exp_units,
    head_unit_scale,
    inverse_norm,
    kept_pairs,
    load_seed,
    log_sum_exp,
    products,
    scaled_by_keep,
)
from swinkernels.triton.window_attention.windows import first_window, next_of_type, type_of, window_of_type

_LOWEST = tl.constexpr(-3.0e38)  # the lowest finite score


@kernel
def fwd_whole(call, out, lse, batch_windows, windows_per_program, STATIC: tl.constexpr, BLOCK_N: tl.constexpr):
    """Run the forward pass for windows of one tile; a program walks over a group of windows."""
    WINDOW: tl.constexpr = STATIC.WINDOW
    program = tl.program_id(0)
    head = program % call.num_heads
    kind, first, count = first_window(program // call.num_heads, batch_windows, windows_per_program, call)
    window = split_window(window_of_type(kind, first, call, STATIC), call.size, WINDOW)
    token = tl.arange(0, BLOCK_N)
    beyond = beyond_seam(token, call, STATIC)
    bias = bias_tile(kind, token, token, head, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    seed = load_seed(call)

    for i in range(count):
        number = window_of_type(kind, first + i, call, STATIC)
        at = locate(window, token, call, STATIC)
        q = load_rows(call, Q, at, head, STATIC)
        k = load_rows(call, K, at, head, STATIC)
        v = load_rows(call, V, at, head, STATIC)
        scores = products(q, k, inverse_norm(q, call), inverse_norm(k, call), unit_scale, call, STATIC) + bias
        if STATIC.HAS_MASK:
            seams = seams_of(window, call, STATIC)
            if seams != 0:
                region = region_of(window, token, beyond, seams, call, STATIC)
                scores = masked(scores, region, region, call)
        top = tl.max(scores, axis=1)
        probs = exp_units(scores - top[:, None], STATIC)
        total = tl.sum(probs, axis=1)
        kept = drop(probs, kept_pairs(seed, number, head, token, 0, call, BLOCK_N)).to(v.dtype)
        result = scaled_by_keep(tl.dot(kept, v, input_precision=STATIC.PRECISION) / total[:, None], call)
        store_dense(out, result, at, head, call.num_heads, call, STATIC)
        if lse is not None:
            store_lse(lse, log_sum_exp(top, total, STATIC), number, head, token, call, STATIC)
        window = next_of_type(window, kind, first + i + 1, call, STATIC)


@kernel
def fwd_tiled(call, out, lse, STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Run the forward pass for windows of several tiles; a program owns a query tile of a window, for one head."""
    WINDOW: tl.constexpr = STATIC.WINDOW
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    Q_TILES: tl.constexpr = (VOLUME + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    head = program % call.num_heads
    number = program // call.num_heads // Q_TILES
    query = program // call.num_heads % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_beyond = beyond_seam(query, call, STATIC)
    window = split_window(number, call.size, WINDOW)
    seams = seams_of(window, call, STATIC)
    at = locate(window, query, call, STATIC)
    q = load_rows(call, Q, at, head, STATIC)
    q_inverse = inverse_norm(q, call)
    kind = type_of(number, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    seed = load_seed(call)
    if call.axis_tables is not None:
        axes = split_products(axis_products(q, query, call, STATIC), call)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, KEY_VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        key_beyond = beyond_seam(key, call, STATIC)
        key_at = locate_keys(window, key, call, STATIC)
        k = load_rows(call, K, key_at, head, STATIC)
        v = load_rows(call, V, key_at, head, STATIC)
        bias = bias_tile(kind, query, key, head, call, STATIC)
        if call.axis_tables is not None:
            bias = add_axis_bias(bias, axes, key, call, STATIC)
        scores = products(q, k, q_inverse, inverse_norm(k, call), unit_scale, call, STATIC) + bias
        if STATIC.HAS_MASK:
            if seams != 0:
                query_region = region_of(window, query, query_beyond, seams, call, STATIC)
                key_region = region_of(window, key, key_beyond, seams, call, STATIC)
                scores = masked(scores, query_region, key_region, call)
        higher = tl.maximum(top, tl.max(scores, axis=1))  # finite: every key tile contains a token
        if call.dense_bias is not None:  # a dense bias may be minus infinity for all keys of a tile
            higher = tl.maximum(higher, _LOWEST)
        probs = exp_units(scores - higher[:, None], STATIC)
        rescale = exp_units(top - higher, STATIC)
        total = total * rescale + tl.sum(probs, axis=1)
        kept = drop(probs, kept_pairs(seed, number, head, query, start, call, BLOCK_K)).to(v.dtype)
        result = tl.dot(kept, v, result * rescale[:, None], input_precision=STATIC.PRECISION)
        top = higher

    result = scaled_by_keep(result / total[:, None], call)
    store_dense(out, result, at, head, call.num_heads, call, STATIC)
    if lse is not None:
        store_lse(lse, log_sum_exp(top, total, STATIC), number, head, query, call, STATIC)
