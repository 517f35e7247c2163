"""Launches the Triton kernel of an MLP half: :func:`forward` implements the op ``mlp_half_triton``."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from swinkernels.triton import _mlp_half_kernels as kernels
from swinkernels.triton._launch import ARITHMETIC, INT32_MAX, contiguous

ROWS, CHUNK = 128, 32  # tokens per program, hidden channels per step
# With 128 registers per thread, enough for 96 channels, two programs share a multiprocessor, and the GELU of one
# overlaps with the products of the other. The values are derived from register and shared-memory use, not
# measured.
WARPS, STAGES, REGISTERS = 8, 2, 128


def forward(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    post: bool,
    tanh: bool,
) -> Tensor:
    """Compute the MLP half of ``x`` and return it in the dtype of ``x``."""
    hidden, channels = fc1_weight.shape
    wide = triton.next_power_of_2(channels) // 2
    if hidden % CHUNK != 0 or min(wide, channels - wide) < 16 or (channels - wide).bit_count() != 1:
        raise ValueError(
            f"mlp_half: backend='triton' requires a multiple of {CHUNK} hidden channels and a number of channels that "
            f"is the sum of two powers of two of at least 16, got fc1_weight of shape {tuple(fc1_weight.shape)}"
        )
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = y.numel() // channels
    if rows > INT32_MAX - ROWS or fc1_weight.numel() > INT32_MAX:
        raise ValueError(
            "mlp_half: backend='triton' supports fewer than 2**31 tokens and weights of fewer than 2**31 elements, got "
            f"{rows} tokens and {fc1_weight.numel()} elements"
        )
    form = "tanh" if tanh else "erf" if fc1_weight.dtype == torch.float32 else "tail"
    options: dict[str, Any] = {"num_warps": WARPS, "num_stages": STAGES, **ARITHMETIC}
    if rows > 0:
        kernels.fwd[(-(-rows // ROWS),)](
            x.contiguous(), contiguous(branch), contiguous(norm_weight), contiguous(norm_bias),
            fc1_weight.contiguous(), contiguous(fc1_bias), fc2_weight.contiguous(), contiguous(fc2_bias), y, eps, rows,
            C=channels, HIDDEN=hidden, POST=post, FORM=form, WIDE=wide, ROWS=ROWS, CHUNK=CHUNK, PRECISION="ieee",
            maxnreg=REGISTERS if channels <= 96 else None, **options,
        )  # fmt: skip
    return y
