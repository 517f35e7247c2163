"""The MLP half of a Swin block in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swinkernels.reference._block import add_residual, check_norm, linear
from swinkernels.reference._geometry import without_autocast
from swinkernels.reference.layer_norm import layer_norm

APPROXIMATIONS = ("none", "tanh")


def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """Return ``x`` times the standard normal CDF of ``x``, exact or in the tanh approximation (used by MaxViT-tf)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if approximate == "none":
        y = y * 0.5 * (1 + torch.erf(y / math.sqrt(2)))
    else:
        y = y * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    return y.to(x.dtype)


@without_autocast
def mlp_half(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    eps: float = 1e-5,
    norm: str = "pre",
    approximate: str = "none",
    residual: bool = True,
    drop_path_scale: Tensor | None = None,
    layer_scale: Tensor | None = None,
    branch: Tensor | None = None,
    branch_scale: Tensor | None = None,
) -> Tensor:
    r"""Apply layer norm, two linear layers with GELU between them, and the residual connection.

    .. math::
        y = x + d \, \gamma \cdot fc_2(GELU(fc_1(LayerNorm(x)))) \quad \text{(pre, v1)}

        y = x + d \, \gamma \cdot LayerNorm(fc_2(GELU(fc_1(x)))) \quad \text{(post, v2)}

    Args:
        x: (B, ..., C), any floating dtype.
        norm_weight, norm_bias: (C,), or None for 1 and 0.
        fc1_weight, fc1_bias: (hidden, C) and (hidden,) or None.
        fc2_weight, fc2_bias: (C, hidden) and (C,) or None.
        eps: added to the variance of the norm.
        norm: "pre" (v1) or "post" (v2).
        approximate: "none" for the exact GELU, "tanh" for its approximation, as in torch.nn.GELU.
        residual: False leaves ``x +`` out; the norm stays.
        drop_path_scale: d, (B,): 0 for a sample whose branch is dropped, else 1 / (1 - p). None for 1.
        layer_scale: gamma, (C,), the per-channel factor of the branch, or None for 1.
        branch, branch_scale: the previous half's branch, of the shape of x, and its drop_path_scale. If ``branch`` is
            given, x + branch_scale * branch replaces x in the formulas above.

    Returns:
        (B, ..., C) in the dtype of x.

    Raises:
        ValueError: an unknown norm or approximation, mismatched shapes.

    Source: Swin Transformer (Liu et al., 2021), equation 3; Swin Transformer V2 (Liu et al., 2022), section 3.2; second
    line of ``forward`` in the blocks of timm, torchvision and MONAI.
    """
    op = "mlp_half"
    check_norm(op, norm)
    if approximate not in APPROXIMATIONS:
        raise ValueError(f"{op}: approximate must be one of {APPROXIMATIONS}, got {approximate!r}")
    if branch is not None:
        x = add_residual(op, x, branch, branch_scale)
    y = layer_norm(x, norm_weight, norm_bias, eps=eps) if norm == "pre" else x
    y = linear(gelu(linear(y, fc1_weight, fc1_bias), approximate), fc2_weight, fc2_bias)
    if norm == "post":
        y = layer_norm(y, norm_weight, norm_bias, eps=eps)
    return add_residual(op, x if residual else x.new_zeros(x.shape), y, drop_path_scale, layer_scale)
