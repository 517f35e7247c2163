"""Runs the Linear layers of blocks, for inference on a CPU, in one pass with bias, GELU or the residual connection.

In all other cases, or if an inner module has to be called because of a hook, the library's modules are called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swinkernels.adapters.bypass import (
    child,
    class_of,
    watch,
    why_not_absorbed,
    why_not_linear,
)
from swinkernels.adapters.norms import in_another_dtype
from swinkernels.ops._fused_linear import fuses, linear

# Class -> a function that returns the form of GELU that a module of this class computes, as torch names it, or None.
_GELU: dict[type, Callable[[Any], str | None]] = {nn.GELU: lambda act: act.approximate}


def know_gelu(kind: type[nn.Module], form: Callable[[Any], str | None]) -> None:
    """Register a library's GELU class; ``form`` returns the form that a module of the class computes, or None."""
    watch(kind)
    _GELU[kind] = form


def drops_nothing(name: str, module: Any, kind: type[nn.Module] = nn.Dropout) -> bool:
    """Return True if a dropout, or a library's stochastic depth, has no effect and does not have to be called."""
    kind = nn.Identity if class_of(module) is nn.Identity else kind
    return not module.training and why_not_absorbed(name, module, kind, kind.__name__) is None


def _is_plain(name: str, layer: Any, x: Tensor) -> bool:
    return why_not_linear(name, layer) is None and not in_another_dtype(x, layer.weight, layer.bias)


def call_linear(name: str, layer: Any, x: Tensor) -> Tensor:
    """Return layer(x), computed in one pass if possible."""
    return linear(x, layer.weight, layer.bias) if fuses(x) and _is_plain(name, layer, x) else layer(x)


def add_linear(name: str, layer: Any, x: Tensor, residual: Tensor) -> Tensor | None:
    """Return residual + layer(x) computed in one pass, or None if that is not possible."""
    if not fuses(x) or residual.dtype != x.dtype or not _is_plain(name, layer, x):
        return None
    return linear(x, layer.weight, layer.bias, residual=residual)


@dataclass(frozen=True)
class Mlp:
    """Describes the MLP of a block: a Linear layer, GELU and a Linear layer, with dropouts between and after them."""

    # The block's children that make up the MLP, in the order of their calls: name, class, and the names of the inner
    # modules in the order in which the child's forward calls them (empty for an nn.Sequential).
    parts: tuple[tuple[str, type[nn.Module], tuple[str, ...]], ...]
    # The name of the block's dropout or stochastic depth after the MLP, or None. An nn.Identity may take its place.
    drop: str | None = None
    drop_kind: type[nn.Module] = nn.Dropout

    def branch(self, block: Any, z: Tensor) -> Tensor:
        """Return MLP(z)."""
        layers = self._layers(block, z) if fuses(z) else None
        if layers is None:
            return self._call(block, z)
        fc1, fc2, gelu = layers
        return linear(linear(z, fc1.weight, fc1.bias, gelu=gelu), fc2.weight, fc2.bias)

    def added(self, block: Any, s: Tensor, z: Tensor) -> Tensor:
        """Return s + drop(MLP(z))."""
        drop = None if self.drop is None else child(block, self.drop)
        layers = self._layers(block, z) if fuses(z) and s.dtype == z.dtype else None
        if layers is None or not (drop is None or drops_nothing(self.drop or "", drop, self.drop_kind)):
            y = self._call(block, z)
            return s + (y if drop is None else drop(y))
        fc1, fc2, gelu = layers
        return linear(linear(z, fc1.weight, fc1.bias, gelu=gelu), fc2.weight, fc2.bias, residual=s)

    def _call(self, block: Any, z: Tensor) -> Tensor:
        for name, *_ in self.parts:
            z = child(block, name)(z)
        return z

    def _layers(self, block: Any, z: Tensor) -> tuple[Any, Any, str] | None:
        """Return the MLP's two Linear layers and its form of GELU, or None if its modules have to be called."""
        linears: list[Any] = []
        gelu = None
        for part, of, order in self.parts:
            module = child(block, part)
            if why_not_absorbed(part, module, of, of.__name__) is not None:
                return None
            for name in order or module._modules:
                layer = module._modules.get(name)
                kind = class_of(layer)
                if kind in (nn.Dropout, nn.Identity):
                    if not drops_nothing(name, layer):
                        return None
                elif kind in _GELU and len(linears) == 1 and gelu is None:
                    if why_not_absorbed(name, layer, kind, "GELU") is not None:
                        return None
                    gelu = _GELU[kind](layer)
                elif kind is nn.Linear and _is_plain(name, layer, z):
                    linears.append(layer)
                else:
                    return None
        return (*linears, gelu) if len(linears) == 2 and gelu in ("none", "tanh") else None
