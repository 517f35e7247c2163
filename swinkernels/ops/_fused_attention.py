"""Defines the op ``fused_attention_half`` of ``torch.ops.swinkernels``, for inference on a CPU.

The op is the attention half of a block: norm, QKV, attention, projection and residual connection. It has no derivative.
It passes over the windows once (csrc/kernels/cpu/attention_half.inl), so that no map between x and the result is ever
written, or, if that is faster, it runs one layer after the other (csrc/kernels/cpu/linear.cpp).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from swinkernels.ops._fused_linear import Layer, run
from swinkernels.ops._library import define, register_without_derivative
from swinkernels.window_spec import WindowSpec

# Without k_weight and v_weight, q_weight has the rows of all three. bias is float32, bias_table and logit_scale are
# float32 or bfloat16, and region_map is int32.
# norm is "", "pre" or "post". If by_layers is true, attention begins when QKV has been computed for all rows (or for
# those of many images), and so on; if it is None, the op chooses the faster way.
define(
    "fused_attention_half(Tensor x, Tensor q_weight, Tensor? k_weight, Tensor? v_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? bias_table, Tensor? bias, "
    "Tensor? logit_scale, Tensor? region_map, str spec, float scale, float mask_value, int num_heads, bool residual, "
    "str norm, float eps, bool? by_layers) -> Tensor"
)


def _fake(x, *_):
    return x.new_empty(x.shape)


# bias_table, bias, logit_scale and region_map, as in window attention
Tables = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]

_OP = register_without_derivative("fused_attention_half", _fake, "swinkernels.attention_half")


class KernelCall(NamedTuple):
    """The arguments of the op that are not tensors, except the last one."""

    spec: str
    scale: float
    mask_value: float
    num_heads: int
    residual: bool
    norm: str
    eps: float


def kernel_call(
    x: Tensor, head_dim: int, tables: Tables, spec: WindowSpec, num_heads: int, residual: bool, norm: str, eps: float
) -> KernelCall | None:
    """Return the op's arguments for window attention with this spec, or None if the op does not compute it.

    The result depends only on the metadata of ``x`` and ``tables``.
    """
    *_, logit_scale, region_map = tables
    if spec.key_window != spec.window_size or spec.axis_tables or spec.dropout_p != 0.0:
        return None
    if region_map is not None and region_map.dtype != torch.int32:
        return None
    # In bfloat16 the kernels of some CPUs multiply channels in pairs. They round q and k of unit length, and with few
    # channels these errors do not average out.
    if x.dtype == torch.bfloat16 and (head_dim % 2 == 1 or (logit_scale is not None and head_dim < 16)):
        return None
    return KernelCall(spec.wire(needs_lse=False), spec.scale, spec.mask_value, num_heads, residual, norm, eps)


def attention_half(
    x: Tensor,
    qkv: tuple[Tensor, ...],
    qkv_bias: Tensor | None,
    proj: Layer,
    norm: tuple[Tensor | None, Tensor | None],
    tables: Tables,
    call: KernelCall,
) -> Tensor:
    """Run the op. ``norm`` is the weight and the bias of the norm, and run_on_kernels must have returned True."""
    bias_table, bias, logit_scale, region_map = tables
    if bias is not None:
        bias = bias.float()
    read = _as_read(bias_table), bias, _as_read(logit_scale), region_map
    return run(_OP, x, *(*qkv, None, None)[:3], qkv_bias, *proj, *norm, *read, *call, None)


def _as_read(table: Tensor | None) -> Tensor | None:
    """Return a table in a dtype that the op reads."""
    return table if table is None or table.dtype in (torch.float32, torch.bfloat16) else table.float()
