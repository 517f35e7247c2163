"""A form: how the modules of a class compute window attention, told in terms of the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Form.name -> the form, for pickles of models that were accelerated.
_KNOWN: dict[str, Form] = {}


def _run(module: nn.Module, x: Tensor) -> Any:
    return type(module).forward(module, x)


@dataclass(frozen=True, eq=False)
class Form:
    """How the modules of a class compute window attention.

    ``accelerate`` runs a copy of each such module beside ``forward`` on random numbers in float64, outputs and
    gradients, and uses the form only where the two are the same.
    """

    # For the report; no two forms have the same.
    name: str
    # The class of the modules, or whether a module is one of them.
    of: type[nn.Module] | Callable[[nn.Module], bool]
    # (module, attend, *args) -> what the module's method returns for the same arguments, or a str: why its own code has
    # to run for them. ``attend(qkv, **arguments)`` and ``attend(q, k, v, **arguments)`` are the two window attention
    # ops on the backend that accelerate was asked for.
    forward: Callable[..., Any]
    # Sizes of inputs to try, (*S, C) each, for a module: with pads, with a shift, smaller than a window, where the
    # module takes such.
    sizes: Callable[[Any], Sequence[tuple[int, ...]]]
    # The method that ``forward`` stands for.
    method: str = "forward"
    # Calls the module's class, past hooks, on an input (B, *S, C), with whatever else it takes for that, and returns
    # one tensor of what comes out.
    call: Callable[[Any, Tensor], Any] = _run
    # The modules inside that ``forward`` does not call, or calls with tokens in another order; "" is the module itself.
    absorbs: tuple[str, ...] = ("",)
    # Shapes of parameters, by their names, that make a copy one of small maps, for a module whose tables are those of a
    # map. ``sizes`` of the copy are then small.
    small: Callable[[Any], dict[str, tuple[int, ...]]] = lambda module: {}
    # The largest difference that a trial takes for rounding, of the largest element: more where the module computes in
    # float32 whatever its dtype.
    tolerance: float = 1e-6

    def __post_init__(self) -> None:
        _KNOWN[self.name] = self

    def fits(self, module: nn.Module) -> bool:
        """Whether the form describes a module."""
        if isinstance(module, torch.jit.ScriptModule):
            return False
        return isinstance(module, self.of) if isinstance(self.of, type) else self.of(module)

    def __reduce__(self) -> Any:
        return named, (self.name,)

    def __deepcopy__(self, memo: Any) -> Form:
        return self


def named(name: str) -> Form:
    """The form that a pickled module has: of a library that is imported, or one that was registered."""
    if name not in _KNOWN:
        from swinkernels.adapters.adapter import loaded_adapters  # whose libraries import this module

        loaded_adapters()
    if name not in _KNOWN:
        raise RuntimeError(
            f"the model was accelerated with a form {name!r}, which is not registered here: call "
            "swinkernels.adapters.register with it before loading the model"
        )
    return _KNOWN[name]
