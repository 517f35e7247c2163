"""accelerate(recompute=True): the same training steps with fewer bytes saved for the backward pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

pytest.importorskip("timm", reason="timm is not installed")

import swinkernels
from swinkernels.adapters import recompute
from tests.support.parity import assert_as_good, run, shaken
from tests.support.saved_bytes import kept_bytes
from tests.support.small_models import Swin, timm_swin


def make_model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm_swin("1", Swin(embed_dim=16, **options)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_image(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(4, 3, 18, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def accelerated(model: nn.Module, **options: Any) -> nn.Module:
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast, **{"recompute": True, **options})
    return fast


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return run(model, x)


@pytest.fixture
def halves(monkeypatch) -> list[Any]:
    """Collect the calls of mlp_half."""
    calls: list[Any] = []

    def observed(*args: Any, **options: Any) -> Tensor:
        calls.append(options)
        return swinkernels.mlp_half(*args, **options)

    monkeypatch.setattr(recompute, "mlp_half", observed)
    return calls


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_the_same_outputs_and_gradients(drop_path, halves):
    """Drop paths draw timm's random numbers."""
    model, x = make_model(drop_path=drop_path), make_image()
    assert_same(step(accelerated(model), x), step(model, x))
    assert len(halves) == 3
    assert all((h["branch_scale"] is None) == (drop_path == 0.0) for h in halves[1:])


def test_errors_in_float32(halves):
    model, x = make_model().float(), make_image(torch.float32)
    exact = step(copy.deepcopy(model).double(), x.double())
    assert_as_good(step(accelerated(model), x), step(model, x), exact, shaken(model, x, torch.float32))
    assert len(halves) == 3


def test_fewer_saved_bytes():
    model, x = make_model().float(), make_image(torch.float32)
    models = (model, accelerated(model, recompute=False), accelerated(model))
    plain, fast, recomputing = (kept_bytes(lambda m=m: m(x), m.parameters()) for m in models)
    assert recomputing < 0.75 * fast < plain


def hook(block: Any) -> None:
    block.mlp.fc1.register_forward_hook(lambda module, args, out: 1.5 * out)


def backward_hook(block: Any) -> None:
    block.mlp.act.register_full_backward_hook(lambda module, dx, dy: (1.5 * dx[0],))


def patched(block: Any) -> None:
    forward = block.norm1.forward
    block.norm1.forward = lambda x: 1.5 * forward(x)


def dropout(block: Any) -> None:
    block.mlp.drop1.p = 0.3


def dropout_of_projection(block: Any) -> None:
    block.attn.proj_drop.p = 0.3


def activation(block: Any) -> None:
    block.mlp.act = nn.ReLU()


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised(block: Any) -> None:
    parametrize.register_parametrization(block.mlp.fc2, "weight", Doubled())


@pytest.mark.parametrize(
    "edit", [hook, backward_hook, patched, dropout, dropout_of_projection, activation, parametrised]
)
def test_changed_blocks_run_as_before(edit, halves):
    """Blocks are compared with recompute=False, because dropout after the projection draws its numbers for a map."""
    x = make_image()
    model, fast = accelerated(make_model(), recompute=False), accelerated(make_model())
    for m in (model, fast):
        edit(m.layers[0].blocks[0])
    expected, got = step(model, x), step(fast, x)
    assert len(halves) == 2
    assert_same(got, expected)


def test_autocast_and_checkpointing(halves):
    model, x = make_model(drop_path=0.4).float(), make_image(torch.float32)
    fast = accelerated(model)
    for m in (model, fast):
        m.set_grad_checkpointing()
    found = []
    for m in (model, fast):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(m, x))
    assert len(halves) == 6
    for name, expected in found[0].items():
        assert found[1][name].dtype == expected.dtype
        assert (found[1][name] - expected).norm() <= 0.05 * expected.norm()


def test_without_gradients_and_by_default_nothing_changes(halves):
    model, x = make_model(), make_image()
    with torch.no_grad():
        accelerated(model)(x)
    step(accelerated(model, recompute=False), x)
    assert halves == []


def test_verify_and_restore(halves):
    model = make_model()
    fast = accelerated(model, verify=True)
    assert halves
    swinkernels.restore(fast)
    assert not any(name.startswith("_swinkernels") for m in fast.modules() for name in m.__dict__)


def test_compile_in_one_graph():
    model, x = make_model(), make_image()
    fast = accelerated(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_wrong_argument():
    with pytest.raises(TypeError, match="recompute must be a bool, got 1"):
        swinkernels.accelerate(make_model(), recompute=1)
