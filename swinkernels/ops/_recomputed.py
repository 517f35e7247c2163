"""Linear layers after a norm or GELU whose result is recomputed in the backward pass instead of being saved.

Eager PyTorch saves both the input of a norm or GELU and its result, which the next Linear reads. Norm and GELU are
cheap compared with the matrix products, so the functions below save only the input in plain eager calls. All other
calls run the plain operations: compilers choose which results to recompute, and transforms have their own rules.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels.ops._fused_linear import Norm, linear
from swinkernels.ops._library import any_requires_grad, autocast_dtype, is_untraced
from swinkernels.ops._onednn import input_gradient, linear_gradients
from swinkernels.ops.layer_norm import norm_and_statistics, norm_gradients, run_norm
from swinkernels.ops.residual_layer_norm import residual_norm_gradients, run_residual


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor | Sequence[Tensor],
    bias: Tensor | None,
    *,
    eps: float,
    backend: str,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return s = x + branch_scale * branch, or x without a branch, and Linear(LayerNorm(s)).

    ``weight`` may be a sequence of weights whose rows are concatenated; the concatenation is not saved either. The
    norm's result and the branch have the dtype of the weight, and ``backend`` must support that norm.
    """
    weights = (weight,) if isinstance(weight, Tensor) else tuple(weight)
    tensors = (x, branch, branch_scale, norm_weight, norm_bias, bias, *weights)
    is_learnt = branch_scale is not None and branch_scale.requires_grad
    s, y = _run(_NormLinear, _norm_linear, tensors, (eps, backend), recompute=not is_learnt)
    return x if s is None else s, y


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str) -> Tensor:
    """Return Linear(GELU(x)); all tensors have one dtype."""
    return _run(_GeluLinear, _gelu_linear, (x, weight, bias), (approximate,))


def packed(weights: Sequence[Tensor]) -> Tensor:
    """Concatenate the rows of all ``weights``."""
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


def _norm_linear(x, branch, branch_scale, norm_weight, norm_bias, bias, *rest):
    *weights, eps, backend = rest
    if branch is None:
        norm = joinable_norm(x, norm_weight, norm_bias, eps, backend, weights[0].dtype)
        if norm is not None:
            return None, linear(x, packed(weights), bias, norm=norm)
    s, z = norm_of_sum(x, branch, branch_scale, norm_weight, norm_bias, weights[0].dtype, eps, backend)
    return None if branch is None else s, linear(z, packed(weights), bias)


def joinable_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str, dtype: torch.dtype
) -> Norm | None:
    """Return the norm of rows of x for :func:`linear` and :func:`mlp`, or None if they cannot compute it.

    They can if torch computes it outside autocast and if x, its parameters and its result have the same dtype.
    """
    same = all(t is None or t.dtype == dtype for t in (x, weight, bias))
    if backend != "torch" or not same or autocast_dtype(x) is not None:  # which may widen the norm's result
        return None
    return Norm(weight, bias, eps)


def norm_of_sum(
    x: Tensor,
    branch: Tensor | None,
    branch_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    dtype: torch.dtype,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return s = x + branch_scale * branch, or x without a branch, and LayerNorm(s) in ``dtype``."""
    if branch is None:
        return x, run_norm(x, norm_weight, norm_bias, (), eps, dtype, backend)
    s, z, *_ = run_residual("residual_layer_norm", x, branch, norm_weight, norm_bias, eps, branch_scale, backend)
    return s, z


def _linear_of_norm(s, norm_weight, norm_bias, bias, weights, eps, backend):
    z = run_norm(s, norm_weight, norm_bias, (), eps, weights[0].dtype, backend)
    return linear(z, packed(weights), bias)


def _gelu_linear(x, weight, bias, approximate):
    return linear(F.gelu(x, approximate=approximate), weight, bias)


def _run(
    function: Any, plain: Callable, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...], recompute: bool = True
) -> Any:
    if recompute and is_untraced(tensors) and any_requires_grad(tensors):
        return function.apply(*tensors, others)
    return plain(*tensors, *others)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Return a context manager that disables autocast, which was off in the forward pass or has cast the tensors."""
    is_on = torch._C._is_any_autocast_enabled()
    return torch.autocast(x.device.type, enabled=False) if is_on else _AS_IT_IS


_AS_IT_IS = contextlib.nullcontext()


def _differentiable_backward(
    function: Callable, tensors: Sequence[Tensor | None], needs: Sequence[bool], dy: Tensor
) -> list[Tensor | None]:
    """Return the gradients with an autograd graph, so that they can be differentiated again."""
    with torch.enable_grad(), _without_autocast(dy):
        # Aliases, because autograd.grad would add up the gradients of a tensor that is passed twice, and follow one
        # tensor's history to another, for example from s to the norm's weight if an earlier block shares the norm.
        aliases = [None if t is None else t.view_as(t) for t in tensors]
        wanted = [t for t, need in zip(aliases, needs, strict=True) if need and t is not None]
        found = iter(torch.autograd.grad(function(*aliases), wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, branch, branch_scale, norm_weight, norm_bias, bias, *rest):
        *weights, others = rest
        with _without_autocast(x):
            s, y = _norm_linear(x, branch, branch_scale, norm_weight, norm_bias, bias, *weights, *others)
        ctx.others = others
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if s is None else s, branch_scale, norm_weight, norm_bias, bias, *weights)
        return s, y

    @staticmethod
    def backward(ctx, ds, dy):
        s, branch_scale, norm_weight, norm_bias, bias, *weights = ctx.saved_tensors
        needs_x, needs_branch, _, *needs = ctx.needs_input_grad[:-1]
        needs = (needs_x or needs_branch, *needs)  # gradients of s and of the parameters of norm and Linear
        eps, backend = ctx.others
        dtype = weights[0].dtype
        of_parameters: Sequence[Tensor | None] = (None,) * (3 + len(weights))
        if dy is None:
            dx, dbranch = ds, _branch_gradient(ds, branch_scale, dtype) if needs_branch else None
        elif torch.is_grad_enabled():  # create_graph=True
            function = lambda s, nw, nb, b, *w: _linear_of_norm(s, nw, nb, b, w, eps, backend)  # noqa: E731
            dx, *of_parameters = _differentiable_backward(
                function, (s, norm_weight, norm_bias, bias, *weights), needs, dy
            )
            dx = ds if dx is None else dx if ds is None else dx + ds
            dbranch = _branch_gradient(dx, branch_scale, dtype) if needs_branch else None
        else:
            with _without_autocast(dy):
                z, mean, rstd = norm_and_statistics(s, norm_weight, norm_bias, eps, dtype, backend)
                weight = packed(weights)
                dweight, dbias = linear_gradients(dy, z, (any(needs[4:]), needs[3]))
                del z
                dx = dbranch = None
                of_norm: Sequence[Tensor | None] = (None, None)
                norm = (s, norm_weight, norm_bias, mean, rstd)
                if needs_branch:
                    dx, dbranch, *of_norm = residual_norm_gradients(
                        ds, input_gradient(dy, weight), branch_scale, *norm, needs[1:3], backend
                    )
                elif any(needs[:3]):
                    dx, *of_norm = norm_gradients(input_gradient(dy, weight), *norm, needs[:3], backend)
                    dx = dx if ds is None or dx is None else dx.add_(ds)
                of_parameters = (*of_norm, dbias, *_rows_of(dweight, weights, needs[4:]))
        return dx if needs_x else None, dbranch, None, *of_parameters, None


def _rows_of(dweight: Tensor | None, weights: Sequence[Tensor], needs: Sequence[bool]) -> Sequence[Tensor | None]:
    """Return the gradients of the weights that :func:`packed` concatenated, or None for one that is not needed."""
    if dweight is None or len(weights) == 1:
        return (dweight,) * len(weights)
    rows = dweight.split([weight.shape[0] for weight in weights])
    return [found if need else None for found, need in zip(rows, needs, strict=True)]


def _branch_gradient(ds: Tensor | None, branch_scale: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if ds is None:
        return None
    return (ds if branch_scale is None else ds * branch_scale.reshape(-1, *(1,) * (ds.dim() - 1))).to(dtype)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, others):
        ctx.others = others
        ctx.save_for_backward(x, weight, bias)
        with _without_autocast(x):
            return _gelu_linear(x, weight, bias, *others)

    @staticmethod
    def backward(ctx, dy):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            function = lambda *tensors: _gelu_linear(*tensors, *ctx.others)  # noqa: E731
            return *_differentiable_backward(function, tensors, needs, dy), None
        x, weight, _ = tensors
        (approximate,) = ctx.others
        with _without_autocast(dy):
            activated = F.gelu(x, approximate=approximate) if needs[1] else x
            of_linear = linear_gradients(dy, activated, needs[1:])
            del activated
            dx = None
            if needs[0]:
                dx = torch.ops.aten.gelu_backward(input_gradient(dy, weight), x, approximate=approximate)
        return dx, *of_linear, None
