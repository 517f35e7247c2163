"""Tests ``accelerate`` on blocks of unknown form, in which it replaces only the window attention."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters import VerificationError
from swinkernels.adapters.copies import attention as adapter
from swinkernels.adapters.copies.attention import StructuralAttention
from tests.support import published_forms as forms
from tests.support.copied_code import refuse_forward
from tests.support.parity import assert_as_good, assert_as_noisy, run


def make(kind: Any, *args: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    module = kind(*args, **options).eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                p.normal_()
    return module


def hybrid(shift: int = 2) -> Any:
    return make(forms.HybridBlock, 12, (8, 12), 3, shift_size=shift)


def index_of(window: int = 4) -> Tensor:
    return forms.WindowAttention(12, (window, window), 3).relative_position_index


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    x = torch.randn(2, 96, 12, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x, (8, 12), index_of(), forms.make_mask((8, 12), (4, 4), (2, 2)).to(dtype)


def accelerated(module: nn.Module, **options: Any) -> Any:
    fast = copy.deepcopy(module)
    report = swinkernels.accelerate(fast, **options)
    assert [e.path for e in report.replaced] == ["attn"]
    assert sum(isinstance(m, StructuralAttention) for m in fast.modules()) == 1
    return fast


def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later call of the attention's own forward fail."""
    refuse_forward(monkeypatch, forms.WindowAttention)


# Same results as the module's own code


@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
@pytest.mark.parametrize("shift", [0, 2])
def test_outputs_and_every_gradient(shift, backend, monkeypatch):
    block = hybrid(shift)
    exact = run(copy.deepcopy(block).double(), *inputs(torch.float64))
    plain, fast = run(block, *inputs()), accelerated(block, backend=backend)
    ops_only(monkeypatch)
    assert_as_good(run(fast, *inputs()), plain, exact)


class Wrapped(nn.Module):
    """A block of unknown form that calls attention of v1 or v2."""

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.attn = attention(12, (3, 5), 3)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.attn(x, mask)


@pytest.mark.parametrize("attention", [forms.WindowAttention, forms.CosineAttention])
@pytest.mark.parametrize("masked", [False, True])
def test_both_versions_with_any_mask(attention, masked, monkeypatch):
    model = make(Wrapped, attention)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 15, 12, generator=generator)
    mask = torch.randn(4, 15, 15, generator=generator) if masked else None
    exact = run(copy.deepcopy(model).double(), x.double(), mask)
    plain, fast = run(model, x, mask), accelerated(model, backend="reference")
    ops_only(monkeypatch)
    assert_as_good(run(fast, x, mask), plain, exact)


def test_a_mask_that_learns_gets_its_gradient():
    model = make(Wrapped, forms.WindowAttention).double()
    x = torch.randn(8, 15, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    grads = []
    for m in (model, accelerated(model, backend="reference")):
        mask = torch.ones(4, 15, 15, dtype=torch.float64, requires_grad=True)
        m(x, mask).square().sum().backward()
        grads.append(mask.grad)
    torch.testing.assert_close(*grads, rtol=1e-8, atol=1e-10)


def test_autocast_bfloat16():
    block = hybrid()
    exact = run(copy.deepcopy(block).double(), *inputs(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        results = [run(m, *inputs()) for m in (accelerated(block), block)]
    assert_as_noisy(*results, exact)


def test_compile_fullgraph(monkeypatch):
    """Masks are not inspected, so a mask can be an argument of a compiled model."""
    torch._dynamo.reset()
    block = hybrid()
    exact = run(copy.deepcopy(block).double(), *inputs(torch.float64))
    plain, fast = run(block, *inputs()), accelerated(block)
    ops_only(monkeypatch)
    got = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), *inputs())
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, plain, exact)


# Cases in which the module's own code runs


def test_windows_beyond_the_limits_of_the_op():
    module = make(Wrapped, forms.WindowAttention)
    module.attn.window_size = (32, 33)
    (skipped,) = swinkernels.accelerate(module, backend="torch").skipped
    assert skipped.reason == "its windows have 1056 tokens, and the op accepts at most 1024"


def test_calls_that_the_trial_says_nothing_of():
    model = make(Wrapped, forms.WindowAttention)
    fast = accelerated(model, backend="reference")
    x = torch.randn(8, 15, 12, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(4, 15, 15)
    for arguments in ((x[:, :9],), (x, mask[:3]), (x, mask[..., :9])):
        if arguments[0].shape[1] == 9:
            assert torch.equal(fast(*arguments), model(*arguments))
            continue
        for m in (model, fast):
            with pytest.raises(RuntimeError):
                m(*arguments)
    for m in (model, fast):
        with pytest.raises(TypeError):
            m.attn(x, mask, mask=mask)
        with pytest.raises(TypeError):
            m.attn(x, other=mask)


def test_hooks():
    model = make(Wrapped, forms.WindowAttention)
    fast = accelerated(model, backend="reference")
    x = torch.randn(8, 15, 12, generator=torch.Generator().manual_seed(1))
    seen: list[Any] = []
    fast.attn.softmax.register_forward_hook(lambda *_: seen.append(0))
    assert torch.equal(fast(x), model(x))
    assert len(seen) == 1
    (entry,) = swinkernels.accelerate(fast).skipped
    assert (entry.path, entry.reason) == ("attn", "a hook is registered on attn.softmax")
    assert type(fast.attn) is forms.WindowAttention


class Talking(forms.WindowAttention):
    def mix(self, probabilities):
        return probabilities.flip(1)


class MaskTwice(forms.WindowAttention):
    """Attention that adds the mask twice, like two models of transformers."""

    def forward(self, x, mask=None):
        return super().forward(x, mask if mask is None else 2 * mask)


class OtherArguments(forms.WindowAttention):
    def forward(self, x, y):
        return super().forward(x + y)


class OtherClamp(forms.CosineAttention):
    def scores(self, q, k):
        cosine = nn.functional.normalize(q, dim=-1) @ nn.functional.normalize(k, dim=-1).mT
        return cosine * self.logit_scale.clamp(max=5.0).exp()


@pytest.mark.parametrize("attention", [Talking, MaskTwice, OtherClamp])
def test_what_is_not_a_published_form_is_refused(attention):
    (entry,) = swinkernels.accelerate(make(Wrapped, attention)).skipped
    assert (entry.path, entry.module_class, entry.adapter) == ("attn", attention.__name__, "structural")
    assert "gave another output" in entry.reason


def test_a_module_with_other_arguments_is_named_with_what_it_lacks():
    (entry,) = swinkernels.accelerate(make(Wrapped, OtherArguments)).skipped
    assert entry.path == "attn"
    assert "an argument mask after x (its forward takes (self, x, y))" in entry.reason


def test_a_refused_block_with_a_refused_attention_is_told_once():
    block = hybrid()
    block.attn.__class__ = type("Own", (forms.IndexedAttention,), {"mix": Talking.mix})
    (entry,) = swinkernels.accelerate(block).skipped
    assert entry.path == ""
    assert "its forward takes (self, x" in entry.reason


# The model's state and interface


def test_keys_types_copies_and_restore(monkeypatch):
    block = hybrid()
    fast, keys = accelerated(block, backend="reference"), list(block.state_dict())
    expected = block(*inputs())
    assert list(fast.state_dict()) == keys
    assert isinstance(fast.attn, forms.IndexedAttention)
    block.load_state_dict(fast.state_dict(), strict=True)
    copies = [copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))]
    with monkeypatch.context() as patch:
        ops_only(patch)
        for again in copies:
            assert type(again.attn) is type(fast.attn)
            torch.testing.assert_close(again(*inputs()), expected, rtol=1e-4, atol=1e-5)
    assert swinkernels.accelerate(fast) == swinkernels.accelerate(fast)
    for again in (fast, *copies):
        swinkernels.restore(again)
        assert type(again.attn) is forms.IndexedAttention
        assert torch.equal(again(*inputs()), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_verify(dtype, monkeypatch):
    block = hybrid().to(dtype)
    accelerated(block, verify=True)
    op = adapter.window_attention_qkvpacked

    def wrong_op(qkv, bias, **arguments):
        return op(qkv, bias=1.1 * bias, **arguments)

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", wrong_op)
    with pytest.raises(VerificationError, match="attn: the output is off by"):
        swinkernels.accelerate(block, backend="reference", verify=True)


def test_attention_dropout():
    model = make(Wrapped, forms.WindowAttention)
    model.attn.attn_drop.p = 0.5
    fast = accelerated(model.train(), backend="reference")
    x = torch.randn(8, 15, 12)
    assert not torch.equal(fast(x), fast(x))
    assert torch.equal(fast.eval()(x), fast(x))
