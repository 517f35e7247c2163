"""Adapters for window attention modules of unknown classes inside blocks that match no known form, such as HAT's.

Only the attention module is replaced. The block still rolls the map and partitions it into windows, so the speedup is
smaller than with a replaced block. The block's code does not matter, because x, the mask and, in HAT, the index into
the bias table are arguments of the attention module. The op receives the sum of bias and mask as a dense bias, so the
mask may have any values. The windows of an image become the rows of a map, (images, windows, N, C), and each window of
the op is one row. A class is replaced only after a trial with random masks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import Adapter, original_class, swap_class
from swinkernels.adapters.bypass import replaced_forward, why_not_window_attention
from swinkernels.adapters.copies.dynamic_class import (
    NAME,
    DynamicSubclass,
    dynamic_subclass,
    others_are_default,
    parameters_of,
)
from swinkernels.adapters.copies.snapshot import Snapshot
from swinkernels.adapters.copies.trial import MOST_SCORES, Case, NotCovered, Trial, Verdicts, narrow
from swinkernels.adapters.microsoft_attention import (
    bias_table,
    dropout_at_call,
    dropout_p,
    is_cosine,
    projected,
    qkv_bias,
    qkv_of,
    resembles_attention,
    score_factor,
)
from swinkernels.adapters.part import Part
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits
from swinkernels.ops.window_attention import spec_of, window_attention_reasons

_INDEX = ("rpi", "relative_position_index")
_IMAGES, _WINDOWS = 2, 3  # images, and windows per image, in a trial


@dataclass(frozen=True)
class Form:
    """The names of the arguments that follow x in the forward of a window attention module."""

    # The argument that holds the index into the bias table, or None if the index is a buffer of the module.
    index: str | None
    mask: str


def _form_by_signature(original: Any) -> Form | None:
    """Infer the form from the signature of ``original.forward``.

    Return None if no mask follows x, or if an argument after the mask has no default.
    """
    taken = parameters_of(original)
    names = [p.name for p in taken]
    index = names[1] if len(names) > 2 and names[1] in _INDEX else None
    rest = taken[1 if index is None else 2 :]
    if not rest or "mask" not in rest[0].name or any(p.default is p.empty for p in rest[1:]):
        return None
    return Form(index, rest[0].name)


def _volume(attn: Any) -> int:
    """Return N, the number of tokens in a window."""
    window = attn.window_size
    return math.prod(window) if isinstance(window, (tuple, list)) else window**2


def _why_beyond_limits(attn: Any, n: int) -> str | None:
    """Return the reason why the op rejects windows of ``n`` tokens with the head dimension of ``attn``, or None."""
    return why_beyond_limits(attn.qkv.out_features // (3 * attn.num_heads), (n,))


def _attend(form: Form, attn: Any, x: Tensor, index: Any, mask: Any) -> Tensor | str:
    """Return the output of ``attn`` for the windows ``x``, computed by the op, or the reason why its own code must run.

    ``index`` is used only if ``form`` has an index argument.
    """
    reason = attn._swinkernels_changed() or why_not_window_attention(attn)
    if reason is not None:
        return reason
    if x.dim() != 3:
        return f"x has {x.dim()} axes, not 3"
    n = x.shape[1]
    beyond = _why_beyond_limits(attn, n)
    if beyond is not None:
        return beyond
    if form.index is None:
        index = attn.relative_position_index
    if not isinstance(index, Tensor) or index.shape != (n, n):
        return f"its index is not for windows of {n} tokens"
    windows = 1
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 3 or mask.shape[1:] != (n, n) or x.shape[0] % mask.shape[0]:
            return "the mask does not have the shape (windows, N, N)"
        windows = mask.shape[0]
    qkv = qkv_of(attn, x, qkv_bias(attn))
    bias = bias_table(attn)[index.reshape(-1)].reshape(n, n, -1).permute(2, 0, 1)
    out = window_attention_qkvpacked(
        qkv.reshape(-1, windows, n, qkv.shape[-1]),
        bias=bias if mask is None else bias + mask[:, None],
        num_heads=attn.num_heads,
        window_size=(1, n),
        **score_factor(attn),
        dropout_p=dropout_at_call(attn),
        backend=attn._swinkernels_backend,
    )
    return projected(attn, out.reshape(x.shape[0], n, -1))


class StructuralAttention(DynamicSubclass):
    """A window attention module that calls the op, with the sum of bias and mask as a dense bias.

    The module's own forward runs if the op cannot replace it: with hooks on inner modules, with layers other than
    nn.Linear, with windows of another size, while the code is traced, and after any change since the trial.
    """

    _swinkernels_form: Form
    _swinkernels_in_trial = False

    def _swinkernels_swapped(self) -> None:
        self.__dict__["_swinkernels_snapshots"] = {"": Snapshot(self)}

    def _swinkernels_call(self, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | str:
        """Return the module's output, computed by the op, or the reason why the module's own code has to run."""
        if self._swinkernels_own_code(x):
            return "its code is traced or was replaced, or no kernel runs on the device"
        form = self._swinkernels_form
        names = [name for name in (form.index, form.mask) if name is not None]
        given = dict(zip(names, args, strict=False))
        args = args[len(given) :]
        if kwargs:
            named = {name: kwargs[name] for name in names if name in kwargs and name not in given}
            given.update(named)
            kwargs = {name: value for name, value in kwargs.items() if name not in named}
        if (args or kwargs) and not others_are_default(self._swinkernels_others, args, kwargs):
            return "it is called with arguments that its form does not have"
        return _attend(form, self, x, given.get(form.index or ""), given.get(form.mask))

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        out = self._swinkernels_call(x, args, kwargs)
        if not isinstance(out, str):
            return out
        if self._swinkernels_in_trial:
            raise NotCovered(out)
        return super().forward(x, *args, **kwargs)


# The trial


def _call(form: Form, attn: Any, x: Tensor) -> Tensor:
    """Call ``attn`` on the windows ``x`` with a random mask and without a mask; return both outputs, concatenated."""
    n = x.shape[1]
    generator = torch.Generator("cpu").manual_seed(6)
    mask = 3 * torch.randn(min(_WINDOWS, len(x)), n, n, generator=generator, device="cpu").to(x)
    index: list[Tensor] = []
    if form.index is not None:
        rows = bias_table(attn).shape[0]
        index = [torch.randint(rows, (n, n), generator=generator, device="cpu").to(x.device)]
    return torch.cat([type(attn).forward(attn, x, *index, m) for m in (mask, None)])


def _put_in_place(form: Form, attn: nn.Module) -> None:
    original: Any = original_class(attn)
    swap_class(_adapter(original, form), attn, "reference")
    attn.__dict__["_swinkernels_in_trial"] = True


_TRIALS = Verdicts()


def _why_not(attn: Any, form: Form) -> str | None:
    """Check the op's limits and run a trial; return the reason why the op cannot replace ``attn``, or None."""
    beyond = _why_beyond_limits(attn, _volume(attn))
    if beyond is not None:
        return beyond
    if any(p.is_meta for p in attn.parameters()):
        return "its parameters are on the meta device, and an unknown class is replaced only after a trial with values"
    make = functools.partial(Trial, attn, functools.partial(_put_in_place, form), functools.partial(_call, form))
    return _TRIALS.why_not(attn, (), narrow(attn.qkv.in_features, attn.num_heads), make, _attempt)


def _attempt(trial: Trial) -> str | None:
    attn, width = trial.module, trial.width
    n, channels, heads = _volume(attn), attn.qkv.in_features, attn.num_heads
    if width is not None:
        channels, heads = width.to_channels, width.to_heads
    windows = 1 if trial.is_short else _IMAGES * _WINDOWS
    if windows * heads * n * n > MOST_SCORES:
        windows = min(windows, _WINDOWS)
    passed, reason = trial.run([Case((windows, n, channels), "windows", 2 * windows * heads * n * n)])
    return None if passed else f"it looks like a window attention, but {reason}"


def match(module: nn.Module) -> tuple[Adapter | None, str | None] | None:
    """Return (adapter, None) or (None, reason) if ``module`` resembles a window attention module, else None."""
    original: Any = original_class(module)
    if not resembles_attention(module) or not hasattr(module, "window_size"):
        return None
    form = _form_by_signature(original)
    if form is None:
        return None
    try:
        reason = replaced_forward(module) or why_not_window_attention(module) or _why_not(module, form)
    except Exception as error:  # an unknown class may store anything in its attributes
        reason = f"its attributes do not fit a window attention: {type(error).__name__}: {error}"
    return (_adapter(original, form), None) if reason is None else (None, reason)


# The adapter


def _part_reasons(attn: Any, backend: str, training: bool) -> list[str]:
    """Return the reasons why ``backend`` cannot run the op for ``attn`` on windows with a mask."""
    weight, heads, n = attn.qkv.weight, attn.num_heads, _volume(attn)
    bias = torch.empty((2, heads, n, n), device="meta")
    head_dim = weight.shape[0] // (3 * heads)
    spec = spec_of(
        "accelerate",
        bias,
        (2, n),
        head_dim,
        num_heads=heads,
        window_size=(1, n),
        bias=bias,
        logit_scale=torch.empty(heads, device="meta") if is_cosine(attn) else None,
        dropout_p=dropout_p(attn) if training else 0.0,
    )
    return window_attention_reasons(backend, spec, head_dim, weight.dtype, weight.device)


@functools.cache
def _adapter(original: Any, form: Form) -> Adapter:
    return Adapter(
        name=NAME,
        original=original,
        accelerated=dynamic_subclass(
            StructuralAttention,
            original,
            form,
            _adapter,
            _swinkernels_others=tuple(parameters_of(original)[2 if form.index is None else 3 :]),
        ),
        reason_to_skip=lambda attn: None,  # `match` has already checked the module
        parts=(Part("attention", "window_attention", why_not_window_attention, _part_reasons),),
        input_shape=lambda attn: (_WINDOWS * _volume(attn), attn.qkv.in_features),
        weight=lambda attn: attn.qkv.weight,
        run=lambda attn, x: _call(form, attn, x.reshape(-1, _volume(attn), x.shape[-1])),
    )
