"""Tests of methods that other code, such as weight offloading, bound to an instance: they follow the module's class."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch

import swinkernels
from swinkernels.adapters.adapter import Accelerated
from tests.support.places import PLACES

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())


def bind(module: Any) -> None:
    """Assign the class's own forward to the instance, as tools do when they remove a hook."""
    module.forward = module.forward


def hook(module: Any) -> list[None]:
    """Wrap forward as weight offloading does; return a list to which every call appends an entry."""
    calls: list[None] = []
    old = module.forward
    module._old_forward = old

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return module._old_forward(*args, **kwargs)

    module.forward = functools.update_wrapper(functools.partial(new_forward, module), old)
    return calls


@every_place
@pytest.mark.parametrize("wrap", [bind, hook])
def test_restore_after_the_accelerated_forward_was_bound(place, wrap):
    plain = place.model()
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    calls = wrap(fast)
    expected = place.run(plain)
    torch.testing.assert_close(place.run(fast), expected, **CLOSE)
    swinkernels.restore(fast)
    assert not any(isinstance(m, Accelerated) for m in fast.modules())
    assert torch.equal(place.run(fast), expected)
    assert calls is None or len(calls) == 2


@every_place
@pytest.mark.parametrize("wrap", [bind, hook])
def test_a_second_accelerate(place, wrap):
    plain = place.model()
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    wrap(fast)
    report = swinkernels.accelerate(fast, backend="reference")
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)
    if wrap is bind:
        assert not report.skipped, str(report)
        assert all("was replaced" not in remark for e in report.replaced for remark in e.remarks)


@every_place
@pytest.mark.parametrize("wrap", [bind, hook])
def test_what_was_bound_before(place, wrap, monkeypatch):
    """If forward was bound or wrapped before, results stay the same; a bound forward is rebound to the new class."""
    plain = place.model()
    fast = copy.deepcopy(plain)
    wrap(fast)
    report = swinkernels.accelerate(fast)
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)
    if wrap is bind:
        assert report.replaced
        assert fast.forward.__func__ is type(fast).forward
        swinkernels.restore(fast)
        assert fast.forward.__func__ is type(plain).forward


def test_copies_of_a_module_with_a_bound_forward():
    place = PLACES.get("timm swin") or pytest.skip("timm is not installed")
    fast = place.model()
    swinkernels.accelerate(fast)
    bind(fast)
    expected = place.run(fast)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert twin.forward.__self__ is twin
        swinkernels.restore(twin)
        torch.testing.assert_close(place.run(twin), expected, **CLOSE)
