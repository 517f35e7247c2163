"""Alternatives to this package's ops: the published eager code and, for attention, other kernels.

The other kernels are SDPA, FlexAttention and cuEquivariance's triangle attention. The eager code and SDPA are timed
with and without torch.compile, FlexAttention only with it. PUBLISHED contains published times of a kernel that the
benchmarks cannot run.

This module was written from the published code, independently of the reference, so that the two share no mistake. Index
and mask tensors are created once, because the models store them in buffers. The bias table and v2's exp(logit_scale)
are cast to the dtype of the model's weights. v2's bias table is an input, because the MLP and the sigmoid that produce
it run before the attention core in every model.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from swinkernels.testing import WindowAttentionCase

Peer = Callable[..., Tensor]  # (qkv, bias_table=None, logit_scale=None, pad_qkv=None, axis_tables=None) -> out


def partition(x: Tensor, window: Sequence[int]) -> Tensor:
    """Divide a map of whole windows into windows by view, permute and copy."""
    b, *size, c = x.shape
    rank = len(size)
    x = x.view(b, *(n for s, w in zip(size, window, strict=True) for n in (s // w, w)), c)
    x = x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(-1, math.prod(window), c)


def reverse(windows: Tensor, window: Sequence[int], size: Sequence[int]) -> Tensor:
    """Undo :func:`partition`."""
    rank = len(size)
    x = windows.view(-1, *(s // w for s, w in zip(size, window, strict=True)), *window, windows.shape[-1])
    x = x.permute(0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 2 * rank + 1)
    return x.reshape(-1, *size, windows.shape[-1])


def _relative_position_index(window: Sequence[int]) -> Tensor:
    coords = torch.stack(torch.meshgrid(*(torch.arange(w) for w in window), indexing="ij")).flatten(1)
    relative = (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous()
    for axis, w in enumerate(window):
        relative[..., axis] += w - 1
        relative[..., :axis] *= 2 * w - 1
    return relative.sum(-1).flatten()


def _attention_mask(size: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> Tensor:
    image = torch.zeros(1, *size, 1)
    slices = [
        (slice(0, -w), slice(-w, -s), slice(-s, None)) if s else (slice(None),)
        for w, s in zip(window, shift, strict=True)
    ]
    for count, part in enumerate(itertools.product(*slices)):
        image[(slice(None), *part)] = count
    windows = partition(image, window).squeeze(-1)
    return (windows.unsqueeze(1) != windows.unsqueeze(2)).float() * -100.0  # (num_windows, N, N)


KINDS = ("eager", "sdpa", "flex", "cuequivariance")


def is_installed(kind: str) -> bool:
    """Return whether a peer can be imported: cuEquivariance is a separate package, the others are part of torch."""
    return kind != "cuequivariance" or importlib.util.find_spec("cuequivariance_torch") is not None


def make_peer(case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, kind: str) -> Peer:
    """Build the attention core for one case: eager, as in timm, Microsoft's code and MONAI, or with another kernel.

    All kinds compute the gradient of the table. SDPA and cuEquivariance take the bias as a tensor argument;
    FlexAttention's ``score_mod`` reads it.
    """
    size, window, rank = case.size, case.window_tuple, len(case.size)
    shift = case.shift_size if isinstance(case.shift_size, tuple) else (case.shift_size,) * rank
    heads, head_dim, n = case.num_heads, case.head_dim, math.prod(window)
    frame = _frame(size, window)
    axes = list(range(1, rank + 1))
    shifted, padded = any(shift), tuple(frame) != tuple(size)
    index = _relative_position_index(window).to(device)
    # A periodic axis has no seam, because the tokens that a shift puts next to each other are neighbours.
    wraps = case.options.get("periodic", (False,) * rank)
    seams = [0 if periodic else s for s, periodic in zip(shift, wraps, strict=True)]
    mask = _attention_mask(frame, window, seams).to(device, dtype) if any(seams) else None

    def factor(logit_scale: Tensor) -> Tensor:  # (heads, 1, 1)
        return logit_scale.clamp(max=math.log(100.0)).exp().to(dtype)

    def decomposed(q: Tensor, axis_tables: Sequence[Tensor]) -> Tensor:
        """Return Segment Anything's bias, (B * num_windows, heads, N, N), from the queries and the two axis tables."""
        offsets = [torch.arange(w, device=device)[:, None] - torch.arange(w, device=device) + w - 1 for w in window]
        rows, columns = (table.to(dtype)[i] for table, i in zip(axis_tables, offsets, strict=True))
        q = q.unflatten(2, window)
        of_rows = torch.einsum("bnhwc,hkc->bnhwk", q, rows)[..., None]
        of_columns = torch.einsum("bnhwc,wkc->bnhwk", q, columns)[..., None, :]
        return (of_rows + of_columns).reshape(-1, heads, n, n)

    # q, k, v: (B * num_windows, heads, N, d)
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logit_scale: Tensor | None) -> Tensor:
        if logit_scale is None:
            scores = (q * head_dim**-0.5) @ k.transpose(-2, -1)
        else:
            scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * factor(logit_scale)
        if bias is not None:
            scores = scores + bias
        if mask is not None:
            scores = scores.view(-1, mask.shape[0], heads, n, n) + mask.unsqueeze(1).unsqueeze(0)
            scores = scores.view(-1, heads, n, n)
        return scores.softmax(dim=-1) @ v

    def cosine(q: Tensor, k: Tensor, logit_scale: Tensor | None) -> tuple[Tensor, Tensor, float | None]:
        if logit_scale is None:
            return q, k, None
        return F.normalize(q, dim=-1) * factor(logit_scale), F.normalize(k, dim=-1), 1.0

    def fused(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, logit_scale: Tensor | None) -> Tensor:
        q, k, scale = cosine(q, k, logit_scale)
        if mask is None or bias is None:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
        # Fold the windows of an image into the head axis, so that all images use one mask without copies.
        folded = (bias + mask.unsqueeze(1)).view(1, -1, n, n)
        q, k, v = (x.reshape(-1, folded.shape[1], n, head_dim) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=folded, scale=scale).view(-1, heads, n, head_dim)

    def flexible(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        q, k, scale = cosine(q, k, logit_scale)

        def add_bias(score, b, h, i, j):
            score = score + bias[0, h, i, j]
            return score if mask is None else score + mask[b % mask.shape[0], i, j]

        return flex_attention(q, k, v, score_mod=add_bias, scale=scale)

    def triangle(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        # The kernel accepts (1, windows, heads, N, d) with one bias for all windows, so it is called once per distinct
        # mask.
        attend = importlib.import_module("cuequivariance_torch").triangle_attention
        q, k, scale = cosine(q, k, logit_scale)
        whole = bias[None]
        if mask is None:
            return attend(q[None], k[None], v[None], whole, scale=scale)[0]
        q, k, v = (x.view(-1, mask.shape[0], heads, n, head_dim) for x in (q, k, v))
        parts = []
        for windows in groups:
            alike = [x[:, windows].reshape(1, -1, heads, n, head_dim) for x in (q, k, v)]
            out = attend(*alike, whole + mask[windows[0]], scale=scale)
            parts.append(out.view(-1, len(windows), heads, n, head_dim))
        return torch.cat(parts, dim=1)[:, back].reshape(-1, heads, n, head_dim)

    if kind == "cuequivariance" and mask is not None:
        _, types = torch.unique(mask.flatten(1), dim=0, return_inverse=True)
        groups = [(types == number).nonzero().flatten() for number in range(int(types.max()) + 1)]
        back = torch.cat(groups).argsort()
    core = dict(zip(KINDS, (attention, fused, flexible, triangle), strict=True))[kind]

    def peer(
        qkv: Tensor,
        bias_table: Tensor | None = None,
        logit_scale: Tensor | None = None,
        pad_qkv: Tensor | None = None,
        axis_tables: Sequence[Tensor] | None = None,
    ) -> Tensor:
        if padded:
            whole = qkv.new_zeros(()) if pad_qkv is None else pad_qkv
            whole = whole.expand(qkv.shape[0], *frame, qkv.shape[-1]).clone()
            whole[(slice(None), *(slice(s) for s in size))] = qkv
            qkv = whole
        if shifted:
            qkv = torch.roll(qkv, shifts=[-s for s in shift], dims=axes)
        windows = partition(qkv, window).view(-1, n, 3, heads, head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = windows.unbind(0)
        bias = None if axis_tables is None else decomposed(q, axis_tables)
        if bias_table is not None:
            bias = bias_table.to(dtype)[index].view(1, n, n, heads).permute(0, 3, 1, 2).contiguous()
        out = core(q, k, v, bias, logit_scale)
        out = reverse(out.transpose(1, 2).reshape(-1, n, heads * head_dim), window, frame)
        if shifted:
            out = torch.roll(out, shifts=list(shift), dims=axes)
        return out[(slice(None), *(slice(s) for s in size))].contiguous() if padded else out

    return peer


def _frame(size: Sequence[int], window: Sequence[int]) -> list[int]:
    return [-(-s // w) * w for s, w in zip(size, window, strict=True)]


def _pad(x: Tensor, size: Sequence[int]) -> Tensor:
    """Pad a map with zeros at the end of each axis. As in published code, a map that needs no padding is not copied."""
    if tuple(size) == x.shape[1:-1]:
        return x
    widths = [n for p, s in zip(reversed(size), reversed(x.shape[1:-1]), strict=True) for n in (0, p - s)]
    return F.pad(x, [0, 0, *widths])


def window_partition(x: Tensor, window: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Pad, roll and partition a map, as Microsoft's Swin block (in 3D, MONAI's) does before its attention."""
    x = _pad(x, _frame(x.shape[1:-1], window))
    if any(shift):
        x = torch.roll(x, shifts=[-s for s in shift], dims=list(range(1, x.dim() - 1)))
    return partition(x, window)


def window_reverse(windows: Tensor, window: Sequence[int], size: Sequence[int], shift: Sequence[int]) -> Tensor:
    """Join windows into a map, roll it back and crop it, as a Swin block does after its attention."""
    x = reverse(windows, window, _frame(size, window))
    if any(shift):
        x = torch.roll(x, shifts=list(shift), dims=list(range(1, x.dim() - 1)))
    for axis, s in enumerate(size, start=1):
        x = x.narrow(axis, 0, s)
    return x.contiguous()


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply LayerNorm in the dtype of ``weight``; cast the result to ``dtype``, as autocast does before a Linear."""
    return F.layer_norm(x.to(weight.dtype), x.shape[-1:], weight, bias).to(dtype)


def gather_neighbours(x: Tensor) -> Tensor:
    """Concatenate neighbours for patch merging: with timm's permute in 2D, with MONAI's row-major slices in 3D."""
    x = _pad(x, _frame(x.shape[1:-1], (2,) * (x.dim() - 2)))
    if x.dim() == 4:
        b, h, w, c = x.shape
        return x.reshape(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 4, 2, 5).flatten(3)
    return torch.cat([x[:, i::2, j::2, k::2] for i, j, k in itertools.product((0, 1), repeat=3)], dim=-1)


def expand(x: Tensor, factor: int) -> Tensor:
    """Apply the pixel shuffle of Swin-Unet's PatchExpand and FinalPatchExpand_X4, between its Linear and its norm."""
    b, h, w, c = x.shape
    c //= factor**2
    x = x.view(b, h, w, factor, factor, c).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * factor, w * factor, c)


# Published times of FWA-2, a kernel for partitioned windows, in milliseconds on an H100, for v2's attention of 256
# windows with 6 heads of 32 channels; and our kernels' goal, as a multiple of FWA-2's speed. The keys are names in
# shapes.ATTENTION.
PUBLISHED: dict[str, dict[str, tuple[float, float]]] = {
    "fwa2.64": {"fwd": (0.073, 5.0), "bwd": (0.818, 10.0)},
    "fwa2.256": {"fwd": (0.226, 5.0), "bwd": (2.37, 10.0)},
    "fwa2.576": {"fwd": (1.007, 5.0), "bwd": (9.34, 10.0)},
}


def against_published(rows: Sequence[Mapping[str, Any]], backend: str = "cuda") -> list[dict[str, Any]]:
    """Return the verdicts on the goals in PUBLISHED, from the correct 16-bit rows of a backend."""
    return [
        {
            "goal": f"{row['direction']} at {row['shape']} against FWA-2's published {published} ms",
            "reached": published * 1000 / row["median_us"],
            "wanted": wanted,
            "unit": "times as fast",
            "verdict": "met" if published * 1000 / row["median_us"] >= wanted else "not met",
        }
        for row in rows
        if row["backend"] == backend and row["result"] == "ok" and row["dtype"] in ("bfloat16", "float16")
        for published, wanted in [PUBLISHED.get(row["shape"], {}).get(row["direction"], (0.0, 0.0))]
        if published and row["median_us"]
    ]
