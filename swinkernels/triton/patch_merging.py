"""Launches the Triton kernels of patch merging, for ``patch_merging_norm_fwd_triton`` and ``_bwd_triton``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from swinkernels.triton import _patch_merging_kernels as kernels
from swinkernels.triton._launch import ARITHMETIC, alignment, contiguous, multiprocessors, pad_to_3d, unit_stride

MAX_ROWS = 2**30
ACCESS_BYTES = 16
# These values are for maps read 16 bytes at a time; other maps need more registers for addresses, and so fewer columns
# per lane. 24 warps forward and 16 backward then share a multiprocessor, and no registers are spilled.
COLUMNS = 16  # columns of a row per lane
FORWARD_REGISTERS, FORWARD_WARPS = 80, 24
BACKWARD_REGISTERS = 128
# The number of programs of a backward pass. It is the same on every GPU, so that the order of sums, and with it the
# result, does not depend on the GPU. A GPU with about 130 multiprocessors runs two programs, of eight warps each, on
# every multiprocessor. Each program sums a share of dweight and dbias.
BACKWARD_PROGRAMS = 256
SUM_COLUMNS = 32  # columns per program of sum_shares


class Tile(NamedTuple):
    """The layout of a program's rows in registers, the number of its warps, and the number of programs."""

    parts: int
    rows: int
    width: int
    vec: int
    num_warps: int
    programs: int


def tile(length: int, itemsize: int, whole: bool, backward: bool, multiprocessors: int) -> Tile:
    """Return the tile of a kernel, derived from register use and bytes in flight; it has not been tuned on a GPU.

    ``itemsize`` is the size of a written element; ``whole`` is True if accesses of 16 bytes are possible. Each lane
    makes one access per part.
    """
    block, vec = triton.next_power_of_2(length), ACCESS_BYTES // itemsize
    columns = COLUMNS if whole or block > COLUMNS * 32 * 8 else max(vec, COLUMNS // 2)
    parts = min(columns // vec, block)
    num_warps = max(8 if backward else 4, block // (32 * columns))
    rows = max(1, 32 * num_warps * columns // block)
    programs = BACKWARD_PROGRAMS if backward else multiprocessors * max(1, FORWARD_WARPS // num_warps)
    return Tile(parts, rows, block // parts, vec, num_warps, programs)


class _Geometry(NamedTuple):
    """The values of a call that do not depend on the batch; they are computed once and cached."""

    merged: tuple[int, ...]  # S', with the map's own rank
    rows: int  # merged tokens of an image
    length: int
    tile: Tile
    arguments: tuple[tuple[int, ...], ...]  # arguments of the kernel: size, strides, step
    options: dict[str, Any]


def _table(entries: Sequence[int]) -> int:
    """Pack entries of four bits each into an integer, the first entry in the lowest bits."""
    return sum(entry << (4 * i) for i, entry in enumerate(entries))


def _runs_of(neighbours: Sequence[int]) -> dict[str, int | None]:
    """Return the kernel's tables FIRST and SECOND: the first and the second run that contain each neighbour."""
    runs: list[list[int]] = [[] for _ in neighbours]
    for run, neighbour in enumerate(neighbours):
        runs[neighbour].append(run)
    if any(len(r) > 2 for r in runs):
        raise ValueError(
            "patch_merging_norm: backend='triton' supports orders that contain a neighbour at most twice, got "
            f"{neighbours}"
        )
    first, second = (_table([r[i] if i < len(r) else kernels.NO_RUN for r in runs]) for i in range(2))
    return {"FIRST": first, "SECOND": second if any(len(r) == 2 for r in runs) else None}


@functools.lru_cache(maxsize=1024)
def _geometry(
    size: tuple[int, ...],
    channels: int,
    itemsize: int,  # of the dtype that is written
    strides: tuple[int, ...],  # of the map that is read, except its last axis
    factor: tuple[int, ...],
    neighbours: tuple[int, ...],
    backward: bool,
    multiprocessors: int,
) -> _Geometry:
    merged = tuple(-(-s // f) for s, f in zip(size, factor[-len(size) :], strict=True))
    length = math.prod(factor) * channels
    align, vec = alignment(strides, 16), ACCESS_BYTES // itemsize
    whole = align % vec == 0 and channels % vec == 0
    size, tiling = pad_to_3d(size, 1), tile(length, itemsize, whole, backward, multiprocessors)
    runs = _runs_of(neighbours) if backward else {"RUNS": _table(neighbours)}
    # If a neighbour is in two runs, a second pair of accumulators is needed, so the registers are not limited.
    bounded = whole and runs.get("SECOND") is None
    registers = BACKWARD_REGISTERS if backward else FORWARD_REGISTERS
    steps = [s // align for s in strides]
    step, counts = [tiling.programs * tiling.rows], pad_to_3d(merged, 1)
    for count in reversed(counts):  # splits the step into (image, i0, i1, i2)
        step[:1] = divmod(step[0], count)
    return _Geometry(
        merged=merged,
        rows=math.prod(merged),
        length=length,
        tile=tiling,
        arguments=(size, (steps[0], *pad_to_3d(steps[1:], 0)), tuple(step)),
        options={
            "CHANNELS": channels,
            "FACTOR": factor,
            **runs,
            "PARTS": tiling.parts,
            "ROWS": tiling.rows,
            "WIDTH": tiling.width,
            "VEC": tiling.vec,
            "ALIGN": align,
            "HAS_PADDING": any(s % f != 0 for s, f in zip(size, factor, strict=True)),
            "PROGRAMS": tiling.programs,
            "num_warps": tiling.num_warps,
            **ARITHMETIC,
            "maxnreg": registers if bounded else None,
        },
    )


def _prepare(x: Tensor, itemsize: int, factor: Sequence[int], neighbours: Sequence[int], backward: bool) -> _Geometry:
    geometry = _geometry(
        tuple(x.shape[1:-1]), x.shape[-1], itemsize, x.stride()[:-1], tuple(factor), tuple(neighbours), backward,
        multiprocessors(x.device),
    )  # fmt: skip
    if x.shape[0] * geometry.rows > MAX_ROWS:
        raise ValueError(
            f"patch_merging_norm: backend='triton' supports at most 2**30 merged tokens, got {x.shape[0]} images of "
            f"{geometry.rows}: split the batch"
        )
    return geometry


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Sequence[int],
    neighbours: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gather and normalise the merged tokens of ``x``; return z, mean and rstd."""
    x = unit_stride(x)
    geometry = _prepare(x, dtype.itemsize, factor, neighbours, False)
    shape = (x.shape[0], *geometry.merged)
    z = x.new_empty((*shape, geometry.length), dtype=dtype)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    rows = x.shape[0] * geometry.rows
    if rows > 0:
        kernels.fwd[(_programs(geometry, rows),)](
            x, contiguous(weight), contiguous(bias), z, mean, rstd, eps, rows, *geometry.arguments, **geometry.options
        )
    return z, mean, rstd


def backward(
    dz: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    factor: Sequence[int],
    neighbours: Sequence[int],
    needs_dweight: bool,
    needs_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dx, dweight and dbias; dweight and dbias are float32, and empty if not needed."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = unit_stride(x)
    geometry = _prepare(x, x.element_size(), factor, neighbours, True)
    rows = x.shape[0] * geometry.rows
    needed = (needs_dweight, needs_dbias)
    dweight, dbias = (x.new_empty(geometry.length if n else 0, dtype=torch.float32) for n in needed)
    if rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    programs = _programs(geometry, rows)
    shares = [x.new_empty((programs, geometry.length), dtype=torch.float32) if n else None for n in needed]
    kernels.bwd[(programs,)](
        dz.contiguous(), x, contiguous(weight), mean.contiguous(), rstd.contiguous(), dx, *shares, rows,
        *geometry.arguments, **geometry.options,
    )  # fmt: skip
    if any(needed):
        kernels.sum_shares[(-(-geometry.length // SUM_COLUMNS),)](
            *shares, dweight if needs_dweight else None, dbias if needs_dbias else None, programs,
            LENGTH=geometry.length, BLOCK=SUM_COLUMNS, num_warps=4, **ARITHMETIC,
        )  # fmt: skip
    return dx, dweight, dbias


def _programs(geometry: _Geometry, rows: int) -> int:
    return min(geometry.tile.programs, -(-rows // geometry.tile.rows))
