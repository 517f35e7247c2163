"""Tests that changes to buffers and methods after ``accelerate`` have the same effect as in the library's module."""

from __future__ import annotations

import copy
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters import bypass
from swinkernels.adapters.adapter import Accelerated, original_class
from tests.support.places import PLACES, Place
from tests.support.sweeps import in_turn, long_but

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
every_place = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
with_index = pytest.mark.parametrize(
    "place",
    [p for p in PLACES.values() if p.index_of is not None],
    ids=[name for name, p in PLACES.items() if p.index_of is not None],
)


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def pair(place: Place) -> tuple[Any, Any]:
    """Return a module and its accelerated copy, which has run once."""
    plain = place.model()
    fast = copy.deepcopy(plain)
    report = swinkernels.accelerate(fast)
    assert report.replaced, str(report)
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)
    return plain, fast


def check(place: Place, plain: Any, fast: Any, before: Tensor) -> None:
    """Check that after the same edit the results of ``plain`` and ``fast`` agree and differ from ``before``."""
    expected = place.run(plain)
    assert (expected - before).abs().max() > 1e-3, "the edit changes nothing"
    torch.testing.assert_close(place.run(fast), expected, **CLOSE)


def other_index(module: nn.Module) -> Tensor:
    return module.relative_position_index.flip(-1)


# Buffers


def assign(module: nn.Module) -> None:
    module.relative_position_index = other_index(module)


def change_in_place(module: nn.Module) -> None:
    module.relative_position_index.copy_(other_index(module))


def load(module: nn.Module) -> None:
    module._non_persistent_buffers_set.discard("relative_position_index")
    module.load_state_dict({**module.state_dict(), "relative_position_index": other_index(module)})


def load_by_assigning(module: nn.Module) -> None:
    module._non_persistent_buffers_set.discard("relative_position_index")
    module.load_state_dict({**module.state_dict(), "relative_position_index": other_index(module)}, assign=True)


@with_index
@pytest.mark.parametrize("edit", [assign, change_in_place, load, load_by_assigning])
def test_index_of_the_bias_table(place, edit):
    plain, fast = pair(place)
    before = place.run(plain)
    for model in (plain, fast):
        edit(model.get_submodule(place.index_of))
    check(place, plain, fast, before)


@pytest.mark.parametrize("name", [n for n in PLACES if n.startswith("timm swin")])
@pytest.mark.parametrize("in_place", [False, True])
def test_stored_mask(name, in_place):
    plain, fast = pair(PLACES[name])
    before = PLACES[name].run(plain)
    for block in (plain, fast):
        if in_place:
            block.attn_mask.mul_(0.01)
        else:
            block.attn_mask = 0.01 * block.attn_mask
    check(PLACES[name], plain, fast, before)


def test_lookups_of_tensorflows_bias():
    place = PLACES["timm maxvit, channels first"]
    plain, fast = pair(place)
    before = place.run(plain)
    for model in (plain, fast):
        model.attn.rel_pos.height_lookup.copy_(model.attn.rel_pos.height_lookup.flip(1))
    check(place, plain, fast, before)


def test_the_same_values_keep_the_op(monkeypatch):
    """The op is still used if a stored tensor that was moved, loaded or assigned has the standard values."""
    from swinkernels.adapters.libraries.timm import _blocks

    place = PLACES["timm swin"]
    _, fast = pair(place)
    calls = []
    op = _blocks.window_attention_qkvpacked
    monkeypatch.setattr(_blocks, "window_attention_qkvpacked", lambda *a, **k: calls.append(0) or op(*a, **k))
    for edit in (
        lambda m: m.to(torch.float32).to(torch.float64),
        lambda m: m.load_state_dict(m.state_dict()),
        lambda m: setattr(m.attn, "relative_position_index", m.attn.relative_position_index.clone()),
        lambda m: m.attn.relative_position_index.add_(0),
        lambda m: m.set_input_size((12, 8), (4, 4)),
    ):
        edit(fast)
        fast(torch.randn(1, *fast.input_resolution, 16, dtype=torch.float64))
    assert len(calls) == 5


# Methods


def methods(place: Place) -> list[tuple[type, str, str]]:
    """Return the library's methods that the ops replace, as (class, method name, path of a module of this class)."""
    fast = place.model()
    swinkernels.accelerate(fast)
    found = {}
    for path, module in fast.named_modules():
        kind = original_class(module)
        for name, _ in bypass._PUBLISHED.get(kind, ()):
            found.setdefault((kind, name), path)
    return [(kind, name, path) for (kind, name), path in found.items()]


def scaled(method: Any) -> Any:
    def patched(*args: Any, **kwargs: Any) -> Any:
        out = method(*args, **kwargs)
        if isinstance(out, tuple):
            return (0.5 * out[0], *out[1:])
        return None if out is None else 0.5 * out

    return patched


@every_place
def test_methods_patched_on_the_class(place, monkeypatch):
    plain, fast = pair(place)
    tried = methods(place)
    assert len(tried) >= 2
    for kind, name, _ in tried:
        with monkeypatch.context() as patch:
            is_static = isinstance(inspect.getattr_static(kind, name), staticmethod)
            patched = scaled(getattr(kind, name))
            patch.setattr(kind, name, staticmethod(patched) if is_static else patched)
            got, expected = place.run(fast), place.run(plain)
        torch.testing.assert_close(got, expected, **CLOSE, msg=lambda m, k=kind, n=name: f"{k}.{n}: {m}")
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)


@every_place
@pytest.mark.parametrize("kind", [nn.Linear, nn.Module])
def test_the_call_of_a_torch_class_patched(place, kind, monkeypatch):
    plain, fast = pair(place)
    monkeypatch.setattr(kind, "__call__", scaled(kind.__call__))
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)


@every_place
def test_methods_replaced_on_an_instance(place):
    for _, name, path in methods(place):
        plain, fast = pair(place)
        for model in (plain, fast):
            module = model.get_submodule(path)
            setattr(module, name, scaled(getattr(module, name)))
        got, expected = place.run(fast), place.run(plain)
        torch.testing.assert_close(got, expected, **CLOSE, msg=lambda m, p=path, n=name: f"{p}.{n}: {m}")


def test_a_class_patched_before_the_first_accelerate_is_told(monkeypatch):
    """A method patched before the first ``accelerate`` is detected if its code is not from the package of its class."""
    from timm.models.swin_transformer import WindowAttention

    monkeypatch.setattr(WindowAttention, "forward", scaled(WindowAttention.forward))
    monkeypatch.setitem(bypass._PUBLISHED, WindowAttention, ())
    bypass.watch(WindowAttention)
    (entry,) = swinkernels.accelerate(PLACES["timm swin"].model()).skipped
    assert entry.reason == "WindowAttention.forward was replaced on the class"


def test_a_call_patched_by_a_function_in_a_decorator_of_torch_counts(monkeypatch):
    call = nn.GELU.__call__
    assert not bypass.is_patched(nn.GELU)
    monkeypatch.setattr(nn.GELU, "__call__", torch.no_grad()(lambda self, x: 2 * call(self, x)))
    assert bypass.is_patched(nn.GELU)


def test_a_class_without_a_file_can_be_watched(monkeypatch):
    """A class whose module has no file, such as one from an interactive session, can be watched."""
    kind = type("Session", (nn.Module,), {"forward": lambda self, x: x, "__module__": "session"})
    monkeypatch.setitem(sys.modules, "session", types.ModuleType("session"))
    bypass.watch(kind)
    assert not bypass.is_patched(kind)


# Hooks of all modules

HOOKS = {
    "forward": lambda hook: nn.modules.module.register_module_forward_hook(hook),
    "forward_pre": lambda hook: nn.modules.module.register_module_forward_pre_hook(hook),
    "full_backward": lambda hook: nn.modules.module.register_module_full_backward_hook(hook),
    "full_backward_pre": lambda hook: nn.modules.module.register_module_full_backward_pre_hook(hook),
}


@every_place
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_of_all_modules_see_every_call(place, kind):
    plain, fast = pair(place)
    seen: dict[str, list[type]] = {}
    for name, model in (("plain", plain), ("fast", fast)):
        calls = seen.setdefault(name, [])
        handle = HOOKS[kind](lambda module, *_, calls=calls: calls.append(original_class(module)))
        try:
            with torch.enable_grad():
                place.run(model).sum().backward()
        except RuntimeError:  # torch raises this for the in-place ReLU of v2
            calls.append(RuntimeError)
        finally:
            handle.remove()
    assert seen["plain"]
    assert seen["fast"] == seen["plain"]
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)


# Compilers


def compiled_places() -> list[str]:
    names = ("timm swin", "torchvision v2", "transformers swin", "transformers donut", "form", "copy")
    return [n for n in names if n in PLACES]


@pytest.mark.parametrize(
    "name", long_but(compiled_places(), "timm swin", "torchvision v2", "transformers donut", "copy")
)
def test_code_that_was_compiled_notices_an_assigned_index(name):
    torch._dynamo.reset()
    place = PLACES[name]
    plain, fast = pair(place)
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(fast, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    before = place.run(compiled)
    torch.testing.assert_close(before, place.run(plain), **CLOSE)
    for model in (plain, fast):
        assign(model.get_submodule(place.index_of))
    check(place, plain, compiled, before)
    assert len(graphs) == 2


EDITS = {"assign": assign, "change in place": change_in_place}


@pytest.mark.parametrize(("name", "edit"), in_turn(compiled_places(), [*EDITS]))
def test_code_compiled_after_a_change(name, edit):
    """An index changed before compilation takes effect, although the module has not run since the change."""
    torch._dynamo.reset()
    place = PLACES[name]
    plain, fast = pair(place)
    before = place.run(plain)
    for model in (plain, fast):
        EDITS[edit](model.get_submodule(place.index_of))
    check(place, plain, torch.compile(fast, fullgraph=True, backend="eager"), before)


@pytest.mark.parametrize(("name", "strict"), in_turn(compiled_places(), [False, True]))
def test_export_after_a_change(name, strict):
    place = PLACES[name]
    plain, fast = pair(place)
    inputs = place.inputs(torch.Generator().manual_seed(1))
    before = place.run(plain)
    for model in (plain, fast):
        assign(model.get_submodule(place.index_of))
    exported = torch.export.export(fast, inputs, strict=strict).module()
    check(place, plain, exported, before)


def ops_in(exported: torch.export.ExportedProgram) -> int:
    return sum("swinkernels" in str(node.target) for node in exported.graph.nodes)


@pytest.mark.parametrize(("name", "strict"), in_turn(compiled_places(), [False, True]))
def test_export_keeps_the_op(name, strict):
    """An export contains the op even if the module was converted after ``accelerate`` and has not run since."""
    place = PLACES[name]
    fast = place.model().float()
    swinkernels.accelerate(fast, backend="cpu")
    fast.to(torch.bfloat16).to(torch.float32)
    x, *size = place.inputs(torch.Generator().manual_seed(1))
    assert ops_in(torch.export.export(fast, (x.float(), *size), strict=strict)) == 1


def test_nothing_is_kept_in_the_library_after_restore():
    model = PLACES["timm swin"].model()
    names = set(model.__dict__)
    swinkernels.accelerate(model)
    assert isinstance(model, Accelerated)
    swinkernels.restore(model)
    assert set(model.__dict__) == names
