"""Defines Form: a description of how the modules of a class compute window attention, which lets them use the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Form.name -> the form. Used to unpickle accelerated models.
_KNOWN: dict[str, Form] = {}


def _run(module: nn.Module, x: Tensor) -> Any:
    return type(module).forward(module, x)


@dataclass(frozen=True, eq=False)
class Form:
    """Describes how the modules of a class compute window attention.

    ``accelerate`` runs copies of each such module with and without the form on random inputs in float64, and uses the
    form only if both give the same outputs and gradients.
    """

    # A unique name, used in reports and for pickling.
    name: str
    # The class of the modules, or a function that returns True for modules that the form describes.
    of: type[nn.Module] | Callable[[nn.Module], bool]
    # (module, attend, *args) -> the result of the module's method for the same arguments, or a str: the reason why the
    # module must run its own code. ``attend(qkv, **arguments)`` and ``attend(q, k, v, **arguments)`` are the two window
    # attention ops on the backend given to accelerate.
    forward: Callable[..., Any]
    # Returns the sizes of the inputs for a trial, (*S, C) each, with the tokens per axis S and the channels C. They
    # should include every kind that the module supports: maps with padding, with a shift, and smaller than a window.
    sizes: Callable[[Any], Sequence[tuple[int, ...]]]
    # The name of the method that ``forward`` replaces.
    method: str = "forward"
    # Calls the forward of the module's class, without hooks, on an input (B, *S, C), with all other arguments that this
    # forward requires. Returns one tensor that contains all results.
    call: Callable[[Any, Tensor], Any] = _run
    # The names of the inner modules that ``forward`` does not call, or calls with tokens in another order. The default,
    # "", names the module itself.
    absorbs: tuple[str, ...] = ("",)
    # Returns smaller shapes, by parameter name, for tables whose size depends on the map, so that the trial can use a
    # small map. For a copy with these tables, ``sizes`` must return the small sizes.
    small: Callable[[Any], dict[str, tuple[int, ...]]] = lambda module: {}
    # The largest difference in a trial that counts as rounding, relative to the largest element. Forms of modules that
    # always compute in float32 need a larger value.
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _KNOWN[self.name] = self

    def fits(self, module: nn.Module) -> bool:
        """Return True if the form describes ``module``."""
        if isinstance(module, torch.jit.ScriptModule):
            return False
        return isinstance(module, self.of) if isinstance(self.of, type) else self.of(module)

    def __reduce__(self) -> Any:
        return named, (self.name,)

    def __deepcopy__(self, memo: Any) -> Form:
        return self


def named(name: str) -> Form:
    """Return the form called ``name``, for unpickling: one of this package, or one that a user registered."""
    if name not in _KNOWN:
        from swinkernels.adapters.adapter import loaded_adapters  # here, to avoid an import cycle

        loaded_adapters()
    if name not in _KNOWN:
        raise RuntimeError(
            f"the model was accelerated with a form {name!r}, which is not registered here: call "
            "swinkernels.adapters.register with it before loading the model"
        )
    return _KNOWN[name]
