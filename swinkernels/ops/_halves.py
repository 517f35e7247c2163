"""Helpers of attention_half and mlp_half: argument checks, casts, and the residual connection around a branch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops import _arguments, fallback
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.residual_layer_norm import residual_post_norm

NORMS = ("pre", "post")


def check_half(
    op: str, x: Tensor, norm: Any, residual: Any, eps: Any, drop_path_scale: Any, **of_channels: Any
) -> float:
    """Check the arguments common to both halves and return eps; ``of_channels`` have one value per channel."""
    _arguments.check_choice(op, "norm", norm, NORMS)
    if not isinstance(residual, bool):
        raise TypeError(f"{op}: residual must be a bool, got {residual!r}")
    _arguments.check_parameters(op, x, (x.shape[0],), drop_path_scale=drop_path_scale)
    _arguments.check_parameters(op, x, (x.shape[-1],), **of_channels)
    return _arguments.check_eps(op, eps)


def cast(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Cast the weight and bias of a Linear layer to ``dtype``."""
    weight = weight if weight.dtype == dtype else weight.to(dtype)
    return weight, bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def scaled(weight: Tensor, bias: Tensor | None, layer_scale: Tensor | None, norm: str) -> tuple[Tensor, Tensor | None]:
    """Return the weight and bias of a branch's last Linear layer, multiplied by layer scale if ``norm`` is "pre".

    Because layer scale multiplies the weight instead of the branch, its gradient needs no additional saved tensor. With
    "post" the norm follows the Linear layer, so :func:`finish` applies layer scale to the norm instead.
    """
    if layer_scale is None or norm == "post":
        return weight, bias
    return weight * layer_scale[:, None], None if bias is None else bias * layer_scale


def norm_parameters(
    norm_weight: Tensor | None, norm_bias: Tensor | None, layer_scale: Tensor | None, norm: str
) -> tuple[Tensor | None, Tensor | None]:
    """Return the norm's weight and bias, multiplied by layer scale if ``norm`` is "post": that scales its result."""
    if layer_scale is None or norm == "pre":
        return norm_weight, norm_bias
    weight = layer_scale if norm_weight is None else norm_weight * layer_scale
    return weight, None if norm_bias is None else norm_bias * layer_scale


def finish(
    x: Tensor,
    last: Callable[[Tensor | None], Tensor],
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    *,
    eps: float,
    norm: str,
    residual: bool,
    backend: str,
) -> Tensor:
    """Run the end of a half: its last Linear layer, the norm if ``norm`` is "post", and the residual connection.

    ``last(residual)`` runs the Linear layer and adds ``residual`` unless that is None.
    """
    if norm == "pre":
        if residual and drop_path_scale is None:
            return last(x)
        branch = last(None)
        if residual:
            return fallback.add(x, branch, drop_path_scale)
    else:
        branch = last(None)
        norm_weight, norm_bias = norm_parameters(norm_weight, norm_bias, layer_scale, norm)
        if residual:
            return residual_post_norm(
                x, branch, norm_weight, norm_bias, eps=eps, drop_path_scale=drop_path_scale, backend=backend
            )
        branch = layer_norm(branch, norm_weight, norm_bias, eps=eps, dtype=x.dtype, backend=backend)
    if drop_path_scale is not None:
        branch = (branch * drop_path_scale.reshape(-1, *(1,) * (branch.dim() - 1))).to(branch.dtype)
    return branch
