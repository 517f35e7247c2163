"""Patch merging: schema, fake kernel, autograd formula and the public function.

One op gathers the neighbours and normalises them: ``patch_merging_norm_fwd`` and ``_bwd`` of ``torch.ops.swinkernels``,
with CUDA kernels and, under the suffix ``_triton``, Triton kernels. The reduction is torch's Linear.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, fallback
from swinkernels.ops._backends import choose, patch_merging_reasons
from swinkernels.ops._fused_linear import cast_linear
from swinkernels.ops._library import (
    autocast_dtype,
    define,
    kernel_parameter,
    parameter_gradients,
    register,
    register_derivative,
    three,
)
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.window_partition import partition

# For each order and number of merged axes, the sequence of neighbours whose channels are concatenated. A neighbour is
# given by its row-major index in the block, 4 d + 2 h + w. "unfold" is row-major, because its parameters are reordered.
RUNS = {
    ("swin", 2): (0, 2, 1, 3),
    ("swin", 3): (0, 4, 2, 6, 1, 5, 3, 7),
    ("row_major", 2): (0, 1, 2, 3),
    ("row_major", 3): (0, 1, 2, 3, 4, 5, 6, 7),
    ("unfold", 2): (0, 1, 2, 3),
    ("unfold", 3): (0, 1, 2, 3, 4, 5, 6, 7),
    ("monai", 2): (0, 2, 1, 3),
    ("monai", 3): (0, 4, 2, 1, 6, 5, 3, 7),
    ("monai_legacy", 2): (0, 2, 1, 3),
    ("monai_legacy", 3): (0, 4, 2, 1, 5, 2, 1, 7),
}
ORDERS = tuple(dict.fromkeys(order for order, _ in RUNS))
_NORMS = ("pre", "post")


def merged_size(size: Sequence[int], factor: Sequence[int]) -> list[int]:
    """Return S', the tokens per axis after merging by the last ``len(size)`` values of ``factor``."""
    return [-(-s // f) for s, f in zip(size, factor[-len(size) :], strict=True)]


def _define(suffix: str) -> Callable:
    fwd, bwd = f"patch_merging_norm_fwd{suffix}", f"patch_merging_norm_bwd{suffix}"
    # neighbours[p] is the row-major index, in a block of size ``factor``, of the p-th neighbour in a merged row.
    define(
        f"{fwd}(Tensor x, Tensor? weight, Tensor? bias, int[] factor, int[] neighbours, float eps, ScalarType dtype) "
        "-> (Tensor z, Tensor mean, Tensor rstd)"
    )
    define(
        f"{bwd}(Tensor dz, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int[] factor, int[] neighbours, "
        "bool needs_dweight, bool needs_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
    )

    def fake_fwd(x, weight, bias, factor, neighbours, eps, dtype):
        shape = [x.shape[0], *merged_size(x.shape[1:-1], factor)]
        z = x.new_empty([*shape, math.prod(factor) * x.shape[-1]], dtype=dtype)
        return z, *(x.new_empty(shape, dtype=torch.float32) for _ in range(2))

    def fake_bwd(dz, x, weight, mean, rstd, factor, neighbours, needs_dweight, needs_dbias):
        widths = [dz.shape[-1] if needed else 0 for needed in (needs_dweight, needs_dbias)]
        return x.new_empty(x.shape), *(x.new_empty(width, dtype=torch.float32) for width in widths)

    def setup_context(ctx, tensors, others, output):
        ctx.pieces = others[:2]
        ctx.set_materialize_grads(False)  # otherwise autograd materialises zero gradients for mean and rstd
        ctx.save_for_backward(*tensors, *output[1:])
        ctx.mark_non_differentiable(*output[1:])

    backward_op = register_derivative(bwd, fake_bwd, "patch_merging")

    def backward(ctx, dz, *_):
        if dz is None:
            return (None,) * 3
        x, weight, bias, mean, rstd = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        dx, *sums = backward_op((dz, x, weight, mean, rstd), (*ctx.pieces, *needs))
        return dx, *parameter_gradients((weight, bias), sums, needs)

    return register(fwd, fake_fwd, setup_context, backward)


_NORM_FWD = {suffix: _define(suffix) for suffix in ("", "_triton")}


def _by_neighbour(x: Tensor, count: int) -> Tensor:
    """Reorder the last axis of a parameter from channel-major ("unfold") to neighbour-major order."""
    return x.unflatten(-1, (-1, count)).transpose(-2, -1).flatten(-2)


def _row_major_columns(weight: Tensor, numbers: Sequence[int]) -> Tensor:
    """Reorder the columns of the reduction's weight into row-major order of the neighbours.

    ``weight`` has one block of columns per neighbour, in the order given by ``numbers``. The blocks of a neighbour
    that occurs twice in ``numbers`` are summed, and the block of a neighbour that does not occur is zero.
    """
    columns = weight.unflatten(-1, (len(numbers), -1)).unbind(-2)
    runs = [[c for c, number in zip(columns, numbers, strict=True) if number == i] for i in range(len(numbers))]
    return torch.cat([sum(run[1:], run[0]) if run else torch.zeros_like(columns[0]) for run in runs], dim=-1)


def patch_merging(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    *,
    eps: float = 1e-5,
    order: str = "swin",
    norm: str = "pre",
    backend: str = "auto",
) -> Tensor:
    r"""Concatenate the channels of neighbouring tokens, two per axis, normalise and reduce them linearly.

    .. math::
        y = W \cdot LayerNorm(concat(x_{2i + o})) \quad \text{(pre, v1)}

        y = LayerNorm(W \cdot concat(x_{2i + o})) \quad \text{(post, v2)}

    over the offsets o in {0, 1} per merged axis. A merged axis of odd size is padded with zeros at its end *before* the
    norm, so the zeros enter the norm's statistics. The gather, together with the norm ("pre") or alone ("post"), reads
    and writes the map once; the Linear is torch's. In float32 and bfloat16 inference on some CPUs, with any order but
    "unfold", one op computes all of it.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), float32, float16, bfloat16, or float64 (torch and reference only).
        norm_weight, norm_bias: (K * C,) for "pre", (out,) for "post", or None for ones and zeros; K is the number
            of merged neighbours.
        weight: (out, K * C), the reduction. Its width determines the merging: K = 4 merges the last two axes, a 3D map
            frame by frame (Video-Swin, Aurora); K = 8 merges all three.
        eps: added to the variance of the norm.
        order: order of the K * C channels.
            "swin": by neighbour, the first merged axis fastest: (0,0), (1,0), (0,1), (1,1). Microsoft, timm,
            torchvision, transformers, Video-Swin, MONAI in 2D.
            "row_major": by neighbour, the last axis fastest: (0,0), (0,1), (1,0), (1,1). Aurora, Pangu-Weather, MONAI's
            PatchMergingV2 in 3D.
            "unfold": by channel, then neighbours row-major, as torch.nn.Unfold. mmcv and mmpretrain.
            "monai": MONAI's PatchMerging since 1.5. For K = 4 as "swin"; for K = 8 the offsets are 000, 100, 010, 001,
            110, 101, 011, 111.
            "monai_legacy": MONAI's PatchMerging up to 1.4. For K = 4 as "swin"; for K = 8 the offsets are 000, 100,
            010, 001, 101, 010, 001, 111.
        norm: "pre" (v1) or "post" (v2).
        backend: "auto", "cuda", "triton", "torch" or "reference". "auto" picks the fastest usable one. With
            "triton" and norm="post", torch computes the norm, which has no Triton kernel.

    Returns:
        (B, \*S', out), contiguous, S' = ceil(S / 2) on the merged axes, in the dtype of x. Under autocast the dtype is
        as for torch's modules on a GPU: the autocast dtype for "pre", whose last step is the Linear, float32 for
        "post". An empty batch gives an empty result. Differentiable in x and all parameters, each gradient in its
        tensor's dtype; twice with backend="torch" or "reference".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin Transformer (Liu et al., 2021), section 3.1; Swin Transformer V2's code for "post"; the
    ``PatchMerging`` modules of the libraries named above.
    """
    op = "patch_merging"
    _arguments.check_features(op, "x", x)
    _arguments.check_choice(op, "order", order, ORDERS)
    _arguments.check_choice(op, "norm", norm, _NORMS)
    eps = _arguments.check_eps(op, eps)
    channels = x.shape[-1]
    ranks = {2**rank * channels: rank for rank in range(2, x.dim() - 1)}
    _arguments.check_weight(op, x, weight, *ranks)
    rank = ranks[weight.shape[1]]
    width = weight.shape[1] if norm == "pre" else weight.shape[0]
    _arguments.check_parameters(op, x, (width,), norm_weight=norm_weight, norm_bias=norm_bias)
    low = autocast_dtype(x)
    between = x.dtype if low is None else low  # dtype that the Linear reads and writes
    dtype = between if low is None or norm == "pre" else torch.float32

    dtypes = (x.dtype, between) if norm == "pre" else (between, dtype)
    backend = choose(op, backend, x.device, lambda b: patch_merging_reasons(b, norm, width, dtypes, x.device))
    if backend == "torch":
        return fallback.patch_merging(
            x, norm_weight, norm_bias, weight, eps=eps, neighbours=RUNS[order, rank], by_channel=order == "unfold",
            norm=norm, between=between, dtype=dtype,
        )  # fmt: skip
    if backend == "reference":
        return reference.patch_merging(x, norm_weight, norm_bias, weight, eps=eps, order=order, norm=norm).to(dtype)
    if order == "unfold":  # reordering the small parameters is cheaper than reordering the map
        weight = _by_neighbour(weight, 2**rank)
        if norm == "pre":
            norm_weight, norm_bias = (
                None if p is None else _by_neighbour(p, 2**rank) for p in (norm_weight, norm_bias)
            )
    numbers = list(RUNS[order, rank])
    factor = [2] * rank
    if norm == "pre":
        fwd = _NORM_FWD["_triton" if backend == "triton" else ""]
        parameters = map(kernel_parameter, (norm_weight, norm_bias))
        z = fwd(x, *parameters, three(factor, 1), numbers, eps, between)[0]
        return cast_linear(z, weight)
    # Windows of two tokens per axis contain the neighbours in row-major order, padded with zeros at the end.
    window = [1] * (x.dim() - 2 - rank) + factor
    windows = partition(op, x, window, [0] * len(window), "pad_then_roll", backend)
    merged = windows.reshape(x.shape[0], *merged_size(x.shape[1:-1], window), weight.shape[1])
    reduced = cast_linear(merged, _row_major_columns(weight, numbers))
    if backend == "triton":
        # torch's norm requires one dtype for the map and the parameters, here float32.
        norm_weight, norm_bias = (None if p is None else p.float() for p in (norm_weight, norm_bias))
        return F.layer_norm(reduced.float(), (width,), norm_weight, norm_bias, eps).to(dtype)
    return layer_norm(reduced, norm_weight, norm_bias, eps=eps, dtype=dtype, backend=backend)
