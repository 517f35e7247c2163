"""Fuses Linear layers also for small maps and float64, so that tests of small models cover the fused code."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from swinkernels import _extension
from swinkernels.adapters import halves, linear_layers
from swinkernels.adapters.copies import block
from swinkernels.ops import _fused_attention, _fused_linear
from swinkernels.ops._library import is_plain

# Not attributes of swinkernels.ops, which has functions of the same names.
_ATTENTION_HALF, _MLP_HALF = (import_module(f"swinkernels.ops.{name}") for name in ("attention_half", "mlp_half"))


def _fuses(x: Tensor) -> bool:
    return _joins(x) and is_plain((x,))


def _joins(x: Tensor) -> bool:
    is_inference = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
    return x.device.type == "cpu" and is_inference and (torch.compiler.is_dynamo_compiling() or is_plain((x,)))


@contextlib.contextmanager
def called_ops() -> Iterator[list[str]]:
    """Collect the names of all ops that run inside the context."""
    names: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        yield names
    names += [event.name for event in profile.events()]


@contextlib.contextmanager
def modules_seen_by_hooks() -> Iterator[list[str]]:
    """Collect the class names of the modules whose calls a hook of all modules sees, in inference."""
    seen: list[str] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m).__name__))
    try:
        with torch.no_grad():
            yield seen
    finally:
        handle.remove()


def run_kernels_anywhere(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = torch.float32) -> None:
    """Make modules use the CPU kernels on every processor, or skip the test if nothing fuses the dtype here."""
    reason = _extension.error or _fused_linear.why_not_fused(dtype)
    if reason is not None:
        pytest.skip(str(reason))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)


@contextlib.contextmanager
def fused_calls() -> Iterator[list[str]]:
    """Collect the op's name for each product that a fused op computes inside the context; an MLP has two products."""
    names: list[str] = []
    with called_ops() as called:
        yield names
    products = {"mkldnn::_linear_pointwise": 1, "swinkernels::fused_linear": 1, "swinkernels::fused_mlp": 2}
    products["swinkernels::fused_attention_half"] = 2  # with the weights of qkv and proj
    for name in called:
        names += [name] * products.get(name, 0)


@contextlib.contextmanager
def computed_by_layers(by_layers: bool) -> Iterator[None]:
    """Make the ops of halves compute one layer after the other, or all in a single pass, whichever is faster."""
    with contextlib.ExitStack() as stack:
        for op in (_fused_linear._MLP_OP, _fused_attention._OP):
            forced = functools.partial(_with_last, op.overload, by_layers)
            stack.enter_context(mock.patch.object(op, "overload", forced))
        yield


def _with_last(overload: Callable[..., Tensor], last: bool, *arguments: Any) -> Tensor:
    return overload(*arguments[:-1], last)


@contextlib.contextmanager
def always_fused() -> Iterator[None]:
    """Make modules use fused Linear layers and halves for maps of any size and dtype.

    In float64, plain PyTorch still computes the products, so such tests only check which modules are called.
    """
    with (
        mock.patch.object(linear_layers, "fuses", _fuses),
        mock.patch.object(halves, "joins", _joins),
        mock.patch.object(block, "joins", _joins),
        mock.patch.object(_fused_linear, "is_large", _is_not_empty),
        mock.patch.object(_fused_linear, "runs_alone", _is_not_empty),
        mock.patch.object(_ATTENTION_HALF, "runs_alone", _is_not_empty),
        mock.patch.object(_MLP_HALF, "is_large", _is_not_empty),
    ):
        yield


def _is_not_empty(x: Tensor, weight: Tensor) -> bool:
    return x.numel() > 0
