"""Linear layers behind a norm or GELU whose input is computed again in the backward pass instead of being kept.

Eager PyTorch keeps the input of a norm or of GELU and also its result, which the Linear behind it reads. Both are cheap
beside the products: here the input alone is kept. A compiler decides by itself what is computed again, and transforms
have their own rules, so outside of plain eager calls these functions are the operations that they stand for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels.ops._library import any_requires_grad, is_plain
from swinkernels.ops.layer_norm import layer_norm, norm_and_statistics, norm_gradients


def norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    *,
    eps: float,
    backend: str,
) -> Tensor:
    """Linear(LayerNorm(x)), the norm in the dtype of the weight, of which the result is, on a backend that has it."""
    return _run(_NormLinear, _norm_linear, (x, norm_weight, norm_bias, weight, bias), (eps, backend))


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, approximate: str) -> Tensor:
    """Linear(GELU(x)), all in one dtype."""
    return _run(_GeluLinear, _gelu_linear, (x, weight, bias), (approximate,))


def _norm_linear(x, norm_weight, norm_bias, weight, bias, eps, backend):
    z = layer_norm(x, norm_weight, norm_bias, eps=eps, dtype=weight.dtype, backend=backend)
    return F.linear(z, weight, bias)


def _gelu_linear(x, weight, bias, approximate):
    return F.linear(F.gelu(x, approximate=approximate), weight, bias)


def _run(function: Any, plain: Callable, tensors: tuple[Tensor | None, ...], others: tuple[Any, ...]) -> Tensor:
    if is_plain(tensors) and any_requires_grad(tensors):
        return function.apply(*tensors, others)
    return plain(*tensors, *others)


def _without_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """Products in the dtypes of their tensors: autocast cast them before, or was off in the forward pass."""
    is_on = torch._C._is_any_autocast_enabled()
    return torch.autocast(x.device.type, enabled=False) if is_on else contextlib.nullcontext()


def _linear_gradients(
    dy: Tensor, x: Tensor, weight: Tensor, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of weight and bias of a Linear layer, of those that are needed."""
    rows = dy.reshape(-1, dy.shape[-1])
    dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if needs[0] else None
    return dweight, rows.sum(0) if needs[1] else None


def _differentiable_backward(plain: Callable, tensors: Sequence[Tensor | None], others, needs, dy: Tensor) -> list:
    """The gradients as functions of everything that they depend on, for a second derivative."""
    wanted = [t for t, need in zip(tensors, needs, strict=True) if need and t is not None]
    with torch.enable_grad(), _without_autocast(dy):
        found = iter(torch.autograd.grad(plain(*tensors, *others), wanted, dy, create_graph=True))
    return [next(found) if need else None for need in needs]


class _NormLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, weight, bias, others):
        ctx.others = others
        ctx.save_for_backward(x, norm_weight, norm_bias, weight, bias)
        with _without_autocast(x):
            return _norm_linear(x, norm_weight, norm_bias, weight, bias, *others)

    @staticmethod
    def backward(ctx, dy):
        tensors, needs = ctx.saved_tensors, ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_backward(_norm_linear, tensors, ctx.others, needs, dy), None
        x, norm_weight, norm_bias, weight, _ = tensors
        eps, backend = ctx.others
        with _without_autocast(dy):
            z, mean, rstd = norm_and_statistics(x, norm_weight, norm_bias, eps, weight.dtype, backend)
            of_linear = _linear_gradients(dy, z, weight, needs[3:])
            of_norm: Any = (None,) * 3
            if any(needs[:3]):
                of_norm = norm_gradients(dy @ weight, x, norm_weight, norm_bias, mean, rstd, needs[:3], backend)
        return *of_norm, *of_linear, None


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
            return *_differentiable_backward(_gelu_linear, tensors, ctx.others, needs, dy), None
        x, weight, _ = tensors
        (approximate,) = ctx.others
        with _without_autocast(dy):
            activated = F.gelu(x, approximate=approximate) if needs[1] else x
            of_linear = _linear_gradients(dy, activated, weight, needs[1:])
            del activated
            dx = torch.ops.aten.gelu_backward(dy @ weight, x, approximate=approximate) if needs[0] else None
        return dx, *of_linear, None
