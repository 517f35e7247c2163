"""Accelerated subclasses that are made at run time, for classes of unknown packages; and how they are pickled."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from swinkernels.adapters.adapter import Accelerated, Adapter, original_class

# The library that reports name for these classes.
NAME = "structural"


def parameters_of(original: Any) -> list[inspect.Parameter]:
    """What the forward of a class takes beside self."""
    taken = list(inspect.signature(original.forward).parameters.values())[1:]
    return [p for p in taken if p.kind is not inspect.Parameter.VAR_KEYWORD]


# torch's own, what changes from call to call or from module to module of one make, and what a trial replaces.
_NOT_COMPARED = {*nn.Module().__dict__, "H", "W", "input_resolution", "p", "drop_prob"}


def signature_of(module: nn.Module, *others: Any) -> tuple[Any, ...]:
    """What a forward may depend on but for the values of tensors: equal for modules that one trial is enough for."""
    found: list[Any] = [original_class(module).forward, *others]
    found += [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for path, m in module.named_modules():
        found += [path, original_class(m), original_class(m).forward]
        for name, value in sorted(m.__dict__.items()):
            if name in _NOT_COMPARED or name.startswith("_swinkernels_"):
                continue
            if isinstance(value, (bool, int, float, str, tuple, list, type(None))) or callable(value):
                found.append((name, repr(value)))
    return tuple(found)


class DynamicSubclass(Accelerated):
    """A base of accelerated classes that are made at run time, for an original class and a form."""

    _swinkernels_form: Any
    # (original, form) -> the adapter with the class; a function that pickle can import.
    _swinkernels_adapter: Callable[[Any, Any], Adapter]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class cannot be imported, so it is made again."""
        cls, reduced = type(self), super().__reduce_ex__(max(2, protocol))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        made_from = cls._swinkernels_adapter, original_class(self), cls._swinkernels_form
        return _make_again, (*made_from, *reduced[1][1:]), *reduced[2:]


def _make_again(adapter: Callable[[Any, Any], Adapter], original: Any, form: Any, *args: Any) -> nn.Module:
    accelerated: Any = adapter(original, form).accelerated
    return accelerated.__new__(accelerated, *args)


def dynamic_subclass(
    base: type[DynamicSubclass], original: Any, form: Any, adapter: Any, **namespace: Any
) -> type[nn.Module]:
    """A subclass of a class for a form that its instances follow."""
    namespace = {
        "_swinkernels_form": form,
        "_swinkernels_adapter": staticmethod(adapter),
        "__module__": original.__module__,
        "__doc__": base.__doc__,
        **namespace,
    }
    return type(f"Accelerated{original.__name__}", (base, original), namespace)


_remake = _make_again  # the name in models pickled by 0.1.0
