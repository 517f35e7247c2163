"""Computes the bias table of v2's continuous position bias on a CPU: 16 sigmoid(fc2(relu(fc1(offsets)))).

torch computes this small table with five functions, whose calls take far longer than the arithmetic. In inference the
op ``fused_position_bias`` of ``torch.ops.swinkernels`` (csrc/kernels/cpu/position_bias.inl) takes their place. It has
no derivative.
"""

from __future__ import annotations

from torch import Tensor

from swinkernels.ops._fused_linear import Layer, fit_kernels, joins, run, run_on_kernels
from swinkernels.ops._library import define, register_without_derivative

define("fused_position_bias(Tensor offsets, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight) -> Tensor")


def _fake(offsets, fc1_weight, fc1_bias, fc2_weight):
    return offsets.new_empty((offsets.shape[:-1].numel(), fc2_weight.shape[0])).float()


_OP = register_without_derivative("fused_position_bias", _fake, "torch's functions")


def fits_op(offsets: Tensor, fc1: Layer, fc2: Layer) -> bool:
    """Return True if :func:`position_bias` can compute the table, instead of torch's functions.

    If :func:`joins` returns True for ``offsets``, the result depends only on the metadata of the tensors.
    """
    tensors = (offsets, *fc1, *fc2)
    if not (joins(offsets) and fc2[1] is None and fit_kernels(offsets, tensors)):
        return False
    return _fits(offsets, *fc1, fc2[0]) and run_on_kernels(offsets, (fc1[0], fc2[0]), tensors)


def position_bias(offsets: Tensor, fc1: Layer, fc2: Layer) -> Tensor:
    """Return the table (prod(2 * window - 1), num_heads), in float32, if :func:`fits_op` returned True.

    Args:
        offsets: (..., axes), the logarithmically spaced offsets, one row for each row of the table.
        fc1, fc2: the weights (hidden, axes) and (num_heads, hidden) of the MLP, with their biases; fc2 has none.
    """
    return run(_OP, offsets, *fc1, fc2[0])


def _fits(offsets: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> bool:
    return (
        fc1_weight.dim() == fc2_weight.dim() == 2
        and offsets.shape[-1:] == fc1_weight.shape[1:]
        and fc1_weight.shape[0] == fc2_weight.shape[1]
        and (fc1_bias is None or fc1_bias.shape == fc1_weight.shape[:1])
    )
