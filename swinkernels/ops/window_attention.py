"""Shifted-window attention: schemas, fake kernels, autograd formula and the two public functions.

The fast backends are ops of ``torch.ops.swinkernels``: ``window_attention_fwd``, ``window_attention_bwd`` and their
``_qkvpacked`` forms, whose backward writes one dqkv. C++ kernels implement them under the CPU and CUDA dispatch keys.
Triton shares the CUDA key, so its kernels have separate ops, with the suffix ``_triton``. The backends in plain
PyTorch need no op.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, _backends, fallback
from swinkernels.ops._arguments import Ints
from swinkernels.ops._backends import PLAIN, choose
from swinkernels.ops._library import (
    Differentiable,
    Found,
    any_requires_grad,
    autocast_dtype,
    call_key,
    constant_when_compiled,
    define,
    is_plain,
    is_untraced,
    parameter_gradients,
    register,
    register_derivative,
    three,
)
from swinkernels.window_spec import WindowSpec

# The op's tables are float32 except pad_qkv (the map's dtype), region_map (int32) and dropout_seed (one int64 on the
# map's device). bias is dense or, if the spec has axis_tables, their concatenation.
_TABLES = (
    "Tensor? bias_table, Tensor? bias, Tensor? logit_scale, Tensor? pad_qkv, Tensor? region_map, Tensor? dropout_seed"
)
# The first four tables, which have gradients.
_DIFFERENTIABLE = ("bias_table", "bias", "logit_scale", "pad_qkv")
_SUMS = ", ".join(f"Tensor d{table}" for table in _DIFFERENTIABLE)
_SPEC = "str spec, float scale, float mask_value, float dropout_p"  # WindowSpec's wire() and numbers
_FORMS = {"window_attention_qkvpacked": ("qkv",), "window_attention": ("q", "k", "v")}


_UNKNOWN = (1.0, 0.0, 0.0)  # stands for the spec's numbers, which are not used and may be symbolic


def _define(name: str, maps: tuple[str, ...], suffix: str) -> Differentiable:
    """Define the forward and backward ops of form ``name`` and their derivatives; return the forward's callable."""
    n = len(maps)
    inputs = ", ".join(f"Tensor {m}" for m in maps)
    gradients = ", ".join(f"Tensor d{m}" for m in maps)
    fwd, bwd = f"{name}_fwd{suffix}", f"{name}_bwd{suffix}"
    # lse is empty unless the spec requests it.
    define(f"{fwd}({inputs}, {_TABLES}, {_SPEC}) -> (Tensor out, Tensor lse)")
    # Bit i of wanted requests the gradient of _DIFFERENTIABLE[i]; a gradient that is not requested is empty.
    define(f"{bwd}(Tensor dout, {inputs}, Tensor lse, {_TABLES}, {_SPEC}, int wanted) -> ({gradients}, {_SUMS})")

    def fake_fwd(*args):
        x, spec = args[0], WindowSpec.parse(args[-4], *_UNKNOWN)
        num_heads, head_dim = x.shape[-2:]
        size = x.shape[1 : -3 if n == 1 else -2]
        windows = math.prod(_arguments.frame_size(size, spec.window_size)) // spec.volume
        lse_shape = (x.shape[0], windows, num_heads, spec.volume) if spec.needs_lse else (0,)
        out = x.new_empty((x.shape[0], *size, num_heads * head_dim))
        return out, x.new_empty(lse_shape, dtype=torch.float32)

    def fake_bwd(*args):
        xs, tables, wanted = args[1 : 1 + n], args[2 + n : 6 + n], args[-1]
        shapes = [None if t is None else t.shape for t in tables]
        sums = [
            xs[0].new_empty(shape if wanted >> i & 1 else (0,), dtype=torch.float32) for i, shape in enumerate(shapes)
        ]
        return *(x.new_empty(x.shape) for x in xs), *sums

    def setup_context(ctx, tensors, others, output):
        ctx.set_materialize_grads(False)  # otherwise autograd materialises zero gradients for lse
        ctx.spec = others
        ctx.save_for_backward(*tensors[:n], output[1], *tensors[n:])
        ctx.mark_non_differentiable(output[1])

    backward_op = register_derivative(bwd, fake_bwd, name, functools.partial(_reference_gradients, name))

    def backward(ctx, dout, _dlse):
        if dout is None:
            return (None,) * (n + 6)
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[n : n + 4]
        wanted = sum(1 << i for i, need in enumerate(needs) if need)
        gradients = backward_op((dout, *saved), (*ctx.spec, wanted))
        return *gradients[:n], *parameter_gradients(saved[n + 1 : n + 5], gradients[n:], needs), None, None

    return register(fwd, fake_fwd, setup_context, backward)


def _reference_gradients(form: str, tensors: Sequence[Any], others: tuple[Any, ...]) -> tuple[Tensor | None, ...]:
    """Compute the results of the backward op of ``form`` with the reference, for second derivatives."""
    *numbers, wanted = others
    spec = WindowSpec.parse(*numbers)
    if spec.dropout_p > 0.0:
        raise NotImplementedError(
            f"the kernels do not implement second derivatives of {form} with dropout_p = {spec.dropout_p}: use "
            "backend='torch' or 'reference', or set dropout_p to 0"
        )
    n = len(_FORMS[form])
    dout, *maps = tensors[: 1 + n]
    tables = tensors[2 + n : 6 + n]
    region_map = tensors[6 + n]
    if region_map is not None:  # it was expanded to three axes for the op
        region_map = region_map.reshape(region_map.shape[-len(spec.window_size) :])
    is_wanted = [bool(wanted >> i & 1) for i in range(len(tables))]

    def attend(*given: Tensor) -> Tensor:
        found = iter(given[n:])
        named: dict[str, Any] = {
            name: next(found) if need else t for name, t, need in zip(_DIFFERENTIABLE, tables, is_wanted, strict=True)
        }
        if spec.axis_tables:
            named["axis_tables"] = named.pop("bias").split([2 * w - 1 for w in spec.window_size])
        return getattr(reference, form)(
            *given[:n],
            **named,
            region_map=region_map,
            num_heads=maps[0].shape[-2],
            **spec.options(),
        )

    vjp = torch.func.vjp(attend, *maps, *(t for t, need in zip(tables, is_wanted, strict=True) if need))[1]
    found = iter(vjp(dout))
    return *(next(found) for _ in maps), *(next(found) if need else None for need in is_wanted)


_FORWARD = {(form, suffix): _define(form, maps, suffix) for form, maps in _FORMS.items() for suffix in ("", "_triton")}


@constant_when_compiled  # torch.compile also treats the switch as a constant for torch's own matmul
def _tf32_switch() -> bool:
    """Return True if torch allows TF32 products on CUDA, whichever of its switches was set."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# The tensor arguments of the public functions, in the order in which :func:`_attend` takes them.
_TENSORS = ("bias_table", "bias", "logit_scale", "pad_qkv", "region_map")


def spec_of(
    op: str, tokens: Tensor, size: Sequence[int], head_dim: int, *, num_heads: int, **arguments: Any
) -> WindowSpec:
    """Check the public functions' arguments for a map of ``size`` tokens and return the spec of the call."""
    tables = {name: arguments.pop(name, None) for name in (*_TENSORS, "axis_tables")}
    spec = _arguments.make_window_spec(op, len(size), head_dim, tables=tables, **arguments)
    _arguments.check_window_call(op, spec, tokens, size, num_heads, head_dim, tables)
    return spec


# In one tile, Triton's kernels hold a column for each key coordinate on each axis. With 256 columns a block needs 80 KB
# of shared memory; with 512 the forward kernel needs 104 KB and the backward kernel for q takes minutes to compile.
_MOST_AXIS_COLUMNS = 256


def _axis_tables_reasons(
    backend: str, spec: WindowSpec, head_dim: int, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """List the reasons why a backend cannot compute the axis_tables of a call."""
    reasons = []
    if backend == "triton" and sum(spec.window_size) > _MOST_AXIS_COLUMNS:
        reasons.append(
            f"with axis_tables the tokens per axis of a window may add up to {_MOST_AXIS_COLUMNS}, got "
            f"{' + '.join(map(str, spec.window_size))}"
        )
    if backend == "cuda" and (limits := _backends.LIMITS.get("cuda")) is not None:
        window, widest = limits["max_axis_tables_window"], limits["max_axis_tables_head_dim"]
        size = " x ".join(map(str, spec.window_size))
        if dtype == torch.float32:
            reasons.append("with axis_tables it has kernels for float16 and bfloat16, got float32")
        if len(spec.window_size) != 2 or max(spec.window_size) > window:
            reasons.append(f"with axis_tables it takes windows of at most {window} x {window} tokens, got {size}")
        if head_dim > widest or head_dim % 8 != 0:
            reasons.append(f"with axis_tables head_dim must be a multiple of 8 of at most {widest}, got {head_dim}")
        if spec.dropout_p > 0.0:
            reasons.append("with axis_tables it does not implement dropout_p")
        in_less = limits["max_axis_tables_volume_in_less"]
        if not _backends.has_room_for_longest(backend, device) and spec.volume > in_less:
            reasons.append(
                f"with axis_tables it takes windows of at most {in_less} tokens on a GPU with less than "
                f"{limits['shared_bytes_of_longest'] // 1024} KB of shared memory per block, got {size}"
            )
    return reasons


def window_attention_reasons(
    backend: str,
    spec: WindowSpec,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    return_attention: bool = False,
) -> list[str]:
    """List the reasons why a backend cannot run a call of window attention."""
    if backend in PLAIN:
        return []
    reasons = _backends._reasons(backend, "window_attention", device) + _backends._dtype_reasons(backend, dtype)
    if spec.dropout_p > 0.0 and backend == "cpu":
        reasons.append("it does not implement dropout_p")
    if spec.axis_tables:
        reasons += _axis_tables_reasons(backend, spec, head_dim, dtype, device)
    if spec.key_window != spec.window_size and backend == "cuda":
        reasons.append("it does not implement key_window")
    if return_attention:
        reasons.append("it does not return the attention weights (return_attention)")
    return reasons + _backends.window_volume_reasons(backend, spec.volume, device)


class _Plan(NamedTuple):
    """The decisions about a call. They can be cached, because they depend only on its options and on tensor metadata
    (shape, dtype, device), never on tensor values.
    """

    backend: str
    dtype: torch.dtype  # dtype of the maps passed to the op
    view: tuple[int, ...] | None  # shape for viewing a (B, *S, 3C) map, else None
    num_heads: int
    spec: WindowSpec
    # The op's arguments after its tensors, if the plan is cached. The index is 1 if TF32 is allowed, plus 2 if lse is
    # needed.
    others: tuple[tuple[Any, ...], ...]
    op: Differentiable | None  # None for a backend in plain PyTorch
    reads_pads: bool  # False if the map is known to have no pad tokens
    fits: bool  # the tables need no conversion for the op
    asks_for_tf32: bool


_PLANS = Found()


def _make_plan(
    form: str,
    maps: tuple[Any, ...],
    tables: dict[str, Any],
    generator: Any,
    num_heads: Any,
    options: dict[str, Any],
    requested: Any,
    return_attention: Any,
    plain: bool,
) -> _Plan:
    """Check every argument, choose the backend and return the plan."""
    x = maps[0]
    num_heads = _arguments.check_count(form, "num_heads", num_heads)
    if form == "window_attention_qkvpacked":
        x = _arguments.check_qkvpacked(form, x, num_heads)
        size = x.shape[1:-3]
    else:
        q, k, v = maps
        _arguments.check_separate(form, q, k, v, num_heads)
        size = x.shape[1:-2]
    head_dim = x.shape[-1]
    spec = spec_of(form, x, size, head_dim, num_heads=num_heads, **tables, **options)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"{form}: generator must be a torch.Generator, got {type(generator).__name__}")
    if generator is not None and generator.device.type != x.device.type:
        raise ValueError(f"{form}: generator must be on the map's device {x.device}, got {generator.device}")
    if not isinstance(return_attention, bool):
        raise TypeError(f"{form}: return_attention must be a bool, got {return_attention!r}")
    dtype = autocast_dtype(x) or x.dtype

    def reasons(backend: str) -> list[str]:
        return window_attention_reasons(backend, spec, head_dim, dtype, x.device, return_attention)

    backend = choose(form, requested, x.device, reasons)
    pad_qkv, region_map = tables["pad_qkv"], tables["region_map"]
    wide = [tables[name] for name in ("bias_table", "bias", "logit_scale")] + list(tables["axis_tables"] or ())
    wide = [t for t in wide if t is not None]
    # Under a compiler pad_qkv is always passed: a test for pad tokens would put a guard on the map's size.
    reads_pads = (
        not is_untraced(maps)
        or spec.key_window != spec.window_size
        or _arguments.frame_size(size, spec.window_size) != tuple(size)
    )
    any_shape = backend in ("cpu", "cuda")  # their bindings read a table of any shape with the right number of elements
    switches = [(tf32, lse) for lse in (False, True) for tf32 in (False, True)] if plain else []
    return _Plan(
        backend=backend,
        dtype=dtype,
        view=tuple(x.shape) if x is not maps[0] else None,
        num_heads=num_heads,
        spec=spec,
        others=tuple((spec.wire(allow_tf32=tf32, needs_lse=lse), *spec.numbers) for tf32, lse in switches),
        op=None if backend in PLAIN else _FORWARD[form, "_triton" if backend == "triton" else ""],
        reads_pads=reads_pads,
        fits=all(t.dtype == torch.float32 for t in wide)
        and (pad_qkv is None or not reads_pads or (pad_qkv.dtype == dtype and (any_shape or pad_qkv.dim() == 3)))
        and (region_map is None or (region_map.dtype == torch.int32 and (any_shape or region_map.dim() == 3)))
        and (tables["logit_scale"] is None or any_shape or tables["logit_scale"].dim() == 1)
        and spec.dropout_p == 0.0,
        asks_for_tf32=x.is_cuda and dtype == torch.float32,
    )


def _fit(
    plan: _Plan, tables: tuple[Tensor | None, ...], device: torch.device, generator: torch.Generator | None
) -> tuple[Tensor | None, ...]:
    """Convert the tables for the op and draw the dropout seed."""
    *biases, logit_scale, pad_qkv, region_map = tables
    seed = None
    biases = [None if t is None else t.to(torch.float32) for t in biases]
    if logit_scale is not None:
        logit_scale = logit_scale.to(torch.float32).reshape(plan.num_heads)
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(plan.dtype).reshape(3, plan.num_heads, -1)
    if region_map is not None:
        region_map = region_map.to(torch.int32).reshape(three(region_map.shape, 1))
    if plan.spec.dropout_p > 0.0:  # drawn on the device, so that every replay of a CUDA graph draws a new seed
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=generator)
    return *biases, logit_scale, pad_qkv, region_map, seed


def _attend(
    form: str,
    maps: tuple[Any, ...],
    tables: tuple[Any, ...],
    axis_tables: Any,
    num_heads: Any,
    generator: Any,
    backend: Any,
    return_attention: Any,
    options: dict[str, Any],
) -> Any:
    """Run the op ``form`` with the tensors ``tables``, named by _TENSORS, and the ``options`` of its WindowSpec."""
    tensors = maps + tables
    if axis_tables is not None:
        axis_tables = _arguments.axis_tables_of(form, axis_tables)
        tensors += axis_tables
    plain = is_plain(tensors)
    key = plan = None
    if plain and generator is None:
        autocast = autocast_dtype(maps[0]) if torch._C._is_any_autocast_enabled() else None
        given = (form, backend, num_heads, return_attention, axis_tables is None, *options.values())
        key = call_key(tensors, given, autocast)
        plan = _PLANS.get(key)
    if plan is None:
        named = dict(zip(_TENSORS, tables, strict=True), axis_tables=axis_tables)
        plan = _make_plan(form, maps, named, generator, num_heads, options, backend, return_attention, plain)
        if key is not None:
            _PLANS.put(key, plan)
    if maps[0].dtype != plan.dtype:
        maps = tuple(x.to(plan.dtype) for x in maps)
    if plan.view is not None:
        maps = (maps[0].view(plan.view),)
    if tables[3] is not None and not plan.reads_pads:
        tables = (*tables[:3], None, tables[4])
    if plan.op is None:
        named = dict(zip(_TENSORS, tables, strict=True), axis_tables=axis_tables)
        return getattr(fallback if plan.backend == "torch" else reference, form)(
            *maps,
            **named,
            **plan.spec.options(),
            num_heads=plan.num_heads,
            generator=generator,
            return_attention=return_attention,
        )
    if axis_tables is not None:
        tables = (tables[0], torch.cat(axis_tables), *tables[2:])
    tables = (*tables, None) if plan.fits else _fit(plan, tables, maps[0].device, generator)
    tf32 = plan.asks_for_tf32 and _tf32_switch()
    if plain:
        tensors = maps + tables
        if any_requires_grad(tensors):
            return plan.op.apply(*tensors, plan.others[2 | tf32])[0]
        with torch._C._AutoDispatchBelowAutograd():
            return plan.op.overload(*tensors, *plan.others[tf32])[0]
    # Outside a compiler, assume that a backward pass follows: transforms and modes wrap tensors.
    needs_lse = not torch.compiler.is_dynamo_compiling() or any_requires_grad(maps + tables)
    wire = plan.spec.wire(allow_tf32=tf32, needs_lse=needs_lse)
    return plan.op(*maps, *tables, wire, *plan.spec.numbers)[0]


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
    axis_tables: Sequence[Tensor] | None = None,
    key_window: Ints | None = None,
    table_pairs: bool | Sequence[bool] = False,
    backend: str = "auto",
    return_attention: bool = False,
) -> Any:  # a Tensor, or a pair
    r"""Compute attention inside the shifted windows of a feature map, which is read and written in image order.

    In every window, for tokens i and j and each head,

    .. math:: out_i = \sum_j softmax_j(scale \cdot q_i \cdot k_j + bias_{r(i,j)} + mask_{ij}) \, v_j

    with the cosine of q_i and k_j times ``exp(min(logit_scale, ln 100))`` in place of the scaled product if
    ``logit_scale`` is given. ``mask`` is ``mask_value`` where the shift brought tokens of different parts of the map
    into one window, else 0. Softmax and sums are computed in float32, or in float64 for float64 maps.

    Args:
        qkv: (B, \*S, 3C) or (B, \*S, 3, num_heads, head_dim), S = (H, W) or (D, H, W), in image order, any strides;
            float32, float16, bfloat16, or float64 (torch and reference only). Under autocast it is cast to the
            autocast dtype.
        bias_table: relative position bias, (prod(2 * window - 1), num_heads), any floating dtype, used in float32; or
            (rows, T, num_heads) for T window types (Pangu-Weather). The windows of a map, in row-major order, are
            divided into T runs of equal length, one for each type.
        num_heads: number of heads; C = num_heads * head_dim, head_dim 1..128.
        window_size: tokens per axis, an int or one per axis, slowest first; at most 1024 tokens in all.
        shift_size: tokens per axis, 0..window - 1; a shift of s is ``torch.roll(x, -s)``.
        scale: factor of the scores, head_dim ** -0.5 by default; excludes ``logit_scale``.
        bias: dense bias in place of the table: (num_heads, N, N), or (T, num_heads, N, N) for T window types, as in
            bias_table; N is the number of tokens of a window.
        table_window: the window for which ``bias_table`` was made, if that differs from ``window_size``: token t of a
            window uses the entries of token t (row-major) of ``table_window``, as MONAI and Video-Swin do for clamped
            windows.
        logit_scale: v2 only: the logarithm of each head's score factor, num_heads values.
        pad_qkv: q, k and v of a pad token, (3C,) or (3, num_heads, head_dim): the bias of the QKV Linear in models
            that pad its input with zeros. Zero by default. Pad tokens are attended to.
        pad_order: order of padding and shift if S is not a multiple of the window: "pad_then_roll" (Microsoft,
            torchvision, transformers, MONAI, mmpretrain) or "roll_then_pad" (timm).
        pad_before: pad tokens before the data, per axis; the other pad tokens follow the data.
        periodic: per axis, True if the map wraps around (longitude), so that the shift needs no mask on that axis. A
            shifted periodic axis must consist of whole windows with "pad_then_roll", which would pad between its last
            token and its first.
        region_map: int32 or narrower, with the padded map's shape; replaces the shift's regions. Tokens with different
            values are masked from each other.
        mask_value: added to the score of masked pairs: finite, or -inf, which makes their probability 0. No row
            becomes NaN, because every token shares a region with itself.
        dropout_p: probability of dropping an attention weight, 0..1; draws from ``generator`` or torch's default.
        grid: True for windows of tokens at equal distances across the map, instead of adjacent tokens (MaxViT);
            excludes a shift.
        axis_tables: decomposed relative position instead of a bias (SAM, ViTDet): a table (2 * window - 1, head_dim)
            for each axis a of the map, shared by the heads and used in float32. Adds
            :math:`q_i \cdot table_a[i_a - j_a + window_a - 1]` to the score, with q unscaled. A window may then have
            up to 4096 tokens. Excludes ``bias_table``, ``bias`` and ``logit_scale``.
        key_window: tokens per axis of a larger window from which keys and values are taken (HAT's overlapping
            cross-attention): ``window_size`` plus an even number, half of it on each side; at most 1024 tokens in all.
            Its tokens outside the map are pad tokens. The table then has prod(window + key_window - 1) rows; per axis,
            row i - j + key_window - 1 is for coordinate i of the query in its window and coordinate j of the key in the
            key window. A dense bias is (num_heads, N, M), where M is the number of tokens of the key window. Excludes a
            shift, periodic axes, grid, region_map, axis_tables, table_window and table_pairs.
        table_pairs: per axis, True if the table has a row for each pair of coordinates i of the query and j of the key,
            row i + window * j, instead of one for each offset (height and latitude of Pangu-Weather).
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference". "auto" picks the fastest usable
            one: a kernel, else PyTorch's own code ("torch"), never the slow reference.
        return_attention: also return the attention weights. Only "torch" and "reference" support it: the kernels never
            store all of them.

    Returns:
        (B, \*S, C) in the dtype of qkv, contiguous. An empty batch gives an empty result. Differentiable in qkv,
        bias_table, bias, logit_scale, pad_qkv and axis_tables, each gradient in its tensor's dtype. Kernels give the
        same bits for the same input on one device; docs/numerics.md covers "torch". Twice differentiable; with dropout
        only if backend is "torch" or "reference". With return_attention the result is a pair: this tensor and the
        attention weights, (B, num_windows, num_heads, N, N) or, with key_window, (..., N, M), after softmax and dropout
        as in transformers, in the same dtype and also differentiable. Their windows are in row-major order of the
        shifted map, and their tokens include the pad tokens.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin Transformer (Liu et al., 2021), section 3.2; Swin Transformer V2 (Liu et al., 2022), section 3.
    """
    return _attend(
        "window_attention_qkvpacked",
        (qkv,),
        (bias_table, bias, logit_scale, pad_qkv, region_map),
        axis_tables,
        num_heads,
        generator,
        backend,
        return_attention,
        {
            "window_size": window_size,
            "shift_size": shift_size,
            "scale": scale,
            "table_window": table_window,
            "pad_order": pad_order,
            "pad_before": pad_before,
            "periodic": periodic,
            "mask_value": mask_value,
            "dropout_p": dropout_p,
            "grid": grid,
            "key_window": key_window,
            "table_pairs": table_pairs,
        },
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
    axis_tables: Sequence[Tensor] | None = None,
    key_window: Ints | None = None,
    table_pairs: bool | Sequence[bool] = False,
    backend: str = "auto",
    return_attention: bool = False,
) -> Any:  # a Tensor, or a pair
    r"""Compute attention inside the shifted windows of a feature map from separate q, k and v.

    The formula and the other arguments are as for :func:`window_attention_qkvpacked`.

    Args:
        q, k, v: (B, \*S, num_heads, head_dim) each, of the same shape, dtype and device, any strides.

    Returns:
        (B, \*S, C) in the dtype of q, C = num_heads * head_dim; with return_attention a pair of this and the attention
        weights.

    Raises:
        ValueError, TypeError, NotImplementedError: as for :func:`window_attention_qkvpacked`.
    """
    return _attend(
        "window_attention",
        (q, k, v),
        (bias_table, bias, logit_scale, pad_qkv, region_map),
        axis_tables,
        num_heads,
        generator,
        backend,
        return_attention,
        {
            "window_size": window_size,
            "shift_size": shift_size,
            "scale": scale,
            "table_window": table_window,
            "pad_order": pad_order,
            "pad_before": pad_before,
            "periodic": periodic,
            "mask_value": mask_value,
            "dropout_p": dropout_p,
            "grid": grid,
            "key_window": key_window,
            "table_pairs": table_pairs,
        },
    )
