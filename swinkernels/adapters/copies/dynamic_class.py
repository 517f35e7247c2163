"""Creates, at run time, accelerated subclasses of classes from unknown packages. Their instances can be pickled."""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, Adapter, derived_since, original_class
from swinkernels.adapters.bypass import all_modules_have_hooks
from swinkernels.adapters.copies.snapshot import Snapshot

# The attribute in which a block stores its mask. The mask is compared with the one computed from the geometry.
MASK = "attn_mask"
# The adapter name that reports show for unknown classes, in place of a library's name.
NAME = "structural"


def parameters_of(original: Any) -> list[inspect.Parameter]:
    """Return the parameters of a class's forward, except ``self`` and ``**kwargs``."""
    taken = list(inspect.signature(original.forward).parameters.values())[1:]
    return [p for p in taken if p.kind is not inspect.Parameter.VAR_KEYWORD]


def others_are_default(others: tuple[inspect.Parameter, ...], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return True if all arguments that the form does not use have their default values.

    Args:
        others: the parameters of forward that follow the ones used by the form.
        args, kwargs: the values given for ``others``.
    """
    if len(args) > len(others):
        return False
    if args and not all(_is_default(value, of) for value, of in zip(args, others, strict=False)):
        return False
    known = {p.name: p for p in others[len(args) :]}
    return all(name in known and _is_default(value, known[name]) for name, value in kwargs.items())


def _is_default(value: Any, of: inspect.Parameter) -> bool:
    default = of.default
    return value is default or (type(value) is type(default) and type(value) in _COMPARED and value == default)


_COMPARED = (bool, int, float, str)


def inside(module: nn.Module, path: str) -> nn.Module | None:
    """Return the submodule at ``path``, or None if there is none. This is faster than ``get_submodule``."""
    found: nn.Module | None = module
    for name in path.split(".") if path else ():
        found = None if found is None else found._modules.get(name)
    return found


class DynamicSubclass(Accelerated):
    """Base class of the accelerated classes that are created at run time from an original class and a form."""

    _swinkernels_form: Any
    _swinkernels_original: Any
    _swinkernels_keeps_results = False  # unknown code may read anything, so its state is compared with snapshots
    # The parameters of forward that follow the ones used by the form.
    _swinkernels_others: tuple[inspect.Parameter, ...] = ()
    # Path of this module or of an inner module that the op replaces -> its snapshot, taken when the class was swapped.
    _swinkernels_snapshots: dict[str, Snapshot] | None = None

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [getattr(self, MASK, None)]
        for path, snapshot in (self._swinkernels_snapshots or {}).items():
            module = inside(self, path)
            if module is not None:
                found += [module._buffers.get(name) for name in snapshot.kept]
        return tuple(found)

    def _swinkernels_look(self) -> None:
        for path, snapshot in (self._swinkernels_snapshots or {}).items():
            module = inside(self, path)
            if module is not None:
                snapshot.differs_in_buffers(module)

    def _swinkernels_changed(self) -> str | None:
        """Return a description of how the module has changed since its trial, or None if it has not changed."""
        if all_modules_have_hooks():
            return "a global module hook is registered"
        if self._swinkernels_snapshots is None:
            return "it was pickled by an older version of this package: call swinkernels.accelerate again"
        for name, snapshot in self._swinkernels_snapshots.items():
            module = inside(self, name)
            reason = "it was removed" if module is None else snapshot.differs(module)
            if reason is not None:
                return f"{name}: {reason}" if name else reason
        return None

    # (original, form) -> the adapter for this class. The function must be importable, because pickle stores its name.
    _swinkernels_adapter: Callable[[Any, Any], Adapter]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the arguments that recreate the class, because pickle cannot import a class created at run time."""
        cls, reduced = type(self), super().__reduce_ex__(max(2, protocol))
        if derived_since(self) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        made_from = cls._swinkernels_adapter, original_class(self), cls._swinkernels_form
        return _make_again, (*made_from, *reduced[1][1:]), *reduced[2:]


def _make_again(adapter: Callable[[Any, Any], Adapter], original: Any, form: Any, *args: Any) -> nn.Module:
    accelerated: Any = adapter(original, form).accelerated
    return accelerated.__new__(accelerated, *args)


def dynamic_subclass(
    base: type[DynamicSubclass], original: Any, form: Any, adapter: Any, **namespace: Any
) -> type[nn.Module]:
    """Create the accelerated subclass of ``original`` for modules of the given ``form``."""
    namespace = {
        "_swinkernels_form": form,
        "_swinkernels_original": original,
        "_swinkernels_adapter": staticmethod(adapter),
        "__module__": original.__module__,
        "__doc__": base.__doc__,
        **namespace,
    }
    return type(f"Accelerated{original.__name__}", (base, original), namespace)


_remake = _make_again  # the name of _make_again in models pickled by 0.1.0
