"""Small models, one of each family that ``accelerate`` supports, in float64 and evaluation mode, and their inputs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support import other_forms as others
from tests.support import published_forms as forms
from tests.support import weather_forms as weather
from tests.support.parity import randomise


@dataclass(frozen=True)
class Swin:
    """The dimensions of a Swin with two stages and 4 x 4 windows."""

    embed_dim: int = 8
    depths: tuple[int, int] = (2, 1)
    num_heads: tuple[int, int] = (1, 2)
    drop_path: float = 0.0


class Outputs(nn.Module):
    """A transformers model that returns only the first tensor of its output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        out = self.model(x)
        return next(v for v in (out if isinstance(out, tuple) else out.values()) if isinstance(v, Tensor))


class Last(nn.Module):
    """A backbone that returns only its last feature map."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[-1]


class Clap(nn.Module):
    """The layers and merging of CLAP's audio encoder, on images; CLAP itself accepts spectrograms of one size."""

    def __init__(self, config: Any, layer: Any, merging: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(config, 8, (8, 8), 2, 0.0, shift) for shift in (0, 2))
        self.merging = merging(8)

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[1:-1]
        x = x.flatten(1, 2)
        for layer in self.layers:
            x = layer(x, size, False)[0]
        return self.merging(x, size)


class Copies(nn.Module):
    """Two blocks of a published form, the second one shifted, called with the arguments of the published model."""

    def __init__(self, make: Callable[[int], nn.Module], hand: Callable[[nn.Module, Tensor], tuple[Any, ...]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make(shift) for shift in (0, 2))
        self.hand = hand

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, *self.hand(block, x))
        return x


def _hand_nothing(block: Any, x: Tensor) -> tuple[Any, ...]:
    return ()


def _hand_size(block: Any, x: Tensor) -> tuple[Any, ...]:
    return ((8, 12),)


def _hand_odd_size(block: Any, x: Tensor) -> tuple[Any, ...]:
    return ((7, 9),)


def _hand_mask(block: Any, x: Tensor) -> tuple[Any, ...]:
    block.H, block.W = 7, 9
    return (forms.make_mask((8, 12), (4, 4), (2, 2)).to(x),)


def _hand_infinity(block: Any, x: Tensor) -> tuple[Any, ...]:
    block.H, block.W = 7, 9
    mask = forms.make_mask((8, 12), (4, 4), (2, 2), 1.0)
    return (torch.zeros_like(mask).masked_fill(mask > 0, -torch.inf).to(x),)


def _hand_volume(block: Any, x: Tensor) -> tuple[Any, ...]:
    block.H, block.W, block.T = 4, 8, 8
    return (forms.make_mask((4, 8, 8), (2, 4, 4), (1, 2, 2)).to(x),)


def _hand_mask_of_video(block: Any, x: Tensor) -> tuple[Any, ...]:
    return (forms.make_mask((4, 8, 8), (2, 4, 4), (1, 2, 2)).to(x),)


def _hand_index(block: Any, x: Tensor) -> tuple[Any, ...]:
    index = forms.WindowAttention(3, (4, 4), 1).relative_position_index
    return (8, 12), index, forms.make_mask((8, 12), (4, 4), (2, 2)).to(x)


def _hand_height_and_width(attn: Any, x: Tensor) -> tuple[Any, ...]:
    return 7, 9


def _hand_lead_time(block: Any, x: Tensor) -> tuple[Any, ...]:
    return x[:, 0, :5], (3, 7, 10), 1


def _decomposed(attention: Any) -> nn.Module:
    """Build two blocks that attend within windows, and one that attends over the whole map."""
    return nn.Sequential(*(others.DecomposedBlock(attention, 12, 3, window, (7, 9)) for window in (4, 4, 0)))


def _earth(size: tuple[int, ...], window: tuple[int, ...]) -> nn.Module:
    shifts = tuple(0 for _ in window), tuple(w // 2 for w in window)
    return nn.Sequential(*(weather.EarthBlock(12, size, 3, window, shift) for shift in shifts))


def _video_block(shift: int) -> nn.Module:
    return forms.VideoBlock(12, 3, shift_size=(shift // 2, shift, shift))


def timm_swin(version: str, size: Swin = Swin(), image: tuple[int, int] = (18, 24)) -> nn.Module:
    timm = pytest.importorskip("timm", reason="timm is not installed")
    kind = {"1": "SwinTransformer", "2": "SwinTransformerV2", "2-cr": "SwinTransformerV2Cr"}[version]
    return getattr(timm.models, kind)(
        img_size=image, patch_size=2, num_classes=3, embed_dim=size.embed_dim, depths=size.depths,
        num_heads=size.num_heads, window_size=4, drop_path_rate=size.drop_path,
    )  # fmt: skip


def _timm_maxvit() -> nn.Module:
    from timm.models.maxxvit import MaxxVitTransformerCfg, PartitionAttentionCl

    cfg = MaxxVitTransformerCfg(window_size=(3, 5), grid_size=(3, 5), dim_head=8)
    return nn.Sequential(*(PartitionAttentionCl(16, partition, cfg) for partition in ("block", "grid")))


def timm_vit(image: tuple[int, int] = (24, 40), patch: int = 8, **options: Any) -> nn.Module:
    vit = pytest.importorskip("timm.models.vision_transformer_relpos", reason="timm is not installed")
    return vit.VisionTransformerRelPos(
        img_size=image, patch_size=patch, embed_dim=24, depth=2, num_heads=2, num_classes=3, init_values=0.7, **options
    )


def torchvision_swin(version: int, size: Swin = Swin()) -> nn.Module:
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    options: dict[str, Any] = {"stochastic_depth_prob": size.drop_path, "num_classes": 3}
    if version == 2:
        options |= {"block": swin.SwinTransformerBlockV2, "downsample_layer": swin.PatchMergingV2}
    return swin.SwinTransformer([2, 2], size.embed_dim, [*size.depths], [*size.num_heads], [4, 4], **options)


def transformers_swin(name: str, size: Swin = Swin(), model: str | None = None, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    if name == "MaskFormerSwin":
        from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinModel as kind
    else:
        kind = getattr(transformers, model or f"{name}Model")
    settings = {"image_size": 16, "patch_size": 2, **options}
    return Outputs(
        kind(
            getattr(transformers, f"{name}Config")(
                embed_dim=size.embed_dim, depths=[*size.depths], num_heads=[*size.num_heads], window_size=4,
                drop_path_rate=size.drop_path, **settings,
            )
        )
    )  # fmt: skip


def _clap() -> nn.Module:
    from transformers.models.clap import modeling_clap
    from transformers.models.clap.configuration_clap import ClapAudioConfig

    config = ClapAudioConfig(patch_embeds_hidden_size=8, window_size=4)
    return Clap(config, modeling_clap.ClapAudioLayer, modeling_clap.ClapAudioPatchMerging)


def monai_swin(channels: int = 1, drop_path: float = 0.0, depths: tuple[int, ...] = (2, 1, 1, 1)) -> nn.Module:
    swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    return Last(
        swin_unetr.SwinTransformer(
            channels, 12, window_size=(4, 4), patch_size=(2, 2), depths=depths, num_heads=(1, 2, 4, 4),
            spatial_dims=2, drop_path_rate=drop_path,
        )
    )  # fmt: skip


def mmpretrain_swin(version: int = 1, size: Swin = Swin(), **options: Any) -> nn.Module:
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings from mmcv-lite and mmengine
        from mmpretrain import models
    arch: dict[str, Any] = {
        "embed_dims": size.embed_dim, "depths": [*size.depths], "num_heads": [*size.num_heads]
    }  # fmt: skip
    if version == 2:
        arch["extra_norm_every_n_blocks"] = 2
        options["pretrained_window_sizes"] = [0, 6]
    kind = models.SwinTransformer if version == 1 else models.SwinTransformerV2
    return Last(kind(arch, patch_size=2, window_size=4, out_indices=(1,), drop_path_rate=size.drop_path, **options))


def _timm_of(module: str, name: str, **options: Any) -> nn.Module:
    import importlib

    return getattr(importlib.import_module(f"timm.models.{module}"), name)(num_classes=3, **options)


def _timm_coatnet() -> nn.Module:
    from timm.models.maxxvit import MaxxVit, MaxxVitCfg, MaxxVitConvCfg, MaxxVitTransformerCfg

    attention = MaxxVitTransformerCfg(dim_head=8, rel_pos_type="bias")
    cfg = MaxxVitCfg(
        embed_dim=(16, 16), depths=(1, 2), block_type=("C", "T"), stem_width=8, conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=attention,
    )  # fmt: skip
    return MaxxVit(cfg, img_size=(32, 48), num_classes=3)


def _torchvision_video() -> nn.Module:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    return SwinTransformer3d([2, 4, 4], 8, [2, 1], [1, 2], [2, 4, 4], stochastic_depth_prob=0.0, num_classes=3)


def _torchvision_maxvit() -> nn.Module:
    from torchvision.models.maxvit import MaxVit

    return MaxVit((32, 32), 8, 4, [8, 16], [1, 1], 8, 0.0, num_classes=3)


def _florence2() -> nn.Module:
    from transformers import Florence2VisionConfig
    from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

    config = Florence2VisionConfig(
        embed_dim=[8, 16], depths=[1, 1], num_heads=[1, 2], num_groups=[1, 2], window_size=4, patch_size=[7, 3],
        patch_stride=[4, 2], patch_padding=[3, 1], patch_prenorm=[False, True], drop_path_rate=0.0,
    )  # fmt: skip
    return Outputs(Florence2VisionBackbone(config))


def _hiera() -> nn.Module:
    from transformers import HieraConfig, HieraModel

    return Outputs(
        HieraModel(HieraConfig(embed_dim=8, image_size=[64, 64], depths=[2, 1, 1, 1], num_heads=[1, 1, 2, 2]))
    )


def _sam2() -> nn.Module:
    from transformers import Sam2HieraDetConfig
    from transformers.models.sam2.modeling_sam2 import Sam2MultiScaleBlock

    config = Sam2HieraDetConfig(
        hidden_size=8, embed_dim_per_stage=[8, 8], blocks_per_stage=[2, 1], num_attention_heads_per_stage=[2, 2],
        window_size_per_stage=[4, 4], global_attention_blocks=[],
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    return nn.Sequential(*(Sam2MultiScaleBlock(config, 0, i, i) for i in range(2)))


def _sam(module: str, layer: str, config: str) -> nn.Module:
    """Build two layers that attend within windows, and one that attends over the whole map."""
    import importlib

    import transformers

    made = getattr(transformers, config)(
        hidden_size=12, num_attention_heads=3, image_size=32, patch_size=4, mlp_dim=24, window_size=4
    )
    made._attn_implementation = "sdpa"
    kind = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), layer)
    return nn.Sequential(*(kind(made, window) for window in (4, 4, 0)))


def _vitdet() -> nn.Module:
    from transformers import VitDetConfig, VitDetModel

    config = VitDetConfig(
        hidden_size=12, num_hidden_layers=3, num_attention_heads=3, image_size=36, patch_size=4, window_size=4,
        window_block_indices=[0, 1], residual_block_indices=[1], use_relative_position_embeddings=True,
    )  # fmt: skip
    return Outputs(VitDetModel(config))


def _cut(make: Callable[[], nn.Module], dim: int, window: tuple[int, ...]) -> nn.Module:
    """Build two blocks around attention modules from ``make``, the second one shifted."""
    shifts = tuple(0 for _ in window), tuple(w // 2 for w in window)
    return nn.Sequential(*(others.CutBlock(make(), dim, window, shift) for shift in shifts))


# Family -> its model and the shape of the model's input.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "timm": (lambda: timm_swin("1"), (2, 3, 18, 24)),
    "timm v2": (lambda: timm_swin("2"), (2, 3, 18, 24)),
    "timm v2-cr": (lambda: timm_swin("2-cr"), (2, 3, 18, 24)),
    "timm MaxViT": (_timm_maxvit, (2, 6, 15, 16)),
    "timm ViT": (lambda: timm_vit(rel_pos_type="bias"), (2, 3, 24, 40)),
    "torchvision": (lambda: torchvision_swin(1), (2, 3, 14, 18)),
    "torchvision v2": (lambda: torchvision_swin(2), (2, 3, 14, 18)),
    "transformers": (lambda: transformers_swin("Swin"), (2, 3, 18, 14)),
    "transformers v2": (lambda: transformers_swin("Swinv2"), (2, 3, 18, 14)),
    "transformers Donut": (lambda: transformers_swin("DonutSwin"), (2, 3, 18, 14)),
    "transformers MaskFormer": (lambda: transformers_swin("MaskFormerSwin"), (2, 3, 18, 14)),
    "transformers Swin2SR": (lambda: transformers_swin("Swin2SR", patch_size=1, num_channels=3), (2, 3, 8, 12)),
    "transformers CLAP": (_clap, (2, 8, 12, 8)),
    "MONAI": (monai_swin, (2, 1, 18, 14)),
    "mmpretrain": (lambda: mmpretrain_swin(img_size=16), (2, 3, 18, 14)),
    "copy": (
        lambda: Copies(lambda shift: forms.ClassificationBlock(12, (8, 12), 3, 4, shift), _hand_nothing), (2, 96, 12)
    ),
    "copy v2": (
        lambda: Copies(lambda shift: forms.ClassificationBlockV2(12, (8, 12), 3, 4, shift), _hand_nothing), (2, 96, 12)
    ),
    "copy for restoration": (
        lambda: Copies(lambda shift: forms.RestorationBlock(12, (8, 12), 3, 4, shift), _hand_size), (2, 96, 12)
    ),
    "copy for segmentation": (
        lambda: Copies(lambda shift: forms.SegmentationBlock(12, 3, 4, shift), _hand_mask), (2, 63, 12)
    ),
    "copy for video": (lambda: Copies(_video_block, _hand_mask_of_video), (1, 3, 7, 8, 12)),
    "copy of maps": (lambda: Copies(lambda shift: forms.MapBlock(12, 3, 4, shift), _hand_nothing), (2, 7, 9, 12)),
    "copy with attention alone": (
        lambda: Copies(lambda shift: forms.HybridBlock(12, (8, 12), 3, 4, shift), _hand_index), (2, 96, 12)
    ),
    "timm DaViT": (
        lambda: _timm_of("davit", "DaVit", depths=(1, 1), embed_dims=(8, 16), num_heads=(1, 2), window_size=4),
        (2, 3, 36, 44),
    ),
    "timm TinyViT": (
        lambda: _timm_of(
            "tiny_vit", "TinyVit", embed_dims=(8, 16), depths=(1, 2), num_heads=(1, 2), window_sizes=(4, 4),
            drop_path_rate=0.0,
        ),
        (2, 3, 40, 48),
    ),
    "timm GC ViT": (
        lambda: _timm_of(
            "gcvit", "GlobalContextVit", img_size=(64, 64), window_ratio=(16, 16), embed_dim=8, depths=(2, 2),
            num_heads=(1, 2),
        ),
        (2, 3, 64, 64),
    ),
    "timm Twins": (
        lambda: _timm_of(
            "twins", "Twins", embed_dims=(8, 16), depths=(2, 1), num_heads=(1, 2), mlp_ratios=(2, 2), sr_ratios=(2, 1),
            wss=(4, 4), img_size=40,
        ),
        (2, 3, 40, 40),
    ),
    "timm NesT": (
        lambda: _timm_of(
            "nest", "Nest", img_size=32, patch_size=4, num_levels=2, embed_dims=(8, 16), num_heads=(1, 2), depths=(1, 1)
        ),
        (2, 3, 32, 32),
    ),
    "timm Hiera": (
        lambda: _timm_of(
            "hiera", "Hiera", img_size=(64, 64), embed_dim=8, num_heads=1, stages=(2, 1, 1, 1), head_init_scale=1.0,
        ),
        (2, 3, 64, 64),
    ),
    "timm SAM 2 Hiera": (
        lambda: _timm_of(
            "hieradet_sam2", "HieraDet", embed_dim=8, num_heads=1, stages=(2, 1), window_spec=(4, 4), q_pool=1,
            global_att_blocks=(), global_pos_size=(4, 4), head_init_scale=1.0,
        ),
        (2, 3, 32, 48),
    ),
    "timm SAM ViT": (
        lambda: _timm_of(
            "vision_transformer_sam", "VisionTransformerSAM", img_size=36, patch_size=4, embed_dim=12, depth=3,
            num_heads=3, use_rel_pos=True, window_size=4, global_attn_indexes=(2,), neck_chans=8, head_hidden_size=8,
        ),
        (2, 3, 36, 36),
    ),
    "transformers SAM": (lambda: _sam("sam", "SamVisionLayer", "SamVisionConfig"), (2, 8, 8, 12)),
    "transformers SAM-HQ": (lambda: _sam("sam_hq", "SamHQVisionLayer", "SamHQVisionConfig"), (2, 8, 8, 12)),
    "transformers GOT-OCR2": (lambda: _sam("got_ocr2", "GotOcr2VisionLayer", "GotOcr2VisionConfig"), (2, 8, 8, 12)),
    "transformers ViTDet": (_vitdet, (2, 3, 36, 36)),
    "timm CoAtNet": (_timm_coatnet, (2, 3, 32, 48)),
    "torchvision Swin3D": (_torchvision_video, (1, 3, 5, 30, 26)),
    "torchvision MaxViT": (_torchvision_maxvit, (2, 3, 32, 32)),
    "transformers Florence-2": (_florence2, (2, 3, 36, 44)),
    "transformers Hiera": (_hiera, (2, 3, 64, 64)),
    "transformers SAM 2": (_sam2, (2, 7, 10, 8)),
    "mmdet": (
        lambda: Copies(lambda shift: others.MmdetBlock(12, 3, 4, shift), _hand_odd_size), (2, 63, 12)
    ),
    "SCUNet": (lambda: nn.Sequential(*(others.WMSA(12, 4, 4, kind) for kind in ("W", "SW"))), (2, 8, 12, 12)),
    "ResShift": (
        lambda: nn.Sequential(*(others.ChannelsFirstBlock(12, [8, 12], 3, 4, shift) for shift in (0, 2))),
        (2, 12, 8, 12),
    ),
    "TransMorph": (
        lambda: Copies(lambda shift: others.VolumeBlock(12, 3, (2, 4, 4), (shift // 2, shift, shift)), _hand_volume),
        (1, 256, 12),
    ),
    "BiRefNet": (lambda: Copies(lambda shift: others.InfinityBlock(12, 3, 4, shift), _hand_infinity), (2, 63, 12)),
    "Uformer": (lambda: _cut(lambda: others.UformerAttention(12, (4, 4), 3), 12, (4, 4)), (2, 8, 12, 12)),
    "Swin-MAE": (lambda: nn.Sequential(*(others.MapAttention(12, 3, 4, shift) for shift in (0, 2))), (2, 8, 8, 12)),
    "FDAT": (lambda: Copies(lambda shift: others.SpatialAttention(12, 4, 3), _hand_height_and_width), (2, 63, 12)),
    "Segment Anything": (lambda: _decomposed(others.DecomposedAttention), (2, 7, 9, 12)),
    "DeepSeek-OCR": (lambda: _decomposed(others.FusedDecomposedAttention), (2, 7, 9, 12)),
    "EsViT": (lambda: others.WeightsStage(12, 3, 4), (2, 49, 12)),
    "HTSAT": (lambda: others.HeatmapModel(12, (8, 12), 3, 4, heatmap=True), (2, 96, 12)),
    "laion-clap": (lambda: others.HeatmapModel(12, (8, 12), 3, 4, heatmap=False), (2, 96, 12)),
    "nnFormer": (lambda: others.CubeModel(12, (6, 8, 8), 3, 4), (1, 384, 12)),
    "nnFormer's skips": (
        lambda: nn.Sequential(*(others.SkipBlock(12, 3, (4, 4, 4), (shift,) * 3) for shift in (0, 2))), (1, 4, 8, 8, 12)
    ),
    "Pangu-Weather": (lambda: _earth((3, 7, 8), (2, 4, 4)), (1, 168, 12)),
    "FengWu": (lambda: _earth((7, 8), (4, 4)), (2, 56, 12)),
    "Aurora": (
        lambda: Copies(
            lambda shift: weather.GlobeBlock(12, 3, 5, (2, 4, 4), (shift // 2, shift, shift)), _hand_lead_time
        ),
        (1, 210, 12),
    ),
    "VRT": (lambda: _cut(lambda: others.MutualAttention(12, (2, 4, 4), 3), 12, (2, 4, 4)), (1, 4, 8, 8, 12)),
}  # fmt: skip


# Family with its own form -> the number of modules that use an op, and a word of the reason for each skipped module.
FORMS: dict[str, tuple[int, tuple[str, ...]]] = {
    "timm DaViT": (2, ()),
    "timm TinyViT": (2, ()),
    "timm GC ViT": (4, ()),
    "timm Twins": (2, ()),
    "timm NesT": (2, ()),
    "timm Hiera": (2, ("pools", "pools", "pools")),
    "timm SAM 2 Hiera": (2, ("pools",)),
    "timm SAM ViT": (3, ()),
    "transformers SAM": (3, ()),
    "transformers SAM-HQ": (3, ()),
    "transformers GOT-OCR2": (3, ()),
    "transformers ViTDet": (3, ()),
    "timm CoAtNet": (2, ()),
    "torchvision Swin3D": (3, ()),
    "torchvision MaxViT": (4, ()),
    "transformers Florence-2": (2, ()),
    "transformers Hiera": (2, ("pools", "pools", "pools")),
    "transformers SAM 2": (2, ()),
    "mmdet": (2, ()),
    "SCUNet": (2, ()),
    "ResShift": (2, ()),
    "Uformer": (2, ()),
    "Swin-MAE": (2, ()),
    "FDAT": (2, ()),
    "Segment Anything": (3, ()),
    "DeepSeek-OCR": (3, ()),
    "EsViT": (1, ()),
    "HTSAT": (2, ()),
    "laion-clap": (2, ()),
    "nnFormer": (2, ()),
    "nnFormer's skips": (2, ()),
    "Pangu-Weather": (2, ()),
    "FengWu": (2, ()),
    "Aurora": (2, ()),
    "VRT": (2, ()),
}


# Other versions of the families above.
VERSIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mmpretrain v2": (lambda: mmpretrain_swin(2, img_size=16), (2, 3, 18, 14)),
}


def make_model(family: str) -> nn.Module:
    """Build a model with parameters far from their initial values, so that bias, mask, scale, pads and norms matter."""
    torch.manual_seed(0)
    model = (FAMILIES | VERSIONS)[family][0]()
    randomise(model)
    for name, p in model.named_parameters():
        if p.dim() == 1 and not bool(p.any()):  # biases, and the weights of v2's norms, which start at 0
            nn.init.normal_(p, mean=float("norm" in name and name.endswith("weight")), std=0.2)
        elif not bool(p.any()):  # heads and tables that start at 0
            nn.init.normal_(p, std=0.2)
        if name.endswith("mlp.fc2.bias") and "rel_pos" in name:
            p.requires_grad_(False)  # softmax ignores a constant added to all scores: the gradient is rounding error
    return model.double().eval()


def make_input(family: str) -> Tensor:
    shape = (FAMILIES | VERSIONS)[family][1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
