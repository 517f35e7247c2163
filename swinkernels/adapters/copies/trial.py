"""A module of an unknown class beside its accelerated twin on random numbers: whether they do the same.

Both are copies with random parameters and buffers, on the CPU, in float64 and without hooks: initial values may hide
a difference (a norm that starts at 0 hides a whole branch). The module, its gradients and the state of every random
number generator stay as they are.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import restore_class
from swinkernels.adapters.bypass import remove_hooks
from swinkernels.adapters.copies.snapshot import left_behind, outside, put_back

_TOLERANCE = 1e-6  # of the largest element: constants of a block may be float32
_TOLERANCE_OF_LARGE_SCORES = 1e-4  # their exponentials make more of such errors
_LARGE_SCORE = 75.0
# What forms read, or is looked at in every instance.
_KNOWN_TENSORS = ("attn_mask", "relative_coords_table")
_MOST_SCORES = 5_000_000  # of which a backward pass takes seconds


@dataclass(frozen=True)
class Case:
    """An input to try, what kind of input it is, and how many scores its attention has."""

    shape: tuple[int, ...]
    kind: str
    scores: int


class NotCovered(Exception):
    """The accelerated twin would run its own forward: there is nothing to compare."""


class _Different(Exception):
    """The two do not do the same; the message says in what."""


@dataclass
class Trial:
    """One module and one guess at what it does."""

    module: Any
    # Makes a copy run on ops, by the guess.
    swap_class: Callable[[nn.Module], None]
    # The forward of a copy on an input, with whatever else it takes.
    call: Callable[[nn.Module, Tensor], Any]
    # Changes a copy such that small inputs are right for it.
    prepare: Callable[[nn.Module], None] = lambda module: None
    # Whether it is a block that masks.
    masks: bool = False
    # What methods of its classes reach outside of it, and what it holds now and after the last call.
    _reached: list[tuple[Any, Any]] = field(default_factory=list)
    _left: dict[str, Any] = field(default_factory=dict)

    def run(self, cases: list[Case]) -> tuple[frozenset[str], str]:
        """The kinds of inputs on which nothing was found to differ, and the first thing that was.

        An input that the module itself refuses says nothing of the guess.
        """
        with _undisturbed():
            try:
                plain = self._copy()
            except Exception as error:  # whatever a foreign class may raise
                return frozenset(), f"it cannot be copied for a trial: {_short(error)}"
            fast = copy.deepcopy(plain)
            self.swap_class(fast)
            self._reached = outside(plain)
            passed: set[str] = set()
            failed: set[str] = set()
            refused, why = "no known form has its geometry", ""
            for case in cases:
                x = torch.randn(case.shape, generator=_generator(1), dtype=torch.float64)
                try:
                    self._try(copy.deepcopy(plain), x)
                except Exception as error:
                    refused = f"its forward refused a trial on random numbers: {_short(error)} ({_map_of(x)})"
                    continue
                try:
                    pair = copy.deepcopy(plain), copy.deepcopy(fast)
                    self._compare(*pair, x, case.scores <= _MOST_SCORES, in_training=not passed)
                    passed.add(case.kind)
                except NotCovered as reason:
                    refused = f"the op would not run: {reason}"
                    continue
                except _Different as difference:
                    failed.add(case.kind)
                    why = why or f"a trial on random numbers gave {difference} than its own forward"
                except Exception as error:  # such as an attribute that the form needs
                    failed.add(case.kind)
                    why = why or f"a trial of its form failed: {_short(error)}"
                if not passed:
                    break
        return frozenset(passed - failed), why or ("" if passed else refused)

    def _copy(self) -> Any:
        plain = copy.deepcopy(self.module)
        for m in plain.modules():
            restore_class(m)
        remove_hooks(plain)
        plain = plain.to("cpu", torch.float64).eval().requires_grad_(True)
        plain.zero_grad(set_to_none=True)
        self.prepare(plain)
        generator = _generator(0)
        module: Any
        for module in plain.modules():
            for name, p in module.named_parameters(recurse=False):
                p.data.normal_(generator=generator)
                if name == "logit_scale":
                    p.data.mul_(0.3).add_(2.0)
                elif isinstance(module, nn.Linear) and p.dim() == 2:
                    p.data.mul_(1.5 * p.shape[1] ** -0.5)
                elif "norm" in type(module).__name__.lower() and name == "weight":
                    p.data.mul_(0.2).add_(1.0)
            # What else a forward may read, an offset that is 0 in this instance, say.
            for name, t in (*module._buffers.items(), *module.__dict__.items()):
                if isinstance(t, Tensor) and t.is_floating_point() and name not in _KNOWN_TENSORS:
                    t.data.uniform_(0.5, 1.5, generator=generator)
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # draws for windows are not those for the map
            elif isinstance(getattr(module, "drop_prob", None), float):
                module.drop_prob = 0.5  # drop path
        return plain

    def _try(self, module: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self._result(module, x)

    def _result(self, module: nn.Module, x: Tensor) -> Tensor:
        """What a call returns; :meth:`_left` has what it leaves behind."""
        try:
            out = self.call(module, x)
        finally:
            self._left = left_behind(module, self._reached)
            put_back(self._reached)
        if not isinstance(out, Tensor):
            raise TypeError(f"it returns a {type(out).__name__}, not a tensor")
        return out

    def _compare(self, plain: Any, fast: Any, x: Tensor, gradients: bool, in_training: bool) -> None:
        self._compare_calls(plain, fast, x, gradients, "")
        if any(name.endswith("logit_scale") for name, _ in plain.named_parameters()):
            self._compare_largest_scale(plain, fast, x)
        if self.masks:
            self._compare_masks(plain, fast, x)
        if in_training:
            plain.train()
            fast.train()
            self._compare_calls(plain, fast, x, gradients, " in training")
            self._compare_calls(plain, fast, x, False, " in training without gradients")

    def _compare_calls(self, plain: nn.Module, fast: nn.Module, x: Tensor, gradients: bool, when: str) -> None:
        """Outputs, gradients, random numbers that come next, and what the calls leave behind."""
        results = []
        for module in (plain, fast):
            torch.manual_seed(3)
            leaf = x.clone().requires_grad_(gradients)
            with torch.set_grad_enabled(gradients):
                out = self._result(module, leaf)
            drawn, left = torch.rand(1, device="cpu").double(), self._left
            grads = {}
            if gradients:
                leaves: dict[str, Tensor] = {"the input": leaf, **dict(module.named_parameters())}
                dout = torch.randn(out.shape, generator=_generator(2), dtype=torch.float64)
                found = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
                zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves.values(), found, strict=True)]
                grads = dict(zip(leaves, zeros, strict=True))
            results.append((out.detach(), drawn, grads, left))
        (expected, next_expected, expected_grads, expected_left), (got, next_got, grads, left) = results
        _check(f"another output{when}", got, expected)
        _check(f"other random numbers{when}", next_got, next_expected)
        # What is a sum of terms that cancel is as good as they are.
        floor = 1e-3 * _TOLERANCE * max((g.abs().max().item() for g in expected_grads.values()), default=0.0)
        for name, grad in expected_grads.items():
            _check(f"another gradient of {name}{when}", grads[name], grad, floor=floor)
        for name in (*expected_left, *left):
            _check_left(name, left.get(name, _NOTHING), expected_left.get(name, _NOTHING))

    def _compare_largest_scale(self, plain: nn.Module, fast: nn.Module, x: Tensor) -> None:
        """Where v2's scale has reached its end."""
        results = []
        for module in (plain, fast):
            twin = copy.deepcopy(module)
            _make_scale_largest(twin)
            results.append(self._try(twin, x))
        _check("another output at the largest scale", *reversed(results), tolerance=_TOLERANCE_OF_LARGE_SCORES)

    def _compare_masks(self, plain: nn.Module, fast: nn.Module, x: Tensor) -> None:
        """Where tokens attend to what is masked if -100 is added, as scores of -75 and 75 do, but not if more is."""
        # The halves of the map have opposite signs, and a window that the shift put together has one of each: with keys
        # that are minus the queries, a token's score is low in its own region and high in the next one.
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


def _make_scale_largest(module: nn.Module) -> None:
    for name, p in module.named_parameters():
        if name.endswith("logit_scale"):
            p.data.fill_(8.0)  # much more than ln 100, where it ends


def _make_scores_large(attn: Any) -> None:
    q, k, _ = attn.qkv.weight.data.chunk(3)
    head_dim = len(q) // attn.num_heads
    scale = abs(getattr(attn, "scale", None) or head_dim**-0.5)
    # Rows of a norm's result are about as long as they have elements.
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
        raise _Different(f"{what} (by {error / max(largest, 1e-300):.2g} of the largest element)")


_NOTHING = object()


def _check_left(name: str, got: Any, expected: Any) -> None:
    what = f"something else in {name}, which the forward leaves behind,"
    if isinstance(got, Tensor) and isinstance(expected, Tensor):
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise _Different(what)
        if got.numel():
            _check(what, got.double(), expected.double())
    elif isinstance(got, Tensor) or isinstance(expected, Tensor) or got != expected:
        raise _Different(what)


def _map_of(x: Tensor) -> str:
    return f"a map of {' x '.join(map(str, x.shape[1:-1]))}"


def _generator(seed: int) -> torch.Generator:
    return torch.Generator("cpu").manual_seed(seed)


def _short(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients on, autocast off, tensors on the CPU; random numbers outside are those that would have come."""
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
