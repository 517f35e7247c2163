"""Attention and blocks of vision transformers, optionally with a relative position bias and windows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.nn._features import as_given, as_map, check_module, forgive, refuse_tracing
from swinkernels.nn.drop_path import DropPath
from swinkernels.nn.mlp import Mlp
from swinkernels.nn.window_attention import window_per_axis
from swinkernels.ops._arguments import Ints
from swinkernels.ops._backends import backend_beside
from swinkernels.ops._library import linear_dtype
from swinkernels.ops.fallback import add
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.residual_layer_norm import residual_layer_norm
from swinkernels.ops.window_attention import window_attention_qkvpacked


class RelPosBias(nn.Module):
    """The table of a relative position bias, stored with the parameter name of timm's vision transformers.

    Args:
        window_size: tokens per axis.
        num_heads: number of heads.
        device, dtype: device and dtype of the table.

    Parameters: ``relative_position_bias_table`` (prod(2 * window - 1), num_heads).
    """

    def __init__(
        self,
        window_size: Sequence[int],
        num_heads: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rows = math.prod(2 * w - 1 for w in window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        forgive(unexpected_keys, prefix, ("relative_position_index",))


class Attention(nn.Module):
    r"""Multi-head self-attention of a vision transformer: over all tokens, or inside windows of a map.

    .. math:: y = W_{proj} \cdot attention(W_{qkv} \cdot x + b_{qkv}) + b_{proj}

    Without a window, attention is torch's ``scaled_dot_product_attention`` over all tokens. With a window it is
    :func:`swinkernels.window_attention_qkvpacked`. As in ViTDet, a map that is not a multiple of the window is padded
    with zeros that are attended to. If the window is the whole map, attention is over all tokens, and can have a bias.

    Args:
        dim: channels C of a token.
        num_heads: number of heads.
        qkv_bias: True for a bias of ``qkv``.
        attn_drop, proj_drop: dropout probabilities of the attention weights and of the result.
        window_size: tokens per axis, an int for square windows in 2D or one value per axis; at most 1024 tokens in a
            window. None for attention over all tokens, without a bias.
        rel_pos: True for a relative position bias inside the window.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference", for window attention.
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), S = (H, W) or (D, H, W), or a sequence (B, L, C) with ``size`` = S. Without a window a sequence
        needs no size and may have further tokens, such as a class token. The result has the shape of x.

    Parameters: ``qkv.weight`` (3C, C), ``qkv.bias`` (3C), ``proj.weight`` (C, C), ``proj.bias`` (C) and, with
    ``rel_pos``, ``rel_pos.relative_position_bias_table`` (prod(2 * window - 1), num_heads).

    Source: An Image is Worth 16x16 Words (Dosovitskiy et al., 2021); ``Attention`` of timm's vision_transformer.py and
    ``RelPosAttention`` of its vision_transformer_relpos.py; Exploring Plain Vision Transformer Backbones for Object
    Detection (Li et al., 2022) for windows.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        window_size: Ints | None = None,
        rel_pos: bool = False,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_module(op, dim=dim, num_heads=num_heads, spatial_dims=2, eps=0.0, backend=backend)
        if dim % num_heads != 0:
            raise ValueError(f"{op}: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        if rel_pos and window_size is None:
            raise ValueError(
                f"{op}: rel_pos=True needs window_size, which determines the size of the bias table; for attention "
                "over the whole map, pass the map's size as window_size"
            )
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = None if window_size is None else window_per_axis(op, window_size)
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **factory)
        self.rel_pos = RelPosBias(self.window_size, num_heads, **factory) if rel_pos and self.window_size else None
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        dropout_p = self.attn_drop.p if self.attn_drop.training else 0.0
        if self.window_size is None:
            out = self._over_all(x, dropout_p)
        else:
            refuse_tracing(type(self).__name__)
            x = as_map(type(self).__name__, x, size, self.dim, len(self.window_size))
            out = window_attention_qkvpacked(
                self.qkv(x),
                None if self.rel_pos is None else self.rel_pos.relative_position_bias_table,
                num_heads=self.num_heads,
                window_size=(1,) * (x.dim() - 2 - len(self.window_size)) + self.window_size,
                pad_qkv=self.qkv.bias,
                dropout_p=dropout_p,
                backend=self.backend,
            )
            out = as_given(out, size)
        return self.proj_drop(self.proj(out))

    def _over_all(self, x: Tensor, dropout_p: float) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"{type(self).__name__}: x must be a tensor, got {type(x).__name__}")
        if x.dim() < 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"{type(self).__name__}: x must be (B, *S, C) or (B, L, C) with C = dim = {self.dim}, got shape "
                f"{tuple(x.shape)}"
            )
        qkv = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = (t.transpose(1, 2) for t in qkv.unbind(2))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return out.transpose(1, 2).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, window_size={self.window_size}, backend={self.backend!r}"


class LayerScale(nn.Module):
    """Multiplies each channel of a branch by a trainable factor, ``gamma``.

    Args:
        dim: channels of a token.
        init_values: initial value of all factors.

    Parameters: ``gamma`` (dim).

    Source: Going deeper with Image Transformers (Touvron et al., 2021); ``LayerScale`` of timm.
    """

    def __init__(
        self,
        dim: int,
        init_values: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.init_values = init_values
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_values)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    r"""A block of a vision transformer: attention and an MLP, each with a preceding norm and a residual connection.

    .. math::
        s = x + \gamma_1 \, attention(LayerNorm(x)), \quad y = s + \gamma_2 \, MLP(LayerNorm(s))

    One op computes the first sum and the norm after it.

    Args:
        dim, num_heads, qkv_bias, attn_drop, window_size, rel_pos, backend, device, dtype: as for :class:`Attention`;
            the norms run on the same backend if it supports them.
        mlp_ratio: hidden channels of the MLP as a multiple of C.
        proj_drop: dropout probability after the projection and in the MLP.
        init_values: initial value of the branches' factors gamma; None or 0 for no factors.
        drop_path: probability of dropping a branch for a sample.
        act_layer: class or function that creates the MLP's activation.
        eps: added to the variance of the norms.

    Shape: as for :class:`Attention`.

    Parameters: those of ``norm1``, ``attn``, ``norm2``, ``mlp`` (``fc1``, ``fc2``) and, with ``init_values``,
    ``ls1.gamma`` and ``ls2.gamma`` (C).

    Source: An Image is Worth 16x16 Words (Dosovitskiy et al., 2021); ``Block`` of timm's vision_transformer.py,
    ``RelPosBlock`` of its vision_transformer_relpos.py.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        init_values: float | None = None,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        *,
        window_size: Ints | None = None,
        rel_pos: bool = False,
        eps: float = 1e-6,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_module(type(self).__name__, dim=dim, num_heads=num_heads, spatial_dims=2, eps=eps, backend=backend)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.backend = backend
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = Attention(
            dim,
            num_heads,
            qkv_bias,
            attn_drop,
            proj_drop,
            window_size=window_size,
            rel_pos=rel_pos,
            backend=backend,
            **factory,
        )
        self.ls1 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=proj_drop, **factory)
        self.ls2 = LayerScale(dim, init_values, **factory) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        backend = backend_beside("residual_layer_norm", self.backend)
        first, second = self.norm1, self.norm2
        z = layer_norm(x, first.weight, first.bias, eps=first.eps, dtype=linear_dtype(x), backend=backend)
        y = self.ls1(self.attn(z, size))
        d = self.drop_path1.scale(y)
        s, z = residual_layer_norm(x, y, second.weight, second.bias, eps=second.eps, drop_path_scale=d, backend=backend)
        y = self.ls2(self.mlp(z))
        return add(s, y, self.drop_path2.scale(y))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, backend={self.backend!r}"
