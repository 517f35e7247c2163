"""The residual connection and the linear layer that both halves of a Swin block use."""

from __future__ import annotations

import torch
from torch import Tensor

NORMS = ("pre", "post")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ weight.T + bias, computed in float32 or wider and rounded once; weight is (out, in)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).T
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def add_residual(
    op: str, x: Tensor, branch: Tensor, drop_path_scale: Tensor | None, layer_scale: Tensor | None = None
) -> Tensor:
    """Return x + drop_path_scale * layer_scale * branch; drop_path_scale is (B,) and layer_scale (C,)."""
    if branch.shape != x.shape:
        raise ValueError(
            f"{op}: the residual stream and the branch must have the same shape, got {tuple(x.shape)} and "
            f"{tuple(branch.shape)}"
        )
    wide = torch.promote_types(x.dtype, torch.float32)
    branch = branch.to(wide)
    if layer_scale is not None:
        if layer_scale.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: layer_scale must have one value for each of the {x.shape[-1]} channels, "
                f"got shape {tuple(layer_scale.shape)}"
            )
        branch = branch * layer_scale.to(wide)
    if drop_path_scale is not None:
        if drop_path_scale.shape != x.shape[:1]:
            raise ValueError(
                f"{op}: drop_path_scale must have one value for each of the {x.shape[0]} samples, "
                f"got shape {tuple(drop_path_scale.shape)}"
            )
        branch = branch * drop_path_scale.to(wide).reshape(-1, *(1,) * (x.dim() - 1))
    return (x.to(wide) + branch).to(x.dtype)


def check_norm(op: str, norm: str) -> None:
    if norm not in NORMS:
        raise ValueError(f"{op}: norm must be one of {NORMS}, got {norm!r}")
