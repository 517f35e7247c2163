"""Code shared by the adapters of all Swin families."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import GELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swinkernels.adapters.adapter import Accelerated, Adapter, original_class
from swinkernels.adapters.bypass import (
    child,
    replaced_forward,
    replaced_method,
    watch,
    why_not_absorbed,
    why_not_dropout,
    why_not_linear,
    why_not_norm,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, add_normed_attention, attention_branch
from swinkernels.adapters.linear_layers import Mlp, call_linear, know_gelu, why_not_left_out, why_not_readable
from swinkernels.adapters.masks import is_window_index
from swinkernels.adapters.microsoft_attention import position_bias
from swinkernels.adapters.norms import Merging, Residual, floored_drop_path_scale, norm_for_linear
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention
from swinkernels.ops._arguments import why_beyond_limits

NAME = "transformers"

know_gelu(GELUActivation, lambda act: "none" if act.act is torch.nn.functional.gelu else None)

# Attention has one of two structures. In Swin, one module contains all four projections; in the other families, the
# module "self" contains the projections of q, k and v, and the module "output" contains the output projection.


def _projections(layer: Any) -> dict[str, Any]:
    """Return the query, key, value and output projections of the layer's attention, keyed by path."""
    attention = child(layer, "attention")
    if "self" not in attention._modules:
        return {f"attention.{name}": child(attention, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    of_self = child(attention, "self")
    found = {f"attention.self.{name}": child(of_self, name) for name in ("query", "key", "value")}
    return {**found, "attention.output.dense": child(child(attention, "output"), "dense")}


def _position_bias_path(layer: Any) -> tuple[str, str]:
    attention = child(layer, "attention")
    return "attention", "self" if "self" in attention._modules else "relative_position_bias"


def _position_bias(layer: Any) -> Any:
    """Return the module that stores the window, the index into the bias table and the parameters of the bias."""
    attention, of_bias = _position_bias_path(layer)
    return child(child(layer, attention), of_bias)


def _num_heads(layer: Any) -> int:
    attention = child(layer, "attention")
    return (child(attention, "self") if "self" in attention._modules else attention).num_attention_heads


def _head_dim(layer: Any) -> int:
    attention = child(layer, "attention")
    return child(attention, "self").attention_head_size if "self" in attention._modules else attention.head_dim


def _index(layer: Any) -> Tensor | None:
    return _position_bias(layer)._buffers.get("relative_position_index")


def _dropouts(layer: Any) -> dict[str, Any]:
    """Return, keyed by path, the dropout modules of the attention weights (if there is one) and of the output."""
    attention = child(layer, "attention")
    if "self" not in attention._modules:
        return {"dropout": child(layer, "dropout")}
    return {
        "attention.self.dropout": child(child(attention, "self"), "dropout"),
        "attention.output.dropout": child(child(attention, "output"), "dropout"),
    }


def _is_sdpa(attention: Any) -> bool:
    """Return True if Swin's config selects "sdpa" and this name still refers to transformers' own function."""
    return attention.config._attn_implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is sdpa_attention_forward


def _dropout_p(layer: Any) -> float:
    """Return the dropout probability of attention weights in training."""
    attention = child(layer, "attention")
    if "self" not in attention._modules:
        return attention.attention_dropout
    return getattr(child(child(attention, "self"), "dropout"), "p", 0.0)


def _dropout_at_call(layer: Any) -> float:
    attention = child(layer, "attention")
    active = child(child(attention, "self"), "dropout") if "self" in attention._modules else attention
    return _dropout_p(layer) if active.training else 0.0


def _why_not_inside(layer: Any) -> str | None:
    """Return the reason why a layer's attention does not consist of the modules that the op replaces, or None."""
    attention = child(layer, "attention")
    for path, kind in _INSIDE[original_class(layer)]:
        module = attention if path == "attention" else child(attention, path.partition(".")[2])
        reason = why_not_absorbed(path, module, kind, f"transformers' {kind.__name__}")
        if reason is not None:
            return reason
    return None


def _why_not_attention(layer: Any) -> str | None:
    """Return the reason why transformers' own code currently has to run a layer's attention, or None."""
    return _why_not_modules(layer) or _why_not_sdpa(layer)


def _why_not_sdpa(layer: Any) -> str | None:
    """Return the reason why transformers computes attention with other code than sdpa, or None."""
    attention = child(layer, "attention")
    if "self" not in attention._modules and not _is_sdpa(attention):
        return f"attention weights are requested by attn_implementation={attention.config._attn_implementation!r}"
    return None


def _why_not_modules(layer: Any) -> str | None:
    """Return the reason in the layer's modules why transformers' own code has to run the layer's attention, or None."""
    reason = replaced_method(layer, original_class(layer)) or _why_not_inside(layer)
    if reason is not None:
        return reason
    attention = child(layer, "attention")
    for path, linear in _projections(layer).items():
        reason = why_not_linear(path, linear)  # any other class may mix tokens or treat pad tokens differently
        if reason is not None:
            return reason
    for path, dropout in _dropouts(layer).items():
        reason = why_not_dropout(path, dropout)
        if reason is not None:
            return reason
    if "self" not in attention._modules and not isinstance(attention.scaling, float):
        return f"attention.scaling is a {type(attention.scaling).__name__}, not a float"
    window = layer.window_size
    of_bias = _position_bias(layer)
    heads, head_dim = _num_heads(layer), _head_dim(layer)
    inner = attention._modules.get("self", attention)
    sizes = _out(layer).weight.shape[1], getattr(inner, "all_head_size", heads * head_dim)
    if sizes != (heads * head_dim, heads * head_dim):
        return "num_attention_heads and the head size do not match the projections"
    reason = why_beyond_limits(head_dim, (window, window))
    if reason is not None:
        return reason
    if not is_window_index(_index(layer), (window, window)):
        return "relative_position_index differs from transformers'"
    if tuple(of_bias.window_size) != (window, window):
        return "window_size differs from the attention's"  # transformers' own code fails
    if not 0 <= layer.shift_size < window:
        return "shift_size is not smaller than window_size"
    if "continuous_position_bias_mlp" not in of_bias._modules:
        if of_bias.relative_position_bias_table.shape[0] != (2 * window - 1) ** 2:
            return "relative_position_bias_table is not the table of window_size"
    elif of_bias.relative_coords_table.shape != (1, 2 * window - 1, 2 * window - 1, 2):
        return "relative_coords_table is not the table of window_size"
    return None


@functools.cache
def _times_masked(kind: Any) -> int:
    """Return the number of times that v2's attention adds its mask to the scores (2 in every version checked)."""
    config = types.SimpleNamespace(qkv_bias=False, attention_probs_dropout_prob=0.0)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        attention = kind(config, dim=1, num_heads=1, window_size=2)
        for p in attention.parameters():
            p.zero_()
        mask = torch.zeros(1, 4, 4, dtype=attention.query.weight.dtype)
        mask[..., 1] = -1.0
        weights = attention.eval()(torch.zeros(1, 4, 1, dtype=mask.dtype), mask, output_attentions=True)[1]
        return round((weights[0, 0, 0, 0] / weights[0, 0, 0, 1]).log().item())


def _pad_qkv(layer: Any) -> Tensor | None:
    """Return q, k and v of a pad token, or None if no projection has a bias."""
    q, k, v, _ = _projections(layer).values()
    if q.bias is None and k.bias is None and v.bias is None:
        return None
    given = next(m.bias for m in (q, k, v) if m.bias is not None)
    zeros = torch.zeros(q.weight.shape[0], dtype=given.dtype, device=given.device)
    return torch.cat([zeros if m.bias is None else m.bias for m in (q, k, v)])


def _attention_arguments(layer: Any) -> dict[str, Any]:
    """Return the op's arguments after q, k and v, except dropout_p and backend."""
    of_bias = _position_bias(layer)
    if "continuous_position_bias_mlp" in of_bias._modules:
        scores = {
            "bias_table": position_bias(layer, *_position_bias_path(layer), "continuous_position_bias_mlp"),
            "logit_scale": of_bias.logit_scale,
            "mask_value": -100.0 * _MASKED[original_class(layer)],
        }
    else:
        attention = child(layer, "attention")
        scores = {
            "bias_table": of_bias.relative_position_bias_table,
            "mask_value": -100.0,
            "scale": None if "self" in attention._modules else attention.scaling,
        }
    return {**scores, **_geometry(layer)}


def _geometry(layer: Any) -> dict[str, Any]:
    """Return the op's arguments for heads and windows."""
    return {
        "num_heads": _num_heads(layer),
        "window_size": layer.window_size,
        "shift_size": layer.shift_size,
        "pad_order": "pad_then_roll",
    }


def attended(layer: Any, x: Tensor, size: Sequence[int]) -> Tensor:
    """Return the attention branch's output, before drop path, for a map ``x`` of ``size``, given as (B, L, C)."""
    height, width = size
    *inputs, output = _projections(layer).items()
    x = x.view(x.shape[0], height, width, x.shape[2])
    heads = _num_heads(layer)
    # A comparison of sizes would be a guard in compiled code.
    has_pads = torch.compiler.is_compiling() or any(s % layer.window_size for s in size)
    y = window_attention(
        *(call_linear(*projection, x).unflatten(-1, (heads, -1)) for projection in inputs),
        **_attention_arguments(layer),
        pad_qkv=_pad_qkv(layer) if has_pads else None,
        dropout_p=_dropout_at_call(layer),
        backend=layer._swinkernels_backend,
    )
    *_, dropout = _dropouts(layer).values()
    return dropout(call_linear(*output, y).flatten(1, -2))


# Residual connections and patch merging


def _casts_its_input(layer: Any) -> bool:
    name, kind, (first, *_) = _MLP[original_class(layer)].parts[0]
    mlp = child(layer, name)
    return (
        why_not_absorbed(name, mlp, kind, f"transformers' {kind.__name__}") is None
        and why_not_linear(first, child(mlp, first)) is None
    )


def _width(layer: Any) -> int:
    return _out(layer).weight.shape[0]


def _out(layer: Any) -> Any:
    return list(_projections(layer).values())[-1]


_MERGING = Merging("pre", lambda merging: merging.reduction.in_features)
_MERGING_V2 = Merging("post", lambda merging: merging.reduction.out_features)

# For each class of layers: the path and the class of each module that the op replaces; the MLP; the number of times
# that v2 adds its mask to the scores; the residual connections; the halves that can be recomputed.
_INSIDE: dict[type, tuple[tuple[str, type[nn.Module]], ...]] = {}
_MLP: dict[type, Mlp] = {}
_MASKED: dict[type, int] = {}
_RESIDUALS: dict[type, tuple[Residual, ...]] = {}
_HALVES: dict[type, Halves] = {}


def _why_not_half(layer: Any, training: bool | None) -> str | None:
    """Return the reason why attention_half cannot replace the attention and layernorm_before of a v1 layer, or None."""
    norm = "layernorm_before"
    reason = _why_not_attention(layer) or why_not_norm(norm, child(layer, norm), _width(layer))
    return reason or _why_not_absorbed(layer, training)


def _why_not_absorbed(layer: Any, training: bool | None = None) -> str | None:
    """Return the reason why attention_half cannot replace the layer's projections and last dropout, or None."""
    *_, (name, dropout) = _dropouts(layer).items()
    reason = why_not_left_out(name, dropout, training=training)
    for path, linear in _projections(layer).items():
        reason = reason or why_not_readable(path, linear)
    return reason


def _layers_before(layer: Any) -> tuple[Any, Sequence[Any], Any]:
    """Return the layers of a v1 layer's attention half."""
    *qkv, proj = _projections(layer).values()
    return child(layer, "layernorm_before"), qkv, proj


def _layers_after(layer: Any) -> tuple[Any, Sequence[Any], Any]:
    """Return the layers of a v2 layer's attention half."""
    *qkv, proj = _projections(layer).values()
    return child(layer, _RESIDUALS[original_class(layer)][0].norm), qkv, proj


def _branch(layer: Any, x: Tensor, size: Sequence[int], residual: bool, place: str = "pre") -> Tensor | None:
    """Return the output of an attention branch, computed by attention_half, plus x if ``residual``.

    Return None if the device or, outside autocast, the dtype of a parameter differs from that of ``x``.
    """
    layers = _layers_before if place == "pre" else _layers_after
    given = {**_attention_arguments(layer), "pad_qkv": _pad_qkv(layer), "dropout_p": _dropout_at_call(layer)}
    x = x.view(x.shape[0], *size, x.shape[2])
    y = attention_branch(layer, x, layers, layer._swinkernels_backend, given, residual, place)
    return None if y is None else y.flatten(1, 2)


def _added_attention(layer: Any, x: Tensor, size: Sequence[int]) -> Tensor | None:
    """Return the residual stream of a v2 layer after attention, or None if that is not one op."""
    residual = _RESIDUALS[original_class(layer)][0]
    return add_normed_attention(layer, x, residual, _why_not_absorbed, lambda: _branch(layer, x, size, True, "post"))


class _Layer(Accelerated):
    """Base class of the accelerated layers of all Swin families.

    Geometry, parameters and the index into the bias table are read or compared at every call. transformers' code runs
    if the op cannot replace it: if attention weights are requested, if an inner module has a hook or was replaced, if a
    method was replaced, and while the code is traced.
    """

    set_shift_and_window_size: Any

    def _is_ours(self, x: Any, size: Any, always_partition: bool | None = True) -> bool:
        """Return True if the op can run for ``x``, the tokens of a map of ``size``.

        If ``always_partition`` is not set, first adapt the windows to the map.
        """
        if self._swinkernels_own_code(x) or x.dim() != 3 or x.shape[1] != size[0] * size[1]:
            return False
        if not always_partition:
            before = self.window_size, self.shift_size
            self.set_shift_and_window_size(size)  # idempotent, so transformers' forward may call it again
            if (self.window_size, self.shift_size) != before and self._swinkernels_own_code(x):
                return False
        return settled(self, _why_not_modules) is None and _why_not_sdpa(self) is None

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        found = _why_not_inside(self)
        return () if found is not None else (_index(self),)

    def _swinkernels_look(self) -> None:
        _why_not_attention(self)


class PreNormLayer(_Layer):
    """A v1 layer: norm, attention, norm, MLP."""

    def _attention_half(self, x: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the residual stream s after attention, and layernorm_after(s)."""
        (residual,) = _RESIDUALS[original_class(self)]
        y = attended(self, norm_for_linear(self, "layernorm_before", x, _width(self)), size)
        fused = residual.add_then_norm(self, x, y)
        if fused is not None:
            return fused
        s = x + child(self, "drop_path")(y)
        return s, child(self, "layernorm_after")(s)

    def _both_halves(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Return the residual stream after attention and MLP."""
        out = _HALVES[original_class(self)].run(self, x, lambda residual: _branch(self, x, size, residual))
        if out is not None:
            return out
        s, z = self._attention_half(x, size)
        return _MLP[original_class(self)].added(self, s, z)


class PreNormLayerOfAnyMap(PreNormLayer):
    """A v1 layer whose windows shrink to small maps unless ``always_partition`` is True."""

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
        always_partition: bool | None = False,
    ) -> tuple[Tensor, ...]:
        if output_attentions or not self._is_ours(hidden_states, input_dimensions, always_partition):
            return super().forward(hidden_states, input_dimensions, output_attentions, always_partition)
        return (self._both_halves(hidden_states, input_dimensions),)


class PostNormLayer(_Layer):
    """A v2 layer: attention, norm, MLP, norm."""

    def forward(
        self, hidden_states: Tensor, input_dimensions: tuple[int, int], output_attentions: bool | None = False
    ) -> tuple[Tensor, ...]:
        if output_attentions or not self._is_ours(hidden_states, input_dimensions):
            return super().forward(hidden_states, input_dimensions, output_attentions)
        after_attention, after_mlp = _RESIDUALS[original_class(self)]
        x = _added_attention(self, hidden_states, input_dimensions)
        if x is None:
            x = self._added(after_attention, hidden_states, attended(self, hidden_states, input_dimensions))
        out = _HALVES[original_class(self)].run(self, x)
        if out is not None:
            return (out,)
        return (self._added(after_mlp, x, _MLP[original_class(self)].branch(self, x)),)

    def _added(self, residual: Residual, x: Tensor, y: Tensor) -> Tensor:
        fused = residual.add_normed(self, x, y)
        return x + child(self, "drop_path")(child(self, residual.norm)(y)) if fused is None else fused


class _MergingOfSequences(Accelerated):
    """Base class of accelerated patch merging modules whose input is a sequence of tokens."""

    def _merge(self, how: Merging, x: Tensor, size: Any) -> Tensor | None:
        if self._swinkernels_own_code(x) or x.dim() != 3 or x.shape[1] != size[0] * size[1]:
            return None
        out = how.run(self, x.view(x.shape[0], *size, x.shape[2]))
        return None if out is None else out.flatten(1, 2)


class PreNormMerging(_MergingOfSequences):
    """v1 patch merging, computed by the patch_merging op."""

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        out = self._merge(_MERGING, input_feature, input_dimensions)
        return super().forward(input_feature, input_dimensions) if out is None else out


class PostNormMerging(_MergingOfSequences):
    """v2 patch merging, computed by the patch_merging op."""

    def forward(self, input_feature: Tensor, input_dimensions: tuple[int, int]) -> Tensor:
        out = self._merge(_MERGING_V2, input_feature, input_dimensions)
        return super().forward(input_feature, input_dimensions) if out is None else out


# The adapters


def _run_with_size(module: Any, x: Tensor) -> Tensor:
    out = type(module).forward(module, x.flatten(1, 2), tuple(x.shape[1:3]))
    return out if isinstance(out, Tensor) else out[0]


def _map_size(layer: Any) -> tuple[int, int]:
    """Return a map size that needs padding and a shift on each axis; ``layer`` itself stores no map size."""
    return layer.window_size + 1, layer.window_size + 2


def _qkv_weight(layer: Any) -> Tensor:
    """Return a tensor with the shape and dtype of the concatenated query, key and value weights."""
    q, *_ = _projections(layer).values()
    # Do not call q.weight.new_empty: the class of q.weight may not support factory functions.
    one = torch.empty((), dtype=q.weight.dtype, device=q.weight.device)
    return one.expand(3 * q.weight.shape[0], q.weight.shape[1])


def layer_adapter(
    original: type[nn.Module],
    accelerated: type[nn.Module],
    inside: dict[str, type[nn.Module]],
    mlp: type[nn.Module] | tuple[type[nn.Module], type[nn.Module]],
    drop_path: type[nn.Module],
    takes: Sequence[str],
    cosine: Any = None,
) -> Adapter:
    """Create the adapter for a class of layers.

    Args:
        original, accelerated: the layer's class and its accelerated subclass.
        inside: the classes of the attention module and of its children, keyed by path.
        mlp: the class of the MLP or, if it consists of the modules "intermediate" and "output", their classes.
        drop_path: the class of the drop path.
        takes: the names of the forward's arguments.
        cosine: in v2, the class of the inner attention module, else None.
    """

    def residual(norm: str, casts_its_input: Callable[[Any], bool] = lambda layer: False) -> Residual:
        known_as = f"transformers' {drop_path.__name__}"
        return Residual(norm, "drop_path", drop_path, known_as, casts_its_input, _width, floored_drop_path_scale)

    watch(original, methods=("get_attn_mask", "maybe_pad", "cyclic_shift"))
    first, second = mlp if isinstance(mlp, tuple) else (mlp, None)
    watch(first, drop_path, *inside.values())
    _INSIDE[original] = tuple(inside.items())
    if second is None:
        _MLP[original] = Mlp((("mlp", first, ("fc1", "activation_fn", "fc2")),), drop="dropout")
    else:
        watch(second)
        of_first = "intermediate", first, ("dense", "intermediate_act_fn")
        _MLP[original] = Mlp((of_first, ("output", second, ("dense", "dropout"))))
    if cosine is None:
        residuals: tuple[Residual, ...] = (residual("layernorm_after", _casts_its_input),)
    else:
        residuals = residual("layernorm_before"), residual("layernorm_after")
        _MASKED[original] = _times_masked(cosine)
    _RESIDUALS[original] = residuals
    if cosine is None:
        _HALVES[original] = Halves(residuals[0], _MLP[original], "pre", _why_not_half)
    else:
        _HALVES[original] = Halves(residuals[1], _MLP[original], "post")

    def reason_to_skip(layer: Any) -> str | None:
        if list(inspect.signature(original.forward).parameters)[1:] != list(takes):
            return f"the forward of {original.__name__} does not have the arguments that it has in transformers 5"
        return _why_not_attention(layer)

    attention_part = window_attention_part(
        _qkv_weight,
        _map_size,
        _geometry,
        _dropout_p,
        lambda layer: replaced_forward(layer) or _why_not_attention(layer),
    )
    return Adapter(
        NAME,
        original,
        accelerated,
        reason_to_skip=reason_to_skip,
        parts=(attention_part, *(r.part(lambda layer: _out(layer).weight) for r in residuals)),
        input_shape=lambda layer: (*_map_size(layer), _width(layer)),
        weight=lambda layer: _out(layer).weight,
        run=_run_with_size,
        why_not_recompute=_HALVES[original].why_not_in_training,
    )


def merging_adapter(original: type[nn.Module], accelerated: type[nn.Module]) -> Adapter:
    """Create the adapter for a class of patch merging modules; ``accelerated`` determines whether it is v1 or v2."""
    how = _MERGING_V2 if issubclass(accelerated, PostNormMerging) else _MERGING
    return how.adapter(
        NAME, original, accelerated, lambda merging: (6, 5, merging.reduction.in_features // 4), run=_run_with_size
    )
