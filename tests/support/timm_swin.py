"""Builds small timm Swins, v1 and v2, and compares them before and after ``accelerate``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.swin_transformer import PatchMerging, SwinTransformer, SwinTransformerBlock
from timm.models.swin_transformer_v2 import PatchMerging as PatchMergingV2
from timm.models.swin_transformer_v2 import SwinTransformerV2, SwinTransformerV2Block
from timm.models.swin_transformer_v2_cr import PatchMerging as PatchMergingV2Cr
from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
from torch import Tensor, nn

import swinkernels
from tests.support.parity import assert_as_good, run, shaken

__all__ = ["CONFIGURATIONS", "assert_as_good", "check_parity", "make_image", "make_model", "replaceable", "run"]

REPLACED = (
    *(SwinTransformerBlock, SwinTransformerV2Block, SwinTransformerV2CrBlock),
    *(PatchMerging, PatchMergingV2, PatchMergingV2Cr, PatchEmbed),
)

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
    """Build a Swin with parameters far from their initial values, so that bias, mask, scale, pads and norms matter."""
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
            elif ".norm" in name and "layers." in name:  # v2's norms start with weight 0, so its branches would be zero
                p.normal_(mean=float(name.endswith("weight")), std=0.2)
    return model


def make_image(model: Any, batch: int = 2, size: tuple[int, int] | None = None) -> Tensor:
    weight = model.patch_embed.proj.weight
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *(size or model.patch_embed.img_size), generator=generator).to(weight.dtype)


def replaceable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, REPLACED)]


def check_parity(model: nn.Module, x: Tensor, backend: str = "auto", magnifies: bool = False) -> None:
    """Compare ``model`` with its accelerated copy; the reference is ``model`` in float64.

    Set ``magnifies`` for v2, whose large scores and cancelling sums magnify rounding errors.
    """
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend)
    assert len(report.replaced) == len(replaceable(model))
    assert not report.skipped
    exact = run(copy.deepcopy(model).double(), x.double())
    moved = shaken(model, x, x.dtype) if magnifies else None
    assert_as_good(run(fast, x), run(model, x), exact, moved)
