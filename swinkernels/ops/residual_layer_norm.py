"""A residual connection and the norm next to it in one pass: schemas, fake kernels, autograd and public functions.

CUDA kernels implement the ops ``residual_layer_norm_fwd`` and ``_bwd`` (v1: the norm follows the sum) and
``residual_post_norm_fwd`` and ``_bwd`` (v2: the norm precedes the sum) of ``torch.ops.swinkernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, fallback
from swinkernels.ops._backends import PLAIN, choose, residual_reasons
from swinkernels.ops._library import (
    Found,
    define,
    kernel_parameter,
    looked_up,
    parameter_gradients,
    register,
    register_derivative,
)
from swinkernels.ops.layer_norm import norm_gradients

_BRANCH = "Tensor x, Tensor y, Tensor? drop_path_scale, Tensor? weight, Tensor? bias, float eps"
_SAVED = "Tensor? drop_path_scale, Tensor? weight, Tensor mean, Tensor rstd, bool needs_dweight, bool needs_dbias"
define(f"residual_layer_norm_fwd({_BRANCH}) -> (Tensor s, Tensor z, Tensor mean, Tensor rstd)")
# dy is empty if it equals dx, that is, if x and y have the same dtype and drop_path_scale is None.
define(
    f"residual_layer_norm_bwd(Tensor ds, Tensor dz, Tensor s, {_SAVED}) -> "
    "(Tensor dx, Tensor dy, Tensor dweight, Tensor dbias)"
)
define(f"residual_post_norm_fwd({_BRANCH}) -> (Tensor s, Tensor mean, Tensor rstd)")
define(f"residual_post_norm_bwd(Tensor ds, Tensor y, {_SAVED}) -> (Tensor dy, Tensor dweight, Tensor dbias)")


def _fake_statistics(x: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2)]


def _fake_sums(x: Tensor, *needed: bool) -> list[Tensor]:
    return [x.new_empty(x.shape[-1] if need else 0, dtype=torch.float32) for need in needed]


def _fake_fwd(x, y, drop_path_scale, weight, bias, eps):
    return x.new_empty(x.shape), y.new_empty(y.shape), *_fake_statistics(x)


def _fake_bwd(ds, dz, s, drop_path_scale, weight, mean, rstd, needs_dweight, needs_dbias):
    is_dx = drop_path_scale is None and dz.dtype == s.dtype
    dy = dz.new_empty(0 if is_dx else s.shape)
    return s.new_empty(s.shape), dy, *_fake_sums(s, needs_dweight, needs_dbias)


def _fake_post_fwd(x, y, drop_path_scale, weight, bias, eps):
    return x.new_empty(x.shape), *_fake_statistics(x)


def _fake_post_bwd(ds, y, drop_path_scale, weight, mean, rstd, needs_dweight, needs_dbias):
    return y.new_empty(y.shape), *_fake_sums(y, needs_dweight, needs_dbias)


def _setup_context(ctx, tensors, others, output):
    _, _, drop_path_scale, weight, bias = tensors
    s, z, mean, rstd = output
    ctx.set_materialize_grads(False)  # otherwise autograd materialises zero gradients for mean and rstd
    ctx.z_dtype = z.dtype
    ctx.save_for_backward(s, drop_path_scale, weight, bias, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)


_bwd = register_derivative("residual_layer_norm_bwd", _fake_bwd, "residual_layer_norm")


def _backward(ctx, ds, dz, *_):
    if ds is None and dz is None:
        return (None,) * 5
    s, drop_path_scale, weight, bias, mean, rstd = ctx.saved_tensors
    dz = torch.zeros_like(s, dtype=ctx.z_dtype) if dz is None else dz
    norm = (s, weight, bias, mean, rstd)
    dx, dy, *of_norm = residual_norm_gradients(ds, dz, drop_path_scale, *norm, ctx.needs_input_grad[3:5], "cuda")
    return dx, dy, None, *of_norm


def residual_norm_gradients(
    ds: Tensor | None,
    dz: Tensor,
    drop_path_scale: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    needed: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, ...]:
    """Compute the gradients of residual_layer_norm's x, y and, if needed, weight and bias, without autograd.

    y has the dtype of ``dz``. ``backend`` is "cuda" or "torch"; ``ds`` may be None for zeros.
    """
    if backend == "torch":
        dx, *of_norm = norm_gradients(dz, s, weight, bias, mean, rstd, (True, *needed), backend)
        assert dx is not None
        dx = dx if ds is None else dx.add_(ds)
        dy = dx if drop_path_scale is None else dx * drop_path_scale.reshape(-1, *(1,) * (dx.dim() - 1))
        return dx, dy.to(dz.dtype), *of_norm
    ds = torch.zeros_like(s) if ds is None else ds
    if drop_path_scale is not None:
        drop_path_scale = drop_path_scale.to(torch.float32)
    dx, dy, *sums = _bwd((ds, dz, s, drop_path_scale, kernel_parameter(weight), mean, rstd), needed)
    is_dx = drop_path_scale is None and dz.dtype == s.dtype
    return dx, dx if is_dx else dy, *parameter_gradients((weight, bias), sums, needed)


def _setup_post_context(ctx, tensors, others, output):
    _, y, drop_path_scale, weight, bias = tensors
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(y, drop_path_scale, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


_post_bwd = register_derivative("residual_post_norm_bwd", _fake_post_bwd, "residual_post_norm")


def _post_backward(ctx, ds, *_):
    if ds is None:
        return (None,) * 5
    y, drop_path_scale, weight, bias, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad[3:5]
    dy, *sums = _post_bwd((ds, y, drop_path_scale, weight, mean, rstd), needs)
    return ds, dy, None, *parameter_gradients((weight, bias), sums, needs)


_FORWARD = {
    "residual_layer_norm": register("residual_layer_norm_fwd", _fake_fwd, _setup_context, _backward),
    "residual_post_norm": register("residual_post_norm_fwd", _fake_post_fwd, _setup_post_context, _post_backward),
}


_KNOWN = Found()


def _run(
    op: str,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    drop_path_scale: Tensor | None,
    backend: str,
) -> Any:
    learns_scale = getattr(drop_path_scale, "requires_grad", False)

    def check() -> tuple[float, str]:
        _arguments.check_rows(op, "x", x, batched=True)
        _arguments.check_rows(op, "y", y, batched=True)
        if y.shape != x.shape:
            raise ValueError(
                f"{op}: x and y must have the same shape, got x of shape {tuple(x.shape)} and y of shape "
                f"{tuple(y.shape)}"
            )
        _arguments.check_device(op, "y", y, x.device)
        _arguments.check_parameters(op, x, (x.shape[-1],), weight=weight, bias=bias)
        _arguments.check_parameters(op, x, (x.shape[0],), drop_path_scale=drop_path_scale)
        return _arguments.check_eps(op, eps), choose(op, backend, x.device, reasons)

    def reasons(b: str) -> list[str]:
        found = residual_reasons(b, x.shape[-1], (x.dtype, y.dtype), x.device)
        if b not in PLAIN and learns_scale:
            found.append("it does not differentiate drop_path_scale")
        return found

    tensors = (x, y, weight, bias, drop_path_scale)
    eps, chosen = looked_up(_KNOWN, tensors, (op, eps, backend, learns_scale), check)
    return run_residual(op, x, y, weight, bias, eps, drop_path_scale, chosen)


def run_residual(
    op: str,
    x: Tensor,
    y: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    drop_path_scale: Tensor | None,
    chosen: str,
) -> Any:
    """Run ``op``, "residual_layer_norm" or "residual_post_norm", on the backend ``chosen``, which must support it.

    The arguments must have been checked.
    """
    if chosen in PLAIN:
        plain = getattr(fallback if chosen == "torch" else reference, op)
        return plain(x, y, weight, bias, eps=eps, drop_path_scale=drop_path_scale)
    if drop_path_scale is not None:
        drop_path_scale = drop_path_scale.to(torch.float32)
    weight, bias = kernel_parameter(weight), kernel_parameter(bias)
    return _FORWARD[op](x, y, drop_path_scale, weight, bias, eps)


def residual_layer_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    r"""Add a branch to the residual stream and normalise the sum for the next branch (v1), in one pass.

    .. math:: s = x + d \cdot y, \quad z = LayerNorm(s)

    Args:
        x: (B, ..., C), the residual stream, float32, float16, bfloat16, or float64 (torch and reference only).
        y: the result of the branch, of the same shape, in the dtype of x or, under autocast, in a narrower one.
        weight, bias: (C,), parameters of the norm, of any floating dtype, or None for ones and zeros.
        eps: added to the variance of the norm.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.
        backend: "auto", "cuda", "torch" or "reference". "auto" picks the fastest usable one.

    Returns:
        s in the dtype of x, and z in the dtype of y, which the next branch reads; z is the norm of the returned,
        rounded s. Each is (B, ..., C) and contiguous. An empty batch gives empty results. Differentiable in x, y,
        weight and bias, each gradient in its tensor's dtype; the same input gives the same bits. With backend="torch"
        or "reference" also differentiable in drop_path_scale, and twice differentiable; "auto" chooses "torch" if
        drop_path_scale requires a gradient.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin Transformer (Liu et al., 2021), equation 3: a block's residual connection with the LN of its next half.
    """
    s, z, *_ = _run("residual_layer_norm", x, y, weight, bias, eps, drop_path_scale, backend)
    return s, z


def residual_post_norm(
    x: Tensor,
    y: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    drop_path_scale: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Normalise the result of a branch and add it to the residual stream (v2), in one pass.

    .. math:: s = x + d \cdot LayerNorm(y)

    Args:
        x, y, weight, bias, eps, drop_path_scale, backend: as for :func:`residual_layer_norm`.

    Returns:
        s, (B, ..., C) in the dtype of x, contiguous. Differentiable as :func:`residual_layer_norm` is.

    Raises:
        ValueError, TypeError, NotImplementedError: as for :func:`residual_layer_norm`.

    Source: Swin Transformer V2 (Liu et al., 2022), section 3.2, res-post-norm.
    """
    result = _run("residual_post_norm", x, y, weight, bias, eps, drop_path_scale, backend)
    return result if isinstance(result, Tensor) else result[0]
