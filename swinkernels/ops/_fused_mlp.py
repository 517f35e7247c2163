"""Defines the op ``mlp_half_triton`` of ``torch.ops.swinkernels``: the MLP half as one kernel, without a derivative."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops._library import define, kernel_parameter, register_without_derivative

define(
    "mlp_half_triton(Tensor x, Tensor? branch, Tensor? norm_weight, Tensor? norm_bias, Tensor fc1_weight, "
    "Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, float eps, bool post, bool tanh) -> Tensor"
)


def _fake(x, *_):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_mlp_half = register_without_derivative("mlp_half_triton", _fake, "backend='auto', 'cuda' or 'torch'")


def fused_mlp(
    x: Tensor,
    branch: Tensor | None,
    norm_parameters: Sequence[Tensor | None],
    fc1: Sequence[Tensor | None],
    fc2: Sequence[Tensor | None],
    eps: float,
    norm: str,
    approximate: str,
) -> Tensor:
    """Run the kernel. The weights and biases of fc1 and fc2 must be in the dtype of the products."""
    return _mlp_half(
        x, branch, *map(kernel_parameter, norm_parameters), *fc1, *fc2, eps, norm == "post", approximate == "tanh"
    )


def lacks(
    tensors: Sequence[Any], norm: Any, residual: Any, drop_path_scale: Any, layer_scale: Any, branch_scale: Any
) -> tuple[str, ...]:
    """Return the names of the features that this call of mlp_half uses and the kernel lacks.

    The arguments need not have been checked.
    """
    found = {
        "gradients (use torch.no_grad())": torch.is_grad_enabled()
        and any(getattr(t, "requires_grad", False) for t in tensors),
        "drop_path_scale": drop_path_scale is not None,
        "branch_scale": branch_scale is not None,
        "layer_scale with norm='post'": layer_scale is not None and norm == "post",
        "residual=False": residual is False,
    }
    return tuple(name for name, is_used in found.items() if is_used)
