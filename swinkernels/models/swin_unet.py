"""Swin-Unet: segmentation with an encoder and a decoder made of Swin blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.models._encoder import check_stages, drop_path_rates, initialise, make_stages, stage_sizes
from swinkernels.nn import BasicLayer, FinalPatchExpandX4, PatchEmbed, PatchExpand


class SwinUnet(nn.Module):
    """Swin-Unet: an encoder that halves the map, a decoder that doubles it, and skip connections between their stages.

    Args:
        img_size: pixels (H, W) or an int. Windows that are larger than the resulting maps shrink to the maps; with
            None, no window shrinks.
        in_chans: channels of the image.
        num_classes: channels of the result.
        embed_dim: channels of the first stage, whose tokens are patches of 4x4 pixels; each further encoder stage has
            twice as many as the one before.
        depths, num_heads: blocks and heads of each encoder stage, and of the decoder stages in reverse order.
        window_size, mlp_ratio, qkv_bias, drop_rate, attn_drop_rate, drop_path_rate, patch_norm, use_checkpoint,
            backend: as for :class:`swinkernels.models.SwinTransformer`.

    Shape:
        x: (B, in_chans, H, W), H and W multiples of 4 * 2 ** (stages - 1). The result is (B, num_classes, H, W).

    Parameters: those of the published code: ``patch_embed``, ``layers``, ``norm``, ``layers_up``, ``concat_back_dim``,
    ``norm_up``, ``up`` and ``output``.

    Source: Swin-Unet (Cao et al., 2021); ``SwinTransformerSys`` of its code.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] | None = 224,
        in_chans: int = 3,
        num_classes: int = 9,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        patch_norm: bool = True,
        use_checkpoint: bool = False,
        *,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_stages(op, depths, num_heads=num_heads)
        self.multiple = 4 * 2 ** (len(depths) - 1)
        self.patch_embed = PatchEmbed(4, in_chans, embed_dim, norm=patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        options: dict[str, Any] = {
            "window_size": window_size,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop": drop_rate,
            "attn_drop": attn_drop_rate,
            "use_checkpoint": use_checkpoint,
            "backend": backend,
        }
        sizes = stage_sizes(op, img_size, 4, len(depths))
        rates = drop_path_rates(drop_path_rate, depths)
        stages = make_stages(1, embed_dim, sizes, depths, num_heads, rates, options, [0] * len(depths))
        self.layers = nn.ModuleList(stages)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        self.norm = nn.LayerNorm(widths[-1])
        ups: list[nn.Module] = [PatchExpand(widths[-1])]
        backs: list[nn.Module] = [nn.Identity()]
        for i in reversed(range(len(depths) - 1)):
            more = {"drop_path": rates[i], "upsample": PatchExpand if i > 0 else None, **options}
            ups.append(BasicLayer(widths[i], sizes[i], depths[i], num_heads[i], **more))
            backs.append(nn.Linear(2 * widths[i], widths[i]))
        self.layers_up = nn.ModuleList(ups)
        self.concat_back_dim = nn.ModuleList(backs)
        self.norm_up = nn.LayerNorm(embed_dim)
        self.up = FinalPatchExpandX4(embed_dim)
        self.output = nn.Conv2d(embed_dim, num_classes, 1, bias=False)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 4 or any(n % self.multiple for n in x.shape[2:]):
            raise ValueError(
                f"SwinUnet: x must be (B, in_chans, H, W) with H and W multiples of {self.multiple}, got shape "
                f"{tuple(x.shape)}. Pad the image."
            )
        x = self.pos_drop(self.patch_embed(x))
        before = []
        for layer in self.layers:
            before.append(x)
            x = layer(x)
        x = self.layers_up[0](self.norm(x))
        for layer, back, skip in zip(self.layers_up[1:], self.concat_back_dim[1:], before[-2::-1], strict=True):
            x = layer(back(torch.cat([x, skip], -1)))
        return self.output(self.up(self.norm_up(x)).permute(0, 3, 1, 2))
