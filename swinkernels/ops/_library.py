"""Helpers for defining ops.

They register ops with torch.library, find the dtypes under autocast, pad per-axis values to three axes, cache decisions
about a call, and define derivatives.
"""

from __future__ import annotations

import marshal
import threading
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from swinkernels._extension import ops
from swinkernels._namespace import NAMESPACE

lib = torch.library.Library(NAMESPACE, "FRAGMENT")


def define(schema: str) -> None:
    """Define an op, unless the compiled library already has it with the same schema (csrc/bindings/schemas.cpp)."""
    if not torch._C._jit_get_schemas_for_operator(f"{NAMESPACE}::{schema.partition('(')[0]}"):
        lib.define(schema)


# Read once: torch 2.11 cannot trace is_autocast_available.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return autocast's dtype for matrix products of ``x``, or None if autocast is off or ``x`` is float64."""
    if not torch._C._is_any_autocast_enabled():
        return None
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def linear_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which a Linear reads x and writes its result."""
    return autocast_dtype(x) or x.dtype


def norm_dtype(x: Tensor) -> torch.dtype:
    """Return the result dtype of a module's norm: float32 under autocast, as for torch's LayerNorm on a GPU."""
    return x.dtype if autocast_dtype(x) is None else torch.float32


def three(values: Sequence, leading) -> list:
    """Pad ``values``, one per axis, to three values with ``leading`` in front."""
    return [leading] * (3 - len(values)) + list(values)


Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Mark a function that dynamo cannot trace: its result becomes a constant of the compiled code.

    torch.compiler.assume_constant_result does the same, but its import takes a second because it loads all of dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def uncached_when_compiled(function: Any) -> Any:
    """Return a function of functools.cache, or in compiled code what it wraps, because dynamo warns of caches."""
    return function.__wrapped__ if torch.compiler.is_compiling() else function


def is_untraced(tensors: Sequence[Any]) -> bool:
    """Return True if autograd in eager PyTorch can record a call on ``tensors``, some of which may be None.

    The result is False under a compiler or exporter, a functorch or forward-mode transform or fake tensors, and for
    tensor subclasses and any other kind of argument. Modes of torch.utils._python_dispatch that run the ops, such as
    the FLOP counter's, are allowed. The choice of the tensors to save must not depend on such a mode: checkpointing
    fails if the forward pass and its recomputation save different tensors because only one of them runs in the mode.
    """
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and PLAIN_TYPES.issuperset(map(type, tensors))
        and (
            torch._C._len_torch_dispatch_stack() == 0
            or all(torch._C._get_dispatch_mode(kind) is None for kind in _TRACES)
        )
    )


def is_plain(tensors: Sequence[Any]) -> bool:
    """Return True if :func:`is_untraced` returns True for ``tensors`` and no dispatch mode intercepts the ops."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and forward_ad._current_level < 0
        and PLAIN_TYPES.issuperset(map(type, tensors))
    )


_TRACES = tuple(getattr(torch._C._TorchDispatchModeKey, kind) for kind in ("FAKE", "PROXY", "FUNCTIONAL"))
metadata = attrgetter("shape", "dtype", "device", "layout")
PLAIN_TYPES = frozenset((Tensor, Parameter, type(None)))


Value = TypeVar("Value")


class Found:
    """Thread-safe cache of decisions about calls, keyed by :func:`call_key`; when full, it drops the oldest entry.

    If two threads compute the same entry, the values are equal.
    """

    def __init__(self, most: int = 1024) -> None:
        self._values: dict[Any, Any] = {}
        self._most = most
        self._lock = threading.Lock()
        self.get = self._values.get
        _ALL_FOUND.append(self)

    def put(self, key: Any, value: Any) -> None:
        with self._lock:
            while len(self._values) >= self._most:
                del self._values[next(iter(self._values))]
            self._values[key] = value

    def __len__(self) -> int:
        return len(self._values)

    def clear(self) -> None:
        with self._lock:
            self._values.clear()


_ALL_FOUND: list[Found] = []


def forget() -> None:
    """Clear every cache, for tests that change which backends are available."""
    for found in _ALL_FOUND:
        found.clear()


def call_key(tensors: Sequence[Tensor | None], options: tuple[Any, ...], dtype: torch.dtype | None = None) -> Any:
    """Return the cache key of a call: its options and the metadata of its tensors, never the tensors' values.

    The key is None, and the call is not cached, if an option is not a plain Python value (for example, a symbolic int
    or a tensor). Options of different types get different keys, also inside tuples: True equals 1, but True is not a
    valid window size.
    """
    if dtype is not None and type(dtype) is not torch.dtype:
        return None
    try:
        values = marshal.dumps(options, 2)  # takes 0.3 us; later formats depend on reference counts
    except ValueError:
        return None
    return values, dtype, *map(type, tensors), *map(metadata, [x for x in tensors if x is not None])


def looked_up(
    found: Found,
    tensors: Sequence[Any],
    options: tuple[Any, ...],
    find: Callable[[], Value],
    dtype: torch.dtype | None = None,
) -> Value:
    """Return the cached result of ``find`` for a call with the same key, or call ``find`` and cache its result."""
    key = call_key(tensors, options, dtype) if is_plain(tensors) else None
    if key is None:  # a compiler must not read the cache, whose contents would become guards
        return find()
    value = found.get(key)
    if value is None:
        value = find()
        found.put(key, value)
    return value


def _refuse_tangents(name: str, inputs: Sequence[Any]) -> None:
    """Raise NotImplementedError for forward-mode tangents, which torch.library silently drops if gradients are off."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in inputs if isinstance(x, Tensor)):
        raise _no_forward_mode(name)


def _no_forward_mode(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"{NAMESPACE}::{name} has no forward-mode derivative (jvp): use backend='torch' or 'reference', or reverse mode"
    )


def _tensor_arguments(op: Any) -> int:
    """Return the number of tensor arguments of ``op``, which come before all others."""
    kinds = [str(argument.type) in ("Tensor", "Optional[Tensor]") for argument in op._schema.arguments]
    assert all(kinds[: sum(kinds)]), f"{op._schema}: tensors come first"
    return sum(kinds)


def _function(name: str, **methods: Any) -> type[torch.autograd.Function]:
    """Create an autograd.Function that profilers and graphs show under the op's name in camel case."""
    camel = "".join(word.capitalize() for word in name.removesuffix("_fwd").split("_"))
    return type(camel, (torch.autograd.Function,), {k: staticmethod(m) for k, m in methods.items()})


def _transformable(name: str, op: Any, setup_context: Callable, backward: Callable) -> Callable:
    """Wrap an op for torch.func's transforms, which do not use the formula registered with torch.library."""

    def jvp(ctx, *tangents):
        raise _no_forward_mode(name)

    function = _function(
        name, forward=lambda *inputs: op(*inputs), setup_context=setup_context, backward=backward, jvp=jvp
    )
    function.generate_vmap_rule = True
    return function.apply


def _is_transformed() -> bool:
    """Return True inside a torch.func transform, except in compiled code."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


class Differentiable:
    """Callable for a registered op, with a fast path for eager calls; other calls take torch.library's path.

    An autograd.Function with the same setup_context and backward takes a fraction of the host time of torch.library's
    autograd formula, and a call without gradients skips both. The Function takes all non-tensor arguments as one
    tuple, because each argument costs time.
    """

    def __init__(self, name: str, setup_context: Callable, backward: Callable) -> None:
        op = getattr(ops, name).default
        count = _tensor_arguments(op)

        def forward(ctx, *inputs):
            *tensors, others = inputs
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*tensors, *others)
            setup_context(ctx, tensors, others, output)
            return output

        def setup_op_context(ctx, inputs, output):
            setup_context(ctx, inputs[:count], inputs[count:], output)

        def backward_op(ctx, *gradients):
            return *backward(ctx, *gradients), *(None,) * (len(op._schema.arguments) - count)

        # Callers with plain tensors use these directly: apply if a gradient may be needed, otherwise overload, which
        # they call below autograd.
        function = _function(name, forward=forward, backward=lambda ctx, *gradients: (*backward(ctx, *gradients), None))
        self.apply, self.overload = function.apply, op
        self._name, self._count = name, count
        self._transformed = _transformable(name, op, setup_op_context, backward_op)
        torch.library.register_autograd(f"{NAMESPACE}::{name}", backward_op, setup_context=setup_op_context, lib=lib)

    def __call__(self, *inputs: Any) -> Any:
        tensors, others = inputs[: self._count], inputs[self._count :]
        if not is_plain(tensors):
            _refuse_tangents(self._name, tensors)
            return (self._transformed if _is_transformed() else self.overload)(*inputs)
        if any_requires_grad(tensors):
            return self.apply(*tensors, others)
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload(*inputs)


def any_requires_grad(tensors: Sequence[Tensor | None]) -> bool:
    """Return True if autograd records operations on any of ``tensors``."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def register(name: str, fake: Callable, setup_context: Callable, backward: Callable) -> Differentiable:
    """Register an op's fake kernel and derivative with torch.library and return the callable for the op.

    Args:
        name: the op's name.
        fake: as for torch.library.register_fake.
        setup_context: (ctx, tensors, others, output), with the op's arguments split into tensors and others.
        backward: (ctx, *gradients) -> the gradients of the tensors.
    """
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)
    return Differentiable(name, setup_context, backward)


def register_without_derivative(name: str, fake: Callable, instead: str) -> Differentiable:
    """Register an op for inference, as :func:`register` does; ``instead`` names what has a derivative in its place."""

    def refuse(*_):
        raise NotImplementedError(f"{name} has no derivative: call it under torch.no_grad(), or use {instead}")

    return register(name, fake, lambda ctx, tensors, others, output: None, refuse)


def register_derivative(name: str, fake: Callable, of: str, gradients: Callable | None = None) -> Callable:
    """Register the fake kernel and the derivative of the backward op of ``of``.

    Returns a callable for the backward op, which takes a tuple of tensors and a tuple of the other arguments.

    Args:
        name: the backward op's name.
        fake: as for torch.library.register_fake.
        of: the forward op's name in error messages.
        gradients: (tensors, others) -> the backward op's results, computed by operations that torch can differentiate,
            with None for results that are not needed. If ``gradients`` is None, a second derivative raises
            NotImplementedError.
    """
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=lib)
    op = getattr(ops, name).default
    count = _tensor_arguments(op)

    def setup_context(ctx, inputs, output):
        if gradients is not None:
            ctx.set_materialize_grads(False)
            ctx.others = inputs[count:]
            ctx.save_for_backward(*inputs[:count])

    def differentiate(ctx, *cotangents):
        if gradients is None:
            raise NotImplementedError(
                f"the kernels do not implement second derivatives of {of}: use backend='torch' or 'reference' for "
                "double backward"
            )
        tensors, others = ctx.saved_tensors, ctx.others
        floating = [i for i, t in enumerate(tensors) if t is not None and t.is_floating_point()]

        def results(*some: Tensor) -> tuple[Tensor, ...]:
            given = dict(zip(floating, some, strict=True))
            found = gradients([given.get(i, t) for i, t in enumerate(tensors)], others)
            asked = zip(found, cotangents, strict=True)
            return tuple(g.to(c.dtype) for g, c in asked if g is not None and c is not None)

        vjp = torch.func.vjp(results, *(tensors[i] for i in floating))[1]
        found = dict(zip(floating, vjp(tuple(c for c in cotangents if c is not None)), strict=True))
        return tuple(found.get(i) for i in range(len(op._schema.arguments)))

    torch.library.register_autograd(f"{NAMESPACE}::{name}", differentiate, setup_context=setup_context, lib=lib)
    transformed = _transformable(name, op, setup_context, differentiate)

    def call(tensors, others):
        if _is_transformed():
            return transformed(*tensors, *others)
        if torch.is_grad_enabled() or not is_plain(tensors):  # create_graph=True enables gradients
            return op(*tensors, *others)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*tensors, *others)

    return call


def kernel_parameter(parameter: Tensor | None) -> Tensor | None:
    """Return a parameter in a dtype that the kernels support: float64 becomes float32."""
    return parameter.float() if parameter is not None and parameter.dtype == torch.float64 else parameter


def parameter_gradients(
    parameters: Sequence[Tensor | None], sums: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """Cast a backward op's float32 sums to the parameters' dtypes; a gradient that is not needed is None."""
    return [
        total.to(parameter.dtype) if need and parameter is not None else None
        for parameter, total, need in zip(parameters, sums, needed, strict=True)
    ]
