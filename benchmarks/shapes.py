"""Shapes of published models: cases of window attention, feature maps, and whole models with their blocks."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from swinkernels.testing import WindowAttentionCase

Case = WindowAttentionCase


def _stages(batch: int, heads: int, window: int, first: int, **options: bool) -> list[Case]:
    """Return a classifier's four stages. From one stage to the next, the map's sides halve and the heads double."""
    return [
        Case(batch, (size, size), heads << i, 32, window, window // 2 if size > window else 0, **options)
        for i in range(4)
        for size in [first >> i]
    ]


# Cases of window attention by name. goals.py sets goals for some of them.
ATTENTION: dict[str, Case] = {
    **{f"swin_t.{i}": case for i, case in enumerate(_stages(128, 3, 7, 56), 1)},
    "window8.1": Case(64, (64, 64), 3, 32, 8, 4),
    **{f"swin_b.{i}": case for i, case in enumerate(_stages(64, 4, 7, 56), 1)},
    **{f"swin_l.{i}": case for i, case in enumerate(_stages(64, 6, 7, 56), 1)},
    **{f"swin_b384.{i}": case for i, case in enumerate(_stages(16, 4, 12, 96), 1)},
    **{f"swin_l384.{i}": case for i, case in enumerate(_stages(16, 6, 12, 96), 1)},
    **{f"swinv2_t.{i}": case for i, case in enumerate(_stages(64, 3, 8, 64, has_logit_scale=True), 1)},
    "swinv2_t_w16.1": Case(64, (64, 64), 3, 32, 16, 8, has_logit_scale=True),
    "swinv2_b384_w24.1": Case(16, (96, 96), 4, 32, 24, 12, has_logit_scale=True),
    # 96 x 96 x 96 voxels: 48 tokens per axis are padded to 49.
    "swin_unetr.1": Case(1, (48, 48, 48), 3, 16, 7, 3, has_pad_qkv=True),
    "swin_unetr128.1": Case(1, (64, 64, 64), 3, 16, 7, 3, has_pad_qkv=True),
    # Detection: 800 x 1216 pixels. Pad tokens complete the windows; their q, k and v are the bias of the QKV Linear.
    "detection.1": Case(2, (200, 304), 3, 32, 7, 3, has_pad_qkv=True),
    # SwinIR: 180 channels in 6 heads.
    "swin_ir": Case(8, (64, 64), 6, 30, 8, 4),
    "restoration": Case(8, (64, 64), 6, 32, 16, 8),
    # Video: 32 frames of 224 x 224 pixels in patches of 2 x 4 x 4; windows of 16 frames, shifted by half a window.
    "video_swin_t.1": Case(4, (16, 56, 56), 3, 32, (8, 7, 7), (4, 3, 3)),
    # Weather: axes of pressure level, latitude and longitude; the longitude axis is periodic.
    "weather.1": Case(1, (8, 186, 360), 6, 32, (2, 6, 12), (1, 3, 6), options={"periodic": (False, False, True)}),
    # Segment Anything: 1024 x 1024 pixels in patches of 16, padded to 70 tokens per axis; axis tables, no shift.
    "sam_b": Case(1, (64, 64), 12, 64, 14, 0, has_table=False, has_axis_tables=True, has_pad_qkv=True),
    # Florence-2: 768 x 768 pixels in patches of 4; DaViT's windows have neither shift nor bias.
    "florence2.1": Case(1, (192, 192), 4, 32, 12, 0, has_table=False),
    "florence2.2": Case(1, (96, 96), 8, 32, 12, 0, has_table=False),
    "batch1.1": Case(1, (56, 56), 3, 32, 7, 3),
    "batch1.3": Case(1, (14, 14), 12, 32, 7, 3),
    "head_dim16": Case(64, (56, 56), 6, 16, 7, 3),
    "head_dim64": Case(64, (56, 56), 2, 64, 7, 3),
    # 256 windows of 64, 256 and 576 tokens: the shapes of FWA-2's published times (peers.PUBLISHED).
    "fwa2.64": Case(4, (64, 64), 6, 32, 8, 0, has_logit_scale=True),
    "fwa2.256": Case(16, (64, 64), 6, 32, 16, 0, has_logit_scale=True),
    "fwa2.576": Case(16, (96, 96), 6, 32, 24, 0, has_logit_scale=True),
}
QUICK = ("swin_t.1", "swin_t.2", "swin_t.3", "swin_t.4", "window8.1")
GOAL = "swin_t.1"


AnyCase = TypeVar("AnyCase", "Case", "MapCase")


def with_batch(case: AnyCase, batch: int) -> AnyCase:
    return dataclasses.replace(case, batch=min(case.batch, batch))


@dataclasses.dataclass(frozen=True)
class MapCase:
    """A feature map for the memory-bound ops, with the window, the shift and the factor of patch expanding."""

    batch: int
    size: tuple[int, ...]
    channels: int
    window: int = 7
    shift: int = 3
    factor: int = 2

    def __str__(self) -> str:
        return f"b{self.batch}-{'x'.join(map(str, self.size))}-c{self.channels}"


# The project's goals for memory-bound ops refer to these shapes: stages 1 and 2 of Swin-T, and Swin UNETR, whose 48
# tokens per axis are padded to 49.
MAP_GOALS: dict[str, MapCase] = {
    "swin_t.1": MapCase(128, (56, 56), 96),
    "swin_t.2": MapCase(128, (28, 28), 192),
    "swin_unetr.1": MapCase(2, (48, 48, 48), 48),
}
# Detection: 200 x 304 tokens, padded to 203 x 308.
PADDED_MAPS: dict[str, MapCase] = {"detection.1": MapCase(2, (200, 304), 96)}
# Outputs of Swin-Unet's expanding Linears: 2 x 2 parts of 96 channels, and 4 x 4 parts in the last layer.
EXPANDED_MAPS: dict[str, MapCase] = {
    "swin_unet.expand": MapCase(128, (28, 28), 384),
    "swin_unet.final": MapCase(24, (56, 56), 1536, factor=4),
}


@dataclasses.dataclass(frozen=True)
class ModelCase:
    """A library's model, given by its name or its class's name, and the shape of its input."""

    library: str
    model: str
    image: tuple[int, ...]  # channels, then pixels or voxels
    batch: int

    def __str__(self) -> str:
        return f"{self.library}-b{self.batch}-{'x'.join(map(str, self.image))}"


# Models by name. goals.py sets goals for some of them.
MODELS: dict[str, ModelCase] = {
    "swin_t": ModelCase("timm", "swin_tiny_patch4_window7_224", (3, 224, 224), 128),
    "swin_s": ModelCase("timm", "swin_small_patch4_window7_224", (3, 224, 224), 128),
    "swin_b": ModelCase("timm", "swin_base_patch4_window7_224", (3, 224, 224), 64),
    "swin_l": ModelCase("timm", "swin_large_patch4_window7_224", (3, 224, 224), 64),
    "swin_b384": ModelCase("timm", "swin_base_patch4_window12_384", (3, 384, 384), 32),
    "swin_l384": ModelCase("timm", "swin_large_patch4_window12_384", (3, 384, 384), 16),
    "swinv2_t_w8": ModelCase("timm", "swinv2_tiny_window8_256", (3, 256, 256), 64),
    "swinv2_t_w16": ModelCase("timm", "swinv2_tiny_window16_256", (3, 256, 256), 64),
    "swinv2_b_w24": ModelCase("timm", "swinv2_base_window12to24_192to384", (3, 384, 384), 16),
    "swin_t.torchvision": ModelCase("torchvision", "swin_t", (3, 224, 224), 128),
    "swin_t.transformers": ModelCase("transformers", "SwinModel", (3, 224, 224), 128),
    "swin2sr.transformers": ModelCase("transformers", "Swin2SRForImageSuperResolution", (3, 64, 64), 8),
    "swin_unetr64": ModelCase("monai", "SwinUNETR", (1, 64, 64, 64), 2),
    "swin_unetr96": ModelCase("monai", "SwinUNETR", (1, 96, 96, 96), 2),
    "swin_unetr128": ModelCase("monai", "SwinUNETR", (1, 128, 128, 128), 1),
}
MODEL_GOAL = "swin_t"
# On a CPU, these models run only if requested by name: the float64 reference of a training step needs over 20 GB or,
# with 3D convolutions, a quarter of an hour.
LARGE_MODELS = ("swin_l", "swin_l384", "swin_unetr64", "swin_unetr96", "swin_unetr128")
QUICK_MODELS = ("swin_t", "swinv2_t_w8", "swin_t.torchvision", "swin_t.transformers")
# Blocks by name: (model, path of a module that `accelerate` replaces).
BLOCKS: dict[str, tuple[str, str]] = {
    "swin_t.block1": ("swin_t", "layers.0.blocks.1"),
    "swin_t.block2": ("swin_t", "layers.1.blocks.1"),
    "swin_t.block3": ("swin_t", "layers.2.blocks.1"),
    "swin_t.block4": ("swin_t", "layers.3.blocks.1"),
    "swin_t.merging1": ("swin_t", "layers.1.downsample"),
    "swin_b384.block1": ("swin_b384", "layers.0.blocks.1"),
    "swinv2_t_w8.block1": ("swinv2_t_w8", "layers.0.blocks.1"),
    "swinv2_t_w16.block1": ("swinv2_t_w16", "layers.0.blocks.1"),
    "swin_t.torchvision.block1": ("swin_t.torchvision", "features.1.1"),
    "swin_unetr96.stage1": ("swin_unetr96", "swinViT.layers1.0"),
}
QUICK_BLOCKS = ("swin_t.block1", "swin_t.block3", "swinv2_t_w8.block1")

# Sweeps in which the cost should be proportional to the numbers of images, tokens and flops.
BATCH_SWEEP: dict[str, Case] = {f"batch {b}": Case(b, (56, 56), 3, 32, 7, 3) for b in (1, 2, 4, 8, 16, 32, 64, 128)}
MAP_SWEEP: dict[str, Case] = {f"map {s}x{s}": Case(4, (s, s), 3, 32, 7, 3) for s in (14, 28, 56, 112, 224)}
WINDOW_SWEEP: dict[str, Case] = {f"window {w}": Case(4, (48, 48), 3, 32, w, w // 2) for w in (4, 6, 8, 12, 16, 24)}
# Square maps and attention layers with projections, for comparing window attention with global attention.
COMPLEXITY_SIDES = (14, 28, 56, 84, 112)
COMPLEXITY_CHANNELS, COMPLEXITY_HEADS, COMPLEXITY_WINDOW = 96, 3, 7
