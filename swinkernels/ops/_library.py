"""What the definitions of all ops share: the library, normal forms of arguments, autocast, derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

lib = torch.library.Library("swinkernels", "DEF")

# Read once: torch 2.11 cannot trace the question whether a kind of device has autocast.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to the products of x, or None where it is off or x is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def three(values: Sequence, leading) -> list:
    """One value per axis, slowest first, with those of the axes that a 2D map does not have in front."""
    return [leading] * (3 - len(values)) + list(values)


def _is_plain(inputs: Sequence[Any]) -> bool:
    """Whether eager PyTorch alone sees a call: no compiler or exporter, no functorch or forward-mode transform, no
    subclass of tensors.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and all(type(x) in _PLAIN for x in inputs if isinstance(x, Tensor))
    )


_PLAIN = (Tensor, Parameter)


def _refuse_tangents(name: str, inputs: Sequence[Any]) -> None:
    """Where gradients are off, torch.library drops the tangents of forward-mode differentiation without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs if isinstance(x, Tensor)):
        raise NotImplementedError(
            f"swinkernels::{name} has no forward-mode derivative (jvp): use backend='reference', or reverse mode"
        )


def register(name: str, fake: Callable, setup_context: Callable, backward: Callable) -> Callable:
    """Give an op its fake and its derivative, by torch.library; returns what to call the op by.

    In eager PyTorch that is a shorter way than the op's own: the formula that torch.library makes out of
    setup_context and backward costs a multiple of the host time of the same two in an autograd.Function, or of none
    where nothing needs a gradient.
    """
    torch.library.register_fake(f"swinkernels::{name}", fake, lib=lib)
    torch.library.register_autograd(f"swinkernels::{name}", backward, setup_context=setup_context, lib=lib)
    op = getattr(torch.ops.swinkernels, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx, *gradients):
            return backward(ctx, *gradients)

    def call(*inputs):
        if not _is_plain(inputs):
            _refuse_tangents(name, inputs)
            return op(*inputs)
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


def register_derivative(name: str, fake: Callable, of: str) -> Callable:
    """Give the backward op of ``of`` its fake, and a refusal as its derivative; returns what to call the op by."""

    def refuse(ctx, *_):
        raise NotImplementedError(
            f"{of}: a second derivative is only in the reference: use backend='reference' for double backward"
        )

    torch.library.register_fake(f"swinkernels::{name}", fake, lib=lib)
    torch.library.register_autograd(f"swinkernels::{name}", refuse, lib=lib)
    op = getattr(torch.ops.swinkernels, name).default

    def call(*inputs):
        if torch.is_grad_enabled() or not _is_plain(inputs):  # with create_graph=True gradients are on
            return op(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    return call


def kernel_parameter(parameter: Tensor | None) -> Tensor | None:
    """A parameter in a dtype that kernels read: any but float64."""
    return parameter.float() if parameter is not None and parameter.dtype == torch.float64 else parameter


def parameter_gradients(
    parameters: Sequence[Tensor | None], sums: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The float32 sums of a backward op in the dtypes of the parameters, None for what is not needed."""
    return [
        total.to(parameter.dtype) if need and parameter is not None else None
        for parameter, total, need in zip(parameters, sums, needed, strict=True)
    ]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """torch's Linear without a bias, in the autocast dtype if that is on, else in the dtype of x."""
    if autocast_dtype(x) is None or weight.dtype == torch.float64:  # which autocast leaves alone
        weight = weight.to(x.dtype)
    return F.linear(x, weight)
