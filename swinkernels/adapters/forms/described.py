"""Accelerated classes of modules that have a form (:class:`Form`).

An accelerated class is created for each pair of original class and form, and is pickled as that pair. The method that
the form replaces runs the form's forward, or the module's own code if the form requires that or if the module has
changed since its trial.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import Adapter, original_class, restore_class, swap_class
from swinkernels.adapters.bypass import (
    all_modules_have_hooks,
    first_weight,
    remove_hooks,
    replaced_forward,
)
from swinkernels.adapters.copies.dynamic_class import DynamicSubclass, dynamic_subclass, inside
from swinkernels.adapters.copies.snapshot import Snapshot, largest_number, signature_of
from swinkernels.adapters.copies.trial import (
    MOST_SCORES,
    REFUSED,
    Case,
    Elementwise,
    NotCovered,
    Trial,
    Verdicts,
    Width,
    narrow,
)
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.masks import frame_of
from swinkernels.adapters.part import Part, op_on
from swinkernels.nn._inner import has_own_hooks
from swinkernels.ops.window_attention import spec_of, window_attention_reasons
from swinkernels.window_spec import WindowSpec


class Described(DynamicSubclass):
    """A module that runs its form's forward, which calls window attention ops.

    The module's own code runs if a call has arguments that the form does not have, if there are hooks on modules that
    the op replaces, while the code is traced, and if the module has changed since the trial.
    """

    _swinkernels_form: Form
    _swinkernels_in_trial = False
    # In a trial: the op's calls so far.
    _swinkernels_calls: _Calls | None = None
    # Recorded when the class was swapped: for each module path, the shapes of its parameters by name, and whether it
    # had a ``scale``.
    _swinkernels_shapes: Mapping[str, tuple[dict[str, torch.Size], bool]] = MappingProxyType({})

    def _swinkernels_swapped(self) -> None:
        self.__dict__["_swinkernels_snapshots"] = _snapshots(self._swinkernels_form, self)
        self.__dict__["_swinkernels_shapes"] = _shapes(self)

    def _swinkernels_attend(self, *maps: Any, **arguments: Any) -> Tensor:
        calls = self._swinkernels_calls
        if calls is not None:
            x, heads = maps[0], arguments["num_heads"]
            size, head_dim = _geometry(maps, heads)
            others = {name: value for name, value in arguments.items() if name != "return_attention"}
            spec = spec_of("accelerate", x, size, head_dim, **others)
            queries = x.shape[0] * heads * math.prod(frame_of(size, spec.window_size))
            calls.append((spec, head_dim, queries * spec.key_volume))
            if calls.are_dry:
                return x.new_zeros(x.shape[0], *size, heads * head_dim)
        return op_on(self._swinkernels_backend)(*maps, **arguments)

    def _swinkernels_why_own_code(self) -> str | None:
        return self._swinkernels_changed() or _unfit(self) or _hooked(self)

    def _swinkernels_run(self, *args: Any, **kwargs: Any) -> Any:
        """Run the form's forward, or the module's own code; called in place of the form's ``method``."""
        form = self._swinkernels_form
        x = args[0] if args else next(iter(kwargs.values()), None)
        if self._swinkernels_own_code(x):
            reason: Any = "its code is traced or was replaced, or no kernel runs on the device"
        else:
            reason = self._swinkernels_why_own_code() or _why_not_taken(form, args, kwargs)
        if reason is None:
            reason = form.forward(self, self._swinkernels_attend, *args, **kwargs)
            if not isinstance(reason, str):
                return reason
        if self._swinkernels_in_trial:
            raise NotCovered(reason)
        return getattr(self._swinkernels_original, form.method)(self, *args, **kwargs)


@functools.cache
def _parameters(form: Form) -> tuple[frozenset[str], int, bool]:
    """Describe the arguments of ``form.forward`` that follow ``module`` and ``attend``.

    Return their names, the maximum number of positional arguments, and True if any keyword is accepted.
    """
    parameters = list(inspect.signature(form.forward).parameters.values())[2:]
    named = frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    positional = sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return named, 1000 if takes_any else positional, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _why_not_taken(form: Form, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    named, positional, takes_any = _parameters(form)
    if len(args) <= positional and (takes_any or named.issuperset(kwargs)):
        return None
    return "it is called with arguments that its form does not have"


def _snapshots(form: Form, module: nn.Module) -> dict[str, Snapshot]:
    """Return snapshots, by path, of ``module`` and of the modules inside it that the op replaces."""
    found = {"": Snapshot(module, absorbs="" in form.absorbs)}
    for root in form.absorbs:
        for path, m in module.get_submodule(root).named_modules(prefix=root):
            is_leaf = type(m).__module__.startswith("torch.nn.modules") and not m._modules
            if path and not (is_leaf and ("." in path or "" in form.absorbs)):
                found[path] = Snapshot(m)
    return found


def _shapes(module: Any) -> dict[str, tuple[dict[str, torch.Size], bool]]:
    found = {}
    for path in module._swinkernels_snapshots:
        m = inside(module, path)
        if m is not None and (path or "" in module._swinkernels_form.absorbs):
            shapes = {name: p.shape for name, p in m._parameters.items() if p is not None}
            found[path] = shapes, hasattr(m, "scale")
    return found


def _unfit(module: Any) -> str | None:
    """Return the reason why the op does not accept a value that the form reads at every call, or None.

    These values are the scale and the shapes of parameters. The module's own code may be able to broadcast a new shape.
    """
    for path, (shapes, has_scale) in module._swinkernels_shapes.items():
        m, prefix = inside(module, path), f"{path}." if path else ""
        if m is None:
            return f"{path} was removed"
        scale = getattr(m, "scale", None) if has_scale else None
        if scale is not None and not isinstance(scale, (int, float)):
            return f"{prefix}scale is a {type(scale).__name__}, not a number"
        for name, shape in shapes.items():
            p = m._parameters.get(name)  # None if a parallel wrapper stores it elsewhere
            if p is not None and p.shape != shape:
                return f"{prefix}{name} has another shape than before: {tuple(p.shape)}, not {tuple(shape)}"
    return None


def _hooked(module: Any) -> str | None:
    """Return a description of a hook that the form would not run, or None."""
    for path in module._swinkernels_snapshots:
        m = inside(module, path)
        if m is None:
            return f"{path} was removed"
        if path and has_own_hooks(m):
            return f"a hook is registered on {path}"
        if path or "" in module._swinkernels_form.absorbs:
            for name, inner in m._modules.items():
                if inner is not None and has_own_hooks(inner):
                    return f"a hook is registered on {f'{path}.' if path else ''}{name}"
    return None


def _geometry(maps: tuple[Tensor, ...], num_heads: int) -> tuple[tuple[int, ...], int]:
    """Return the map's size and head_dim from the tensors passed to the op, qkv or (q, k, v)."""
    x = maps[0]
    if len(maps) > 1:
        return tuple(x.shape[1:-2]), x.shape[-1]
    if x.dim() > 4 and x.shape[-3:-1] == (3, num_heads):
        return tuple(x.shape[1:-3]), x.shape[-1]
    return tuple(x.shape[1:-1]), x.shape[-1] // (3 * num_heads)


# The trial


_TRIALS = Verdicts()
# (form, signature) -> the specs and head_dims of the op's calls for inputs of the module's own sizes.
_SPECS: dict[tuple[Any, ...], tuple[tuple[WindowSpec, int], ...]] = {}


class _Calls(list[tuple[WindowSpec, int, int]]):
    """Lists the op's calls, each as (spec, head_dim, number of scores). Copies of a module share the list."""

    # True if the calls return zeros, so that inputs of any size are cheap.
    are_dry = False

    def __deepcopy__(self, memo: Any) -> _Calls:
        return self

    def specs(self) -> tuple[tuple[WindowSpec, int], ...]:
        return tuple(dict.fromkeys((spec, head_dim) for spec, head_dim, _ in self if spec.dropout_p == 0.0))


def _put_in_place(form: Form, calls: _Calls, module: nn.Module) -> None:
    original: Any = original_class(module)
    swap_class(_adapter(original, form), module, "reference")
    module.__dict__["_swinkernels_in_trial"] = True
    module.__dict__["_swinkernels_calls"] = calls


def _dry_calls(form: Form, module: nn.Module, sizes: Sequence[tuple[int, ...]]) -> list[_Calls]:
    """Return the op's calls for one image of each size in ``sizes``, recorded with a copy on the meta device."""
    tensors = [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
    copied = copy.deepcopy(module, {id(t): t.detach().to("meta") for t in tensors})
    for m in copied.modules():
        restore_class(m)
    remove_hooks(copied)
    copied.to("meta", torch.float64).eval()
    found = []
    for size in sizes:
        calls = _Calls()
        calls.are_dry = True
        twin = copy.deepcopy(copied)
        _put_in_place(form, calls, twin)
        with torch.no_grad():
            form.call(twin, torch.empty(1, *size, dtype=torch.float64, device="meta"))
        found.append(calls)
    return found


_HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads")


def _width(form: Form, module: nn.Module) -> Width | None:
    """Return the width of a narrow copy, or None if the module's attributes do not determine its channels and heads."""
    heads = [v for m in module.modules() for n, v in m.__dict__.items() if n in _HEADS and type(v) is int]
    linears = [m.in_features for m in module.modules() if isinstance(m, nn.Linear)]
    size = form.sizes(module)[0]
    channels = next((n for n in (size[-1], size[0]) if n in linears), None)
    if channels is None or len(set(heads)) != 1 or heads[0] < 1 or channels % heads[0]:
        return None
    return narrow(channels, heads[0])


def _why_not_by_trial(form: Form, module: nn.Module) -> str | None:
    calls = _Calls()
    make = functools.partial(
        Trial,
        module,
        functools.partial(_put_in_place, form, calls),
        form.call,
        shapes=form.small(module),
        drops=True,
        tolerance=form.tolerance,
    )
    reason = _TRIALS.why_not(module, (form,), _width(form, module), make, functools.partial(_attempt, form, calls))
    key = (form, signature_of(module))
    if reason is None and key not in _SPECS:
        try:
            _SPECS[key] = tuple(
                dict.fromkeys(s for c in _dry_calls(form, module, form.sizes(module)) for s in c.specs())
            )
        except Exception:  # the code may read tensor values, which do not exist on the meta device
            _SPECS[key] = calls.specs()
    return reason


_BATCH = 2  # images in a trial; with one image, a wrong stride between images would go unnoticed
_MOST_TOKENS = 20_000  # a larger constant in a module's code is assumed not to be a limit on the number of tokens


def _sizes(form: Form, module: Any) -> list[tuple[int, ...]]:
    """Return the form's sizes. For a form that recognises modules by their attributes, a large size may be appended.

    The large size has more tokens than any number, up to ``_MOST_TOKENS``, with which the module's code may compare
    the number of tokens.
    """
    sizes = list(form.sizes(module))
    if isinstance(form.of, type):
        return sizes
    *first, channels = sizes[0]
    number = largest_number(module, _MOST_TOKENS, channels)
    if number >= max(math.prod(size[:-1]) for size in sizes):
        times = next(n for n in itertools.count(2) if math.prod(n * s for s in first) > number)
        sizes.append((*(times * s for s in first), channels))
    return sizes


def _cases(form: Form, is_short: bool, module: nn.Module) -> list[Case]:
    """Return the inputs to try; for a short trial, only the one with the fewest scores."""
    sizes = _sizes(form, module)
    try:
        scores = [sum(n for *_, n in calls) for calls in _dry_calls(form, module, sizes)]
    except Exception:  # the code may read tensor values; the trial reports other errors
        scores = [math.prod(size) for size in sizes]
    images = [1 if is_short or _BATCH * n > MOST_SCORES else _BATCH for n in scores]
    cases = [Case((b, *size), f"{size}", b * n) for size, b, n in zip(sizes, images, scores, strict=True)]
    return [min(cases, key=lambda case: case.scores)] if is_short else cases


def _attempt(form: Form, calls: _Calls, trial: Trial) -> str | None:
    stand_ins: list[nn.Module | None] = [None]
    if trial.width is None and "mlp" in trial.module._modules and "mlp" not in form.absorbs:
        stand_ins = [Elementwise(), None]
    for stand_in in stand_ins:
        tried = dataclasses.replace(trial, stand_in=stand_in)
        _, reason = tried.run(functools.partial(_cases, form, trial.is_short))
        if REFUSED not in reason:
            break
    if reason:
        return f"it looks like {form.name}, but {reason}"
    return None if calls else f"the forward of {form.name} calls no op"


def _why_not_tried(form: Form, module: nn.Module) -> str | None:
    """Return a reason to skip ``module`` without a trial, or None.

    These reasons are not part of a trial, because the verdict of a trial is cached for all equivalent modules.
    """
    if all_modules_have_hooks():
        return "a global module hook is registered"
    cls: Any = original_class(module)
    if isinstance(form.of, type) and cls.__module__.partition(".")[0] != form.of.__module__.partition(".")[0]:
        return f"{cls.__name__} is a subclass of {form.of.__name__}, which may compute something else"
    return None


def match(module: nn.Module, forms: list[Form]) -> tuple[Adapter | None, str | None] | None:
    """Return (adapter, None) or (None, reason) if one of ``forms`` describes ``module``, else None."""
    form = next((form for form in forms if form.fits(module)), None)
    if form is None:
        return None
    try:
        reason = replaced_forward(module) or _why_not_tried(form, module)
        if reason is None and any(p.is_meta for p in module.parameters()):
            reason = "its parameters are on the meta device, and a form is used only after a trial with values"
        if reason is None:
            reason = _why_not_by_trial(form, module)
        if reason is None:
            reason = _hooked_before(form, module)
    except Exception as error:  # an unknown class may store anything in its attributes
        reason = f"its attributes do not fit {form.name}: {type(error).__name__}: {error}"
    original: Any = original_class(module)
    return (_adapter(original, form), None) if reason is None else (None, reason)


# The adapter


def _hooked_before(form: Form, module: nn.Module) -> str | None:
    for root in form.absorbs:
        for path, m in module.get_submodule(root).named_modules(prefix=root):
            if path and has_own_hooks(m):
                return f"a hook is registered on {path}"
    return None


def _part_reasons(form: Form, module: Any, backend: str, training: bool) -> list[str]:
    """Return the reasons why ``backend`` cannot run the op calls of ``module``."""
    weight, specs = first_weight(module), _SPECS.get((form, signature_of(module)), ())
    drops = [m.p for name, m in module.named_modules() if isinstance(m, nn.Dropout) and name.endswith("attn_drop")]
    p = max(drops, default=0.0) if training else 0.0
    found: list[str] = []
    for spec, head_dim in specs:
        with_dropout = dataclasses.replace(spec, dropout_p=p)
        found += window_attention_reasons(backend, with_dropout, head_dim, weight.dtype, weight.device)
    return list(dict.fromkeys(found))


def _reason_to_fall_back(form: Form, module: Any) -> str | None:
    if isinstance(module, Described):
        return module._swinkernels_why_own_code()
    return _hooked_before(form, module)


@functools.cache
def _adapter(original: Any, form: Form) -> Adapter:
    accelerated = dynamic_subclass(Described, original, form, _adapter, **{form.method: _method(original, form.method)})
    return Adapter(
        name=form.name,
        original=original,
        accelerated=accelerated,
        reason_to_skip=lambda module: None,  # `match` has already checked the module
        parts=(
            Part(
                "attention",
                "window_attention",
                functools.partial(_reason_to_fall_back, form),
                functools.partial(_part_reasons, form),
            ),
        ),
        input_shape=lambda module: tuple(form.sizes(module)[0]),
        weight=first_weight,
        run=form.call,
    )


def _method(original: Any, name: str) -> Any:
    @functools.wraps(getattr(original, name))
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._swinkernels_run(*args, **kwargs)

    return run
