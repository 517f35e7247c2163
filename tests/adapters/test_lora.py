"""Tests peft's LoRA on qkv and proj, added before or after ``accelerate``: the op uses the LoRA layers' results."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import swinkernels
from tests.support.op_calls import op_calls
from tests.support.parity import randomise

peft = pytest.importorskip("peft", reason="peft is not installed")
ATTENTION = "window_attention_qkvpacked_fwd"


def timm_swin() -> tuple[nn.Module, tuple[int, ...]]:
    """Return a timm Swin with padded maps in both stages, and its input shape."""
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=2, num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
        strict_img_size=False, drop_path_rate=0.0,
    )  # fmt: skip
    return model, (2, 3, 36, 44)


def swin_unetr() -> tuple[nn.Module, tuple[int, ...]]:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    model = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, num_heads=(1, 2, 2, 2), depths=(2, 1, 1, 1))
    return model, (1, 1, 64, 32, 32)


def mmpretrain_swin() -> tuple[nn.Module, tuple[int, ...]]:
    """Return an mmpretrain Swin with padded maps and its input shape; its only output is the last stage's map."""
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mmpretrain.models import SwinTransformer

    arch = {"embed_dims": 16, "depths": [2, 2], "num_heads": [1, 2]}
    backbone = SwinTransformer(arch, img_size=32, patch_size=2, window_size=4, out_indices=(1,), drop_path_rate=0.0)

    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)[0]

    return Features(), (2, 3, 36, 44)


MODELS = {"timm": (timm_swin, 4), "MONAI": (swin_unetr, 5), "mmpretrain": (mmpretrain_swin, 4)}


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, target_modules=r".*(attn|w_msa)\.(qkv|proj)", init_lora_weights=False, **options)
    return peft.get_peft_model(model, config)


def step(model: nn.Module, shape: tuple[int, ...]) -> tuple[int, dict[str, Tensor]]:
    """Run forward and backward; return the number of calls of the op, and the output and every gradient by name."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    torch.manual_seed(3)
    with op_calls() as calls:
        out = model(x)
        # After a norm at the end of a model, the sum or the sum of squares of the output would be constant.
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(4))).mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    assert all(g is not None for g in gradients.values())
    return calls[ATTENTION], {"": out.detach(), **gradients}


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        scale = value.abs().max()
        assert (got[name] - value).abs().max() <= 1e-3 * scale, name


@pytest.mark.tool("peft: LoRA", "peft", "the op runs in timm v1, mmpretrain v1 and MONAI")
@pytest.mark.parametrize("library", MODELS)
@pytest.mark.parametrize("first", ["lora", "accelerate"])
def test_outputs_and_every_gradient(library: str, first: str) -> None:
    make, blocks = MODELS[library]
    model, shape = make()
    randomise(model)  # makes the qkv bias, the value of pad tokens, nonzero
    fast = copy.deepcopy(model)
    calls, want = step(with_lora(model), shape)
    assert not calls
    assert sum("lora" in name for name in want) == 4 * blocks
    if first == "lora":
        fast = with_lora(fast)
        assert not swinkernels.accelerate(fast).skipped
    else:
        swinkernels.accelerate(fast)
        fast = with_lora(fast)
    calls, got = step(fast, shape)
    assert calls == blocks
    assert_close(got, want)


def test_adapters_come_and_go() -> None:
    """Disabling, merging or removing a LoRA adapter takes effect with the next call."""
    model, shape = timm_swin()
    x = torch.randn(shape)
    fast = with_lora(copy.deepcopy(model)).eval()
    swinkernels.accelerate(fast)
    plain = with_lora(model).eval()
    with torch.no_grad(), op_calls() as calls:
        apart = (fast(x) - plain.get_base_model()(x)).abs().max()
        assert apart < 1e-5
        with fast.disable_adapter(), plain.disable_adapter():
            assert (fast(x) - plain(x)).abs().max() < 1e-5
        fast.merge_adapter()
        assert (fast(x) - plain(x)).abs().max() < 1e-5
        unloaded = fast.merge_and_unload()
        assert (unloaded(x) - plain(x)).abs().max() < 1e-5
    assert calls[ATTENTION] == 4 * 4


def test_compiled() -> None:
    torch.compiler.reset()
    model, shape = timm_swin()
    fast = with_lora(model).eval()
    swinkernels.accelerate(fast)
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(x), fast(x), rtol=1e-5, atol=1e-5)


def layers(model: nn.Module, kind: str = "qkv") -> list[Any]:
    return [m for name, m in model.named_modules() if name.endswith(f"attn.{kind}")]


def hook_in_lora(model: nn.Module) -> None:
    layers(model)[0].lora_A["default"].register_forward_hook(lambda *_: None)


def forward_on_the_base(model: nn.Module) -> None:
    base = layers(model)[0].base_layer
    base.forward = lambda x: nn.Linear.forward(base, x) + 1


def another_base(model: nn.Module) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layers(model, "proj")[0].base_layer.__class__ = Doubled


REFUSED = {
    "DoRA": ({"use_dora": True}, lambda model: None, 4, "a LoRA layer with a bias, or of a variant such as DoRA"),
    "bias": ({"lora_bias": True}, lambda model: None, 4, "a LoRA layer with a bias, or of a variant such as DoRA"),
    "hook": ({}, hook_in_lora, 1, "a hook is registered on attn.qkv.lora_A.default"),
    "forward": ({}, forward_on_the_base, 1, "attn.qkv.base_layer.forward was replaced on the instance"),
    "subclass": ({}, another_base, 1, "attn.proj.base_layer is a "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_be_more_is_left_to_the_library(case: str) -> None:
    options, change, left, said = REFUSED[case]
    model, shape = timm_swin()
    fast = copy.deepcopy(model)
    model, fast = with_lora(model, **options), with_lora(fast, **options)
    change(model)
    change(fast)
    report = swinkernels.accelerate(fast)
    assert said in str(report)
    calls, got = step(fast, shape)
    assert calls == 4 - left
    assert_close(got, step(model, shape)[1])
