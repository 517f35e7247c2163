"""The attention half of a Swin block in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from swinkernels.reference._block import add_residual, check_norm, linear
from swinkernels.reference._geometry import Ints, without_autocast
from swinkernels.reference.layer_norm import layer_norm
from swinkernels.reference.window_attention import window_attention_qkvpacked


@without_autocast
def attention_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Ints,
    eps: float = 1e-5,
    norm: str = "pre",
    residual: bool = True,
    drop_path_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    **attention: Any,
) -> Tensor:
    r"""Apply layer norm, QKV projection, shifted-window attention, output projection and the residual connection.

    .. math::
        y = x + d \, \gamma \cdot proj(attention(qkv(LayerNorm(x)))) \quad \text{(pre, v1)}

        y = x + d \, \gamma \cdot LayerNorm(proj(attention(qkv(x)))) \quad \text{(post, v2)}

    The published code pads the input of the QKV projection with zeros, so a pad token's q, k and v are ``qkv_bias``:
    in v1 a pad token is zero after the norm, not before it.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), any floating dtype.
        norm_weight, norm_bias: (C,), or None for 1 and 0.
        qkv_weight, qkv_bias: (3A, C) and (3A,) or None, A = num_heads * head_dim; rows are (3, num_heads, head_dim).
        proj_weight, proj_bias: (C, A) and (C,) or None.
        bias_table: relative position bias, (prod(2 * window - 1), num_heads).
        num_heads, window_size: as for :func:`swinkernels.window_attention`.
        eps: added to the variance of the norm.
        norm: "pre" (v1) or "post" (v2).
        residual: False leaves ``x +`` out; the norm stays.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.
        layer_scale: gamma, (C,), the per-channel factor of the branch, or None for 1.
        attention: the other arguments of :func:`swinkernels.window_attention`, except ``pad_qkv``, which is
            ``qkv_bias``.

    Returns:
        (B, \*S, C) in the dtype of x.

    Raises:
        ValueError: an unknown norm, mismatched shapes, an invalid geometry.

    Source: Swin Transformer (Liu et al., 2021), equation 3; Swin Transformer V2 (Liu et al., 2022), section 3.2; first
    line of ``forward`` in the blocks of timm, torchvision and MONAI.
    """
    op = "attention_half"
    check_norm(op, norm)
    if "pad_qkv" in attention:
        raise ValueError(f"{op}: pad_qkv must not be given, because it is qkv_bias here, got {attention['pad_qkv']!r}")
    branch = layer_norm(x, norm_weight, norm_bias, eps=eps) if norm == "pre" else x
    branch = linear(branch, qkv_weight, qkv_bias)
    branch = window_attention_qkvpacked(
        branch, bias_table, num_heads=num_heads, window_size=window_size, pad_qkv=qkv_bias, **attention
    )
    branch = linear(branch, proj_weight, proj_bias)
    if norm == "post":
        branch = layer_norm(branch, norm_weight, norm_bias, eps=eps)
    return add_residual(op, x if residual else x.new_zeros(x.shape), branch, drop_path_scale, layer_scale)
