"""The Swin Transformer model, v1 and v2."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from swinkernels.models._encoder import check_stages, drop_path_rates, initialise, make_stages, stage_sizes
from swinkernels.nn import BasicLayer, PatchEmbed

_WITH_THE_LAST = 99999  # timm's constant for a parameter in the group of the preceding one
NO_WEIGHT_DECAY = ("relative_position_bias_table", "cpb_mlp", "logit_scale")


class SwinTransformer(nn.Module):
    """Swin Transformer, v1 or v2: a classifier, or a backbone that returns feature maps.

    Args:
        img_size: pixels (H, W) or an int. Windows that are larger than the resulting maps shrink to the maps; with
            None, no window shrinks. The model accepts images of any size in either case.
        patch_size: pixels of a patch per axis.
        in_chans: channels of the image.
        num_classes: classes of the head. With 0 there is no head, and the model returns the mean of the last map's
            tokens.
        embed_dim: channels of the first stage; each further stage has twice as many as the one before.
        depths, num_heads: blocks and heads, per stage.
        window_size: tokens of a window per axis.
        mlp_ratio, qkv_bias: as for :class:`swinkernels.nn.SwinTransformerBlock`.
        drop_rate, attn_drop_rate: dropout probabilities of tokens and of attention weights.
        drop_path_rate: probability that the last block drops a branch. The probability rises linearly from 0 in the
            first block.
        patch_norm: True for a norm in the patch embedding.
        use_checkpoint: True to recompute blocks in the backward pass instead of storing their intermediate results.
        version: 1 or 2.
        pretrained_window_sizes: for v2, the window with which each stage was trained, or 0 for the stage's window.
        out_indices: indices of the stages whose maps, each after its own norm, are returned instead of class scores.
        pad_order, backend: as for :class:`swinkernels.nn.WindowAttention`.

    Shape:
        x: (B, in_chans, H, W). The result is (B, num_classes), or with ``out_indices`` a list of maps, channels first,
        (B, C_i, H_i, W_i).

    Parameters: those of Microsoft's Swin-Transformer, without absolute position embedding: ``patch_embed``,
    ``layers.<i>.blocks.<j>``, ``layers.<i>.downsample``, ``norm`` and ``head``. With ``out_indices``, the
    norms ``norm<i>`` replace ``norm`` and ``head``, as in Microsoft's code for detection and segmentation.

    Source: Swin Transformer (Liu et al., 2021), Swin Transformer V2 (Liu et al., 2022); ``SwinTransformer`` and
    ``SwinTransformerV2`` of Microsoft's Swin-Transformer, the backbone of its Swin-Transformer-Semantic-Segmentation.
    """

    def __init__(
        self,
        img_size: int | Sequence[int] | None = 224,
        patch_size: int = 4,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
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
        version: int = 1,
        pretrained_window_sizes: Sequence[int] | None = None,
        out_indices: Sequence[int] | None = None,
        pad_order: str = "pad_then_roll",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        op = type(self).__name__
        if version not in (1, 2):
            raise ValueError(f"{op}: version must be 1 or 2, got {version!r}")
        pretrained = [0] * len(depths) if pretrained_window_sizes is None else list(pretrained_window_sizes)
        check_stages(op, depths, num_heads=num_heads, pretrained_window_sizes=pretrained)
        if out_indices is not None and not all(0 <= i < len(depths) for i in out_indices):
            raise ValueError(f"{op}: out_indices must be stages, 0..{len(depths) - 1}, got {tuple(out_indices)}")
        self.out_indices = None if out_indices is None else tuple(sorted(set(out_indices)))
        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim, norm=patch_norm)
        self.pos_drop = nn.Dropout(drop_rate)
        options: dict[str, Any] = {
            "window_size": window_size,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "drop": drop_rate,
            "attn_drop": attn_drop_rate,
            "use_checkpoint": use_checkpoint,
            "pad_order": pad_order,
            "backend": backend,
        }
        sizes = stage_sizes(op, img_size, patch_size, len(depths))
        rates = drop_path_rates(drop_path_rate, depths)
        layers = make_stages(version, embed_dim, sizes, depths, num_heads, rates, options, pretrained)
        widths = [embed_dim * 2**i for i in range(len(depths))]
        if self.out_indices is None:
            self.norm = nn.LayerNorm(widths[-1])
            self.head = nn.Linear(widths[-1], num_classes) if num_classes > 0 else nn.Identity()
        else:
            # Stages after the last returned map are left out, because they would get no gradient.
            layers = layers[: self.out_indices[-1] + 1]
            layers[-1].downsample = None
            for i in self.out_indices:
                self.add_module(f"norm{i}", nn.LayerNorm(widths[i]))
        self.layers = nn.ModuleList(layers)
        initialise(self)

    def no_weight_decay_keywords(self) -> set[str]:
        """Return substrings of the names of parameters without weight decay, for Microsoft's training code."""
        return set(NO_WEIGHT_DECAY)

    def no_weight_decay(self) -> set[str]:
        """Return the names of parameters without weight decay, for timm."""
        return {name for name, _ in self.named_parameters() if any(word in name for word in NO_WEIGHT_DECAY)}

    def group_matcher(self, coarse: bool = False) -> Callable[[str], tuple[float, ...]]:
        """Return a function from a parameter's name to its position in the model, for timm's layer-wise learning rates.

        Patch merging is grouped with the blocks after it, as in timm's models.
        """

        def place(name: str) -> tuple[float, ...]:
            match = re.match(r"layers\.(\d+)\.(?:blocks\.(\d+)|downsample)\.", name)
            if name.startswith("patch_embed."):
                return (0.0,)
            if match is None:
                return (1.0, _WITH_THE_LAST) if name.startswith("norm") and not coarse else (math.inf,)
            stage, block = int(match[1]), match[2]
            if coarse:
                return (1.0, stage + (block is None))
            return (1.0, stage + 1, 0) if block is None else (1.0, stage, int(block))

        return place

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        x = self.pos_drop(self.patch_embed(x))
        maps = []
        for i, layer in enumerate(cast("Iterable[BasicLayer]", self.layers)):
            x = layer.run_blocks(x)
            if self.out_indices is not None and i in self.out_indices:
                maps.append(self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous())
            if layer.downsample is not None:
                x = layer.downsample(x)
        return maps if self.out_indices is not None else self.head(self.norm(x).mean((1, 2)))
