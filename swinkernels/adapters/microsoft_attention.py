"""Reads the parameters and calls the layers of window attention modules in Microsoft's form, v1 or v2.

Several libraries copied these modules. The functions compute q, k and v, the projection, and the sum of the projection
and the residual stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import BACKEND_ATTRIBUTE
from swinkernels.adapters.bypass import child, class_of, weight_and_bias, why_not_absorbed
from swinkernels.adapters.checks import settled
from swinkernels.adapters.linear_layers import Drop, add_linear, call_linear, why_not_left_out, why_not_readable
from swinkernels.ops._fused_linear import joins, linear
from swinkernels.ops._position_bias import fits_op
from swinkernels.ops._position_bias import position_bias as fused_position_bias


def resembles_attention(attn: nn.Module | None) -> bool:
    """Return True if ``attn`` has the attributes of a window attention module in Microsoft's form, v1 or v2."""
    if attn is None or isinstance(attn, torch.jit.ScriptModule):
        return False
    has_bias = hasattr(attn, "logit_scale" if is_cosine(attn) else "relative_position_bias_table")
    return has_bias and all(name in attn._modules for name in ("qkv", "proj")) and hasattr(attn, "num_heads")


def is_cosine(attn: nn.Module) -> bool:
    """Return True if ``attn`` has the form of v2, that is, if it has a module ``cpb_mlp``.

    Parameters are not tested, because replicas and flattened or parametrised modules may store them elsewhere.
    """
    return "cpb_mlp" in attn._modules


def qkv_bias(attn: Any) -> Tensor | None:
    if attn.qkv.bias is not None or getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])


def qkv_of(attn: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    qkv = child(attn, "qkv")
    return call_linear("attn.qkv", qkv, x) if bias is qkv.bias else linear(x, qkv.weight, bias)


def bias_table(module: Any, *path: str) -> Tensor:
    """Return the bias table, (prod(2 * window - 1), num_heads), of the attention module at ``path`` in ``module``.

    ``module`` is the module that is being called, for :func:`settled`.
    """
    attn = _inner(module, path)
    return position_bias(module, *path, "cpb_mlp") if is_cosine(attn) else attn.relative_position_bias_table


def position_bias(module: Any, *path: str) -> Tensor:
    """Return the bias table of v2, 16 sigmoid(MLP(offsets)), computed by one op if possible.

    Args:
        module: the module that is being called.
        path: the path of the MLP in ``module``. The parent of the MLP stores the offsets.
    """
    mlp = _inner(module, path)
    offsets = _inner(module, path[:-1]).relative_coords_table
    on_kernels = getattr(module, BACKEND_ATTRIBUTE, "auto") in ("auto", "cpu")
    if on_kernels and joins(offsets) and settled(module, _table_fits_op, *path):
        fc1, _, fc2 = mlp._modules.values()
        return fused_position_bias(offsets, weight_and_bias(fc1), weight_and_bias(fc2))
    table = mlp(offsets)
    return 16 * torch.sigmoid(table.reshape(-1, table.shape[-1]))


def _table_fits_op(module: Any, *path: str) -> bool:
    """Return True if one op can compute the position bias, whose MLP is at ``path``, without calling its modules."""
    mlp = _inner(module, path)
    if why_not_absorbed("the MLP", mlp, nn.Sequential, "an nn.Sequential") is not None:
        return False
    if [class_of(layer) for layer in mlp._modules.values()] != [nn.Linear, nn.ReLU, nn.Linear]:
        return False
    fc1, relu, fc2 = mlp._modules.values()
    reason = why_not_readable("fc1", fc1) or why_not_readable("fc2", fc2)
    if reason is not None or why_not_absorbed("the ReLU", relu, nn.ReLU, "an nn.ReLU") is not None:
        return False
    return fits_op(_inner(module, path[:-1]).relative_coords_table, weight_and_bias(fc1), weight_and_bias(fc2))


def _inner(module: Any, path: Sequence[str]) -> Any:
    for name in path:
        module = child(module, name)
    return module


def score_factor(attn: Any) -> dict[str, Any]:
    """Return the op's argument that scales the scores: logit_scale in v2, scale in v1."""
    return {"logit_scale": attn.logit_scale} if is_cosine(attn) else {"scale": getattr(attn, "scale", None)}


def dropout_p(attn: Any) -> float:
    return getattr(attn._modules.get("attn_drop"), "p", 0.0)


def dropout_at_call(attn: Any) -> float:
    drop = attn._modules.get("attn_drop")
    return dropout_p(attn) if drop is not None and drop.training else 0.0


def attention_layers(block: Any) -> tuple[Any, Sequence[Any], Any]:
    """Return the layers of a block's attention half: norm1, the QKV layer (in a sequence) and the projection."""
    attn = child(block, "attn")
    return child(block, "norm1"), (child(attn, "qkv"),), child(attn, "proj")


def why_layers_are_called(attn: Any, training: bool | None, name: str = "attn") -> str | None:
    """Return the reason why attention_half may not read the parameters of qkv and proj, or None.

    Args:
        attn: the attention module.
        training: replaces the mode of the dropout after proj unless it is None.
        name: the path of ``attn`` in the block, for the reason.
    """
    reason = why_not_readable(f"{name}.qkv", child(attn, "qkv"))
    reason = reason or why_not_readable(f"{name}.proj", child(attn, "proj"))
    if reason is not None or "proj_drop" not in attn._modules:
        return reason
    return why_not_left_out(f"{name}.proj_drop", child(attn, "proj_drop"), training=training)


def projected(attn: Any, out: Tensor) -> Tensor:
    drop = attn._modules.get("proj_drop")
    out = call_linear("attn.proj", child(attn, "proj"), out)
    return out if drop is None else drop(out)


def add_projected(attn: Any, out: Tensor, x: Tensor, *drops: Drop) -> Tensor | None:
    """Return x + drop(projected(out)), computed in one pass, or None if that is not possible."""
    if "proj_drop" in attn._modules:
        drops = ("attn.proj_drop", child(attn, "proj_drop"), nn.Dropout), *drops
    return add_linear("attn.proj", child(attn, "proj"), out, x, drops)
