"""Makes Triton's interpreter faster, by leaving out work that changes neither results nor errors.

Triton 3.8 spends four fifths of the time of a small kernel on this work.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import triton
from triton._utils import validate_block_shape
from triton.runtime import interpreter

tl = interpreter.tl
_patch_lang = interpreter._patch_lang
# The modules whose functions the launch in progress has replaced by interpreted ones.
_patched: set[str] = set()


@functools.cache
def make_faster() -> None:
    """Replace functions of the interpreter in this process, if its version is the one that they were written for."""
    if triton.__version__.split(".")[:2] != ["3", "8"]:
        return
    # The interpreter repeats integer sums and products in 64 bits to detect an overflow, which it reports only with the
    # option `debug`.
    options = interpreter.interpreter_builder.options
    assert not options.debug
    interpreter.interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    interpreter._patch_lang = _patch_for_launch
    interpreter.InterpretedFunction.__call__ = _call_device_function
    tl.tensor.__init__ = _init_tensor
    tl.block_type.__init__ = _init_block_type
    of_scalar = functools.cache(interpreter._get_np_dtype)
    address = of_scalar(tl.uint64)
    interpreter._get_np_dtype = lambda of: address if of.scalar.is_ptr() else of_scalar(of.scalar)


@functools.cache
def _modules(kernel: Callable) -> frozenset[str]:
    return frozenset(x.__name__ for x in kernel.__globals__.values() if inspect.ismodule(x) and x in (tl, tl.core))


def _patch_for_launch(kernel: Callable) -> Any:
    _patched.clear()
    _patched.update(_modules(kernel))
    return _patch_lang(kernel)


def _call_device_function(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a function from a kernel, without replacing the functions of the modules again."""
    if not _modules(self.fn) <= _patched:
        _patch_lang(self.fn)
        _patched.update(_modules(self.fn))
    try:
        return self.rewrite()(*args, **kwargs)
    except Exception as error:
        raise interpreter.InterpreterError(repr(error)) from error


class _Shape(tl.core.tuple):
    """The shape of a block. There is one object of each shape, so most comparisons are of an object with itself."""

    def __init__(self, *numbers: int):
        super().__init__(numbers)
        self.numel = validate_block_shape(list(numbers))
        self.text = str(self)
        self.of_tensor = tl.core.tuple([tl.constexpr(n) for n in numbers]), tl.constexpr(self.numel)

    def __eq__(self, other: Any) -> Any:
        return tl.constexpr(True) if self is other else super().__eq__(other)

    __hash__ = tl.core.tuple.__hash__


_shape = functools.lru_cache(maxsize=None, typed=True)(_Shape)
_of_scalar = tl.core.tuple([]), tl.constexpr(1)


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    if not isinstance(shape, _Shape):
        shape = _shape(*tl.core._unwrap_shape(shape))
    if not shape.values:
        raise TypeError("0d block_type is forbidden")
    self.element_ty, self.shape, self.numel = element_ty, shape, shape.numel
    self.name = f"<{shape.text}, {element_ty}>"


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.shape.of_tensor if type.is_block() else _of_scalar
