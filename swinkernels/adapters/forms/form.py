"""Forms describe, in terms of the op, how the modules of a class compute window attention."""

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

    ``accelerate`` runs a copy of each such module with and without the form on random inputs in float64, and uses the
    form only if both give the same outputs and gradients.
    """

    # A unique name, for reports and pickling.
    name: str
    # The class of the modules, or a function that returns True for them.
    of: type[nn.Module] | Callable[[nn.Module], bool]
    # (module, attend, *args) -> the result of the module's method for the same arguments, or a str: the reason why the
    # module's own code has to run. ``attend(qkv, **arguments)`` and ``attend(q, k, v, **arguments)`` are the two window
    # attention ops on the backend given to accelerate.
    forward: Callable[..., Any]
    # Returns the sizes of inputs to try for a module, (*S, C) each, with the tokens per axis S and the channels C: maps
    # with pads, with a shift, and smaller than a window, if the module supports them.
    sizes: Callable[[Any], Sequence[tuple[int, ...]]]
    # The method that ``forward`` replaces.
    method: str = "forward"
    # Calls the forward of the module's class, without hooks, on an input (B, *S, C) with the further arguments that
    # this forward requires, and returns one tensor with all results.
    call: Callable[[Any, Tensor], Any] = _run
    # The names of the inner modules that ``forward`` does not call, or calls with tokens in another order; the default,
    # "", means the whole module.
    absorbs: tuple[str, ...] = ("",)
    # Returns smaller shapes, by parameter name, for tables sized for a whole map, so that the trial can use a small
    # map. ``sizes`` must return small sizes for a copy with these tables.
    small: Callable[[Any], dict[str, tuple[int, ...]]] = lambda module: {}
    # The largest difference in a trial, relative to the largest element, that counts as rounding. A module that always
    # computes in float32 needs a larger value.
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
    """Return the form of a pickled module by its name. An imported library or the user must have registered it."""
    if name not in _KNOWN:
        from swinkernels.adapters.adapter import loaded_adapters  # these libraries import this module

        loaded_adapters()
    if name not in _KNOWN:
        raise RuntimeError(
            f"the model was accelerated with a form {name!r}, which is not registered here: call "
            "swinkernels.adapters.register with it before loading the model"
        )
    return _KNOWN[name]
