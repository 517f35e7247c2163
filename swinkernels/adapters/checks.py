"""Keeps the results of checks of an accelerated module until something changes that the checks read.

Before each call, checks compare the hooks, classes, methods, attributes and tensors inside a module with the published
code that an op replaces. That takes several times as long as comparing all of them with a copy, which is done here.
Neither the copy nor the results keep a tensor or a module alive.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.nn._inner import GLOBAL_HOOKS
from swinkernels.ops._library import PLAIN_TYPES, is_plain, metadata

_modules_of = itemgetter("_modules")
_tensors_of = itemgetter("_parameters", "_buffers")
_dicts_of = itemgetter("_modules", "_parameters", "_buffers")
_hooks_of = itemgetter("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_version_of = attrgetter("_version", "requires_grad")
# Attributes of every module. Of these, checks read the mode, and hooks, parameters, buffers and inner modules, which
# are compared separately.
_OF_ALL_MODULES = frozenset(nn.Module().__dict__) - {"training"}
_CALL_IMPL = nn.Module._call_impl
_MOST_RESULTS = 256
_UNKNOWN: Any = object()

Result = TypeVar("Result")
Tensors = tuple[Tensor | None, ...]

# The compiled function that does the work of _State._tensors_if_current in a fraction of the time, or None. The layout
# of the facts has a number, because the extension may have been compiled from older sources.
_compiled: Callable[[nn.Module, tuple[Any, ...]], Tensors | None] | None = None
try:
    from swinkernels import _state
except ImportError:  # not compiled, or for another Python
    pass
else:
    _compiled = _state.tensors_if_current if _state.LAYOUT == 2 else None


def _flat(groups: Iterable[Iterable[Any]]) -> tuple[Any, ...]:
    return tuple(chain.from_iterable(groups))


def _none() -> None:
    return None


def _containers(values: Iterable[Any]) -> list[Any]:
    """Return the lists, dicts and sets, which other code can change in place, among and inside ``values``."""
    found: dict[int, Any] = {}
    waiting = list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, (list, dict, set)) and id(value) not in found:
            found[id(value)] = value
        elif not isinstance(value, tuple):
            continue
        waiting += value.values() if isinstance(value, dict) else value
    return list(found.values())


def _names_in(states: Iterable[dict[str, Any]]) -> tuple[tuple[str, ...], ...] | None:
    """Return the names in the dicts of inner modules, parameters and buffers; None if one is not exactly a dict."""
    dicts = _flat(map(_dicts_of, states))
    return tuple(map(tuple, dicts)) if {dict}.issuperset(map(type, dicts)) else None


class _State:
    """A copy of the state of a module and of all modules inside it, and the results of checks in this state."""

    def __init__(self, module: nn.Module, keeper: str) -> None:
        """Copy the state, except the attribute named ``keeper``, which would make a reference cycle."""
        self.results: dict[Any, Any] = {}
        inner = [m for m in module.modules() if m is not module]
        self._inner = tuple(map(weakref.ref, inner))
        modules = [module, *inner]
        states = [m.__dict__ for m in modules]
        self._kinds = tuple(map(type, modules))
        self._sizes = tuple(map(len, states))
        left = {*_OF_ALL_MODULES, keeper}
        names = [[n for n, v in s.items() if n not in left and not isinstance(v, (Tensor, nn.Module))] for s in states]
        self._attributes = tuple(("training", *some) for some in names)  # two or more, so itemgetter returns a tuple
        self._read = [itemgetter(*some) for some in self._attributes]
        self._values = _flat([read(state) for read, state in zip(self._read, states, strict=True)])
        self._containers = _containers(self._values)
        self._contents = [value.copy() for value in self._containers]
        # The names of inner modules, in the order of their calls in a Sequential, and of parameters and buffers. A dict
        # of another type may be reordered.
        self._names = _names_in(states)
        if self._names is None:
            raise TypeError("a module has its inner modules or tensors in something other than a dict")
        known = [*modules, None]
        children = _flat(map(dict.values, map(_modules_of, states)))
        self._positions = tuple(next(i for i, m in enumerate(known) if m is child) for child in children)
        # Modules and tensors in other attributes. FSDP sets views of its flat parameters as attributes.
        others = [(i, n, v) for i, s in enumerate(states) for n, v in s.items()]
        self._modules = tuple((i, n, weakref.ref(v)) for i, n, v in others if isinstance(v, nn.Module))
        self._others = tuple((i, n) for i, n, v in others if isinstance(v, Tensor))
        tensors = self._tensors(states)
        self._types = tuple(map(type, tensors))
        if not PLAIN_TYPES.issuperset(self._types):
            raise TypeError("a parameter or buffer is of a subclass of Tensor")
        self._metadata = tuple(map(metadata, [t for t in tensors if t is not None]))
        # Values of parameters do not matter, so a parameter may be replaced by another one of the same kind.
        self._buffers = tuple((weakref.ref(t), _version_of(t)) for t in tensors if type(t) is Tensor)
        self._own_hooks = [dict(hooks) for hooks in _hooks_of(module.__dict__)]  # they run in any case
        classes = dict.fromkeys(cls for kind in self._kinds for cls in kind.__mro__)
        self._classes = [vars(cls) for cls in classes if cls not in (nn.Module, object)]
        self._code = [dict(code) for code in self._classes]
        self._functions = nn.Module.__call__, F.gelu
        self._facts = (
            self._inner, self._kinds, self._sizes, self._attributes, self._values, self._names, self._positions,
            self._modules, self._others, self._types, self._metadata, self._buffers, Tensor,
        )  # fmt: skip

    def _tensors(self, states: list[dict[str, Any]]) -> Tensors:
        tensors = _flat(map(dict.values, [of for of in _flat(map(_tensors_of, states)) if of]))
        return (*tensors, *(states[i][name] for i, name in self._others)) if self._others else tensors

    def tensors(self, module: nn.Module) -> Tensors | None:
        """Return the parameters and buffers if nothing has changed since the copy was made, else None."""
        tensors = _compiled(module, self._facts) if _compiled else self._tensors_if_current(module)
        is_current = (
            tensors is not None
            and self._containers == self._contents
            and list(_hooks_of(module.__dict__)) == self._own_hooks
            and self._classes == self._code
            and self._functions == (nn.Module.__call__, F.gelu)
        )
        return tensors if is_current else None

    def _tensors_if_current(self, module: nn.Module) -> Tensors | None:
        """Compare the modules, their attributes and their tensors, as :mod:`swinkernels._state` does."""
        modules = [module, *[reference() for reference in self._inner]]
        if tuple(map(type, modules)) != self._kinds:
            return None
        states = [m.__dict__ for m in modules]
        if tuple(map(len, states)) != self._sizes or any(_flat(map(_hooks_of, states[1:]))):
            return None
        values = _flat([read(state) for read, state in zip(self._read, states, strict=True)])
        if not all(map(is_, values, self._values)):
            return None
        if _names_in(states) != self._names:
            return None
        modules.append(None)
        children = _flat(map(dict.values, map(_modules_of, states)))
        if not all(map(is_, children, [modules[i] for i in self._positions])):
            return None
        if any(states[i][name] is not reference() for i, name, reference in self._modules):
            return None
        tensors = self._tensors(states)
        are_same = (
            tuple(map(type, tensors)) == self._types
            and tuple(map(metadata, [t for t in tensors if t is not None])) == self._metadata
            and all(of() is t and _version_of(t) == v for (of, v), t in self._pairs(tensors))
        )
        return tensors if are_same else None

    def _pairs(self, tensors: Tensors) -> Iterable[Any]:
        return zip(self._buffers, [t for t in tensors if type(t) is Tensor], strict=True)


def _compared(state: _State, module: nn.Module) -> Tensors | None:
    """Return the result of state.tensors(module), or None if the comparison raised an error."""
    try:
        return state.tensors(module)
    except Exception:
        return None


class Checks:
    """Keeps the results of checks of one module; the module stores it in the attribute ``_swinkernels_checks``."""

    ATTRIBUTE = "_swinkernels_checks"

    def __init__(self) -> None:
        self._owner: Callable[[], Any] = _none
        self._state: _State | None = None
        self._results: dict[Any, Any] | None = None  # None if results must not be kept in this call
        self._begins = False  # True if the state has not been compared since the call began
        self._changes = 0  # calls in a row before which the module changed

    def begin(self, module: nn.Module) -> None:
        """Begin a call of ``module``."""
        if self._owner() is None:
            self._owner = weakref.ref(module)
        self._begins = True

    def results(self, module: nn.Module) -> dict[Any, Any] | None:
        """Return the results kept for this call of ``module``, or None if they must not be kept."""
        if self._owner() is not module:
            return None  # copy.copy and DataParallel's replicas share the attributes of the copied module
        if self._begins:
            self._compare(module)
        return self._results

    def results_and_tensors(self, module: nn.Module) -> tuple[dict[Any, Any], Tensors] | None:
        """Return the results kept for this call of ``module`` with its parameters and buffers.

        Return None if results must not be kept, or if another caller has asked for them before in this call: the
        tensors, which must not be kept alive, are only known while the state is compared.
        """
        return self._compare(module) if self._begins and self._owner() is module else None

    def _compare(self, module: nn.Module) -> tuple[dict[Any, Any], Tensors] | None:
        self._begins, self._results = False, None
        if any(GLOBAL_HOOKS) or nn.Module._call_impl is not _CALL_IMPL or not is_plain(()):
            return None
        state = self._state
        tensors = None if state is None else _compared(state, module)
        if state is None or tensors is None:
            self._state = None
            self._changes += 1
            if self._changes > 4 and self._changes % 64:
                return None  # the module changes before every call, so copying its state would only take time
            try:
                state = _State(module, self.ATTRIBUTE)
            except Exception:  # for example, inference tensors have no version
                return None
            tensors = _compared(state, module)
            if tensors is None:
                return None
            self._state = state
        else:
            self._changes = 0
        self._results = state.results
        return state.results, tensors

    def __deepcopy__(self, memo: Any) -> Checks:
        return Checks()

    def __reduce__(self) -> Any:
        return Checks, ()


def begin(module: nn.Module) -> None:
    """Begin a call of an accelerated module, which may then call :func:`settled`."""
    checks = module.__dict__.get(Checks.ATTRIBUTE)
    if checks is None:  # the module was pickled by a version without this attribute
        checks = module.__dict__[Checks.ATTRIBUTE] = Checks()
    checks.begin(module)


def _results(module: Any) -> dict[Any, Any] | None:
    checks = None if torch.compiler.is_compiling() else module.__dict__.get(Checks.ATTRIBUTE)
    return None if checks is None else checks.results(module)


def keeps_results(module: Any) -> bool:
    """Return True if :func:`settled` keeps the results of checks in this call of ``module``."""
    return _results(module) is not None


def results_and_tensors(module: Any) -> tuple[dict[Any, Any], Tensors] | None:
    """Return the results kept for this call of ``module``, and the parameters and buffers of it and those inside it.

    Return None if results must not be kept, or if another function of this file has been called before in this call.
    """
    checks = None if torch.compiler.is_compiling() else module.__dict__.get(Checks.ATTRIBUTE)
    return None if checks is None else checks.results_and_tensors(module)


def kept(module: Any, key: Callable[[], Any], make: Callable[[], Result]) -> Result | None:
    """Return make(), or the result of an earlier call with the same key() if nothing has changed since then.

    If results must not be kept, or if key() is None, return None without a call of make. The rules of :func:`settled`
    apply, but the result may also depend on the key, and any result is kept.
    """
    results = _results(module)
    if results is None:
        return None
    under = key()
    if under is None:
        return None
    result = results.get(under, _UNKNOWN)  # once, because another thread may clear the results
    if result is _UNKNOWN:
        result = make()
        keep(results, under, result)
    return result


def keep(results: dict[Any, Any], key: Any, result: Any) -> None:
    """Add a result to those of :func:`results_and_tensors`, under the rules of :func:`kept`."""
    if len(results) >= _MOST_RESULTS:
        results.clear()
    results[key] = result


def settled(module: Any, check: Callable[..., Result], *arguments: Any) -> Result:
    """Return check(module, *arguments), or the result of an earlier call if nothing has changed since then.

    Only the forward pass of ``module`` may call this function, after ``_swinkernels_own_code``. The check may read the
    arguments and the state of the module and of modules inside it, except the values of parameters and the contents of
    other objects. Neither the arguments nor the result may refer to a tensor or a module, which they would keep alive.
    A reason (a str) and False are never kept, because a check may also fail for a passing reason, such as the capture
    of a CUDA graph.
    """
    results = _results(module)
    if results is None:
        return check(module, *arguments)
    key = (check, *arguments)
    result = results.get(key, _UNKNOWN)
    if result is not _UNKNOWN:
        return result
    result = check(module, *arguments)
    if not isinstance(result, str) and result is not False:
        keep(results, key, result)
    return result
