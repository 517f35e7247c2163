"""The kernels of the backward pass."""

from __future__ import annotations

import triton.language as tl

from swinkernels.triton._window_address import split_window
from swinkernels.triton.window_attention.axis_tables import (
    add_axis_bias,
    add_axis_query_gradient,
    add_dproducts,
    axis_products,
    load_products,
    split_products,
    store_products,
)
from swinkernels.triton.window_attention.call import K, Q, V, kernel
from swinkernels.triton.window_attention.gradients import (
    add_product,
    dprobs_of,
    excess_of,
    load_keys,
    load_queries,
    narrow,
    recompute,
    row_gradient,
    store_dbias,
    store_dlogit_scale,
    unit_rows,
)
from swinkernels.triton.window_attention.key_windows import store_of_window
from swinkernels.triton.window_attention.mask import beyond_seam, seams_of
from swinkernels.triton.window_attention.rows import is_pad, load_lse, load_rows, store_dpad, store_gradient, store_lse
from swinkernels.triton.window_attention.scores import (
    bias_tile,
    drop,
    head_scale,
    head_unit_scale,
    inverse_norm,
    kept_pairs,
    load_seed,
    scaled_by_keep,
)
from swinkernels.triton.window_attention.windows import first_window, next_of_type, type_of, window_of_type


@kernel
def bwd_whole(
    call, dout, lse, dmaps, dbias, dlogit_scale, dpad, batch_windows, windows_per_program,
    STATIC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the backward pass for windows of one tile; a program walks over a group of windows.

    The program also writes its sums over these windows to each of the following arguments that is not None: ``dbias``
    (groups, heads, N, N), ``dlogit_scale`` (groups, heads), and ``dpad`` (groups, 2, heads, HEAD_DIM), dk and dv of pad
    tokens.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    VOLUME: tl.constexpr = STATIC.VOLUME
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    NORMALISED: tl.constexpr = dtype != tl.bfloat16
    program = tl.program_id(0)
    head = program % call.num_heads
    group = program // call.num_heads
    kind, first, count = first_window(group, batch_windows, windows_per_program, call)
    window = split_window(window_of_type(kind, first, call, STATIC), call.size, WINDOW)
    token = tl.arange(0, BLOCK_N)
    beyond = beyond_seam(token, call, STATIC)
    bias = bias_tile(kind, token, token, head, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    scale = head_scale(unit_scale, call, STATIC)
    seed = load_seed(call)
    if dbias is not None:
        dbias_tile = tl.zeros([BLOCK_N, BLOCK_N], tl.float32)
    if dlogit_scale is not None:
        dlogit_rows = tl.zeros([BLOCK_N], tl.float32)
    if dpad is not None:
        dpad_k = tl.zeros([BLOCK_D], tl.float32)
        dpad_v = tl.zeros([BLOCK_D], tl.float32)

    for i in range(count):
        number = window_of_type(kind, first + i, call, STATIC)
        queries = load_queries(window, number, token, beyond, dout, lse, head, call, STATIC)
        keys = load_keys(window, token, beyond, head, call, STATIC)
        seams = seams_of(window, call, STATIC)
        at, q, k = keys.at, queries.q, keys.k
        scores, probs = recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC)
        keep = kept_pairs(seed, number, head, token, 0, call, BLOCK_N)
        dv = tl.dot(tl.trans(drop(probs, keep).to(dtype)), queries.dout, input_precision=STATIC.PRECISION)
        dv = scaled_by_keep(dv, call)
        store_gradient(dmaps, V, dv, at, head, call, STATIC)
        dprobs = dprobs_of(queries, keys, keep, call, STATIC)
        delta = tl.sum(probs * dprobs, axis=1)
        if NORMALISED:
            delta /= tl.maximum(tl.sum(probs, axis=1), 1e-30)
        dscores = probs * (dprobs - delta[:, None])
        if dbias is not None:
            dbias_tile += dscores
        if dlogit_scale is not None:
            dlogit_rows += tl.sum(dscores * scores, axis=1)
        excess = excess_of(dscores, dtype)
        rounded = narrow(dscores, excess, dtype)
        row_scale = scale if excess is None else scale * excess
        if call.logit_scale is not None:  # reads q and k again, from the cache, because keeping them spills registers
            q = load_rows(call, Q, at, head, STATIC)
            k = load_rows(call, K, at, head, STATIC)
        q_inverse, k_inverse = inverse_norm(q, call), inverse_norm(k, call)
        dk = tl.dot(tl.trans(rounded), unit_rows(q, q_inverse, call), input_precision=STATIC.PRECISION)
        dk = row_gradient(dk, k, k_inverse, row_scale, call)
        store_gradient(dmaps, K, dk, at, head, call, STATIC)
        dq = tl.dot(rounded, unit_rows(k, k_inverse, call), input_precision=STATIC.PRECISION)
        dq = row_gradient(dq, q, q_inverse, row_scale, call)
        store_gradient(dmaps, Q, dq, at, head, call, STATIC)
        if dpad is not None:
            pad = is_pad(at, VOLUME)[:, None]
            dpad_k += tl.sum(tl.where(pad, dk, 0.0), axis=0)
            dpad_v += tl.sum(tl.where(pad, dv, 0.0), axis=0)
        window = next_of_type(window, kind, first + i + 1, call, STATIC)

    if dbias is not None:
        store_dbias(dbias, dbias_tile, group, token, token, head, call, STATIC)
    if dlogit_scale is not None:
        store_dlogit_scale(dlogit_scale, dlogit_rows, program, head, call, STATIC)
    if dpad is not None:
        store_dpad(dpad, dpad_k, dpad_v, group, head, call, STATIC)


@kernel
def bwd_tiled_dq(
    call, dout, lse, delta, dmaps, dlogit_scale, axis_scores, daxis_scores,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dq for windows of several tiles; a program owns a query tile.

    The program also writes delta, in the layout of lse, for the kernels that follow. It writes its share of
    dlogit_scale (windows * query tiles, heads), and A and dA of axis_tables, to the arguments that are not None.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    BLOCK_COLUMNS: tl.constexpr = STATIC.BLOCK_COLUMNS
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    NORMALISED: tl.constexpr = dtype != tl.bfloat16
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    Q_TILES: tl.constexpr = (VOLUME + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    head = program % call.num_heads
    number = program // call.num_heads // Q_TILES
    query = program // call.num_heads % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    beyond = beyond_seam(query, call, STATIC)
    window = split_window(number, call.size, WINDOW)
    seams = seams_of(window, call, STATIC)
    queries = load_queries(window, number, query, beyond, dout, lse, head, call, STATIC)
    kind = type_of(number, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    scale = head_scale(unit_scale, call, STATIC)
    seed = load_seed(call)

    if call.axis_tables is not None:
        products = axis_products(queries.q, query, call, STATIC)
        store_products(axis_scores, products, number, head, query, call, STATIC)
        axes = split_products(products, call)
        daxes = tl.zeros([BLOCK_Q, BLOCK_COLUMNS], tl.float32)

    delta_tile = tl.zeros([BLOCK_Q], tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(0, KEY_VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        bias = bias_tile(kind, query, key, head, call, STATIC)
        if call.axis_tables is not None:
            bias = add_axis_bias(bias, axes, key, call, STATIC)
        keys = load_keys(window, key, beyond_seam(key, call, STATIC), head, call, STATIC)
        _, probs = recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC)
        keep = kept_pairs(seed, number, head, query, start, call, BLOCK_K)
        dprobs = dprobs_of(queries, keys, keep, call, STATIC)
        delta_tile += tl.sum(probs * dprobs, axis=1)
        if NORMALISED:
            total += tl.sum(probs, axis=1)
    if NORMALISED:
        delta_tile /= tl.maximum(total, 1e-30)
    store_lse(delta, delta_tile, number, head, query, call, STATIC)

    if dlogit_scale is not None:
        dlogit_rows = tl.zeros([BLOCK_Q], tl.float32)
    dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for start in range(0, KEY_VOLUME, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        bias = bias_tile(kind, query, key, head, call, STATIC)
        if call.axis_tables is not None:
            bias = add_axis_bias(bias, axes, key, call, STATIC)
        keys = load_keys(window, key, beyond_seam(key, call, STATIC), head, call, STATIC)
        scores, probs = recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC)
        keep = kept_pairs(seed, number, head, query, start, call, BLOCK_K)
        dprobs = dprobs_of(queries, keys, keep, call, STATIC)
        dscores = probs * (dprobs - delta_tile[:, None])
        if dlogit_scale is not None:
            dlogit_rows += tl.sum(dscores * scores, axis=1)
        excess = excess_of(dscores, dtype)
        rounded = narrow(dscores, excess, dtype)
        dq = add_product(dq, rounded, unit_rows(keys.k, keys.inverse, call), excess, STATIC)
        if call.axis_tables is not None:
            daxes = add_dproducts(daxes, rounded, excess, key, STATIC)
    if dlogit_scale is not None:
        store_dlogit_scale(dlogit_scale, dlogit_rows, program, head, call, STATIC)
    dq = row_gradient(dq, queries.q, queries.inverse, scale, call)
    if call.axis_tables is not None:
        dq = add_axis_query_gradient(dq, daxes, query, call, STATIC)
        if daxis_scores is not None:
            store_products(daxis_scores, daxes, number, head, query, call, STATIC)
    store_gradient(dmaps, Q, dq, queries.at, head, call, STATIC)


@kernel
def bwd_tiled_dkdv(
    call, dout, lse, delta, dmaps, dpad, axis_scores, of_windows,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dk and dv for windows of several tiles; a program owns a key tile.

    With a key_window, dk and dv are written to ``of_windows``, for sum_key_gradients. The program also writes its sums
    of dk and dv over pad tokens to ``dpad`` (windows * key tiles, 2, heads, HEAD_DIM), unless ``dpad`` is None.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    dtype: tl.constexpr = call.maps[0].dtype.element_ty
    VOLUME: tl.constexpr = STATIC.VOLUME
    KEY_VOLUME: tl.constexpr = STATIC.KEY_VOLUME
    K_TILES: tl.constexpr = (KEY_VOLUME + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head = program % call.num_heads
    group = program // call.num_heads
    number = group // K_TILES
    first_key = group % K_TILES * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    beyond = beyond_seam(key, call, STATIC)
    window = split_window(number, call.size, WINDOW)
    seams = seams_of(window, call, STATIC)
    keys = load_keys(window, key, beyond, head, call, STATIC)
    kind = type_of(number, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    scale = head_scale(unit_scale, call, STATIC)
    seed = load_seed(call)

    dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, VOLUME, BLOCK_Q):
        query = start + tl.arange(0, BLOCK_Q)
        query_beyond = beyond_seam(query, call, STATIC)
        queries = load_queries(window, number, query, query_beyond, dout, lse, head, call, STATIC)
        delta_tile = load_lse(delta, number, head, query, call, STATIC)
        bias = bias_tile(kind, query, key, head, call, STATIC)
        if call.axis_tables is not None:
            products = load_products(axis_scores, number, head, query, call, STATIC)
            bias = add_axis_bias(bias, split_products(products, call), key, call, STATIC)
        _, probs = recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC)
        keep = kept_pairs(seed, number, head, query, first_key, call, BLOCK_K)
        dprobs = dprobs_of(queries, keys, keep, call, STATIC)
        dscores = probs * (dprobs - delta_tile[:, None])
        kept = drop(probs, keep).to(dtype)
        dv = tl.dot(tl.trans(kept), queries.dout, dv, input_precision=STATIC.PRECISION)
        excess = excess_of(dscores, dtype)
        rounded = tl.trans(narrow(dscores, excess, dtype))
        dk = add_product(dk, rounded, unit_rows(queries.q, queries.inverse, call), excess, STATIC)

    dk = row_gradient(dk, keys.k, keys.inverse, scale, call)
    dv = scaled_by_keep(dv, call)
    if of_windows is not None:
        store_of_window(of_windows, K, dk, number, head, key, call, STATIC)
        store_of_window(of_windows, V, dv, number, head, key, call, STATIC)
    else:
        store_gradient(dmaps, K, dk, keys.at, head, call, STATIC)
        store_gradient(dmaps, V, dv, keys.at, head, call, STATIC)
    if dpad is not None:
        pad = is_pad(keys.at, KEY_VOLUME)[:, None]
        dpad_k = tl.sum(tl.where(pad, dk, 0.0), axis=0)
        store_dpad(dpad, dpad_k, tl.sum(tl.where(pad, dv, 0.0), axis=0), group, head, call, STATIC)


@kernel
def bwd_tiled_dbias(
    call, dout, lse, delta, dbias, batch_windows, windows_per_program,
    STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute dbias (groups, heads, N, M) for windows of several tiles.

    A program owns a tile of dbias and walks over a group of windows.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    Q_TILES: tl.constexpr = (STATIC.VOLUME + BLOCK_Q - 1) // BLOCK_Q
    K_TILES: tl.constexpr = (STATIC.KEY_VOLUME + BLOCK_K - 1) // BLOCK_K
    program = tl.program_id(0)
    head = program % call.num_heads
    tile = program // call.num_heads
    first_key = tile % K_TILES * BLOCK_K
    key = first_key + tl.arange(0, BLOCK_K)
    key_beyond = beyond_seam(key, call, STATIC)
    query = tile // K_TILES % Q_TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    query_beyond = beyond_seam(query, call, STATIC)
    group = tile // (K_TILES * Q_TILES)
    kind, first, count = first_window(group, batch_windows, windows_per_program, call)
    window = split_window(window_of_type(kind, first, call, STATIC), call.size, WINDOW)
    bias = bias_tile(kind, query, key, head, call, STATIC)
    unit_scale = head_unit_scale(head, call, STATIC)
    seed = load_seed(call)

    dbias_tile = tl.zeros([BLOCK_Q, BLOCK_K], tl.float32)
    for i in range(count):
        number = window_of_type(kind, first + i, call, STATIC)
        queries = load_queries(window, number, query, query_beyond, dout, lse, head, call, STATIC)
        keys = load_keys(window, key, key_beyond, head, call, STATIC)
        delta_tile = load_lse(delta, number, head, query, call, STATIC)
        seams = seams_of(window, call, STATIC)
        _, probs = recompute(window, queries, keys, bias, seams, unit_scale, call, STATIC)
        keep = kept_pairs(seed, number, head, query, first_key, call, BLOCK_K)
        dprobs = dprobs_of(queries, keys, keep, call, STATIC)
        dbias_tile += probs * (dprobs - delta_tile[:, None])
        window = next_of_type(window, kind, first + i + 1, call, STATIC)
    store_dbias(dbias, dbias_tile, group, query, key, head, call, STATIC)
