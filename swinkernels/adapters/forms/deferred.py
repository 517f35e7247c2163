"""Tensors that a module returns without computing them, for results that most callers drop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._pytree import tree_map_only

from swinkernels.ops._library import autocast_dtype


def deferred(compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, read: Sequence[Tensor]) -> Tensor:
    """Return the result of ``compute``, but call it only when an operation first reads the result.

    ``compute`` then runs in the modes of this call (gradients, autocast, inference). It runs at once under a compiler,
    which drops unread results itself, under transforms and while a CUDA graph is captured, whose replays could not
    compute the result later.

    Args:
        compute: returns a tensor, with gradients for the tensors that it reads.
        shape, dtype: shape and dtype of that tensor.
        read: the tensors that ``compute`` reads, the first one on the result's device. Nothing else may change them.

    Raises:
        RuntimeError: when a gradient reaches the result in a way that bypasses its values, as through a custom
            autograd.Function.
    """
    is_captured = read[0].is_cuda and torch.cuda.is_current_stream_capturing()
    return compute() if is_captured or _is_traced(read) else _Deferred(compute, shape, dtype, read)


_TRACES = tuple(getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("FAKE", "PROXY", "FUNCTIONAL"))


def _is_traced(tensors: Sequence[Any]) -> bool:
    """Return True under a compiler, an exporter or a transform, or for tensor subclasses."""
    return (
        torch.compiler.is_compiling()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or any(type(t) not in (Tensor, Parameter) for t in tensors)
        or any(torch._C._get_dispatch_mode(kind) is not None for kind in _TRACES)
    )


class _Deferred(Tensor):
    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _device: str
    _modes: tuple[bool, bool, torch.dtype | None]

    @staticmethod
    def __new__(
        cls, compute: Callable[[], Tensor], shape: Sequence[int], dtype: torch.dtype, read: Sequence[Tensor]
    ) -> _Deferred:
        x, with_gradients = read[0], torch.is_grad_enabled()
        needs_gradient = with_gradients and any(t.requires_grad for t in read)
        made: Any = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=x.device, requires_grad=needs_gradient
        )
        made._compute, made._value = compute, None
        made._device = x.device.type
        made._modes = with_gradients, torch.is_inference_mode_enabled(), autocast_dtype(x)
        if needs_gradient:
            with torch._C.DisableTorchFunctionSubclass():
                made.register_hook(_refuse_gradient)
        return made

    def __init__(self, *args: Any) -> None:
        pass

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(_Deferred, _value_of, (args, kwargs or {}))
        return func(*args, **kwargs)

    __torch_dispatch__ = __torch_function__  # type: ignore[assignment]


def _value_of(x: _Deferred) -> Tensor:
    """Return the computed tensor."""
    if x._value is None:
        with_gradients, in_inference, autocast = x._modes
        with (
            torch.inference_mode(in_inference),
            torch.set_grad_enabled(with_gradients),
            torch.autocast(x._device, dtype=autocast, enabled=autocast is not None),
        ):
            x._value = x._compute()
        del x._compute
    return x._value


def _refuse_gradient(gradient: Tensor) -> None:
    raise RuntimeError(
        "swinkernels: a gradient reached attention weights that are computed on demand: pass their clone() to a custom "
        "autograd.Function"
    )
