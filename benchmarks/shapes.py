"""Shapes of published models: of window attention, as the cases that the tests draw inputs for, and of feature maps."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from swinkernels.testing import WindowAttentionCase

Case = WindowAttentionCase


def _stages(batch: int, heads: int, window: int, first: int, **options: bool) -> list[Case]:
    """The four stages of a classifier: the map halves, the heads double; a map of one window is not shifted."""
    return [
        Case(batch, (size, size), heads << i, 32, window, window // 2 if size > window else 0, **options)
        for i in range(4)
        for size in [first >> i]
    ]


# The first is the one that the goals of the project are stated for.
ATTENTION: dict[str, Case] = {
    **{f"swin_t.{i}": case for i, case in enumerate(_stages(128, 3, 7, 56), 1)},
    "window8.1": Case(64, (64, 64), 3, 32, 8, 4),
    **{f"swin_b.{i}": case for i, case in enumerate(_stages(64, 4, 7, 56), 1)},
    **{f"swin_b384.{i}": case for i, case in enumerate(_stages(16, 4, 12, 96), 1)},
    **{f"swinv2_t.{i}": case for i, case in enumerate(_stages(64, 3, 8, 64, has_logit_scale=True), 1)},
    "swinv2_t_w16.1": Case(64, (64, 64), 3, 32, 16, 8, has_logit_scale=True),
    # 96 x 96 x 96 voxels: 48 tokens an axis are padded to 49.
    "swin_unetr.1": Case(1, (48, 48, 48), 3, 16, 7, 3, has_pad_qkv=True),
    # Detection: 800 x 1216 pixels, padded to whole windows, pad tokens holding the bias of the QKV Linear.
    "detection.1": Case(2, (200, 304), 3, 32, 7, 3, has_pad_qkv=True),
    "restoration": Case(8, (64, 64), 6, 32, 16, 8),
    "batch1.1": Case(1, (56, 56), 3, 32, 7, 3),
    "batch1.3": Case(1, (14, 14), 12, 32, 7, 3),
    "head_dim16": Case(64, (56, 56), 6, 16, 7, 3),
    "head_dim64": Case(64, (56, 56), 2, 64, 7, 3),
}
QUICK = ("swin_t.1", "swin_t.2", "swin_t.3", "swin_t.4", "window8.1")
GOAL = "swin_t.1"


AnyCase = TypeVar("AnyCase", "Case", "MapCase")


def with_batch(case: AnyCase, batch: int) -> AnyCase:
    return dataclasses.replace(case, batch=min(case.batch, batch))


@dataclasses.dataclass(frozen=True)
class MapCase:
    """A feature map for the memory-bound ops, with the windows it is cut into and the factor it is expanded by."""

    batch: int
    size: tuple[int, ...]
    channels: int
    window: int = 7
    shift: int = 3
    factor: int = 2

    def __str__(self) -> str:
        return f"b{self.batch}-{'x'.join(map(str, self.size))}-c{self.channels}"


# Those that the goals of the memory-bound ops are stated for: stages 1 and 2 of Swin-T, and of Swin UNETR, whose 48
# tokens an axis are padded to 49.
MAP_GOALS: dict[str, MapCase] = {
    "swin_t.1": MapCase(128, (56, 56), 96),
    "swin_t.2": MapCase(128, (28, 28), 192),
    "swin_unetr.1": MapCase(2, (48, 48, 48), 48),
}
# Detection: 200 x 304 tokens, padded to 203 x 308.
PADDED_MAPS: dict[str, MapCase] = {"detection.1": MapCase(2, (200, 304), 96)}
# What Swin-Unet's Linear gives to be laid out: 2 x 2 parts of 96 channels, and 4 x 4 in the last layer.
EXPANDED_MAPS: dict[str, MapCase] = {
    "swin_unet.expand": MapCase(128, (28, 28), 384),
    "swin_unet.final": MapCase(24, (56, 56), 1536, factor=4),
}
