"""Stateless layers. ``kernelize`` assigns their forward to modules, which must have the attributes declared here."""

from __future__ import annotations

from torch import Tensor, nn

from .ops import patch_merging, window_attention_qkvpacked


class WindowAttention(nn.Module):
    """Replaces the forward of Microsoft's and timm's v1 WindowAttention; the relative position index must be standard.

    With a mask (num_windows, N, N), the windows of each image are stacked vertically into one map, and the mask becomes
    a dense bias for each window of the map.
    """

    can_torch_compile = True

    qkv: nn.Module
    proj: nn.Module
    attn_drop: nn.Dropout
    proj_drop: nn.Module
    relative_position_bias_table: Tensor
    relative_position_index: Tensor
    num_heads: int
    scale: float
    window_size: tuple[int, int]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        height, width = self.window_size
        n = height * width
        table, bias, stacked = self.relative_position_bias_table, None, 1
        if mask is not None:
            stacked = mask.shape[0]
            standard = table[self.relative_position_index.flatten()].unflatten(0, (n, n)).permute(2, 0, 1)
            table, bias = None, standard + mask[:, None]
        out = window_attention_qkvpacked(
            self.qkv(x).reshape(-1, stacked * height, width, 3 * x.shape[-1]),
            table,
            bias=bias,
            num_heads=self.num_heads,
            window_size=(height, width),
            scale=self.scale,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        return self.proj_drop(self.proj(out.reshape(x.shape[0], n, -1)))


class PatchMerging(nn.Module):
    """Replaces the forward of timm's v1 PatchMerging: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), out_dim)."""

    can_torch_compile = True

    norm: nn.LayerNorm
    reduction: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        return patch_merging(x, self.norm.weight, self.norm.bias, self.reduction.weight, eps=self.norm.eps)


__all__ = ["PatchMerging", "WindowAttention"]
