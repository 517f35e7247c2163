"""A form: a description of how the modules of a class compute window attention, in terms of the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Form.name -> the form, to unpickle models that were accelerated.
_KNOWN: dict[str, Form] = {}


def _run(module: nn.Module, x: Tensor) -> Any:
    return type(module).forward(module, x)


@dataclass(frozen=True, eq=False)
class Form:
    """Describes how the modules of a class compute window attention.

    ``accelerate`` compares a copy of each such module with ``forward`` on random numbers in float64, outputs and
    gradients, and uses the form only if they agree.
    """

    # The unique name, for reports.
    name: str
    # The class of the modules, or a function that returns True for them.
    of: type[nn.Module] | Callable[[nn.Module], bool]
    # (module, attend, *args) -> the result of the module's method for the same arguments, or a str: the reason why its
    # own code has to run for them. ``attend(qkv, **arguments)`` and ``attend(q, k, v, **arguments)`` are the two window
    # attention ops on the backend given to accelerate.
    forward: Callable[..., Any]
    # Returns sizes of inputs to try for a module, (*S, C) each: with pads, with a shift, and smaller than a window, if
    # supported.
    sizes: Callable[[Any], Sequence[tuple[int, ...]]]
    # The method that ``forward`` replaces.
    method: str = "forward"
    # Calls the module's class, without hooks, on an input (B, *S, C) with all other arguments, and returns one tensor
    # of its results.
    call: Callable[[Any, Tensor], Any] = _run
    # The modules inside that ``forward`` does not call, or calls with tokens in another order; "" is the module itself.
    absorbs: tuple[str, ...] = ("",)
    # Shapes of parameters, by their names, that make a copy one of small maps, for a module whose tables are those of a
    # map. ``sizes`` of the copy are then small.
    small: Callable[[Any], dict[str, tuple[int, ...]]] = lambda module: {}
    # The largest difference in a trial, relative to the largest element, that counts as rounding: more for a module
    # that always computes in float32.
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _KNOWN[self.name] = self

    def fits(self, module: nn.Module) -> bool:
        """Return True if the form describes a module."""
        if isinstance(module, torch.jit.ScriptModule):
            return False
        return isinstance(module, self.of) if isinstance(self.of, type) else self.of(module)

    def __reduce__(self) -> Any:
        return named, (self.name,)

    def __deepcopy__(self, memo: Any) -> Form:
        return self


def named(name: str) -> Form:
    """Find the form of a pickled module: of an imported library, or registered by a user."""
    if name not in _KNOWN:
        from swinkernels.adapters.adapter import loaded_adapters  # these libraries import this module

        loaded_adapters()
    if name not in _KNOWN:
        raise RuntimeError(
            f"the model was accelerated with a form {name!r}, which is not registered here: call "
            "swinkernels.adapters.register with it before loading the model"
        )
    return _KNOWN[name]
