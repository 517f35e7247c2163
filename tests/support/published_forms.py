"""Small Swin blocks in the forms in which projects have copied Microsoft's code.

The attribute names, signatures and conventions are those of the published copies; the code is not.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def cut(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Cut ``x`` (B, *S, C) into windows (B * num_windows, N, C)."""
    axes = len(window)
    parts = x.reshape(x.shape[0], *(n for s, w in zip(x.shape[1:-1], window, strict=True) for n in (s // w, w)), -1)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), 2 * axes + 1]
    return parts.permute(order).reshape(-1, math.prod(window), x.shape[-1])


def join(windows: Tensor, window: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """Invert :func:`cut`."""
    axes = len(window)
    counts = [s // w for s, w in zip(size, window, strict=True)]
    x = windows.reshape(-1, *counts, *window, windows.shape[-1])
    order = [0, *(n for i in range(axes) for n in (1 + i, 1 + axes + i)), 1 + 2 * axes]
    return x.permute(order).reshape(-1, *size, windows.shape[-1])


def make_mask(frame: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], value: float = -100.0) -> Tensor:
    number = torch.zeros(1, *frame, 1)
    slices = [
        (slice(0, -w), slice(-w, -s or None), slice(-s or p, None))
        for p, w, s in zip(frame, window, shift, strict=True)
    ]
    for i, region in enumerate(itertools.product(*slices)):
        number[(0, *region)] = i
    windows = cut(number, window).squeeze(-1)
    return (windows[:, None] != windows[:, :, None]).float() * value


class WindowAttention(nn.Module):
    def __init__(self, dim: int, window_size: tuple[int, ...], num_heads: int, attn_drop: float = 0.0) -> None:
        super().__init__()
        self.dim, self.window_size, self.num_heads = dim, window_size, num_heads
        self.scale = (dim // num_heads) ** -0.5
        self.relative_position_bias_table = nn.Parameter(
            torch.randn(math.prod(2 * w - 1 for w in window_size), num_heads)
        )
        at = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window_size), indexing="ij")).flatten(1)
        index = torch.zeros(at.shape[1], at.shape[1], dtype=torch.long)
        for axis, w in enumerate(window_size):
            index = index * (2 * w - 1) + at[axis][:, None] - at[axis][None] + w - 1
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop, self.softmax = nn.Dropout(attn_drop), nn.Dropout(0.0), nn.Softmax(-1)

    def bias(self, n: int) -> Tensor:
        return self.relative_position_bias_table[self.relative_position_index[:n, :n]].permute(2, 0, 1)

    def qkv_of(self, x: Tensor) -> Tensor:
        return self.qkv(x)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return (q * self.scale) @ k.mT

    def mix(self, probabilities: Tensor) -> Tensor:
        return probabilities

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv_of(x).reshape(b, n, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        scores = self.scores(q, k) + self.bias(n)
        if mask is not None:
            scores = (scores.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = self.attn_drop(self.mix(self.softmax(scores))) @ v
        return self.proj_drop(self.proj(out.transpose(1, 2).reshape(b, n, c)))


class CosineAttention(WindowAttention):
    """Swin v2's cosine attention."""

    def __init__(self, dim: int, window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(dim, window_size, num_heads)
        del self.relative_position_bias_table, self.scale
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones(num_heads, 1, 1)))
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, num_heads, bias=False))
        at = torch.stack(torch.meshgrid(*(torch.arange(1.0 - w, w) / (w - 1) * 8 for w in window_size), indexing="ij"))
        at = at.permute(1, 2, 0)[None]
        self.register_buffer("relative_coords_table", at.sign() * torch.log2(at.abs() + 1.0) / 3.0)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(dim)), nn.Parameter(torch.randn(dim))

    def bias(self, n: int) -> Tensor:
        table = self.cpb_mlp(self.relative_coords_table).view(-1, self.num_heads)
        return 16 * torch.sigmoid(table[self.relative_position_index].permute(2, 0, 1))

    def qkv_of(self, x: Tensor) -> Tensor:
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.v_bias), self.v_bias]))

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        longest = torch.log(torch.tensor(1.0 / 0.01, device=q.device))
        return F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * torch.clamp(self.logit_scale, max=longest).exp()


class DropPath(nn.Module):
    """The DropPath of projects that do not use timm's."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.drop_prob
        return x * x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep).div_(keep)


class Mlp(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, 2 * dim),
            nn.GELU(),
            nn.Linear(2 * dim, dim),
            nn.Dropout(0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.act(self.fc1(x))))


class Block(nn.Module):
    """Code shared by all forms of the block."""

    attention: type[WindowAttention] = WindowAttention

    def __init__(self, dim: int, num_heads: int, window_size: Any, shift_size: Any, drop_path: float = 0.0) -> None:
        super().__init__()
        self.dim, self.num_heads, self.window_size, self.shift_size = dim, num_heads, window_size, shift_size
        window = window_size if isinstance(window_size, tuple) else (window_size, window_size)
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(dim), nn.LayerNorm(dim), Mlp(dim)
        self.attn = self.attention(dim, window, num_heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def attend(self, x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], mask: Tensor | None) -> Tensor:
        axes = tuple(range(1, x.dim() - 1))
        size = tuple(x.shape[1:-1])
        if any(shift):
            x = torch.roll(x, [-s for s in shift], axes)
        x = join(self.attn(cut(x, window), mask=mask), window, size)
        return torch.roll(x, shift, axes) if any(shift) else x

    def padded(self, x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], mask: Tensor | None) -> Tensor:
        size = x.shape[1:-1]
        pads = [n for s, w in zip(reversed(size), reversed(window), strict=True) for n in (0, -s % w)]
        y = self.attend(F.pad(x, (0, 0, *pads)), window, shift, mask)
        return y[(slice(None), *(slice(s) for s in size))].contiguous()

    def both_halves(self, shortcut: Tensor, y: Tensor) -> Tensor:
        x = shortcut + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ClassificationBlock(Block):
    """Microsoft's form: takes (B, L, C) for a fixed map size, and keeps the mask in a buffer."""

    def __init__(
        self,
        dim: int,
        input_resolution: tuple[int, int],
        num_heads: int,
        window_size: int = 4,
        shift_size: int = 0,
        **options: Any,
    ) -> None:
        if min(input_resolution) <= window_size:
            window_size, shift_size = min(input_resolution), 0
        super().__init__(dim, num_heads, window_size, shift_size, **options)
        self.input_resolution = input_resolution
        self.register_buffer("attn_mask", self.calculate_mask(input_resolution) if shift_size > 0 else None)

    def calculate_mask(self, size: tuple[int, int]) -> Tensor:
        return make_mask(size, (self.window_size,) * 2, (self.shift_size,) * 2)

    def forward(self, x: Tensor) -> Tensor:
        h, w = self.input_resolution
        b, length, c = x.shape
        assert length == h * w, "input feature has wrong size"
        y = self.norm1(x).view(b, h, w, c)
        y = self.attend(y, (self.window_size,) * 2, (self.shift_size,) * 2, self.attn_mask)
        return self.both_halves(x, y.view(b, length, c))


class ClassificationBlockV2(ClassificationBlock):
    """Microsoft's form of v2: has cosine attention, and norms after the branches."""

    attention = CosineAttention

    def forward(self, x: Tensor) -> Tensor:
        y = self.attend(
            x.view(len(x), *self.input_resolution, -1), (self.window_size,) * 2, (self.shift_size,) * 2, self.attn_mask
        )
        x = x + self.drop_path(self.norm1(y.view(x.shape)))
        return x + self.drop_path(self.norm2(self.mlp(x)))


class RestorationBlock(ClassificationBlock):
    """SwinIR's form: takes the size as an argument, and computes a new mask for sizes other than input_resolution."""

    def forward(self, x: Tensor, x_size: tuple[int, int]) -> Tensor:
        mask = self.attn_mask if tuple(x_size) == tuple(self.input_resolution) else self.calculate_mask(x_size).to(x)
        y = self.norm1(x).view(len(x), *x_size, -1)
        y = self.attend(y, (self.window_size,) * 2, (self.shift_size,) * 2, mask)
        return self.both_halves(x, y.view(x.shape))


class SegmentationBlock(Block):
    """mmseg's form: pads maps of any size; the stage sets the size in attributes, and passes the mask."""

    def __init__(self, dim: int, num_heads: int, window_size: int = 4, shift_size: int = 0, **options: Any) -> None:
        super().__init__(dim, num_heads, window_size, shift_size, **options)
        self.H = self.W = None

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        assert x.shape[1] == self.H * self.W
        y = self.norm1(x).view(len(x), self.H, self.W, -1)
        mask = mask_matrix if self.shift_size > 0 else None
        y = self.padded(y, (self.window_size,) * 2, (self.shift_size,) * 2, mask)
        return self.both_halves(x, y.view(x.shape))


class VideoBlock(Block):
    """Video Swin's form: takes (B, D, H, W, C), clamps windows to the map, and supports activation checkpointing."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: Any = (2, 4, 4),
        shift_size: Any = (0, 0, 0),
        use_checkpoint: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, window_size, shift_size, **options)
        self.use_checkpoint = use_checkpoint

    def forward_part1(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        window, shift = clamped(x.shape[1:-1], self.window_size, self.shift_size)
        return self.padded(self.norm1(x), window, shift, mask_matrix if any(shift) else None)

    def forward_part2(self, x: Tensor) -> Tensor:
        return self.drop_path(self.mlp(self.norm2(x)))

    def forward(self, x: Tensor, mask_matrix: Tensor) -> Tensor:
        if self.use_checkpoint:
            from torch.utils.checkpoint import checkpoint

            x = x + self.drop_path(checkpoint(self.forward_part1, x, mask_matrix, use_reentrant=False))
            return x + checkpoint(self.forward_part2, x, use_reentrant=False)
        x = x + self.drop_path(self.forward_part1(x, mask_matrix))
        return x + self.forward_part2(x)


def clamped(size: Any, window: Any, shift: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    fits = [s > w for s, w in zip(size, window, strict=True)]
    return (
        tuple(w if fit else s for s, w, fit in zip(size, window, fits, strict=True)),
        tuple(s if fit else 0 for s, fit in zip(shift, fits, strict=True)),
    )


class MapBlock(Block):
    """A form that takes (B, H, W, C) of any size, rolls and then pads it, and computes the mask in every call."""

    def forward(self, x: Tensor) -> Tensor:
        window, shift = (self.window_size,) * 2, (self.shift_size,) * 2
        size = x.shape[1:-1]
        frame = tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))
        y = self.norm1(x)
        if any(shift):
            y = torch.roll(y, [-s for s in shift], (1, 2))
        y = F.pad(y, (0, 0, 0, frame[1] - size[1], 0, frame[0] - size[0]))
        mask = make_mask(frame, window, shift).to(x) if any(shift) else None
        y = join(self.attn(cut(y, window), mask), window, frame)[:, : size[0], : size[1]]
        y = torch.roll(y, shift, (1, 2)) if any(shift) else y
        return self.both_halves(x, y)


class IndexedAttention(WindowAttention):
    """HAT's form: takes the index of the bias table as an argument."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        del self.relative_position_index

    def forward(self, x: Tensor, rpi: Tensor, mask: Tensor | None = None) -> Tensor:
        self._buffers["relative_position_index"] = rpi
        try:
            return super().forward(x, mask)
        finally:
            del self._buffers["relative_position_index"]


class HybridBlock(ClassificationBlock):
    """HAT's form: has a convolution parallel to the attention, and takes index and mask from the model."""

    attention = IndexedAttention

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conv_block = nn.Conv2d(self.dim, self.dim, 3, padding=1)

    def attend_to(self, x: Tensor, rpi: Tensor, mask: Tensor | None) -> Tensor:
        window, size = (self.window_size,) * 2, tuple(x.shape[1:-1])
        shift = (self.shift_size,) * 2
        windows = self.attn(cut(torch.roll(x, [-s for s in shift], (1, 2)), window), rpi=rpi, mask=mask)
        return torch.roll(join(windows, window, size), shift, (1, 2))

    def forward(self, x: Tensor, x_size: tuple[int, int], rpi_sa: Tensor, attn_mask: Tensor) -> Tensor:
        y = self.norm1(x).view(len(x), *x_size, -1)
        beside = self.conv_block(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).reshape(x.shape)
        mask = attn_mask if self.shift_size > 0 else None
        return self.both_halves(x, self.attend_to(y, rpi_sa, mask).view(x.shape) + 0.01 * beside)
