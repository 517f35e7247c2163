"""Random test cases of window attention, and an error budget for their results; used by the tests and benchmarks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels._extension import ops
from swinkernels.ops._arguments import make_window_spec
from swinkernels.reference._geometry import key_index, source_index
from swinkernels.reference.window_attention import key_window_index, relative_position_index

# In windows of fewer tokens, too few rounding errors average out, and the terms in a row of dS, which sum to zero,
# cancel more strongly.
SMALL_WINDOW = 16
# v2 normalises each row of q and k, so a row's gradient has no component along the row. With fewer channels the other
# components may be so small that rounding errors dominate. (With one channel the gradient is zero.)
FEW_CHANNELS = 4


@dataclass(frozen=True)
class WindowAttentionCase:
    """A test case of ``window_attention_qkvpacked``: shapes and arguments; :meth:`inputs` draws random inputs."""

    batch: int
    size: tuple[int, ...]
    num_heads: int
    head_dim: int
    window_size: int | tuple[int, ...]
    shift_size: int | tuple[int, ...] = 0
    has_table: bool = True
    has_pad_qkv: bool = False
    has_logit_scale: bool = False  # v2, with one head's value above the clamp
    bias_types: int | None = None  # window types of the dense bias, 0 for a bias (heads, N, M); None for no bias
    options: dict[str, Any] = field(default_factory=dict)
    has_axis_tables: bool = False
    table_types: int | None = None  # number of window types in the bias table

    def __str__(self) -> str:
        size, window, shift = (
            "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
            for v in (self.size, self.window_size, self.shift_size)
        )
        flags = {"table": self.has_table, "axes": self.has_axis_tables}
        flags |= {"pad": self.has_pad_qkv, "v2": self.has_logit_scale}
        extra = "".join(f"-{name}" for name, present in flags.items() if present)
        extra += "" if self.bias_types is None else f"-bias{self.bias_types}"
        extra += "" if self.table_types is None else f"-types{self.table_types}"
        extra += "".join(f"-{k}={v}" for k, v in self.options.items() if not isinstance(v, Tensor))
        return f"b{self.batch}-{size}-h{self.num_heads}x{self.head_dim}-w{window}-s{shift}{extra}"

    @property
    def window_tuple(self) -> tuple[int, ...]:
        return self._per_axis(self.window_size)

    @property
    def key_window_tuple(self) -> tuple[int, ...]:
        return self._per_axis(self.options.get("key_window", self.window_size))

    def _per_axis(self, value: Any) -> tuple[Any, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.size)

    def arguments(self, device: str | torch.device | None = None) -> dict[str, Any]:
        """Return the op's arguments other than its inputs, with tensors moved to ``device`` if it is given."""
        options = {name: x.to(device) if device and isinstance(x, Tensor) else x for name, x in self.options.items()}
        return {
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "shift_size": self.shift_size,
            **options,
        }

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """Draw random inputs of the case and return them by name; their values depend on the type of ``device``.

        qkv, dout and pad_qkv are rounded to ``dtype``. bias_table, bias, logit_scale and the table "axis_tables.a" of
        each axis a are float32.
        """
        g = torch.Generator(device).manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device)

        window, keys, channels = self.window_tuple, self.key_window_tuple, self.num_heads * self.head_dim
        inputs = {
            "qkv": draw(self.batch, *self.size, 3 * channels).to(dtype),
            "dout": draw(self.batch, *self.size, channels).to(dtype),
        }
        if self.has_table:
            table = self._per_axis(self.options.get("table_window", window))
            pairs = self._per_axis(self.options.get("table_pairs", False))
            of = zip(*((table, table) if keys == window else (window, keys)), pairs, strict=True)
            rows = math.prod(w * m if is_pairs else w + m - 1 for w, m, is_pairs in of)
            types = () if self.table_types is None else (self.table_types,)
            inputs["bias_table"] = draw(rows, *types, self.num_heads)
        if self.bias_types is not None:
            types = (self.bias_types,) if self.bias_types else ()
            inputs["bias"] = draw(*types, self.num_heads, math.prod(window), math.prod(keys))
        if self.has_axis_tables:
            for axis, w in enumerate(window):
                inputs[f"axis_tables.{axis}"] = draw(2 * w - 1, self.head_dim) * self.head_dim**-0.5
        if self.has_logit_scale:
            inputs["logit_scale"] = torch.linspace(math.log(120.0), 0.5, self.num_heads).reshape(-1, 1, 1)
        if self.has_pad_qkv:
            inputs["pad_qkv"] = draw(3 * channels).to(dtype)
        return {name: x.to(device) for name, x in inputs.items()}


def named_inputs(inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return the inputs of a case, except dout, as keyword arguments of the op."""
    named: dict[str, Any] = {name: x for name, x in inputs.items() if name != "dout" and "." not in name}
    axis_tables = tuple(x for name, x in inputs.items() if name.startswith("axis_tables."))
    return {**named, "axis_tables": axis_tables} if axis_tables else named


def run_case(
    op: Callable[..., Tensor], inputs: dict[str, Tensor], arguments: dict[str, Any], constant: Collection[str] = ()
) -> dict[str, Tensor]:
    """Return by name the output of ``op`` ("out") and the gradient ("dqkv", ...) of each input not in ``constant``."""
    dout = inputs["dout"]
    leaves = {name: x.detach().clone() for name, x in inputs.items() if name != "dout"}
    wanted = {name: x.requires_grad_() for name, x in leaves.items() if name not in constant}
    out = op(**named_inputs(leaves), **arguments)
    grads = torch.autograd.grad(out, list(wanted.values()), dout.to(out.dtype), allow_unused=True)
    results = {"out": out.detach()}
    for (name, leaf), grad in zip(wanted.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


class Judged(NamedTuple):
    """The error of a result, and a message if the error exceeds its limits."""

    rms_eps: float  # RMS error / (eps * RMS of the result, or of its cancelling terms)
    of_limit: float  # RMS error / its limit, or largest error / its limit, the larger of the two
    failure: str | None


def judge(
    got: Tensor,
    exact: Tensor,
    f32: Tensor | Callable[[], Tensor],
    *,
    eps: float | None = None,
    terms: Tensor | None = None,
    name: str = "",
) -> Judged:
    """Judge whether ``got`` is as close to ``exact`` (float64) as its dtype allows.

    The RMS error may be at most 0.75 eps times the RMS of ``exact``, and the error of each element at most 2 eps times
    the largest element. ``f32``, the result of the reference in float32 on the same rounded inputs (or a function that
    computes it on demand), widens these limits: twice its RMS error is added to the first, and four times its largest
    error to the second. The additions dominate if terms of a result cancel. ``eps`` is the machine epsilon of the
    arithmetic, by default that of the dtype of ``got`` (TF32 has 2 ** -10). If ``terms``, the size of the terms that
    cancel, is given, it replaces ``exact`` in both limits. NaN fails.
    """
    if got.shape != exact.shape:
        return Judged(math.inf, math.inf, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}")
    if got.numel() == 0:
        return Judged(0.0, 0.0, None)
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    size = exact if terms is None else terms
    # Two kinds of error are always allowed: those of probabilities in float32's subnormal range, which a gradient may
    # multiply by thousands, and errors below the smallest subnormal number of the dtype of got.
    info = torch.finfo(got.dtype)
    floor = max(1e4 * torch.finfo(torch.float32).tiny, info.tiny * info.eps)
    error = got.double() - exact
    rms, worst = _rms(error), error.abs().max().item()
    rms_limit, limit = 0.75 * eps * _rms(size) + floor, 2 * eps * size.abs().max().item() + floor
    if not (rms <= rms_limit and worst <= limit):
        base = (f32() if callable(f32) else f32).double() - exact
        rms_limit, limit = rms_limit + 2 * _rms(base), limit + 4 * base.abs().max().item()
    rms_eps = max(rms - floor, 0.0) / (eps * _rms(size) + 1e-300)
    failure = None
    if not rms <= rms_limit:
        failure = f"{name}: RMS error {rms:.3g}, at most {rms_limit:.3g} ({rms_eps:.2f} eps)"
    elif not worst <= limit:
        failure = f"{name}: largest error {worst:.3g}, at most {limit:.3g}"
    return Judged(rms_eps, max(rms / rms_limit, worst / limit), failure)


def assert_within_budget(got: Tensor, exact: Tensor, f32: Tensor | Callable[[], Tensor], **options: Any) -> None:
    """Fail unless the result passes :func:`judge`, which takes the same arguments."""
    failure = judge(got, exact, f32, **options).failure
    assert failure is None, failure


def cancelling_terms(case: WindowAttentionCase, inputs: dict[str, Any], *, single: bool = False) -> dict[str, Tensor]:
    """Compute, in float64, the size that each gradient would have if its cancelling terms had the same sign.

    The keys are those of :func:`run_case` without "out". A value has the scale of the result, but not always its shape.
    If ``single`` is True (float32 arithmetic), the sizes include the rounding of the scores, and "out" is added.
    """
    rank, heads = len(case.size), case.num_heads
    device = inputs["qkv"].device
    arguments = case.arguments(device)
    window = case.window_tuple
    shift = case.shift_size if isinstance(case.shift_size, tuple) else (case.shift_size,) * rank
    before = arguments.get("pad_before", 0)
    before = before if isinstance(before, tuple) else (before,) * rank
    index = source_index(
        case.size,
        window,
        shift,
        pad_order=arguments.get("pad_order", "pad_then_roll"),
        pad_before=before,
        grid=arguments.get("grid", False),
    ).to(device)
    of_keys = index
    if case.key_window_tuple != window:
        of_keys = key_index(case.size, window, case.key_window_tuple, pad_before=before).to(device)
    real = (index < math.prod(case.size)).unsqueeze(1).unsqueeze(-1)  # (num_windows, 1, N, 1)
    _, probs = reference.window_attention_qkvpacked(**named_inputs(inputs), **arguments, return_attention=True)

    def gather(x: Tensor, pad: Tensor, index: Tensor) -> Tensor:
        tokens = x.reshape(case.batch, -1, heads, case.head_dim)
        tokens = torch.cat([tokens, pad.reshape(1, 1, heads, -1).expand(case.batch, -1, -1, -1)], dim=1)
        return tokens[:, index].transpose(2, 3)  # (B, num_windows, heads, N, head_dim)

    def scatter(x: Tensor, index: Tensor) -> Tensor:
        """Sum ``x`` per map token and, in the last row, over all pad tokens: (B, tokens + 1, heads, head_dim)."""
        tokens = x.new_zeros(case.batch, math.prod(case.size) + 1, heads, case.head_dim)
        return tokens.index_add_(1, index.flatten(), x.transpose(2, 3).flatten(1, 2))

    none = torch.zeros(3 * heads * case.head_dim, dtype=torch.float64, device=device)
    pads = inputs.get("pad_qkv", none).chunk(3)
    indices = index, of_keys, of_keys
    maps = zip(inputs["qkv"].chunk(3, dim=-1), pads, indices, strict=True)
    q, k, v = (gather(*each) for each in maps)
    dout = gather(inputs["dout"], torch.zeros_like(pads[0]), index)
    axes = []  # per axis: |table rows| and row indices by query and key coordinate, and one-hot key coordinates
    token = torch.arange(math.prod(window), device=device)
    for axis, w in enumerate(window if case.has_axis_tables else ()):
        coordinate = token // math.prod(window[axis + 1 :]) % w
        number = coordinate[:, None] - torch.arange(w, device=device) + w - 1
        rows = inputs[f"axis_tables.{axis}"].abs()[number]  # (N, w, head_dim)
        axes.append((rows, number, torch.nn.functional.one_hot(coordinate, w).double()))
    terms = {}
    if case.has_logit_scale:
        norms = [x.norm(dim=-1, keepdim=True).clamp(min=1e-12) for x in (q, k)]
        q, k = q / norms[0], k / norms[1]
        factor = inputs["logit_scale"].clamp(max=math.log(100.0)).exp()
    else:
        factor = abs(arguments.get("scale", case.head_dim**-0.5))
    rounded = torch.zeros_like(probs)  # for each score, the magnitude that its rounding error is proportional to
    if single:
        rounded = factor * (q.square() @ k.square().transpose(-2, -1)).sqrt()
        if case.has_logit_scale:  # the errors of both norms affect all terms of a cosine
            rounded = rounded + 2 * factor * (q @ k.transpose(-2, -1)).abs()
        for rows, _, has in axes:
            rounded = rounded + torch.einsum("...id,ijd->...ij", q.square(), rows.square()).sqrt() @ has.T
        # A score far below the largest, e.g. with a mask of -100, has an error of half an eps times the difference.
        rounded = torch.maximum(rounded, -0.5 * probs.clamp(min=1e-300).log())
        rounded = rounded + (probs * rounded).sum(-1, keepdim=True)  # plus the sum in the softmax's denominator
    dprobs = (dout @ v.transpose(-2, -1)).abs() * (1 + rounded)
    dscores = probs * (dprobs + (probs * dprobs).sum(-1, keepdim=True)) * real
    dq, dk = factor * dscores @ k.abs(), factor * dscores.transpose(-2, -1) @ q.abs()
    for axis, (rows, number, has) in enumerate(axes):
        of_axis = dscores @ has  # (B, num_windows, heads, N, w)
        dq = dq + torch.einsum("...ij,ijd->...id", of_axis, rows)
        dtable = torch.zeros_like(inputs[f"axis_tables.{axis}"])
        of_rows = torch.einsum("bwhij,bwhid->ijd", of_axis, q.abs()).flatten(0, 1)
        terms[f"daxis_tables.{axis}"] = dtable.index_add_(0, number.flatten(), of_rows)
    if case.has_logit_scale:
        # The gradient of a unit vector has no component along the vector; computing it subtracts that component.
        dq, dk = (
            (d + unit.abs() * (unit.abs() * d).sum(-1, keepdim=True)) / norm
            for d, unit, norm in zip((dq, dk), (q, k), norms, strict=True)
        )
    dv = probs.transpose(-2, -1) @ dout
    if single:
        out = probs @ v
        variance = (probs @ v.square() - out.square()).clamp(min=0)  # variance of the rows of v, weighted by probs
        of_scores = ((probs * rounded.square()).sum(-1, keepdim=True) * variance).sqrt()
        terms["out"] = (out.abs() + of_scores)[real.expand_as(out)]
        dv = dv.abs() + (probs * rounded).transpose(-2, -1) @ dout.abs()
    dq, dk, dv = (scatter(g, i) for g, i in zip((dq, dk, dv), indices, strict=True))
    terms["dqkv"] = torch.stack([g[:, :-1] for g in (dq, dk, dv)])
    if "pad_qkv" in inputs:
        terms["dpad_qkv"] = torch.cat([g[:, -1].sum(0).flatten() for g in (dq, dk, dv)])
    if "bias" in inputs:
        types = case.bias_types or 1
        of_types = dscores.sum(0).unflatten(0, (types, -1)).sum(1)  # (types, heads, N, N)
        terms["dbias"] = of_types.reshape(inputs["bias"].shape)
    if "logit_scale" in inputs:
        # A sum over all windows has so many terms that rounding errors of both signs average out.
        cosine = q @ k.transpose(-2, -1)
        terms["dlogit_scale"] = factor * (dscores * cosine).square().sum((0, 1, 3, 4)).sqrt().reshape(factor.shape)
    if "bias_table" in inputs:
        table = arguments.get("table_window", window)
        if case.key_window_tuple != window:
            offset = key_window_index(window, case.key_window_tuple).to(device)
        else:
            pairs = arguments.get("table_pairs", False)
            pairs = pairs if isinstance(pairs, tuple) else (pairs,) * rank
            table = table if isinstance(table, tuple) else (table,) * rank
            offset = relative_position_index(window, table, device, table_pairs=pairs)
        dtable = torch.zeros_like(inputs["bias_table"])
        of_types = dscores.sum(0).unflatten(0, (case.table_types or 1, -1)).sum(1)  # (types, heads, N, M)
        rows = of_types.flatten(2).permute(2, 0, 1).reshape(-1, *dtable.shape[1:])
        terms["dbias_table"] = dtable.index_add_(0, offset.flatten(), rows)
    return terms


def judge_window_attention(
    op: Callable[..., Tensor],
    case: WindowAttentionCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    eps: float | None = None,
    seed: int = 0,
    cancels: bool = False,
    rounds_unit_rows: bool = False,
    sums_in_float32: bool = False,
    constant: Collection[str] = (),
    **arguments: Any,
) -> tuple[dict[str, Tensor], dict[str, Judged]]:
    """Run ``op`` on a case, with further ``arguments``, and judge output and gradients against the float64 reference.

    The reference runs on the same device. Inputs named in ``constant`` have no gradient. Gradients are judged against
    the size of their cancelling terms in four cases: if ``cancels`` is True, in small windows, in v2 with few channels,
    and in float32 unless ``eps`` is given. In the last case the output is judged in the same way. Pass ``eps`` if
    products are rounded to a shorter format than the dtype. Set ``rounds_unit_rows`` for a backend that rounds the
    normalised rows of q and k in v2 to the dtype, for tensor cores: dlogit_scale, a sum whose terms all have this
    rounding error, is then judged against its cancelling terms, too. Set ``sums_in_float32`` for a backend that rounds
    nothing before its float32 sums: gradients in float32 are then judged as in a float32 case, whatever the dtype.

    Returns:
        Output and gradients by name, as from :func:`run_case`, and the verdict on each of them.
    """
    inputs = case.inputs(dtype, device, seed)
    given = case.arguments(device)
    got = run_case(op, inputs, {**given, **arguments}, constant)
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, given, constant)

    @functools.cache
    def single() -> dict[str, Tensor]:
        of_float32 = {name: x.float() for name, x in inputs.items()}
        return run_case(reference.window_attention_qkvpacked, of_float32, given, constant)

    def in_float32(name: str) -> Tensor:
        return single()[name]

    is_single = dtype == torch.float32 and eps is None
    is_small = math.prod(case.window_tuple) < SMALL_WINDOW or (case.has_logit_scale and case.head_dim < FEW_CHANNELS)
    cancels = cancels or is_small or is_single

    @functools.cache
    def sizes(of_single: bool) -> dict[str, Tensor]:
        return cancelling_terms(case, wide, single=of_single) if case.batch > 0 else {}

    judged = {}
    for name, x in got.items():
        of_single = is_single or (sums_in_float32 and x.dtype == torch.float32)
        by_terms = of_single or (cancels and name != "out") or (rounds_unit_rows and name == "dlogit_scale")
        judged[name] = judge(
            x,
            exact[name],
            functools.partial(in_float32, name),
            eps=torch.finfo(torch.float32 if of_single else dtype).eps if eps is None else eps,
            terms=sizes(of_single).get(name) if by_terms else None,
            name=f"{case} {dtype} {name}",
        )
    return got, judged


def check_window_attention(
    op: Callable[..., Tensor],
    case: WindowAttentionCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    **options: Any,
) -> dict[str, Tensor]:
    """Fail unless output and every gradient pass :func:`judge_window_attention`, which takes the same arguments."""
    got, judged = judge_window_attention(op, case, dtype, device, **options)
    for found in judged.values():
        assert found.failure is None, found.failure
    return got


def op_arguments(
    case: WindowAttentionCase, form: str, dtype: torch.dtype, device: str | torch.device = "cpu"
) -> tuple[Any, ...]:
    """Return the arguments of ``torch.ops.swinkernels.<form>_fwd`` for a case; floating tensors require gradients."""
    inputs = case.inputs(dtype, device)
    options = case.arguments(device)
    qkv = inputs["qkv"].unflatten(-1, (3, case.num_heads, case.head_dim))
    maps = qkv.unbind(-3) if form == "window_attention" else (qkv,)
    table, pad, region_map = inputs.get("bias_table"), inputs.get("pad_qkv"), options.pop("region_map", None)
    bias, logit_scale, axis_tables = (
        inputs.get("bias"),
        inputs.get("logit_scale"),
        named_inputs(inputs).get("axis_tables"),
    )
    del options["num_heads"]
    given = {"bias_table": table, "axis_tables": axis_tables}
    spec = make_window_spec(form, len(case.size), case.head_dim, tables=given, **options)
    if axis_tables is not None:
        bias = torch.cat(axis_tables)
    if region_map is not None:
        region_map = region_map.to(device, torch.int32).reshape([1] * (3 - region_map.dim()) + list(region_map.shape))
    return (
        *(x.clone().requires_grad_() for x in maps),
        None if table is None else table.requires_grad_(),
        None if bias is None else bias.requires_grad_(),
        None if logit_scale is None else logit_scale.flatten().requires_grad_(),
        None if pad is None else pad.reshape(3, case.num_heads, case.head_dim).requires_grad_(),
        region_map,
        torch.tensor([2**40 - 3], device=device) if spec.dropout_p > 0 else None,
        spec.wire(),
        *spec.numbers,
    )


def opcheck_forward_and_backward(form: str, suffix: str, args: tuple[Any, ...]) -> None:
    """Run ``torch.library.opcheck`` on the forward and backward ops of ``form``; ``args`` are from op_arguments.

    ``suffix`` is "" or, for Triton's ops, "_triton".
    """
    fwd = getattr(ops, f"{form}_fwd{suffix}").default
    bwd = getattr(ops, f"{form}_bwd{suffix}").default
    torch.library.opcheck(fwd, args)
    args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
    out, lse = fwd(*args)
    n = 3 if form == "window_attention" else 1
    given = sum(1 << i for i, table in enumerate(args[n : n + 4]) if table is not None)
    for wanted in {given, 0}:
        torch.library.opcheck(bwd, (torch.randn_like(out), *args[:n], lse, *args[n:], wanted))
    torch.library.opcheck(fwd, (*args[: n + 6], f"{args[n + 6]};needs_lse=0", *args[n + 7 :]))
