"""Launches the Triton kernels of patch merging: what the ops with the suffix ``_triton`` run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from swinkernels.triton import _patch_merging_kernels as kernels
from swinkernels.triton._launch import alignment, three, unit_stride

MAX_ROWS = 2**30
ACCESS_BYTES = 16
COLUMNS = 16  # of a row in a lane
MAX_REGISTERS = 128  # of a lane, for two blocks of eight warps on a multiprocessor; the compiler needs no more
SUM_COLUMNS = 32  # of a program of sum_shares


class Tile(NamedTuple):
    """How the rows of a program lie in registers, the warps that hold them, and how many programs there are."""

    parts: int
    rows: int
    width: int
    vec: int
    num_warps: int
    programs: int


def tile(length: int, itemsize: int, backward: bool) -> Tile:
    """The tile of a kernel; the one place to tune. Reasoned from registers and bytes in flight, not measured.

    ``itemsize`` is that of what is written. A part is one access of a lane.
    The numbers of programs are blocks that some 130 multiprocessors hold at once, as many on any GPU: six to eight of
    four warps forward, two of eight warps backward, where every program has a share of dweight and dbias.
    """
    block, vec = triton.next_power_of_2(length), ACCESS_BYTES // itemsize
    parts = min(COLUMNS // vec, block)
    num_warps, programs = (8, 256) if backward else (4, 1024)
    num_warps = max(num_warps, block // (32 * COLUMNS))
    rows = max(1, 32 * num_warps * COLUMNS // block)
    return Tile(parts, rows, block // parts, vec, num_warps, programs)


class Plan(NamedTuple):
    """All of a call that does not depend on the batch: computed once and kept."""

    merged: tuple[int, ...]  # S', of the map's own rank
    rows: int  # merged tokens of an image
    length: int
    tile: Tile
    geometry: tuple[tuple[int, ...], ...]  # size, strides, step
    options: dict[str, Any]


def _table(entries: Sequence[int]) -> int:
    """Entries of four bits each, the first one lowest."""
    return sum(entry << (4 * i) for i, entry in enumerate(entries))


def _runs_of(neighbours: Sequence[int]) -> dict[str, int | None]:
    """For each neighbour the first and the second run that holds it."""
    runs: list[list[int]] = [[] for _ in neighbours]
    for run, neighbour in enumerate(neighbours):
        runs[neighbour].append(run)
    if any(len(r) > 2 for r in runs):
        raise ValueError(
            f"patch_merging_norm: backend='triton' takes orders that hold a neighbour at most twice, got {neighbours}"
        )
    first, second = (_table([r[i] if i < len(r) else kernels.NO_RUN for r in runs]) for i in range(2))
    return {"FIRST": first, "SECOND": second if any(len(r) == 2 for r in runs) else None}


@functools.lru_cache(maxsize=1024)
def _plan(
    size: tuple[int, ...],
    channels: int,
    itemsize: int,  # of what is written
    strides: tuple[int, ...],  # of the map but its last axis
    factor: tuple[int, ...],
    neighbours: tuple[int, ...],
    backward: bool,
) -> Plan:
    merged = tuple(-(-s // f) for s, f in zip(size, factor[-len(size) :], strict=True))
    length = math.prod(factor) * channels
    size, tiling = three(size, 1), tile(length, itemsize, backward)
    align = alignment(strides, 16)
    runs = _runs_of(neighbours) if backward else {"RUNS": _table(neighbours)}
    # Rows that are read element by element need more addresses, and so more registers, than it takes to be fast anyway;
    # so do the additional sums of an order that has neighbours twice.
    bounded = backward and runs["SECOND"] is None and align % tiling.vec == 0 and channels % tiling.vec == 0
    steps = [s // align for s in strides]
    step, counts = [tiling.programs * tiling.rows], three(merged, 1)
    for count in reversed(counts):  # the walk's step as image, i0, i1, i2
        step[:1] = divmod(step[0], count)
    return Plan(
        merged=merged,
        rows=math.prod(merged),
        length=length,
        tile=tiling,
        geometry=(size, (steps[0], *three(steps[1:], 0)), tuple(step)),
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
            **({"maxnreg": MAX_REGISTERS} if bounded else {}),
        },
    )


def _prepare(x: Tensor, itemsize: int, factor: Sequence[int], neighbours: Sequence[int], backward: bool) -> Plan:
    plan = _plan(
        tuple(x.shape[1:-1]), x.shape[-1], itemsize, x.stride()[:-1], tuple(factor), tuple(neighbours), backward
    )
    if x.shape[0] * plan.rows > MAX_ROWS:
        raise ValueError(
            f"patch_merging_norm: backend='triton' takes at most 2**30 merged tokens, got {x.shape[0]} images of "
            f"{plan.rows}: split the batch"
        )
    return plan


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Sequence[int],
    neighbours: Sequence[int],
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """z, mean and rstd."""
    x = unit_stride(x)
    plan = _prepare(x, dtype.itemsize, factor, neighbours, False)
    shape = (x.shape[0], *plan.merged)
    z = x.new_empty((*shape, plan.length), dtype=dtype)
    mean, rstd = (x.new_empty(shape, dtype=torch.float32) for _ in range(2))
    rows = x.shape[0] * plan.rows
    if rows > 0:
        kernels.fwd[(_programs(plan, rows),)](
            x, _contiguous(weight), _contiguous(bias), z, mean, rstd, eps, rows, *plan.geometry, **plan.options
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
    """dx, dweight and dbias, the latter float32 and empty where not needed."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x = unit_stride(x)
    plan = _prepare(x, x.element_size(), factor, neighbours, True)
    rows = x.shape[0] * plan.rows
    needed = (needs_dweight, needs_dbias)
    dweight, dbias = (x.new_empty(plan.length if n else 0, dtype=torch.float32) for n in needed)
    if rows == 0:
        return dx, dweight.zero_(), dbias.zero_()
    programs = _programs(plan, rows)
    shares = [x.new_empty((programs, plan.length), dtype=torch.float32) if n else None for n in needed]
    kernels.bwd[(programs,)](
        dz.contiguous(), x, _contiguous(weight), mean.contiguous(), rstd.contiguous(), dx, *shares, rows,
        *plan.geometry, **plan.options,
    )  # fmt: skip
    if any(needed):
        kernels.sum_shares[(-(-plan.length // SUM_COLUMNS),)](
            *shares, dweight if needs_dweight else None, dbias if needs_dbias else None, programs, LENGTH=plan.length,
            BLOCK=SUM_COLUMNS, num_warps=4,
        )  # fmt: skip
    return dx, dweight, dbias


def _programs(plan: Plan, rows: int) -> int:
    return min(plan.tile.programs, -(-rows // plan.tile.rows))


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
