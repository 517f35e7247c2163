"""Computes in NumPy the dropout masks that the kernels derive from a seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_ROUNDS = 10


def philox(key: int, counter: np.ndarray) -> np.ndarray:
    """Return the Philox4x32-10 output (Salmon et al., 2011) for ``key`` and ``counter`` (..., 4), as uint32."""
    c = counter.astype(np.uint64)
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(_ROUNDS):
        p0, p1 = np.uint64(0xD2511F53) * c[..., 0], np.uint64(0xCD9E8D57) * c[..., 2]
        low, high = np.uint64(0xFFFFFFFF), np.uint64(32)
        c = np.stack(
            [
                (p1 >> high) ^ c[..., 1] ^ np.uint64(k0),
                p1 & low,
                (p0 >> high) ^ c[..., 3] ^ np.uint64(k1),
                p0 & low,
            ],
            axis=-1,
        )
        k0, k1 = k0 + 0x9E3779B9 & 0xFFFFFFFF, k1 + 0xBB67AE85 & 0xFFFFFFFF
    return c.astype(np.uint32)


def kept_weights(seed: int, p: float, batch: int, num_windows: int, num_heads: int, tokens: int) -> Tensor:
    """Return the mask (B, num_windows, heads, N, N) of attention weights that the CUDA kernels keep (dropout.cuh)."""
    head, i, j = np.meshgrid(
        np.arange(batch * num_windows * num_heads), np.arange(tokens), np.arange(tokens), indexing="ij"
    )
    counter = np.stack([j // 2, i // 16 * 8 + i % 8, head & 0xFFFFFFFF, head >> 32], axis=-1)
    words = philox(seed & 0xFFFFFFFFFFFFFFFF, counter)
    drawn = np.take_along_axis(words, (2 * (i // 8 % 2) + j % 2)[..., None], axis=-1)[..., 0]
    kept = drawn >= min(int(np.float32(p).astype(np.float64) * 2**32), 2**32 - 1)
    return torch.from_numpy(kept.reshape(batch, num_windows, num_heads, tokens, tokens))


def kept_by_triton(
    seed: int, p: float, batch: int, num_windows: int, num_heads: int, queries: int, keys: int
) -> Tensor:
    """Return the mask (batch, num_windows, num_heads, queries, keys) of attention weights kept by swinkernels/triton.

    The Philox counter is (key // 4, query, window, head); the four output words belong to four consecutive keys.
    """
    shape = (batch * num_windows, num_heads, queries, -(-keys // 4))
    window, head, query, quad = np.meshgrid(*(np.arange(x, dtype=np.uint64) for x in shape), indexing="ij")
    words = philox(seed & 0xFFFFFFFFFFFFFFFF, np.stack([quad, query, window, head], axis=-1))
    numbers = words.view(np.int32).reshape(*shape[:3], 4 * shape[3])[..., :keys]
    kept = torch.from_numpy(numbers >= round(p * 2**32) - 2**31)
    return kept.unflatten(0, (batch, num_windows))
