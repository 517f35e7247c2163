"""Describes the parts of a module that ops can compute, for the report."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops import window_attention, window_attention_qkvpacked
from swinkernels.ops.window_attention import spec_of, window_attention_reasons


@dataclass(frozen=True)
class Part:
    """Describes a part of a module that one op can compute.

    The functions accept a module of the adapter's original or accelerated class.
    """

    name: str
    # The op's name, as in the backends' lists of ops.
    op: str
    # Returns the reason why the library's own code currently computes this part with every backend, or None.
    reason_to_fall_back: Callable[[Any], str | None]
    # (module, backend, training) -> the reasons why the backend cannot run the op in the module's dtype on its device.
    reasons: Callable[[Any, str, bool], list[str]]


def op_on(backend: str) -> Callable[..., Tensor]:
    """Return a function of (qkv, **arguments) or (q, k, v, **arguments) that calls window attention on ``backend``."""

    def attend(*maps: Tensor, **arguments: Any) -> Tensor:
        op = window_attention_qkvpacked if len(maps) == 1 else window_attention
        return op(*maps, **arguments, backend=backend)

    return attend


def window_attention_part(
    weight: Callable[[Any], Tensor],
    map_size: Callable[[Any], tuple[int, ...]],
    arguments: Callable[[Any], dict[str, Any]],
    dropout_p: Callable[[Any], float],
    reason_to_fall_back: Callable[[Any], str | None],
) -> Part:
    """Create the part that describes attention computed by window_attention_qkvpacked.

    Args:
        weight: returns the QKV weight, (3C, channels of the input).
        map_size: returns the size of a map for the module, in tokens per axis.
        arguments: returns the op's arguments for heads, windows and mask; tensors may be omitted.
        dropout_p: returns the probability of attention dropout in training.
        reason_to_fall_back: as in :class:`Part`.
    """

    def reasons(module: Any, backend: str, training: bool) -> list[str]:
        qkv_weight = weight(module)
        p = dropout_p(module) if training else 0.0
        size, given = map_size(module), arguments(module)
        head_dim = qkv_weight.shape[0] // (3 * given["num_heads"])
        # torch.empty instead of new_empty, because the weight may be of any tensor subclass.
        no_tokens = torch.empty(0, dtype=qkv_weight.dtype, device=qkv_weight.device)
        try:
            spec = spec_of("accelerate", no_tokens, size, head_dim, **given, dropout_p=p)
        except ValueError as error:  # no backend accepts the arguments, for example a window of too many tokens
            return [str(error)]
        return window_attention_reasons(backend, spec, head_dim, qkv_weight.dtype, qkv_weight.device)

    return Part("attention", "window_attention", reason_to_fall_back, reasons)


def norm_part(
    name: str,
    op: str,
    weight: Callable[[Any], Tensor],
    reasons_of_op: Callable[..., list[str]],
    arguments: Callable[[Any], tuple],
    reason_to_fall_back: Callable[[Any], str | None],
) -> Part:
    """Create the part that describes an op with a norm.

    Args:
        name: the part's name.
        op: as in :class:`Part`.
        weight: returns a tensor with the module's dtype and device.
        reasons_of_op: (backend, *arguments, dtypes, device) -> the reasons why the backend cannot run the op.
        arguments: returns the arguments of ``reasons_of_op`` other than dtypes and device.
        reason_to_fall_back: as in :class:`Part`.
    """

    def reasons(module: Any, backend: str, training: bool) -> list[str]:
        w = weight(module)
        return reasons_of_op(backend, *arguments(module), (w.dtype, w.dtype), w.device)

    return Part(name, op, reason_to_fall_back, reasons)
