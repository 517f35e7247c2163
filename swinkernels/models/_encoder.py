"""Functions shared by the models: sizes, rates, stages and initialisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from swinkernels.nn import BasicLayer, BasicLayerV2, PatchMerging, PatchMergingV2, SwinTransformerBlockV2
from swinkernels.ops._arguments import check_ints


def stage_sizes(op: str, img_size: Any, patch_size: int, stages: int) -> list[tuple[int, ...] | None]:
    """Return the map size of each stage for images of ``img_size``, or one None per stage if ``img_size`` is None."""
    if img_size is None:
        return [None] * stages
    size = tuple(-(-n // patch_size) for n in check_ints(op, "img_size", img_size, 2, at_least=1))
    return [tuple(-(-n // 2**i) for n in size) for i in range(stages)]


def drop_path_rates(rate: float, depths: Sequence[int]) -> list[list[float]]:
    """Return the drop path rate of each block, by stage; the rates rise linearly from 0 to ``rate``."""
    rates = torch.linspace(0, rate, sum(depths), device="cpu").tolist()
    return [[rates.pop(0) for _ in range(depth)] for depth in depths]


def make_stages(
    version: int,
    embed_dim: int,
    sizes: Sequence[tuple[int, ...] | None],
    depths: Sequence[int],
    num_heads: Sequence[int],
    rates: Sequence[Sequence[float]],
    options: dict[str, Any],
    pretrained_window_sizes: Sequence[int],
) -> list[BasicLayer]:
    """Create an encoder's stages, all with ``options``; every stage but the last ends with patch merging."""
    stages = []
    for i, depth in enumerate(depths):
        more: dict[str, Any] = {"drop_path": rates[i], **options}
        if version == 2:
            more["pretrained_window_size"] = pretrained_window_sizes[i]
        if i + 1 < len(depths):
            more["downsample"] = PatchMerging if version == 1 else PatchMergingV2
        layer = BasicLayer if version == 1 else BasicLayerV2
        stages.append(layer(embed_dim * 2**i, sizes[i], depth, num_heads[i], **more))
    return stages


def initialise(model: nn.Module) -> None:
    """Initialise as Microsoft does: Linear weights of std 0.02, zero biases and, in v2 blocks, zero norm weights."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, SwinTransformerBlockV2):
            nn.init.zeros_(module.norm1.weight)
            nn.init.zeros_(module.norm2.weight)


def check_stages(op: str, depths: Sequence[int], **others: Sequence[Any]) -> None:
    """Raise ValueError unless each argument in ``others`` has one value per stage."""
    for name, values in others.items():
        if len(values) != len(depths):
            raise ValueError(f"{op}: {name} must have one value for each of the {len(depths)} depths, got {values}")
