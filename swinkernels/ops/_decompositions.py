"""Decomposes the forward ops into plain PyTorch, for exporters (ONNX, OpenVINO, ExecuTorch) and programs in core ATen.

Tokens are gathered into windows and back with indices computed from the map's size. A symbolic size then needs no
guard, and one program accepts maps with and without padding. For a fixed size the indices are constants, which the
exporters fold. Eager calls run ``ops/fallback.py`` instead, which is written for speed and has the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels._at_import import at_import
from swinkernels._extension import ops
from swinkernels.ops import fallback
from swinkernels.window_spec import WindowSpec

Sizes = Sequence[Any]  # ints, or symbolic ints


def _known_equal(a: Any, b: Any) -> bool:
    """Return True if two sizes, which may be symbolic, are equal for every value of their symbols."""
    if type(a) is int and type(b) is int:
        return a == b
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # a slow import

    return statically_known_true(a == b)


def _modulo(y: Tensor, n: Any) -> Tensor:
    """Return y % n. A symbolic n becomes a tensor, because ONNX exporters do not accept a symbolic int here."""
    return y % (n if isinstance(n, int) else torch.full((), n, dtype=y.dtype, device=y.device))


class _Windows:
    """Cuts a feature map into windows and joins windows into a map, by gathers with computed indices."""

    def __init__(
        self,
        size: Sizes,
        window: Sequence[int],
        shift: Sequence[int],
        pad_order: str,
        device: torch.device,
        before: Sequence[int] | None = None,
        grid: bool = False,
    ) -> None:
        self._size, self._window, self._shift = list(size), list(window), list(shift)
        self._rolls_first, self._device, self._grid = pad_order == "roll_then_pad", device, grid
        self._before = before or [0] * len(self._size)
        # Only non-negative numbers are divided, because ONNX rounds negative quotients towards zero, unlike torch.
        self._counts = [(s + w - 1) // w for s, w in zip(self._size, self._window, strict=True)]
        self._frame = [c * w for c, w in zip(self._counts, self._window, strict=True)]
        self.per_image = math.prod(self._counts)
        self.may_have_pads = not all(map(_known_equal, self._size, self._frame))

    def _axes(self, key_window: Sequence[int] | None = None) -> list[Tensor]:
        """Return the frame coordinates of all window tokens (or keys): one (windows, tokens) tensor per axis."""
        axes = []
        for count, w, m in zip(self._counts, self._window, key_window or self._window, strict=True):
            number, token = torch.arange(count, device=self._device), torch.arange(m, device=self._device)
            if self._grid:
                axes.append(token[None, :] * count + number[:, None])
            else:
                axes.append(number[:, None] * w + (token - (m - w) // 2)[None, :])
        return axes

    def _per_token(self, axes: Sequence[Tensor], lengths: Sizes) -> Tensor:
        """Return each token's row-major index, (num_windows, N), in a grid of ``lengths``, given its coordinates."""
        rank, number = len(axes), None
        for axis, (values, length) in enumerate(zip(axes, lengths, strict=True)):
            shape = [1] * (2 * rank)
            shape[axis], shape[rank + axis] = values.shape
            values = values.reshape(shape)
            number = values if number is None else number * length + values
        assert number is not None
        return number.flatten(rank).flatten(0, rank - 1)

    def sources(self, key_window: Sequence[int] | None = None) -> Tensor:
        """Return each window token's row-major index in the map, (num_windows * N,), or prod(size) for a pad token."""
        axes, outside = [], []
        for g, s, p, shift, before in zip(
            self._axes(key_window), self._size, self._frame, self._shift, self._before, strict=True
        ):
            y = (g if self._rolls_first or not shift else _modulo(g + shift, p)) - before
            outside.append(((y < 0) | (y >= s)).to(torch.int64))
            axes.append(_modulo(y + shift, s) if self._rolls_first and shift else y)
        numbers = self._per_token(axes, self._size)
        if self.may_have_pads or key_window:
            numbers = numbers.masked_fill(self._per_token(outside, [2] * len(outside)) > 0, math.prod(self._size))
        return numbers.flatten()

    def positions(self) -> Tensor:
        """Return each map token's index among the tokens of all windows, (prod(size),)."""
        n, rank = math.prod(self._window), len(self._size)
        window: Any = 0
        token: Any = 0
        for axis, (s, w, count, p, shift, before) in enumerate(
            zip(self._size, self._window, self._counts, self._frame, self._shift, self._before, strict=True)
        ):
            y = torch.arange(s, device=self._device)
            if self._rolls_first:
                g = (_modulo(y - shift, s) if shift else y) + before
            else:
                g = _modulo(y + (before - shift), p) if shift else y + before
            shape = [-1 if i == axis else 1 for i in range(rank)]
            number, at = (_modulo(g, count), g // count) if self._grid else (g // w, g % w)
            window = window * count + number.reshape(shape)
            token = token * w + at.reshape(shape)
        return (window * n + token).flatten()

    def regions(self, region_map: Tensor | None, periodic: Sequence[bool]) -> Tensor | None:
        """Return each window token's region for the mask, (num_windows, N), or None if nothing is masked."""
        axes = self._axes()
        if region_map is not None:
            return (
                region_map.flatten()
                .index_select(0, self._per_token(axes, self._frame).flatten())
                .unflatten(0, (-1, math.prod(self._window)))
            )
        masked = [s > 0 and not wraps for s, wraps in zip(self._shift, periodic, strict=True)]
        if not any(masked):
            return None
        regions = [
            (g >= p - w).to(torch.int64) + (g >= p - s).to(torch.int64) if m else torch.zeros_like(g)
            for g, p, w, s, m in zip(axes, self._frame, self._window, self._shift, masked, strict=True)
        ]
        return self._per_token(regions, [3] * len(regions))

    def cut(self, x: Tensor, pad: Tensor | None = None, key_window: Sequence[int] | None = None) -> Tensor:
        """Cut (B, *S, ...) into windows (B, num_windows, N or M, ...); pad tokens are ``pad`` or zero."""
        tokens = x.flatten(1, len(self._size))
        if self.may_have_pads or key_window:
            row = torch.zeros_like(tokens[:, :1]) if pad is None else pad.expand(tokens.shape[0], 1, *pad.shape)
            tokens = torch.cat([tokens, row], dim=1)
        return tokens.index_select(1, self.sources(key_window)).unflatten(
            1, (-1, math.prod(key_window or self._window))
        )

    def join(self, windows: Tensor) -> Tensor:
        """Join windows into a map, without pad tokens: the inverse of :meth:`cut`."""
        return windows.flatten(1, 2).index_select(1, self.positions()).unflatten(1, self._size)


# --- attention


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *maps, bias_table, bias, logit_scale, pad_qkv, region_map, seed, wire, scale, mask_value, dropout_p = arguments
    spec = WindowSpec.parse(wire, scale, mask_value, dropout_p)
    if seed is not None:
        raise NotImplementedError(
            "window attention with dropout_p > 0 has no decomposition that draws the same random numbers: "
            "call model.eval() before the export, or swinkernels.restore(model), or use backend='torch'"
        )
    x, rank = maps[0], len(spec.window_size)
    windows = _Windows(
        x.shape[1 : 1 + rank], spec.window_size, spec.shift_size, spec.pad_order, x.device, spec.pad_before, spec.grid
    )
    if pad_qkv is not None:  # the op accepts any shape with the right number of elements
        pad_qkv = pad_qkv.reshape(3, *x.shape[-2:])
    key_window = spec.key_window if spec.key_window != spec.window_size else None
    if len(maps) == 1 and key_window is None:
        q, k, v = windows.cut(x, pad_qkv).permute(3, 0, 1, 4, 2, 5).unbind()
    else:
        pads = (None,) * 3 if pad_qkv is None else pad_qkv.unbind()
        each = zip(maps if len(maps) == 3 else x.unbind(-3), pads, (None, key_window, key_window), strict=True)
        q, k, v = (windows.cut(m, pad, of_keys).transpose(2, 3) for m, pad, of_keys in each)
    num_windows, n = q.shape[1], q.shape[3]
    wide, factor = torch.promote_types(x.dtype, torch.float32), scale
    if logit_scale is not None:
        q, k, factor = fallback.cosine_factors(q, k, logit_scale, wide)

    addend = None
    if bias_table is not None:
        rows = fallback.table_rows(spec.window_size, spec.table_window, spec.key_window, spec.table_pairs, x.device)
        addend = fallback.bias_of_table(bias_table.to(wide), rows, n)
    elif spec.axis_tables:
        tables = bias.split([2 * w - 1 for w in spec.window_size])
        (q, k), factor = fallback.with_axis_tables(q, k, tables, spec.window_size, scale), 1.0
    elif bias is not None:
        addend = bias.to(wide)
    if addend is not None and addend.dim() == 4:  # consecutive windows share a type
        addend = addend[:, None].expand(-1, num_windows // addend.shape[0], -1, -1, -1).flatten(0, 1)
    region = windows.regions(region_map, spec.periodic)
    if region is not None:
        mask = (mask_value * (region[:, :, None] != region[:, None, :]).to(wide))[:, None]
        addend = mask if addend is None else addend + mask

    scores = fallback.scores_of(q, k, addend, factor).to(wide)
    out = windows.join((scores.softmax(-1).to(v.dtype) @ v).transpose(2, 3)).flatten(-2)
    lse = scores.logsumexp(-1) if spec.needs_lse else scores.new_empty(0)
    return out, lse.float()


# --- windows


def _window_partition(x: Tensor, window_size: list[int], shift_size: list[int], roll_then_pad: bool) -> Tensor:
    rank = x.dim() - 2
    order = "roll_then_pad" if roll_then_pad else "pad_then_roll"
    windows = _Windows(x.shape[1:-1], window_size[-rank:], shift_size[-rank:], order, x.device)
    return windows.cut(x).flatten(0, 1)


def _window_reverse(
    x: Tensor, size: Sizes, window_size: list[int], shift_size: list[int], roll_then_pad: bool
) -> Tensor:
    rank = len(size)
    order = "roll_then_pad" if roll_then_pad else "pad_then_roll"
    windows = _Windows(size, window_size[-rank:], shift_size[-rank:], order, x.device)
    return windows.join(x.unflatten(0, (-1, windows.per_image)))


# --- norms, with their statistics


def _norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    wide = x.float()
    mean = wide.mean(-1)
    rstd = (wide.var(-1, correction=0) + eps).rsqrt()
    return fallback.layer_norm(x, weight, bias, eps=eps, dtype=dtype), mean, rstd


def _patch_merging_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: list[int],
    neighbours: list[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(_merged(x, factor, neighbours), weight, bias, eps, dtype)


def _merged(x: Tensor, factor: Sequence[int], neighbours: Sequence[int]) -> Tensor:
    factor = factor[-(x.dim() - 2) :]
    ends = [-s % f for s, f in zip(x.shape[1:-1], factor, strict=True)]
    if not all(_known_equal(end, 0) for end in ends):
        x = F.pad(x, [0, 0, *(amount for end in reversed(ends) for amount in (0, end))])
    parts = []
    for number in neighbours:  # row-major within the block
        part = x
        for axis, f in reversed(list(enumerate(factor, start=1))):
            part = part[(slice(None),) * axis + (slice(number % f, None, f),)]
            number //= f
        parts.append(part)
    return torch.cat(parts, dim=-1)


def _layer_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factor: list[int], eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    return _norm(fallback.lay_out(x, factor[-(x.dim() - 2) :]) if factor else x, weight, bias, eps, dtype)


def _residual_layer_norm(
    x: Tensor, y: Tensor, drop_path_scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    s = fallback.add(x, y, drop_path_scale)
    return s, *_norm(s, weight, bias, eps, y.dtype)


def _residual_post_norm(
    x: Tensor, y: Tensor, drop_path_scale: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    normed, mean, rstd = _norm(y, weight, bias, eps, torch.promote_types(x.dtype, y.dtype))
    return fallback.add(x, normed, drop_path_scale), mean, rstd


# --- the MLP half


def _mlp_half(
    x: Tensor,
    branch: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    eps: float,
    post: bool,
    tanh: bool,
) -> Tensor:
    dtype = fc1_weight.dtype

    def norm(y: Tensor) -> Tensor:
        return fallback.layer_norm(y, norm_weight, norm_bias, eps=eps, dtype=dtype)

    s = x if branch is None else fallback.add(x, branch, None)
    h = F.linear(s.to(dtype) if post else norm(s), fc1_weight, fc1_bias)
    y = F.linear(F.gelu(h, approximate="tanh" if tanh else "none"), fc2_weight, fc2_bias)
    return fallback.add(s, norm(y) if post else y, None)


# --- Linear layers, halves of a block and the position bias


def _normed(y: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, is_given: bool) -> Tensor:
    return fallback.layer_norm(y, weight, bias, eps=eps, dtype=y.dtype) if is_given else y


def _added(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else residual + y


def _fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gelu: str,
    norm: str,
    eps: float,
) -> Tensor:
    y = F.linear(_normed(x, norm_weight, norm_bias, eps, norm == "pre"), weight, bias)
    return _added(F.gelu(y, approximate=gelu) if gelu else y, residual)


def _fused_patch_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    factor: list[int],
    neighbours: list[int],
    channels_first: bool,
    norm: str,
    eps: float,
) -> Tensor:
    if channels_first:
        factor = factor[-(x.dim() - 2) :]
        for axis, f in enumerate(factor):
            x = x.unflatten(2 + 2 * axis, (-1, f))
        x = x.permute(0, *(2 + 2 * i for i in range(len(factor))), 1, *(3 + 2 * i for i in range(len(factor))))
        rows = x.flatten(1 + len(factor))
    else:
        rows = _merged(x, factor, neighbours)
    y = F.linear(_normed(rows, norm_weight, norm_bias, eps, norm == "pre"), weight, bias)
    return _normed(y, norm_weight, norm_bias, eps, norm == "post")


def _fused_mlp(
    x: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    residual: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    gelu: str,
    norm: str,
    eps: float,
    by_layers: bool | None,
) -> Tensor:
    h = _fused_linear(x, fc1_weight, fc1_bias, None, norm_weight, norm_bias, gelu, norm, eps)
    y = F.linear(h, fc2_weight, fc2_bias)
    return _added(_normed(y, norm_weight, norm_bias, eps, norm == "post"), residual)


def _fused_attention_half(
    x: Tensor,
    q_weight: Tensor,
    k_weight: Tensor | None,
    v_weight: Tensor | None,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    region_map: Tensor | None,
    wire: str,
    scale: float,
    mask_value: float,
    num_heads: int,
    residual: bool,
    norm: str,
    eps: float,
    by_layers: bool | None,
) -> Tensor:
    weights = [weight for weight in (q_weight, k_weight, v_weight) if weight is not None]
    z = _normed(x, norm_weight, norm_bias, eps, norm == "pre")
    qkv = F.linear(z, torch.cat(weights), qkv_bias).unflatten(-1, (3, num_heads, -1))
    numbers = (scale, mask_value, 0.0)
    out, _ = _attention(qkv, bias_table, bias, logit_scale, qkv_bias, region_map, None, wire, *numbers)
    y = F.linear(out, proj_weight, proj_bias)
    return _added(_normed(y, norm_weight, norm_bias, eps, norm == "post"), x if residual else None)


def _fused_position_bias(offsets: Tensor, fc1_weight: Tensor, fc1_bias: Tensor | None, fc2_weight: Tensor) -> Tensor:
    h = F.relu(F.linear(offsets.flatten(0, -2), fc1_weight, fc1_bias)).float()
    return 16 * torch.sigmoid(F.linear(h, fc2_weight.float()))


# --- registration

_FORWARD: dict[str, Callable[..., Any]] = {
    "window_attention_qkvpacked_fwd": _attention,
    "window_attention_fwd": _attention,
    "window_partition": _window_partition,
    "window_reverse": _window_reverse,
    "patch_merging_norm_fwd": _patch_merging_norm,
    "layer_norm_fwd": _layer_norm,
    "residual_layer_norm_fwd": _residual_layer_norm,
    "residual_post_norm_fwd": _residual_post_norm,
    "mlp_half_triton": _mlp_half,
    "fused_linear": _fused_linear,
    "fused_patch_linear": _fused_patch_linear,
    "fused_mlp": _fused_mlp,
    "fused_attention_half": _fused_attention_half,
    "fused_position_bias": _fused_position_bias,
}
_WITH_TRITON = ("window_attention", "window_partition", "window_reverse", "patch_merging")
_FORWARD |= {f"{name}_triton": function for name, function in _FORWARD.items() if name.startswith(_WITH_TRITON)}
DECOMPOSITIONS = {getattr(ops, name).default: function for name, function in _FORWARD.items()}


def _register(exporter: ModuleType) -> None:
    """Register the decompositions in torch's global table, from which torch.onnx.export reads them.

    If the environment variable CI is set, Inductor also reads that table, and refuses to compile ops that have an
    entry. The ops are therefore registered only when ONNX's exporter is imported.
    """
    for op, function in DECOMPOSITIONS.items():
        torch._decomp.register_decomposition(op)(function)


at_import("torch.onnx._internal.exporter._decomp", _register)
for _op in DECOMPOSITIONS:
    # Without a "meta" entry a fake tensor of symbolic size would use the decomposition, not the op's fake kernel.
    torch._decomp.register_decomposition(_op, type="meta")(_op)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return the table for ``run_decompositions`` that turns an exported program into core ATen without custom ops.

    The table is ``torch.export.default_decompositions()``, which keeps custom ops, plus this package's forward ops::

        program = torch.export.export(model, (x,)).run_decompositions(swinkernels.decompositions())

    Converters that support only ATen accept such a program, and it loads without this package. An op with
    active dropout has no decomposition and raises NotImplementedError: call ``model.eval()`` first.
    """
    table = torch.export.default_decompositions()
    table.update(DECOMPOSITIONS)
    return table
