"""Tensors that are computed only when they are read, for results that most callers ignore."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map_only

from swinkernels.ops._library import _TRACES, autocast_dtype


def deferred(
    compute: Callable[..., Tensor], shape: Sequence[int], dtype: torch.dtype, read: Sequence[Tensor]
) -> Tensor:
    """Return the result of ``compute``, but call it only when an operation first reads the result.

    ``compute`` then runs in the modes (gradients, autocast, inference) of the call to ``deferred``. It runs immediately
    under a compiler, which removes unread results itself; under transforms; and while a CUDA graph is captured, because
    the graph's replays could not compute the result later.

    Args:
        compute: a differentiable function of the tensors in ``read`` that returns a tensor.
        shape, dtype: shape and dtype of that tensor.
        read: the arguments of ``compute``; the first one is on the result's device. No other code may change them.
    """
    is_captured = read[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if is_captured or _is_traced(read):
        return compute(*read)
    source = _Source(compute, read)
    if torch.is_grad_enabled() and any(t.requires_grad for t in read):
        return _Linked.apply(source, shape, dtype, *read)
    return _Deferred(source, shape, dtype)


def _is_traced(tensors: Sequence[Any]) -> bool:
    """Return True under a compiler, an exporter or a transform, or if ``tensors`` contains a tensor of a subclass."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(type(t) not in (Tensor, Parameter) for t in tensors)
        or any(torch._C._get_dispatch_mode(kind) is not None for kind in _TRACES)
    )


class _Source:
    """A computation and the modes of the call that deferred it."""

    def __init__(self, compute: Callable[..., Tensor], read: Sequence[Tensor]) -> None:
        self._compute, self.read, self.device = compute, read, read[0].device
        self._modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast_dtype(read[0])

    def value(self, read: Sequence[Tensor]) -> Tensor:
        with_gradients, in_inference, autocast = self._modes
        with (
            torch.inference_mode(in_inference),
            torch.set_grad_enabled(with_gradients),
            torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None),
        ):
            return self._compute(*read)


class _Deferred(Tensor):
    _source: _Source
    _value: Tensor | None
    _lock: threading.RLock

    @staticmethod
    def __new__(cls, source: _Source, shape: Sequence[int], dtype: torch.dtype) -> _Deferred:
        made: Any = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=dtype, device=source.device)
        made._source, made._value, made._lock = source, None, threading.RLock()
        return made

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_Deferred, _value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


class _Linked(torch.autograd.Function):
    """Creates a deferred tensor that passes its gradient on to the arguments of ``compute``.

    This also works in code that receives the deferred tensor itself instead of its computed values, such as custom
    autograd functions and the backward pass of reentrant checkpointing.
    """

    @staticmethod
    def forward(ctx, source, shape, dtype, *read):
        ctx.source = source
        return _Deferred(source, shape, dtype)

    @staticmethod
    def backward(ctx, gradient):
        source, needs, create_graph = ctx.source, ctx.needs_input_grad[3:], torch.is_grad_enabled()
        with torch.enable_grad():  # aliases, so that gradients do not flow between tensors computed from one another
            read = [t.view_as(t) for t in source.read]
        wanted = [t for t, need in zip(read, needs, strict=True) if need]
        found = iter(torch.autograd.grad(source.value(read), wanted, gradient, create_graph=create_graph))
        return None, None, None, *(next(found) if need else None for need in needs)


class _Attached(torch.autograd.Function):
    """Returns ``value``, which was computed without gradients, and passes its gradient to the deferred tensor ``x``."""

    @staticmethod
    def forward(ctx, x, value):
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def _value_of(x: _Deferred) -> Tensor:
    """Return the values of ``x``, computed at the first call."""
    with x._lock:  # several threads may read x
        if x._value is None:
            # A transform, a compiler or an exporter that is active here must not leave its own tensors in x.
            is_traced = _is_traced(())
            with (
                temporarily_clear_interpreter_stack() if is_traced else contextlib.nullcontext(),
                _disable_current_modes() if is_traced else contextlib.nullcontext(),
            ):
                x._value = x._source.value(x._source.read)
            del x._source
    with torch._C.DisableTorchFunctionSubclass():
        # x requires a gradient but its values do not if a custom autograd function, such as reentrant checkpointing,
        # created x with gradients disabled and returned it.
        is_attached = x._value.requires_grad or not x.requires_grad
        return x._value if is_attached or not torch.is_grad_enabled() else _Attached.apply(x, x._value)


# dynamo must not trace this function: it would guard on x._value being None. torch.compiler.disable does the same, but
# its import takes a second because it loads all of dynamo.
_value_of._torchdynamo_disable = True  # type: ignore[attr-defined]
