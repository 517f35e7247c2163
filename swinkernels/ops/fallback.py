"""Implements the backend "torch": every op in plain PyTorch, written for speed. "auto" uses it if no kernel can run.

The code consists of whole-tensor operations, which PyTorch runs fast and inductor fuses, on any device and in any
floating dtype. It can be differentiated as often as those operations. 16-bit maps are multiplied in their own dtype, as
in the libraries' code. The exceptions are the scores of float16 maps, which would overflow, and those of v2, which
would lose accuracy. Both are computed in float32, like softmax. ``swinkernels.reference`` has the ops' definitions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from swinkernels.ops._arguments import frame_size
from swinkernels.ops._fused_linear import Norm, cast_linear, linear
from swinkernels.ops._fused_linear import layer_norm as rows_normed
from swinkernels.ops._fused_patches import patch_linear
from swinkernels.ops._library import Found, is_plain, is_untraced

# torch's attention kernels map batch * heads to an axis of the CUDA grid, which has at most this many blocks.
_MOST_HEADS = 65535


# --- windows


def _pad(x: Tensor, pads: Sequence[tuple[int, int]]) -> Tensor:
    """Pad axes 1, 2, ... of a map with zeros; ``pads`` contains the amounts (before, after) per axis."""
    behind = [0, 0] * (x.dim() - 1 - len(pads))
    return F.pad(x, [*behind, *(amount for pair in reversed(pads) for amount in pair)])


def _cut(x: Tensor, first: int, window: Sequence[int], grid: bool = False, heads_first: bool = False) -> Tensor:
    """Cut (..., *frame, ...) into (..., num_windows, N, ...); the frame's axes begin at axis ``first``.

    With ``heads_first``, the axis after the frame precedes the tokens: (..., num_windows, heads, N, ...).
    """
    rank = len(window)
    last = first + rank
    counts = [x.shape[first + i] // w for i, w in enumerate(window)]
    split = [n for pair in zip(counts, window, strict=True) for n in (reversed(pair) if grid else pair)]
    windows = list(range(first + grid, first + 2 * rank, 2))
    tokens = list(range(first + (not grid), first + 2 * rank, 2))
    behind = list(range(first + 2 * rank, x.dim() + rank))
    heads = [behind.pop(0)] if heads_first else []
    x = x.reshape(*x.shape[:first], *split, *x.shape[last:])
    x = x.permute(*range(first), *windows, *heads, *tokens, *behind).flatten(first, first + rank - 1)
    return x.flatten(first + 1 + heads_first, first + rank + heads_first)


def _join(x: Tensor, first: int, frame: Sequence[int], window: Sequence[int], grid: bool = False) -> Tensor:
    """Undo :func:`_cut`."""
    rank = len(window)
    counts = [p // w for p, w in zip(frame, window, strict=True)]
    x = x.unflatten(first + 1, tuple(window)).unflatten(first, counts)
    pairs = [(first + i, first + rank + i) for i in range(rank)]
    order = [axis for windows, tokens in pairs for axis in ((tokens, windows) if grid else (windows, tokens))]
    x = x.permute(*range(first), *order, *range(first + 2 * rank, x.dim()))
    return x.reshape(*x.shape[:first], *frame, *x.shape[first + 2 * rank :])


class _Permute(torch.autograd.Function):
    """Permutes axis 1 of x. The backward pass is a gather, too; that of index_select adds row by row on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return dout.index_select(1, inverse), None, None


class _Frame:
    """Cuts maps into windows and joins windows into maps. The frame is a map's size rounded up to whole windows."""

    def __init__(
        self,
        size: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int],
        pad_order: str,
        before: Sequence[int] | None = None,
        grid: bool = False,
    ) -> None:
        self.size, self.window, self.grid = tuple(size), tuple(window), grid
        self.frame = frame_size(size, window)
        before = before or (0,) * len(self.size)
        self.pads = [(b, p - s - b) for b, p, s in zip(before, self.frame, size, strict=True)]
        self.is_padded = any(p != s for p, s in zip(self.frame, self.size, strict=True))
        self.axes = [1 + i for i, s in enumerate(shift) if s]
        self.steps = [s for s in shift if s]
        # Without pad tokens, pad_order makes no difference.
        self.rolls_first = pad_order == "roll_then_pad" and self.is_padded and bool(self.axes)

    def _padded(self, x: Tensor, pads: Sequence[tuple[int, int]], pad: Tensor | None) -> Tensor:
        """Add pad tokens, ``pad`` or zero, before and after the map on each axis."""
        x = _pad(x, pads)
        if pad is None:
            return x
        inside = _pad(x.new_ones((1, *self.size)), pads)
        return x + (1 - inside).reshape(inside.shape + (1,) * pad.dim()) * pad

    @property
    def gathers(self) -> bool:
        """Return True if one gather replaces a roll and a cut, which would copy the map twice."""
        return bool(self.axes) and not self.rolls_first and is_untraced(())

    def windows(self, x: Tensor, pad: Tensor | None = None, heads_first: bool = False) -> Tensor:
        """Cut (B, *S, ...) into (B, num_windows, N, ...); pad tokens are ``pad`` or zero.

        With ``heads_first``, (B, *S, heads, ...) is cut into (B, num_windows, heads, N, ...).
        """
        if self.rolls_first:
            x = torch.roll(x, [-s for s in self.steps], self.axes)
        if self.is_padded:
            x = self._padded(x, self.pads, pad)
        if self.gathers:
            x = _Permute.apply(x.flatten(1, len(self.size)), *self._places(x.device))
            x = x.unflatten(1, (-1, math.prod(self.window)))
            return x.transpose(2, 3) if heads_first else x
        if self.axes and not self.rolls_first:
            x = torch.roll(x, [-s for s in self.steps], self.axes)
        return _cut(x, 1, self.window, self.grid, heads_first)

    def keys(self, x: Tensor, key_window: Sequence[int], pad: Tensor | None = None) -> Tensor:
        """Cut (B, *S, heads, ...) into larger, overlapping windows: (B, num_windows, heads, M, ...).

        A key window has the same centre as its window of queries.
        """
        if tuple(key_window) == self.window:
            return self.windows(x, pad, heads_first=True)
        rank = len(self.window)
        wider = [(m - w) // 2 for m, w in zip(key_window, self.window, strict=True)]
        x = self._padded(x, [(b + e, a + e) for (b, a), e in zip(self.pads, wider, strict=True)], pad)
        for axis, (w, m) in enumerate(zip(self.window, key_window, strict=True), start=1):
            x = x.unfold(axis, m, w)
        x = x.movedim(tuple(range(-rank, 0)), tuple(range(1 + rank, 1 + 2 * rank)))
        return x.flatten(1 + rank, 2 * rank).flatten(1, rank).transpose(2, 3)

    def map(self, windows: Tensor) -> Tensor:
        """Join windows (B, num_windows, N, ...) into a contiguous map (B, *S, ...), without pad tokens."""
        if self.gathers:
            places, inverse = self._places(windows.device)
            x = _Permute.apply(windows.flatten(1, 2), inverse, places).unflatten(1, self.frame)
        else:
            x = _join(windows, 1, self.frame, self.window, self.grid)
            if self.axes and not self.rolls_first:
                x = torch.roll(x, self.steps, self.axes)
        for axis, ((b, _), s) in enumerate(zip(self.pads, self.size, strict=True), start=1):
            x = x.narrow(axis, b, s) if self.is_padded else x
        if self.rolls_first:
            x = torch.roll(x, self.steps, self.axes)
        return x.contiguous()

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the index in the frame of each token of the shifted windows, and the inverse permutation."""

        def make() -> Tensor:
            tokens = torch.arange(math.prod(self.frame), device=device).reshape(self.frame)
            rolled = torch.roll(tokens, [-s for s in self.steps], [axis - 1 for axis in self.axes])
            places = _cut(rolled, 0, self.window, self.grid).flatten()
            return torch.stack([places, places.argsort()])

        places, inverse = _kept((self.frame, self.window, self.grid, *self.axes, *self.steps, device), make)
        return places, inverse


def window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int], *, pad_order: str) -> Tensor:
    return _Frame(x.shape[1:-1], window, shift, pad_order).windows(x).flatten(0, 1).contiguous()


def window_reverse(
    windows: Tensor, window: Sequence[int], size: Sequence[int], shift: Sequence[int], *, pad_order: str
) -> Tensor:
    frame = _Frame(size, window, shift, pad_order)
    per_image = math.prod(frame.frame) // math.prod(window)
    return frame.map(windows.unflatten(0, (-1, per_image)))


# --- attention

_KEPT = Found(64)


def _kept(key: Any, make: Callable[[], Tensor]) -> Tensor:
    """Return ``make()``, a small tensor that depends only on the geometry, and cache it in plain eager calls."""
    if not is_plain(()):  # a fake tensor, for example, must not be cached
        return make()
    value = _KEPT.get(key)
    if value is None:
        with torch.inference_mode(False):
            value = make()
        _KEPT.put(key, value)
    return value


def table_rows(
    window: Sequence[int],
    table_window: Sequence[int],
    key_window: Sequence[int],
    table_pairs: Sequence[bool],
    device: torch.device,
) -> Tensor:
    """Return the row index in the bias table for each query i and key j of a window, (N * M,)."""
    is_usual = tuple(key_window) == tuple(window)
    of_query, of_key = (table_window, table_window) if is_usual else (window, key_window)
    query = torch.arange(math.prod(window), device=device)
    key = torch.arange(math.prod(key_window), device=device)
    index = torch.zeros_like(query)[:, None]
    for axis, (w, m, pairs) in enumerate(zip(of_query, of_key, table_pairs, strict=True)):
        i = (query // math.prod(of_query[axis + 1 :]) % w)[:, None]
        j = (key // math.prod(of_key[axis + 1 :]) % m)[None, :]
        index = index * (w * m) + (i + j * w) if pairs else index * (w + m - 1) + (i - j + m - 1)
    return index.flatten()


def bias_of_table(table: Tensor, rows: Tensor, n: int) -> Tensor:
    """Look up the bias, (heads, N, M) or (types, heads, N, M), in a table (rows, heads) or (rows, types, heads)."""
    bias = table.index_select(0, rows).unflatten(0, (n, -1))
    return bias.permute(*range(2, bias.dim()), 0, 1).contiguous()  # as the scores, to which it is added


def _regions(frame: _Frame, shift: Sequence[int], periodic: Sequence[bool], device: torch.device) -> Tensor:
    """Return each window token's region for the mask of the shift, (num_windows, N)."""
    region = torch.zeros([1] * len(shift), dtype=torch.int32, device=device)
    for axis, (p, w, s, wraps) in enumerate(zip(frame.frame, frame.window, shift, periodic, strict=True)):
        g = torch.arange(p, device=device)
        on_axis = (g >= p - w).int() + (g >= p - s).int() if s > 0 and not wraps else torch.zeros_like(g).int()
        region = 3 * region + on_axis.reshape([-1 if i == axis else 1 for i in range(len(shift))])
    return _cut(region, 0, frame.window, frame.grid)


def _addend(
    frame: _Frame,
    wide: torch.dtype,
    bias_table: Tensor | None,
    bias: Tensor | None,
    region_map: Tensor | None,
    device: torch.device,
    *,
    shift_size: Sequence[int],
    table_window: Sequence[int],
    key_window: Sequence[int],
    table_pairs: Sequence[bool],
    periodic: Sequence[bool],
    mask_value: float,
) -> Tensor | None:
    """Return bias plus mask, (heads, N, M) or (num_windows, heads or 1, N, M), or None if there is neither."""
    window, n = frame.window, math.prod(frame.window)
    addend = None
    if bias_table is not None:
        of = window, tuple(table_window), tuple(key_window), tuple(table_pairs), device
        rows = _kept(of, lambda: table_rows(*of))
        addend = bias_of_table(bias_table.to(wide), rows, n)
    elif bias is not None:
        addend = bias.to(wide)
    if addend is not None and addend.dim() == 4:  # consecutive windows share a type
        addend = addend.repeat_interleave(math.prod(frame.frame) // n // addend.shape[0], dim=0)
    if region_map is not None:
        region = _cut(region_map, 0, window, frame.grid)
    elif any(s and not wraps for s, wraps in zip(shift_size, periodic, strict=True)):
        key = frame.frame, window, frame.grid, tuple(shift_size), tuple(periodic), device
        region = _kept(key, lambda: _regions(frame, shift_size, periodic, device))
    else:
        return addend
    mask = (mask_value * (region[:, :, None] != region[:, None, :]).to(wide))[:, None]
    return mask if addend is None else addend + mask


def cosine_factors(q: Tensor, k: Tensor, logit_scale: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return q and k as unit vectors, and the factor of each head's scores (v2)."""
    # A factor of up to 100 multiplies the rounding errors of the unit vectors, so they are computed in ``wide``.
    q, k = F.normalize(q.to(wide), dim=-1), F.normalize(k.to(wide), dim=-1)
    return q, k, logit_scale.to(wide).reshape(-1, 1, 1).clamp(max=math.log(100.0)).exp()


def with_axis_tables(
    q: Tensor, k: Tensor, axis_tables: Sequence[Tensor], window: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Extend q and k to (..., N, head_dim + sum(window)), so that q k^T includes the terms of ``axis_tables``.

    A query's product with a table row depends on only one coordinate of the key. q is extended by these products, one
    for every coordinate of every axis, and k by a one-hot vector of its coordinate on every axis. No (N, N) bias is
    needed, and every attention kernel accepts such q and k.
    """
    if q.dtype == torch.float16:  # the products would overflow
        q, k = q.float(), k.float()
    coordinates, products, device = [], [q * scale], q.device
    token = torch.arange(math.prod(window), device=device)
    for axis, (table, w) in enumerate(zip(axis_tables, window, strict=True)):
        at = torch.arange(w, device=device)
        rows = table.to(q.dtype)[at[:, None] - at + w - 1]  # (query coordinate, key coordinate, head_dim)
        place = axis - len(window) - 1
        of_axis = q.unflatten(-2, tuple(window)).movedim(place, -2)  # (..., w, head_dim)
        product = torch.einsum("...id,ijd->...ij", of_axis, rows).movedim(-2, place)
        products.append(product.flatten(-len(window) - 1, -2))
        coordinates.append((token // math.prod(window[axis + 1 :]) % w)[:, None] == at)
    ones = torch.cat(coordinates, dim=1).to(k.dtype)
    return torch.cat(products, dim=-1), torch.cat([k, ones.expand(*k.shape[:-1], -1)], dim=-1)


def scores_of(q: Tensor, k: Tensor, addend: Tensor | None, factor: float | Tensor) -> Tensor:
    """Return factor * q k^T + addend for windows (B, num_windows, heads, N or M, head_dim)."""
    if q.dtype == torch.float16:  # the scores would overflow
        q, k = q.float(), k.float()
    scores = (q @ k.transpose(-2, -1)) * factor if isinstance(factor, Tensor) else (q * factor) @ k.transpose(-2, -1)
    if addend is None:
        return scores
    in_place = scores.dtype == addend.dtype and is_plain((scores, addend))  # transforms may not write in place
    return scores.add_(addend) if in_place else scores + addend


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    addend: Tensor | None,
    factor: float | Tensor,
    dropout_p: float,
    generator: torch.Generator | None,
    wide: torch.dtype,
    return_attention: bool,
) -> tuple[Tensor, Tensor | None]:
    """Return softmax(factor * q k^T + addend) v and, if requested, the attention weights.

    q, k and v are windows (B, num_windows, heads, N or M, head_dim); v may have shorter rows than q and k.
    """
    batch, windows, heads = q.shape[:3]
    head_dim = v.shape[-1]
    fused = dropout_p == 0.0 and not return_attention
    if q.device.type == "cpu":
        # On a CPU the fused call has no forward-mode derivative, and a slower backward pass than separate operations.
        needs_gradient = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, addend))
        is_compiled = torch.compiler.is_compiling() and forward_ad._current_level < 0
        fused = fused and not needs_gradient and (is_compiled or is_plain(()))
    else:
        fused = fused and batch * windows * heads <= _MOST_HEADS
    if fused and not isinstance(factor, Tensor):
        q, k = q.to(v.dtype), k.to(v.dtype)
        mask = None if addend is None else addend.to(v.dtype)
        if mask is not None and mask.dim() == 3:
            mask = mask[None]
        if q.shape[-1] > head_dim:  # torch's fast kernels require rows of equal length
            v = F.pad(v, (0, q.shape[-1] - head_dim))
        # q, k, v and the mask need four axes. The windows are merged with the batch, which copies nothing, or with the
        # heads if there are several images and the mask differs between windows.
        if mask is None or mask.shape[0] == 1 or batch == 1:
            q, k, v = (x.flatten(0, 1) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor)
            return out[..., :head_dim].unflatten(0, (batch, windows)), None
        q, k, v = (x.flatten(1, 2) for x in (q, k, v))
        mask = mask.expand(-1, heads, -1, -1).flatten(0, 1)[None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=factor)
        return out[..., :head_dim].unflatten(1, (windows, heads)), None
    probs = scores_of(q, k, addend, factor).softmax(-1, dtype=wide)
    if generator is not None and dropout_p > 0.0:
        keep = torch.empty_like(probs).bernoulli_(1.0 - dropout_p, generator=generator)
        probs = probs * keep if dropout_p == 1.0 else probs * keep / (1.0 - dropout_p)
    elif dropout_p > 0.0:
        probs = F.dropout(probs, dropout_p)
    probs = probs.to(v.dtype)
    return probs @ v, probs if return_attention else None


def _attention(
    split: Callable[[_Frame, Tensor | None], tuple[Tensor, Tensor, Tensor]],
    x: Tensor,
    size: Sequence[int],
    *,
    bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    region_map: Tensor | None,
    axis_tables: Sequence[Tensor] | None,
    generator: torch.Generator | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    scale: float,
    pad_order: str,
    pad_before: Sequence[int],
    dropout_p: float,
    grid: bool,
    return_attention: bool,
    **masking: Any,
) -> Any:
    frame = _Frame(size, window_size, shift_size, pad_order, pad_before, grid)
    wide = torch.promote_types(x.dtype, torch.float32)
    if pad_qkv is not None:
        pad_qkv = pad_qkv.to(x.dtype).reshape(3, num_heads, -1)
    q, k, v = split(frame, pad_qkv)
    factor: float | Tensor = scale
    if logit_scale is not None:
        q, k, factor = cosine_factors(q, k, logit_scale, wide)
    if axis_tables is not None:
        (q, k), factor = with_axis_tables(q, k, axis_tables, window_size, scale), 1.0
    addend = _addend(frame, wide, bias_table, bias, region_map, x.device, shift_size=shift_size, **masking)
    out, weights = _attend(q, k, v, addend, factor, dropout_p, generator, wide, return_attention)
    out = frame.map(out.transpose(2, 3)).flatten(-2)
    return (out, weights) if return_attention else out


def _split(
    frame: _Frame, key_window: tuple[int, ...], maps: Sequence[Tensor], pad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return q, k and v of the windows, (B, num_windows, heads, N or M, head_dim)."""
    q, k, v = maps
    pad_q, pad_k, pad_v = (None,) * 3 if pad is None else pad.unbind()
    q = frame.windows(q, pad_q, heads_first=True)
    return q, frame.keys(k, key_window, pad_k), frame.keys(v, key_window, pad_v)


def window_attention_qkvpacked(qkv: Tensor, *, key_window: tuple[int, ...], **arguments: Any) -> Any:
    """Run the op on checked arguments: qkv is (B, *S, 3, num_heads, head_dim); per-axis options are tuples."""

    def split(frame: _Frame, pad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        if key_window != frame.window or not frame.gathers:
            return _split(frame, key_window, qkv.unbind(-3), pad)
        windows = frame.windows(qkv, pad)  # (B, num_windows, N, 3, heads, head_dim): one gather for all three
        q, k, v = windows.permute(3, 0, 1, 4, 2, 5).unbind()
        return q, k, v

    return _attention(split, qkv, qkv.shape[1:-3], key_window=key_window, **arguments)


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, key_window: tuple[int, ...], **arguments: Any) -> Any:
    """Run the op on checked arguments: q, k and v are (B, *S, num_heads, head_dim); per-axis options are tuples."""

    def split(frame: _Frame, pad: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return _split(frame, key_window, (q, k, v), pad)

    return _attention(split, q, q.shape[1:-2], key_window=key_window, **arguments)


# --- norms


def widest(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> tuple[torch.dtype, Tensor | None, Tensor | None]:
    """Return the widest dtype of the arguments and the result, and the norm's parameters in this dtype."""
    if all(t is None or t.dtype == dtype for t in (x, weight, bias)):  # a fast path for the usual case
        return dtype, weight, bias
    wide = torch.promote_types(x.dtype, dtype)
    for parameter in (weight, bias):
        wide = wide if parameter is None else torch.promote_types(wide, parameter.dtype)
    return wide, None if weight is None else weight.to(wide), None if bias is None else bias.to(wide)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, dtype: torch.dtype) -> Tensor:
    """Run torch's norm, computed in the widest of the dtypes and rounded once."""
    wide, weight, bias = widest(x, weight, bias, dtype)
    x = x if x.dtype == wide else x.to(wide)
    z = rows_normed(x, weight, bias, eps)
    return z if z.dtype == dtype else z.to(dtype)


def add(x: Tensor, y: Tensor, drop_path_scale: Tensor | None) -> Tensor:
    """Return x + drop_path_scale * y in the dtype of x."""
    if drop_path_scale is not None:
        y = y * drop_path_scale.reshape(-1, *(1,) * (y.dim() - 1))
    s = x + y
    return s if s.dtype == x.dtype else s.to(x.dtype)


def residual_layer_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, drop_path_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    s = add(x, y, drop_path_scale)
    return s, layer_norm(s, weight, bias, eps=eps, dtype=y.dtype)


def residual_post_norm(
    x: Tensor, y: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, drop_path_scale: Tensor | None
) -> Tensor:
    normed = layer_norm(y, weight, bias, eps=eps, dtype=torch.promote_types(x.dtype, y.dtype))
    return add(x, normed, drop_path_scale)


# --- patches


def patch_merging(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    weight: Tensor,
    *,
    eps: float,
    neighbours: Sequence[int],
    by_channel: bool,
    norm: str,
    between: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Merge neighbouring tokens in the order of ``neighbours``; ``by_channel`` is True for the order "unfold"."""
    rank = len(neighbours).bit_length() - 1
    if between == dtype == x.dtype and not by_channel:
        factor = [1] * (x.dim() - 2 - rank) + [2] * rank
        y = patch_linear(x, weight, None, Norm(norm_weight, norm_bias, eps, norm), factor, neighbours)
        if y is not None:
            return y
    size = x.shape[-1 - rank : -1]
    if any(isinstance(s, torch.SymInt) or s % 2 for s in size):  # an exported program pads even and odd sizes
        # This is not written as s % 2, which OpenVINO cannot convert if s is symbolic.
        x = F.pad(x, [0, 0, *(amount for s in reversed(size) for amount in (0, s - s // 2 * 2))])
    # ``neighbours`` contains row-major indices, with one bit per axis and the lowest bit for the last axis.
    offsets = [[number >> (rank - 1 - axis) & 1 for axis in range(rank)] for number in neighbours]
    indices: list[tuple[Any, ...]] = [(..., *(slice(o, None, 2) for o in offset), slice(None)) for offset in offsets]
    parts = [x[index] for index in indices]
    merged = torch.stack(parts, dim=-1).flatten(-2) if by_channel else torch.cat(parts, dim=-1)
    if norm == "pre":
        if all(t is None or t.dtype == between for t in (merged, norm_weight, norm_bias, weight)):
            return linear(merged, weight, None, norm=Norm(norm_weight, norm_bias, eps))
        return cast_linear(layer_norm(merged, norm_weight, norm_bias, eps=eps, dtype=between), weight)
    return layer_norm(cast_linear(merged, weight), norm_weight, norm_bias, eps=eps, dtype=dtype)


def lay_out(x: Tensor, factor: Sequence[int]) -> Tensor:
    """Rearrange (B, *S, K * out) to (B, *(S * factor), out): the K parts of a token become neighbouring tokens."""
    rank, size = len(factor), x.shape[1:-1]
    order = [0, *(axis for i in range(1, 1 + rank) for axis in (i, i + rank)), 1 + 2 * rank]
    laid_out = x.unflatten(-1, (*factor, -1)).permute(order)
    return laid_out.reshape(x.shape[0], *(s * f for s, f in zip(size, factor, strict=True)), laid_out.shape[-1])


def normalise_parts(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, factor: Sequence[int], *, eps: float, dtype: torch.dtype
) -> Tensor:
    """Rearrange the parts of every token into neighbouring tokens, as :func:`lay_out` does, and normalise each."""
    return layer_norm(lay_out(x, factor), weight, bias, eps=eps, dtype=dtype)
