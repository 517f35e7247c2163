"""Compares a module of an unknown class with its accelerated twin on random inputs.

The comparison uses copies of the module with random parameters and buffers, on the CPU, in float64 and without hooks.
Outputs are also compared in float32, float16 and bfloat16. Parameters are random because initial values can hide a
difference: if the weight of a norm starts at 0, a whole branch contributes nothing. The buffers listed in
``_KNOWN_TENSORS`` keep their values. The module itself, its gradients and the state of every random number generator do
not change.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, restore_class
from swinkernels.adapters.bypass import remove_hooks
from swinkernels.adapters.copies.snapshot import left_behind, outside, put_back, signature_of

_TOLERANCE = 1e-6  # relative to the largest element; 1e-6 because constants in a block may be float32
_TOLERANCE_OF_LARGE_SCORES = 1e-4  # exponentials amplify rounding errors
_LARGE_SCORE = 75.0
# dtype -> the largest difference that counts as rounding error: the root mean square of the difference divided by that
# of the output. The values are about five times the largest differences measured for the forms of this package.
_ROUNDING = {torch.float32: 2e-6, torch.float16: 5e-3, torch.bfloat16: 5e-2}
_MANY_IMAGES = 16
# Tensors that keep their values in a trial, because a form depends on the values or checks them in every instance.
_KNOWN_TENSORS = ("attn_mask", "relative_coords_table")
MOST_SCORES = 1_500_000  # a backward pass with this number of scores takes a tenth of a second


@dataclass(frozen=True)
class Case:
    """An input for a trial: its shape, the kind of map, and the number of attention scores."""

    shape: tuple[int, ...]
    kind: str
    scores: int


@dataclass(frozen=True)
class Width:
    """The numbers of channels and heads of a module and of its narrow copy.

    A size that is 1, 2, 3 or 4 times ``channels`` is scaled by ``to_channels / channels``. If the narrow copy's forward
    raises an error, the trial uses the module at full width.
    """

    channels: int
    heads: int
    to_channels: int
    to_heads: int

    def _to(self, size: int) -> int:
        times = size // self.channels
        return times * self.to_channels if size % self.channels == 0 and 1 <= times <= _MOST_TIMES else size

    def _head_dim_to(self, size: int) -> int:
        return self.to_channels // self.to_heads if size == self.channels // self.heads else size

    def of_tensor(self, path: str, name: str, given: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape, in the narrow copy, of a parameter or buffer that has the shape ``given`` in the module."""
        shape = tuple(map(self._to, given))
        if name == "relative_position_bias_table" and given[-1] == self.heads:
            shape = *shape[:-1], self.to_heads
        elif name in _OF_HEADS or ("cpb_mlp" in path.split(".") and given[0] == self.heads):
            shape = tuple(self.to_heads if size == self.heads else size for size in given[:1]) + shape[1:]
        elif name in _OF_AXES:
            shape = *given[:-1], self._head_dim_to(given[-1])
        return shape

    def change_attributes(self, module: Any) -> None:
        for name, value in module.__dict__.items():
            if name in _HEADS_NAMES and value == self.heads:
                module.__dict__[name] = self.to_heads
            elif name in _HEAD_DIM_NAMES and type(value) is int:
                module.__dict__[name] = self._head_dim_to(value)
            elif name not in _SIZES_OF_MAPS and type(value) is int:
                module.__dict__[name] = self._to(value)
            elif name == "normalized_shape":
                module.__dict__[name] = tuple(map(self._to, value))
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape


_HEADS_NAMES = ("num_heads", "n_heads", "heads", "num_attention_heads")
_HEAD_DIM_NAMES = ("head_dim", "key_dim", "val_dim", "attention_head_size")
_OF_HEADS = ("logit_scale", "attention_biases", "relative_position_params")  # (heads, ...)
_OF_AXES = ("rel_pos_h", "rel_pos_w")  # (offsets, head_dim)
_MOST_TIMES = 4  # the largest multiple of the number of channels that is scaled, such as an MLP's hidden width
_SIZES_OF_MAPS = ("window_size", "shift_size", "input_resolution", "H", "W", "D", "T", "num_heads")
_HEADS, _HEAD_DIM = 2, 8


def narrow(channels: int, heads: int) -> Width:
    """Choose the width of the narrow copy: at most two heads of at most 8 channels each."""
    few, short = min(heads, _HEADS), min(channels // heads, _HEAD_DIM)
    return Width(channels, heads, few * short, few)


class Elementwise(nn.Module):
    """Replaces an MLP in a trial, because a wide MLP would slow the trial down. It accepts one argument, as MLPs do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


class NotCovered(Exception):
    """Raised if the accelerated twin would run the module's own forward, so that the trial would compare nothing."""


class _Refused(Exception):
    """Raised if the module's own forward raises an error; the message quotes that error."""


class _Different(Exception):
    """Raised if the two modules differ; the message describes the difference."""


@dataclass
class Trial:
    """Compares a module with its accelerated twin, which should give the same results."""

    module: Any
    # Swaps the class of a copy for the accelerated one.
    swap_class: Callable[[nn.Module], None]
    # Calls the forward of a copy on an input, with the further arguments that the forward requires.
    call: Callable[[nn.Module, Tensor], Any]
    # Changes a copy so that it accepts small inputs.
    prepare: Callable[[nn.Module], None] = lambda module: None
    # True to compare the effect of the mask, for a block that has one.
    masks: bool = False
    # width: the width of a narrow copy. shapes: the shapes of parameters for small maps, by name. stand_in: a module
    # that replaces the MLP.
    width: Width | None = None
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    stand_in: nn.Module | None = None
    # True for a short trial: one call per input, in eval mode.
    is_short: bool = False
    # True to compare in other dtypes and with more images even in a short trial. A thorough trial always does this.
    in_dtypes: bool = False
    # True to also compare with each dropout probability in turn set to 1, so that no random numbers affect the result.
    drops: bool = False
    # The largest difference of outputs and gradients, relative to the largest element, that counts as rounding.
    tolerance: float = _TOLERANCE
    # _reached: the objects outside the module that its methods can access, with their contents before a call.
    # _left: the state after the last call.
    _reached: list[tuple[Any, Any]] = field(default_factory=list)
    _left: dict[str, Any] = field(default_factory=dict)

    def run(self, cases: list[Case] | Callable[[Any], list[Case]]) -> tuple[frozenset[str], str]:
        """Return the kinds of inputs that gave equal results, and the first difference or error as text, or "".

        Inputs on which the module's own forward raises an error are ignored, unless it does so on all inputs.

        Args:
            cases: the inputs, or a function that returns them for a copy of the module.
        """
        with _undisturbed():
            try:
                plain = self.copy()
            except Exception as error:  # the class is unknown, so any exception is possible
                return frozenset(), f"it cannot be copied for a trial: {_short(error)}"
            fast = twin(plain)
            self.swap_class(fast)
            cases = cases(plain) if callable(cases) else cases
            tried_in_training = False
            self._reached = outside(plain)
            passed: set[str] = set()
            failed: set[str] = set()
            refused, why = "no known form has its geometry", ""
            for case in cases:
                say_what_takes_long(self.module)
                x = torch.randn(case.shape, generator=_generator(1), dtype=torch.float64)
                try:
                    is_small = case.scores <= MOST_SCORES
                    in_training = not tried_in_training and (is_small or case is cases[-1])
                    self._compare(twin(plain), twin(fast), x, is_small, in_training)
                    tried_in_training = tried_in_training or in_training
                    passed.add(case.kind)
                except _Refused as refusal:
                    refused = f"its forward {REFUSED} on random inputs: {refusal} ({_map_of(x)})"
                    continue
                except NotCovered as reason:
                    refused = f"the op would not run: {reason}"
                    continue
                except Exception as error:  # for example if an attribute that the form reads is missing
                    failed.add(case.kind)
                    why = why or _failure(error)
                if not passed:
                    break
            smallest = min((c for c in cases if c.kind in passed - failed), key=lambda c: c.scores, default=None)
            if smallest is not None and (self.in_dtypes or not self.is_short):
                try:
                    self._compare_dtypes_and_batches(plain, fast, smallest)
                except Exception as error:
                    return frozenset(), _failure(error)
        return frozenset(passed - failed), why or ("" if passed else refused)

    def copy(self) -> Any:
        """Return a copy of the module with random parameters and without hooks; if ``width`` is set, a narrow copy."""
        # Parameters are replaced instead of copied: the memo maps each of them to a new tensor.
        memo: dict[int, Any] = {} if self.stand_in is None else {id(self.module._modules["mlp"]): self.stand_in}
        left_out = set() if self.stand_in is None else set(self.module.mlp.modules())
        for path, m in self.module.named_modules():
            if m in left_out:
                continue
            for name, p in m._parameters.items():
                if p is not None and id(p) not in memo:
                    memo[id(p)] = nn.Parameter(torch.empty(self._shape(path, name, p), dtype=torch.float64))
            for name, t in m._buffers.items():
                if t is not None and t.is_floating_point() and name not in _KNOWN_TENSORS:
                    memo[id(t)] = torch.empty(self._shape(path, name, t), dtype=torch.float64)
            for value in m.__dict__.values():
                for t in value.values() if isinstance(value, dict) else (value,):
                    if isinstance(t, Tensor) and not t.is_leaf:  # from an earlier call; deepcopy rejects such tensors
                        memo[id(t)] = t.detach().clone()
        plain = copy.deepcopy(self.module, memo)
        for m in plain.modules():
            restore_class(m)
            if self.width is not None:
                self.width.change_attributes(m)
        remove_hooks(plain)
        plain = plain.to("cpu", torch.float64).eval().requires_grad_(True)
        self.prepare(plain)
        generator = _generator(0)
        module: Any
        for module in plain.modules():
            for name, p in module.named_parameters(recurse=False):
                # Uniform random numbers with unit variance. Normal ones would take three times as long to generate,
                # which would dominate the trial of a wide module.
                p.data.uniform_(-math.sqrt(3.0), math.sqrt(3.0), generator=generator)
                if name == "logit_scale":
                    p.data.mul_(0.3).add_(2.0)
                elif isinstance(module, nn.Linear) and p.dim() == 2:
                    p.data.mul_(1.5 * p.shape[1] ** -0.5)
                elif "norm" in type(module).__name__.lower() and name == "weight":
                    p.data.mul_(0.2).add_(1.0)
            # Also randomise buffers and other tensors that a forward may read, such as an offset whose value is 0.
            for name, t in (*module._buffers.items(), *module.__dict__.items()):
                if isinstance(t, Tensor) and t.is_floating_point() and name not in _KNOWN_TENSORS:
                    t.data.uniform_(0.5, 1.5, generator=generator)
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # the op and the module would draw different random numbers
            elif isinstance(getattr(module, "drop_prob", None), float):
                module.drop_prob = 0.5  # drop path
        if self.drops:
            for module, name in _dropouts(plain):
                setattr(module, name, 0.0)
        return plain

    def _shape(self, path: str, name: str, t: Tensor) -> tuple[int, ...]:
        shape = self.shapes.get(f"{path}.{name}" if path else name, tuple(t.shape))
        return shape if self.width is None else self.width.of_tensor(path, name, shape)

    def _try(self, module: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._result(module, x)

    def _result(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return the output of ``module`` for ``x``, and store the state after the call in ``_left``."""
        numpy = sys.modules.get("numpy")
        random.seed(3)
        if numpy is not None:
            numpy.random.seed(3)
        try:
            out = self.call(module, x)
        finally:
            self._left = left_behind(module, self._reached)
            put_back(self._reached)
        self._left["the next number of Python's random"] = random.random()
        if numpy is not None:
            self._left["the next number of numpy's random"] = numpy.random.rand()
        if not isinstance(out, Tensor):
            raise TypeError(f"it returns a {type(out).__name__}, not a tensor")
        return out

    def _compare(self, plain: Any, fast: Any, x: Tensor, gradients: bool, in_training: bool) -> None:
        if self.is_short:
            self._compare_calls(plain, fast, x, False, "")
            return
        self._compare_calls(plain, fast, x, gradients, "")
        if any(name.endswith("logit_scale") for name, _ in plain.named_parameters()):
            self._compare_largest_scale(plain, fast, x)
        if self.masks:
            self._compare_masks(plain, fast, x)
        if in_training:
            plain.train()
            fast.train()
            if self.drops:
                self._compare_dropouts(plain, fast, x)
            self._compare_calls(plain, fast, x, gradients, " in training")
            self._compare_calls(plain, fast, x, False, " in training without gradients")

    def _compare_calls(self, plain: nn.Module, fast: nn.Module, x: Tensor, gradients: bool, when: str) -> None:
        """Compare the modules' outputs and gradients, the next random number, and the state after the calls."""
        results = []
        for module in (plain, fast):
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                try:
                    out = self._result(module, leaf)
                except Exception as error:
                    if module is plain:
                        raise _Refused(_short(error)) from None
                    raise
            drawn, left = torch.rand(1, device="cpu").double(), self._left
            grads = {}
            if gradients:
                leaves: dict[str, Tensor] = {"the input": leaf, **dict(module.named_parameters())}
                dout = torch.randn(out.shape, generator=_generator(2), dtype=torch.float64)
                # grad_outputs is avoided: torch would import symbolic shapes to compare sizes, which takes half a
                # second.
                found = torch.autograd.grad((out * dout).sum(), list(leaves.values()), allow_unused=True)
                zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
                grads = dict(zip(leaves, zeros, strict=True))
            results.append((out.detach(), drawn, grads, left))
        (expected, next_expected, expected_grads, expected_left), (got, next_got, grads, left) = results
        _check(f"another output{when}", got, expected, tolerance=self.tolerance)
        _check(f"other random numbers{when}", next_got, next_expected)
        # If the terms of a sum cancel, the error is relative to the terms, not to the sum.
        floor = 1e-3 * self.tolerance * max((g.abs().max().item() for g in expected_grads.values()), default=0.0)
        for name, grad in expected_grads.items():
            _check(f"another gradient of {name}{when}", grads[name], grad, floor=floor, tolerance=self.tolerance)
        for name in (*expected_left, *left):
            _check_left(name, left.get(name, _NOTHING), expected_left.get(name, _NOTHING))

    def _compare_dtypes_and_batches(self, plain: nn.Module, fast: nn.Module, case: Case) -> None:
        """Compare outputs in other dtypes and, in float32, for a larger batch, because a forward may depend on both."""
        images, *size = case.shape
        times = max(2 if images > 1 else 3, min(_MANY_IMAGES // images, MOST_SCORES // max(case.scores, 1)))
        for dtype, tolerance in _ROUNDING.items():
            batch = times * images if dtype == torch.float32 else images
            x = torch.randn((batch, *size), generator=_generator(1), dtype=torch.float64).to(dtype)
            try:
                expected = self._try(_in_dtype(plain, dtype), x)
            except Exception:  # the module's code does not accept this dtype or batch
                continue
            try:
                got = self._try(_in_dtype(fast, dtype), x)
            except NotCovered:  # its own code runs
                continue
            what = f"another output for {batch} images in {dtype}"
            if got.dtype != expected.dtype or got.shape != expected.shape:
                raise _Different(f"{what} ({got.dtype}, {tuple(got.shape)})")
            error, norm = (got.double() - expected.double()).norm().item(), expected.double().norm().item()
            if not error <= tolerance * norm:  # NaN differs
                raise _Different(f"{what} (relative error {error / max(norm, 1e-300):.2g} in root mean square)")

    def _compare_largest_scale(self, plain: nn.Module, fast: nn.Module, x: Tensor) -> None:
        """Compare the modules with ``logit_scale`` so large that v2 clamps it."""
        results = []
        for module in (plain, fast):
            twin = copy.deepcopy(module)
            _make_scale_largest(twin)
            results.append(self._try(twin, x))
        _check("another output at the largest scale", *reversed(results), tolerance=_TOLERANCE_OF_LARGE_SCORES)

    def _compare_dropouts(self, plain: nn.Module, fast: nn.Module, x: Tensor) -> None:
        """Compare the modules with each dropout probability in turn set to 1."""
        for number, (of, name) in enumerate(_dropouts(plain)):
            results = []
            for module in (plain, fast):
                twin = copy.deepcopy(module)
                dropout, name = _dropouts(twin)[number]
                setattr(dropout, name, 1.0)
                m: Any
                for m in twin.modules():
                    for rate in ("drop_prob", "p"):  # disable drop paths, which would draw random numbers
                        if not isinstance(m, nn.Dropout) and isinstance(m.__dict__.get(rate), float):
                            m.__dict__[rate] = 0.0
                    if isinstance(m, Accelerated):
                        m._swinkernels_swapped()
                results.append(self._try(twin, x))
            _check(f"another output with {type(of).__name__}.{name} of 1", *reversed(results), tolerance=self.tolerance)

    def _compare_masks(self, plain: nn.Module, fast: nn.Module, x: Tensor) -> None:
        """Compare the modules with scores of about -75 and 75, for which the mask value matters."""
        # With these scores, tokens attend across a mask of -100, but not across one of -1000. The halves of the map
        # have opposite signs, so a window at the seam contains both. Keys are the negated queries, so a token's scores
        # are low in its own region and high in the other.
        sign = torch.ones((), dtype=torch.float64)
        for length in x.shape[1:-1]:
            sign = sign[..., None] * torch.where(torch.arange(length) < length // 2, 1.0, -1.0).double()
        direction = torch.randn(x.shape[-1], generator=_generator(4), dtype=torch.float64)
        inputs = sign[..., None] * direction + 0.05 * x
        results = []
        for module in (plain, fast):
            twin = copy.deepcopy(module)
            _make_scale_largest(twin)
            _make_scores_large(twin.attn)
            results.append(self._try(twin, inputs))
        _check("another output where masks matter", *reversed(results), tolerance=_TOLERANCE_OF_LARGE_SCORES)


REFUSED = "refused a trial"  # occurs in the reason that Trial.run returns if the module's forward raised an error


class Verdicts:
    """Caches the results of trials.

    A thorough trial runs on a narrow copy of the module, and a short trial at the module's own width. Modules of all
    widths share the result of the thorough trial. If there is no narrow copy, or if its forward raises an error, the
    thorough trial runs at the module's own width.
    """

    def __init__(self) -> None:
        self.of_narrow: dict[tuple[Any, ...], str | None] = {}
        self.at_own_width: dict[tuple[Any, ...], str | None] = {}

    def why_not(
        self, module: nn.Module, others: tuple[Any, ...], width: Width | None, make: Callable[..., Trial], attempt: Any
    ) -> str | None:
        """Return the reason why a trial of ``module`` failed, or None if its trials passed.

        Args:
            module: the module to try.
            others: all other values on which the result depends.
            width: the width of the narrow copy, or None for no narrow copy.
            make: (**options) -> a trial of the module.
            attempt: runs a trial and returns the reason why it failed, or None if it passed.
        """
        key = *others, signature_of(module)
        if key not in self.at_own_width:
            self.at_own_width[key] = self._find(others, width, make, attempt)
        return self.at_own_width[key]

    def _find(self, others: tuple[Any, ...], width: Width | None, make: Any, attempt: Any) -> str | None:
        try:
            key = None if width is None else (*others, signature_of(make(width=width).copy()))
        except Exception:  # the class is unknown, so any exception is possible
            key = None
        if key is None:
            return attempt(make())
        if key not in self.of_narrow:
            self.of_narrow[key] = attempt(make(width=width))
        reason = self.of_narrow[key]
        if reason is None:
            return attempt(make(is_short=True))
        return attempt(make()) if REFUSED in reason else reason


def _dropouts(module: nn.Module) -> list[tuple[nn.Module, str]]:
    """Return (submodule, attribute name) for each dropout probability in ``module`` and its submodules."""
    found: list[tuple[nn.Module, str]] = []
    for m in module.modules():
        names = [n for n, v in m.__dict__.items() if type(v) is float and "drop" in n and n != "drop_prob"]
        found += [(m, n) for n in (["p"] if isinstance(m, nn.Dropout) else names)]
    return found


def twin(module: nn.Module) -> Any:
    """Return a copy of ``module`` that shares its parameters."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> Any:
    """Return a copy of ``module`` whose floating-point parameters and buffers are converted to ``dtype``."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(dtype)) for p in module.parameters()}
    memo |= {id(b): b.to(dtype) for b in module.buffers() if b.is_floating_point()}
    return copy.deepcopy(module, memo)


def _make_scale_largest(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if name.endswith("logit_scale"):
            p.data.fill_(8.0)  # far above ln 100, the upper bound of the clamp


def _make_scores_large(attn: Any) -> None:
    q, k, _ = attn.qkv.weight.data.chunk(3)
    head_dim = len(q) // attn.num_heads
    scale = abs(getattr(attn, "scale", None) or head_dim**-0.5)
    # After a norm, the squared length of a row is about its number of elements.
    q.normal_(std=math.sqrt(_LARGE_SCORE / (scale * q.shape[1] * head_dim)), generator=_generator(5))
    k.copy_(-q)
    for name, p in attn.named_parameters():
        if name in ("qkv.bias", "q_bias", "v_bias", "relative_position_bias_table"):
            p.data.mul_(0.1)


def _check(what: str, got: Tensor, expected: Tensor, *, floor: float = 0.0, tolerance: float = _TOLERANCE) -> None:
    if got.shape != expected.shape:
        raise _Different(f"{what} ({tuple(got.shape)}, not {tuple(expected.shape)})")
    error, largest = (got - expected).abs().max().item(), expected.abs().max().item()
    if not error <= tolerance * largest + floor:  # NaN differs
        raise _Different(f"{what} (error {error / max(largest, 1e-300):.2g}, relative to the largest element)")


_QUIET_FOR = 2.0  # seconds
_SPOKE_AT = [0.0]


@contextlib.contextmanager
def told_after_seconds() -> Iterator[None]:
    """Let trials print a progress notice, at most every two seconds, while the context is active."""
    _SPOKE_AT[0] = time.monotonic()
    try:
        yield
    finally:
        _SPOKE_AT[0] = 0.0


def say_what_takes_long(module: nn.Module) -> None:
    now = time.monotonic()
    if _SPOKE_AT[0] and now - _SPOKE_AT[0] > _QUIET_FOR:
        _SPOKE_AT[0] = now
        print(f"swinkernels.accelerate: trying {type(module).__name__} on random inputs ...", file=sys.stderr)


_NOTHING = object()


def _check_left(name: str, got: Any, expected: Any) -> None:
    what = f"another state of {name} after the call"
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise _Different(what)
        if got.numel():
            _check(what, got.double(), expected.double())
    elif isinstance(got, Tensor) or isinstance(expected, Tensor) or got != expected:
        raise _Different(what)


def _failure(error: Exception) -> str:
    if isinstance(error, _Different):
        return f"a trial on random inputs gave {error} than its own forward"
    return f"a trial of its form failed: {_short(error)}"


def _map_of(x: Tensor) -> str:
    return f"a map of {' x '.join(map(str, x.shape[1:-1]))}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Enable gradients, disable autocast and create tensors on the CPU; restore random number generators at exit."""
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
            torch.device("cpu"),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)
