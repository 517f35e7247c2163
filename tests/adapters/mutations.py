"""Tests random edits of accelerated models: ``python -m tests.adapters.mutations --count 10000``.

A seed and a number determine a mutation: a model, one or two edits that a user could make before or after
``accelerate``, the next step (a copy, a pickle, a second ``accelerate``, ``restore``), and the backend, dtype and mode.
The same edits are applied to the library's own model. Both models must return the same outputs and gradients and leave
the same attributes, buffers, log and random state, or both must raise an exception. If they differ, the command that
repeats only this mutation is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import enum
import functools
import io
import math
import random
import sys
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import swinkernels
from swinkernels.adapters.adapter import Accelerated
from tests.support.fused_products import always_fused
from tests.support.small_models import FAMILIES, make_input, make_model

FACTOR = 1.25  # the factor by which an edit multiplies a result
# The largest difference allowed, relative to the largest element. A float64 model may have float32 constants, and
# Segment Anything in transformers computes its softmax in float32. In a float32 model every operation rounds.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 2e-3}


def scaled(x: Any) -> Any:
    """Multiply every floating-point tensor by FACTOR, including those in tuples, lists and dicts."""
    if isinstance(x, Tensor):
        return x * FACTOR if x.is_floating_point() else x
    if isinstance(x, (tuple, list)) and type(x) in (tuple, list):
        return type(x)(scaled(v) for v in x)
    if isinstance(x, dict):
        return {key: scaled(v) for key, v in x.items()}
    return x


@dataclass
class Site:
    """The module that an edit changes, with the random number generator and the log that the edit uses."""

    model: nn.Module
    path: str
    rng: random.Random
    undo: contextlib.ExitStack  # undoes changes outside the model
    log: list[Tensor]

    @property
    def module(self) -> Any:
        return self.model.get_submodule(self.path)

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.rng.randrange(2**31))

    def like(self, t: Tensor) -> Tensor:
        """Return a tensor like t with other values: random numbers or, for integers and bools, a permutation."""
        if t.is_floating_point():
            return torch.randn(t.shape, generator=self.generator(), dtype=torch.float64).to(t.dtype)
        order = torch.randperm(t.numel(), generator=self.generator())
        return t.flatten()[order].reshape(t.shape)

    def keep(self, x: Any) -> Any:
        """Append a value computed from a result to the log, like user code that collects losses."""
        if isinstance(x, Tensor) and x.is_floating_point():
            self.log.append(x.square().mean())
        return x

    def replace(self, module: nn.Module) -> None:
        parent, _, name = self.path.rpartition(".")
        setattr(self.model.get_submodule(parent), name, module)


# An edit has two functions: the first lists the details that are possible for a module, the second applies the edit.
Details = Callable[[nn.Module], list[Any]]
Change = Callable[[Site, Any], None]
EDITS: dict[str, tuple[Details, Change]] = {}


def edit(details: Details) -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        EDITS[change.__name__.replace("_", " ")] = details, change
        return change

    return add


def _always(module: nn.Module) -> list[Any]:
    return [None]


def _tensors(kind: Callable[[nn.Module], dict[str, Tensor | None]]) -> Details:
    return lambda module: [name for name, t in kind(module).items() if t is not None]


def _parameters(module: nn.Module) -> dict[str, Tensor | None]:
    return module._parameters


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return module._buffers


def _methods(module: nn.Module) -> list[Any]:
    """Return the names of the methods that the class of ``module`` adds to those of nn.Module."""
    names = []
    for cls in type(module).__mro__:
        if cls is nn.Module or cls.__module__.startswith("torch.nn"):
            break
        names += [n for n, f in vars(cls).items() if isinstance(f, types.FunctionType) and not hasattr(nn.Module, n)]
    return sorted({n for n in names if not n.startswith("__")})


def _children(module: nn.Module) -> list[Any]:
    return [name for name, child in module.named_children() if not isinstance(child, (nn.ModuleList, nn.Sequential))]


# Classes, instances and their methods


def _subclass(module: nn.Module, forward: Callable[..., Any]) -> None:
    cls = type(module)
    module.__class__ = type(f"My{cls.__name__}", (cls,), {"forward": forward})


@edit(_always)
def subclass(site: Site, _: Any) -> None:
    cls = type(site.module)
    _subclass(site.module, lambda self, *args, **options: scaled(cls.forward(self, *args, **options)))


@edit(_always)
def subclass_that_keeps_its_output(site: Site, _: Any) -> None:
    cls = type(site.module)
    _subclass(site.module, lambda self, *args, **options: site.keep(cls.forward(self, *args, **options)))


@edit(_always)
def forward_of_the_instance(site: Site, _: Any) -> None:
    forward = site.module.forward
    site.module.forward = lambda *args, **options: scaled(forward(*args, **options))


@edit(_always)
def forward_of_the_class(site: Site, _: Any) -> None:
    _patch_class(site, "forward")


@edit(_methods)
def method_of_the_instance(site: Site, name: str) -> None:
    method = getattr(site.module, name)
    setattr(site.module, name, lambda *args, **options: scaled(method(*args, **options)))


@edit(_methods)
def method_of_the_class(site: Site, name: str) -> None:
    _patch_class(site, name)


def _patch_class(site: Site, name: str) -> None:
    """Patch a method in the library's class that defines it, from which the accelerated class inherits."""
    cls = next(c for c in type(site.module).__mro__ if name in vars(c) and not issubclass(c, Accelerated))
    method = vars(cls)[name]

    @functools.wraps(method)
    def changed(*args: Any, **options: Any) -> Any:
        return scaled(method(*args, **options))

    setattr(cls, name, changed)
    site.undo.callback(setattr, cls, name, method)


@edit(_always)
def forward_bound_for_offload(site: Site, _: Any) -> None:
    """Bind forward to the instance, as do offloading tools that move weights to a GPU only during a call."""
    module = site.module
    module._old_forward = module.forward

    def moved(module: Any, *args: Any, **options: Any) -> Any:
        return module._old_forward(*args, **options)

    module.forward = functools.update_wrapper(functools.partial(moved, module), module._old_forward)


# Attributes


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclass
class Settings:
    factor: float


def _changed(value: Any, rng: random.Random) -> Any:
    if isinstance(value, (bool, np.bool_)):
        return not value
    if isinstance(value, (int, np.integer)):
        return value + rng.choice((-1, 1, 2))
    if isinstance(value, (float, np.floating)):
        return value * FACTOR + 0.125
    if isinstance(value, str):
        return f"{value}x"
    if isinstance(value, (tuple, list)) and value:
        at = rng.randrange(len(value))
        return type(value)(_changed(v, rng) if i == at else v for i, v in enumerate(value))
    if isinstance(value, dict) and value:
        at = rng.choice(sorted(value, key=str))
        return {key: _changed(v, rng) if key == at else v for key, v in value.items()}
    if isinstance(value, types.SimpleNamespace) or dataclasses.is_dataclass(value):
        twin = copy.copy(value)
        name = rng.choice(sorted(vars(twin)))
        with contextlib.suppress(dataclasses.FrozenInstanceError):
            setattr(twin, name, _changed(getattr(twin, name), rng))
        return twin
    if isinstance(value, torch.dtype):
        return torch.float32
    return value


# Edits do not change these attributes: accelerated models draw dropout's random numbers in another order, so dropout is
# compared only in evaluation mode.
_ATTRIBUTES_LEFT = ("training", "p", "dropout", "attention_dropout")


def _attributes(module: nn.Module) -> list[Any]:
    kinds = (bool, int, float, str, tuple, list, dict, types.SimpleNamespace, torch.dtype)
    return sorted(
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in _ATTRIBUTES_LEFT
        and (isinstance(value, kinds) or dataclasses.is_dataclass(value))
    )


@edit(_attributes)
def attribute(site: Site, name: str) -> None:
    setattr(site.module, name, _changed(getattr(site.module, name), site.rng))


@edit(_attributes)
def attribute_as_numpy_scalar(site: Site, name: str) -> None:
    value = getattr(site.module, name)
    if type(value) in (int, float):
        setattr(site.module, name, np.asarray(value)[()])


def _factor(kind: int, value: float) -> Any:
    """Return a setting that encodes ``value``, of the type with index ``kind``; :func:`_read` decodes it."""
    return (
        types.SimpleNamespace(factor=value), {"factor": value}, Settings(value), Mode.A if value == 1.0 else Mode.B,
        np.float64(value), torch.tensor(int(4 * value)), torch.tensor([value > 1.0]),
    )[kind]  # fmt: skip


def _read(setting: Any) -> float:
    if isinstance(setting, dict):
        return setting["factor"]
    if isinstance(setting, Mode):
        return 1.0 if setting is Mode.A else FACTOR
    if isinstance(setting, Tensor):
        return FACTOR if bool((setting == (5 if setting.dim() == 0 else 1)).all()) else 1.0
    return float(getattr(setting, "factor", setting))


@edit(lambda module: list(range(7)))
def settings_of_unlike_instances(site: Site, setting: int) -> None:
    """Give all instances of the module's class a setting that forward reads, with another value for ``site.module``."""
    first = original(type(site.module))
    changed: dict[type, type] = {}
    for name, module in site.model.named_modules():
        kind = type(module)
        if original(kind) is first:
            changed[kind] = changed.get(kind) or _with_setting(kind)
            module.__class__ = changed[kind]
            module.setting = _factor(setting, FACTOR if name == site.path else 1.0)


def _with_setting(base: Any) -> type:
    def forward(self: Any, *args: Any, **options: Any) -> Any:
        return _times(_read(self.setting), base.forward(self, *args, **options))

    return type(f"My{original(base).__name__}", (base,), {"forward": forward})


def _times(factor: float, x: Any) -> Any:
    return scaled(x) if factor != 1.0 else x


def original(cls: type) -> type:
    return next(c for c in cls.__mro__ if not issubclass(c, Accelerated))


# Submodules


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **options: Any) -> Any:
        return scaled(self.module(*args, **options))


@edit(_children)
def wrapped_submodule(site: Site, name: str) -> None:
    setattr(site.module, name, Wrapped(getattr(site.module, name)))


@edit(_children)
def submodule_of_another_kind(site: Site, name: str) -> None:
    child = getattr(site.module, name)
    kinds = [nn.Identity(), nn.Tanh()]
    if isinstance(child, nn.LayerNorm):
        kinds.append(nn.RMSNorm(child.normalized_shape, dtype=torch.float64))
    setattr(site.module, name, site.rng.choice(kinds))


@edit(_children)
def submodule_with_other_weights(site: Site, name: str) -> None:
    twin = copy.deepcopy(getattr(site.module, name))
    swinkernels.restore(twin)
    for p in twin.parameters():
        p.data.copy_(site.like(p))
    setattr(site.module, name, twin)


@edit(_always)
def shared_submodule(site: Site, _: Any) -> None:
    """Replace another module of the same class and parameter shapes by ``site.module``, which then occurs twice."""
    module = site.module
    shapes = [p.shape for p in module.parameters()]
    for path, other in list(site.model.named_modules()):
        same = original(type(other)) is original(type(module)) and [p.shape for p in other.parameters()] == shapes
        if same and other is not module and path and not path.startswith(site.path):
            dataclasses.replace(site, path=path).replace(module)
            return


# Hooks


@edit(_always)
def forward_hook(site: Site, _: Any) -> None:
    site.module.register_forward_hook(lambda module, args, out: scaled(out))


@edit(_always)
def forward_hook_that_looks(site: Site, _: Any) -> None:
    site.module.register_forward_hook(lambda module, args, out: (site.keep(out), None)[1])


@edit(_always)
def forward_pre_hook(site: Site, _: Any) -> None:
    site.module.register_forward_pre_hook(lambda module, args: scaled(args))


@edit(_always)
def backward_hook(site: Site, _: Any) -> None:
    site.module.register_full_backward_hook(lambda module, grads_in, grads_out: scaled(grads_in))


@edit(_always)
def backward_pre_hook(site: Site, _: Any) -> None:
    site.module.register_full_backward_pre_hook(lambda module, grads_out: scaled(grads_out))


@edit(_tensors(_parameters))
def hook_of_a_parameter(site: Site, name: str) -> None:
    p = getattr(site.module, name)
    if p.requires_grad:
        p.register_hook(lambda grad: grad * FACTOR)


_GLOBAL_HOOKS: dict[str, Callable[[Callable[[Any], Any]], Any]] = {
    "register_module_forward_hook": lambda of: lambda m, args, out: scaled(out) if of(m) else None,
    "register_module_forward_pre_hook": lambda of: lambda m, args: scaled(args) if of(m) else None,
    "register_module_full_backward_hook": lambda of: lambda m, gi, go: scaled(gi) if of(m) else None,
    "register_module_full_backward_pre_hook": lambda of: lambda m, go: scaled(go) if of(m) else None,
}


@edit(lambda module: list(_GLOBAL_HOOKS))
def global_hook(site: Site, name: str) -> None:
    cls = original(type(site.module))
    handle = getattr(nn.modules.module, name)(_GLOBAL_HOOKS[name](lambda m: isinstance(m, cls)))
    site.undo.callback(handle.remove)


# Parameters and buffers


@edit(_tensors(_parameters))
def assigned_parameter(site: Site, name: str) -> None:
    p = getattr(site.module, name)
    setattr(site.module, name, nn.Parameter(site.like(p)))


@edit(_always)
def loaded_state(site: Site, _: Any) -> None:
    state = {key: site.like(value) for key, value in site.module.state_dict().items()}
    site.module.load_state_dict(state, assign=site.rng.random() < 0.5)


@edit(_tensors(_parameters))
def tied_parameter(site: Site, name: str) -> None:
    p = getattr(site.module, name)
    for path, module in site.model.named_modules():
        other = module._parameters.get(name)
        if other is not None and other is not p and other.shape == p.shape and path != site.path:
            setattr(module, name, p)
            return


@edit(_tensors(_parameters))
def frozen_parameter(site: Site, name: str) -> None:
    getattr(site.module, name).requires_grad_(False)


@edit(_tensors(_parameters))
def missing_parameter(site: Site, name: str) -> None:
    setattr(site.module, name, None)


@edit(_tensors(_parameters))
def replica_of_a_parameter(site: Site, name: str) -> None:
    """Replace a parameter by a plain tensor, as DataParallel does in its replicas."""
    p = site.module._parameters.pop(name)
    setattr(site.module, name, p * 1.0)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * FACTOR


@edit(_tensors(_parameters))
def parametrized(site: Site, name: str) -> None:
    parametrize.register_parametrization(site.module, name, Scale())


@edit(lambda module: ["weight"] if isinstance(module, nn.Linear) else [])
def weight_norm(site: Site, name: str) -> None:
    parametrizations.weight_norm(site.module, name)


class Int8Weight(Tensor):
    """A quantised weight that F.linear accepts and other ops reject, like the weights of quantisation libraries."""

    values: Tensor
    step: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, step: Tensor) -> Int8Weight:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=step.dtype)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, step: Tensor) -> None:
        self.values, self.step = values, step

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            given = {**dict(zip(("input", "weight", "bias"), args, strict=False)), **(kwargs or {})}
            x, weight = given["input"], given["weight"]
            return func(x, weight.values.to(x.dtype) * weight.step.to(x.dtype), given.get("bias"))
        return super().__torch_function__(func, kinds, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].values, args[0].step)
        raise NotImplementedError(f"Int8Weight: {func}")

    def __deepcopy__(self, memo: Any) -> Int8Weight:
        return Int8Weight(self.values.clone(), self.step.clone())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return Int8Weight, (self.values, self.step)


@edit(lambda module: ["weight"] if isinstance(module, nn.Linear) else [])
def quantised_weight(site: Site, name: str) -> None:
    weight = site.module.weight.detach()
    step = weight.abs().max() / 127
    site.module.weight = nn.Parameter(Int8Weight((weight / step).round().to(torch.int8), step), requires_grad=False)


@edit(_tensors(_parameters))
def pruned(site: Site, name: str) -> None:
    prune.l1_unstructured(site.module, name, 0.5)


@edit(_tensors(_buffers))
def assigned_buffer(site: Site, name: str) -> None:
    setattr(site.module, name, site.like(getattr(site.module, name)))


@edit(_tensors(_buffers))
def changed_buffer(site: Site, name: str) -> None:
    buffer = getattr(site.module, name)
    buffer.copy_(site.like(buffer))


@edit(_tensors(_buffers))
def missing_buffer(site: Site, name: str) -> None:
    setattr(site.module, name, None)


@edit(_always)
def dtype_of_a_part(site: Site, _: Any) -> None:
    site.module.to(torch.bfloat16)


@edit(_always)
def part_on_the_meta_device(site: Site, _: Any) -> None:
    site.module.to("meta")


@edit(_always)
def part_in_training(site: Site, _: Any) -> None:
    site.module.train(not site.module.training)


# Steps applied after the edits; each returns the model that is run.


def _replica(model: nn.Module) -> nn.Module:
    """Replicate a model as nn.DataParallel does: modules are copied, and plain tensors replace parameters."""
    modules = list(model.modules())
    replicas = {module: module._replicate_for_data_parallel() for module in modules}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, p in module._parameters.items():
            if p is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, p * 1.0)
    return replicas[model]


def _pickled(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _restored(model: nn.Module) -> nn.Module:
    with contextlib.suppress(RuntimeError):  # raised, with the model unchanged, for a class derived after `accelerate`
        swinkernels.restore(model)
    return model


AFTERWARDS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": _pickled,
    "replica": _replica,
    "restore": _restored,
}


@dataclass(frozen=True)
class Mutation:
    family: str
    edits: tuple[tuple[str, str, Any], ...]  # edit, path, detail
    is_before: bool
    is_repeated: bool  # `accelerate` is called again after the edits
    afterwards: str
    backend: str
    dtype: torch.dtype
    trains: bool
    seed: str

    def __str__(self) -> str:
        edits = ", ".join(f"{name}{'' if of is None else f' {of}'} at {path}" for name, path, of in self.edits)
        when = "before accelerate" if self.is_before else "after accelerate, again" if self.is_repeated else "after"
        then = f", then {self.afterwards}" if self.afterwards else ""
        return f"{self.family}, {self.backend}: {edits}, {when}{then}{', in training' if self.trains else ''}"

    @property
    def kind(self) -> str:
        return " + ".join(name for name, _, _ in self.edits)


@functools.cache
def _models(family: str) -> tuple[nn.Module, tuple[str, ...]]:
    """Return a model of ``family``, and the paths of the modules that ``accelerate`` replaces and of those inside."""
    model = make_model(family)
    fast = copy.deepcopy(model)
    replaced = [entry.path for entry in swinkernels.accelerate(fast).replaced]
    inside = [path for path, _ in model.named_modules() if any(f"{path}.".startswith(f"{r}.") for r in replaced)]
    return model, tuple(inside)


def draw(seed: int, number: int) -> Mutation:
    """Draw the mutation that ``seed`` and ``number`` determine."""
    rng = random.Random(f"{seed} {number}")
    family = rng.choice(list(FAMILIES))
    model, paths = _models(family)
    edits = []
    while len(edits) < (1 if rng.random() < 0.75 else 2):
        name = rng.choice(list(EDITS))
        sites = [(path, of) for path in paths for of in EDITS[name][0](model.get_submodule(path))]
        if sites:
            edits.append((name, *rng.choice(sites)))
    # The closures of these edits hold the accelerated method, which fails once `restore` or a second `accelerate` has
    # set the module's class back.
    keeps = any(name in ("forward of the instance", "method of the instance") for name, _, _ in edits)
    backend, dtype = rng.choice((("reference", torch.float64), ("auto", torch.float64), ("auto", torch.float32)))
    return Mutation(
        family=family,
        edits=tuple(edits),
        is_before=rng.random() < 0.5,
        is_repeated=rng.random() < 0.2 and not keeps,
        afterwards=rng.choice([name for name in AFTERWARDS if not (keeps and name == "restore")])
        if rng.random() < 0.3
        else "",
        backend=backend,
        dtype=dtype,
        trains=rng.random() < 0.5,
        seed=f"{seed} {number}",
    )


@dataclass
class Outcome:
    """The results of a run: tensors and other values by name, or an exception."""

    values: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None


def run(mutation: Mutation, *, accelerates: bool) -> Outcome:
    outcome = Outcome()
    rng = random.Random(mutation.seed)
    model = copy.deepcopy(_models(mutation.family)[0]).to(mutation.dtype)
    x = make_input(mutation.family).to(mutation.dtype)
    log: list[Tensor] = []
    with contextlib.ExitStack() as undo, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        try:
            if accelerates and not mutation.is_before:
                swinkernels.accelerate(model, backend=mutation.backend)
            if not mutation.is_before:  # an accelerated model keeps results of its checks, which must notice the edits
                _warm_up(model.train(mutation.trains), x)
            for name, path, of in mutation.edits:
                EDITS[name][1](Site(model, path, rng, undo, log), of)
            if accelerates and (mutation.is_before or mutation.is_repeated):
                swinkernels.accelerate(model, backend=mutation.backend)
            model = AFTERWARDS[mutation.afterwards](model)
            model.train(mutation.trains)
            log.clear()  # removes entries of `accelerate`'s trials
            _run(model, x, log, outcome.values)
        except Exception as error:  # an edit may break the model in any way
            outcome.error = error
    return outcome


def _warm_up(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad(), always_fused():
        model(x)
    model(x)


def _run(model: nn.Module, x: Tensor, log: list[Tensor], values: dict[str, Any]) -> None:
    torch.manual_seed(3)
    with torch.no_grad(), always_fused():
        values["output without gradients"] = model(x)
    x = x.requires_grad_()
    out = model(x)
    values["output"] = out.detach()
    for i, kept in enumerate(log):
        values[f"log {i}"] = kept.detach()
    loss = (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)).sum()
    for kept in log:
        loss = loss + kept
    loss.backward()
    values["random state"] = torch.rand(1)
    values["gradient of the input"] = x.grad
    for name, p in model.named_parameters():
        values[f"gradient of {name}"] = p.grad
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            values[f"buffer {path}.{name}"] = buffer
        for name, value in vars(module).items():
            if not name.startswith("_") and not callable(value):
                values[f"attribute {path}.{name}"] = value


def compare(got: Outcome, expected: Outcome, tolerance: float) -> str | None:
    """Return a description of the first difference between two outcomes, or None if they agree."""
    if got.error is not None and expected.error is not None:
        return None
    if got.error is not None or expected.error is not None:
        return f"{_described(got.error)}, but the library's own code gives {_described(expected.error)}"
    if got.values.keys() != expected.values.keys():
        return f"only one of the two models has {', '.join(sorted(got.values.keys() ^ expected.values.keys()))}"
    gradients = [g for name, g in expected.values.items() if name.startswith("gradient") and g is not None]
    # A gradient whose terms cancel consists only of rounding errors, whose size depends on the other gradients.
    finite = [g.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0) for g in gradients if g.numel()]
    floor = tolerance * 1e-2 * max((g.abs().max().item() for g in finite), default=0.0)
    for name, value in expected.values.items():
        error = _difference(got.values[name], value, tolerance, floor if name.startswith("gradient") else 0.0)
        if error is not None:
            return f"another {name}: {error}"
    return None


def _described(error: Exception | None) -> str:
    return "a result" if error is None else f"{type(error).__name__} ({' '.join(str(error).split())[:160]})"


def _difference(got: Any, expected: Any, tolerance: float, floor: float) -> str | None:
    if not (isinstance(got, Tensor) and isinstance(expected, Tensor)):
        if isinstance(got, Tensor) or isinstance(expected, Tensor):
            return f"{type(got).__name__}, not {type(expected).__name__}"
        if isinstance(expected, (bool, int, float, str, tuple, list, type(None))):
            return None if repr(got) == repr(expected) else f"{got!r:.60}, not {expected!r:.60}"
        return None if type(got) is type(expected) else f"{type(got).__name__}, not {type(expected).__name__}"
    if (got.shape, got.dtype, got.device) != (expected.shape, expected.dtype, expected.device):
        return f"{tuple(got.shape)} {got.dtype} {got.device}, not {tuple(expected.shape)} {expected.dtype}"
    if got.is_meta or not got.numel() or torch.equal(got, expected):
        return None
    got, expected = got.double(), expected.double()
    nan = expected.isnan()
    if not torch.equal(nan, got.isnan()):
        return "NaN from only one of the two models"
    size = expected[~nan].abs().max().item() if not bool(nan.all()) else 0.0
    error = (got - expected)[~nan].abs().max().item() if size else 0.0
    if math.isinf(size) or error <= tolerance * size + floor:
        return None
    return f"{error:.2g} of {size:.2g}"


def check(seed: int, number: int) -> str | None:
    """Run a mutation; return the command that repeats it and the models' difference, or None if they agree."""
    mutation = draw(seed, number)
    expected = run(mutation, accelerates=False)
    got = run(mutation, accelerates=True)
    # In bfloat16 a model rounds dozens of times, and the two models round differently, so 0.1 is allowed.
    rounds = any(name == "dtype of a part" for name, _, _ in mutation.edits)
    if rounds and expected.error is not None and got.error is None:
        return None  # the ops accept tables and norms whose dtype differs from the map's
    difference = compare(got, expected, 0.1 if rounds else TOLERANCES[mutation.dtype])
    if difference is None:
        return None
    return f"python -m tests.adapters.mutations --seed {seed} --only {number}  # {mutation}: {difference}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.adapters.mutations", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutation")
    parser.add_argument("--only", type=int, help="number of the only mutation to try")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", type=Path, help="a CSV file for the number of mutations of each kind")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.process_time()
    numbers = range(options.first, options.first + options.count) if options.only is None else [options.only]
    tried: Counter[str] = Counter()
    different: Counter[str] = Counter()
    for number in numbers:
        for name, _, _ in draw(options.seed, number).edits:
            tried[name] += 1
        line = check(options.seed, number)
        if line is not None:
            for name, _, _ in draw(options.seed, number).edits:
                different[name] += 1
            print(line, flush=True)
    if options.record is not None:
        from benchmarks import record

        facts = {"mutations_seed": options.seed, "first": options.first, "mutations": len(numbers)}
        rows = [{"edit": n, "tried": tried[n], "different": different[n], **facts} for n in sorted(tried)]
        record.write_csv(options.record, rows, "cpu")
    print(f"{len(numbers)} mutations in {time.process_time() - start:.0f} s of CPU time, {different.total()} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
