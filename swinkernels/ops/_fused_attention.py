"""Defines the op ``fused_attention_half`` of ``torch.ops.swinkernels``, for inference on a CPU.

The op is the attention half of a block: norm, QKV, attention, projection and residual connection. It has no derivative.
It passes over the windows once (csrc/kernels/cpu/attention_half.inl), so that no map between x and the result is ever
written, or it runs one layer after the other (csrc/kernels/cpu/linear.cpp), if there are few windows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swinkernels.ops._arguments import frame_size
from swinkernels.ops._fused_linear import Layer, Norm
from swinkernels.ops._library import define, register
from swinkernels.window_spec import WindowSpec

# Without k_weight and v_weight, q_weight has the rows of all three. The tables are float32 except region_map (int32).
# norm is "", "pre" or "post".
define(
    "fused_attention_half(Tensor x, Tensor q_weight, Tensor? k_weight, Tensor? v_weight, Tensor? qkv_bias, "
    "Tensor proj_weight, Tensor? proj_bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? bias_table, Tensor? bias, "
    "Tensor? logit_scale, Tensor? region_map, str spec, float scale, float mask_value, int num_heads, bool residual, "
    "str norm, float eps, bool by_layers) -> Tensor"
)


def _fake(x, *_):
    return x.new_empty(x.shape)


def _refuse(*_):
    raise NotImplementedError(
        "fused_attention_half has no derivative: call it under torch.no_grad(), or use swinkernels.attention_half"
    )


_OP = register("fused_attention_half", _fake, lambda ctx, tensors, others, output: None, _refuse)

# In a single pass, a task is a group of up to 200 rows, and it reads all weights. Layers read the weights less often if
# there are too few windows for full groups on all threads, or so many channels that a group has few rows. The maps
# between the layers of many windows, however, are too large to be kept for the next call.
_WINDOWS_PER_THREAD, _MOST_CHANNELS = 4, 768


def takes(spec: WindowSpec) -> bool:
    """Return True if the op computes window attention with this spec."""
    return spec.key_window == spec.window_size and not spec.axis_tables and spec.dropout_p == 0.0


def attention_half(
    x: Tensor,
    qkv: tuple[Tensor, ...],
    qkv_bias: Tensor | None,
    proj: Layer,
    norm: Norm,
    tables: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    spec: WindowSpec,
    num_heads: int,
    residual: bool,
) -> Tensor | None:
    """Run the op, or return None if separate ops are faster.

    ``tables`` are bias_table, bias, logit_scale and region_map; the other arguments are those of the public function,
    which has checked them. :func:`takes` and run_on_kernels must have returned True.
    """
    windows = x.shape[0] * math.prod(frame_size(x.shape[1:-1], spec.window_size)) // spec.volume
    by_layers = windows < _WINDOWS_PER_THREAD * torch.get_num_threads()
    if x.shape[-1] > _MOST_CHANNELS and not by_layers:
        return None
    *floats, region_map = tables
    if region_map is not None and region_map.dtype != torch.int32:
        return None
    if x.dtype == torch.bfloat16 and proj[0].shape[1] // num_heads % 2 == 1:  # the kernels multiply channels in pairs
        return None
    bias_table, bias, logit_scale = (t if t is None else t.float() for t in floats)
    with torch._C._AutoDispatchBelowAutograd():
        return _OP.overload(
            x, *(*qkv, None, None)[:3], qkv_bias, *proj, norm.weight, norm.bias, bias_table, bias, logit_scale,
            region_map,
            spec.wire(needs_lse=False), spec.scale, spec.mask_value, num_heads, residual, norm.place, norm.eps,
            by_layers,
        )  # fmt: skip
