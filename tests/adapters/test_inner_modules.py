"""Tests that subclassing, wrapping or changing inner modules affects accelerated and original modules alike."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters.adapter import original_class
from tests.support.places import PLACES, Place

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
LAYERS = [name for name in PLACES if name.startswith("transformers")]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def mixed(out: Any) -> Any:
    """Change ``out``, a module's result, in a way that a following norm does not undo."""
    return (out[0] + out[0].roll(1, -1), *out[1:]) if isinstance(out, tuple) else out + out.roll(1, -1)


class Wrapper(nn.Module):
    """A wrapper that changes a module's result."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return mixed(self.inner(*args, **kwargs))


def subclass(module: nn.Module) -> None:
    """Change a module's class to a subclass with another forward."""
    kind = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return mixed(kind.forward(self, *args, **kwargs))

    module.__class__ = type(f"My{kind.__name__}", (kind,), {"forward": forward})


def check(place: Place, edit: Callable[[Any], None], *, before_accelerate: bool) -> None:
    plain = place.model()
    fast = copy.deepcopy(plain)
    unchanged = place.run(plain)
    edit(plain)
    if before_accelerate:
        edit(fast)
    swinkernels.accelerate(fast)
    if not before_accelerate:
        edit(fast)
    got, expected = place.run(fast), place.run(plain)
    torch.testing.assert_close(got, expected, **CLOSE)
    assert (expected - unchanged).abs().max() > 1e-6


def inner_paths(place: Place) -> list[str]:
    """List the paths of inner modules of ``place``, except containers, modules without parameters, and the MLP."""
    model = place.model()
    found = []
    for path, module in model.named_modules():
        used = not isinstance(module, (nn.ModuleList, nn.Sequential, nn.Dropout, nn.Softmax, nn.Identity))
        if path and used and not path.startswith(("mlp", "intermediate", "output")):
            found.append(path)
    return found


@every_place
@pytest.mark.parametrize("before_accelerate", [True, False])
def test_subclasses(place, before_accelerate):
    for path in inner_paths(place):
        calls: list[None] = []
        model = place.model()
        handle = model.get_submodule(path).register_forward_hook(lambda *_, calls=calls: calls.append(None))
        place.run(model)
        handle.remove()
        if calls:  # torchvision's attention reads its layers' weights and calls no layer
            check(place, lambda m, path=path: subclass(m.get_submodule(path)), before_accelerate=before_accelerate)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before_accelerate", [True, False])
@pytest.mark.parametrize("inner", ["self", "output", "relative_position_bias"])
def test_wrapped_modules_of_transformers(name, inner, before_accelerate):
    def wrap(layer: Any) -> None:
        layer.attention._modules[inner] = Wrapper(layer.attention._modules[inner])

    if inner in PLACES[name].model().attention._modules:
        check(PLACES[name], wrap, before_accelerate=before_accelerate)


class Halve(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("before_accelerate", [True, False])
def test_replaced_dropout_of_transformers(name, before_accelerate):
    def replace(owner: str) -> Callable[[Any], None]:
        return lambda layer: setattr(layer.get_submodule(owner), "dropout", Halve())

    inside = PLACES[name].model().attention._modules
    for owner in ("attention.self", "attention.output") if "self" in inside else ("",):
        check(PLACES[name], replace(owner), before_accelerate=before_accelerate)


@pytest.mark.skipif("transformers swin" not in PLACES, reason="transformers is not installed")
@pytest.mark.parametrize("before_accelerate", [True, False])
@pytest.mark.parametrize("scaling", [0.1, torch.tensor(0.1, dtype=torch.float64)])
def test_scaling_of_transformers_swin(scaling, before_accelerate):
    def change(layer: Any) -> None:
        layer.attention.scaling = scaling

    check(PLACES["transformers swin"], change, before_accelerate=before_accelerate)


@pytest.mark.skipif("transformers swin" not in PLACES, reason="transformers is not installed")
def test_another_attention_function_of_transformers(monkeypatch):
    """transformers' Swin looks up its attention function by name, so a user can replace the function."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    place = PLACES["transformers swin"]
    plain = place.model()
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: (2 * sdpa(*a, **k)[0], None))
    expected = place.run(plain)
    torch.testing.assert_close(place.run(fast), expected, **CLOSE)


def test_report_says_which_module_is_not_transformers():
    place = PLACES.get("transformers donut") or pytest.skip("transformers is not installed")
    layer = place.model()
    subclass(layer.attention.self)
    (entry,) = swinkernels.accelerate(layer).skipped
    assert entry.reason.startswith("attention.self is a ")
    assert "not transformers' DonutSwinSelfAttention" in entry.reason
    assert original_class(layer).__name__ == "DonutSwinLayer"
