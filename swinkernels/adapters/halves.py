"""Computes the halves of a block with attention_half and mlp_half, where that saves memory or time.

In training, ``accelerate(recompute=True)`` makes the backward pass recompute norms and GELU: the halves save their
inputs, but not their results. In v2 blocks no norm precedes QKV: attention_half would save the same tensors as the
block's own attention, so only the MLP half is replaced.

In float32 and bfloat16 inference on a CPU, a half is one op if this package's kernels compute it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.bypass import child, class_of, weight_and_bias, why_not_absorbed
from swinkernels.adapters.checks import kept, metadata, settled
from swinkernels.adapters.linear_layers import (
    Layers,
    Mlp,
    WeakLayers,
    drops_nothing,
    why_not_left_out,
    why_not_readable,
)
from swinkernels.adapters.norms import Residual, are_elsewhere, norm_dtype
from swinkernels.adapters.repeated import repeated
from swinkernels.ops._backends import backend_beside
from swinkernels.ops._fused_attention import KernelCall
from swinkernels.ops._fused_attention import attention_half as fused_attention_half
from swinkernels.ops._fused_linear import Layer, Norm, fit_kernels, joins, mlp, run_on_kernels
from swinkernels.ops._library import autocast_dtype, call_key, is_untraced, linear_dtype
from swinkernels.ops._onednn import is_large
from swinkernels.ops.attention_half import TABLES, attention_half, decide, tables_of
from swinkernels.ops.mlp_half import mlp_half

# Computes an attention branch or, given True, its sum with the block's input; see Halves.run.
Attention = Callable[[bool], Tensor | None]


@dataclass(frozen=True, eq=False)
class Halves:
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
        """Return the reason why the halves cannot replace the block's code, or None.

        Unless ``training`` is None, it overrides the training mode of the dropouts.
        """
        found = self._layers_or_reason(block, training)
        return found if isinstance(found, str) else None

    def _layers_or_reason(self, block: Any, training: bool | None) -> Layers | str:
        """Return the layers of the MLP, or the result of :meth:`why_not`."""
        reason = self.why_not_block(block, training) or self.residual.why_not(block)
        if reason is not None:
            return reason
        owner = self.owner(block)
        layers = self.mlp.layers_or_reason(owner, training)
        if isinstance(layers, str):
            return layers
        reason = why_not_readable("fc1", layers.fc1) or why_not_readable("fc2", layers.fc2)
        if reason is None and self.norm == "pre" and self.mlp.drop is not None:
            drop, kind = child(owner, self.mlp.drop), self.mlp.drop_kind
            if kind is nn.Dropout:
                reason = why_not_left_out(self.mlp.drop, drop, training=training)
            else:
                expected = nn.Identity if class_of(drop) is nn.Identity else kind
                reason = why_not_absorbed(self.mlp.drop, drop, expected, kind.__name__)
        return layers if reason is None else reason

    def why_not_in_training(self, block: Any) -> str | None:
        """Return the result of :meth:`why_not` for a block in training mode, for the report."""
        return self.why_not(block, training=True)

    def run(self, block: Any, x: Tensor, attention: Attention | None = None, repeats: bool = False) -> Tensor | None:
        """Compute the block (v1) or its MLP half (v2), or return None if the block has to run as without halves.

        Args:
            block: the accelerated block.
            x: the block's input (v1) or the residual stream after attention (v2).
            attention: in v1, computes the attention branch of ``x`` before the drop path or, given True, adds x to it.
                Returns None if attention_half cannot compute it.
            repeats: True if the ops that ``attention`` runs depend only on the block and on the metadata of x, and no
                check of the block precedes this call, so that :func:`repeated` may be used.
        """
        if not torch.is_grad_enabled():
            if not joins(x):
                return None
            if not repeats:
                return self._inferred(block, x, attention)
            return repeated(block, self, x, lambda: self._inferred(block, x, attention))
        if not (block._swinkernels_recomputes and is_untraced((x,))):
            return None
        of_branch = linear_dtype(x)
        if self.norm == "post":
            of_branch = norm_dtype(x, of_branch)
        if torch.promote_types(x.dtype, of_branch) != x.dtype:
            return None
        dtype = None if autocast_dtype(x) else x.dtype
        layers = settled(block, self._weak_layers_or_reason, x.shape[-1], x.device, dtype)
        if isinstance(layers, str):
            return None
        found = self._recomputing(block, x, attention, of_branch)
        if found is None:
            return None
        x, options = found
        return self._mlp_half(block, x, layers.strong(), **options)

    def _mlp_half(self, block: Any, x: Tensor, layers: Layers, **options: Any) -> Tensor:
        norm, (fc1, fc2, gelu) = child(block, self.residual.norm), layers
        return mlp_half(
            x, *weight_and_bias(norm), *weight_and_bias(fc1), *weight_and_bias(fc2), eps=norm.eps, norm=self.norm,
            approximate=gelu, backend=backend_beside("residual_layer_norm", block._swinkernels_backend), **options,
        )  # fmt: skip

    def _weak_layers_or_reason(
        self, block: Any, channels: int, device: torch.device, dtype: torch.dtype | None
    ) -> WeakLayers | str:
        """Return the layers of the MLP, or the reason why mlp_half cannot replace the block's code.

        The inputs have ``channels``, are on ``device`` and have ``dtype``, which is None under autocast.
        """
        layers = self._layers_or_reason(block, None)
        if isinstance(layers, str):
            return layers
        fc1, fc2, _ = layers
        parameters = map(weight_and_bias, (child(block, self.residual.norm), fc1, fc2))
        if are_elsewhere(itertools.chain.from_iterable(parameters), device, dtype):
            return "a parameter has another dtype, or is on another device, than the input"
        if not (_follows(fc1, channels) and _follows(fc2, fc1.weight.shape[0], channels)):
            return "the layers do not fit the input"  # the library's own code raises its own error
        return layers.weak()

    def _recomputing(
        self, block: Any, x: Tensor, attention: Attention | None, of_branch: torch.dtype
    ) -> tuple[Tensor, dict[str, Any]] | None:
        """Return mlp_half's input and its arguments for branch and drop paths, or None if attention is not a half.

        Without ``attention``, ``of_branch`` is the dtype of the drop path's input.
        """
        branch = None
        if attention is not None:
            branch = attention(False)
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
            last = self.residual.scale(child(self.owner(block), self.mlp.drop), x, of_branch)
        return x, {"branch": branch, "branch_scale": scale, "drop_path_scale": last}

    def _inferred(self, block: Any, x: Tensor, attention: Attention | None) -> Tensor | None:
        """Compute the block (v1) or its MLP half (v2) in inference, for an input for which :func:`joins` is True.

        Return None if a drop path is active, or if attention_half or mlp_half cannot compute a half.
        """
        layers = settled(block, self._weak_layers_or_reason, x.shape[-1], x.device, x.dtype)
        if isinstance(layers, str) or not settled(block, self._drops_nothing):
            return None
        s = x if attention is None else attention(True)
        if s is None:
            return None
        norm, (fc1, fc2, gelu) = child(block, self.residual.norm), layers.strong()
        of_norm, of_layers = weight_and_bias(norm), (weight_and_bias(fc1), weight_and_bias(fc2))
        backend = backend_beside("residual_layer_norm", block._swinkernels_backend)
        if kept(block, lambda: (self, *metadata(s)), lambda: _mlp_fits_op(s, of_norm, *of_layers, backend)):
            norm_of_op = Norm(*of_norm, norm.eps, self.norm)
            return mlp(s, *of_layers, gelu=gelu, residual=s, norm=norm_of_op, on_kernels=True)
        return self._mlp_half(block, s, layers.strong())

    def _drops_nothing(self, block: Any) -> bool:
        drops = [(block, self.residual.drop_path, self.residual.kind)]
        if self.norm == "pre":
            drops.append((self.owner(block), self.mlp.drop, self.mlp.drop_kind))
        return all(_drops_nothing(*drop) for drop in drops)


def _follows(layer: Any, into: int, out: int | None = None) -> bool:
    """Return True if a Linear layer has ``into`` input channels and, unless it is None, ``out`` output channels."""
    rows, columns = layer.weight.shape if layer.weight.dim() == 2 else (-1, -1)
    return columns == into and out in (None, rows) and (layer.bias is None or layer.bias.shape == (rows,))


def _drops_nothing(owner: Any, name: str | None, kind: type[nn.Module]) -> bool:
    return name is None or drops_nothing(name, child(owner, name), kind)


def add_normed_attention(
    block: Any,
    x: Tensor,
    residual: Residual,
    why_not: Callable[[Any], str | None],
    branch: Callable[[], Tensor | None],
) -> Tensor | None:
    """Return x + norm(attention(x)), the first half of a v2 block, or None if it cannot be one op.

    Args:
        block: the accelerated block.
        x: its input.
        residual: its first residual connection.
        why_not: returns the reason why attention_half cannot replace the block's attention, or None.
        branch: calls :func:`attention_branch` with ``place="post"`` and returns its result in the shape of x.
    """
    if not joins(x) or settled(block, residual.why_not) is not None or settled(block, why_not) is not None:
        return None
    return branch() if _drops_nothing(block, residual.drop_path, residual.kind) else None


def _mlp_fits_op(x: Tensor, norm: Layer, fc1: Layer, fc2: Layer, backend: str) -> bool:
    """Return True if mlp_half would compute its result for these parameters with one op.

    The shapes of the parameters fit, and the result depends only on metadata if :func:`joins` returned True.
    """
    tensors = (x, *norm, *fc1, *fc2)
    if backend != "auto" or not is_large(x, fc1[0]):
        return False
    return fit_kernels(x, tensors) and run_on_kernels(x, (fc1[0], fc2[0]), tensors)


# Returns the norm, the Linear layers of q, k and v (one for all or one for each) and the last Linear layer of a block's
# attention half.
AttentionLayers = Callable[[Any], tuple[Any, Sequence[Any], Any]]


def attention_branch(
    block: Any,
    x: Tensor,
    layers: AttentionLayers,
    backend: str,
    arguments: dict[str, Any],
    residual: bool = False,
    place: str = "pre",
) -> Tensor | None:
    """Return the output of a block's attention branch, computed by attention_half, plus x if ``residual``.

    Return None if the layers do not fit or if the device or, outside autocast, the dtype of a parameter differs from
    that of ``x``.

    Args:
        block: the accelerated block.
        x: (B, *S, C), the block's input.
        layers: finds the layers of the attention half.
        backend: the backend of the attention.
        arguments: the keyword arguments of window_attention_qkvpacked.
        residual: as described above.
        place: "pre" if the norm precedes QKV, "post" if it follows the projection.
    """
    dtype = None if autocast_dtype(x) else x.dtype
    if settled(block, _why_not_attention_half, layers, x.shape[-1], x.device, dtype) is not None:
        return None
    norm, qkv, proj = layers(block)
    weights = tuple(weight_and_bias(layer)[0] for layer in qkv)
    of_norm, of_proj, bias = weight_and_bias(norm), weight_and_bias(proj), arguments.pop("pad_qkv")
    tables = tables_of(arguments.get("bias_table"), arguments)

    def key() -> Any:
        if torch.is_grad_enabled() or not joins(x):
            return None
        rest = tuple(item for item in arguments.items() if item[0] not in TABLES)
        of_call = call_key((x, *tables), (place, residual, backend, rest))
        return None if of_call is None else (layers, of_call)

    def call() -> KernelCall | None:
        rest = dict(arguments)
        found = decide(
            x, *of_norm, weights, bias, *of_proj, rest.pop("bias_table", None), num_heads=rest.pop("num_heads"),
            window_size=rest.pop("window_size"), eps=norm.eps, norm=place, residual=residual, drop_path_scale=None,
            layer_scale=None, backend=backend, attention=rest,
        )  # fmt: skip
        tensors = (x, *of_norm, *weights, bias, *of_proj, *tables)
        return found.call if found.fit and run_on_kernels(x, (*weights, of_proj[0]), tensors) else None

    found = kept(block, key, call)
    if found is not None:
        return fused_attention_half(x, weights, bias, of_proj, of_norm, tables, found)
    return attention_half(
        x, *of_norm, weights[0] if len(weights) == 1 else weights, bias, *of_proj, eps=norm.eps, norm=place,
        residual=residual, backend=backend, **arguments,
    )  # fmt: skip


def _why_not_attention_half(
    block: Any, layers: AttentionLayers, channels: int, device: torch.device, dtype: torch.dtype | None
) -> str | None:
    """Return the reason why attention_half cannot replace the layers, or None.

    The inputs have ``channels``, are on ``device`` and have ``dtype``, which is None under autocast.
    """
    norm, qkv, proj = layers(block)
    if are_elsewhere(itertools.chain.from_iterable(map(weight_and_bias, (norm, *qkv, proj))), device, dtype):
        return "a parameter has another dtype, or is on another device, than the input"
    width = sum(layer.weight.shape[0] for layer in qkv) // 3
    if not (all(_follows(layer, channels) for layer in qkv) and _follows(proj, width, channels)):
        return "the layers do not fit the input"  # the library's own code raises its own error
    return None
