"""Computes each Linear layer of a block in one pass with its bias, GELU or residual sum, for inference on a CPU.

In all other cases, and if an inner module has to be called because of a hook, the library's modules are called.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.adapters.bypass import child, class_of, watch, weight_and_bias, why_not_absorbed
from swinkernels.adapters.checks import keeps_results, settled
from swinkernels.adapters.norms import in_another_dtype
from swinkernels.ops import _onednn
from swinkernels.ops._fused_linear import fuses, linear, mlp

# Class -> a function that returns the matching ``approximate`` argument of F.gelu ("none" or "tanh") for a module of
# this class, or None if there is none.
_GELU: dict[type, Callable[[Any], str | None]] = {nn.GELU: lambda act: act.approximate}


def know_gelu(kind: type[nn.Module], form: Callable[[Any], str | None]) -> None:
    """Register a library's GELU class.

    ``form`` returns the matching ``approximate`` argument of F.gelu for a module of the class, or None if there is
    none.
    """
    watch(kind)
    _GELU[kind] = form


# nn.Linear and the registered subclasses, which give the same results.
_LINEAR: set[type] = {nn.Linear}


def know_linear(kind: type[nn.Linear]) -> None:
    """Register a library's subclass of nn.Linear that gives the same results as its base class."""
    watch(kind)
    _LINEAR.add(kind)


def why_not_left_out(
    name: str, module: Any, kind: type[nn.Module] = nn.Dropout, training: bool | None = None
) -> str | None:
    """Return the reason why a dropout or stochastic-depth module has to be called, or None if it has no effect.

    Unless it is None, ``training`` replaces the module's training mode.
    """
    kind = nn.Identity if class_of(module) is nn.Identity else kind
    if kind is not nn.Identity and (module.training if training is None else training):
        p = getattr(module, "p", getattr(module, "drop_prob", None))
        if p != 0.0:
            return f"{name} drops elements in training (p={p})"
    return why_not_absorbed(name, module, kind, kind.__name__)


def drops_nothing(name: str, module: Any, kind: type[nn.Module] = nn.Dropout) -> bool:
    """Return True if a dropout or stochastic-depth module has no effect and does not have to be called."""
    return why_not_left_out(name, module, kind) is None


def _why_not_linear(name: str, layer: Any) -> str | None:
    """Return the reason why ``layer`` is not an nn.Linear whose call an op can replace, or None."""
    kind = class_of(layer)
    if kind not in _LINEAR:
        return f"{name} is a {kind.__module__}.{kind.__qualname__}, not an nn.Linear"
    return why_not_absorbed(name, layer, kind, "an nn.Linear")


def why_not_readable(name: str, layer: Any) -> str | None:
    """Return the reason why ``layer`` has to be called, instead of an op reading its parameters, or None."""
    reason = _why_not_linear(name, layer)
    if reason is not None:
        return reason
    for key in ("weight", "bias"):
        parameter = getattr(layer, key)
        if parameter is not None and (
            type(parameter) not in (Tensor, nn.Parameter) or parameter.layout is not torch.strided
        ):
            return f"{name}.{key} is a {type(parameter).__name__} ({parameter.layout}), not a dense tensor"
    return None


def is_plain_linear(name: str, layer: Any, x: Tensor) -> bool:
    """Return True if ``layer`` is a Linear layer whose call on ``x`` an op may replace."""
    return _why_not_linear(name, layer) is None and not in_another_dtype(x, layer.weight, layer.bias)


def replaces_modules(x: Tensor) -> bool:
    """Return True if functions may compute Linear layers with the input ``x`` faster than their modules."""
    return fuses(x) or _onednn.is_for_training(x)


def call_linear(name: str, layer: Any, x: Tensor) -> Tensor:
    """Return layer(x), computed by a faster function if possible."""
    if replaces_modules(x) and is_plain_linear(name, layer, x):
        return linear(x, layer.weight, layer.bias)
    return layer(x)


Drop = tuple[str, Any, type[nn.Module]]


def add_linear(name: str, layer: Any, x: Tensor, residual: Tensor, drops: Sequence[Drop]) -> Tensor | None:
    """Return residual + drop(layer(x)), computed in one pass, or None if that is not possible.

    ``drops`` lists the dropouts after the layer as (name, module, expected class), the arguments of
    :func:`drops_nothing`. If any dropout has an effect, the result is None.
    """
    if not fuses(x) or residual.dtype != x.dtype or not is_plain_linear(name, layer, x):
        return None
    if not all(drops_nothing(*drop) for drop in drops):
        return None
    return linear(x, layer.weight, layer.bias, residual=residual)


def _calls(name: str, module: Any, kind: type[nn.Module], order: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the name and the module of each inner module that ``module`` calls, in the order of the calls.

    If ``module`` itself has to be called, yield ``name`` and the reason instead.
    """
    reason = why_not_absorbed(name, module, kind, kind.__name__)
    if reason is not None:
        yield name, reason
        return
    for key in order or module._modules:
        inner = module._modules.get(key)
        if class_of(inner) is kind:  # a Sequential inside a Sequential
            yield from _calls(key, inner, kind, ())
        else:
            yield key, inner


class Layers(NamedTuple):
    """The layers of an MLP and the ``approximate`` argument of its GELU. A call returns MLP(z), or s + MLP(z)."""

    fc1: Any
    fc2: Any
    gelu: str

    def __call__(self, z: Tensor, s: Tensor | None = None) -> Tensor:
        return mlp(z, weight_and_bias(self.fc1), weight_and_bias(self.fc2), gelu=self.gelu, residual=s)

    def weak(self) -> WeakLayers:
        return WeakLayers(weakref.ref(self.fc1), weakref.ref(self.fc2), self.gelu)

    def by_torch(self, z: Tensor) -> Tensor:
        """Return MLP(z) from the functions that the modules call, so that autograd saves the same tensors."""
        hidden = F.gelu(_onednn.linear(z, *weight_and_bias(self.fc1)), approximate=self.gelu)
        return _onednn.linear(hidden, *weight_and_bias(self.fc2))


class WeakLayers(NamedTuple):
    """Layers that other code keeps alive."""

    fc1: Callable[[], Any]
    fc2: Callable[[], Any]
    gelu: str

    def strong(self) -> Layers:
        return Layers(self.fc1(), self.fc2(), self.gelu)


@dataclass(frozen=True, eq=False)
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
        return self._unfused(block, z) if y is None else y

    def added(self, block: Any, s: Tensor, z: Tensor) -> Tensor:
        """Return s + drop(MLP(z))."""
        y = self.fused(block, z, s)
        if y is not None:
            return y
        y = self._unfused(block, z)
        return s + (y if self.drop is None else child(block, self.drop)(y))

    def fused(self, block: Any, z: Tensor, s: Tensor | None = None) -> Tensor | None:
        """Compute MLP(z), or s + drop(MLP(z)) if ``s`` is given, with fused matrix products.

        Return None if the modules have to be called.
        """
        if not fuses(z):
            return None
        if s is not None:
            if s.dtype != z.dtype:
                return None
            if not settled(block, self._drops_nothing):
                return None
        layers = self.layers(block, z)
        return None if layers is None else layers(z, s)

    def _drops_nothing(self, block: Any) -> bool:
        return self.drop is None or drops_nothing(self.drop, child(block, self.drop), self.drop_kind)

    def _unfused(self, block: Any, z: Tensor) -> Tensor:
        """Return MLP(z) from functions if they are faster than the modules, else from the modules.

        They are faster if the checks keep their results, or if oneDNN's products are.
        """
        if keeps_results(block) or _onednn.is_for_training(z):
            layers = self._settled_layers(block)
            if layers is not None:
                return layers.by_torch(z)
        for name, *_ in self.parts:
            z = child(block, name)(z)
        return z

    def layers(self, block: Any, z: Tensor) -> Layers | None:
        """Return the MLP's layers, or None if its modules have to be called."""
        found = self._settled_layers(block)
        if found is None or in_another_dtype(z, *weight_and_bias(found.fc1), *weight_and_bias(found.fc2)):
            return None
        return found

    def _settled_layers(self, block: Any) -> Layers | None:
        found = settled(block, self._weak_layers_or_reason)
        return None if isinstance(found, str) else found.strong()

    def _weak_layers_or_reason(self, block: Any) -> WeakLayers | str:
        """Return the result of :meth:`layers_or_reason` in a form that :func:`settled` may keep."""
        found = self.layers_or_reason(block)
        return found if isinstance(found, str) else found.weak()

    def layers_or_reason(self, block: Any, training: bool | None = None) -> Layers | str:
        """Return the MLP's layers, or the reason, other than the input's dtype, why its modules have to be called.

        Unless it is None, ``training`` replaces the training mode of the dropouts.
        """
        linears: list[Any] = []
        gelu = None
        for part, of, order in self.parts:
            for name, layer in _calls(part, child(block, part), of, order):
                if isinstance(layer, str):
                    return layer
                kind = class_of(layer)
                if kind in (nn.Dropout, nn.Identity):
                    reason = why_not_left_out(name, layer, training=training)
                elif kind in _GELU and len(linears) == 1 and gelu is None:
                    reason = why_not_absorbed(name, layer, kind, "GELU")
                    gelu = _GELU[kind](layer)
                else:
                    reason = _why_not_linear(name, layer)
                    linears.append(layer)
                if reason is not None:
                    return f"{part}: {reason}"
        if len(linears) != 2 or gelu not in ("none", "tanh"):
            return "the MLP is not an nn.Linear, GELU and an nn.Linear"
        return Layers(linears[0], linears[1], gelu)
