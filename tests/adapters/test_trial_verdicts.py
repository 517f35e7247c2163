"""Tests that a trial's verdict applies only to blocks with the same code and settings, and only until they change."""

from __future__ import annotations

import copy
import dataclasses
import enum
import types
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters.copies.attention import StructuralAttention
from swinkernels.adapters.copies.block import StructuralBlock
from tests.support import published_forms as forms
from tests.support.instructions import instructions_of

SIZE = 12, (8, 12), 3


def image() -> Tensor:
    return torch.randn(2, 96, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def make(kind: type[nn.Module] = forms.ClassificationBlock, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(*SIZE, **options).double().eval()


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


# Forward methods that give different results for many tokens


class OtherwiseAboveATokenCount(forms.MapBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[1] * x.shape[2] < 700 else 1.5 * y


def test_more_tokens_than_a_number_in_the_code_are_tried():
    torch.manual_seed(0)
    block = OtherwiseAboveATokenCount(12, 3, 4, 2).double().eval()
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast)
    x = torch.randn(1, 28, 28, 12, dtype=torch.float64)
    assert_same(fast(x), block(x))


class OtherwiseAboveASetting(forms.MapBlock):
    def __init__(self, setting: Any, *args: Any) -> None:
        super().__init__(*args)
        self.setting = setting

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        most = self.setting if isinstance(self.setting, int) else self.setting.most
        return y if x.shape[1] * x.shape[2] < most else 1.5 * y


@pytest.mark.parametrize("setting", [700, types.SimpleNamespace(most=700)], ids=["attribute", "settings object"])
def test_more_tokens_than_a_number_in_an_attribute_are_tried(setting):
    torch.manual_seed(0)
    block = OtherwiseAboveASetting(setting, 12, 3, 4, 2).double().eval()
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast)
    x = torch.randn(1, 28, 28, 12, dtype=torch.float64)
    assert_same(fast(x), block(x))


class OtherwiseOnItsOwnMap(forms.ClassificationBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[1] < 700 else 1.5 * y


def test_a_map_of_more_tokens_than_a_number_in_the_code_is_tried():
    torch.manual_seed(0)
    block = OtherwiseOnItsOwnMap(12, (28, 28), 3).double().eval()
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast)
    x = torch.randn(1, 784, 12, dtype=torch.float64)
    assert_same(fast(x), block(x))


# Forward methods that give different results in one dtype or for many images


class Otherwise(forms.ClassificationBlock):
    """A block that multiplies its output by 1.5 if ``differs`` returns True for the input."""

    differs: Any

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 1.5 * y if self.differs(x) else y


@pytest.mark.parametrize(
    ("differs", "words"),
    [
        (lambda x: x.dtype == torch.float16, "another output for 2 images in torch.float16"),
        (lambda x: x.dtype == torch.bfloat16, "another output for 2 images in torch.bfloat16"),
        (lambda x: x.dtype == torch.float32, "another output for 16 images in torch.float32"),
        (lambda x: x.element_size() == 2, "another output for 2 images in torch.float16"),
        (lambda x: len(x) > 2, "another output for 16 images in torch.float32"),
        (lambda x: len(x) >= 16, "another output for 16 images in torch.float32"),
    ],
)
def test_a_forward_that_differs_in_a_dtype_or_for_many_images(differs, words):
    (entry,) = swinkernels.accelerate(make(type("Other", (Otherwise,), {"differs": staticmethod(differs)}))).skipped
    assert words in entry.reason


class OtherInFloat16(forms.WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x, mask)
        return 1.5 * y if x.dtype == torch.float16 else y


def test_an_attention_that_differs_in_a_dtype():
    report = swinkernels.accelerate(OtherInFloat16(12, (4, 4), 3).double().eval())
    assert "images in torch.float16" in report.skipped[0].reason


# Instances with different settings


class Mode(enum.Enum):
    PLAIN = 1
    SCALED = 2


@dataclasses.dataclass
class Settings:
    factor: float


class Factor(forms.ClassificationBlock):
    """A block that multiplies its output by a factor that it reads from ``setting``, an object of any type."""

    setting: Any

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.factor()

    def factor(self) -> Any:
        setting = self.setting
        if isinstance(setting, dict):
            return setting["factor"]
        if isinstance(setting, Mode):
            return 2.0 if setting is Mode.SCALED else 1.0
        if isinstance(setting, Tensor):
            return setting.double().mean()
        if isinstance(setting, np.ndarray):
            return float(setting)
        if callable(setting):
            return setting()
        return getattr(setting, "factor", setting)


SETTINGS: dict[str, Any] = {
    "namespace": lambda factor: types.SimpleNamespace(factor=factor),
    "dict": lambda factor: {"factor": factor},
    "dataclass": Settings,
    "enum": lambda factor: Mode.PLAIN if factor == 1.0 else Mode.SCALED,
    "numpy scalar": np.float64,
    "numpy array": lambda factor: np.asarray(factor),
    "int tensor": lambda factor: torch.tensor([int(factor)]),
    "bool tensor": lambda factor: torch.tensor([factor == 1.0, False]).repeat(2)[:1],
    "closure": lambda factor: lambda: factor,
    "nested": lambda factor: types.SimpleNamespace(factor=factor, inner=[{"x": factor}]),
}


@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.parametrize("as_buffer", [False, True])
def test_a_verdict_is_not_shared_by_instances_that_differ_in_a_setting(kind, as_buffer):
    if as_buffer and "tensor" not in kind:
        return
    blocks = []
    for factor in (1.0, 2.0):
        block = make(Factor)
        if as_buffer:
            block.register_buffer("setting", SETTINGS[kind](factor))
        else:
            block.setting = SETTINGS[kind](factor)
        blocks.append(block)
    model = nn.ModuleList(blocks)
    expected = [block(image()) for block in model]
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast)
    for block, result in zip(fast, expected, strict=True):
        assert_same(block(image()), result)
    assert isinstance(fast[0], StructuralBlock)
    assert not isinstance(fast[1], StructuralBlock)


# Changes after acceleration


class Drifting(forms.ClassificationBlock):
    """A block that adds the values of several attributes, initially 0, to its output."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.offset = 0.0
        self.settings = types.SimpleNamespace(offset=0.0, history=[0.0])
        self.attn.offset = 0
        self.T = 0.0
        self.attn.H = 0
        self.p = 0.0
        self.register_buffer("steps", torch.zeros(1, dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        extra = self.offset + self.settings.offset + self.settings.history[0] + self.attn.offset + self.steps.to(x)
        extra = extra + self.T + self.attn.H + self.p
        return super().forward(x) + extra + getattr(self, "late", 0.0) + getattr(self, "W", 0.0)

    def helper(self) -> None: ...


def _patch(block: Any, name: str) -> None:
    method = getattr(block, name)
    setattr(block, name, lambda *args, **options: 2 * method(*args, **options))


CHANGES: dict[str, Any] = {
    "a float": lambda b: setattr(b, "offset", 1.0),
    "a float with the name of a size": lambda b: setattr(b, "T", 0.5),
    "an int with the name of a size": lambda b: setattr(b.attn, "H", 1),
    "a new attribute with the name of a size": lambda b: setattr(b, "W", 0.5),
    "a float with the name of a rate": lambda b: setattr(b, "p", 0.5),
    "an attribute of the attention": lambda b: setattr(b.attn, "offset", 1),
    "inside of an object": lambda b: setattr(b.settings, "offset", 1.0),
    "inside of a list": lambda b: b.settings.history.__setitem__(0, 1.0),
    "another object": lambda b: setattr(b, "settings", types.SimpleNamespace(offset=1.0, history=[0.0])),
    "a new attribute": lambda b: setattr(b, "late", 1.0),
    "a buffer in place": lambda b: b.steps.add_(1),
    "another buffer": lambda b: setattr(b, "steps", torch.ones(1, dtype=torch.long)),
    "the index in place": lambda b: b.attn.relative_position_index.copy_(b.attn.relative_position_index.flip(0)),
    "the mask in place": lambda b: b.attn_mask.mul_(0.01),
    "a method of the attention": lambda b: _patch(b.attn, "scores"),
    "a method of the block": lambda b: _patch(b, "attend"),
    "the softmax's forward": lambda b: _patch(b.attn.softmax, "forward"),
    "the attention wrapped": lambda b: setattr(b, "attn", WrappedAttention(b.attn)),
}


class WrappedAttention(nn.Module):
    def __init__(self, attn: nn.Module) -> None:
        super().__init__()
        self.inner = attn
        self.offset = 0
        self.H = 0

    def forward(self, *args: Any, **options: Any) -> Tensor:
        return 2 * self.inner(*args, **options)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("then", ["", "deepcopy"])
def test_what_is_changed_later_is_noticed(change, then):
    block = make(Drifting, shift_size=2)
    fast = copy.deepcopy(block)
    assert swinkernels.accelerate(fast, backend="reference").replaced[0].path == ""
    assert fast._swinkernels_call(image(), (), {}) == ((8, 12), -100.0)
    before = block(image())
    for module in (block, fast):
        CHANGES[change](module)
    if then:
        fast = copy.deepcopy(fast)
    expected = block(image())
    assert not torch.allclose(expected, before)
    assert isinstance(fast._swinkernels_call(image(), (), {}), str)
    assert_same(fast(image()), expected)


@pytest.mark.parametrize("cls", [forms.WindowAttention, forms.ClassificationBlock, nn.Softmax, nn.Linear, nn.Module])
@pytest.mark.parametrize("name", ["forward", "__call__"])
def test_code_patched_on_the_class_is_noticed(cls, name, monkeypatch):
    block = make(shift_size=2)
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast)
    before = block(image())
    method = getattr(cls, name)
    with monkeypatch.context() as patch:
        patch.setattr(cls, name, lambda self, *args, **options: 0.5 * method(self, *args, **options))
        expected = block(image())
        assert_same(fast(image()), expected)
    assert torch.equal(expected, before) == (cls is nn.Module and name == "forward")
    assert isinstance(fast._swinkernels_call(image(), (), {}), tuple)


class RecordsItsSize(forms.MapBlock):
    """A block that records the size of its last map, as some published blocks do."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.H = self.W = None

    def forward(self, x: Tensor) -> Tensor:
        self.H, self.W = x.shape[1:3]
        return super().forward(x)


def test_a_recorded_size_is_no_change():
    block = RecordsItsSize(12, 3, 4, 2)
    swinkernels.accelerate(block, backend="reference")
    for size in ((8, 12), (9, 7)):
        block.H, block.W = size
        assert block._swinkernels_call(torch.randn(1, *size, 12), (), {}) == (size, -100.0)


def test_hooks_of_all_modules_are_noticed():
    block = make(shift_size=2)
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast)
    hook = lambda module, args, out: 2 * out if isinstance(module, nn.Softmax) else None  # noqa: E731
    with torch.nn.modules.module.register_module_forward_hook(hook):
        assert_same(fast(image()), block(image()))
    assert isinstance(fast._swinkernels_call(image(), (), {}), tuple)


def test_moving_and_loading_keep_the_op():
    block = make(shift_size=2)
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast, backend="reference")
    for change in (
        lambda b: b.float(),
        lambda b: b.load_state_dict({k: v.clone() for k, v in b.state_dict().items()}),
        lambda b: b.load_state_dict({k: v.clone() for k, v in b.state_dict().items()}, assign=True),
        lambda b: b.train(),
        lambda b: setattr(b, "label", "first"),  # no method reads it
    ):
        change(fast)
        assert isinstance(fast._swinkernels_call(image().float(), (), {}), tuple)


def test_a_compiled_block_notices_attributes():
    torch._dynamo.reset()
    block = make(Drifting, shift_size=2)
    fast = copy.deepcopy(block)
    swinkernels.accelerate(fast, backend="reference")
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    assert_same(compiled(image()), block(image()))
    block.offset = fast.offset = 1.0
    assert_same(compiled(image()), block(image()))


def test_the_checks_of_a_call_are_cheap():
    """A call checks six modules (block, attention, qkv, proj, softmax, dropout) in at most 200 instructions each.

    Python 3.11 runs 965 bytecode instructions, in 12 us.
    """
    block = make(shift_size=2)
    swinkernels.accelerate(block)
    block(image())
    executed = instructions_of(block._swinkernels_changed)
    assert 0 < executed <= 6 * 200, executed


# Forward methods that give different results only in training


class DiffersInTraining(forms.ClassificationBlock):
    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return 2 * out if self.training and torch.is_grad_enabled() else out


def test_a_forward_that_differs_in_training_with_gradients():
    report = swinkernels.accelerate(make(DiffersInTraining))
    assert "in training" in report.skipped[0].reason


# Side effects


class KeepsItsOutput(forms.WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.last = super().forward(x, mask)
        return self.last


class CollectsLosses(forms.WindowAttention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.losses: list[Tensor] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask)
        self.losses.append(out.square().mean())
        return out


LOG: list[Tensor] = []


class LogsToAGlobal(forms.WindowAttention):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        out = super().forward(x, mask)
        LOG.append(out.square().mean())
        return out


def _logs_to_a_closure() -> Any:
    log: list[Tensor] = []

    class LogsToAClosure(forms.WindowAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            out = super().forward(x, mask)
            log.append(out.square().mean())
            return out

    return LogsToAClosure


class CountsInABuffer(forms.WindowAttention):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls += 1
        return super().forward(x, mask)


@pytest.mark.parametrize(
    "attention", [KeepsItsOutput, CollectsLosses, LogsToAGlobal, _logs_to_a_closure(), CountsInABuffer]
)
@pytest.mark.parametrize("base", [forms.ClassificationBlock, forms.HybridBlock])
def test_an_attention_that_leaves_something_behind_is_left_alone(attention, base):
    if base is forms.HybridBlock:  # accelerate runs a trial only of a HybridBlock's attention
        block = nn.ModuleDict({"attn": attention(12, (4, 4), 3)}).double()
    else:
        block = make(type("Block", (base,), {"attention": attention}), shift_size=2)
    report = swinkernels.accelerate(block)
    assert not report.replaced
    assert any("after the call" in entry.reason for entry in report.skipped), report
    assert not any(isinstance(m, (StructuralBlock, StructuralAttention)) for m in block.modules())
    assert not LOG, "the trial left something behind"


# Arguments passed explicitly with their default values


class PassesItsDefault(forms.ClassificationBlock):
    """A block that passes pos_embed=None to its attention, as nnFormer does.

    It scales the result, so it matches no known form of block.
    """

    class attention(forms.WindowAttention):
        def forward(self, x: Tensor, mask: Tensor | None = None, pos_embed: Any = None) -> Tensor:
            assert pos_embed is None
            return super().forward(x, mask)

    def attend(self, x: Tensor, window: Any, shift: Any, mask: Any) -> Tensor:
        attn = self.attn
        windows = forms.cut(torch.roll(x, [-s for s in shift], (1, 2)), window)
        out = forms.join(attn(windows, mask, pos_embed=None), window, tuple(x.shape[1:-1]))
        return torch.roll(out, shift, (1, 2)) * 1.5


def test_an_argument_equal_to_its_default_passes(monkeypatch):
    from swinkernels.adapters.copies import attention

    block = make(PassesItsDefault, shift_size=2)
    fast = copy.deepcopy(block)
    report = swinkernels.accelerate(fast, backend="reference")
    assert [entry.path for entry in report.replaced] == ["attn"]
    calls: list[Any] = []
    op = attention.window_attention_qkvpacked
    monkeypatch.setattr(attention, "window_attention_qkvpacked", lambda *a, **k: (calls.append(0), op(*a, **k))[1])
    assert_same(fast(image()), block(image()))
    assert len(calls) == 1


class _Makes(OrderedDict):
    """A dict that calls a value when it is read, like transformers' table of activations."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


ACTIVATIONS = _Makes(gelu=nn.GELU)


class BlockWithATable(forms.ClassificationBlock):
    def forward(self, x):
        return super().forward(ACTIVATIONS["gelu"](x))


def test_a_trial_leaves_tables_that_make_what_they_are_asked_for():
    swinkernels.accelerate(BlockWithATable(12, (8, 12), 3, 4))
    assert dict(dict.items(ACTIVATIONS)) == {"gelu": nn.GELU}
