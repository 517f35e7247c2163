"""Records the code and state, except values of float tensors, that determine a forward and hence a trial's result.

Modules with equal :func:`signature_of` share one trial. Every call of an accelerated module that passed a
trial compares the module with its :class:`Snapshot`; a module that changed since its trial runs its own code.
"""

from __future__ import annotations

import dis
import enum
import functools
import sys
import types
import uuid
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import derived_since, original_class
from swinkernels.adapters.bypass import call_is_patched, is_bound_method
from swinkernels.adapters.masks import holds
from swinkernels.nn._inner import is_set_on_instance

_ATOMS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.Size)
_FUNCTIONS = (types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodDescriptorType)
# Attributes that every nn.Module has, and attributes that may differ between calls or between equivalent modules.
_NOT_COMPARED = {*nn.Module().__dict__, "input_resolution", "attn_mask", "attn_mask_dict", "attention_bias_cache"}
_RATES = {"p", "drop_prob"}  # read by dropout and drop path at every call; a trial replaces them
_SIZES = {"H", "W", "D", "T"}  # the size of the last map, if a method other than __init__ stores it
_READ_AT_EVERY_CALL = {"scale"}
_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE, which is set for classes defined in Python


class _Values:
    """A tensor of ints or bools, compared by its values."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach().to("cpu", copy=True)

    def __call__(self, device: torch.device) -> Tensor:
        return self.tensor.to(device)

    def are_those_of(self, tensor: Tensor | None) -> bool:
        like = self.tensor
        if tensor is None or tensor.shape != like.shape or tensor.dtype != like.dtype:
            return False
        return holds(tensor, (self,))

    def __hash__(self) -> int:
        return hash((self.tensor.dtype, self.tensor.shape))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Values):
            return False
        return self.tensor.dtype == other.tensor.dtype and torch.equal(self.tensor, other.tensor)


def _has_plain_state(value: Any) -> bool:
    """Return True if ``value`` is completely described by its class and its ``__dict__``."""
    classes = type(value).__mro__[:-1]
    plain = (types.SimpleNamespace,)
    return hasattr(value, "__dict__") and all(
        cls in plain or (cls.__flags__ & _HEAP_TYPE and not vars(cls).get("__slots__")) for cls in classes
    )


def described(value: Any, seen: dict[int, int] | None = None) -> Any:
    """Return a hashable description of ``value``. Values with equal descriptions can share a trial.

    The description of a value that cannot be compared equals no other description.
    """
    kind = type(value)
    if kind in _ATOMS:
        return kind, repr(value)
    if isinstance(value, (enum.Enum, type)) or kind in _FUNCTIONS:
        return value
    seen = {} if seen is None else seen

    def each(values: Iterable[Any]) -> tuple[Any, ...]:
        return tuple(described(v, seen) for v in values)

    if isinstance(value, tuple):
        return kind, each(value)
    if id(value) in seen:
        return "seen", seen[id(value)]
    seen[id(value)] = len(seen)

    numpy = sys.modules.get("numpy")
    if isinstance(value, Tensor):
        of = kind, value.dtype, tuple(value.shape)
        if value.is_floating_point() or value.is_complex():
            return of  # the values are left out, because a trial replaces them with random ones
        return object() if value.is_meta or kind not in (Tensor, nn.Parameter) else (*of, _Values(value))
    if numpy is not None and isinstance(value, (numpy.generic, numpy.ndarray)):
        return object() if value.dtype.hasobject else (kind, value.dtype.str, value.shape, value.tobytes())
    if isinstance(value, list):
        return kind, each(value)
    if isinstance(value, dict):
        return kind, each(value.items())
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(each(value))
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != types.CellType()]
        return value.__code__, each(cells), each(value.__defaults__ or ()), each((value.__kwdefaults__ or {}).items())
    if isinstance(value, types.MethodType):
        return kind, each((value.__func__, value.__self__))
    if isinstance(value, functools.partial):
        return kind, each((value.func, *value.args)), each(value.keywords.items())
    if _has_plain_state(value):
        return kind, each(sorted(vars(value).items()))
    return object()


def _own_classes(cls: type) -> list[type]:
    """Return ``cls`` and its bases, except classes from torch, this package and the builtins."""
    return [c for c in cls.__mro__ if c.__module__.partition(".")[0] not in ("torch", "swinkernels", "builtins")]


def _attributes(module: nn.Module, sizes: Iterable[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) for each attribute to compare, except those named in ``sizes``, which hold a map's size."""
    cls: Any = original_class(module)
    skipped, recorded = {*_NOT_COMPARED, *sizes}, _recorded(cls)
    if not module._modules and not module._parameters:
        skipped |= _RATES
    for name, value in sorted(module.__dict__.items()):
        if name in skipped or name.startswith("_swinkernels_"):
            continue
        if name in _SIZES and type(value) in (int, type(None)) and name in recorded:
            continue
        if not is_bound_method(module, type(module), value):  # tools that offload weights store a bound forward
            yield name, value


def signature_of(module: nn.Module, *others: Any, sizes: Iterable[str] = ()) -> tuple[Any, ...]:
    """Describe everything on which a forward may depend, except the values of floating-point tensors.

    One trial is enough for all modules with equal signatures. ``sizes`` names the module's attributes from which a form
    reads a map's size.
    """
    found: list[Any] = [*others]
    seen: dict[int, int] = {}
    for path, m in module.named_modules():
        cls = original_class(m)
        found += [path, cls, code_version(cls)]
        for tensors in (m._parameters, m._buffers):
            found += [(name, described(t, seen)) for name, t in tensors.items() if name not in _NOT_COMPARED]
        found += [(name, described(value, seen)) for name, value in _attributes(m, () if path else sizes)]
    return tuple(found)


# Class -> the versions of its code so far. If a class is patched, its next trial or snapshot adds a version.
_CODES: dict[type, list[tuple[Any, Any, list[Any], list[Any]]]] = {}


def code_version(cls: type) -> int:
    """Return the index in ``_CODES[cls]`` of the current code of ``cls``; append the code first if it is new."""
    versions = _CODES.setdefault(cls, [])
    for number, code in enumerate(versions):
        if _is_code(cls, *code):
            return number
    classes = [vars(c) for c in _own_classes(cls)]
    versions.append((cls.forward, cls.__call__, classes, [dict(c) for c in classes]))  # type: ignore[attr-defined]
    return len(versions) - 1


def _is_code(cls: Any, forward: Any, call: Any, now: list[Any], then: list[Any]) -> bool:
    """Return True if the current code of ``cls`` is the recorded version.

    This is fast, because nearly all compared values are identical objects.
    """
    return cls.forward is forward and now == then and not call_is_patched(cls, call)


_MOST_OBJECTS = 1000


def inner_state(values: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Return the objects and containers found recursively in ``values``, each with a copy of its contents."""
    found: dict[int, tuple[Any, Any]] = {}
    waiting = list(values)
    while waiting and len(found) < _MOST_OBJECTS:
        value = waiting.pop()
        if id(value) in found or isinstance(value, (nn.Module, Tensor, type, types.FunctionType, enum.Enum)):
            continue
        if isinstance(value, dict):  # dict.items, because a subclass may create items on access (transformers' ACT2FN)
            held = dict(dict.items(value))
            found[id(value)] = value, held
            waiting += held.values()
        elif isinstance(value, (list, set)):
            found[id(value)] = value, value.copy()
            waiting += value
        elif isinstance(value, tuple):
            waiting += value
        elif not isinstance(value, _ATOMS) and _has_plain_state(value):
            state = vars(value)
            found[id(value)] = value, dict(state)
            waiting += state.values()
    return list(found.values())


# Identifies this process, because the indices of code versions are valid only in the process that assigned them.
_PROCESS = uuid.uuid4().hex


class Snapshot:
    """The state of a module after its trial: its class, code and attributes, without inner modules and parameters."""

    ignored: frozenset[str] = frozenset(_NOT_COMPARED)  # attributes that may be added later

    def __init__(self, module: nn.Module, absorbs: bool = True, sizes: Iterable[str] = ()) -> None:
        """Record the state of ``module``.

        Args:
            module: the module to record.
            absorbs: True if an op replaces the torch.nn modules that are direct children of ``module``.
            sizes: the names of attributes from which a form reads the map's size at every call.
        """
        named = {name: value for name, value in _attributes(module, sizes) if name not in _READ_AT_EVERY_CALL}
        cls: Any = original_class(module)
        self.cls = cls
        self.ignored = frozenset({*_NOT_COMPARED, *sizes, *_recorded(cls)})
        self.version = code_version(self.cls)
        self.names = tuple(named)
        self.values = tuple(named.values())
        self.get = itemgetter(*self.names, "training", "training")  # twice, so that get always returns a tuple
        self.inner = inner_state(self.values)
        self.missing = _missing_parameters(module)
        self.tensors = frozenset(_tensors(module))
        self.known = frozenset(n for n, v in module.__dict__.items() if not is_bound_method(module, type(module), v))
        # Attributes that contain bound methods of the instance. Tools that offload weights store such methods.
        self.bound = tuple(n for n in module.__dict__ if n not in self.known)
        self.size = len(module.__dict__)
        self.leaves = tuple(
            (name, type(m), code_version(type(m)), m.__dict__.get("dim"))
            for name, m in module._modules.items()
            if absorbs and m is not None and type(m).__module__.startswith("torch.nn.modules")
        )
        # Name of each int or bool buffer -> its values. A trial does not replace these buffers.
        self.kept = {n: _Values(b) for n, b in module._buffers.items() if b is not None and _has_values(n, b)}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "process": _PROCESS}

    def __setstate__(self, state: dict[str, Any]) -> None:
        elsewhere = state.pop("process", None) != _PROCESS
        self.__dict__.update(state)
        if elsewhere:
            self.version = code_version(self.cls)
            self.leaves = tuple((name, kind, code_version(kind), dim) for name, kind, _, dim in self.leaves)

    def differs(self, module: nn.Module) -> str | None:
        """Describe the first change found in ``module`` since the snapshot, or return None. This takes about 1 us."""
        own = module.__dict__
        cls: Any = type(module)
        if cls is not self.cls and (
            getattr(cls, "_swinkernels_original", None) is not self.cls or derived_since(module)
        ):
            return f"it is a {cls.__name__} now, not a {self.cls.__name__}"
        if torch.compiler.is_dynamo_compiling():
            return self._differs_when_compiled(module)
        if not _is_code(self.cls, *_CODES[self.cls][self.version]):
            return f"a method of {self.cls.__name__} was replaced on the class"
        try:
            if self.get(own)[:-2] != self.values:
                return self._changed(own)
            for value, then in self.inner:
                if (value if isinstance(value, (list, dict, set)) else value.__dict__) != then:
                    return f"the contents of an attribute ({type(value).__name__}) were changed"
        except KeyError as missing:
            return f"{missing.args[0]} was removed"
        except Exception:  # == raised an error, which counts as a change
            return self._changed(own)
        if _missing_parameters(module) != self.missing:
            return "a parameter was set to None, or a parameter that was None was set"
        added = [n for n in _tensors(module) if n not in self.tensors and n not in self.ignored]
        if added:
            return f"{added[0]} was added to the instance"
        for name, kind, version, dim in self.leaves:
            leaf: Any = module._modules.get(name)
            if type(leaf) is not kind or is_set_on_instance(leaf, "forward") or leaf.__dict__.get("dim") != dim:
                return f"{name} was replaced or changed"
            forward, call, *_ = _CODES[kind][version]
            if kind.forward is not forward or call_is_patched(kind, call):
                return f"{kind.__name__}.forward or its __call__ was replaced on the class"
        for name in self.bound:
            if name in own and not is_bound_method(module, cls, own[name]):
                return f"{name} was replaced on the instance"
        if len(own) != self.size:
            read = _names_read(self.cls, self.version)
            added = [n for n in own if n in read and n not in self.known and n not in self.ignored]
            if added:
                return f"{added[0]} was added to the instance"
            self.size = len(own)
        return self.differs_in_buffers(module)

    def _changed(self, own: dict[str, Any]) -> str:
        name = next((n for n, v in zip(self.names, self.values, strict=True) if own.get(n) is not v), "an attribute")
        return f"{name} was changed"

    def _differs_when_compiled(self, module: nn.Module) -> str | None:
        """Do the work of :meth:`differs` in compiled code. Compare fewer values, because dynamo guards on each one."""
        for name, value in zip(self.names, self.values, strict=True):
            if isinstance(value, (bool, int, float, str)) and getattr(module, name) != value:
                return f"{name} was changed"
        if is_set_on_instance(module, "forward") and "forward" not in self.known and "forward" not in self.bound:
            return "forward was added to the instance"
        for name, kind, _, dim in self.leaves:
            leaf: Any = module._modules.get(name)
            if type(leaf) is not kind or is_set_on_instance(leaf, "forward") or leaf.__dict__.get("dim") != dim:
                return f"{name} was replaced or changed"
        return self.differs_in_buffers(module)

    def differs_in_buffers(self, module: nn.Module) -> str | None:
        for name, values in self.kept.items():
            if not values.are_those_of(module._buffers.get(name)):
                return f"the values of {name} were changed"
        return None


def _missing_parameters(module: nn.Module) -> list[str]:
    return [name for name, p in module._parameters.items() if p is None]


def _tensors(module: nn.Module) -> list[str]:
    """Return the names of the module's own parameters and buffers that are not None."""
    return [n for tensors in (module._parameters, module._buffers) for n, t in tensors.items() if t is not None]


def _has_values(name: str, buffer: Tensor) -> bool:
    if buffer.is_meta or name in _NOT_COMPARED:
        return False
    return not (buffer.is_floating_point() or buffer.is_complex())


@functools.cache
def _names_read(cls: type, version: int) -> frozenset[str]:
    """Return all names used in the code of the methods of ``cls``, and the names of its attributes."""
    names: set[str] = set()
    codes = [f.__code__ for c in _own_classes(cls) for f in vars(c).values() if isinstance(f, types.FunctionType)]
    while codes:
        code = codes.pop()
        names.update(code.co_names, (v for v in code.co_consts if isinstance(v, str)))
        codes += [v for v in code.co_consts if isinstance(v, types.CodeType)]
    for c in cls.__mro__:
        names.update(vars(c))
    return frozenset(names)


@functools.cache
def _recorded(cls: Any) -> frozenset[str]:
    """Return the names in ``_SIZES`` to which methods of ``cls`` other than ``__init__`` assign."""
    found = [i for f in _functions(cls) if f.__name__ != "__init__" for i in dis.get_instructions(f)]
    return frozenset(i.argval for i in found if i.opname == "STORE_ATTR" and i.argval in _SIZES)


# State that a forward leaves behind


def _functions(cls: type) -> Iterator[types.FunctionType]:
    for c in _own_classes(cls):
        for value in vars(c).values():
            for function in (value, getattr(value, "__func__", None), getattr(value, "fget", None)):
                if isinstance(function, types.FunctionType):
                    yield function


def largest_number(module: nn.Module, most: int, channels: int) -> int:
    """Return the largest integer, at most ``most``, that the forward may compare a token count with, or 0.

    Search the code of the module's classes, the globals that this code names, and the attributes of the modules. An
    attribute equal to 1, 2, 3 or 4 times ``channels`` is assumed to be a width and is ignored.
    """
    found = [0]
    widths = {times * channels for times in range(1, 5)}
    for m in module.modules():
        codes = []
        if _own_classes(original_class(m)):
            values = [value for _, value in _attributes(m)]
            for _, held in inner_state(values):
                values += held.values() if isinstance(held, dict) else held
            found += [v for v in values if type(v) is int and v not in widths]
        for function in _functions(original_class(m)):
            codes.append(function.__code__)
            found += [v for name in function.__code__.co_names if type(v := function.__globals__.get(name)) is int]
        while codes:
            code = codes.pop()
            for value in code.co_consts:  # a constant may be a container, as in `x in (1, 2)`
                found += [v for v in (value if isinstance(value, (tuple, frozenset)) else (value,)) if type(v) is int]
            codes += [v for v in code.co_consts if isinstance(v, types.CodeType)]
    return max(n for n in found if n <= most)


def outside(module: nn.Module) -> list[tuple[Any, Any]]:
    """Return the objects and containers outside the module that its methods can access, each with its contents.

    Methods access them through closures, globals and class attributes.
    """
    reached: list[Any] = []
    for cls in {original_class(m) for m in module.modules()}:
        for c in _own_classes(cls):
            reached += [v for n, v in vars(c).items() if isinstance(v, (list, dict, set)) and not n.startswith("__")]
        for function in _functions(cls):
            reached += [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
            named = (function.__globals__.get(name) for name in function.__code__.co_names)
            reached += [value for value in named if isinstance(value, (list, dict, set))]
    return inner_state(reached)


def put_back(states: list[tuple[Any, Any]]) -> None:
    """Restore the contents of the objects and containers in ``states``."""
    for value, held in states:
        if isinstance(value, list):
            value[:] = held
        else:
            contents = value if isinstance(value, (dict, set)) else vars(value)
            if not (isinstance(contents, dict) and _is_same(contents, held)):
                contents.clear()
                contents.update(held)


def _is_same(contents: dict[Any, Any], held: dict[Any, Any]) -> bool:
    """Return True if two dicts contain the same objects in the same order."""
    items = list(dict.items(contents))
    return len(items) == len(held) and all(
        a is b and v is w for (a, v), (b, w) in zip(items, held.items(), strict=True)
    )


def contents(value: Any, path: str, found: dict[str, Any]) -> None:
    """Add the tensors and comparable values inside ``value`` to ``found``, with their paths as keys."""
    if isinstance(value, Tensor):
        found[path] = value.detach().clone()
    elif isinstance(value, (list, tuple, dict)):
        found[f"the length of {path}"] = len(value)
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            contents(inner, f"{path}[{key!r:.40}]", found)
    else:
        now = described(value)
        found[path] = now if now == described(value) else type(value)


def left_behind(module: nn.Module, reached: list[tuple[Any, Any]]) -> dict[str, Any]:
    """Return the state, after a call, of ``module`` and of the ``reached`` objects outside the module."""
    found: dict[str, Any] = {}
    for path, m in module.named_modules():
        prefix = f"{path}." if path else ""
        for name, value in (*m._buffers.items(), *_attributes(m)):
            contents(value, prefix + name, found)
            for i, (inner, held) in enumerate(inner_state([value])):
                if not isinstance(inner, (list, dict, set)):
                    contents(dict(held), f"{prefix}{name} ({i})", found)
        hooks = (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks)
        found[f"the hooks of {path or 'the module'}"] = tuple(map(len, hooks))
    for i, (value, _) in enumerate(reached):
        state = dict(vars(value)) if not isinstance(value, (list, dict, set)) else value
        if isinstance(state, dict):
            state = {n: v for n, v in state.items() if not isinstance(v, nn.Module)}
        contents(state, f"a {type(value).__name__} outside of it ({i})", found)
    return found
