"""Tests ``accelerate`` on the Swin models of transformers 5."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")

from transformers import (
    DonutSwinConfig,
    DonutSwinModel,
    MaskFormerSwinConfig,
    Swin2SRConfig,
    Swin2SRForImageSuperResolution,
    SwinBackbone,
    SwinConfig,
    SwinForImageClassification,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
)
from transformers.models.clap.configuration_clap import ClapAudioConfig
from transformers.models.clap.modeling_clap import ClapAudioAttention, ClapAudioLayer, ClapAudioPatchMerging
from transformers.models.donut.modeling_donut_swin import DonutSwinAttention
from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinAttention, MaskFormerSwinModel
from transformers.models.swin.modeling_swin import SwinAttention, SwinLayer
from transformers.models.swin2sr.modeling_swin2sr import Swin2SRAttention
from transformers.models.swinv2.modeling_swinv2 import Swinv2Attention, Swinv2SelfAttention

import swinkernels
from swinkernels.adapters import norms
from swinkernels.adapters.libraries.transformers import _layers
from tests.support.parity import assert_as_good, assert_as_noisy, randomise, run, shaken
from tests.support.published import refuse

SMALL = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}
ATTENTION = {
    "swin": SwinAttention,
    "swinv2": Swinv2Attention,
    "donut": DonutSwinAttention,
    "maskformer": MaskFormerSwinAttention,
    "swin2sr": Swin2SRAttention,
    "clap": ClapAudioAttention,
}
# Image sizes. Maps have 18x14 or 9x13 tokens, and 9x7 or 5x7 in the second stage: 4x4 windows need padding.
SIZES = [(36, 28), (18, 26)]


class Clap(nn.Module):
    """Layers and patch merging of CLAP's audio encoder, for images of any size; CLAP itself requires a fixed size."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        config = ClapAudioConfig(patch_embeds_hidden_size=16, **{"window_size": 4, **options})
        self.embed = nn.Conv2d(3, 16, 2, 2)
        self.layers = nn.ModuleList(
            ClapAudioLayer(config, dim, (16, 16), heads, config.drop_path_rate, shift)
            for dim, heads in ((16, 2), (32, 4))
            for shift in (0, config.window_size // 2)
        )
        self.merging = ClapAudioPatchMerging(16)

    def forward(self, x: Tensor, output_attentions: bool = False) -> tuple[Tensor, ...]:
        x = self.embed(x)
        height, width = x.shape[2:]
        x, weights = x.flatten(2).transpose(1, 2), []
        for i, layer in enumerate(self.layers):
            x, *w = layer(x, (height, width), output_attentions)
            weights += w
            if i == 1:
                x = self.merging(x, (height, width))
                height, width = (height + 1) // 2, (width + 1) // 2
        return (x, *weights)


MODELS: dict[str, Callable[..., Any]] = {
    "swin": lambda **o: SwinModel(SwinConfig(image_size=32, **{**SMALL, **o})),
    "swinv2": lambda **o: Swinv2Model(Swinv2Config(image_size=32, **{**SMALL, **o})),
    "donut": lambda **o: DonutSwinModel(DonutSwinConfig(image_size=32, **{**SMALL, **o})),
    "maskformer": lambda **o: MaskFormerSwinModel(MaskFormerSwinConfig(image_size=32, **{**SMALL, **o})),
    "swin2sr": lambda **o: Swin2SRForImageSuperResolution(
        Swin2SRConfig(image_size=16, num_channels=3, mlp_ratio=2.0, **{**SMALL, "patch_size": 1, **o})
    ),
    "clap": lambda **o: Clap(**o),
}
# Model -> number of replaced layers and patch mergings.
REPLACED = {name: {"layer": 4, "merging": 0 if name == "swin2sr" else 1} for name in MODELS}

families = pytest.mark.parametrize("family", MODELS)
clap = pytest.mark.parametrize("family", ["clap"])  # test_conformance.py covers the other families


class Outputs(nn.Module):
    """A transformers model that returns a tuple of tensors in place of its output object."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        out = self.model(x)
        if isinstance(out, tuple):
            return out
        return tuple(v for v in out.values() if isinstance(v, Tensor))[:1]


def make_model(family: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(0)
    model = MODELS[family](**options).eval()
    randomise(model)
    return Outputs(model).to(dtype)


def make_image(size: tuple[int, int] = SIZES[0], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def size_for(family: str, size: tuple[int, int]) -> tuple[int, int]:
    # Swin2SR itself pads images to whole windows; these sizes need no padding.
    return {SIZES[0]: (20, 12), SIZES[1]: (8, 16)}[size] if family == "swin2sr" else size


def accelerated(model: nn.Module, backend: str = "auto", **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend, **options)
    assert report.replaced
    assert not report.skipped, str(report)
    return fast


def ops_only(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Make transformers' own attention raise an error if it is called."""
    refuse(monkeypatch, ATTENTION[family])


@pytest.fixture
def kernels(as_on_a_gpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace the kernels of the memory-bound ops by plain PyTorch, and record the names of the ops called."""
    called: list[str] = []

    def recorded(name: str, op: Any) -> Any:
        return lambda *args, **kwargs: called.append(name) or op(*args, **kwargs)

    for name in ("residual_layer_norm", "residual_post_norm", "patch_merging", "layer_norm"):
        monkeypatch.setattr(norms, name, recorded(name, getattr(norms, name)))
    return called


# Same results as the library


@families
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_outputs_and_every_gradient(family, size, dtype, monkeypatch):
    model, x = make_model(family, dtype), make_image(size_for(family, size), dtype)
    exact = run(copy.deepcopy(model).double(), x.double())
    moved = shaken(model, x, dtype)
    fast = accelerated(model)
    assert_as_good(run(fast, x), run(model, x), exact, moved)
    ops_only(monkeypatch, family)
    fast(x)


@clap
def test_bfloat16(family):
    model, x = make_model(family), make_image(size_for(family, SIZES[0]))
    low, x = copy.deepcopy(model).bfloat16(), x.bfloat16()
    exact = run(copy.deepcopy(low).double(), x.double())
    assert_as_noisy(run(accelerated(low), x), run(low, x), exact)


@clap
def test_autocast(family):
    model, x = make_model(family), make_image(size_for(family, SIZES[0]))
    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = run(accelerated(model), x), run(model, x)
    assert_as_noisy(got, plain, exact)


@families
def test_without_bias_of_the_projections(family):
    model, x = make_model(family, torch.float64, qkv_bias=False), make_image(size_for(family, SIZES[0]), torch.float64)
    exact = run(model, x)
    assert_as_good(run(accelerated(model), x), exact, exact, shaken(model, x, x.dtype))


@families
@pytest.mark.parametrize("backend", ["auto", "reference"])  # "auto" chooses "torch" in float64
def test_training_draws_the_same_random_numbers(family, backend):
    """Drop path and hidden dropout draw the same random numbers as in the library, except for Swin's hidden dropout.

    After attention, Swin draws the dropout mask in window order, and the accelerated layer in map order.
    """
    options = {"drop_path_rate": 0.5, "hidden_dropout_prob": 0.0 if family == "swin" else 0.2}
    model = make_model(family, torch.float64, **options).train()
    x = make_image(size_for(family, SIZES[0]), torch.float64)
    results = []
    for m in (model, accelerated(model, backend)):
        torch.manual_seed(3)
        results.append(m(x)[0].detach())
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    torch.manual_seed(4)
    assert not torch.allclose(model(x)[0], results[0])


@families
def test_attention_dropout_has_the_right_mean(family):
    """The output is linear in the attention weights, so its mean over dropout masks tends to that without dropout."""
    model = accelerated(make_model(family, torch.float64, attention_probs_dropout_prob=0.3))
    layer = [m for m in model.modules() if isinstance(m, _layers._Layer)][1]
    x = torch.randn(1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = _layers.attended(layer, x, (5, 6))
        layer.train()
        if hasattr(layer.attention, "output"):
            layer.attention.output.eval()  # disables its dropout, which has the same probability
        torch.manual_seed(0)
        draws = _layers.attended(layer, x.expand(400, -1, -1), (5, 6))
    spread = draws.std(0)
    assert spread.min() > 0
    assert (draws.mean(0) - exact).abs().max() < 6 * spread.max() / 400**0.5


@clap
def test_verify(family):
    accelerated(make_model(family), verify=True)


@clap
def test_norms_and_merging_on_kernels(family, kernels):
    """The GPU code path runs on the CPU, with plain PyTorch in place of the kernels, also under autocast."""
    model, x = make_model(family), make_image(size_for(family, SIZES[1]))
    exact = run(copy.deepcopy(model).double(), x.double())
    fast = accelerated(model)
    assert_as_good(run(fast, x), run(model, x), exact, shaken(model, x, x.dtype))
    post = family in ("swinv2", "swin2sr")
    expected = {"residual_post_norm": 8} if post else {"residual_layer_norm": 4}
    assert Counter(kernels) == Counter({**expected, "patch_merging": REPLACED[family]["merging"]})
    kernels.clear()
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = run(fast, x), run(model, x)
    assert_as_noisy(got, plain, exact)
    assert len(kernels) >= 4


def test_maps_that_one_window_covers(monkeypatch):
    """A small map permanently shrinks the windows of Swin, Donut and CLAP.

    If the bias table no longer fits the window, the library's own code and the accelerated model both raise an error.
    """
    for family in ("swin", "donut", "clap"):
        model, small, large = make_model(family, torch.float64), make_image((16, 24)), make_image()
        fast = accelerated(model)
        for x in (large.double(), small.double(), large.double()):  # the small image's second stage has 4x6 tokens
            torch.testing.assert_close(fast(x)[0], model(x)[0], rtol=1e-10, atol=1e-10)
        for a, b in zip(model.modules(), fast.modules(), strict=True):
            if hasattr(a, "shift_size"):
                assert (a.window_size, a.shift_size) == (b.window_size, b.shift_size)
        for m in (model, fast):
            with pytest.raises(RuntimeError):
                m(make_image((4, 8), torch.float64))


def test_masks_of_v2_count_twice():
    assert _layers._times_masked(Swinv2SelfAttention) == 2
    state = torch.get_rng_state()
    _layers._times_masked.__wrapped__(Swinv2SelfAttention)
    assert torch.equal(torch.get_rng_state(), state)


# Optional outputs


def test_attention_weights_are_transformers_own():
    x = make_image()
    for family in ("swinv2", "donut"):
        model = make_model(family)
        fast = accelerated(model)
        got, expected = (m.model(x, output_attentions=True).attentions for m in (fast, model))
        assert len(got) == 2
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    model = make_model("clap")
    for g, e in zip(accelerated(model).model(x, True), model.model(x, True), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


def test_swin_with_eager_attention_returns_its_weights():
    model, x = make_model("swin"), make_image()
    fast = accelerated(model)
    for m in (model, fast):
        m.model.set_attn_implementation("eager")
    got, expected = (m.model(x, output_attentions=True).attentions for m in (fast, model))
    assert len(got) == 2 and got[0] is not None
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    report = swinkernels.accelerate(copy.deepcopy(model))
    assert "eager" in str(report)


def test_hidden_states_and_feature_maps():
    torch.manual_seed(0)
    model = SwinBackbone(SwinConfig(image_size=32, **SMALL, out_features=["stage1", "stage2"])).eval()
    x = make_image()
    fast = accelerated(model)
    for g, e in zip(fast(x).feature_maps, model(x).feature_maps, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    plain = SwinForImageClassification(SwinConfig(image_size=32, **SMALL, num_labels=5)).eval()
    labels = torch.tensor([1, 3])
    got = accelerated(plain)(x, labels=labels, output_hidden_states=True)
    expected = plain(x, labels=labels, output_hidden_states=True)
    torch.testing.assert_close(got.loss, expected.loss)
    for g, e in zip(got.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-5)


# Modules that `accelerate` does not replace


def test_what_is_not_a_linear_layer_is_left_alone():
    class Lora(nn.Linear):
        pass

    model = make_model("swin")
    layers = [m for m in model.modules() if type(m) is SwinLayer]
    layers[0].attention.q_proj = Lora(16, 16)
    report = swinkernels.accelerate(model)
    reasons = [str(s) for s in report.skipped]
    assert len(reasons) == 1 and "attention.q_proj" in reasons[0] and "Lora" in reasons[0]
    assert type(layers[0]) is SwinLayer


@families
def test_hooks_inside_are_seen(family):
    model, x = make_model(family), make_image(size_for(family, SIZES[0]))
    fast = accelerated(model)
    calls = []
    for m in fast.modules():
        if type(m) is ATTENTION[family]:
            m.register_forward_hook(lambda *args: calls.append(1))
    torch.testing.assert_close(fast(x)[0], model(x)[0], rtol=1e-4, atol=1e-4)
    assert len(calls) == 4


# The model's state and interface


@families
def test_same_model_before_and_after(family):
    model, x = make_model(family), make_image(size_for(family, SIZES[0]))
    classes, keys = [type(m) for m in model.modules()], list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    expected = model(x)[0]
    report = swinkernels.accelerate(model)
    counts = Counter("merging" if "Merging" in str(entry) else "layer" for entry in report.replaced)
    assert counts["layer"] == REPLACED[family]["layer"]
    assert counts["merging"] == REPLACED[family]["merging"]
    assert list(model.state_dict()) == keys
    assert [id(p) for p in model.parameters()] == parameters
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    copied = pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(copied(x)[0], model(x)[0])
    swinkernels.restore(model)
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(model(x)[0], expected)


def test_gradient_checkpointing():
    model, x = make_model("swin", torch.float64), make_image(dtype=torch.float64)
    fast = accelerated(model)
    expected = run(model, x)
    fast.model.gradient_checkpointing_enable()
    fast.train()
    assert_as_good(run(fast, x), expected, expected)
