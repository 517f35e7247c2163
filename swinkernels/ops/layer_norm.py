"""Layer normalisation, alone or with patch expanding's rearrangement: op schemas, autograd and the public function.

CUDA kernels implement the ops ``layer_norm_fwd`` and ``layer_norm_bwd`` of ``torch.ops.swinkernels``. With a ``factor``
they read each token's parts in place and write them to their final positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, fallback
from swinkernels.ops._backends import choose, norm_reasons
from swinkernels.ops._library import (
    Found,
    define,
    kernel_parameter,
    looked_up,
    parameter_gradients,
    register,
    register_derivative,
    three,
)

# factor: three values, slowest axis first, or empty for the plain norm. mean and rstd: one value per row of z.
define(
    "layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, int[] factor, float eps, ScalarType dtype) -> "
    "(Tensor z, Tensor mean, Tensor rstd)"
)
define(
    "layer_norm_bwd(Tensor dz, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, int[] factor, bool needs_dweight, "
    "bool needs_dbias) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


def expanded_shape(shape: Sequence[int], factor: Sequence[int]) -> list[int]:
    """Return the shape of the norm's result.

    Each token's channels are split among ``factor`` tokens per axis; without a factor the shape is unchanged.
    """
    if not factor:
        return list(shape)
    factors = factor[-(len(shape) - 2) :]
    size = [s * f for s, f in zip(shape[1:-1], factors, strict=True)]
    return [shape[0], *size, shape[-1] // math.prod(factors)]


def _fake_fwd(x, weight, bias, factor, eps, dtype):
    shape = expanded_shape(x.shape, factor)
    statistics = [x.new_empty(shape[:-1], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(shape, dtype=dtype), *statistics


def _fake_bwd(dz, x, weight, mean, rstd, factor, needs_dweight, needs_dbias):
    sums = [x.new_empty(dz.shape[-1] if needed else 0, dtype=torch.float32) for needed in (needs_dweight, needs_dbias)]
    return x.new_empty(x.shape), *sums


def _setup_context(ctx, tensors, others, output):
    ctx.factor = others[0]
    ctx.set_materialize_grads(False)  # otherwise autograd materialises zero gradients for mean and rstd
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


_bwd = register_derivative("layer_norm_bwd", _fake_bwd, "layer_norm")


def _backward(ctx, dz, *_):
    if dz is None:
        return (None,) * 3
    x, weight, bias, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[1:3]
    dx, *sums = _bwd((dz, x, weight, mean, rstd), (ctx.factor, *needs))
    return dx, *parameter_gradients((weight, bias), sums, needs)


_fwd = register("layer_norm_fwd", _fake_fwd, _setup_context, _backward)


def norm_and_statistics(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return LayerNorm(x) and the mean and rstd of x, computed with ``backend`` "cuda" or "torch", without autograd."""
    if backend == "torch":
        wide, weight, bias = fallback.widest(x, weight, bias, dtype)
        z, mean, rstd = torch.native_layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
        return z.to(dtype), mean, rstd
    with torch._C._AutoDispatchBelowAutograd():
        return _fwd.overload(x, kernel_parameter(weight), kernel_parameter(bias), [], eps, dtype)


def norm_gradients(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of x, weight and bias without autograd; those that are not needed are None."""
    if backend == "torch":
        wide, wide_weight, wide_bias = fallback.widest(x, weight, bias, dz.dtype)
        gradients = torch.ops.aten.native_layer_norm_backward(
            dz.to(wide), x.to(wide), x.shape[-1:], mean, rstd, wide_weight, wide_bias, list(needed)
        )
        return tuple(
            None if g is None or t is None else g.to(t.dtype) for g, t in zip(gradients, (x, weight, bias), strict=True)
        )
    dx, *sums = _bwd((dz, x, kernel_parameter(weight), mean, rstd), ([], *needed[1:]))
    return dx, *parameter_gradients((weight, bias), sums, needed[1:])


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Normalise the last axis to mean 0 and variance 1, then scale and shift it, rounding once to ``dtype``.

    .. math:: y = (x - mean(x)) / \sqrt{var(x) + eps} \cdot weight + bias

    where mean and var, the biased variance, are taken over the C channels of a token. Under autocast, one pass turns a
    float32 residual stream into the half-precision input of a Linear (``dtype``); PyTorch needs two passes.

    Args:
        x: (..., C), float32, float16, bfloat16, or float64 (torch and reference only).
        weight: (C,) or None for 1, any floating dtype.
        bias: (C,) or None for 0, any floating dtype.
        eps: added to the variance; 1e-5 in the Swin models.
        dtype: dtype of the result, by default x.dtype, also under autocast. The arithmetic is in float32 or wider.
        backend: "auto", "cuda", "torch" or "reference". "auto" picks the fastest usable one.

    Returns:
        (..., C) in ``dtype``, contiguous. An empty x gives an empty result. Differentiable in x, weight and bias, each
        gradient in its tensor's dtype; the same input gives the same bits. Twice differentiable with backend="torch" or
        "reference".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Layer Normalization (Ba et al., 2016); torch.nn.LayerNorm.
    """

    def check() -> tuple[float, torch.dtype, str]:
        op = "layer_norm"
        _arguments.check_rows(op, "x", x)
        _arguments.check_dtype(op, dtype, x)
        _arguments.check_parameters(op, x, (x.shape[-1],), weight=weight, bias=bias)
        return _arguments.check_eps(op, eps), *_choice(op, x, (), dtype, backend)

    number, written, chosen = looked_up(_KNOWN, (x, weight, bias), (eps, backend), check, dtype)
    return run_norm(x, weight, bias, (), number, written, chosen)


_KNOWN = Found()


def _choice(
    op: str, x: Tensor, factor: tuple[int, ...], dtype: torch.dtype | None, requested: str
) -> tuple[torch.dtype, str]:
    """Choose the backend of the norm of ``op``; return the result's dtype and the backend."""
    row, dtypes = x.shape[-1] // math.prod(factor), (x.dtype, dtype or x.dtype)
    backend = choose(op, requested, x.device, lambda b: norm_reasons(b, "layer_norm", row, dtypes, x.device))
    return dtypes[1], backend


def normalise_parts(
    op: str,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: tuple[int, ...],
    eps: float,
    dtype: torch.dtype,
    requested: str,
) -> Tensor:
    """Rearrange the parts of every token into neighbouring tokens and normalise each, given checked arguments."""
    return run_norm(x, weight, bias, factor, eps, *_choice(op, x, factor, dtype, requested))


def run_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: tuple[int, ...],
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """Run the norm, given checked arguments, on ``backend``, which must support it."""
    if backend == "torch":
        if factor:
            return fallback.normalise_parts(x, weight, bias, factor, eps=eps, dtype=dtype)
        return fallback.layer_norm(x, weight, bias, eps=eps, dtype=dtype)
    if backend == "reference":
        if factor:
            return reference.patch_expanding(x, None, weight, bias, factor=factor, eps=eps, dtype=dtype)
        return reference.layer_norm(x, weight, bias, eps=eps, dtype=dtype)
    weight, bias = kernel_parameter(weight), kernel_parameter(bias)
    return _fwd(x, weight, bias, three(factor, 1) if factor else [], eps, dtype)[0]
