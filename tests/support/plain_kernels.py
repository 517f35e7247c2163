"""Kernels of the ops in plain PyTorch on the CPU, so that the Python code around the kernels runs on any machine.

Each kernel asserts what the op guarantees about the arguments, computes in float64 and rounds once. The backward
passes are explicit, because kernels run below autograd.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.window_spec import WindowSpec

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check(x: Tensor, dtype: torch.dtype, *parameters: Tensor | None) -> None:
    assert (x.dtype, dtype) in _backends.NORM_DTYPES
    assert all(p is None or (p.dtype in KERNEL_DTYPES and p.dim() == 1) for p in parameters)


def _norm(rows: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalised ``rows`` in float64, and their mean and rstd in float32."""
    mean = rows.mean(-1)
    rstd = ((rows - mean[..., None]).square().mean(-1) + eps).rsqrt()
    z = (rows - mean[..., None]) * rstd[..., None]
    z = z if weight is None else z * weight.double()
    return z if bias is None else z + bias.double(), mean.float(), rstd.float()


def _norm_backward(
    dz: Tensor, rows: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor, *needed: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of ``rows`` in float64, and the gradients of the parameters in float32."""
    assert mean.dtype == rstd.dtype == torch.float32
    assert mean.shape == rstd.shape == rows.shape[:-1]
    assert needed[0] <= (weight is not None)
    dz, rstd = dz.double(), rstd.double()[..., None]
    y = (rows - mean.double()[..., None]) * rstd
    dy = dz if weight is None else dz * weight.double()
    drows = rstd * (dy - dy.mean(-1, keepdim=True) - y * (dy * y).mean(-1, keepdim=True))
    sums = [
        x.reshape(-1, x.shape[-1]).sum(0).float() if need else x.new_empty(0, dtype=torch.float32)
        for x, need in zip((dz * y, dz), needed, strict=True)
    ]
    return drows, *sums


def _window_partition(x, window_size, shift_size, roll_then_pad):
    assert len(window_size) == len(shift_size) == 3
    rank = x.dim() - 2
    order = "roll_then_pad" if roll_then_pad else "pad_then_roll"
    return reference.window_partition(x, window_size[-rank:], shift_size[-rank:], pad_order=order)


def _window_reverse(windows, size, window_size, shift_size, roll_then_pad):
    assert len(window_size) == len(shift_size) == 3
    rank = len(size)
    order = "roll_then_pad" if roll_then_pad else "pad_then_roll"
    return reference.window_reverse(windows, window_size[-rank:], size, shift_size[-rank:], pad_order=order)


def _pieces(rank: int, factor: list[int], neighbours: list[int]) -> list[tuple]:
    """Return, for each neighbour in a merged row, the index that selects its tokens from a padded map."""
    assert len(factor) == 3
    assert len(neighbours) == math.prod(factor)
    offsets = list(itertools.product(*(range(f) for f in factor)))
    steps = factor[-rank:]
    return [
        (slice(None), *(slice(o, None, f) for o, f in zip(offsets[n][-rank:], steps, strict=True))) for n in neighbours
    ]


def _padded(x: Tensor, factor: list[int]) -> Tensor:
    size = [-(-s // f) * f for s, f in zip(x.shape[1:-1], factor[-(x.dim() - 2) :], strict=True)]
    y = torch.zeros(x.shape[0], *size, x.shape[-1], dtype=torch.float64)
    y[(slice(None), *map(slice, x.shape[1:-1]))] = x.double()
    return y


def _patch_merging_norm_fwd(x, weight, bias, factor, neighbours, eps, dtype):
    _check(x, dtype, weight, bias)
    padded = _padded(x, factor)
    rows = torch.cat([padded[piece] for piece in _pieces(x.dim() - 2, factor, neighbours)], dim=-1)
    z, mean, rstd = _norm(rows, weight, bias, eps)
    return z.to(dtype), mean, rstd


def _patch_merging_norm_bwd(dz, x, weight, mean, rstd, factor, neighbours, needs_dweight, needs_dbias):
    padded, pieces = _padded(x, factor), _pieces(x.dim() - 2, factor, neighbours)
    rows = torch.cat([padded[piece] for piece in pieces], dim=-1)
    drows, *sums = _norm_backward(dz, rows, weight, mean, rstd, needs_dweight, needs_dbias)
    dx = torch.zeros_like(padded)
    for piece, d in zip(pieces, drows.split(x.shape[-1], dim=-1), strict=True):
        dx[piece] += d
    dx = dx[(slice(None), *map(slice, x.shape[1:-1]))]
    return dx.to(x.dtype, memory_format=torch.contiguous_format, copy=True), *sums


def _laid_out(x: Tensor, factor: list[int]) -> Tensor:
    """Return ``x`` in float64, with the parts of every token at their positions in the expanded map."""
    if not factor:
        return x.double()
    rank = x.dim() - 2
    factors = factor[-rank:]
    assert len(factor) == 3
    assert factor[:-rank] == [1] * (3 - rank)
    parts = x.double().unflatten(-1, (*factors, -1))
    order = [axis for i in range(rank) for axis in (1 + i, 1 + rank + i)]
    size = [s * f for s, f in zip(x.shape[1:-1], factors, strict=True)]
    return parts.permute(0, *order, -1).reshape(x.shape[0], *size, parts.shape[-1])


def _taken_back(y: Tensor, factor: list[int]) -> Tensor:
    """Invert :func:`_laid_out`."""
    if not factor:
        return y
    rank = y.dim() - 2
    factors = factor[-rank:]
    cut = [n for s, f in zip(y.shape[1:-1], factors, strict=True) for n in (s // f, f)]
    parts = y.reshape(y.shape[0], *cut, y.shape[-1])
    return parts.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1).flatten(1 + rank)


def _layer_norm_fwd(x, weight, bias, factor, eps, dtype):
    _check(x, dtype, weight, bias)
    z, mean, rstd = _norm(_laid_out(x, factor), weight, bias, eps)
    return z.to(dtype, copy=True), mean, rstd


def _layer_norm_bwd(dz, x, weight, mean, rstd, factor, needs_dweight, needs_dbias):
    rows = _laid_out(x, factor)
    drows, *sums = _norm_backward(dz, rows, weight, mean, rstd, needs_dweight, needs_dbias)
    return _taken_back(drows, factor).to(x.dtype, memory_format=torch.contiguous_format, copy=True), *sums


def _scale(x: Tensor, drop_path_scale: Tensor | None) -> Tensor | float:
    if drop_path_scale is None:
        return 1.0
    assert drop_path_scale.dtype == torch.float32
    assert drop_path_scale.shape == x.shape[:1]
    return drop_path_scale.double().reshape(-1, *(1,) * (x.dim() - 1))


def _residual_layer_norm_fwd(x, y, drop_path_scale, weight, bias, eps):
    _check(x, y.dtype, weight, bias)
    s = (x.double() + _scale(x, drop_path_scale) * y.double()).to(x.dtype)
    z, mean, rstd = _norm(s.double(), weight, bias, eps)
    return s, z.to(y.dtype), mean, rstd


def _residual_layer_norm_bwd(ds, dz, s, drop_path_scale, weight, mean, rstd, needs_dweight, needs_dbias):
    drows, *sums = _norm_backward(dz, s.double(), weight, mean, rstd, needs_dweight, needs_dbias)
    dx = ds.double() + drows
    if drop_path_scale is None and dz.dtype == s.dtype:
        dy = dz.new_empty(0)
    else:
        dy = (_scale(s, drop_path_scale) * dx).to(dz.dtype, copy=True)
    return dx.to(s.dtype), dy, *sums


def _residual_post_norm_fwd(x, y, drop_path_scale, weight, bias, eps):
    _check(y, x.dtype, weight, bias)
    z, mean, rstd = _norm(y.double(), weight, bias, eps)
    return (x.double() + _scale(x, drop_path_scale) * z).to(x.dtype), mean, rstd


def _residual_post_norm_bwd(ds, y, drop_path_scale, weight, mean, rstd, needs_dweight, needs_dbias):
    dz = _scale(y, drop_path_scale) * ds.double()
    drows, *sums = _norm_backward(dz, y.double(), weight, mean, rstd, needs_dweight, needs_dbias)
    return drows.to(y.dtype), *sums


def _attention(maps, tables, *wire):
    """Return the reference's output and log-sum-exp; the seed tensor determines the dropout mask."""
    spec = WindowSpec.parse(*wire)
    bias_table, bias, logit_scale, pad_qkv, region_map, seed = tables
    assert all(t is None or t.dtype == torch.float32 for t in (bias_table, bias, logit_scale))
    assert pad_qkv is None or pad_qkv.dtype == maps[0].dtype
    assert region_map is None or region_map.dtype == torch.int32
    assert (seed is None) == (spec.dropout_p == 0.0)
    q, k, v = maps[0].unbind(-3) if len(maps) == 1 else maps
    rank = q.dim() - 3
    assert len(spec.window_size) == rank
    generator = None
    if seed is not None:
        assert (seed.dtype, seed.shape) == (torch.int64, (1,))
        generator = torch.Generator().manual_seed(seed.item())
    return reference.window_attention(
        q,
        k,
        v,
        bias_table,
        num_heads=q.shape[-2],
        bias=bias,
        logit_scale=logit_scale,
        pad_qkv=pad_qkv,
        region_map=None if region_map is None else region_map.reshape(region_map.shape[-rank:]),
        generator=generator,
        return_lse=True,
        **spec.options(),
    )


def _attention_kernels(count: int) -> tuple[Callable, Callable]:
    """Return the forward and backward kernels of the op that takes ``count`` maps: one (qkv) or three (q, k, v)."""

    def fwd(*args):
        out, lse = _attention(args[:count], args[count : count + 6], *args[-4:])
        return out, lse.float() if WindowSpec.parse(*args[-4:]).needs_lse else torch.zeros(0)

    def bwd(dout, *args):
        maps, (lse, *tables), (*wire, bits) = args[:count], args[count : count + 7], args[count + 7 :]
        needs = [bits >> i & 1 for i in range(4)]
        assert lse.dtype == torch.float32
        assert lse.numel() > 0 or dout.numel() == 0
        wanted = [*maps, *(t for t, need in zip(tables, needs, strict=False) if need)]
        leaves = {id(x): x.detach().clone().requires_grad_() for x in wanted}
        given = [leaves[id(x)] for x in maps], [t if t is None else leaves.get(id(t), t) for t in tables]

        def differentiate():
            out, _ = _attention(*given, *wire)
            return torch.autograd.grad(out, [leaves[id(x)] for x in wanted], dout, allow_unused=True)

        with concurrent.futures.ThreadPoolExecutor(1) as elsewhere:  # the calling thread runs below autograd
            grads = iter(elsewhere.submit(differentiate).result())
        dmaps = [next(grads) for _ in maps]
        sums = []
        for table, need in zip(tables, needs, strict=False):
            grad = next(grads) if need else torch.zeros(0)
            sums.append(torch.zeros(table.shape) if grad is None else grad.float())
        return *dmaps, *sums

    return fwd, bwd


_KERNELS = {
    "window_partition": _window_partition,
    "window_reverse": _window_reverse,
    "patch_merging_norm_fwd": _patch_merging_norm_fwd,
    "patch_merging_norm_bwd": _patch_merging_norm_bwd,
    "layer_norm_fwd": _layer_norm_fwd,
    "layer_norm_bwd": _layer_norm_bwd,
    "residual_layer_norm_fwd": _residual_layer_norm_fwd,
    "residual_layer_norm_bwd": _residual_layer_norm_bwd,
    "residual_post_norm_fwd": _residual_post_norm_fwd,
    "residual_post_norm_bwd": _residual_post_norm_bwd,
}
WITH_TRITON = ("window_partition", "window_reverse", "patch_merging_norm_fwd", "patch_merging_norm_bwd")
# Attention has C++ kernels on the CPU, so plain kernels replace only Triton's.
_TRITON_KERNELS = {
    f"{form}_{direction}": kernel
    for form, count in (("window_attention_qkvpacked", 1), ("window_attention", 3))
    for direction, kernel in zip(("fwd", "bwd"), _attention_kernels(count), strict=True)
}


@contextlib.contextmanager
def attached() -> Iterator[None]:
    """Register the plain kernels for the ops' CPU dispatch key while the context is active."""
    library = torch.library.Library("swinkernels", "IMPL")
    for name, kernel in _KERNELS.items():
        library.impl(name, kernel, "CPU")
    if not _backends.interpreting():  # otherwise Triton's own kernels are registered
        for name, kernel in {**{name: _KERNELS[name] for name in WITH_TRITON}, **_TRITON_KERNELS}.items():
            library.impl(f"{name}_triton", kernel, "CPU")
    try:
        yield
    finally:
        library._destroy()
