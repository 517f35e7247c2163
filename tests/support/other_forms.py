"""Small modules with window attention in published forms other than Microsoft's.

The code was written for these tests; names and conventions are those of the published code.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.published_forms import (
    Block,
    ClassificationBlock,
    DropPath,
    Mlp,
    SegmentationBlock,
    WindowAttention,
    cut,
    join,
    make_mask,
)


class ShiftWindowMSA(nn.Module):
    """mmdet's form: takes a sequence and the map's size, and does padding, rolling, masking and drop path itself."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.w_msa = WindowAttention(dim, (window_size, window_size), num_heads, attn_drop)
        self.drop = DropPath(0.0)

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        (h, w), window, s = hw_shape, (self.window_size,) * 2, self.shift_size
        assert query.shape[1] == h * w
        x = F.pad(query.view(len(query), h, w, -1), (0, 0, 0, -w % window[1], 0, -h % window[0]))
        frame = tuple(x.shape[1:3])
        mask = make_mask(frame, window, (s, s)).to(x) if s else None
        x = torch.roll(x, (-s, -s), (1, 2)) if s else x
        x = join(self.w_msa(cut(x, window), mask), window, frame)
        x = torch.roll(x, (s, s), (1, 2)) if s else x
        return self.drop(x[:, :h, :w].flatten(1, 2))


class MmdetBlock(nn.Module):
    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int) -> None:
        super().__init__()
        self.norm1, self.norm2, self.ffn = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn = ShiftWindowMSA(dim, num_heads, window_size, shift_size)

    def forward(self, x: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        x = x + self.attn(self.norm1(x), hw_shape)
        return x + self.ffn(self.norm2(x))


class WMSA(nn.Module):
    """SCUNet's form: takes channels-last maps of whole windows, has a bias parameter, and masks with scores of -inf."""

    def __init__(self, dim: int, head_dim: int, window_size: int, kind: str) -> None:
        super().__init__()
        self.head_dim, self.n_heads, self.window_size, self.type = head_dim, dim // head_dim, window_size, kind
        self.scale = head_dim**-0.5
        self.embedding_layer, self.linear = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.relative_position_params = nn.Parameter(torch.randn(self.n_heads, *(2 * window_size - 1,) * 2))

    def bias(self) -> Tensor:
        w = self.window_size
        at = torch.cartesian_prod(torch.arange(w), torch.arange(w))
        offset = at[:, None] - at[None] + w - 1
        return self.relative_position_params[:, offset[..., 0], offset[..., 1]]

    def forward(self, x: Tensor) -> Tensor:
        size, window, s = tuple(x.shape[1:3]), (self.window_size,) * 2, self.window_size // 2
        shifted = self.type != "W"
        x = torch.roll(x, (-s, -s), (1, 2)) if shifted else x
        qkv = self.embedding_layer(cut(x, window)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scores = self.scale * q @ k.mT + self.bias()
        if shifted:
            apart = make_mask(size, window, (s, s)) != 0
            scores = scores.unflatten(0, (-1, len(apart))).masked_fill(apart[:, None], -torch.inf).flatten(0, 1)
        out = join(self.linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), window, size)
        return torch.roll(out, (s, s), (1, 2)) if shifted else out


class Projection(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, attn_kv: Tensor | None = None) -> Any:
        kv = x if attn_kv is None else attn_kv.expand(len(x), -1, -1)
        kv = self.to_kv(kv).unflatten(-1, (2, self.num_heads, -1))
        q = self.to_q(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        return q, *kv.permute(2, 0, 3, 1, 4)


class UformerAttention(WindowAttention):
    """Uformer's form: the window size is ``win_size``, and q is computed separately from k and v."""

    def __init__(self, dim: int, win_size: tuple[int, int], num_heads: int) -> None:
        super().__init__(dim, win_size, num_heads)
        self.win_size = self.__dict__.pop("window_size")
        self.qkv = Projection(dim, num_heads)

    def forward(self, x: Tensor, attn_kv: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x, attn_kv)
        scores = self.scores(q, k) + self.bias(x.shape[1])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class MutualAttention(WindowAttention):
    """VRT's form: the qkv layer is ``qkv_self``, and the two frames of a window attend to each other."""

    def __init__(self, dim: int, window_size: tuple[int, int, int], num_heads: int, mut_attn: bool = True) -> None:
        super().__init__(dim, window_size, num_heads)
        self.mut_attn, self.qkv_self = mut_attn, self._modules.pop("qkv")
        if mut_attn:
            self.register_buffer("position_bias", torch.randn(1, window_size[1] * window_size[2], dim))
            self.qkv_mut, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(2 * dim, dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, biased: bool) -> Tensor:
        n = q.shape[2]
        scores = self.scores(q, k) + (self.bias(n) if biased else 0.0)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None, :n, :n]).flatten(0, 1)
        return (self.softmax(scores) @ v).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv_self(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, mask, True)
        if self.mut_attn:
            qkv = self.qkv_mut(x + self.position_bias.repeat(1, 2, 1)).unflatten(-1, (3, self.num_heads, -1))
            (q1, q2), (k1, k2), (v1, v2) = (t.chunk(2, dim=2) for t in qkv.permute(2, 0, 3, 1, 4))
            mutual = [self.attend(q2, k1, v1, mask, False), self.attend(q1, k2, v2, mask, False)]
            out = torch.cat([torch.cat(mutual, 1), out], 2)
        return self.proj(out)


class ConvMlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(dim, 2 * dim, 1), nn.Conv2d(2 * dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ChannelsFirstBlock(Block):
    """ResShift's form: takes (B, C, H, W), has group norms, and computes a new mask for maps of another size."""

    def __init__(self, dim: int, input_resolution: Any, num_heads: int, window_size: int, shift_size: int) -> None:
        super().__init__(dim, num_heads, window_size, shift_size)
        self.input_resolution, self.mlp = input_resolution, ConvMlp(dim)
        self.norm1, self.norm2 = nn.GroupNorm(3, dim), nn.GroupNorm(3, dim)
        self.register_buffer("attn_mask", self.calculate_mask(input_resolution) if shift_size > 0 else None)

    def calculate_mask(self, size: Any) -> Tensor:
        return make_mask(tuple(size), (self.window_size,) * 2, (self.shift_size,) * 2)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[2:])
        mask = self.attn_mask if self.input_resolution == size else self.calculate_mask(size)
        y = self.norm1(x).permute(0, 2, 3, 1)
        y = self.attend(y, (self.window_size,) * 2, (self.shift_size,) * 2, mask.to(x)).permute(0, 3, 1, 2)
        return self.both_halves(x, y)


class VolumeBlock(Block):
    """TransMorph's form: takes a sequence and the stage's mask; H, W and T are attributes with the volume's size."""

    def __init__(self, dim: int, num_heads: int, window_size: Any, shift_size: Any) -> None:
        super().__init__(dim, num_heads, window_size, shift_size)
        self.H = self.W = self.T = None

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        y = self.norm1(x).view(len(x), self.H, self.W, self.T, -1)
        y = self.padded(y, self.window_size, self.shift_size, mask_matrix if min(self.shift_size) > 0 else None)
        return self.both_halves(x, y.view(x.shape))


class FusedAttention(WindowAttention):
    """BiRefNet's form: calls torch's fused attention with a mask that is repeated for every image."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.bias(x.shape[1])[None]
        bias = bias if mask is None else bias + mask[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(x.shape)))


class InfinityBlock(SegmentationBlock):
    """BiRefNet's form: takes the stage's mask, in which masked pairs are -inf."""

    attention = FusedAttention

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        windows = mask_matrix.expand(len(x), *mask_matrix.shape).flatten(0, 1)
        return super().forward(x, windows)


class CutBlock(nn.Module):
    """A block that cuts a map into windows, and calls its attention with the windows and a mask."""

    def __init__(self, attn: nn.Module, dim: int, window: tuple[int, ...], shift: tuple[int, ...]) -> None:
        super().__init__()
        self.window, self.shift, self.norm, self.attention_of_windows = window, shift, nn.LayerNorm(dim), attn

    def forward(self, x: Tensor) -> Tensor:
        size, axes = tuple(x.shape[1:-1]), tuple(range(1, x.dim() - 1))
        mask = make_mask(size, self.window, self.shift).to(x) if any(self.shift) else None
        y = torch.roll(self.norm(x), [-s for s in self.shift], axes)
        y = join(self.attention_of_windows(cut(y, self.window), mask=mask), self.window, size)
        return x + torch.roll(y, self.shift, axes)


class MapAttention(WindowAttention):
    """Swin-MAE's form: takes a square map of whole windows, and rolls and masks it itself."""

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int) -> None:
        super().__init__(dim, (window_size, window_size), num_heads)
        self.window_size, self.shift_size = window_size, shift_size

    def forward(self, x: Tensor) -> Tensor:
        size, window, s = tuple(x.shape[1:3]), (self.window_size,) * 2, self.shift_size
        assert size[0] == size[1]
        mask = make_mask(size, window, (s, s)).to(x) if s else None
        x = torch.roll(x, (-s, -s), (1, 2)) if s else x
        x = join(super().forward(cut(x, window), mask), window, size)
        return torch.roll(x, (s, s), (1, 2)) if s else x


class SpatialAttention(nn.Module):
    """FDAT's form: takes a sequence, height and width; has a dense bias, no shift, and short attribute names."""

    def __init__(self, dim: int, window_size: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.ws, self.nh, self.scale = dim, window_size, num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.randn(num_heads, window_size**2, window_size**2))

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        y = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % self.ws, 0, -height % self.ws))
        q, k, v = self.qkv(cut(y, (self.ws,) * 2)).unflatten(-1, (3, self.nh, -1)).permute(2, 0, 3, 1, 4)
        out = (q * self.scale @ k.mT + self.bias).softmax(-1) @ v
        out = join(self.proj(out.transpose(1, 2).flatten(2)), (self.ws,) * 2, tuple(y.shape[1:3]))
        return out[:, :height, :width].flatten(1, 2)


class DecomposedAttention(nn.Module):
    """Segment Anything's form: computes the bias from the queries and one table for each axis."""

    def __init__(self, dim: int, num_heads: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.num_heads, self.scale, self.use_rel_pos = num_heads, (dim // num_heads) ** -0.5, True
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.rel_pos_h, self.rel_pos_w = (nn.Parameter(torch.randn(2 * n - 1, dim // num_heads)) for n in size)

    def bias(self, q: Tensor, size: tuple[int, ...]) -> Tensor:
        """Return the bias (B, heads, h * w, h * w) that the queries ``q`` give on a map of ``size`` (h, w)."""
        h, w = (torch.arange(n, device=q.device) for n in size)
        rows, columns = self.rel_pos_h[h[:, None] - h + len(h) - 1], self.rel_pos_w[w[:, None] - w + len(w) - 1]
        q = q.unflatten(2, size)
        of_rows = torch.einsum("bnhwc,hkc->bnhwk", q, rows)[..., None]
        of_columns = torch.einsum("bnhwc,wkc->bnhwk", q, columns)[..., None, :]
        return (of_rows + of_columns).flatten(2, 3).flatten(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:3])
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = (q * self.scale @ k.mT + self.bias(q, size)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, size))


class FusedDecomposedAttention(DecomposedAttention):
    """DeepSeek-OCR's form: calls torch's fused attention with its default scale, and does not read ``self.scale``."""

    def forward(self, x: Tensor) -> Tensor:
        size = tuple(x.shape[1:3])
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(q, size))
        return self.proj(out.transpose(1, 2).flatten(2).unflatten(1, size))


class DecomposedBlock(nn.Module):
    """Segment Anything's form: attends in windows that are padded after the norm, or over the whole map."""

    def __init__(self, attention: type[DecomposedAttention], dim: int, num_heads: int, window: int, size: Any) -> None:
        super().__init__()
        self.norm1, self.norm2, self.mlp, self.window_size = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim), window
        self.attn = attention(dim, num_heads, (window, window) if window else size)

    def forward(self, x: Tensor) -> Tensor:
        y, (h, w), n = self.norm1(x), x.shape[1:3], self.window_size
        if n > 0:
            y = F.pad(y, (0, 0, 0, -w % n, 0, -h % n))
            windows = self.attn(cut(y, (n, n)).unflatten(1, (n, n)))
            y = join(windows.flatten(1, 2), (n, n), tuple(y.shape[1:3]))[:, :h, :w]
        else:
            y = self.attn(y)
        x = x + y
        return x + self.mlp(self.norm2(x))


class WeightsAttention(WindowAttention):
    """EsViT's form: also returns the attention weights before dropout."""

    def returned(self, weights: Tensor, dropped: Tensor) -> Tensor:
        return weights

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k) + self.bias(x.shape[1])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        weights = self.softmax(scores)
        dropped = self.attn_drop(weights)
        out = (dropped @ v).transpose(1, 2).reshape(x.shape)
        return self.proj_drop(self.proj(out)), self.returned(weights, dropped)


class WeightsBlock(Block):
    """EsViT's form: takes the sequence of a square map of any size, and caches its masks in a dict."""

    attention = WeightsAttention

    def __init__(self, dim: int, num_heads: int, window_size: int, shift_size: int) -> None:
        super().__init__(dim, num_heads, window_size, shift_size)
        self.attn_mask_dict: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        side, window, shift = int(len(x[0]) ** 0.5), (self.window_size,) * 2, (self.shift_size,) * 2
        pad = -side % self.window_size
        y = F.pad(self.norm1(x).unflatten(1, (side, side)), (0, 0, 0, pad, 0, pad))
        frame, mask = tuple(y.shape[1:3]), None
        if any(shift):
            mask = self.attn_mask_dict[side] = make_mask(frame, window, shift).to(x)
            y = torch.roll(y, [-s for s in shift], (1, 2))
        y, weights = self.attn(cut(y, window), mask)
        y = torch.roll(join(y, window, frame), shift, (1, 2))[:, :side, :side]
        return self.both_halves(x, y.flatten(1, 2)), weights


class WeightsStage(nn.Module):
    """EsViT's form: forward discards the attention weights; another method returns them."""

    def __init__(self, dim: int, num_heads: int, window_size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(WeightsBlock(dim, num_heads, window_size, s) for s in (0, window_size // 2))
        self.downsample = None

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x, _ = block(x)
        return x

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        found = []
        for block in self.blocks:
            x, weights = block(x)
            found.append(weights)
        return x, found


class DroppedWeightsAttention(WeightsAttention):
    """HTSAT's form: also returns the attention weights after dropout."""

    def returned(self, weights: Tensor, dropped: Tensor) -> Tensor:
        return dropped


class HeatmapBlock(ClassificationBlock):
    """HTSAT's form: takes the sequence of a map of one size, and also returns the attention weights."""

    attention = DroppedWeightsAttention

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        window, shift = (self.window_size,) * 2, (self.shift_size,) * 2
        y = torch.roll(self.norm1(x).unflatten(1, self.input_resolution), [-s for s in shift], (1, 2))
        y, weights = self.attn(cut(y, window), self.attn_mask)
        y = torch.roll(join(y, window, self.input_resolution), shift, (1, 2))
        return self.both_halves(x, y.flatten(1, 2)), weights


class HeatmapStage(nn.Module):
    """HTSAT's form: also returns the mean of its blocks' attention weights or, in training, the last block's."""

    def __init__(self, dim: int, size: tuple[int, int], num_heads: int, window_size: int) -> None:
        super().__init__()
        shifts = (0, window_size // 2)
        self.blocks = nn.ModuleList(HeatmapBlock(dim, size, num_heads, window_size, shift) for shift in shifts)
        self.downsample = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attns = []
        for block in self.blocks:
            x, attn = block(x)
            attns.append(attn)
        return self.downsample(x), attn if self.training else torch.stack(attns).mean(0)


class HeatmapModel(nn.Module):
    """HTSAT's form: an option (absent in laion-clap) scales the output by the last stage's mean attention weights."""

    def __init__(self, dim: int, size: tuple[int, int], num_heads: int, window_size: int, heatmap: bool) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(htsat_attn_heatmap=heatmap)
        self.layers = nn.ModuleList(HeatmapStage(dim, size, num_heads, window_size) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, attn = layer(x)
        if self.config.htsat_attn_heatmap:
            x = x * attn.mean(1).mean(1).reshape(len(x), -1, 1)
        return x


def renumbered(window: tuple[int, int, int]) -> Tensor:
    """Return nnFormer's index into the bias table, in which some offsets share a row."""
    at = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    factors = 3 * window[1] - 1, 2 * window[1] - 1, 1
    offsets = at[:, :, None] - at[:, None] + torch.tensor(window)[:, None, None] - 1
    return sum(f * n for f, n in zip(factors, offsets, strict=True))  # type: ignore[return-value]


class SkipAttention(WindowAttention):
    """nnFormer's form: queries are from the decoder, keys and values from the encoder; offsets can share table rows."""

    def __init__(self, dim: int, window_size: tuple[int, int, int], num_heads: int) -> None:
        super().__init__(dim, window_size, num_heads)
        self.kv = nn.Linear(dim, 2 * dim)
        del self.qkv
        self.relative_position_index = renumbered(window_size)

    def forward(  # type: ignore[override]
        self, skip: Tensor, x_up: Tensor, pos_embed: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        k, v = self.kv(skip).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q = x_up.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        scores = self.scores(q, k) + self.bias(skip.shape[1])
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = (self.attn_drop(self.softmax(scores)) @ v).transpose(1, 2).reshape(skip.shape)
        return self.proj_drop(self.proj(out if pos_embed is None else out + pos_embed))


class SkipBlock(nn.Module):
    """A block that cuts two maps into windows, and calls its attention with the windows of both."""

    def __init__(self, dim: int, num_heads: int, window: tuple[int, int, int], shift: tuple[int, int, int]) -> None:
        super().__init__()
        self.window, self.shift, self.norm = window, shift, nn.LayerNorm(dim)
        self.attention_of_windows = SkipAttention(dim, window, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        size, axes = tuple(x.shape[1:-1]), (1, 2, 3)
        mask = make_mask(size, self.window, self.shift).to(x) if any(self.shift) else None
        skip, up = (torch.roll(y, [-s for s in self.shift], axes) for y in (self.norm(x), x.sin()))
        y = self.attention_of_windows(cut(skip, self.window), cut(up, self.window), mask=mask)
        return x + torch.roll(join(y, self.window, size), self.shift, axes)


class CubeBlock(Block):
    """nnFormer's form: takes the sequence of a volume of one size, and the stage's mask; windows are cubic."""

    def __init__(self, dim: int, size: Any, num_heads: int, window: int, shift: int) -> None:
        super().__init__(dim, num_heads, (window,) * 3, shift)
        self.input_resolution, self.window_size = size, window
        self.attn.relative_position_index = renumbered((window,) * 3)

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        window, shift = (self.window_size,) * 3, (self.shift_size,) * 3
        y = self.norm1(x).unflatten(1, self.input_resolution)
        return self.both_halves(x, self.padded(y, window, shift, mask_matrix if any(shift) else None).flatten(1, 3))


class SkipCubeBlock(CubeBlock):
    """nnFormer's form: the first block of a decoder stage, whose queries come from the decoder."""

    attention = SkipAttention

    def forward(self, x: Tensor, mask_matrix: Tensor, skip: Any = None, x_up: Any = None) -> Tensor:
        window, size = (self.window_size,) * 3, self.input_resolution
        pads = [n for s in reversed(size) for n in (0, -s % self.window_size)]
        maps = [F.pad(self.norm1(t).unflatten(1, size), (0, 0, *pads)) for t in (skip, x_up)]
        y = join(self.attn(*(cut(t, window) for t in maps)), window, tuple(maps[0].shape[1:4]))
        return self.both_halves(x, y[:, : size[0], : size[1], : size[2]].flatten(1, 3))


class Halve(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(dim, 2 * dim)

    def forward(self, x: Tensor, *size: int) -> Tensor:
        return self.reduction(x.unflatten(1, size)[:, ::2, ::2, ::2].flatten(1, 3))


class Double(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(2 * dim, dim)

    def forward(self, x: Tensor, *size: int) -> Tensor:
        x = self.up(x).unflatten(1, size)
        for axis in (1, 2, 3):
            x = x.repeat_interleave(2, axis)
        return x.flatten(1, 3)


class CubeStage(nn.Module):
    """nnFormer's form: an encoder stage, which computes the mask and returns its output at full and at half size."""

    def __init__(self, dim: int, size: Any, num_heads: int, window: int) -> None:
        super().__init__()
        self.window_size, self.shift_size = window, window // 2
        self.blocks = nn.ModuleList(CubeBlock(dim, size, num_heads, window, s) for s in (0, window // 2))
        self.downsample = Halve(dim)

    def mask(self, x: Tensor, size: tuple[int, ...]) -> Tensor:
        n = self.window_size
        return make_mask(tuple(s + -s % n for s in size), (n,) * 3, (self.shift_size,) * 3).to(x)

    def forward(self, x: Tensor, S: int, H: int, W: int) -> tuple[Any, ...]:
        for block in self.blocks:
            x = block(x, self.mask(x, (S, H, W)))
        return x, S, H, W, self.downsample(x, S, H, W), *((n + 1) // 2 for n in (S, H, W))


class CubeStageUp(CubeStage):
    """nnFormer's form: a decoder stage, which doubles the size of the volume and takes the encoder's output."""

    def __init__(self, dim: int, size: Any, num_heads: int, window: int) -> None:
        super().__init__(dim, size, num_heads, window)
        del self.downsample
        self.blocks[0], self.Upsample = SkipCubeBlock(dim, size, num_heads, window, 0), Double(dim)

    def forward(  # type: ignore[override]
        self, x: Tensor, skip: Tensor, S: int, H: int, W: int
    ) -> tuple[Any, ...]:
        up, (S, H, W) = self.Upsample(x, S, H, W), (2 * S, 2 * H, 2 * W)
        mask, (first, *others) = self.mask(x, (S, H, W)), self.blocks
        x = first(up + skip, mask, skip=skip, x_up=up)
        for block in others:
            x = block(x, mask)
        return x, S, H, W


class CubeModel(nn.Module):
    """nnFormer's form: an encoder stage and the decoder stage that takes its output."""

    def __init__(self, dim: int, size: tuple[int, int, int], num_heads: int, window: int) -> None:
        super().__init__()
        self.size = size
        self.down, self.up = (kind(dim, size, num_heads, window) for kind in (CubeStage, CubeStageUp))

    def forward(self, x: Tensor) -> Tensor:
        skip, _, _, _, x, *size = self.down(x, *self.size)
        return self.up(x, skip, *size)[0]
