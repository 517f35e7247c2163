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
from swinkernels.triton._launch import ARITHMETIC, alignment, multiprocessors, three, unit_stride

MAX_ROWS = 2**30
ACCESS_BYTES = 16
# What holds for maps that are read in accesses of 16 bytes; others need more registers for addresses, and so fewer
# columns in a lane. By these, 24 warps forward and 16 backward share a multiprocessor, and nothing spills.
COLUMNS = 16  # of a row in a lane
FORWARD_REGISTERS, FORWARD_WARPS = 80, 24
BACKWARD_REGISTERS = 128
# Programs of a backward pass, on any GPU, so that the order of sums, and with it the result, does not depend on the
# GPU: two of eight warps on each of some 130 multiprocessors, every one with a share of dweight and dbias.
BACKWARD_PROGRAMS = 256
SUM_COLUMNS = 32  # of a program of sum_shares


class Tile(NamedTuple):
    """How the rows of a program lie in registers, the warps that hold them, and how many programs there are."""

    parts: int
    rows: int
    width: int
    vec: int
    num_warps: int
    programs: int


def tile(length: int, itemsize: int, whole: bool, backward: bool, multiprocessors: int) -> Tile:
    """The tile of a kernel; the one place to tune. Reasoned from registers and bytes in flight, not measured.

    ``itemsize`` is that of what is written, ``whole`` whether accesses of 16 bytes are possible. A part is one access
    of a lane.
    """
    block, vec = triton.next_power_of_2(length), ACCESS_BYTES // itemsize
    columns = COLUMNS if whole or block > COLUMNS * 32 * 8 else max(vec, COLUMNS // 2)
    parts = min(columns // vec, block)
    num_warps = max(8 if backward else 4, block // (32 * columns))
    rows = max(1, 32 * num_warps * columns // block)
    programs = BACKWARD_PROGRAMS if backward else multiprocessors * max(1, FORWARD_WARPS // num_warps)
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
    multiprocessors: int,
) -> Plan:
    merged = tuple(-(-s // f) for s, f in zip(size, factor[-len(size) :], strict=True))
    length = math.prod(factor) * channels
    align, vec = alignment(strides, 16), ACCESS_BYTES // itemsize
    whole = align % vec == 0 and channels % vec == 0
    size, tiling = three(size, 1), tile(length, itemsize, whole, backward, multiprocessors)
    runs = _runs_of(neighbours) if backward else {"RUNS": _table(neighbours)}
    bounded = whole and runs.get("SECOND") is None  # a neighbour held twice has sums of its own
    registers = BACKWARD_REGISTERS if backward else FORWARD_REGISTERS
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
            **ARITHMETIC,
            "maxnreg": registers if bounded else None,
        },
    )


def _prepare(x: Tensor, itemsize: int, factor: Sequence[int], neighbours: Sequence[int], backward: bool) -> Plan:
    plan = _plan(
        tuple(x.shape[1:-1]), x.shape[-1], itemsize, x.stride()[:-1], tuple(factor), tuple(neighbours), backward,
        multiprocessors(x.device),
    )  # fmt: skip
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
            BLOCK=SUM_COLUMNS, num_warps=4, **ARITHMETIC,
        )  # fmt: skip
    return dx, dweight, dbias


def _programs(plan: Plan, rows: int) -> int:
    return min(plan.tile.programs, -(-rows // plan.tile.rows))


def _contiguous(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()
