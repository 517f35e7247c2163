"""Formulas for the cost of attention: the complexities in the Swin paper, and the work of the fused kernel."""

from __future__ import annotations

import math

from swinkernels.testing import WindowAttentionCase


def msa_multiply_adds(height: int, width: int, channels: int) -> int:
    """Return Omega(MSA) = 4 h w C^2 + 2 (h w)^2 C, the multiply-adds of global self-attention with its projections.

    Softmax is left out. Source: Liu et al., Swin Transformer, arXiv 2103.14030, equation 1.
    """
    tokens = height * width
    return 4 * tokens * channels**2 + 2 * tokens**2 * channels


def window_msa_multiply_adds(height: int, width: int, channels: int, window: int) -> int:
    """Return Omega(W-MSA) = 4 h w C^2 + 2 M^2 h w C: multiply-adds in M x M windows (the paper's equation 2)."""
    tokens = height * width
    return 4 * tokens * channels**2 + 2 * window**2 * tokens * channels


def core_bytes(case: WindowAttentionCase, itemsize: int) -> dict[str, int]:
    """Return the bytes to move, by direction: forward reads 3 maps (B, *S, C), writes 1; backward reads 4, writes 3."""
    one = case.batch * math.prod(case.size) * case.num_heads * case.head_dim * itemsize
    return {"fwd": 4 * one, "bwd": 7 * one, "fwd+bwd": 11 * one}


def core_flops(case: WindowAttentionCase) -> dict[str, int]:
    """Return the flops of the matrix products by direction (two forward, five backward); a multiply-add counts as two.

    Windows are counted in full, including pad tokens.
    """
    window = case.window_tuple
    frame = math.prod(-(-s // w) * w for s, w in zip(case.size, window, strict=True))
    product = 2 * case.batch * frame * math.prod(window) * case.num_heads * case.head_dim
    return {"fwd": 2 * product, "bwd": 5 * product, "fwd+bwd": 7 * product}
