"""Tests accelerated modules called with odd arguments: they return the library's results, or raise if it raises."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters.adapter import Accelerated
from tests.adapters.test_forms import ROUNDED
from tests.support.small_models import FAMILIES, make_input, make_model

Call = tuple[tuple[Any, ...], dict[str, Any]]


def _first(change: Callable[[Tensor], Tensor]) -> Callable[[Call], Call]:
    def changed(call: Call) -> Call:
        (x, *others), named = call
        return (change(x), *others), named

    return changed


def _others(change: Callable[[Any], Any]) -> Callable[[Call], Call]:
    def changed(call: Call) -> Call:
        (x, *others), named = call
        return (x, *map(change, others)), {name: change(value) for name, value in named.items()}

    return changed


ODD: dict[str, Callable[[Call], Call]] = {
    "one more axis": _first(lambda x: x[None]),
    "no batch": _first(lambda x: x[0]),
    "fewer tokens": _first(lambda x: x.narrow(1, 1, x.shape[1] - 1)),
    "fewer columns": _first(lambda x: x.narrow(-2, 0, x.shape[-2] - 1)),
    "other strides": _first(lambda x: x.transpose(0, -1).contiguous().transpose(0, -1)),
    "float32 map": _first(lambda x: x.float()),
    "one image": _first(lambda x: x[:1]),
    "other tensors": _others(lambda a: a + 0.5 if isinstance(a, Tensor) and a.is_floating_point() else a),
    "longer tensors": _others(lambda a: torch.cat([a, a]) if isinstance(a, Tensor) and a.dim() else a),
    "no tensors": _others(lambda a: None if isinstance(a, Tensor) else a),
    "other numbers": _others(lambda a: a + 1 if type(a) is int else a),
    "other sizes": _others(lambda a: type(a)(n + 1 for n in a) if _is_size(a) else a),
}


def _is_size(value: Any) -> bool:
    return type(value) in (tuple, list) and all(type(n) is int for n in value)


def _first_calls(model: nn.Module, x: Tensor) -> dict[str, Call]:
    """Run ``model`` on ``x`` and return {path: call arguments} of the first accelerated module of each class."""
    calls: dict[str, Call] = {}
    classes = {}
    for path, module in model.named_modules():
        if isinstance(module, Accelerated):
            classes.setdefault(type(module), path)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: calls.setdefault(path, (args, kwargs)), with_kwargs=True
        )
        for path in classes.values()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return {path: call for path, call in calls.items() if call[0] and isinstance(call[0][0], Tensor)}


def _outcome(module: nn.Module, call: Call) -> list[Tensor] | Exception:
    args, named = copy.deepcopy(call)
    torch.manual_seed(3)
    try:
        result = module(*args, **named)
    except Exception as error:
        return error
    flat = torch.utils._pytree.tree_leaves(result)
    return [t for t in flat if isinstance(t, Tensor)]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_odd_calls_end_as_in_the_library(family: str) -> None:
    model = make_model(family)
    fast = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swinkernels.accelerate(fast)
        model(make_input(family))  # some blocks store the size of their map in this call
        for path, call in _first_calls(fast, make_input(family)).items():
            for name, change in ODD.items():
                try:
                    odd = change(call)
                except (IndexError, RuntimeError):
                    continue  # the change needs an axis that the first argument lacks
                got, expected = _outcome(fast.get_submodule(path), odd), _outcome(model.get_submodule(path), odd)
                where = f"{path} with {name}: {got!r:.300}, but the library's own code gives {expected!r:.300}"
                if isinstance(expected, Exception):  # without a shift, the library may read an unused mask's size
                    assert isinstance(got, Exception) or name == "no tensors", where
                    continue
                assert not isinstance(got, Exception), where
                assert [t.shape for t in got] == [t.shape for t in expected], where
                for g, e in zip(got, expected, strict=True):
                    assert g.dtype == e.dtype, where
                    tolerance = ROUNDED.get(family, 1e-9) if e.dtype == torch.float64 else 1e-4
                    torch.testing.assert_close(
                        g, e, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, where=where: f"{where}: {m}"
                    )
