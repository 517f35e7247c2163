"""The kernel that sums a key's gradients over the key windows that contain the key."""

from __future__ import annotations

import triton.language as tl

from swinkernels.triton._window_address import coordinates, locate, split_window
from swinkernels.triton.window_attention.call import K, V, kernel
from swinkernels.triton.window_attention.key_windows import key_rows
from swinkernels.triton.window_attention.rows import store_gradient


@kernel
def sum_key_gradients(call, of_windows, dmaps, STATIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Sum each token's dk and dv over the key windows that contain it.

    A program owns a tile of tokens of a window, for one head.
    """
    WINDOW: tl.constexpr = STATIC.WINDOW
    KEY_WINDOW: tl.constexpr = STATIC.KEY_WINDOW
    BLOCK_D: tl.constexpr = STATIC.BLOCK_D
    MARGIN_0: tl.constexpr = (KEY_WINDOW[0] - WINDOW[0]) // 2
    MARGIN_1: tl.constexpr = (KEY_WINDOW[1] - WINDOW[1]) // 2
    MARGIN_2: tl.constexpr = (KEY_WINDOW[2] - WINDOW[2]) // 2
    FAR_0: tl.constexpr = (MARGIN_0 + WINDOW[0] - 1) // WINDOW[0]  # windows on each side
    FAR_1: tl.constexpr = (MARGIN_1 + WINDOW[1] - 1) // WINDOW[1]
    FAR_2: tl.constexpr = (MARGIN_2 + WINDOW[2] - 1) // WINDOW[2]
    TILES: tl.constexpr = (STATIC.VOLUME + BLOCK_Q - 1) // BLOCK_Q
    program = tl.program_id(0)
    head = program % call.num_heads
    token = program // call.num_heads % TILES * BLOCK_Q + tl.arange(0, BLOCK_Q)
    window = split_window(program // call.num_heads // TILES, call.size, WINDOW)
    at = locate(window, token, call, STATIC)
    t0, t1, t2 = coordinates(token, WINDOW)
    size = call.size
    num0, num1, num2 = tl.cdiv(size[0], WINDOW[0]), tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
    inside = at.real[:, None] & (tl.arange(0, BLOCK_D) < STATIC.HEAD_DIM)[None, :]

    dk = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for o0 in range(-FAR_0, FAR_0 + 1):
        n0 = window.n0 + o0
        k0 = t0 - o0 * WINDOW[0] + MARGIN_0
        has_0 = (n0 >= 0) & (n0 < num0) & (k0 >= 0) & (k0 < KEY_WINDOW[0])
        for o1 in range(-FAR_1, FAR_1 + 1):
            n1 = window.n1 + o1
            k1 = t1 - o1 * WINDOW[1] + MARGIN_1
            has_1 = has_0 & (n1 >= 0) & (n1 < num1) & (k1 >= 0) & (k1 < KEY_WINDOW[1])
            for o2 in range(-FAR_2, FAR_2 + 1):
                n2 = window.n2 + o2
                k2 = t2 - o2 * WINDOW[2] + MARGIN_2
                has = has_1 & (n2 >= 0) & (n2 < num2) & (k2 >= 0) & (k2 < KEY_WINDOW[2])
                number = ((window.image * num0 + n0) * num1 + n1) * num2 + n2
                key = (k0 * KEY_WINDOW[1] + k1) * KEY_WINDOW[2] + k2
                mask = inside & has[:, None]
                dk += tl.load(key_rows(of_windows, number, head, K, key, call, STATIC), mask=mask, other=0.0)
                dv += tl.load(key_rows(of_windows, number, head, V, key, call, STATIC), mask=mask, other=0.0)
    store_gradient(dmaps, K, dk, at, head, call, STATIC)
    store_gradient(dmaps, V, dv, at, head, call, STATIC)
