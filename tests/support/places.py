"""Small modules in which ``accelerate`` replaces the attention, one of each kind, for tests that edit modules."""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Place:
    make: Callable[[], nn.Module]
    # Draws the arguments of the module's forward.
    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    # The path of the module that has the index of the bias table; None if the bias is computed differently.
    index_of: str | None = "attn"

    def model(self) -> Any:
        """Build the module in float64, with random parameters, so that every part affects the output."""
        torch.manual_seed(0)
        model = self.make().eval().double()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.normal_(std=0.5 if "table" in name else 0.3)
        return model

    def run(self, model: Any) -> Tensor:
        out = model(*self.inputs(torch.Generator().manual_seed(1)))
        return out[0] if isinstance(out, tuple) else out


def _map(*shape: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    return lambda generator: (torch.randn(2, *shape, generator=generator, dtype=torch.float64),)


def _sequence(height: int, width: int, channels: int) -> Callable[[torch.Generator], tuple[Any, ...]]:
    def inputs(generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(2, height * width, channels, generator=generator, dtype=torch.float64)
        return x, (height, width)

    return inputs


def _timm() -> dict[str, Place]:
    from timm.models import maxxvit
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block
    from timm.models.swin_transformer_v2_cr import SwinTransformerV2CrBlock
    from timm.models.vision_transformer_relpos import RelPosAttention, RelPosBias

    config = maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4), rel_pos_type="bias")
    config_tf = maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4), rel_pos_type="bias_tf")
    shifted = {"window_size": 4, "shift_size": 2}
    return {
        "timm swin": Place(lambda: SwinTransformerBlock(16, (8, 10), 2, **shifted), _map(8, 10, 16)),
        "timm swin v2": Place(lambda: SwinTransformerV2Block(16, (8, 10), 2, **shifted), _map(8, 10, 16)),
        "timm swin v2-CR": Place(
            lambda: SwinTransformerV2CrBlock(16, 2, (8, 8), (4, 4), (2, 2)), _map(8, 8, 16), index_of=None
        ),
        "timm maxvit": Place(lambda: maxxvit.PartitionAttentionCl(16, cfg=config), _map(8, 8, 16), "attn.rel_pos"),
        "timm maxvit, channels first": Place(
            lambda: maxxvit.PartitionAttention2d(16, partition_type="grid", cfg=config_tf), _map(16, 8, 8), None
        ),
        "timm vit": Place(
            lambda: RelPosAttention(16, num_heads=2, rel_pos_cls=lambda **k: RelPosBias((3, 4), **k)),
            _map(12, 16),
            "rel_pos",
        ),
    }


def _torchvision() -> dict[str, Place]:
    from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

    return {
        "torchvision v1": Place(lambda: ShiftedWindowAttention(16, [4, 4], [2, 2], 2), _map(8, 10, 16), ""),
        "torchvision v2": Place(lambda: ShiftedWindowAttentionV2(16, [4, 4], [2, 2], 2), _map(8, 10, 16), ""),
    }


def _monai() -> dict[str, Place]:
    from monai.networks.nets.swin_unetr import BasicLayer, SwinTransformerBlock, compute_mask

    def inputs(generator: torch.Generator) -> tuple[Any, ...]:
        x = torch.randn(2, 8, 8, 16, generator=generator, dtype=torch.float64)
        return x, compute_mask([8, 8], (4, 4), (2, 2), x.device)

    return {
        "MONAI block": Place(lambda: SwinTransformerBlock(16, 2, (4, 4), (2, 2)), inputs),
        "MONAI stage": Place(lambda: BasicLayer(16, 2, 2, (4, 4), [0.0, 0.0]), _map(16, 8, 10), "blocks.1.attn"),
    }


def _mmpretrain() -> dict[str, Place]:
    from mmpretrain.models.utils.attention import ShiftWindowMSA, WindowMSA, WindowMSAV2

    def place(inner: Any) -> Place:
        make = lambda: ShiftWindowMSA(16, 2, 4, shift_size=2, window_msa=inner)  # noqa: E731
        return Place(make, _sequence(8, 10, 16), "w_msa")

    return {"mmpretrain v1": place(WindowMSA), "mmpretrain v2": place(WindowMSAV2)}


def _transformers() -> dict[str, Place]:
    from transformers import DonutSwinConfig, MaskFormerSwinConfig, Swin2SRConfig, SwinConfig, Swinv2Config
    from transformers.models.clap.configuration_clap import ClapAudioConfig
    from transformers.models.clap.modeling_clap import ClapAudioLayer
    from transformers.models.donut.modeling_donut_swin import DonutSwinLayer
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinLayer
    from transformers.models.swin.modeling_swin import SwinLayer
    from transformers.models.swin2sr.modeling_swin2sr import Swin2SRLayer
    from transformers.models.swinv2.modeling_swinv2 import Swinv2Layer

    def place(layer: Any, config: Any, index_of: str = "attention.self") -> Place:
        def make() -> nn.Module:
            made = config(window_size=4)
            made._attn_implementation = "sdpa"
            return layer(made, 16, (8, 10), 2, shift_size=2)

        return Place(make, _sequence(8, 10, 16), index_of)

    return {
        "transformers swin": place(SwinLayer, SwinConfig, "attention.relative_position_bias"),
        "transformers swinv2": place(Swinv2Layer, Swinv2Config),
        "transformers donut": place(DonutSwinLayer, DonutSwinConfig),
        "transformers maskformer": place(MaskFormerSwinLayer, MaskFormerSwinConfig),
        "transformers swin2sr": place(Swin2SRLayer, Swin2SRConfig),
        "transformers clap": place(ClapAudioLayer, ClapAudioConfig),
    }


def _unnamed() -> dict[str, Place]:
    """Return a module that matches an adapter's form, and a copy of published code; both are replaced after a trial."""
    from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

    from tests.support.published_forms import ClassificationBlock

    return {
        "form": Place(lambda: ShiftedWindowAttention3d(16, [2, 4, 4], [0, 2, 2], 2), _map(4, 8, 10, 16), ""),
        "copy": Place(lambda: ClassificationBlock(16, (8, 12), 2, 4, 2), _map(96, 16)),
    }


def places() -> dict[str, Place]:
    """Return the modules of all installed libraries as Places, by name."""
    found: dict[str, Place] = {}
    for of_library in (_timm, _torchvision, _monai, _mmpretrain, _transformers, _unnamed):
        try:
            found |= of_library()
        except ImportError:
            continue
    return found


PLACES = types.MappingProxyType(places())


def beyond_limits() -> dict[str, tuple[Place, str]]:
    """Return Places with heads of 130 channels or windows of 33 x 32 tokens, each with words of the expected reason."""
    heads, windows = "its heads have 130 channels", "its windows have 1056 tokens"
    found: dict[str, tuple[Place, str]] = {}
    if "timm swin" in PLACES:
        from timm.models.swin_transformer import SwinTransformerBlock
        from timm.models.swin_transformer_v2 import SwinTransformerV2Block

        for name, kind in (("timm swin", SwinTransformerBlock), ("timm swin v2", SwinTransformerV2Block)):
            found[f"{name}, heads"] = Place(lambda k=kind: k(130, (8, 8), 1, window_size=4), _map(8, 8, 130)), heads
            large = Place(lambda k=kind: k(8, (33, 40), 1, window_size=(33, 32)), _map(33, 40, 8))
            found[f"{name}, windows"] = large, windows
    if "torchvision v1" in PLACES:
        from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

        for kind in (ShiftedWindowAttention, ShiftedWindowAttentionV2):
            name = kind.__name__
            found[f"{name}, heads"] = Place(lambda k=kind: k(130, [4, 4], [2, 2], 1), _map(8, 8, 130)), heads
            found[f"{name}, windows"] = Place(lambda k=kind: k(8, [33, 32], [0, 0], 1), _map(33, 40, 8)), windows
    if "MONAI block" in PLACES:
        from monai.networks.nets.swin_unetr import BasicLayer

        found["MONAI, heads"] = Place(lambda: BasicLayer(130, 1, 1, (4, 4), [0.0]), _map(130, 8, 8)), heads
        found["MONAI, windows"] = Place(lambda: BasicLayer(8, 1, 1, (33, 32), [0.0]), _map(8, 34, 33)), windows
    if "transformers donut" in PLACES:
        from transformers import DonutSwinConfig, SwinConfig
        from transformers.models.donut.modeling_donut_swin import DonutSwinLayer
        from transformers.models.swin.modeling_swin import SwinLayer

        for kind, config in ((DonutSwinLayer, DonutSwinConfig), (SwinLayer, SwinConfig)):

            def make(width: int, window: int, kind: Any = kind, config: Any = config) -> Any:
                made = config(window_size=window)
                made._attn_implementation = "sdpa"
                return kind(made, width, (window, window + 1), 1, shift_size=0)

            name = kind.__name__
            found[f"{name}, heads"] = Place(lambda m=make: m(130, 4), _sequence(8, 8, 130)), heads
            found[f"{name}, windows"] = Place(lambda m=make: m(8, 33), _sequence(34, 35, 8)), "have 1089 tokens"
    return found
