"""Tests the adapter of timm's patch embedding."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

timm = pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import PatchEmbed  # noqa: E402

import swinkernels  # noqa: E402
from swinkernels.adapters.libraries.timm.patch_embed import AcceleratedPatchEmbed  # noqa: E402
from swinkernels.testing import assert_within_budget  # noqa: E402
from tests.support.fused_products import called_ops, run_kernels_anywhere  # noqa: E402

NAME = "swinkernels::fused_patch_linear"


def make(**options: Any) -> Any:
    torch.manual_seed(0)
    given = {"img_size": (24, 40), "patch_size": 4, "embed_dim": 24, "norm_layer": nn.LayerNorm, "output_fmt": "NHWC"}
    embed = PatchEmbed(**{**given, **options}).eval()
    for name, p in embed.named_parameters():
        if "norm" in name:
            nn.init.normal_(p, mean=1.0)
    return embed


def accelerated(embed: Any) -> Any:
    fast = copy.deepcopy(embed)
    assert [entry.module_class for entry in swinkernels.accelerate(fast).replaced] == ["PatchEmbed"]
    assert type(fast) is AcceleratedPatchEmbed
    return fast


def image(batch: int = 2, size: tuple[int, int] = (24, 40), channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(1))


def inferred(embed: Any, x: Tensor) -> tuple[Tensor, bool]:
    """Return the tokens, computed without gradients, and whether the op was called."""
    with torch.no_grad(), called_ops() as called:
        y = embed(x)
    return y, NAME in called


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"norm_layer": None}, {"bias": False}, {"patch_size": (2, 8)}, {"in_chans": 1, "img_size": None}],
    ids=str,
)
def test_results(options, dtype, monkeypatch):
    run_kernels_anywhere(monkeypatch, dtype)
    embed = make(**options).to(dtype)
    fast, x = accelerated(embed), image(channels=options.get("in_chans", 3)).to(dtype)
    for given in (x, x.contiguous(memory_format=torch.channels_last), x[:1]):
        y, is_op = inferred(fast, given)
        assert is_op
        with torch.no_grad():
            exact = copy.deepcopy(embed).double()(given.double())
            assert_within_budget(y, exact, functools.partial(embed, given))


def test_what_timms_code_computes(monkeypatch):
    run_kernels_anywhere(monkeypatch)
    embed = make()
    x = image()
    for path in ("proj", "norm"):
        fast, seen = accelerated(embed), []
        fast.get_submodule(path).register_forward_hook(lambda *given, seen=seen: seen.append(given))
        assert not inferred(fast, x)[1]
        assert seen
    for change in (
        lambda e: setattr(e.proj, "padding", (1, 1)),
        lambda e: setattr(e.proj, "stride", (2, 2)),
        lambda e: setattr(e, "norm", nn.RMSNorm(24)),
        lambda e: setattr(e, "proj", nn.Conv2d(3, 24, 4, 4, padding_mode="reflect", padding=(0, 4))),
    ):
        plain, fast = copy.deepcopy(embed), accelerated(embed)
        for each in (plain, fast):
            torch.manual_seed(2)
            change(each)
        with torch.no_grad():
            assert torch.equal(fast(x), plain(x))
    fast = accelerated(embed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not inferred(fast, x)[1]
    assert not inferred(fast.double(), x.double())[1]
    assert inferred(fast.float(), x)[1]


def test_image_sizes(monkeypatch):
    """A wrong size raises timm's error; an image that timm pads or crops is left to timm."""
    run_kernels_anywhere(monkeypatch)
    with pytest.raises(AssertionError, match="doesn't match model"):
        inferred(accelerated(make()), image(size=(24, 44)))
    for options in ({"dynamic_img_pad": True}, {"img_size": None}):
        embed = make(strict_img_size=False, **options)
        y, is_op = inferred(accelerated(embed), image(size=(23, 41)))
        assert not is_op
        assert torch.equal(y, embed(image(size=(23, 41))))
        assert inferred(accelerated(embed), image(size=(28, 36)))[1]


def test_training_runs_timms_code():
    embed = make().double().train()
    fast, x = accelerated(embed), image().double()
    results = []
    for each in (embed, fast):
        given = x.clone().requires_grad_()
        each(given).square().sum().backward()
        results.append([given.grad, *(p.grad for p in each.parameters())])
    assert all(map(torch.equal, *results))


def test_other_forms_are_not_reported():
    class Derived(PatchEmbed):
        pass

    model = nn.ModuleList([make(output_fmt=None), make(output_fmt="NCHW"), Derived(16, 4)])
    report = swinkernels.accelerate(model)
    assert not report.replaced
    assert not report.skipped
    assert report.reason is not None
    for name in ("flatten", "output_fmt"):  # as after unpickling a module of an older timm
        old = make()
        delattr(old, name)
        assert not swinkernels.accelerate(nn.ModuleList([old])).replaced
    derived = nn.ModuleList([Derived(16, 4, output_fmt="NHWC")])
    (skipped,) = swinkernels.accelerate(derived).skipped
    assert "Derived is a subclass" in skipped.reason


def test_restore():
    embed = accelerated(make())
    swinkernels.restore(embed)
    assert type(embed) is PatchEmbed


def test_compiled_and_exported(monkeypatch):
    """Compiled code calls the op, for all batches in one graph; an exported program does not."""
    run_kernels_anywhere(monkeypatch)
    fast, x = accelerated(make()), image()
    torch.compiler.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    for batch in (2, 3, 5):
        y, is_op = inferred(compiled, image(batch))
        assert is_op
        torch.testing.assert_close(y, inferred(fast, image(batch))[0], rtol=0, atol=0)
    assert len(graphs) == 1
    with torch.no_grad():
        program = torch.export.export(fast, (x,))
    assert not any("swinkernels" in str(node.target) for node in program.graph.nodes)


def test_export_with_dynamic_sizes(monkeypatch):
    """timm pads images of any size, and so does the exported program."""
    run_kernels_anywhere(monkeypatch)
    embed = make(dynamic_img_pad=True, strict_img_size=False)
    fast = accelerated(embed)
    sizes = dict.fromkeys((2, 3), torch.export.Dim.DYNAMIC)
    with torch.no_grad():
        program = torch.export.export(fast, (image(size=(23, 42)),), dynamic_shapes=(sizes,))
        for size in ((24, 40), (17, 90)):
            x = image(size=size)
            torch.testing.assert_close(program.module()(x), embed(x), rtol=0, atol=1e-5)
