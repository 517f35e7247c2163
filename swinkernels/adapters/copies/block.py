"""Adapters for copies of Microsoft's Swin block in any package, recognised by structure and verified by a trial.

Many backbones and models, such as Swin-Unet, SwinIR and Video Swin, contain modified copies of Microsoft's file, so
there is no common class to import. A block is a candidate if it has the following attributes: ``window_size``,
``shift_size``, ``norm1``, ``norm2``, ``mlp``, and in ``attn`` the layers ``qkv`` and ``proj``, ``num_heads`` and a bias
table (v1) or the MLP and the scale of v2. Its forward may have one of several published forms (:class:`Form`). A trial
(``trial.py``) decides: a copy of the block and its accelerated twin run on the same random inputs, and the first form
that gives the same outputs and gradients is used. A block that no form fits is left as it was, and the report gives the
reason.

An accelerated class is created for each pair of original class and form, and is pickled as that pair. If no form fits
the whole block, a form in ``attention.py`` may fit its attention.

Source: models/swin_transformer.py and swin_transformer_v2.py of microsoft/Swin-Transformer, and the copies named above.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinkernels.adapters.adapter import Adapter, original_class, swap_class
from swinkernels.adapters.bypass import child, class_of, replaced_forward, why_not_norm, why_not_window_attention
from swinkernels.adapters.copies import mlp
from swinkernels.adapters.copies.dynamic_class import (
    MASK,
    NAME,
    DynamicSubclass,
    dynamic_subclass,
    others_are_default,
    parameters_of,
)
from swinkernels.adapters.copies.snapshot import Snapshot, largest_number, signature_of
from swinkernels.adapters.copies.trial import MOST_SCORES, Case, Elementwise, NotCovered, Trial, Width, narrow
from swinkernels.adapters.halves import Halves, add_normed_attention, attention_branch
from swinkernels.adapters.linear_layers import Drop
from swinkernels.adapters.masks import frame_of, is_stored_mask, is_window_index, shift_mask, value_of_mask
from swinkernels.adapters.microsoft_attention import (
    add_projected,
    attention_layers,
    bias_table,
    dropout_at_call,
    dropout_p,
    is_cosine,
    projected,
    qkv_bias,
    qkv_of,
    resembles_attention,
    score_factor,
    why_layers_are_called,
)
from swinkernels.adapters.norms import Residual, norm_for_linear
from swinkernels.adapters.part import window_attention_part
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._fused_linear import joins
from swinkernels.ops._library import is_untraced, uncached_when_compiled

_BATCH = 2  # images in a trial; with one image, a wrong stride between images would go unnoticed


@dataclass(frozen=True)
class Form:
    """Describes the arguments and the behaviour of a block's forward, which differ between published copies."""

    # "sequence" if x is (B, L, C), "map" if x is (B, *S, C).
    layout: str
    # Where the forward gets the map's size: "input_resolution"; names of attributes such as "H W"; "argument"; "shape"
    # (of x); or "square" (the square root of the sequence's length).
    size_from: str
    # "own" if the block stores or computes the mask, "argument" if the caller passes it.
    mask_from: str
    # "stays" if the window never changes. "clamped" if, on an axis where the map is no larger than the window, the
    # window shrinks to the map and is not shifted.
    window: str
    pad_order: str
    # "pre" for norms before attention and MLP (v1), "post" for norms after them (v2).
    norm: str
    # The kinds of maps (see _kind_of_map) for which a trial gave equal results.
    maps: frozenset[str] = frozenset()


# Attributes of a block


def resembles(module: nn.Module) -> bool:
    """Return True if ``module`` has the attributes of a shifted-window block."""
    return (
        not isinstance(module, torch.jit.ScriptModule)
        and resembles_attention(module._modules.get("attn"))
        and all(name in module._modules for name in ("norm1", "norm2", "mlp"))
        and hasattr(module, "window_size")
        and hasattr(module, "shift_size")
    )


def _ints(value: Any, axes: int) -> tuple[int, ...]:
    return tuple(map(int, value)) if isinstance(value, (tuple, list)) else (int(value),) * axes


def _axes(block: Any) -> int:
    for value in (block.window_size, block.attn.window_size if hasattr(block.attn, "window_size") else 0):
        if isinstance(value, (tuple, list)):
            return len(value)
    return 2


def _window(block: Any) -> tuple[int, ...]:
    return _ints(block.window_size, _axes(block))


def _shift(block: Any) -> tuple[int, ...]:
    return _ints(block.shift_size, _axes(block))


def _table_window(block: Any) -> tuple[int, ...]:
    return _ints(getattr(block.attn, "window_size", block.window_size), _axes(block))


def _resolution(block: Any) -> tuple[int, ...] | None:
    resolution = getattr(block, "input_resolution", None)
    return None if resolution is None else _ints(resolution, _axes(block))


def _clamped(form: Form, block: Any, size: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the window size and shift size that ``block``, if it has this ``form``, uses for a map of ``size``."""
    window, shift = _window(block), _shift(block)
    if form.window == "stays":
        return window, shift
    fits = [s > w for s, w in zip(size, window, strict=True)]
    return (
        tuple(w if fit else s for s, w, fit in zip(size, window, fits, strict=True)),
        tuple(s if fit else 0 for s, fit in zip(shift, fits, strict=True)),
    )


def _kind_of_map(size: tuple[int, ...], window: tuple[int, ...]) -> str:
    """Return "padded" if a map of ``size`` needs padding, else "whole", with the prefix "small, " for a small map.

    A map is small if a window covers one of its axes.
    """
    small = any(s <= w for s, w in zip(size, window, strict=True))
    padded = any(s % w for s, w in zip(size, window, strict=True))
    return ("small, " if small else "") + ("padded" if padded else "whole")


# The attention half


def _why_not_attention(block: Any) -> str | None:
    """Return the reason why the op cannot compute the block's attention, whatever the form, or None."""
    attn = block._modules["attn"]
    reason = why_not_window_attention(attn)
    if reason is not None:
        return reason
    if isinstance(getattr(attn, "scale", None), Tensor):
        return "attn.scale is a Tensor, not a float"
    table = attn._parameters.get("relative_position_bias_table")
    if table is not None and table.shape[0] != math.prod([2 * w - 1 for w in _table_window(block)]):
        return "attn.relative_position_bias_table is not the table of its window_size"
    if any(w > full for w, full in zip(_window(block), _table_window(block), strict=True)):
        return "window_size is larger than attn's"
    return None


def _geometry(form: Form, block: Any, size: tuple[int, ...]) -> dict[str, Any]:
    window, shift = _clamped(form, block, size)
    return {
        "num_heads": block.attn.num_heads,
        "window_size": window,
        "shift_size": shift,
        "table_window": _table_window(block),
        "pad_order": form.pad_order,
    }


def _attention_arguments(form: Form, block: Any, size: tuple[int, ...], mask_value: float) -> dict[str, Any]:
    """Return the attention op's arguments for a map of the given size, except its inputs and the backend."""
    attn = block.attn
    return {
        "bias_table": bias_table(block, "attn"),
        **score_factor(attn),
        **_geometry(form, block, size),
        "pad_qkv": qkv_bias(attn),
        "mask_value": mask_value,
        "dropout_p": dropout_at_call(attn),
    }


def _attended(form: Form, block: Any, x: Tensor, size: tuple[int, ...], mask_value: float) -> Tensor:
    """Return the attention op's output for the map ``x``, before the projection. In v1, norm1 is applied first."""
    attn, arguments = block.attn, _attention_arguments(form, block, size, mask_value)
    z = norm_for_linear(block, "norm1", x, attn.qkv.in_features) if form.norm == "pre" else x
    qkv = qkv_of(attn, z.reshape(x.shape[0], *size, x.shape[-1]), arguments["pad_qkv"])
    return window_attention_qkvpacked(qkv, **arguments, backend=block._swinkernels_backend)


def _has_own_mask(block: Any) -> bool:
    """Return True if the block's stored mask differs from the standard mask, which ops compute from the geometry.

    Also return True if the geometry cannot be read, or if no mask is stored where one would be expected.
    """
    mask = getattr(block, MASK, None)
    try:
        resolution, window, shift = _resolution(block), _window(block), _shift(block)
    except (TypeError, ValueError):
        return True
    if mask is None:  # the mask is computed in every call, or is missing
        return hasattr(block, MASK) and resolution is not None and any(shift)
    return resolution is None or not is_stored_mask(mask, frame_of(resolution, window), window, shift)


# The whole block


def _name_of_drop_path(block: Any, half: int) -> str | None:
    return next((n for n in ("drop_path", f"drop_path{half}") if n in block._modules), None)


def _known_drop_path() -> type[nn.Module]:
    timm = sys.modules.get("timm.layers")
    return nn.Identity if timm is None else timm.DropPath


def _drop_path(block: Any, half: int) -> Any:
    name = _name_of_drop_path(block, half)
    return _NOTHING if name is None else child(block, name)


_NOTHING = nn.Identity()


def _residual(block: Any, half: int, norm: str) -> Residual | None:
    """Return a Residual for ``half`` (1 or 2) with the norm named ``norm``, or None if that half has no drop path."""
    name = _name_of_drop_path(block, half)
    if name is None:
        return None
    kind = _known_drop_path()
    return Residual(norm, name, kind, "timm's DropPath", width=_channels)


def _channels(block: Any) -> int:
    return block.attn.qkv.in_features


def _add_normed(block: Any, x: Tensor, y: Tensor, half: int) -> Tensor:
    """Return x + drop_path(norm(y)), with the norm and the drop path of ``half`` (1 or 2)."""
    residual = _residual(block, half, f"norm{half}")
    fused = None if residual is None else residual.add_normed(block, x, y)
    return x + _drop_path(block, half)(child(block, f"norm{half}")(y)) if fused is None else fused


Call = tuple[tuple[int, ...], float]


def _read(form: Form, block: Any, x: Tensor, given: Any) -> Call | str:
    """Return the map's size and the mask value for a call, or the reason why the block must run its own code.

    ``given`` is the argument after x, if the form has one.
    """
    reason = block._swinkernels_changed() or _why_not_attention(block)
    if reason is not None:
        return reason
    axes = _axes(block)
    if x.dim() != (3 if form.layout == "sequence" else axes + 2):
        return f"x has {x.dim()} axes"
    if form.size_from == "shape":
        size: Any = tuple(x.shape[1:-1])
    elif form.size_from == "argument":
        size = given
    elif form.size_from == "input_resolution":
        size = _resolution(block)
    elif form.size_from == "square":
        size = (math.isqrt(x.shape[1]),) * axes
    else:
        size = tuple(getattr(block, name) for name in form.size_from.split())
    if not isinstance(size, (tuple, list)) or len(size) != axes:
        return f"the size of the map must be {axes} numbers, got {size!r:.60}"
    size = tuple(size)
    if any(s is None or isinstance(s, Tensor) for s in size):
        return f"the size of the map must be {axes} numbers, got {size!r:.60}"
    if form.layout == "sequence" and x.shape[1] != math.prod(size):
        return f"{x.shape[1]} tokens are not a map of {size}"
    kind = _kind_of_map(size, _window(block))
    if kind not in form.maps:
        return f"the trial found no form for a map of {size} ({kind})"
    window, shift = _clamped(form, block, size)
    if not any(shift):
        if form.mask_from != "argument" and _has_own_mask(block):
            return "attn_mask differs from the standard mask for its window and shift"
        return size, 0.0
    if form.mask_from == "argument":
        value = value_of_mask(given, frame_of(size, window), window, shift)
        return "the given mask differs from the standard mask for this window" if value is None else (size, value)
    if _has_own_mask(block):
        return "attn_mask differs from the standard mask for its window and shift"
    if form.size_from == "shape" and getattr(block, MASK, None) is not None and size != _resolution(block):
        return "its stored mask is for another map"
    return size, -100.0


def _attention_branch(form: Form, block: Any, x: Tensor, size: tuple[int, ...], mask_value: float) -> Tensor:
    """Return the output of the attention branch in the layout of ``x``. In v1, the branch includes norm1."""
    return projected(block.attn, _attended(form, block, x, size, mask_value)).reshape(x.shape)


def _attention_half(
    form: Form, block: Any, x: Tensor, size: tuple[int, ...], mask_value: float
) -> tuple[Tensor, Tensor]:
    """Return s = x + drop_path(attention branch), and norm2(s)."""
    out = _attended(form, block, x, size, mask_value)
    name = _name_of_drop_path(block, 1)
    drops: tuple[Drop, ...] = () if name is None else ((name, child(block, name), _known_drop_path()),)
    s = add_projected(block.attn, out, x.reshape(*out.shape[:-1], x.shape[-1]), *drops)
    if s is None:
        y = projected(block.attn, out).reshape(x.shape)
        residual = _residual(block, 1, "norm2")
        fused = None if residual is None else residual.add_then_norm(block, x, y)
        if fused is not None:
            return fused
        s = x + _drop_path(block, 1)(y)
    s = s.reshape(x.shape)
    return s, child(block, "norm2")(s)


def _mlp_branch(form: Form, block: Any, x: Tensor) -> Tensor:
    z = child(block, "norm2")(x) if form.norm == "pre" else x
    y = mlp.fused(block, z, None, None, nn.Identity)
    return child(block, "mlp")(z) if y is None else y


def _mlp_half(block: Any, s: Tensor, z: Tensor) -> Tensor:
    """Return s + drop_path(MLP(z))."""
    y = mlp.fused(block, z, s, _name_of_drop_path(block, 2), _known_drop_path())
    return s + _drop_path(block, 2)(child(block, "mlp")(z)) if y is None else y


# Halves


def _why_not_halves(form: Form, block: Any, training: bool | None) -> str | None:
    """Return the reason why attention_half and mlp_half cannot replace a block's code, or None."""
    if getattr(block, "use_checkpoint", False):
        return "use_checkpoint is set, so the block checkpoints its branches"
    attn, snapshot = child(block, "attn"), block._swinkernels_mlp
    if snapshot is None:
        return "a trial did not show that mlp computes fc2(gelu(fc1(x)))"
    reason = snapshot.differs(child(block, "mlp"))
    if reason is not None or form.norm == "post":
        return reason
    reason = _why_not_attention(block) or why_not_norm("norm1", child(block, "norm1"), attn.qkv.in_features)
    return reason or why_layers_are_called(attn, training)


@functools.cache
def _halves(form: Form, first: str | None, second: str | None, kind_of_mlp: Any, drop_path: Any) -> Halves:
    return Halves(
        Residual("norm2", first if form.norm == "pre" else second, drop_path, "timm's DropPath", width=_channels),
        uncached_when_compiled(mlp.layers_of)(kind_of_mlp, second, drop_path),
        form.norm,
        functools.partial(_why_not_halves, form),
    )


def _halves_of(form: Form, block: Any) -> Halves:
    """Describe the halves of a block."""
    first, second = (_name_of_drop_path(block, half) for half in (1, 2))
    drop_path: Any = _known_drop_path()
    return uncached_when_compiled(_halves)(form, first, second, class_of(child(block, "mlp")), drop_path)


def _branch(
    form: Form, block: Any, x: Tensor, size: tuple[int, ...], mask_value: float, residual: bool
) -> Tensor | None:
    """Return a block's attention branch, computed by attention_half, plus x if ``residual``."""
    given, of_map = _attention_arguments(form, block, size, mask_value), x.reshape(x.shape[0], *size, x.shape[-1])
    y = attention_branch(block, of_map, attention_layers, block._swinkernels_backend, given, residual, form.norm)
    return None if y is None else y.reshape(x.shape)


def _why_not_half(block: Any) -> str | None:
    """Return the reason why attention_half cannot replace a v2 block's attention and norm1, or None."""
    return _why_not_attention(block) or why_layers_are_called(child(block, "attn"), None)


def _added_attention(form: Form, block: Any, x: Tensor, size: tuple[int, ...], mask_value: float) -> Tensor | None:
    """Return the residual stream of a v2 block after attention, or None if that is not one op."""
    residual = Residual("norm1", _name_of_drop_path(block, 1), _known_drop_path(), "timm's DropPath", width=_channels)
    return add_normed_attention(
        block, x, residual, _why_not_half, lambda: _branch(form, block, x, size, mask_value, True)
    )


def _run_halves(
    form: Form, block: Any, x: Tensor, size: tuple[int, ...] = (), mask_value: float = 0.0
) -> Tensor | None:
    """Return the result of a v1 block, or of the MLP half of a v2 block, from attention_half and mlp_half.

    Return None if the block has to run as without halves. ``size`` and ``mask_value`` are those of v1's attention.
    """
    if joins(x):
        if child(block, "mlp").training:  # the trial ran it in eval mode
            return None
    elif not (block._swinkernels_recomputes and is_untraced((x,))):
        return None

    def branch(residual: bool) -> Tensor | None:
        return _branch(form, block, x, size, mask_value, residual)

    return _halves_of(form, block).run(block, x, branch if form.norm == "pre" else None)


class StructuralBlock(DynamicSubclass):
    """A block whose attention half is computed by a window attention op.

    The second base class of an accelerated class is the original class. Geometry and parameters are read at every call.
    The block's own forward runs in every call that the trial does not cover: with other arguments, with a map of
    another kind, with a nonstandard mask, with hooks inside the attention, with layers other than nn.Linear, and while
    the code is traced.
    """

    _swinkernels_argument: str | None  # the argument after x
    _swinkernels_in_trial = False
    # A snapshot of the MLP if a trial showed that calling its layers in turn is equivalent to its forward, else None.
    _swinkernels_mlp: Snapshot | None = None

    def _swinkernels_swapped(self) -> None:
        if not self._swinkernels_in_trial:
            axes = 1 if self._swinkernels_form.layout == "sequence" else _axes(self)
            in_training = self._swinkernels_recomputes
            self.__dict__["_swinkernels_mlp"] = mlp.trusted(child(self, "mlp"), axes, in_training)
        self.__dict__["_swinkernels_snapshots"] = {
            "": Snapshot(self, absorbs=False, sizes=_size_names(self._swinkernels_form)),
            "attn": Snapshot(child(self, "attn")),
        }

    def _swinkernels_look(self) -> None:
        super()._swinkernels_look()
        _has_own_mask(self)

    def _swinkernels_call(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
        """Return the map's size and the mask value, or the reason why the block must run its own code."""
        if self._swinkernels_own_code(x):
            return "its code is traced or was replaced, or no kernel runs on the device"
        given, name = None, self._swinkernels_argument
        if name is not None:
            if args:
                given, args = args[0], args[1:]
            elif name in kwargs:
                given = kwargs[name]
                kwargs = {key: value for key, value in kwargs.items() if key != name}
            else:
                return f"it is called without {name}"
        if (args or kwargs) and not others_are_default(self._swinkernels_others, args, kwargs):
            return "it is called with arguments that its form does not have"
        return _read(self._swinkernels_form, self, x, given)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        form = self._swinkernels_form
        call = self._swinkernels_call(x, args, kwargs)
        if isinstance(call, str):
            if self._swinkernels_in_trial:
                raise NotCovered(call)
            return super().forward(x, *args, **kwargs)
        out = _run_halves(form, self, x, *call) if form.norm == "pre" else None
        if out is not None:
            return out
        saves_memory = getattr(self, "use_checkpoint", False) and torch.is_grad_enabled()

        def branch(function: Any, *arguments: Any) -> Tensor:
            if saves_memory:
                return checkpoint(function, form, self, *arguments, use_reentrant=False)
            return function(form, self, *arguments)

        if form.norm == "post":
            s = _added_attention(form, self, x, *call)
            x = _add_normed(self, x, branch(_attention_branch, x, *call), 1) if s is None else s
            out = _run_halves(form, self, x)
            return _add_normed(self, x, branch(_mlp_branch, x), 2) if out is None else out
        if saves_memory:
            x = x + _drop_path(self, 1)(branch(_attention_branch, x, *call))
            return x + _drop_path(self, 2)(branch(_mlp_branch, x))
        return _mlp_half(self, *_attention_half(form, self, x, *call))


# Forms


# Number of axes -> the names of the attributes in which a stage stores the size of the map.
_NAMES_OF_SIZES = {2: ("H W",), 3: ("D H W", "H W T", "H W D")}


def _size_names(form: Form) -> list[str]:
    """Return the names of the attributes from which ``form`` reads the map's size, or an empty list."""
    is_named = form.size_from in itertools.chain(*_NAMES_OF_SIZES.values())
    return form.size_from.split() if is_named else []


def _named_sizes(block: Any) -> str:
    """Return the names of the attributes that may hold the map's size, such as "H W", or "" if there are none.

    Only a forward with a mask argument reads the size from attributes.
    """
    taken = parameters_of(original_class(block))
    if len(taken) < 2 or "mask" not in taken[1].name:
        return ""
    return next((n for n in _NAMES_OF_SIZES[_axes(block)] if all(hasattr(block, a) for a in n.split())), "")


_SIZES = ("x_size", "size", "hw_shape", "input_size", "input_resolution")


def _forms(block: Any) -> Iterator[Form]:
    """Yield the forms that fit the attributes of ``block`` and the signature of its forward, most likely first."""
    taken = parameters_of(original_class(block))
    if not taken or any(p.default is inspect.Parameter.empty for p in taken[2:]):
        return
    second = taken[1].name if len(taken) > 1 else ""
    sources = []
    if "mask" in second:
        names = _named_sizes(block)
        if names:
            sources.append(("sequence", names, "argument"))
        sources.append(("map", "shape", "argument"))
    elif second in _SIZES:
        sources.append(("sequence", "argument", "own"))
    elif len(taken) < 2 or taken[1].default is not inspect.Parameter.empty:
        if hasattr(block, "input_resolution"):
            sources.append(("sequence", "input_resolution", "own"))
        sources.append(("map", "shape", "own"))
        sources.append(("sequence", "square", "own"))
    norms = ("post", "pre") if is_cosine(block.attn) else ("pre", "post")
    # All published 3D copies clamp the window; few 2D copies do.
    windows = ("stays", "clamped") if _axes(block) == 2 else ("clamped", "stays")
    for source, norm in itertools.product(sources, norms):
        for window, pad_order in itertools.product(windows, ("pad_then_roll", "roll_then_pad")):
            yield Form(*source, window, pad_order, norm)


_MOST_TOKENS = 20_000  # approximate limit on the number of tokens of a map in a trial


def _sizes_to_try(form: Form, block: Any) -> list[tuple[int, ...]]:
    """Return the map sizes for the trials: small maps of each kind that ``form`` accepts and, if needed, a large map.

    The large map has more tokens than any constant with which the block's code may compare the number of tokens.
    """
    sizes = _small_sizes(form, block)
    number = largest_number(block, _MOST_TOKENS, block.attn.qkv.in_features)
    if form.size_from == "input_resolution" or number < max(map(math.prod, sizes)):
        return sizes
    window = (max(_window(block)),) * _axes(block) if form.size_from == "square" else _window(block)
    times = next(n for n in itertools.count(2) if math.prod(n * w for w in window) > number)
    return [*sizes, tuple(times * w for w in window)]


def _small_sizes(form: Form, block: Any) -> list[tuple[int, ...]]:
    window = _window(block)
    if form.size_from == "input_resolution":
        return [_small_resolution(block)]
    if form.size_from == "square":
        longest = max(window)
        return [(n,) * len(window) for n in (2 * longest, 2 * longest + 1, longest, max(longest - 1, 1))]
    if len(window) == 2:
        (h, w) = window
        return [(2 * h, 3 * w), (3 * h, 2 * w), (h + 1, 2 * w + w // 2), (h, 2 * w), (2 * h, max(w - 1, 1)), (h + 1, 2)]
    # Few windows, because the scores of 3D windows take long to compute.
    return [tuple(2 * w for w in window), tuple(w + 1 for w in window), (window[0] + 1, window[1], 2), window]


def _small_resolution(block: Any) -> tuple[int, ...]:
    """Return ``input_resolution``, reduced to a few windows unless the block may treat small maps differently."""
    resolution = _resolution(block)
    assert resolution is not None
    small = tuple(
        r if r <= (2 + i) * w else (2 + i) * w + r % w
        for i, (r, w) in enumerate(zip(resolution, _window(block), strict=True))
    )
    tokens = math.prod(resolution)
    number = largest_number(block, tokens, block.attn.qkv.in_features)
    return resolution if math.prod(small) <= number and tokens <= _MOST_TOKENS else small


def _prepare(form: Form, block: Any) -> None:
    """If the copy ``block`` stores its map's size, reduce this size and recompute the stored mask to match."""
    if _resolution(block) is None:
        return
    resolution = _small_resolution(block)
    block.input_resolution = resolution
    if getattr(block, MASK, None) is not None:
        window = _window(block)
        mask = shift_mask(frame_of(resolution, window), window, _shift(block))
        block.attn_mask = mask.to(block.attn_mask)


def _call(form: Form, block: Any, x: Tensor) -> Any:
    """Call the forward of the block's class on the map ``x``, with the arguments that ``form`` requires."""
    size = tuple(x.shape[1:-1])
    args: list[Any] = []
    if form.size_from == "argument":
        args.append(size)
    for name, length in zip(_size_names(form), size, strict=False):
        setattr(block, name, length)
    if form.mask_from == "argument":
        window, shift = _clamped(form, block, size)
        if not any(shift):  # a stage passes the mask to unshifted blocks, too
            shift = tuple(0 if w == 1 or s <= w else w // 2 for s, w in zip(size, window, strict=True))
        args.append(shift_mask(frame_of(size, window), window, shift, device=x.device))
    if form.layout == "sequence":
        x = x.flatten(1, -2)
    return type(block).forward(block, x, *args)


# Signature -> the form that passed the trials, or the reason why none did. _TRIALS holds the results for narrow copies,
# _AT_OWN_WIDTH the results for blocks at their own width.
_TRIALS: dict[tuple[Any, ...], Form | str] = {}
_AT_OWN_WIDTH: dict[tuple[Any, ...], Form | str] = {}


def _form_of(block: Any) -> Form | str:
    """Return the form that passes the trials, or the reason why no form fits.

    Thorough trials run on a narrow copy of the block; a short trial at the block's own width follows.
    """
    if any(p.is_meta for p in block.parameters()):
        return "its parameters are on the meta device, and an unknown class is replaced only after a trial with values"
    resolution = None if _resolution(block) is None else _small_resolution(block)
    make = signature_of(block, resolution, sizes=_named_sizes(block).split())
    if make not in _AT_OWN_WIDTH:
        _AT_OWN_WIDTH[make] = _find_form(block, resolution)
    return _AT_OWN_WIDTH[make]


def _find_form(block: Any, resolution: Any) -> Form | str:
    width = narrow(block.attn.qkv.in_features, block.attn.num_heads)
    try:
        make = signature_of(_trial(block, None, width=width).copy(), resolution, sizes=_named_sizes(block).split())
    except Exception:
        make = ()
    if make and make not in _TRIALS:
        _TRIALS[make] = _try_forms(block, width)
    form = _TRIALS.get(make, "")
    if isinstance(form, str):
        # The block may accept an input that its narrow copy refused.
        return form if form and _REFUSED not in form else _try_forms(block, None)
    return _at_own_width(block, form)


def _at_own_width(block: Any, form: Form) -> Form | str:
    cases = [_case(block, size, images=1) for size in _sizes_to_try(form, block)]
    case = min((c for c in cases if c.kind in form.maps), key=lambda c: math.prod(c.shape))
    for stand_in in (Elementwise(), None):
        passed, reason = _trial(block, form, stand_in=stand_in, is_short=True).run([case])
        if passed or _REFUSED not in reason:
            break
    return form if passed else f"it looks like a shifted-window block, but {reason}"


_REFUSED = "refused a trial"


def _trial(block: Any, form: Form | None, **options: Any) -> Trial:
    if form is None:
        return Trial(block, lambda module: None, lambda module, x: x, **options)
    return Trial(
        block,
        swap_class=functools.partial(_put_in_place, replace(form, maps=_ALL_MAPS)),
        prepare=functools.partial(_prepare, form),
        call=functools.partial(_call, form),
        masks=any(_shift(block)),
        **options,
    )


def _try_forms(block: Any, width: Width | None) -> Form | str:
    forms = list(_forms(block))
    if not forms:
        return f"its forward takes {inspect.signature(original_class(block).forward)}, which matches no known form"
    best, why = None, ""
    for form in forms:
        cases = [_case(block, size, width=width) for size in _sizes_to_try(form, block)]
        passed, reason = _trial(block, form, width=width).run(cases)
        if not why or (
            _REFUSED in why and reason and _REFUSED not in reason
        ):  # a difference in results is more informative than a refused trial
            why = reason
        if best is None or len(passed) > len(best.maps):
            best = replace(form, maps=passed)
        if passed and not reason:
            break
    assert best is not None
    return best if best.maps else f"it looks like a shifted-window block, but {why}"


def _case(block: Any, size: tuple[int, ...], images: int = _BATCH, width: Width | None = None) -> Case:
    window = _window(block)
    channels, heads = block.attn.qkv.in_features, block.attn.num_heads
    if width is not None:
        channels, heads = width.to_channels, width.to_heads
    of_image = heads * math.prod(frame_of(size, window)) * math.prod(window)
    images = 1 if of_image > MOST_SCORES else images
    scores = images * of_image
    return Case((images, *size, channels), _kind_of_map(size, window), scores)


_ALL_MAPS = frozenset({"whole", "padded", "small, whole", "small, padded"})


def _put_in_place(form: Form, block: nn.Module) -> None:
    block.__dict__["_swinkernels_in_trial"] = True
    swap_class(_adapter_of(block, form), block, "reference")


# The adapters


def match(module: nn.Module) -> tuple[Adapter | None, str | None] | None:
    """Return (adapter, None) or (None, reason) if ``module`` resembles a shifted-window block, else None."""
    if not resembles(module):
        return None
    try:
        reason = _why_not_this_one(module)
        form = reason if reason is not None else _form_of(module)
    except Exception as error:  # an unknown class may store anything in its attributes
        form = f"its attributes do not fit a shifted-window block: {type(error).__name__}: {error}"
    return (None, form) if isinstance(form, str) else (_adapter_of(module, form), None)


def _why_not_this_one(block: Any) -> str | None:
    """Return the reason why ``block`` cannot be replaced even if other blocks of its class can, or None."""
    reason = replaced_forward(block) or _why_not_attention(block)
    if reason is not None:
        return reason
    if _has_own_mask(block):
        return "attn_mask differs from the standard mask for its window and shift"
    index = getattr(block.attn, "relative_position_index", None)
    if index is not None and not is_window_index(index, _table_window(block)):
        return "attn.relative_position_index differs from the index of its window"
    return None


def _map(form: Form, block: Any) -> tuple[int, ...]:
    """Return a map size, preferably one that needs padding, of a kind that passed the trial."""
    if form.size_from == "input_resolution":
        resolution = _resolution(block)
        assert resolution is not None
        return resolution
    sizes = _sizes_to_try(form, block)
    known = [size for size in sizes if _kind_of_map(size, _window(block)) in form.maps]
    return next((size for size in known if "padded" in _kind_of_map(size, _window(block))), known[0])


def _qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


def _adapter_of(block: nn.Module, form: Form) -> Adapter:
    original: Any = original_class(block)
    return _adapter(original, form)


@functools.cache
def _adapter(original: Any, form: Form) -> Adapter:
    takes_argument = "argument" in (form.size_from, form.mask_from)
    argument = parameters_of(original)[1].name if takes_argument else None
    accelerated = dynamic_subclass(
        StructuralBlock,
        original,
        form,
        _adapter,
        _swinkernels_argument=argument,
        _swinkernels_others=tuple(parameters_of(original)[1 if argument is None else 2 :]),
    )

    def arguments(block: Any) -> dict[str, Any]:
        with torch.no_grad():
            return {
                "scale": None,
                "bias_table": bias_table(block, "attn"),
                "pad_qkv": qkv_bias(block.attn),
                "mask_value": -100.0,
                **score_factor(block.attn),
                **_geometry(form, block, _map(form, block)),
            }

    attention = window_attention_part(
        _qkv_weight, lambda block: _map(form, block), arguments, lambda block: dropout_p(block.attn), _why_not_attention
    )
    return Adapter(
        name=NAME,
        original=original,
        accelerated=accelerated,
        reason_to_skip=lambda block: None,  # `match` has already checked the block
        parts=(attention,),
        input_shape=lambda block: (*_map(form, block), block.attn.qkv.in_features),
        weight=_qkv_weight,
        run=functools.partial(_call, form),
        # If a mask passed as an argument differs from the standard mask, or if a compiler cannot read it, the block
        # runs its own code. Its attention then still uses the op, which accepts any mask as a dense bias.
        looks_inside=form.mask_from == "argument",
        why_not_recompute=lambda block: _halves_of(form, block).why_not_in_training(block),
    )
