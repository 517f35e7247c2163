"""The parts of a module's work that ops can take over: what a report has to know of each."""

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
    """What one op of this package can do of a module's work; a module is of one of an adapter's two classes."""

    name: str
    # The op, as the backends list it.
    op: str
    # Why the library's own code runs it at present, whatever the backend, or None.
    reason_to_fall_back: Callable[[Any], str | None]
    # Why a backend cannot run it in the module's own dtype and on its device; the bool is for training.
    reasons: Callable[[Any, str, bool], list[str]]


def op_on(backend: str) -> Callable[..., Tensor]:
    """The two window attention ops on a backend: for (qkv, **arguments) and for (q, k, v, **arguments)."""

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
    """Attention by window_attention_qkvpacked.

    Args:
        weight: the QKV weight, (3C, channels of the input).
        map_size: the tokens of the map that the module was made for, per axis.
        arguments: those of the op that say where the windows are. No tensors: a report makes none of parameters.
        dropout_p: the probability of attention dropout in training.
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
        except ValueError as error:  # the op refuses the call on every backend, such as a window of too many tokens
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
    """An op with a norm in it.

    Args:
        name: of the part.
        op: as in :class:`Part`.
        weight: one with the module's dtype and device.
        reasons_of_op: (backend, *arguments, dtypes, device) -> why the backend cannot run the op.
        arguments: what the op's reasons depend on beside dtypes and device.
        reason_to_fall_back: as in :class:`Part`.
    """

    def reasons(module: Any, backend: str, training: bool) -> list[str]:
        w = weight(module)
        return reasons_of_op(backend, *arguments(module), (w.dtype, w.dtype), w.device)

    return Part(name, op, reason_to_fall_back, reasons)
