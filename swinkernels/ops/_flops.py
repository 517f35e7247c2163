"""Counts the FLOPs of the ops for ``torch.utils.flop_counter.FlopCounterMode``.

Window attention has two matrix products forward and four backward, each of 2 * M * head_dim FLOPs per query with M
keys. This equals the count for the libraries' plain code. Decomposed relative positions add products with one table per
axis. Scores that a backward kernel recomputes are not counted. Pad tokens are counted. ``mlp_half_triton``,
``fused_linear``, ``fused_patch_linear``, ``fused_mlp`` and ``fused_position_bias`` count the products of their Linear
layers, and ``fused_attention_half`` those of its Linear layers and of the attention. The other ops multiply no matrices
and count zero, as torch's own copies and norms do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

from swinkernels._at_import import at_import
from swinkernels._extension import ops
from swinkernels.ops._arguments import frame_size
from swinkernels.window_spec import WindowSpec

_COUNTER = "torch.utils.flop_counter"
_WITHOUT_PRODUCTS = (
    "window_partition", "window_reverse", "patch_merging_norm_fwd", "patch_merging_norm_bwd", "layer_norm_fwd",
    "layer_norm_bwd", "residual_layer_norm_fwd", "residual_layer_norm_bwd", "residual_post_norm_fwd",
    "residual_post_norm_bwd",
)  # fmt: skip
_WITH_TRITON = ("window_attention", "window_partition", "window_reverse", "patch_merging")


def _attention(products: int, first_map: int, axes: int) -> Callable[..., int]:
    """Return the FLOP formula of an attention op.

    Args:
        products: matrix products per window.
        first_map: index of the op's argument that is qkv or q.
        axes: number of axes of that map after its token axes.
    """

    def flops(*arguments: Any, **_: Any) -> int:
        batch, *size, num_heads, head_dim = arguments[first_map]
        spec = WindowSpec.parse(next(a for a in arguments if isinstance(a, str)), 1.0, 0.0, 0.0)
        tokens = batch * math.prod(frame_size(size[: len(size) + 2 - axes], spec.window_size))
        of_axes = sum(spec.window_size) if spec.axis_tables else 0  # one product with the tables forward, two backward
        return 2 * tokens * num_heads * head_dim * (products * spec.key_volume + products // 2 * of_axes)

    return flops


def _zero(*_: Any, **__: Any) -> int:
    return 0


def _linear_layers(*weights: int) -> Callable[..., int]:
    """Return the FLOP formula of an op with Linear layers, given the indices of their weights in its arguments."""

    def flops(*arguments: Any, **_: Any) -> int:
        return 2 * math.prod(arguments[0][:-1]) * sum(math.prod(arguments[i]) for i in weights)

    return flops


def _patch_linear(x: Any, weight: Any, *others: Any, **_: Any) -> int:
    factor, channels_first = others[3], others[5]
    size = x[2:] if channels_first else x[1:-1]
    rows = math.prod(-(-s // f) for s, f in zip(size, factor[-len(size) :], strict=True))
    return 2 * x[0] * rows * math.prod(weight)


def _attention_half(x: Any, q: Any, k: Any, v: Any, qkv_bias: Any, proj: Any, *others: Any, **_: Any) -> int:
    layers = [weight for weight in (q, k, v, proj) if weight is not None]
    linear = _linear_layers(*range(1, 1 + len(layers)))(x, *layers)
    wire = next(a for a in others if isinstance(a, str))
    return linear + _attention(2, 0, 2)((*x[:-1], 1, proj[1]), wire)  # the heads make no difference


FORMULAS: dict[str, Callable[..., int]] = dict.fromkeys(_WITHOUT_PRODUCTS, _zero)
for _form, _axes in (("window_attention_qkvpacked", 3), ("window_attention", 2)):
    FORMULAS[f"{_form}_fwd"] = _attention(2, 0, _axes)
    FORMULAS[f"{_form}_bwd"] = _attention(4, 1, _axes)
FORMULAS["mlp_half_triton"] = _linear_layers(4, 6)
FORMULAS["fused_linear"] = _linear_layers(1)
FORMULAS["fused_mlp"] = _linear_layers(1, 3)
FORMULAS["fused_patch_linear"] = _patch_linear
FORMULAS["fused_attention_half"] = _attention_half
FORMULAS["fused_position_bias"] = _linear_layers(1, 3)
FORMULAS |= {f"{name}_triton": f for name, f in FORMULAS.items() if name.startswith(_WITH_TRITON)}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(ops, name))(formula)


at_import(_COUNTER, _register)
