"""Shifted-window attention: schema, fake, autograd formula and the two public functions.

The fast backends are ops of ``torch.ops.swinkernels``: ``window_attention_fwd``, ``window_attention_bwd`` and their
``_qkvpacked`` forms, whose backward writes one dqkv. C++ kernels attach to them under the CPU and CUDA dispatch keys;
Triton shares the CUDA key, so it has the same ops again with the suffix ``_triton``. The reference is plain PyTorch and
needs no op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments
from swinkernels.ops._arguments import Ints
from swinkernels.ops._backends import choose_window_attention, constant_when_compiled
from swinkernels.ops._library import (
    Differentiable,
    Found,
    autocast_dtype,
    call_key,
    is_plain,
    lib,
    parameter_gradients,
    register,
    register_derivative,
    three,
)

# The geometry as WindowGeometry of csrc/params/window_attention.h has it: three values a list, slowest axis first; 2D
# has a leading axis of one token. The maps keep their own rank.
_GEOMETRY = (
    "int[] window_size, int[] shift_size, int[] table_window, int[] pad_before, int[] periodic, "
    "bool roll_then_pad, bool grid, float scale, float mask_value, float dropout_p, bool allow_tf32"
)
_GEOMETRY_ARGUMENTS = _GEOMETRY.count(",") + 1
# All float32 but pad_qkv (the map's dtype), region_map (int32) and dropout_seed (one int64 on the map's device).
_TABLES = (
    "Tensor? bias_table, Tensor? bias, Tensor? logit_scale, Tensor? pad_qkv, Tensor? region_map, Tensor? dropout_seed"
)
# The first of the tables are those that have a gradient.
_DIFFERENTIABLE = ("bias_table", "bias", "logit_scale", "pad_qkv")
_SUMS = ", ".join(f"Tensor d{table}" for table in _DIFFERENTIABLE)
_FORMS = {"window_attention_qkvpacked": ("qkv",), "window_attention": ("q", "k", "v")}


def _define(name: str, maps: tuple[str, ...], suffix: str) -> Differentiable:
    """The forward and backward op of one form: what they take and return, and how autograd joins them. What to call."""
    n = len(maps)
    inputs = ", ".join(f"Tensor {m}" for m in maps)
    gradients = ", ".join(f"Tensor d{m}" for m in maps)
    fwd, bwd = f"{name}_fwd{suffix}", f"{name}_bwd{suffix}"
    # lse is what the backward op needs of the forward; (0,) where it is not asked for.
    lib.define(f"{fwd}({inputs}, {_TABLES}, {_GEOMETRY}, bool needs_lse=True) -> (Tensor out, Tensor lse)")
    needs = ", ".join(f"bool needs_d{table}" for table in _DIFFERENTIABLE)
    lib.define(f"{bwd}(Tensor dout, {inputs}, Tensor lse, {_TABLES}, {_GEOMETRY}, {needs}) -> ({gradients}, {_SUMS})")

    def fake_fwd(*args):
        x, window_size = args[0], args[n + 6]
        num_heads, head_dim = x.shape[-2:]
        size = x.shape[1 : -3 if n == 1 else -2]
        window = tuple(window_size[-len(size) :])
        windows = math.prod(_arguments.frame_size(size, window)) // math.prod(window)
        out = x.new_empty((x.shape[0], *size, num_heads * head_dim))
        needs_lse = all(args[n + 6 + _GEOMETRY_ARGUMENTS :])  # left out where it is True
        lse_shape = (x.shape[0], windows, num_heads, math.prod(window)) if needs_lse else (0,)
        return out, x.new_empty(lse_shape, dtype=torch.float32)

    def fake_bwd(*args):
        xs, tables, needed = args[1 : 1 + n], args[2 + n : 6 + n], args[-4:]
        num_heads, head_dim = xs[0].shape[-2:]
        shapes = [None if t is None else t.shape for t in tables[:3]] + [(3, num_heads, head_dim)]
        sums = [
            xs[0].new_empty(shape if need else (0,), dtype=torch.float32)
            for shape, need in zip(shapes, needed, strict=True)
        ]
        return *(x.new_empty(x.shape) for x in xs), *sums

    op = getattr(torch.ops.swinkernels, fwd).default
    short_fwd, short_bwd = (op, op) if suffix else _define_short(name, maps)

    def run(tensors, geometry, needs_lse):
        if type(geometry) is _Geometry:
            return short_fwd(*tensors, geometry.numbers, needs_lse)
        return op(*tensors, *geometry, needs_lse)

    def setup_context(ctx, tensors, geometry, output):
        ctx.set_materialize_grads(False)  # zeros for lse would be a kernel
        ctx.geometry = geometry if type(geometry) is _Geometry else geometry[:_GEOMETRY_ARGUMENTS]
        ctx.save_for_backward(*tensors[:n], output[1], *tensors[n:])
        ctx.mark_non_differentiable(output[1])

    backward_op = register_derivative(bwd, fake_bwd, name)

    def backward(ctx, dout, _dlse):
        if dout is None:
            return (None,) * (n + 6)
        saved, needs, geometry = ctx.saved_tensors, ctx.needs_input_grad[n : n + 4], ctx.geometry
        if type(geometry) is _Geometry and not torch.is_grad_enabled() and is_plain((dout, *saved)):
            with torch._C._AutoDispatchBelowAutograd():
                wanted = sum(1 << i for i, need in enumerate(needs) if need)
                gradients = short_bwd(dout, *saved, geometry.numbers, wanted)
        else:
            gradients = backward_op((dout, *saved), (*geometry, *needs))
        return *gradients[:n], *parameter_gradients(saved[n + 1 : n + 5], gradients[n:], needs), None, None

    return register(fwd, fake_fwd, setup_context, backward, run, is_told=True)


def _define_short(name: str, maps: tuple[str, ...]) -> tuple[Callable, Callable]:
    """A second entry to the kernels in C++, at half the host time: what is no tensor comes as one tensor, and a table
    in any shape of its size, which is its gradient's, too.

    Only eager PyTorch takes it, below autograd, so it needs neither fake nor derivative.
    """
    inputs, gradients = (", ".join(f"Tensor {d}{m}" for m in maps) for d in ("", "d"))
    fwd, bwd = f"{name}_fwd_short", f"{name}_bwd_short"
    lib.define(f"{fwd}({inputs}, {_TABLES}, Tensor numbers, bool needs_lse) -> (Tensor out, Tensor lse)")
    # wanted: a bit for each of the sums; those that are not wanted are one empty tensor.
    lib.define(
        f"{bwd}(Tensor dout, {inputs}, Tensor lse, {_TABLES}, Tensor numbers, int wanted) -> ({gradients}, {_SUMS})"
    )
    return getattr(torch.ops.swinkernels, fwd).default, getattr(torch.ops.swinkernels, bwd).default


class _Geometry(tuple):
    """The arguments of an op after its tensors, and the same as one tensor for its short entry."""

    numbers: Tensor

    def __new__(cls, arguments: Sequence[Any]) -> _Geometry:
        self = super().__new__(cls, arguments)
        flat = [v for argument in arguments for v in (argument if isinstance(argument, list) else [argument])]
        self.numbers = torch.tensor(flat, dtype=torch.float64, device="cpu")
        return self


_FORWARD = {(form, suffix): _define(form, maps, suffix) for form, maps in _FORMS.items() for suffix in ("", "_triton")}
# The backends whose kernels have a short entry, which an older build of the extension lacks.
_HAS_SHORT = {
    key.lower()
    for key in ("CPU", "CUDA")
    if torch._C._dispatch_has_kernel_for_dispatch_key("swinkernels::window_attention_fwd_short", key)
}


@constant_when_compiled  # as torch's own matmul settles it, too
def _tf32_switch() -> bool:
    """Torch's switch for float32 products on CUDA, in whichever of its forms it was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# The public functions' arguments, in the order in which they are handed on.
_TENSORS = ("bias_table", "bias", "logit_scale", "pad_qkv", "region_map")
_OPTIONS = (
    "num_heads", "window_size", "shift_size", "scale", "table_window", "pad_order", "pad_before", "periodic",
    "mask_value", "dropout_p", "grid", "return_attention",
)  # fmt: skip


class _Plan(NamedTuple):
    """What a call comes to. Found out from what its tensors are, not from what they hold, and holds none itself."""

    backend: str
    dtype: torch.dtype  # of the maps where they are computed with
    view: tuple[int, ...] | None  # of a map (B, *S, 3C)
    options: dict[str, Any]  # of the reference
    op: Differentiable | None  # of any other backend
    geometry: tuple[tuple[Any, ...], ...]  # what that op takes after its tensors: without TF32, and with it
    has_padding: bool
    fits: bool  # the tables are as the op takes them
    asks_for_tf32: bool


_PLANS = Found()


def _make_plan(
    form: str,
    maps: tuple[Any, ...],
    tables: tuple[Any, ...],
    generator: Any,
    options: tuple[Any, ...],
    requested: Any,
    is_kept: bool,
) -> _Plan:
    """Check every argument and choose the backend. What is kept for later calls may cost more."""
    x = maps[0]
    if form == "window_attention_qkvpacked":
        x = _arguments.check_qkvpacked(form, x, options[0])
        size = x.shape[1:-3]
    else:
        q, k, v = maps
        _arguments.check_separate(form, q, k, v, options[0])
        size = x.shape[1:-2]
    args = _arguments.check_arguments(
        form,
        x,
        size,
        x.shape[-1],
        generator=generator,
        **dict(zip(_TENSORS, tables, strict=True)),
        **dict(zip(_OPTIONS, options, strict=True)),
    )
    dtype = autocast_dtype(x) or x.dtype
    backend = choose_window_attention(requested, args, dtype, x.device)
    op = None if backend == "reference" else _FORWARD[form, "_triton" if backend == "triton" else ""]
    is_short = is_kept and backend in _HAS_SHORT
    geometry = _Geometry if is_short else tuple
    values = (
        three(args.window_size, 1),
        three(args.shift_size, 0),
        three(args.table_window, 1),
        three(args.pad_before, 0),
        three(args.periodic, False),
        args.pad_order == "roll_then_pad",
        args.grid,
        args.scale,
        args.mask_value,
        args.dropout_p,
    )
    pad_qkv, region_map = args.pad_qkv, args.region_map
    wide = [t for t in (args.bias_table, args.bias, args.logit_scale) if t is not None]
    return _Plan(
        backend=backend,
        dtype=dtype,
        view=tuple(x.shape) if x is not maps[0] else None,
        options={name: getattr(args, name) for name in _OPTIONS},
        op=op,
        geometry=tuple(geometry((*values, allow_tf32)) for allow_tf32 in (False, True)),
        has_padding=args.has_padding,
        fits=all(t.dtype == torch.float32 for t in wide)
        and (pad_qkv is None or not args.has_padding or pad_qkv.dtype == dtype)
        and (region_map is None or region_map.dtype == torch.int32)
        and (
            is_short
            or all(t is None or t.dim() == d for t, d in ((args.logit_scale, 1), (pad_qkv, 3), (region_map, 3)))
        )
        and args.dropout_p == 0.0,
        asks_for_tf32=x.is_cuda and dtype == torch.float32,
    )


def _fit(
    plan: _Plan, tables: tuple[Tensor | None, ...], device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor | None, ...]:
    """The tables as the op takes them, and the seed of the dropout."""
    *biases, logit_scale, pad_qkv, region_map = tables
    num_heads, seed = plan.options["num_heads"], None
    biases = [None if t is None else t.to(torch.float32) for t in biases]
    if logit_scale is not None:
        logit_scale = logit_scale.to(torch.float32).reshape(num_heads)
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(plan.dtype).reshape(3, num_heads, -1)
    if region_map is not None:
        region_map = region_map.to(torch.int32).reshape(three(region_map.shape, 1))
    if plan.options["dropout_p"] > 0.0:  # drawn on the device, so that every replay of a CUDA graph draws anew
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)
    return *biases, logit_scale, pad_qkv, region_map, seed


def _attend(
    form: str,
    maps: tuple[Any, ...],
    tables: tuple[Any, ...],
    generator: Any,
    options: tuple[Any, ...],
    requested: Any,
) -> Any:
    """Run one form with ``tables`` for _TENSORS and ``options`` for _OPTIONS."""
    plain = is_plain(maps + tables)
    key = plan = None
    if plain and generator is None:
        autocast = autocast_dtype(maps[0]) if torch._C._is_any_autocast_enabled() else None
        key = call_key(maps + tables, (form, requested, *options), autocast)
        plan = _PLANS.get(key)
    if plan is None:
        plan = _make_plan(form, maps, tables, generator, options, requested, key is not None)
        if key is not None:
            _PLANS.put(key, plan)
    if maps[0].dtype != plan.dtype:
        maps = tuple(x.to(plan.dtype) for x in maps)
    if plan.view is not None:
        maps = (maps[0].view(plan.view),)
    if tables[3] is not None and not plan.has_padding:  # nothing reads what a pad token holds
        tables = (*tables[:3], None, tables[4])
    if plan.op is None:
        return getattr(reference, form)(
            *maps, **dict(zip(_TENSORS, tables, strict=True)), **plan.options, generator=generator
        )
    tables = (*tables, None) if plan.fits else _fit(plan, tables, maps[0].device, generator)
    geometry = plan.geometry[1 if plan.asks_for_tf32 and _tf32_switch() else 0]
    out, _ = plan.op.plain(maps + tables, geometry) if plain else plan.op(*maps, *tables, *geometry)
    return out


def window_attention_qkvpacked(
    qkv: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Ints,
    shift_size: Ints = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    table_window: Ints | None = None,
    logit_scale: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    pad_order: str = "pad_then_roll",
    pad_before: Ints = 0,
    periodic: bool | Sequence[bool] = False,
    region_map: Tensor | None = None,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    grid: bool = False,
    backend: str = "auto",
    return_attention: bool = False,
) -> Any:  # a Tensor, or two
    r"""Attention inside the shifted windows of a feature map, read from the map and written back to it.

    In every window, for tokens i and j and each head,

    .. math:: out_i = \sum_j softmax_j(scale \cdot q_i \cdot k_j + bias_{r(i,j)} + mask_{ij}) \, v_j

    with the cosine of q_i and k_j times ``exp(min(logit_scale, ln 100))`` in place of the scaled product if
    ``logit_scale`` is given. ``mask`` is ``mask_value`` where the shift brought tokens of different parts of the map
    into one window, else 0. Softmax and sums are in float32.

    Args:
        qkv: (B, \*S, 3C) or (B, \*S, 3, num_heads, head_dim), S = (H, W) or (D, H, W), in image order, any strides;
            float32, float16, bfloat16, or float64 (reference only). Under autocast it is cast to the autocast dtype.
        bias_table: relative position bias, (prod(2 * window - 1), num_heads), any floating dtype, used in float32.
        num_heads: heads; C = num_heads * head_dim, head_dim 1..128.
        window_size: tokens per axis, an int or one per axis, slowest first; at most 1024 tokens in all.
        shift_size: tokens per axis, 0..window - 1; a shift of s is ``torch.roll(x, -s)``.
        scale: factor of the scores, head_dim ** -0.5 by default; excludes ``logit_scale``.
        bias: dense bias instead of the table: (num_heads, N, N), or (window types, num_heads, N, N) with the types
            following the slowest axes of the windows; N is the number of tokens of a window.
        table_window: the window for which ``bias_table`` was made, if it is not ``window_size``: token t of the
            window is looked up as token t (row-major) of this one (MONAI and Video-Swin number clamped windows so).
        logit_scale: v2: per-head log-factor, num_heads values.
        pad_qkv: what q, k and v of a pad token are, (3C,) or (3, num_heads, head_dim): the bias of the QKV Linear in
            models that pad its input with zeros. Zero by default. Pad tokens are attended to.
        pad_order: where S is not a multiple of the window: "pad_then_roll" (Microsoft, torchvision, transformers,
            MONAI, mmpretrain) or "roll_then_pad" (timm).
        pad_before: pad tokens before the data, per axis; the rest follow it.
        periodic: per axis, whether the map wraps around (longitude), so that the shift needs no mask there.
        region_map: int32 or narrower, of the padded map's shape, in place of the shift's regions; tokens whose values
            differ are masked.
        mask_value: added to the score of masked pairs; finite.
        dropout_p: probability of dropping an attention weight, 0..1; draws from ``generator`` or torch's default.
        grid: a window's tokens are strided over the map instead of a block (MaxViT); has no shift.
        backend: "auto", "cuda", "triton", "cpu" or "reference". "auto" takes the fastest that can run the call.
        return_attention: also return the attention weights, which only the reference does: the fast backends never
            have them all.

    Returns:
        (B, \*S, C) in the dtype of qkv, contiguous. An empty batch gives an empty result. Differentiable in qkv,
        bias_table, bias, logit_scale and pad_qkv, each gradient in its tensor's dtype; the same input gives the same
        bits. Twice differentiable with backend="reference" only. With return_attention a pair of that and the weights
        that the rows of v are summed by, (B, num_windows, num_heads, N, N), in the same dtype and differentiable, too:
        after softmax and dropout, as the models of transformers return them. The windows are in row-major order of the
        shifted map, and pad tokens are among their N tokens.

    Raises:
        ValueError, TypeError: a wrong argument, named with what was got and what is accepted.
        NotImplementedError: the requested backend cannot run this call, with the reasons.

    Source: Swin Transformer (Liu et al., 2021), section 3.2; Swin Transformer V2 (Liu et al., 2022), section 3.
    """
    return _attend(
        "window_attention_qkvpacked",
        (qkv,),
        (bias_table, bias, logit_scale, pad_qkv, region_map),
        generator,
        (
            num_heads,
            window_size,
            shift_size,
            scale,
            table_window,
            pad_order,
            pad_before,
            periodic,
            mask_value,
            dropout_p,
            grid,
            return_attention,
        ),
        backend,
    )


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias_table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Ints,
    shift_size: Ints = 0,
    scale: float | None = None,
    bias: Tensor | None = None,
    table_window: Ints | None = None,
    logit_scale: Tensor | None = None,
    pad_qkv: Tensor | None = None,
    pad_order: str = "pad_then_roll",
    pad_before: Ints = 0,
    periodic: bool | Sequence[bool] = False,
    region_map: Tensor | None = None,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    generator: torch.Generator | None = None,
    grid: bool = False,
    backend: str = "auto",
    return_attention: bool = False,
) -> Any:  # a Tensor, or two
    r"""Attention inside the shifted windows of a feature map, from separate q, k and v.

    As :func:`window_attention_qkvpacked`, which documents the formula and the other arguments, but with q, k and v as
    three tensors.

    Args:
        q, k, v: (B, \*S, num_heads, head_dim) each, of one shape, dtype and device, any strides.

    Returns:
        (B, \*S, C) in the dtype of q, C = num_heads * head_dim; with return_attention a pair of that and the weights.
    """
    return _attend(
        "window_attention",
        (q, k, v),
        (bias_table, bias, logit_scale, pad_qkv, region_map),
        generator,
        (
            num_heads,
            window_size,
            shift_size,
            scale,
            table_window,
            pad_order,
            pad_before,
            periodic,
            mask_value,
            dropout_p,
            grid,
            return_attention,
        ),
        backend,
    )
