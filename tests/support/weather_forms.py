"""Small blocks in the forms of weather models; the axes of a map are pressure level, latitude and longitude.

The code was written for these tests; names and conventions are those of the published code.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.published_forms import Mlp, cut, join, make_mask


def pads_of(size: tuple[int, ...], window: tuple[int, ...]) -> list[int]:
    """Return the padding before and after each axis, last axis first; half of it, rounded down, comes before."""
    amounts = [-s % w for s, w in zip(size, window, strict=True)]
    return [n for amount in reversed(amounts) for n in (amount // 2, amount - amount // 2)]


def cropped(x: Tensor, size: tuple[int, ...], window: tuple[int, ...]) -> Tensor:
    before = [(-s % w) // 2 for s, w in zip(size, window, strict=True)]
    return x[(slice(None), *(slice(b, b + s) for b, s in zip(before, size, strict=True)))]


class EarthAttention(nn.Module):
    """Pangu-Weather's form: windows are ordered by longitude first; the bias table has entries for each pair of levels,
    pair of latitudes, longitude offset and window type.
    """

    def __init__(self, dim: int, frame: tuple[int, ...], window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__()
        self.window_size, self.num_heads, self.scale = window_size, num_heads, (dim // num_heads) ** -0.5
        self.type_of_windows = math.prod(p // w for p, w in zip(frame[:-1], window_size[:-1], strict=True))
        rows = math.prod(w * w for w in window_size[:-1]) * (2 * window_size[-1] - 1)
        self.earth_position_bias_table = nn.Parameter(torch.randn(rows, self.type_of_windows, num_heads))
        at = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window_size), indexing="ij")).flatten(1)
        index = torch.zeros(at.shape[1], at.shape[1], dtype=torch.long)
        for i, w in zip(at[:-1], window_size[:-1], strict=True):
            index = index * w * w + i[:, None] + w * i[None]
        last = window_size[-1]
        index = index * (2 * last - 1) + at[-1][:, None] - at[-1][None] + last - 1
        self.register_buffer("earth_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(0.0), nn.Dropout(0.0), nn.Softmax(-1)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the attention output for the windows ``x``, (B * longitudes, types, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        bias = self.earth_position_bias_table[self.earth_position_index].permute(3, 2, 0, 1)
        scores = (q * self.scale) @ k.mT + bias
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(self.softmax(scores)) @ v
        return self.proj_drop(self.proj(out.permute(0, 2, 3, 1, 4).reshape(x.shape)))


class EarthBlock(nn.Module):
    """Pangu-Weather's form, or FengWu's with two axes: takes a sequence of one size, and pads its map on both sides."""

    def __init__(self, dim: int, input_resolution: Any, num_heads: int, window_size: Any, shift_size: Any) -> None:
        super().__init__()
        self.input_resolution, self.window_size, self.shift_size = input_resolution, window_size, shift_size
        self.norm1, self.norm2, self.mlp, self.drop_path = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim), nn.Identity()
        pads = pads_of(input_resolution, window_size)
        self.pad = (nn.ZeroPad2d if len(window_size) == 2 else nn.ZeroPad3d)(tuple(pads))
        frame = tuple(-(-s // w) * w for s, w in zip(input_resolution, window_size, strict=True))
        self.attn = EarthAttention(dim, frame, window_size, num_heads)
        self.roll = all(shift_size)
        mask = self.by_longitude(make_mask(frame, window_size, shift_size), frame) if self.roll else None
        self.register_buffer("attn_mask", mask)

    def by_longitude(self, windows: Tensor, frame: tuple[int, ...]) -> Tensor:
        """Regroup ``windows`` (B * num_windows, ...) as (B * longitudes, types, ...)."""
        longitudes = frame[-1] // self.window_size[-1]
        return windows.unflatten(0, (-1, self.attn.type_of_windows, longitudes)).transpose(1, 2).flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, window = tuple(self.input_resolution), tuple(self.window_size)
        y = self.pad(self.norm1(x).unflatten(1, size).movedim(-1, 1)).movedim(1, -1)
        frame, axes = tuple(y.shape[1:-1]), tuple(range(1, y.dim() - 1))
        y = torch.roll(y, [-s for s in self.shift_size], axes) if self.roll else y
        y = self.attn(self.by_longitude(cut(y, window), frame), self.attn_mask)
        longitudes = frame[-1] // window[-1]
        y = join(y.unflatten(0, (-1, longitudes)).transpose(1, 2).flatten(0, 2), window, frame)
        y = torch.roll(y, self.shift_size, axes) if self.roll else y
        x = x + self.drop_path(cropped(y, size, window).reshape(x.shape))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConditionedNorm(nn.Module):
    """Aurora's form: computes the norm's weight and bias from the lead time."""

    def __init__(self, dim: int, context: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim, elementwise_affine=False)
        self.ln_modulation = nn.Sequential(nn.SiLU(), nn.Linear(context, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.ln_modulation(c)[:, None].chunk(2, dim=-1)
        return self.ln(x) * scale + shift


class LowRank(nn.Module):
    """Aurora's low-rank update (LoRA) of a Linear layer's output, at every roll-out step except the first."""

    def __init__(self, dim: int, to: int) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(dim, 2, bias=False), nn.Linear(2, to, bias=False)

    def forward(self, x: Tensor, step: int) -> Any:
        return self.up(self.down(x)) if step else 0


class GlobeAttention(nn.Module):
    """Aurora's form: has no bias, calls torch's fused attention, and takes a mask for each image."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.attn_drop, self.use_fp16_safe_attention = num_heads, 0.0, False
        self.qkv, self.proj, self.proj_drop = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Dropout(0.0)
        self.lora_qkv, self.lora_proj = LowRank(dim, 3 * dim), LowRank(dim, dim)

    def forward(self, x: Tensor, mask: Tensor | None = None, rollout_step: int = 0) -> Tensor:
        qkv = self.qkv(x) + self.lora_qkv(x, rollout_step)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if mask is not None:
            mask = mask.repeat(len(q) // len(mask), 1, 1)[:, None]
        p = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(y) + self.lora_proj(y, rollout_step))


class GlobeBlock(nn.Module):
    """Aurora's form: rolls the map, then pads both sides. Pads attend to pads alone; longitude is periodic."""

    def __init__(self, dim: int, num_heads: int, context: int, window_size: Any, shift_size: Any) -> None:
        super().__init__()
        self.window_size, self.shift_size = window_size, shift_size
        self.norm1, self.norm2 = ConditionedNorm(dim, context), ConditionedNorm(dim, context)
        self.attn, self.mlp, self.drop_path = GlobeAttention(dim, num_heads), Mlp(dim), nn.Identity()

    def mask(self, size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], warped: bool) -> Tensor:
        number = torch.zeros(1, *size, 1)
        slices = [(slice(0, -w), slice(-w, -s), slice(-s, None)) for w, s in zip(window, shift, strict=True)]
        for i, region in enumerate(itertools.product(*slices)):
            joined = i + 1 if warped and i % 3 == 1 else i
            number[(0, *region)] = joined
        windows = cut(F.pad(number, (0, 0, *pads_of(size, window)), value=27), window).squeeze(-1)
        return (windows[:, None] != windows[:, :, None]).float() * -100.0

    def forward(self, x: Tensor, c: Tensor, res: Any, rollout_step: int, warped: bool = True) -> Tensor:
        size = tuple(res)
        fits = [n > w for n, w in zip(size, self.window_size, strict=True)]
        window = tuple(w if fit else n for n, w, fit in zip(size, self.window_size, fits, strict=True))
        shift = tuple(s if fit else 0 for s, fit in zip(self.shift_size, fits, strict=True))
        y, mask = x.unflatten(1, size), None
        if any(shift):
            y = torch.roll(y, [-s for s in shift], (1, 2, 3))
            mask = self.mask(size, window, shift, warped).to(x)
        y = F.pad(y, (0, 0, *pads_of(size, window)))
        y = join(self.attn(cut(y, window), mask, rollout_step), window, tuple(y.shape[1:-1]))
        y = torch.roll(cropped(y, size, window), shift, (1, 2, 3)).reshape(x.shape)
        x = x + self.drop_path(self.norm1(y, c))
        return x + self.drop_path(self.norm2(self.mlp(x), c))
