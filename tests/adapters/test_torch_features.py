"""Accelerated models of several libraries, and the model of this package, in what PyTorch does with modules."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
import warnings

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

import swinkernels
from swinkernels import _extension
from swinkernels.models import SwinTransformer
from tests.support.parity import randomise
from tests.support.sweeps import long_but


class Sequences(nn.Module):
    """A model of transformers, from images to the last tokens."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
        options = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}
        self.model = transformers.SwinModel(transformers.SwinConfig(image_size=32, drop_path_rate=0.0, **options))

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).last_hidden_state


class Last(nn.Module):
    """The last of the maps that a model gives."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[-1]


def maps_of_monai() -> nn.Module:
    swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    return Last(
        swin_unetr.SwinTransformer(
            in_chans=3, embed_dim=12, window_size=(4, 4), patch_size=(2, 2), depths=(2, 2, 1, 1),
            num_heads=(1, 2, 4, 4), spatial_dims=2,
        )
    )  # fmt: skip


def maps_of_mmpretrain() -> nn.Module:
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what mmcv-lite and mmengine have to say
        from mmpretrain.models import SwinTransformer as MMPretrainSwin
    arch = {"embed_dims": 16, "depths": [2, 2], "num_heads": [1, 2]}
    return Last(MMPretrainSwin(arch, img_size=32, patch_size=2, window_size=4, out_indices=(0, 1), drop_path_rate=0.0))


@functools.cache
def original(library: str) -> nn.Module:
    torch.manual_seed(0)
    if library == "timm":
        model: nn.Module = timm.models.SwinTransformer(
            img_size=32, patch_size=2, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
            drop_path_rate=0.0,
        )  # fmt: skip
    elif library == "torchvision":
        model = TorchvisionSwin([2, 2], 16, [2, 2], [1, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5)
    elif library == "transformers":
        model = Sequences()
    elif library == "timm-v2":
        model = timm.models.SwinTransformerV2(
            img_size=32, patch_size=2, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
            drop_path_rate=0.0,
        )  # fmt: skip
    elif library == "monai":
        model = maps_of_monai()
    elif library == "mmpretrain":
        model = maps_of_mmpretrain()
    else:
        model = SwinTransformer(32, 2, 3, 5, 16, (2, 2), (1, 2), 4, drop_path_rate=0.0)
    randomise(model)
    return model.eval()


def accelerated(library: str) -> nn.Module:
    model = copy.deepcopy(original(library))
    if library != "swinkernels":
        report = swinkernels.accelerate(model)
        assert report.replaced and not report.skipped
    return model


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


FOREIGN = ["timm", "timm-v2", "torchvision", "transformers", "monai", "mmpretrain"]
libraries = pytest.mark.parametrize("library", [*FOREIGN, "swinkernels"])


# Each library is compiled in one of the two ways; its adapter's own tests compile its blocks, too.
@pytest.mark.parametrize("library", long_but([*FOREIGN, "swinkernels"], "timm", "timm-v2", "swinkernels"))
def test_compile_fullgraph_with_a_dynamic_batch(library):
    torch.compiler.reset()
    model = accelerated(library)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (2, 3, 5):
            x = images(batch)
            torch.testing.assert_close(compiled(x), original(library)(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "library", long_but([*FOREIGN, "swinkernels"], "torchvision", "transformers", "monai", "mmpretrain")
)
def test_compile_of_a_training_step(library):
    torch.compiler.reset()
    model, plain = accelerated(library), copy.deepcopy(original(library))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for m, run in ((plain, plain), (model, compiled)):
        m.zero_grad()
        run(images()).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), model.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@libraries
def test_export(library):
    model, x = accelerated(library), images()
    program = torch.export.export(model, (x,))
    ops = {str(node.target) for node in program.graph.nodes}
    assert any("swinkernels" in op for op in ops), ops
    torch.testing.assert_close(program.module()(x), original(library)(x), rtol=1e-4, atol=1e-4)


RUN_ALONE = """
import sys, torch
library, package, x, out = sys.argv[1:]
torch.ops.load_library(library)
torch.save(torch._inductor.aoti_load_package(package)(torch.load(x)), out)
ours = [name for name in sys.modules if name.partition(".")[0] == "swinkernels"]
assert not ours, ours
"""


@pytest.mark.slow
@pytest.mark.skipif(_extension.build is None, reason=str(_extension.error))
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
@pytest.mark.parametrize("library", long_but(["timm", "torchvision", "transformers", "swinkernels"], "timm"))
def test_aot_inductor(library, tmp_path):
    """The package runs where swinkernels is not imported, only its library of ops loaded."""
    model, x = accelerated(library), images()
    with torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    torch.save(x, tmp_path / "x.pt")
    paths = (_extension.find_library(), package, tmp_path / "x.pt", tmp_path / "out.pt")
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALONE, *map(str, paths)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), original(library)(x), rtol=1e-4, atol=1e-4)


@libraries
def test_channels_last_images(library):
    x = images().contiguous(memory_format=torch.channels_last)
    model = accelerated(library).to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), original(library)(images()), rtol=1e-4, atol=1e-4)


@libraries
def test_moving_averages_of_the_weights(library):
    model = accelerated(library)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    average.update_parameters(model)
    plain = copy.deepcopy(original(library))
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.25)
    torch.testing.assert_close(average.eval()(images()), plain(images()), rtol=1e-3, atol=1e-3)


@libraries
def test_gradient_scaler_and_float16_autocast(library):
    model = accelerated(library).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [p.clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.float16):
        loss = model(images()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert all(p.isfinite().all() for p in model.parameters())
    assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("library", FOREIGN)
def test_torch_jit_trace_records_the_librarys_own_code(library):
    model, x = accelerated(library), images()
    traced = torch.jit.trace(model, x, check_trace=False)
    torch.testing.assert_close(traced(x), original(library)(x), rtol=1e-4, atol=1e-4)


def test_torch_jit_trace_of_this_packages_modules_is_refused():
    with pytest.raises(RuntimeError, match="trace cannot record window attention"):
        torch.jit.trace(accelerated("swinkernels"), images(), check_trace=False)


def test_frozen_parameters_stay_frozen():
    model = accelerated("timm")
    frozen = [name for name, _ in model.named_parameters() if "qkv" in name or "table" in name]
    for name, p in model.named_parameters():
        p.requires_grad_(name not in frozen)
    model(images()).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (name in frozen), name


def test_quantised_and_compiled_modules_are_left_alone():
    model = copy.deepcopy(original("timm"))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    report = swinkernels.accelerate(quantised)
    assert any("qkv" in str(reason) for reason in report.skipped)
    expected = copy.deepcopy(quantised)
    swinkernels.restore(expected)
    torch.testing.assert_close(quantised(images()), expected(images()))
