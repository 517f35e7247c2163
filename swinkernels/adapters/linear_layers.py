"""Runs each Linear layer of a block in one pass with its bias, GELU or residual connection, for inference on a CPU.

In all other cases, and if an inner module must be called because of a hook, the library's modules are called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from swinkernels.adapters.bypass import child, class_of, watch, why_not_absorbed
from swinkernels.adapters.norms import in_another_dtype
from swinkernels.ops._fused_linear import fuses, linear

# Class -> a function that returns the form of GELU that a module of this class computes, as torch names it, or None.
_GELU: dict[type, Callable[[Any], str | None]] = {nn.GELU: lambda act: act.approximate}


def know_gelu(kind: type[nn.Module], form: Callable[[Any], str | None]) -> None:
    """Register a library's GELU class; ``form`` returns the form that a module of the class computes, or None."""
    watch(kind)
    _GELU[kind] = form


# The classes that compute the same as nn.Linear.
_LINEAR: set[type] = {nn.Linear}


def know_linear(kind: type[nn.Linear]) -> None:
    """Register a library's subclass of nn.Linear that computes the same as its base class."""
    watch(kind)
    _LINEAR.add(kind)


def drops_nothing(name: str, module: Any, kind: type[nn.Module] = nn.Dropout) -> bool:
    """Return True if a dropout, or a library's stochastic depth, has no effect and does not have to be called."""
    kind = nn.Identity if class_of(module) is nn.Identity else kind
    is_off = not module.training or kind is nn.Identity or getattr(module, "p", None) == 0.0
    return is_off and why_not_absorbed(name, module, kind, kind.__name__) is None


def is_plain_linear(name: str, layer: Any, x: Tensor) -> bool:
    """Return True if a layer is a Linear layer whose call may be replaced by an op for this input."""
    kind = class_of(layer)
    is_linear = kind in _LINEAR and why_not_absorbed(name, layer, kind, "") is None
    return is_linear and not in_another_dtype(x, layer.weight, layer.bias)


def call_linear(name: str, layer: Any, x: Tensor) -> Tensor:
    """Return layer(x), computed in one pass if possible."""
    return linear(x, layer.weight, layer.bias) if fuses(x) and is_plain_linear(name, layer, x) else layer(x)


Drop = tuple[str, Any, type[nn.Module]]


def add_linear(name: str, layer: Any, x: Tensor, residual: Tensor, drops: Sequence[Drop]) -> Tensor | None:
    """Return residual + drop(layer(x)) computed in one pass, or None if that is not possible.

    ``drops`` are the dropouts after the layer: the name, the module and its class (see :func:`drops_nothing`).
    """
    if not fuses(x) or residual.dtype != x.dtype or not is_plain_linear(name, layer, x):
        return None
    if not all(drops_nothing(*drop) for drop in drops):
        return None
    return linear(x, layer.weight, layer.bias, residual=residual)


def _calls(name: str, module: Any, kind: type[nn.Module], order: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the inner modules that a module of a class calls, with their names; None if it has to be called itself."""
    if why_not_absorbed(name, module, kind, kind.__name__) is not None:
        yield name, None
        return
    for key in order or module._modules:
        inner = module._modules.get(key)
        if class_of(inner) is kind:  # a Sequential inside a Sequential
            yield from _calls(key, inner, kind, ())
        else:
            yield key, inner


class Layers(NamedTuple):
    """The layers of an MLP and its form of GELU. A call returns MLP(z), or s + MLP(z)."""

    fc1: Any
    fc2: Any
    gelu: str

    def __call__(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        fc1, fc2, gelu = self
        return linear(linear(z, fc1.weight, fc1.bias, gelu=gelu), fc2.weight, fc2.bias, residual=s)


@dataclass(frozen=True)
class Mlp:
    """Describes the MLP of a block: a Linear layer, GELU and a Linear layer, with dropouts between and after them."""

    # The block's children that make up the MLP, in the order of their calls: name, class, and the names of the inner
    # modules in the order in which the child's forward calls them (empty if that is the order of the modules).
    parts: tuple[tuple[str, type[nn.Module], tuple[str, ...]], ...]
    # The name of the block's dropout or stochastic depth after the MLP, or None. An nn.Identity may take its place.
    drop: str | None = None
    drop_kind: type[nn.Module] = nn.Dropout

    def branch(self, block: Any, z: Tensor) -> Tensor:
        """Return MLP(z)."""
        y = self.fused(block, z)
        return self._call(block, z) if y is None else y

    def added(self, block: Any, s: Tensor, z: Tensor) -> Tensor:
        """Return s + drop(MLP(z))."""
        y = self.fused(block, z, s)
        if y is not None:
            return y
        y = self._call(block, z)
        return s + (y if self.drop is None else child(block, self.drop)(y))

    def fused(self, block: Any, z: Tensor, s: Tensor | None = None) -> Tensor | None:
        """Return MLP(z), or s + drop(MLP(z)), from fused products, or None if the modules have to be called."""
        if not fuses(z):
            return None
        if s is not None:
            if s.dtype != z.dtype:
                return None
            if self.drop is not None and not drops_nothing(self.drop, child(block, self.drop), self.drop_kind):
                return None
        layers = self.layers(block, z)
        return None if layers is None else layers(z, s)

    def _call(self, block: Any, z: Tensor) -> Tensor:
        for name, *_ in self.parts:
            z = child(block, name)(z)
        return z

    def layers(self, block: Any, z: Tensor) -> Layers | None:
        """Return the MLP's layers, or None if its modules have to be called."""
        linears: list[Any] = []
        gelu = None
        for part, of, order in self.parts:
            for name, layer in _calls(part, child(block, part), of, order):
                kind = class_of(layer)
                if kind in (nn.Dropout, nn.Identity):
                    if not drops_nothing(name, layer):
                        return None
                elif kind in _GELU and len(linears) == 1 and gelu is None:
                    if why_not_absorbed(name, layer, kind, "GELU") is not None:
                        return None
                    gelu = _GELU[kind](layer)
                elif is_plain_linear(name, layer, z):
                    linears.append(layer)
                else:
                    return None
        if len(linears) != 2 or gelu not in ("none", "tanh"):
            return None
        return Layers(linears[0], linears[1], gelu)
