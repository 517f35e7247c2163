"""Tests that accelerate(recompute=True) leaves outputs and gradients unchanged and saves fewer bytes for backward."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import swinkernels
from swinkernels.adapters import engine, recompute
from tests.support.parity import assert_as_good, assert_as_noisy, run, shaken
from tests.support.saved_bytes import kept_bytes
from tests.support.small_models import Outputs, Swin, timm_swin, torchvision_swin, transformers_swin
from tests.support.small_models import make_model as copies

# Family -> builder of a small model of three blocks, whether attention_half runs, path of the first block, and paths of
# the parts of that block.
_OF_TIMM = {"fc1": "mlp.fc1", "act": "mlp.act", "drop": "mlp.drop1", "fc2": "mlp.fc2", "qkv": "attn.qkv"}
_OF_TORCHVISION = {"fc1": "mlp.0", "act": "mlp.1", "drop": "mlp.2", "fc2": "mlp.3", "qkv": "attn.qkv"}
FAMILIES: dict[str, tuple[Any, bool, str, dict[str, str]]] = {
    "timm": (lambda size: timm_swin("1", size), True, "layers.0.blocks.0", {"norm": "norm1", **_OF_TIMM}),
    "timm v2": (lambda size: timm_swin("2", size), False, "layers.0.blocks.0", {"norm": "norm2", **_OF_TIMM}),
    "timm v2-CR": (lambda size: timm_swin("2-cr", size), False, "stages.0.blocks.0", {"norm": "norm2", **_OF_TIMM}),
    "torchvision": (lambda size: torchvision_swin(1, size), True, "features.1.0", {"norm": "norm1", **_OF_TORCHVISION}),
    "torchvision v2": (
        lambda size: torchvision_swin(2, size), False, "features.1.0", {"norm": "norm2", **_OF_TORCHVISION}
    ),
    "transformers": (
        lambda size: transformers_swin("Swin", size), True, "model.encoder.layers.0.blocks.0",
        {
            "norm": "layernorm_before", "fc1": "mlp.fc1", "act": "mlp.activation_fn", "fc2": "mlp.fc2",
            "drop": "dropout", "qkv": "attention.k_proj",
        },
    ),
    "transformers v2": (
        lambda size: transformers_swin("Swinv2", size), False, "model.encoder.layers.0.blocks.0",
        {
            "norm": "layernorm_after", "fc1": "intermediate.dense", "act": "intermediate.intermediate_act_fn",
            "fc2": "output.dense", "drop": "output.dropout", "qkv": "attention.self.key",
        },
    ),
    "transformers Donut": (
        lambda size: transformers_swin("DonutSwin", size), True, "model.encoder.layers.0.blocks.0",
        {
            "norm": "layernorm_before", "fc1": "intermediate.dense", "act": "intermediate.intermediate_act_fn",
            "fc2": "output.dense", "drop": "output.dropout", "qkv": "attention.self.key",
        },
    ),
}  # fmt: skip


def make_model(family: str = "timm", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family][0](Swin(embed_dim=16, **options)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_image(dtype: torch.dtype = torch.float64, family: str = "timm") -> Tensor:
    size = (18, 24) if family.startswith("timm") else (18, 14)
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def accelerated(model: nn.Module, **options: Any) -> nn.Module:
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast, **{"recompute": True, **options})
    return fast


def step(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    torch.manual_seed(3)
    return run(model, x)


@pytest.fixture
def halves(monkeypatch) -> dict[str, list[Any]]:
    """Record the keyword arguments of every call to attention_half and mlp_half."""
    calls: dict[str, list[Any]] = {"attention_half": [], "mlp_half": []}

    def observe(name: str) -> None:
        def observed(*args: Any, **options: Any) -> Tensor:
            calls[name].append(options)
            return getattr(swinkernels, name)(*args, **options)

        monkeypatch.setattr(recompute, name, observed)

    for name in calls:
        observe(name)
    return calls


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_outputs_and_gradients(family, drop_path, training, halves):
    """Drop path draws the same random numbers as in the library's own code."""
    model, x = make_model(family, drop_path=drop_path).train(training), make_image(family=family)
    assert_same(step(accelerated(model), x), step(model, x))
    is_v1 = FAMILIES[family][1]
    assert len(halves["attention_half"]) == 3 * is_v1
    assert len(halves["mlp_half"]) == 3
    drops = drop_path > 0.0 and training
    # transformers v1 has no drop path after the MLP.
    scale = "branch_scale" if is_v1 else "drop_path_scale"
    assert any(h[scale] is not None for h in halves["mlp_half"]) == drops


def test_torchvision_swin3d(halves):
    """ShiftedWindowAttention3d is called as a module, and only the MLP half is recomputed."""
    video = pytest.importorskip("torchvision.models.video.swin_transformer", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = video.SwinTransformer3d([2, 4, 4], 8, [2, 1], [1, 2], [2, 4, 4], stochastic_depth_prob=0.4, num_classes=3)
    model, x = model.double().train(), torch.randn(2, 3, 5, 30, 26, dtype=torch.float64)
    assert_same(step(accelerated(model), x), step(model, x))
    assert len(halves["mlp_half"]) == 3


@pytest.mark.parametrize("family", ["timm", "torchvision", "transformers"])
def test_errors_in_float32(family, halves):
    model, x = make_model(family).float(), make_image(torch.float32, family)
    exact = step(copy.deepcopy(model).double(), x.double())
    assert_as_good(step(accelerated(model), x), step(model, x), exact, shaken(model, x, torch.float32))
    assert len(halves["mlp_half"]) == 3


def _timm(name: str) -> nn.Module:
    return pytest.importorskip("timm", reason="timm is not installed").create_model(name)


def _torchvision(name: str) -> nn.Module:
    return getattr(pytest.importorskip("torchvision.models", reason="torchvision is not installed"), name)()


def _transformers(kind: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    config = getattr(transformers, f"{kind}Config")(
        image_size=224, embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], window_size=7
    )
    return Outputs(getattr(transformers, f"{kind}Model")(config))


SWIN_T = {
    "timm": lambda: _timm("swin_tiny_patch4_window7_224"),
    "timm v2": lambda: _timm("swinv2_tiny_window8_256"),
    "torchvision": lambda: _torchvision("swin_t"),
    "torchvision v2": lambda: _torchvision("swin_v2_t"),
    "transformers": lambda: _transformers("Swin"),
    "transformers v2": lambda: _transformers("Swinv2"),
}


@pytest.mark.parametrize("family", SWIN_T)
def test_saved_bytes_of_swin_t(family, record_property):
    torch.manual_seed(0)
    model = SWIN_T[family]().train()
    size = 256 if family == "timm v2" else 224
    x = torch.randn(1, 3, size, size)
    saved = [kept_bytes(lambda m=m: m(x), m.parameters()) for m in (model, accelerated(model))]
    record_property("ratio", f"{saved[1] / saved[0]:.3f}")
    assert saved[1] <= 0.6 * saved[0]


def hook(of: Any) -> None:
    of("fc1").register_forward_hook(lambda module, args, out: 1.5 * out)


def backward_hook(of: Any) -> None:
    of("act").register_full_backward_hook(lambda module, dx, dy: (1.5 * dx[0],))


def patched(of: Any) -> None:
    norm = of("norm")
    forward = norm.forward
    norm.forward = lambda x: 1.5 * forward(x)


def dropout(of: Any) -> None:
    of("drop").p = 0.3


class Relu(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


def activation(of: Any) -> None:
    of("act").__class__ = Relu


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrised(of: Any) -> None:
    parametrize.register_parametrization(of("fc2"), "weight", Doubled())


def parametrised_qkv(of: Any) -> None:
    parametrize.register_parametrization(of("qkv"), "weight", Doubled())


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 1.5 * super().forward(x)


def subclass(of: Any) -> None:
    of("fc1").__class__ = Scaled


class Tagged(Tensor):
    """A stand-in for a quantised weight: a tensor subclass whose operations return plain tensors."""

    __torch_function__ = torch._C._disabled_torch_function_impl


def weight_of_another_class(of: Any) -> None:
    weight: Any = of("fc2").weight.detach().as_subclass(Tagged).requires_grad_()
    weight._is_param = True  # nn.Parameter rejects subclasses whose detach returns a plain tensor
    of("fc2").weight = weight


EDITS = [
    hook, backward_hook, patched, dropout, activation, parametrised, parametrised_qkv, subclass,
    weight_of_another_class,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("timm v2-CR", "transformers Donut")])
def test_blocks_changed_afterwards_run_as_before(family, edit, halves):
    """Results are compared with accelerate(recompute=False): libraries draw projection dropout in window order."""
    x = make_image(family=family)
    model, fast = accelerated(make_model(family), recompute=False), accelerated(make_model(family))
    *_, block, parts = FAMILIES[family]
    for m in (model, fast):
        edit(lambda name, m=m: m.get_submodule(f"{block}.{parts[name]}"))
    expected, got = step(model, x), step(fast, x)
    only_mlp = family in ("timm v2", "torchvision v2")  # here mlp_half still runs if only the attention is edited
    assert len(halves["mlp_half"]) == (3 if only_mlp and edit is parametrised_qkv else 2)
    assert_same(got, expected)


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_dropout_of_projections(family, halves):
    x = make_image(family=family)
    model, fast = accelerated(make_model(family), recompute=False), accelerated(make_model(family))
    for m in (model, fast):
        attn = m.get_submodule(f"{FAMILIES[family][2]}.attn")
        if family == "timm":
            attn.proj_drop.p = 0.3
        else:
            attn.dropout = 0.3
    expected, got = step(model, x), step(fast, x)
    assert len(halves["mlp_half"]) == 2
    assert_same(got, expected)


@pytest.mark.parametrize("family", ["timm", "torchvision", "transformers", "transformers v2"])
def test_autocast(family, halves):
    model, x = make_model(family).float(), make_image(torch.float32, family)
    for name, p in model.named_parameters():
        if name.endswith("k_proj.bias"):
            p.requires_grad_(False)  # its gradient is 0 in theory, and rounding noise in practice
    exact = step(copy.deepcopy(model).double(), x.double())
    found = []
    for m in (accelerated(model), model):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(step(m, x))
    assert len(halves["mlp_half"]) == 3
    assert_as_noisy(*found, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["timm", "torchvision", "transformers", "transformers v2"])
def test_checkpointing(family, use_reentrant, halves):
    model, x = make_model(family, drop_path=0.4), make_image(family=family)
    expected, got = (step(Checkpointed(m, use_reentrant), x) for m in (model, accelerated(model)))
    assert len(halves["mlp_half"]) == (3 if use_reentrant else 6)
    assert_same(got, expected)


@pytest.mark.parametrize("counted", ["forward", "backward"])
@pytest.mark.parametrize("family", ["timm", "timm v2"])
def test_checkpointing_where_only_one_pass_is_counted(family, counted):
    """The forward pass and its recomputation save the same tensors even if FlopCounterMode counts only one of them."""
    model, x = make_model(family), make_image(family=family)
    gradients = []
    for m in (model, accelerated(model)):
        with FlopCounterMode(display=False) if counted == "forward" else contextlib.nullcontext():
            y = Checkpointed(m, use_reentrant=False)(x)
        with FlopCounterMode(display=False) if counted == "backward" else contextlib.nullcontext():
            found = torch.autograd.grad(y.sum(), m.parameters())
        gradients.append({name: g for (name, _), g in zip(m.named_parameters(), found, strict=True)})
    assert_same(gradients[1], gradients[0])


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.model, x, use_reentrant=self.use_reentrant)


def test_without_gradients_and_by_default_nothing_changes(halves):
    model, x = make_model(), make_image()
    with torch.no_grad():
        accelerated(model)(x)
    step(accelerated(model, recompute=False), x)
    assert halves == {"attention_half": [], "mlp_half": []}


def test_verify_and_restore(halves):
    model = make_model()
    fast = accelerated(model, verify=True)
    assert halves["mlp_half"]
    swinkernels.restore(fast)
    assert not any(name.startswith("_swinkernels") for m in fast.modules() for name in m.__dict__)


@pytest.mark.parametrize("family", ["timm", "torchvision", "transformers", "transformers v2"])
def test_compile_in_one_graph(family):
    model, x = make_model(family), make_image(family=family)
    fast = accelerated(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), model(x)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)


def test_the_report_names_blocks_without_effect():
    model = make_model("torchvision")
    model.features[1][0].mlp[2].p = 0.3
    report = swinkernels.accelerate(model.eval(), recompute=True)
    found = {entry.path: (entry.module_class, entry.adapter, entry.reason) for entry in report.not_recomputed}
    assert found == {
        "features.1.0": ("SwinTransformerBlock", "torchvision", "mlp: 2 drops elements in training (p=0.3)"),
        "features.2": ("PatchMerging", "torchvision", "only blocks recompute, not patch merging"),
    }
    assert "recompute=True has no effect  class" in str(report)
    assert swinkernels.accelerate(model).not_recomputed == []


def test_the_report_names_blocks_on_a_device_without_kernels(monkeypatch):
    monkeypatch.setattr(engine, "why_no_kernels", lambda device: f"no kernel runs on {device.type} tensors")
    report = swinkernels.accelerate(make_model(), recompute=True)
    reasons = {entry.reason for entry in report.not_recomputed if entry.module_class == "SwinTransformerBlock"}
    assert reasons == {"timm's own code runs; no kernel runs on cpu tensors"}
    report = swinkernels.accelerate(make_model(), recompute=True, backend="torch")
    assert [entry.module_class for entry in report.not_recomputed] == ["PatchMerging"]


def test_the_report_groups_classes_that_never_recompute():
    report = swinkernels.accelerate(copies("copy"), recompute=True)
    assert [entry.path for entry in report.not_recomputed] == ["blocks.0", "blocks.1"]
    line = next(line for line in str(report).splitlines() if "not implemented" in line)
    assert line.startswith("blocks.0 and 1 more ")
    assert line.endswith("recompute is not implemented for this class")


def test_wrong_argument():
    with pytest.raises(TypeError, match="recompute must be a bool, got 1"):
        swinkernels.accelerate(make_model(), recompute=1)
