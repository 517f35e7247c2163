"""Tests that the results of checks are kept while a module does not change, and never longer."""

from __future__ import annotations

import collections
import copy
import gc
import importlib.util
import pickle
import sys
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters import checks
from swinkernels.adapters.checks import (
    _MOST_RESULTS,
    Checks,
    keeps_results,
    kept,
    results_and_tensors,
    settled,
)
from swinkernels.adapters.halves import attention_branch
from swinkernels.adapters.microsoft_attention import attention_layers
from swinkernels.ops import _fused_linear, _onednn
from tests.support.fused_products import run_kernels_anywhere
from tests.support.instructions import instructions_of
from tests.support.places import PLACES


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.1)
        self.alone = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(x))


def _look(*_: Any) -> None:
    """Do nothing, as a hook."""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer()
        self.scale = 0.5
        self.window = [7, 7]
        self.nested = {"sizes": [[1], 2], "names": {"a"}}
        self.factor = torch.ones(1)
        self.__dict__["aside"] = nn.Identity()
        self.register_buffer("index", torch.arange(4))
        self.register_forward_hook(_look)
        self._swinkernels_checks = Checks()


def begun(block: Any) -> Any:
    block._swinkernels_checks.begin(block)
    return block


def calls_of(block: Any, answer: Any = None) -> Callable[[], int]:
    """Return a function that begins a call of ``block`` and returns how often its check has run in all calls."""
    ran = []

    def check(module: nn.Module) -> Any:
        assert module is block
        ran.append(0)
        return answer

    def call() -> int:
        assert settled(begun(block), check) is answer
        return len(ran)

    return call


def _taken(module: nn.Module, name: str) -> Any:
    tensor = getattr(module, name)
    delattr(module, name)
    return tensor


# A change that a check may have read -> a function that makes it.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda b: setattr(b, "scale", 0.25),
    "attribute of an inner module": lambda b: setattr(b.layer.drop, "p", 0.2),
    "attribute added": lambda b: setattr(b, "other", None),
    "attribute removed": lambda b: delattr(b, "scale"),
    "mode": lambda b: b.layer.drop.eval(),
    "list in place": lambda b: b.window.append(3),
    "dict in place": lambda b: b.nested.update(more=1),
    "list in a list": lambda b: b.nested["sizes"][0].append(3),
    "set in a dict": lambda b: b.nested["names"].add("b"),
    "plain tensor of one element": lambda b: setattr(b, "factor", torch.ones(1)),
    "plain tensor in place": lambda b: b.factor.mul_(2),
    "equal tensor for a number": lambda b: setattr(b, "scale", torch.tensor(0.5, requires_grad=True)),
    "equal number of another type": lambda b: setattr(b.layer.linear, "in_features", 3.0),
    "forward of an instance": lambda b: setattr(b.layer, "forward", lambda x: x),
    "class": lambda b: setattr(b.layer, "__class__", type("Other", (Layer,), {})),
    "hook": lambda b: b.layer.linear.register_forward_hook(lambda *_: None),
    "hook of the block": lambda b: b.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda b: b.layer.register_full_backward_hook(lambda *_: None),
    "module": lambda b: setattr(b.layer, "linear", nn.Linear(3, 3)),
    "order of modules": lambda b: b.layer.add_module("linear", b.layer._modules.pop("linear")),
    "hook of the block removed": lambda b: b._forward_hooks.clear(),
    "module added": lambda b: b.layer.linear.add_module("inner", nn.Identity()),
    "modules exchanged": lambda b: (
        lambda first, second: (setattr(b.layer, "linear", second), setattr(b.layer, "alone", first))
    )(b.layer.linear, b.layer.alone),
    "parameter removed": lambda b: setattr(b.layer.linear, "bias", None),
    "order of parameters": lambda b: b.layer.linear.register_parameter("weight", _taken(b.layer.linear, "weight")),
    "name of a parameter": lambda b: b.layer.linear.register_parameter("other", _taken(b.layer.linear, "bias")),
    "parameter of another module": lambda b: (
        lambda taken: (
            b.layer.linear.register_parameter("bias", None),
            b.layer.alone._parameters.update({"first": taken, **b.layer.alone._parameters}),
        )
    )(_taken(b.layer.linear, "bias")),
    "dict of another type": lambda b: setattr(b.layer, "_modules", collections.OrderedDict(b.layer._modules)),
    "module in an attribute": lambda b: b.__dict__.update(aside=nn.Identity()),
    "forward instead of a module": lambda b: (b.__dict__.pop("aside"), setattr(b, "forward", _look)),
    "dtype of a parameter": lambda b: setattr(b.layer.linear.weight, "data", torch.zeros(3, 3, dtype=torch.float64)),
    "shape of a parameter": lambda b: setattr(b.layer.linear.bias, "data", torch.zeros(2)),
    "buffer": lambda b: setattr(b, "index", torch.arange(4)),
    "buffer in place": lambda b: b.index.mul_(2),
    "conversion": lambda b: b.double(),
}


@pytest.fixture(params=["compiled", "in Python"])
def comparison(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compare states by the compiled function or by the one in Python, which takes its place without an extension."""
    if request.param == "in Python":
        monkeypatch.setattr(checks, "_compiled", None)
    elif checks._compiled is None:
        pytest.skip("the extension is not compiled")


@pytest.mark.usefixtures("comparison")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_discards_the_results(change):
    block = Block()
    call = calls_of(block)
    assert [call() for _ in range(3)] == [1, 1, 1]
    change(block)
    assert call() == 2


@pytest.mark.parametrize(("kind", "name"), [(Layer, "forward"), (nn.Linear, "forward"), (nn.Module, "__call__")])
def test_a_method_replaced_on_a_class_discards_the_results(kind, name, monkeypatch):
    call = calls_of(Block())
    assert [call(), call()] == [1, 1]
    method = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *args: method(self, *args))
    assert call() == 2


@pytest.mark.parametrize(("owner", "name"), [(torch.nn.functional, "gelu"), (nn.Module, "_call_impl")])
def test_a_replaced_function_discards_the_results(owner, name, monkeypatch):
    block = Block()
    call = calls_of(block)
    assert [call(), call()] == [1, 1]
    function = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **options: function(*args, **options))
    assert call() == 2


@pytest.mark.usefixtures("comparison")
def test_results_come_with_the_current_tensors():
    block = Block()
    for _ in range(2):
        _, tensors = results_and_tensors(begun(block))
        expected = [block.index, *block.layer.linear.parameters(), *block.layer.alone.parameters(), block.factor]
        assert len(tensors) == len(expected)
        assert all(t is e for t, e in zip(tensors, expected, strict=True))
        assert results_and_tensors(block) is None  # they are only known once in a call
        block.layer.linear.bias = nn.Parameter(torch.zeros(3))


def test_the_compiled_comparison_is_used():
    is_compiled = importlib.util.find_spec("swinkernels._state") is not None
    assert is_compiled == (checks._compiled is not None)


@pytest.mark.skipif(checks._compiled is None, reason="the extension is not compiled")
def test_the_compiled_comparison_refuses_other_facts():
    with pytest.raises(TypeError, match="must be tuple"):
        checks._compiled(Block(), [])
    with pytest.raises(IndexError):
        checks._compiled(Block(), ())


@pytest.mark.usefixtures("comparison")
def test_values_of_parameters_do_not_matter():
    block = Block()
    call = calls_of(block)
    call()
    torch.optim.SGD(block.parameters(), 0.1).step()
    with torch.no_grad():
        block.layer.linear.weight.mul_(2)
    block.layer.linear.bias = nn.Parameter(torch.zeros(3))
    block.load_state_dict({k: v for k, v in block.state_dict().items() if k != "index"}, strict=False)
    assert call() == 1


@pytest.mark.parametrize("answer", ["a reason", False])
def test_a_reason_is_found_again_in_every_call(answer):
    call = calls_of(Block(), answer)
    assert [call() for _ in range(3)] == [1, 2, 3]


def test_values_are_kept_by_key():
    block, made = Block(), []

    def get(key: Any, value: Any) -> Any:
        return kept(begun(block), lambda: key, lambda: made.append(key) or value)

    assert [get("a", 1), get("b", 2), get("a", 3), get("b", 4)] == [1, 2, 1, 2]
    assert [get("c", None), get("c", 5)] == [None, None]
    assert get(None, 6) is None  # without a key nothing is made
    assert made == ["a", "b", "c"]
    block.scale = 0.75
    assert [get("a", 6), get("a", 7)] == [6, 6]
    other = copy.copy(block)
    assert kept(other, lambda: "a", lambda: 8) is None


def test_the_arguments_belong_to_the_key():
    block = begun(Block())
    functions = [lambda b, n: 2 * n, lambda b, n: 3 * n]
    assert [settled(block, f, n) for n in (1, 2, 1) for f in functions] == [2, 3, 4, 6, 2, 3]


def test_the_number_of_results_is_limited():
    block = begun(Block())
    for n in range(3 * _MOST_RESULTS):
        assert settled(block, lambda b, n: n + 1, n) == n + 1
    assert len(block._swinkernels_checks.results(block)) <= _MOST_RESULTS


def parametrized(block: Any) -> None:
    block.layer.linear.weight = nn.Parameter(torch.zeros(3, 3).as_subclass(type("Sub", (Tensor,), {})))


@pytest.mark.parametrize("change", [parametrized, CHANGES["hook"]], ids=["tensor subclass", "hook"])
def test_no_result_is_kept(change):
    block = Block()
    change(block)
    call = calls_of(block)
    assert [call(), call()] == [1, 2]
    assert not keeps_results(block)


def test_no_result_is_kept_with_a_hook_of_all_modules():
    call = calls_of(Block())
    assert [call(), call()] == [1, 1]
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert [call(), call()] == [2, 3]
    handle.remove()
    assert call() == 3


def test_no_result_is_kept_in_inference_tensors_or_transforms():
    with torch.inference_mode():
        block = Block()
    call = calls_of(block)
    assert [call(), call()] == [1, 2]
    call = calls_of(Block())
    assert [torch.func.vmap(lambda x: x * call())(torch.ones(1)).item() for _ in range(2)] == [1, 2]


def test_a_module_that_always_changes_is_not_copied(monkeypatch):
    from swinkernels.adapters import checks

    copies = []
    make = checks._State
    monkeypatch.setattr(checks, "_State", lambda *args: copies.append(0) or make(*args))
    block = Block()
    call = calls_of(block)
    for n in range(60):
        block.scale = float(n)
        assert call() == n + 1
    assert len(copies) == 4
    while block._swinkernels_checks._changes != 64:
        call()
    before = call()
    assert [call(), call()] == [before, before]


def test_copies_and_pickles_do_not_share_results():
    block = Block()
    call = calls_of(block)
    call()
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        of_twin = calls_of(twin)
        assert [of_twin(), of_twin()] == [1, 1]
        twin.scale = 1.0
        assert of_twin() == 2
    shallow = copy.copy(block)  # like a replica of DataParallel, which runs in another thread
    of_shallow = calls_of(shallow)
    assert [of_shallow(), of_shallow(), call()] == [1, 2, 1]


def test_a_dead_copy_leaves_the_results_to_the_module():
    block = Block()
    begun(copy.copy(block))
    gc.collect()
    call = calls_of(block)
    assert [call(), call()] == [1, 1]


def model() -> Any:
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.swin_transformer import SwinTransformerBlock

    return SwinTransformerBlock(384, (14, 14), num_heads=12, window_size=7, shift_size=3, drop_path=0.1)


def accelerated(**options: Any) -> Any:
    block = model()
    assert swinkernels.accelerate(block, **options).replaced
    return block


def warmed_up(block: Any) -> Any:
    x = torch.randn(1, 14, 14, 384)
    for is_training in (False, True):
        with torch.set_grad_enabled(is_training):
            block.train(is_training)
            block(x)
            block(x)
            assert block._swinkernels_checks._state.results
    return block


@pytest.mark.parametrize("recompute", [False, True])
def test_results_keep_no_tensor_or_module_alive(recompute):
    block = warmed_up(accelerated(recompute=recompute))
    gc.collect()
    gc.disable()
    try:
        old = [weakref.ref(t) for t in (*block.parameters(), *block.mlp.modules(), *block.attn.modules())]
        block.mlp, block.attn = nn.Identity(), nn.Identity()
        block.load_state_dict({k: v.clone() for k, v in block.state_dict().items()}, assign=True)
        assert not [reference() for reference in old if reference() is not None]
        whole = weakref.ref(block)
        del block
        assert whole() is None
    finally:
        gc.enable()


def test_a_module_pickled_without_checks():
    block = accelerated()
    del block.__dict__[Checks.ATTRIBUTE]
    warmed_up(block)


def test_a_compiled_inner_module_is_called():
    block = warmed_up(accelerated())
    calls = []
    block.mlp.compile(backend=lambda graph, _: calls.append(0) or graph.forward)
    block(torch.randn(1, 14, 14, 384))
    assert calls


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_an_mlp_without_calls_of_its_modules(approximate):
    plain = model().double()
    plain.mlp.act = nn.GELU(approximate)
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    x = torch.randn(1, 14, 14, 384, dtype=torch.float64)
    for block in (plain, fast):
        block.eval()
        for _ in range(3):  # from the second call on, the results of checks are kept
            block.zero_grad()
            y = block(x)
            y.square().sum().backward()
    assert keeps_results(fast)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-9, atol=1e-9)
    for p, q in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-9)


def saved_by(block: Any, x: Tensor) -> list[tuple[torch.Size, torch.dtype]]:
    saved: list[tuple[torch.Size, torch.dtype]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.shape, t.dtype)) or t, lambda t: t):
        block(x)
    return saved


def _transpose(layer: nn.Linear) -> None:
    layer.weight.data = layer.weight.data.t().contiguous().t()


# A change after which the arguments of an op, or the choice of the op, may differ -> a function that makes it.
CHANGES_OF_OPS: dict[str, Callable[[Any], Any]] = {
    "eps of the first norm": lambda b: setattr(b.norm1, "eps", 0.5),
    "eps of the second norm": lambda b: setattr(b.norm2, "eps", 0.5),
    "scale": lambda b: setattr(b.attn, "scale", 1.0) or setattr(b.attn, "fused_attn", False),
    "GELU": lambda b: setattr(b.mlp.act, "approximate", "tanh"),
    "strides": lambda b: [_transpose(layer) for layer in (b.attn.qkv, b.attn.proj, b.mlp.fc1, b.mlp.fc2)],
    "bias of qkv": lambda b: setattr(b.attn.qkv, "bias", None),
    "bias of fc1": lambda b: setattr(b.mlp.fc1, "bias", None),
    "weight of the norm": lambda b: setattr(b.norm2, "weight", None) or setattr(b.norm2, "bias", None),
    "a wider MLP": lambda b: setattr(b.mlp, "fc1", nn.Linear(384, 512)) or setattr(b.mlp, "fc2", nn.Linear(512, 384)),
    "hook of fc2": lambda b: b.mlp.fc2.register_forward_hook(lambda module, args, out: 2 * out),
    "hook of proj": lambda b: b.attn.proj.register_forward_hook(lambda module, args, out: 2 * out),
    "values": lambda b: [p.data.mul_(1.1) for p in b.parameters()],
    "double precision": lambda b: b.double(),
    "bfloat16": lambda b: b.bfloat16(),
    "reference": lambda b: setattr(b, "_swinkernels_backend", "reference"),
}


@pytest.mark.parametrize("change", CHANGES_OF_OPS)
def test_ops_follow_changes(change):
    """After each change, the accelerated block computes what timm's block computes, also if the batch size varies."""
    torch.manual_seed(0)
    plain = model().eval()
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    x = torch.randn(3, 14, 14, 384)
    with torch.no_grad():
        for made in (lambda block: None, CHANGES_OF_OPS[change]):
            for block in (plain, fast):
                torch.manual_seed(1)
                made(block)
            of_block = x.to(plain.norm1.weight.dtype if plain.norm1.weight is not None else torch.float32)
            exact = copy.deepcopy(plain).double()(of_block.double())
            limit = 2e-2 if of_block.dtype == torch.bfloat16 else 1e-5
            for images in (slice(0, 1), slice(0, 3), slice(1, 2)):
                for _ in range(2):
                    got = fast(of_block[images])
                    assert got.dtype == of_block.dtype
                    assert (got - exact[images]).abs().max() <= limit * exact.abs().max()


def test_decisions_belong_to_the_arguments_of_a_call(monkeypatch):
    """The same block and map with another window, shift, mask value or table give another result."""
    run_kernels_anywhere(monkeypatch)
    torch.manual_seed(0)
    block, x = accelerated().eval(), torch.randn(2, 14, 14, 384)
    usual = {"num_heads": 12, "window_size": 7, "shift_size": 3, "mask_value": -100.0, "pad_qkv": block.attn.qkv.bias}
    changes = [{}, {"shift_size": 2}, {"mask_value": -1.0}, {"scale": 1.0}, {"window_size": 2, "shift_size": 1}]
    changes += [{"bias_table": torch.randn(169, 12)}, {"bias": torch.randn(12, 49, 49)}]
    with torch.no_grad():
        for _ in range(2):
            for change in changes:
                block._swinkernels_own_code(x)  # begins a call
                given = {**usual, **change}
                y = attention_branch(block, x, attention_layers, "auto", dict(given), True)
                exact = swinkernels.attention_half(
                    x.double(), *(p.double() for p in block.norm1.parameters()), block.attn.qkv.weight.double(),
                    given.pop("pad_qkv").double(), *(p.double() for p in block.attn.proj.parameters()),
                    backend="reference", **given,
                )  # fmt: skip
                assert (y - exact).abs().max() <= 1e-5 * exact.abs().max()
        assert keeps_results(block)
        with pytest.raises(ValueError, match="bias_table"):
            attention_branch(block, x, attention_layers, "auto", {**usual, "bias_table": torch.randn(170, 12)}, True)


@pytest.mark.parametrize("frozen", ["", "fc1", "fc2"])
def test_checkpointing_saves_the_same_tensors_with_and_without_kept_results(frozen):
    """Otherwise checkpointing fails if the first pass, but not the second, runs with a FLOP counter or a hook."""
    block = warmed_up(accelerated().train())
    for name, p in block.named_parameters():
        p.requires_grad_(not frozen or frozen not in name)
    x = torch.randn(40, 14, 14, 384)  # whose hidden layer is computed in pieces in inference
    kept = saved_by(block, x)
    assert len(kept) > 10
    with mock.patch.object(Checks, "results", return_value=None):
        called = saved_by(block, x)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        counted = saved_by(block, x)
    assert kept == called == counted


# Python 3.11 runs 816 instructions in inference where the kernels of Linear layers run, else about 3,540, and 3,472 in
# training; timm's own block 2,931 and 3,013.
@pytest.mark.skipif(checks._compiled is None, reason="the extension is not compiled")
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="other versions of Python have other instructions")
@pytest.mark.parametrize(("is_training", "most"), [(False, 4000), (True, 3700)])
def test_the_checks_of_a_block_are_cheap(is_training, most, monkeypatch):
    monkeypatch.setattr(_onednn, "outruns_mkl", lambda: False)
    if not is_training and _fused_linear._may_use_kernels(torch.float32):
        most = 950
    block = accelerated().train(is_training)
    x = torch.randn(1, 14, 14, 384)
    with torch.set_grad_enabled(is_training):
        for _ in range(3):
            block(x)
        assert 0 < instructions_of(lambda: block(x)) <= most


# The forms of these places compare their modules with a Snapshot instead.
_WITH_SNAPSHOTS = ("form", "copy")


@pytest.mark.parametrize("name", [name for name in PLACES if name not in _WITH_SNAPSHOTS])
def test_every_library_keeps_results(name):
    """A forward pass changes no module, so each one that looks for results of checks finds them in its second call."""
    fast = PLACES[name].model()
    assert swinkernels.accelerate(fast).replaced
    with torch.no_grad():
        PLACES[name].run(fast)
        PLACES[name].run(fast)
    found = [m._swinkernels_checks for m in fast.modules() if Checks.ATTRIBUTE in m.__dict__]
    assert any(of_module._state is not None and of_module._state.results for of_module in found)
    assert all(of_module._changes == 0 for of_module in found)
