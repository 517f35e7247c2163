"""The parts of a module's work that ops can take over, as the report sees them."""

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
    """The work of a module that one op can do. The functions take a module of either class of an adapter."""

    name: str
    # The op, by its name in the lists of the backends.
    op: str
    # The reason why the library's own code runs it at present, on any backend, or None.
    reason_to_fall_back: Callable[[Any], str | None]
    # The reasons why a backend cannot run it in the module's dtype and on its device; the bool is True for training.
    reasons: Callable[[Any, str, bool], list[str]]


def op_on(backend: str) -> Callable[..., Tensor]:
    """Make one function of both window attention ops on a backend: (qkv, **arguments) or (q, k, v, **arguments)."""

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
    """Describe attention by window_attention_qkvpacked.

    Args:
        weight: returns the QKV weight, (3C, channels of the input).
        map_size: returns the tokens per axis of the map that the module was made for.
        arguments: returns the op's arguments that define the windows, without tensors: a report computes no bias.
        dropout_p: returns the probability of attention dropout in training.
        reason_to_fall_back: as in :class:`Part`.
    """

    def reasons(module: Any, backend: str, training: bool) -> list[str]:
        qkv_weight = weight(module)
        p = dropout_p(module) if training else 0.0
        size, given = map_size(module), arguments(module)
        head_dim = qkv_weight.shape[0] // (3 * given["num_heads"])
        no_tokens = torch.empty(0, dtype=qkv_weight.dtype, device=qkv_weight.device)  # the weight may be of any class
        try:
            spec = spec_of("accelerate", no_tokens, size, head_dim, **given, dropout_p=p)
        except ValueError as error:  # refused by every backend, for example a window of too many tokens
            return [str(error)]
        return window_attention_reasons(backend, spec, qkv_weight.dtype, qkv_weight.device)

    return Part("attention", "window_attention", reason_to_fall_back, reasons)


def norm_part(
    name: str,
    op: str,
    weight: Callable[[Any], Tensor],
    reasons_of_op: Callable[..., list[str]],
    arguments: Callable[[Any], tuple],
    reason_to_fall_back: Callable[[Any], str | None],
) -> Part:
    """Describe an op with a norm in it.

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
