"""Tests that accelerate(recompute=True) leaves outputs and gradients unchanged and saves fewer bytes for backward."""

from __future__ import annotations

import contextlib
import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import swinkernels
from swinkernels.adapters import engine
from swinkernels.adapters import halves as halves_module
from tests.support.parity import assert_as_good, assert_as_noisy, run, shaken
from tests.support.published_forms import ClassificationBlock, ClassificationBlockV2, Mlp
from tests.support.saved_bytes import kept_bytes
from tests.support.small_models import (
    Copies,
    Last,
    Outputs,
    Swin,
    mmpretrain_swin,
    monai_swin,
    timm_swin,
    torchvision_swin,
    transformers_swin,
)
from tests.support.small_models import make_model as make_small_model
from tests.support.sweeps import long_but


@dataclass(frozen=True)
class Family:
    """A small model and the paths of its first block and of the parts of that block."""

    make: Callable[[Swin], nn.Module]
    version: int
    block: str
    parts: dict[str, str]
    shape: tuple[int, ...]  # of the model's input
    blocks: int = 3


def copied(kind: Any, size: Swin) -> nn.Module:
    """Build two copied blocks with timm's drop path, the second one shifted."""
    model = Copies(lambda shift: kind(16, (8, 12), 2, 4, shift), lambda block, x: ())
    for block in model.blocks if size.drop_path > 0.0 else ():
        block.drop_path = pytest.importorskip("timm.layers", reason="timm is not installed").DropPath(size.drop_path)
    return model


_OF_TIMM = {"fc1": "mlp.fc1", "act": "mlp.act", "drop": "mlp.drop1", "fc2": "mlp.fc2", "qkv": "attn.qkv"}
_OF_TORCHVISION = {"fc1": "mlp.0", "act": "mlp.1", "drop": "mlp.2", "fc2": "mlp.3", "qkv": "attn.qkv"}
_OF_OTHERS = {
    "fc1": "intermediate.dense", "act": "intermediate.intermediate_act_fn", "fc2": "output.dense",
    "drop": "output.dropout", "qkv": "attention.self.key",
}  # fmt: skip
_OF_MMPRETRAIN = {
    "fc1": "ffn.layers.0.0", "act": "ffn.layers.0.1", "drop": "ffn.layers.0.2", "fc2": "ffn.layers.1",
    "qkv": "attn.w_msa.qkv",
}  # fmt: skip
_OF_MONAI = {"fc1": "mlp.linear1", "act": "mlp.fn", "drop": "mlp.drop1", "fc2": "mlp.linear2", "qkv": "attn.qkv"}
_OF_COPY = {**_OF_TIMM, "drop": "mlp.drop"}
FAMILIES = {
    "timm": Family(
        lambda size: timm_swin("1", size), 1, "layers.0.blocks.0", {"norm": "norm1", **_OF_TIMM}, (4, 3, 18, 24)
    ),
    "timm v2": Family(
        lambda size: timm_swin("2", size), 2, "layers.0.blocks.0", {"norm": "norm2", **_OF_TIMM}, (4, 3, 18, 24)
    ),
    "timm v2-CR": Family(
        lambda size: timm_swin("2-cr", size), 2, "stages.0.blocks.0", {"norm": "norm2", **_OF_TIMM}, (4, 3, 18, 24)
    ),
    "torchvision": Family(
        lambda size: torchvision_swin(1, size), 1, "features.1.0", {"norm": "norm1", **_OF_TORCHVISION}, (4, 3, 18, 14)
    ),
    "torchvision v2": Family(
        lambda size: torchvision_swin(2, size), 2, "features.1.0", {"norm": "norm2", **_OF_TORCHVISION}, (4, 3, 18, 14)
    ),
    "transformers": Family(
        lambda size: transformers_swin("Swin", size), 1, "model.encoder.layers.0.blocks.0",
        {
            "norm": "layernorm_before", "fc1": "mlp.fc1", "act": "mlp.activation_fn", "fc2": "mlp.fc2",
            "drop": "dropout", "qkv": "attention.k_proj",
        },
        (4, 3, 18, 14),
    ),
    "transformers v2": Family(
        lambda size: transformers_swin("Swinv2", size), 2, "model.encoder.layers.0.blocks.0",
        {"norm": "layernorm_after", **_OF_OTHERS}, (4, 3, 18, 14),
    ),
    "transformers Donut": Family(
        lambda size: transformers_swin("DonutSwin", size), 1, "model.encoder.layers.0.blocks.0",
        {"norm": "layernorm_before", **_OF_OTHERS}, (4, 3, 18, 14),
    ),
    "mmpretrain": Family(
        lambda size: mmpretrain_swin(1, size, img_size=16), 1, "model.stages.0.blocks.0",
        {"norm": "norm1", **_OF_MMPRETRAIN}, (4, 3, 18, 14),
    ),
    "mmpretrain v2": Family(
        lambda size: mmpretrain_swin(2, size, img_size=16), 2, "model.stages.0.blocks.0",
        {"norm": "norm2", **_OF_MMPRETRAIN}, (4, 3, 18, 14),
    ),
    "MONAI": Family(
        lambda size: monai_swin(3, size.drop_path), 1, "model.layers1.0.blocks.0", {"norm": "norm1", **_OF_MONAI},
        (4, 3, 18, 14), 5,
    ),
    "copy": Family(
        lambda size: copied(ClassificationBlock, size), 1, "blocks.0", {"norm": "norm1", **_OF_COPY}, (4, 96, 16), 2
    ),
    "copy v2": Family(
        lambda size: copied(ClassificationBlockV2, size), 2, "blocks.0", {"norm": "norm2", **_OF_COPY}, (4, 96, 16), 2
    ),
}  # fmt: skip


def make_model(family: str = "timm", **options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = FAMILIES[family].make(Swin(embed_dim=16, **options)).double().train()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def make_image(dtype: torch.dtype = torch.float64, family: str = "timm") -> Tensor:
    return torch.randn(FAMILIES[family].shape, generator=torch.Generator().manual_seed(1)).to(dtype)


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

        monkeypatch.setattr(halves_module, name, observed)

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
    fast = accelerated(model)
    for calls in halves.values():
        calls.clear()  # the trial of a copied block calls the halves, too
    assert_same(step(fast, x), step(model, x))
    is_v1, blocks, drops = FAMILIES[family].version == 1, FAMILIES[family].blocks, drop_path > 0.0 and training
    assert len(halves["attention_half"]) == blocks * is_v1
    if family == "mmpretrain v2" and drops:  # its drop path precedes the norm, except in the first block, which has p=0
        assert len(halves["mlp_half"]) == 1
        return
    assert len(halves["mlp_half"]) == blocks
    # transformers v1 has no drop path after the MLP, and mmpretrain's attention contains the one before.
    scale = "branch_scale" if is_v1 and family != "mmpretrain" else "drop_path_scale"
    assert any(h[scale] is not None for h in halves["mlp_half"]) == drops


def test_torchvision_swin3d(halves):
    """ShiftedWindowAttention3d is called as a module, and only the MLP half is recomputed."""
    video = pytest.importorskip("torchvision.models.video.swin_transformer", reason="torchvision is not installed")
    torch.manual_seed(0)
    model = video.SwinTransformer3d([2, 4, 4], 8, [2, 1], [1, 2], [2, 4, 4], stochastic_depth_prob=0.4, num_classes=3)
    model, x = model.double().train(), torch.randn(2, 3, 5, 30, 26, dtype=torch.float64)
    assert_same(step(accelerated(model), x), step(model, x))
    assert len(halves["mlp_half"]) == 3


@pytest.mark.parametrize("family", ["timm", "torchvision", "transformers", "mmpretrain", "MONAI", "copy"])
def test_errors_in_float32(family, halves):
    model, x = make_model(family).float(), make_image(torch.float32, family)
    exact = step(copy.deepcopy(model).double(), x.double())
    assert_as_good(step(accelerated(model), x), step(model, x), exact, shaken(model, x, torch.float32))
    assert len(halves["mlp_half"]) == FAMILIES[family].blocks


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


def _mmpretrain(name: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("mmpretrain.models", reason="mmpretrain is not installed")
    return Last(getattr(models, name)("tiny", **options))


def _monai() -> nn.Module:
    """Build the encoder of a SwinUNETR with feature_size=24."""
    swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    return Last(swin_unetr.SwinTransformer(1, 24, (7, 7, 7), (2, 2, 2), (2, 2, 2, 2), (3, 6, 12, 24)))


def _copy(kind: Any, side: int, window: int) -> nn.Module:
    """Build the first stage of a copied Swin-T."""
    return Copies(lambda shift: kind(96, (side, side), 3, window, (window // 2) * bool(shift)), lambda block, x: ())


# Family -> its smallest published model, or the copied stage of one, and the shape of the model's input.
SMALLEST: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm": (lambda: _timm("swin_tiny_patch4_window7_224"), (1, 3, 224, 224)),
    "timm v2": (lambda: _timm("swinv2_tiny_window8_256"), (1, 3, 256, 256)),
    "torchvision": (lambda: _torchvision("swin_t"), (1, 3, 224, 224)),
    "torchvision v2": (lambda: _torchvision("swin_v2_t"), (1, 3, 224, 224)),
    "transformers": (lambda: _transformers("Swin"), (1, 3, 224, 224)),
    "transformers v2": (lambda: _transformers("Swinv2"), (1, 3, 224, 224)),
    "mmpretrain": (lambda: _mmpretrain("SwinTransformer"), (1, 3, 224, 224)),
    "mmpretrain v2": (lambda: _mmpretrain("SwinTransformerV2", img_size=256, drop_path_rate=0.0), (1, 3, 256, 256)),
    "MONAI": (_monai, (1, 1, 64, 64, 64)),
    "copy": (lambda: _copy(ClassificationBlock, 56, 7), (1, 56 * 56, 96)),
    "copy v2": (lambda: _copy(ClassificationBlockV2, 64, 8), (1, 64 * 64, 96)),
}


@pytest.mark.parametrize("family", SMALLEST)
def test_saved_bytes(family, record_property):
    torch.manual_seed(0)
    make, shape = SMALLEST[family]
    model, x = make().train(), torch.randn(shape)
    before = kept_bytes(lambda: model(x), model.parameters())
    swinkernels.accelerate(model, recompute=True)
    after = kept_bytes(lambda: model(x), model.parameters())
    record_property("ratio", f"{after / before:.3f}")
    assert after <= 0.6 * before


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
    block, parts = FAMILIES[family].block, FAMILIES[family].parts
    for m in (model, fast):
        edit(lambda name, m=m: m.get_submodule(f"{block}.{parts[name]}"))
    expected, got = step(model, x), step(fast, x)
    # In these families an edit of the attention has no effect on mlp_half.
    only_mlp = family in ("timm v2", "torchvision v2", "mmpretrain v2")
    blocks = FAMILIES[family].blocks
    assert len(halves["mlp_half"]) == (blocks if only_mlp and edit is parametrised_qkv else blocks - 1)
    assert_same(got, expected)


@pytest.mark.parametrize("family", ["timm", "torchvision", "mmpretrain", "MONAI", "copy"])
def test_dropout_of_projections(family, halves):
    x = make_image(family=family)
    model, fast = accelerated(make_model(family), recompute=False), accelerated(make_model(family))
    for m in (model, fast):
        attn = m.get_submodule(f"{FAMILIES[family].block}.attn")
        if family == "torchvision":
            attn.dropout = 0.3
        else:
            (attn.w_msa if family == "mmpretrain" else attn).proj_drop.p = 0.3
    expected, got = step(model, x), step(fast, x)
    assert len(halves["mlp_half"]) == FAMILIES[family].blocks - 1
    assert_same(got, expected)


@pytest.mark.parametrize(
    "family", ["timm", "torchvision", "transformers", "transformers v2", "mmpretrain", "MONAI", "copy", "copy v2"]
)
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
    assert len(halves["mlp_half"]) == FAMILIES[family].blocks
    assert_as_noisy(*found, exact)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(
    "family", ["timm", "torchvision", "transformers", "transformers v2", "mmpretrain", "MONAI", "copy", "copy v2"]
)
def test_checkpointing(family, use_reentrant, halves):
    model, x = make_model(family, drop_path=0.4), make_image(family=family)
    expected, got = (step(Checkpointed(m, use_reentrant), x) for m in (model, accelerated(model)))
    assert len(halves["mlp_half"]) == FAMILIES[family].blocks * (1 if use_reentrant else 2)
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


@pytest.mark.parametrize(
    "family",
    long_but(
        ["timm", "torchvision", "transformers", "transformers v2", "mmpretrain", "MONAI", "copy", "copy v2"],
        "timm", "mmpretrain", "copy v2",
    ),
)  # fmt: skip
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
    assert [entry.module_class for entry in report.not_recomputed] == ["PatchEmbed", "PatchMerging"]


def test_the_report_groups_classes_that_never_recompute():
    report = swinkernels.accelerate(make_small_model("mmdet"), recompute=True)
    assert [entry.path for entry in report.not_recomputed] == ["blocks.0.attn", "blocks.1.attn"]
    line = next(line for line in str(report).splitlines() if "not implemented" in line)
    assert line.startswith("blocks.0.attn and 1 more ")
    assert line.endswith("recompute is not implemented for this class")


def test_wrong_argument():
    with pytest.raises(TypeError, match="recompute must be a bool, got 1"):
        swinkernels.accelerate(make_model(), recompute=1)


# Copies whose MLP is not the composition of its layers in every call


class DisablesAutocast(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.fc1.weight.dtype))


class Clamps(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e3, 1e3)


class DropsByPython(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.0 * y if self.training and random.random() < 0.01 else y


class DropsByNumpy(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return 0.0 * y if self.training and np.random.rand() < 0.01 else y  # noqa: NPY002


class ScalesInTraining(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return (1.5 if self.training else 1.0) * super().forward(x)


@pytest.mark.parametrize("kind", [DisablesAutocast, Clamps, DropsByPython, DropsByNumpy, ScalesInTraining])
def test_other_mlps_are_not_replaced(kind, halves):
    model = make_model("copy")
    for block in model.blocks:
        block.mlp = kind(16).double()
    report = swinkernels.accelerate(model, recompute=True)
    assert [module.path for module in report.not_recomputed] == ["blocks.0", "blocks.1"]
    assert all("a trial did not show" in module.reason for module in report.not_recomputed)
    model(make_image(family="copy"))
    assert halves["mlp_half"] == []


class Gated(Mlp):
    """Multiplies by tensors that do not exist at first."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim)
        self.register_buffer("gate", None)

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for name in ("gate", "gamma"):
            y = y if getattr(self, name, None) is None else y * getattr(self, name)
        return y


@pytest.mark.parametrize("name", ["gate", "gamma"])
def test_tensors_added_to_an_mlp_afterwards(name, halves):
    model, x = make_model("copy"), make_image(family="copy")
    for block in model.blocks:
        block.mlp = Gated(16).double()
    fast = accelerated(model)
    step(fast, x)
    assert len(halves["mlp_half"]) == 2
    for m in (model, fast):
        tensor = torch.full((16,), 2.0, dtype=torch.float64)
        setattr(m.blocks[0].mlp, name, tensor if name == "gate" else nn.Parameter(tensor))
    assert_same(step(fast, x), step(model, x))
    assert len(halves["mlp_half"]) == 3


@pytest.mark.parametrize("options", [{"window_size": (11, 11, 11)}, {"window_size": (2, 4, 4), "use_checkpoint": True}])
def test_the_report_names_blocks_of_monai_without_effect(options):
    swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    stage = swin_unetr.BasicLayer(8, 2, 2, drop_path=[0.0, 0.0], **options).train()
    report = swinkernels.accelerate(stage, recompute=True)
    assert [module.path for module in report.not_recomputed] == ["blocks.0", "blocks.1"]
