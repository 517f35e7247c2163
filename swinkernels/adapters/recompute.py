"""Blocks whose backward pass recomputes norms and GELU: ``accelerate(recompute=True)``.

attention_half and mlp_half save the inputs of norms and GELU for the backward pass, but not their results. In v2 blocks
no norm precedes QKV: attention_half would save the same tensors as the block's own attention, so only the MLP half is
replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.bypass import child, class_of, why_not_absorbed
from swinkernels.adapters.linear_layers import Mlp, why_not_left_out, why_not_readable
from swinkernels.adapters.norms import Residual, in_another_dtype, norm_dtype
from swinkernels.ops._backends import backend_beside
from swinkernels.ops._library import is_untraced, linear_dtype
from swinkernels.ops.attention_half import attention_half
from swinkernels.ops.mlp_half import mlp_half


@dataclass(frozen=True)
class Recompute:
    """Describes how mlp_half and, in v1, attention_half replace parts of a block."""

    # In v1, the drop path, the sum and the norm between attention and MLP; in v2, the norm, the drop path and the sum
    # after the MLP.
    residual: Residual
    mlp: Mlp
    # The ``norm`` argument of mlp_half: "pre" (v1) or "post" (v2).
    norm: str
    # (block, training) -> the reason why the halves cannot replace the block's code although residual and MLP fit, or
    # None: in v1 the attention may not fit. If training is None, the current mode of the dropouts applies.
    why_not_block: Callable[[Any, bool | None], str | None] = lambda block, training: None
    # Returns the module that owns the modules of ``mlp``, if that is not the block.
    owner: Callable[[Any], Any] = lambda block: block

    def why_not(self, block: Any, training: bool | None = None) -> str | None:
        """Return the reason why ``recompute`` has no effect on the block, or None.

        Unless ``training`` is None, it overrides the training mode of the dropouts.
        """
        reason = self.why_not_block(block, training) or self.residual.why_not(block)
        if reason is not None:
            return reason
        owner = self.owner(block)
        layers = self.mlp.layers_or_reason(owner, training)
        if isinstance(layers, str):
            return layers
        reason = why_not_readable("fc1", layers.fc1) or why_not_readable("fc2", layers.fc2)
        if reason is not None or self.norm == "post" or self.mlp.drop is None:
            return reason
        drop, kind = child(owner, self.mlp.drop), self.mlp.drop_kind
        if kind is nn.Dropout:
            return why_not_left_out(self.mlp.drop, drop, training=training)
        return why_not_absorbed(
            self.mlp.drop, drop, nn.Identity if class_of(drop) is nn.Identity else kind, kind.__name__
        )

    def why_not_in_training(self, block: Any) -> str | None:
        """Return the result of :meth:`why_not` for a block in training mode, for the report."""
        return self.why_not(block, training=True)

    def run(self, block: Any, x: Tensor, attention: Callable[[], Tensor | None] | None = None) -> Tensor | None:
        """Compute the block (v1) or its MLP half (v2) with recomputation, or return None if it does not apply.

        Args:
            block: the accelerated block.
            x: the block's input (v1) or the residual stream after attention (v2).
            attention: in v1, a function that returns the attention branch of ``x`` before the drop path, or None if
                attention_half cannot compute it.
        """
        if not (block._swinkernels_recomputes and torch.is_grad_enabled() and is_untraced((x,))):
            return None
        if self.why_not(block) is not None:
            return None
        owner, norm, dtype = self.owner(block), child(block, self.residual.norm), linear_dtype(x)
        layers = self.mlp.layers(owner, x)
        of_branch = norm_dtype(x, dtype) if self.norm == "post" else dtype
        if (
            layers is None
            or in_another_dtype(x, norm.weight, norm.bias)
            or torch.promote_types(x.dtype, of_branch) != x.dtype
        ):
            return None
        branch = None
        if attention is not None:
            branch = attention()
            if branch is None:
                return None
            of_branch = branch.dtype
        # Drop paths draw the same random numbers as the library's, because no other layer draws any after attention.
        scale = last = None
        if self.residual.drop_path is not None:
            drawn_for = x if branch is None else branch
            scale = self.residual.scale(child(block, self.residual.drop_path), drawn_for, of_branch)
        if self.norm == "post":
            scale, last = None, scale
        elif self.mlp.drop is not None and self.mlp.drop_kind is not nn.Dropout:
            last = self.residual.scale(child(owner, self.mlp.drop), x, of_branch)
        fc1, fc2, gelu = layers
        return mlp_half(
            x, norm.weight, norm.bias, fc1.weight, fc1.bias, fc2.weight, fc2.bias, eps=norm.eps, norm=self.norm,
            approximate=gelu, branch=branch, branch_scale=scale, drop_path_scale=last,
            backend=backend_beside("residual_layer_norm", block._swinkernels_backend),
        )  # fmt: skip


def attention_branch(
    x: Tensor, norm: Any, qkv: Sequence[Any], proj: Any, backend: str, arguments: dict[str, Any]
) -> Tensor | None:
    """Return the output of a v1 block's attention branch, computed by attention_half.

    Return None if the device or, outside autocast, the dtype of a parameter differs from that of ``x``.

    Args:
        x: (B, *S, C), the block's input.
        norm: the norm before QKV.
        qkv: one Linear layer for q, k and v together, or one for each.
        proj: the Linear layer after attention.
        backend: the backend of the attention.
        arguments: the keyword arguments of window_attention_qkvpacked.
    """
    parameters = [p for layer in (norm, *qkv, proj) for p in (layer.weight, layer.bias)]
    if in_another_dtype(x, *parameters):
        return None
    bias = arguments.pop("pad_qkv")
    weight = qkv[0].weight if len(qkv) == 1 else tuple(layer.weight for layer in qkv)
    return attention_half(
        x, norm.weight, norm.bias, weight, bias, proj.weight, proj.bias, eps=norm.eps, residual=False, backend=backend,
        **arguments,
    )  # fmt: skip
