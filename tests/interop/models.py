"""Small models of several libraries, built as users build them before they accelerate and export them."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer as TorchvisionSwin

from swinkernels.models import SwinTransformer
from tests.support import published_forms as forms
from tests.support.parity import randomise

_TINY = {"patch_size": 2, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2), "window_size": 4}


class Restoration(nn.Module):
    """A model that calls its blocks as SwinIR does, with tokens and the map size, and adds its input to the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 3, 3, padding=1)
        self.blocks = nn.ModuleList(
            forms.RestorationBlock(12, (16, 16), 2, window_size=4, shift_size=shift) for shift in (0, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        tokens, size = y.flatten(2).transpose(1, 2), (y.shape[2], y.shape[3])
        for block in self.blocks:
            tokens = block(tokens, size)
        return x + self.last(tokens.transpose(1, 2).reshape(y.shape))


def swin_unetr() -> nn.Module:
    nets = pytest.importorskip("monai.networks.nets", reason="MONAI is not installed")
    return nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12, num_heads=(1, 2, 2, 2), depths=(2, 1, 1, 1))


# Name -> the model, the shape of an input, and the axes of the input that may vary in size.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "timm v1": (lambda: timm.models.SwinTransformer(img_size=32, num_classes=5, **_TINY), (2, 3, 32, 32), (0,)),
    "timm v1, any size": (
        lambda: timm.models.SwinTransformer(img_size=32, num_classes=5, strict_img_size=False, **_TINY),
        (2, 3, 36, 44),
        (0, 2, 3),
    ),
    "timm v2": (lambda: timm.models.SwinTransformerV2(img_size=32, num_classes=5, **_TINY), (2, 3, 32, 32), (0,)),
    "torchvision": (
        lambda: TorchvisionSwin([2, 2], 16, [2, 2], [1, 2], [4, 4], stochastic_depth_prob=0.0, num_classes=5),
        (2, 3, 36, 44),
        (0, 2, 3),
    ),
    "swinkernels": (lambda: SwinTransformer(32, 2, 3, 5, 16, (2, 2), (1, 2), 4), (2, 3, 36, 44), (0, 2, 3)),
    "SwinIR": (Restoration, (2, 3, 16, 16), (0,)),
    "SwinUNETR": (swin_unetr, (2, 1, 64, 32, 32), (0,)),  # 2 x 1 x 1 tokens in the last stage
}


@functools.cache
def model(name: str) -> nn.Module:
    torch.manual_seed(0)
    made = MODELS[name][0]()
    randomise(made)
    return made.eval()


def image(shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def shapes(name: str) -> list[tuple[int, ...]]:
    """Return input shapes for the exported model ``name``: the shape used at export, and others."""
    _, shape, axes = MODELS[name]
    others = [tuple(s + 1 if axis == 0 else s for axis, s in enumerate(shape))] if 0 in axes else []
    if len(axes) > 1:  # the first of these shapes needs padding, the second does not
        others += [(3, shape[1], 42, 38), (2, shape[1], 32, 48)]
    return [shape, *others]
