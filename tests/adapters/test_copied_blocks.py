"""Tests ``accelerate`` on copies of Microsoft's block: replaced copies give the same results, others are skipped."""

from __future__ import annotations

import copy
import io
import pickle
import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters import VerificationError
from swinkernels.adapters.copies import block as copied_block
from swinkernels.adapters.copies.attention import StructuralAttention
from swinkernels.adapters.copies.block import StructuralBlock
from tests.support import published_forms as forms
from tests.support.copied_code import refuse_forward
from tests.support.parity import assert_as_good, assert_as_noisy, run

SHIFTED = {"shift_size": 2}


def make(kind: type[nn.Module], *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    block = kind(*args, **options).double().eval()
    with torch.no_grad():
        for name, p in block.named_parameters():
            if name.endswith("qkv.weight"):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif "norm" in name:
                p.normal_(mean=float(name.endswith("weight")), std=0.3)
            elif name.endswith("bias"):
                p.normal_()
    return block


def video_block(shift_size: int = 0, **options: Any) -> nn.Module:
    return forms.VideoBlock(12, 3, shift_size=(shift_size // 2, shift_size, shift_size), **options)


# For each form, a function that builds a block, with or without a shift, and the shapes and arguments of its calls.
FORMS: dict[str, tuple[Any, list[tuple[tuple[int, ...], Any]]]] = {
    "classification": (lambda **o: make(forms.ClassificationBlock, 12, (8, 12), 3, **o), [((96,), None)]),
    "classification, clamped": (lambda **o: make(forms.ClassificationBlock, 12, (3, 6), 3, **o), [((18,), None)]),
    "classification, v2": (lambda **o: make(forms.ClassificationBlockV2, 12, (8, 12), 3, **o), [((96,), None)]),
    "restoration": (
        lambda **o: make(forms.RestorationBlock, 12, (8, 12), 3, **o),
        [((96,), (8, 12)), ((192,), (16, 12)), ((32,), (4, 8))],
    ),
    "segmentation": (
        lambda **o: make(forms.SegmentationBlock, 12, 3, **o),
        [((96,), (8, 12)), ((63,), (9, 7)), ((21,), (3, 7))],
    ),
    "video": (lambda **o: make(video_block, **o), [((4, 8, 12), True), ((3, 9, 7), True), ((1, 3, 6), True)]),
    "map": (
        lambda shift_size=0, **o: make(forms.MapBlock, 12, 3, 4, shift_size, **o),
        [((8, 12), None), ((9, 7), None), ((3, 7), None)],
    ),
}
every_form = pytest.mark.parametrize("name", FORMS)
every_shift = pytest.mark.parametrize("options", [{}, SHIFTED], ids=["plain", "shifted"])


def calls_of(name: str, block: Any) -> list[tuple[Tensor, tuple[Any, ...]]]:
    """Return the calls of a block of form ``name``, each as its input and its other arguments."""
    calls = []
    for shape, given in FORMS[name][1]:
        x = torch.randn(2, *shape, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        if name == "video":
            window, shift = forms.clamped(shape, (2, 4, 4), (1, 2, 2))
            frame = tuple(-(-s // w) * w for s, w in zip(shape, window, strict=True))
            calls.append((x, (forms.make_mask(frame, window, shift),)))
        elif name == "segmentation":
            frame = tuple(-(-s // 4) * 4 for s in given)
            calls.append((x, (forms.make_mask(frame, (4, 4), (2, 2)),)))
        else:
            calls.append((x, () if given is None else (given,)))
    return calls


def run_call(name: str, block: Any, index: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    x, others = calls_of(name, block)[index]
    if name == "segmentation":
        block.H, block.W = FORMS[name][1][index][1]
    return run(block, x.to(dtype), *others)


def accelerated(module: Any, **options: Any) -> Any:
    fast = copy.deepcopy(module)
    report = swinkernels.accelerate(fast, **options)
    assert report.replaced, report
    assert not report.skipped, report
    return fast


def reason_of(block: nn.Module) -> str:
    """Check that ``accelerate`` skips the block (it may replace the attention), and return the reported reason."""
    report = swinkernels.accelerate(block)
    assert {e.path for e in report.replaced} <= {"attn"}
    assert not isinstance(block, StructuralBlock)
    (entry,) = report.skipped
    assert entry.path == ""
    assert entry.adapter == "structural"
    return entry.reason


def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later call of the blocks' own attention fail."""
    refuse_forward(monkeypatch, forms.WindowAttention)


# Same results as the block's own code


@every_form
@every_shift
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_outputs_and_every_gradient(name, options, dtype, monkeypatch):
    block = FORMS[name][0](**options)
    fast = accelerated(block).to(dtype)
    plain = copy.deepcopy(block).to(dtype)
    for i in range(len(FORMS[name][1])):
        exact, expected = run_call(name, block, i), run_call(name, plain, i, dtype)
        with monkeypatch.context() as patch:
            ops_only(patch)
            got = run_call(name, fast, i, dtype)
        assert_as_good(got, expected, exact)


@every_form
def test_drop_path_draws_the_same(name, monkeypatch):
    block = FORMS[name][0](drop_path=0.5, **SHIFTED).train()
    fast, results = accelerated(block), []
    for module in (block, fast):
        torch.manual_seed(7)
        results.append(run_call(name, module, 0))
        results[-1]["next random number"] = torch.rand(1).double()
        ops_only(monkeypatch)
    assert_as_good(results[1], results[0], results[0])
    assert not torch.equal(results[0]["out"], run_call(name, fast.eval(), 0)["out"]), "drop path was not active"


def test_attention_dropout_is_the_ops():
    block = make(forms.ClassificationBlock, 12, (8, 12), 3)
    block.attn.attn_drop.p = 0.5
    fast = accelerated(block)
    expected = run_call("classification", block, 0)
    assert_as_good(run_call("classification", fast, 0), expected, expected)
    fast.train()
    x = calls_of("classification", fast)[0][0]
    torch.manual_seed(3)
    first = fast(x)
    assert not torch.equal(first, fast(x))
    torch.manual_seed(3)
    assert torch.equal(first, fast(x))


def test_checkpointing():
    block = make(forms.VideoBlock, 12, 3, shift_size=(1, 2, 2), use_checkpoint=True, drop_path=0.5).train()
    fast, results = accelerated(block), []
    for module in (block, fast):
        torch.manual_seed(7)
        results.append(run_call("video", module, 1))
    assert_as_good(results[1], results[0], results[0])


def test_norms_on_ops(monkeypatch):
    """The residual connection and its norm run as one op if drop path is an Identity or timm's DropPath."""
    from swinkernels.adapters import norms

    seen: list[Any] = []
    op = norms.residual_layer_norm
    monkeypatch.setattr(norms, "residual_layer_norm", lambda *a, **k: (seen.append(0), op(*a, **k))[1])
    block = make(forms.ClassificationBlock, 12, (8, 12), 3, **SHIFTED)
    fast = accelerated(block, backend="reference")
    seen.clear()
    exact = run_call("classification", block, 0)
    assert_as_good(run_call("classification", fast, 0), exact, exact)
    assert len(seen) == 1
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    block.drop_path, fast.drop_path = layers.DropPath(0.5), layers.DropPath(0.5)
    results = []
    for module in (block.train(), fast.train()):
        torch.manual_seed(7)
        results.append(run_call("classification", module, 0))
    assert_as_good(results[1], results[0], results[0])
    assert len(seen) == 2


def test_autocast_bfloat16():
    block = make(forms.ClassificationBlockV2, 12, (8, 12), 3, **SHIFTED)
    exact = run_call("classification, v2", block, 0)
    plain = block.float()
    fast = accelerated(plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [run_call("classification, v2", module, 0, torch.float32) for module in (fast, plain)]
    assert_as_noisy(*results, exact)


# Deviations from the published forms


class OtherMaskValue(forms.ClassificationBlock):
    def calculate_mask(self, size):
        return 0.5 * super().calculate_mask(size)


class OtherMaskWhereItIsMade(forms.RestorationBlock):
    """A block with mask value -200 for sizes other than its own; the results differ only on extreme inputs."""

    def calculate_mask(self, size):
        return super().calculate_mask(size) * (1 if tuple(size) == self.input_resolution else 2)


class NoMask(forms.MapBlock):
    def forward(self, x):
        shift, self.shift_size = self.shift_size, 0
        y = torch.roll(super().forward(torch.roll(x, (-shift, -shift), (1, 2))), (shift, shift), (1, 2))
        self.shift_size = shift
        return y


class TalkingHeads(forms.WindowAttention):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.talk = nn.Linear(self.num_heads, self.num_heads)

    def mix(self, probabilities):
        return self.talk(probabilities.movedim(1, -1)).movedim(-1, 1)


class OtherScale(forms.WindowAttention):
    def scores(self, q, k):
        return q @ k.mT * self.dim**-0.5


class ExtraBias(forms.WindowAttention):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.absolute = nn.Parameter(torch.zeros(self.window_size[0] * self.window_size[1]))

    def bias(self, n):
        return super().bias(n) + self.absolute


class HiddenOffset(forms.WindowAttention):
    """Attention with an offset and a gain of the bias, which are neutral (0 and 1) in this instance."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("offset", torch.zeros(()))
        self.gain = torch.ones(())

    def bias(self, n):
        return super().bias(n) * self.gain + self.offset * torch.arange(n)


class OtherClamp(forms.CosineAttention):
    """v2 attention with a larger limit on the logit scale; the results differ only for a scale beyond v2's limit."""

    def scores(self, q, k):
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * self.logit_scale.clamp(max=5.0).exp()


class ColumnsFirst(forms.ClassificationBlock):
    """A block that orders the tokens of a window column by column, although the bias table is for row-major order."""

    def attend(self, x, window, shift, mask):
        return super().attend(x.transpose(1, 2), window, shift, mask).transpose(1, 2).contiguous()


class ThirdNorm(forms.ClassificationBlock):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.norm3 = nn.LayerNorm(self.dim)

    def forward(self, x):
        return self.norm3(super().forward(x))


class OtherInTraining(forms.ClassificationBlock):
    def both_halves(self, shortcut, y):
        return super().both_halves(shortcut, 0.9 * y if self.training else y)


class WithoutGradient(forms.ClassificationBlock):
    def both_halves(self, shortcut, y):
        return super().both_halves(shortcut.detach(), y)


class DrawsMore(forms.ClassificationBlock):
    def forward(self, x):
        if self.training:
            torch.rand(1)
        return super().forward(x)


class NeighboursMask(forms.SegmentationBlock):
    """A block that applies the stage's mask even if its own shift_size is 0."""

    def forward(self, x, mask_matrix):
        y = self.norm1(x).view(len(x), self.H, self.W, -1)
        y = self.padded(y, (self.window_size,) * 2, (self.shift_size,) * 2, mask_matrix)
        return self.both_halves(x, y.view(x.shape))


def attended_by(attention: type[nn.Module], base: Any = forms.ClassificationBlock) -> Any:
    return type(f"{attention.__name__}Block", (base,), {"attention": attention})


SIZE = (12, (8, 12), 3)
REFUSED: dict[str, tuple[Any, str]] = {
    "another mask value": (lambda: OtherMaskValue(*SIZE, **SHIFTED), "attn_mask differs"),
    "another mask where it is made": (
        lambda: OtherMaskWhereItIsMade(*SIZE, **SHIFTED),
        "another output where masks matter",
    ),
    "no mask": (lambda: NoMask(12, 3, 4, 2), "another output"),
    "talking heads": (lambda: attended_by(TalkingHeads)(*SIZE), "another output"),
    "another scale": (lambda: attended_by(OtherScale)(*SIZE), "another output"),
    "an extra bias": (lambda: attended_by(ExtraBias)(*SIZE, **SHIFTED), "another output"),
    "an offset of 0": (lambda: attended_by(HiddenOffset)(*SIZE), "another output"),
    "another clamp": (
        lambda: attended_by(OtherClamp, forms.ClassificationBlockV2)(*SIZE),
        "another output at the largest scale",
    ),
    "columns first": (lambda: ColumnsFirst(*SIZE), "another output"),
    "a third norm": (lambda: ThirdNorm(*SIZE), "another output"),
    "another factor in training": (lambda: OtherInTraining(*SIZE), "another output in training"),
    "a gradient less": (lambda: WithoutGradient(*SIZE), "another gradient of the input"),
    "more random numbers": (lambda: DrawsMore(*SIZE), "other random numbers in training"),
    "a mask without shift": (lambda: NeighboursMask(12, 3), "another output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_a_published_form_is_refused(name):
    torch.manual_seed(0)
    create, words = REFUSED[name]
    block = create().double().eval()
    fast = copy.deepcopy(block)
    assert words in reason_of(fast)
    swinkernels.accelerate(fast, backend="reference")  # may replace the block's attention
    kinds = {forms.RestorationBlock: "restoration", forms.MapBlock: "map", forms.SegmentationBlock: "segmentation"}
    kind = next((kinds[cls] for cls in kinds if isinstance(block, cls)), "classification")
    results = []
    for module in (block, fast):
        torch.manual_seed(7)
        results.append(run_call(kind, module.train(), 0))
    assert_as_good(results[1], results[0], results[0])


class PadsBefore(forms.SegmentationBlock):
    """A block that pads before the map's tokens instead of after them; maps of whole windows give the same results."""

    def padded(self, x, window, shift, mask):
        h, w = (-s % n for s, n in zip(x.shape[1:-1], window, strict=True))
        return self.attend(F.pad(x, (0, 0, w, 0, h, 0)), window, shift, mask)[:, h:, w:].contiguous()


class WindowsByColumn(forms.ClassificationBlock):
    """A block that orders the windows, and their masks, column by column."""

    def attend(self, x, window, shift, mask):
        size, axes = tuple(x.shape[1:-1]), (1, 2)
        counts = [s // w for s, w in zip(size, window, strict=True)]
        order = torch.arange(counts[0] * counts[1]).reshape(counts).T.flatten()
        x = torch.roll(x, [-s for s in shift], axes)
        windows = forms.cut(x, window).unflatten(0, (len(x), -1))[:, order]
        y = self.attn(windows.flatten(0, 1), None if mask is None else mask[order])
        y = y.unflatten(0, (len(x), -1))[:, order.argsort()].flatten(0, 1)
        return torch.roll(forms.join(y, window, size), shift, axes)


def test_deviations_on_some_maps_only_run_the_blocks_own_code_there(monkeypatch):
    block = make(PadsBefore, 12, 3, **SHIFTED)
    fast = accelerated(block)
    assert fast._swinkernels_form.maps == {"whole", "small, whole"}
    for i in range(3):
        exact = run_call("segmentation", block, i)
        assert_as_good(run_call("segmentation", fast, i), exact, exact)
    ops_only(monkeypatch)
    run_call("segmentation", fast, 0)


@every_shift
def test_an_order_of_windows_that_nobody_sees_is_no_deviation(options, monkeypatch):
    block = make(WindowsByColumn, *SIZE, **options)
    exact, fast = run_call("classification", block, 0), accelerated(block)
    ops_only(monkeypatch)
    assert_as_good(run_call("classification", fast, 0), exact, exact)


class TakesAnIndex(forms.ClassificationBlock):
    def forward(self, x, x_size, rpi, attn_mask):
        return super().forward(x)


class ReturnsMore(forms.ClassificationBlock):
    def forward(self, x):
        return super().forward(x), None


class Raises(forms.ClassificationBlock):
    def forward(self, x):
        raise ValueError("not today")


class CannotBeCopied(forms.ClassificationBlock):
    def __deepcopy__(self, memo):
        raise TypeError("this block cannot be copied")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (TakesAnIndex, "its forward takes (self, x, x_size, rpi, attn_mask), which matches no known form"),
        (ReturnsMore, "it returns a tuple, not a tensor"),
        (Raises, "its forward refused a trial on random inputs: ValueError: not today"),
        (CannotBeCopied, "cannot be copied for a trial: TypeError: this block cannot be copied"),
    ],
)
def test_blocks_that_cannot_be_tried(kind, words):
    assert words in reason_of(kind(*SIZE))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: setattr(b, "forward", lambda x: x), "its forward was replaced on the instance"),
        (lambda b: setattr(b.attn, "forward", lambda x, mask: x), "attn.forward was replaced on the instance"),
        (lambda b: setattr(b.attn, "qkv", nn.Identity()), "attn.qkv is a Identity, not an nn.Linear"),
        (lambda b: setattr(b.attn, "softmax", nn.Sigmoid()), "attn.softmax is a Sigmoid"),
        (lambda b: setattr(b.attn, "scale", torch.ones(())), "attn.scale is a Tensor"),
        (lambda b: b.attn.proj.register_forward_hook(print), "a hook is registered on attn.proj"),
        (lambda b: b.attn.relative_position_index.add_(1), "attn.relative_position_index differs"),
        (lambda b: setattr(b.attn, "window_size", (5, 5)), "not the table of its window_size"),
        (lambda b: b.attn_mask.zero_(), "attn_mask differs"),
        (lambda b: b.to("meta"), "meta"),
    ],
)
def test_instances_that_are_not_what_their_class_is(change, words):
    block = forms.ClassificationBlock(*SIZE, **SHIFTED)
    change(block)
    assert words in reason_of(block)


def test_one_trial_for_blocks_of_a_kind(monkeypatch):
    trials: list[Any] = []
    try_forms = copied_block._try_forms
    monkeypatch.setattr(
        copied_block, "_try_forms", lambda block, width: (trials.append(block), try_forms(block, width))[1]
    )
    monkeypatch.setattr(copied_block, "_TRIALS", {})
    monkeypatch.setattr(copied_block, "_AT_OWN_WIDTH", {})
    blocks = [forms.ClassificationBlock(*SIZE, shift_size=s, drop_path=p) for s in (0, 2) for p in (0.1, 0.2)]
    assert len(swinkernels.accelerate(nn.ModuleList(blocks)).replaced) == 4
    assert len(trials) == 2
    swinkernels.accelerate(forms.ClassificationBlock(16, (8, 12), 4, drop_path=0.1))  # a short trial with 16 channels
    assert len(trials) == 2
    odd = forms.ClassificationBlock(*SIZE)
    odd.flag = True  # an attribute that forward might read
    swinkernels.accelerate(odd)
    assert len(trials) == 3


def test_a_trial_leaves_no_trace():
    block = make(forms.ClassificationBlock, *SIZE, drop_path=0.3, **SHIFTED).train()
    block.attn.qkv.weight.requires_grad_(False)
    fired: list[Any] = []
    for hooked in (block, block.norm1, block.mlp.fc2):
        hooked.register_forward_hook(lambda *_: fired.append(0))
    block(calls_of("classification", block)[0][0]).sum().backward()
    before = [t.clone() for t in (*block.state_dict().values(), torch.get_rng_state())]
    grads = {name: None if p.grad is None else p.grad.clone() for name, p in block.named_parameters()}
    state, fired[:] = random.getstate(), []
    copied_block._TRIALS.clear()
    copied_block._AT_OWN_WIDTH.clear()
    with torch.inference_mode(), torch.device("meta"):
        assert swinkernels.accelerate(block).replaced
    assert random.getstate() == state
    after = [*block.state_dict().values(), torch.get_rng_state()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    for name, p in block.named_parameters():
        assert (p.grad is None) == (grads[name] is None)
        assert p.grad is None or torch.equal(p.grad, grads[name])
    assert not block.attn.qkv.weight.requires_grad
    assert block.training
    assert not fired
    assert len(block.mlp.fc2._forward_hooks) == 1


# Calls that the trial does not cover


def test_another_mask_than_the_standard_one():
    block = make(forms.SegmentationBlock, 12, 3, **SHIFTED)
    fast = accelerated(block)
    x, (mask,) = calls_of("segmentation", block)[1]
    for module in (block, fast):
        module.H, module.W = 9, 7
    for other in (2 * mask, torch.randn_like(mask), mask.bool().double()):
        exact = run(block, x, other)
        assert_as_good(run(fast, x, other), exact, exact)
    expected = block(x, mask_matrix=mask)
    torch.testing.assert_close(fast(x, mask_matrix=mask), expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(TypeError, match="another"):
        fast(x, another=mask)


def test_a_mask_or_geometry_that_is_put_there_later():
    block = make(forms.ClassificationBlock, *SIZE, **SHIFTED)
    fast, x = accelerated(block), calls_of("classification", block)[0][0]
    standard = block.attn_mask
    for put in ("assigned", "registered"):
        for mask in (3 * standard, standard.clone()):
            for module in (block, fast):
                if put == "assigned":
                    module.attn_mask = mask
                else:
                    module.register_buffer("attn_mask", mask)
            torch.testing.assert_close(fast(x), block(x), rtol=1e-10, atol=1e-12)
    for module in (block, fast):
        module.attn_mask = None
    torch.testing.assert_close(fast(x), block(x), rtol=1e-10, atol=1e-12)


def test_wrong_calls_raise_what_they_raised():
    block = make(forms.RestorationBlock, *SIZE)
    fast = accelerated(block)
    x = torch.randn(2, 63, 12, dtype=torch.float64)
    for module in (block, fast):
        with pytest.raises(RuntimeError, match="shape"):
            module(x, (9, 7))  # SwinIR pads the image; its blocks do not pad
        with pytest.raises(TypeError):
            module(x)


def test_changes_after_accelerate(monkeypatch):
    block = make(forms.ClassificationBlock, *SIZE, **SHIFTED)
    fast, x = accelerated(block), calls_of("classification", block)[0][0]
    seen: list[Any] = []
    handle = fast.attn.softmax.register_forward_hook(lambda *_: seen.append(0))
    torch.testing.assert_close(fast(x), block(x), rtol=1e-10, atol=1e-12)
    assert len(seen) == 1
    assert "attn.softmax" in swinkernels.accelerate(fast).skipped[0].reason
    assert type(fast) is forms.ClassificationBlock  # the block's class did not change
    handle.remove()
    swinkernels.accelerate(fast)
    for module in (block, fast):
        module.attn.scale = 0.7
    expected = block(x)
    ops_only(monkeypatch)
    torch.testing.assert_close(fast(x), expected, rtol=1e-10, atol=1e-12)


# State and interface of a model with copied blocks


class Model(nn.Module):
    """A model with a stage of fixed size, and a stage whose mask forward computes at every call, as in mmseg."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 12)
        self.first = nn.ModuleList(
            forms.ClassificationBlock(12, (8, 12), 3, shift_size=s, drop_path=0.2) for s in (0, 2)
        )
        self.second = nn.ModuleList(forms.SegmentationBlock(12, 3, shift_size=s, drop_path=0.2) for s in (0, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.first:
            x = block(x)
        x = x.unflatten(1, (8, 12))[:, :7, :9].flatten(1, 2)
        mask = forms.make_mask((8, 12), (4, 4), (2, 2)).to(x)
        for block in self.second:
            block.H, block.W = 7, 9
            x = block(x, mask)
        return x


def make_input(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(2, 96, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_keys_types_copies_and_restore(monkeypatch):
    model = make(Model)
    classes = [type(m) for m in model.modules()]
    attributes = [set(m.__dict__) for m in model.modules()]
    x, keys = make_input(), list(model.state_dict())
    fast, expected = accelerated(model), model(x)
    assert list(fast.state_dict()) == keys
    assert all(isinstance(m, c) for m, c in zip(fast.modules(), classes, strict=True))
    fast.load_state_dict(model.state_dict(), strict=True)
    copy.deepcopy(model).load_state_dict(fast.state_dict(), strict=True)
    buffer = io.BytesIO()
    torch.save(fast, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), torch.load(buffer, weights_only=False)]
    with monkeypatch.context() as patch:
        ops_only(patch)
        for again in copies:
            assert [type(m) for m in again.modules()] == [type(m) for m in fast.modules()]
            torch.testing.assert_close(again(x), expected, rtol=1e-10, atol=1e-12)
    assert swinkernels.accelerate(fast) == swinkernels.accelerate(fast)
    assert sum(isinstance(m, StructuralBlock) for m in fast.modules()) == 4
    assert sum(isinstance(m, StructuralAttention) for m in fast.modules()) == 2
    with pytest.raises(RuntimeError, match=r"swinkernels\.restore\(model\)"):
        torch.jit.script(fast.first[0])
    for again in (fast, *copies):
        swinkernels.restore(again)
        assert [type(m) for m in again.modules()] == classes
        assert [set(m.__dict__) for m in again.modules()] == attributes
        assert torch.equal(again(x), expected)


def test_training_the_model():
    model = make(Model).train()
    for p in model.first[0].parameters():
        p.requires_grad_(False)
    fast, results = accelerated(model), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, make_input()))
    assert not any(name.startswith("first.0") for name in results[1])
    assert_as_good(results[1], results[0], results[0])


def test_hooks_see_what_they_saw():
    model = make(Model)
    fast = accelerated(model)
    seen: dict[nn.Module, list[Tensor]] = {model: [], fast: []}
    for m, tensors in seen.items():
        for path in ("first.1", "second.1", "second.1.norm1", "first.0.mlp"):
            m.get_submodule(path).register_forward_hook(lambda _m, i, out, t=tensors: t.extend((i[0], out)))
        m(make_input())
    assert len(seen[fast]) == 8
    for got, expected in zip(seen[fast], seen[model], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_compile_fullgraph(monkeypatch):
    torch._dynamo.reset()
    model = nn.Sequential(*make(Model).first)
    x = calls_of("classification", None)[0][0]
    exact, fast = run(model, x), accelerated(model)
    ops_only(monkeypatch)
    got = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), x)
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, exact, exact)


def test_compile_blocks_that_are_called_with_masks(monkeypatch):
    """In compiled code a mask cannot be inspected, so the block's own code runs and only the attention uses the op."""
    torch._dynamo.reset()
    block = make(forms.VideoBlock, 12, 3, shift_size=(1, 2, 2))
    x, (mask,) = calls_of("video", block)[0]
    exact = run(block, x, mask)
    fast = accelerated(block, backend="reference")
    ops_only(monkeypatch)
    got = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), x, mask)
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, exact, exact)


@pytest.mark.filterwarnings("ignore")  # the tracer's warnings
def test_torchscript_tracing_traces_the_blocks_own_code(monkeypatch):
    model = make(Model)
    fast, x = accelerated(model), make_input()
    expected = model(x)
    monkeypatch.setattr(copied_block, "window_attention_qkvpacked", None)
    traced = torch.jit.trace(fast, x, check_trace=False)
    torch.testing.assert_close(traced(x), expected, rtol=1e-10, atol=1e-12)


def test_compiled_models_are_left_alone():
    model = torch.compile(Model(), backend="eager")
    report = swinkernels.accelerate(model)
    assert [(e.adapter, e.path) for e in report.skipped] == [("structural", "")]
    assert "torch.compile" in report.skipped[0].reason


# verify and the report


@every_form
def test_verify_passes(name):
    block = FORMS[name][0](**SHIFTED)
    assert swinkernels.accelerate(block, verify=True).replaced
    assert swinkernels.accelerate(block.float(), verify=True).replaced


def test_verify_finds_a_wrong_kernel_and_names_the_module(monkeypatch):
    model = make(Model)
    swinkernels.accelerate(model)  # runs the trials once
    swinkernels.restore(model)
    op = copied_block.window_attention_qkvpacked

    def wrong_op(qkv, **arguments):
        return op(qkv, **{**arguments, "pad_qkv": None})

    monkeypatch.setattr(copied_block, "window_attention_qkvpacked", wrong_op)
    with pytest.raises(VerificationError, match=r"second\.0: the output is off by"):
        swinkernels.accelerate(model, verify=True)
    assert not any(isinstance(m, StructuralBlock) for m in model.modules())


def test_report():
    from swinkernels.ops._backends import NOT_INSTALLED

    model = make(Model).float()
    model.first[0].attn.scale = torch.ones(())
    report = swinkernels.accelerate(model)
    backend = "cpu" if NOT_INSTALLED["cpu"] is None else "reference"
    assert [(e.path, e.module_class, e.adapter, e.backend) for e in report.replaced] == [
        ("first.1", "ClassificationBlock", "structural", backend),
        ("second.0", "SegmentationBlock", "structural", backend),
        ("second.0.attn", "WindowAttention", "structural", backend),
        ("second.1", "SegmentationBlock", "structural", backend),
        ("second.1.attn", "WindowAttention", "structural", backend),
    ]
    assert [(e.path, e.module_class) for e in report.skipped] == [("first.0", "ClassificationBlock")]
