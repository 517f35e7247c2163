"""Small timm Swins, v1 and v2, and their comparison before and after accelerate."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from torch import Tensor, nn

import swinkernels

REPLACED = (SwinTransformerBlock, SwinTransformerV2Block, PatchMerging, PatchMergingV2)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "divisible": {"img_size": (32, 64), "window_size": 4},
    "padded-9x13-5x7": {"img_size": (36, 52), "window_size": 4},
    "odd-window-17x11-9x6": {"img_size": (70, 44), "window_size": 5},
    "window-7-14x10-clamped-7x5": {"img_size": (56, 40), "window_size": 7},
    "clamped-on-one-axis-3x8": {"img_size": (12, 32), "window_size": 4},
    "non-square-window": {"img_size": (40, 48), "window_size": (3, 5)},
    "no-qkv-bias": {"img_size": (36, 52), "window_size": 4, "qkv_bias": False},
    "head-dim-given": {"img_size": (36, 52), "window_size": 4, "head_dim": 12},
    "always-partition": {"img_size": (12, 36), "window_size": 4, "always_partition": True},
    "dynamic-mask": {"img_size": (36, 52), "window_size": 4, "dynamic_img_size": True},
}


def make_model(version: int = 1, seed: int = 0, **options: Any) -> Any:
    """A small Swin far from its initial state, so that bias, mask, scale, pad tokens and norms all count."""
    torch.manual_seed(seed)
    defaults = {
        "img_size": (36, 52),
        "window_size": 4,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": (2, 2),
        "num_heads": (2, 4),
        "num_classes": 5,
        "drop_path_rate": 0.0,
    }
    model = (SwinTransformer if version == 1 else SwinTransformerV2)(**{**defaults, **options}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("relative_position_bias_table"):
                p.normal_(std=1.0)
            elif name.endswith("qkv.weight"):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif name.endswith(("qkv.bias", "q_bias", "v_bias")):
                p.normal_()
            elif ".norm" in name and "layers." in name:  # v2 starts with a weight of 0, so that its branches do nothing
                p.normal_(mean=float(name.endswith("weight")), std=0.2)
    return model


def make_image(model: Any, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    weight = model.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size), generator=generator).to(weight.dtype)


def replaceable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, REPLACED)]


def run(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Output, gradient of the input and of every parameter that has one."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x)
    torch.manual_seed(2)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.dtype))
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert x.grad is not None
    return {"out": out.detach(), "x": x.grad, **grads}


def assert_as_good(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """The error against float64 is at most twice that of timm's own code in the same dtype, and a few roundings."""
    assert got.keys() == plain.keys() == exact.keys()
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        eps = torch.finfo(got[name].dtype).eps * (256 if got[name].dtype == torch.float64 else 4)
        few = 1 + 20 / exact[name].numel()  # such as one for each head: chance has a say
        error, base = got[name].double() - exact[name], plain[name].double() - exact[name]
        for measure in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().max()):
            e, limit = measure(error), few * (2 * measure(base) + eps * measure(exact[name]))
            assert e <= limit, f"{name}: error {e:.3g}, at most {limit:.3g}"


def check_parity(model: nn.Module, x: Tensor, backend: str = "auto") -> None:
    """Compare the model with its accelerated copy; the judge is the model in float64."""
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend)
    assert len(report.replaced) == len(replaceable(model))
    assert not report.skipped
    exact = run(copy.deepcopy(model).double(), x.double())
    assert_as_good(run(fast, x), run(model, x), exact)
