"""Tests that attention weights are computed only if they are read, with the values that the module computes."""

from __future__ import annotations

import copy
import io
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import swinkernels
from swinkernels.adapters.forms.deferred import deferred
from tests.support import other_forms
from tests.support.parity import assert_as_good, randomise, run
from tests.support.small_models import make_input, make_model


@pytest.fixture
def stages() -> tuple[Any, Any]:
    torch.manual_seed(0)
    plain = other_forms.HeatmapStage(12, (8, 12), 3, 4).double().eval()
    randomise(plain)
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    return plain, fast


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 96, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("training", [False, True])
def test_a_models_switch_decides_at_every_call(training, attention_calls):
    """htsat_attn_heatmap, which makes the model read the attention weights of stage 2, may be set at any time."""
    plain, x = make_model("HTSAT").train(training), make_input("HTSAT")
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    for heatmap in (True, False, True):
        plain.config.htsat_attn_heatmap = fast.config.htsat_attn_heatmap = heatmap
        exact = run(plain, x)
        assert_as_good(run(fast, x), exact, exact)
        attention_calls.clear()
        fast(x)
        # Four blocks call the op; reading the weights repeats the calls of two blocks or, in training, of one.
        assert len(attention_calls) == 4 + heatmap * (1 if training else 2)


def test_unread_weights_and_their_inputs_are_freed(stages, x):
    given = x.clone()
    out, weights = stages[1](given)
    gone = [weakref.ref(weights), weakref.ref(given)]
    del out, weights, given
    assert [reference() for reference in gone] == [None, None]


def test_weights_look_like_a_tensor(stages, x):
    _, expected = stages[0](x)

    def weights() -> Any:
        return stages[1](x)[1]

    assert isinstance(weights(), Tensor)
    assert weights().shape == expected.shape
    assert weights().requires_grad
    file = io.BytesIO()
    torch.save(weights(), file)
    file.seek(0)
    found = [
        torch.load(file), weights().detach(), weights() + 0, weights().unsqueeze(0)[0],
        copy.deepcopy(weights().detach()), torch.stack([weights(), weights()])[1], weights().clone().mul_(1.0),
    ]  # fmt: skip
    for got in found:
        assert type(got) is Tensor
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    numbers = weights().detach().numpy()
    assert abs(numbers - expected.detach().numpy()).max() < 1e-14


@pytest.mark.parametrize("mode", ["compile", "export", "vmap", "inference"])
def test_weights_in_other_modes(mode, stages, x):
    plain, fast = stages
    expected = plain(x)
    if mode == "compile":
        torch.compiler.reset()
        got = torch.compile(fast, backend="aot_eager", fullgraph=True)(x)
    elif mode == "export":
        got = torch.export.export(fast, (x,)).module()(x)
    elif mode == "vmap":
        got = [t.flatten(0, 1) for t in torch.vmap(lambda image: fast(image[None]))(x)]
    else:
        with torch.inference_mode():
            got = fast(x)
    for found, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(found + 0, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["compile", "export", "grad"])
def test_weights_first_read_in_another_mode(mode, stages, x):
    """Attention weights from an eager call, first read in another mode, hold no tensors of that mode afterwards."""
    plain, fast = stages
    expected = plain(x)[1].detach()
    with torch.set_grad_enabled(mode == "grad"):
        weights = fast(x)[1]
    if mode == "compile":
        torch.compiler.reset()
        got = torch.compile(lambda w: 2 * w, backend="aot_eager")(weights)
    elif mode == "export":
        got = 2 * torch.export.export(nn.Identity(), (weights,)).module()(weights)
    else:
        got = torch.func.grad(lambda t: (t * t * weights.detach()).sum())(torch.ones_like(expected))
    torch.testing.assert_close(got, 2 * expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weights.detach() + 0, expected, rtol=1e-10, atol=1e-12)


def test_several_threads_read_the_weights(stages, x):
    def read(weights: Any, start: Any) -> Tensor:
        start.wait()
        return weights + 0

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            with torch.no_grad():
                weights, start = stages[1](x)[1], threading.Barrier(4)
            found = list(pool.map(read, [weights] * 4, [start] * 4))
            assert all(torch.equal(got, found[0]) for got in found)


def test_weights_under_autocast_have_the_dtype_of_the_own_code(stages, x):
    plain, fast = (m.float() for m in stages)
    with torch.autocast("cpu", torch.bfloat16):
        got, expected = fast(x.float()), plain(x.float())
    for found, exact in zip(got, expected, strict=True):  # the weights are computed here, outside of autocast
        assert found.dtype == exact.dtype
        torch.testing.assert_close(found + 0, exact, rtol=0.05, atol=0.05)


def test_weights_after_dropout_are_those_that_multiply_v(stages, x):
    _, fast = stages
    block = fast.blocks[-1]
    block.attn.attn_drop.p = 0.5
    fast.downsample = nn.Identity()
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    fast.train()
    torch.manual_seed(3)
    out, weights = fast(x)
    assert 0.3 < (weights == 0).double().mean() < 0.7
    torch.manual_seed(3)
    first = nn.ModuleList([fast.blocks[0]])
    fast.blocks = first
    swinkernels.accelerate(fast)
    z, _ = fast(x)  # the input of the second block
    shifted = torch.roll(block.norm1(z).unflatten(1, (8, 12)), (-2, -2), (1, 2))
    v = block.attn.qkv(other_forms.cut(shifted, (4, 4))).unflatten(-1, (3, 3, -1))[:, :, 2].transpose(1, 2)
    y = block.attn.proj((weights @ v).transpose(1, 2).flatten(2))
    y = torch.roll(other_forms.join(y, (4, 4), (8, 12)), (2, 2), (1, 2)).flatten(1, 2)
    torch.testing.assert_close(out, z + y, rtol=1e-10, atol=1e-12)


def _scale_data(stage: Any, x: Tensor) -> None:
    for p in stage.parameters():
        p.data.mul_(1.5)


def _load(stage: Any, x: Tensor) -> None:
    stage.load_state_dict(
        {name: 1.5 * t for name, t in stage.state_dict().items() if t.is_floating_point()}, strict=False
    )


def _step(stage: Any, x: Tensor) -> None:
    with torch.no_grad():
        stage.blocks[0].attn.qkv.weight.add_(1.0)
        x.add_(1.0)


def _settings(stage: Any, x: Tensor) -> None:
    stage.blocks[0].attn.scale = 3.0
    stage.blocks[0].norm1.register_forward_hook(lambda module, args, result: 2 * result)


def _dtype(stage: Any, x: Tensor) -> None:
    stage.float()


@pytest.mark.parametrize("change", [_scale_data, _load, _step, _settings, _dtype])
def test_weights_are_those_of_the_call(change, stages, x):
    """Attention weights do not change if the stage changes after the call, before an operation first reads them."""
    plain, fast = stages
    expected = plain(x)[1].detach().clone()
    _, weights = fast(x)
    change(fast, x)
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-12, atol=1e-12)


def test_weights_of_other_parameters_are_read_after_the_call(stages, x):
    plain, fast = stages
    other = {name: 1.5 * p.detach() for name, p in plain.named_parameters()}
    got, expected = (torch.func.functional_call(m, other, (x,))[1] for m in (fast, plain))
    torch.testing.assert_close(got.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


def gradients(stage: Any, x: Tensor, loss: Any) -> list[Tensor]:
    """Return the gradients of x and of the stage's parameters, without those that are None."""
    stage.zero_grad()
    given = x.clone().requires_grad_()
    loss(given).backward()
    return [p.grad.clone() for p in (given, *stage.parameters()) if p.grad is not None]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for found, exact in zip(got, expected, strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("clone", [False, True])
def test_a_gradient_that_bypasses_the_values_arrives(clone, stages, x):
    def loss(stage: Any, x: Tensor) -> Tensor:
        weights = stage(x)[1]
        return Doubled.apply(weights.clone() if clone else weights).square().sum()

    expected, got = (gradients(stage, x, lambda x, stage=stage: loss(stage, x)) for stage in stages)
    assert_same(got, expected)


def test_a_gradient_by_both_ways(stages, x):
    def loss(stage: Any, x: Tensor) -> Tensor:
        out, weights = stage(x)
        return out.square().sum() + Doubled.apply(weights).square().sum() + weights.pow(3).sum()

    expected, got = (gradients(stage, x, lambda x, stage=stage: loss(stage, x)) for stage in stages)
    assert_same(got, expected)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, reads, stages, x):
    def loss(stage: Any, x: Tensor) -> Tensor:
        out, weights = checkpoint(stage, x, use_reentrant=reentrant)
        return out.square().sum() + (weights.square().sum() if reads else 0.0)

    expected, got = (gradients(stage, x, lambda x, stage=stage: loss(stage, x)) for stage in stages)
    assert len(got) > 10
    assert_same(got, expected)


def test_reentrant_checkpointing_of_two_stages(stages, x):
    """The input of the second checkpoint depends on the attention weights of the first."""

    def loss(stage: Any, x: Tensor) -> Tensor:
        def both(x: Tensor) -> tuple[Tensor, Tensor]:
            _, weights = stage(x)
            return x * weights.mean(), weights

        x, weights = checkpoint(both, x, use_reentrant=True)
        return checkpoint(both, x, use_reentrant=True)[1].square().sum() + weights.pow(3).sum()

    expected, got = (gradients(stage, x, lambda x, stage=stage: loss(stage, x)) for stage in stages)
    assert_same(got, expected)


def test_the_modes_of_the_call_count():
    """The gradient, inference and autocast modes of the call apply, even if the first read is in other modes."""
    weight = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        plain = deferred(lambda weight: weight * 2, (3,), torch.float32, [weight])
    traced = deferred(lambda weight: weight * 2, (3,), torch.float32, [weight])
    assert not (plain + 0).requires_grad
    with torch.inference_mode():
        assert (traced * 1).sum() == 6
    traced.sum().backward()
    assert torch.equal(weight.grad, torch.full((3,), 2.0))


def test_a_stage_whose_mask_or_size_is_another_runs_its_own_code(stages, x):
    plain, fast = stages
    for stage in stages:
        stage.blocks[1].attn_mask = torch.zeros_like(stage.blocks[1].attn_mask)
    for got, expected in zip(fast(x), plain(x), strict=True):
        assert torch.equal(got, expected)
    with pytest.raises(RuntimeError):
        fast(x[:, :90])
