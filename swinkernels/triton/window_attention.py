"""Launches the Triton kernels of window attention: what the ops with the suffix ``_triton`` run."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from swinkernels.triton import _window_attention_kernels as kernels
from swinkernels.triton._launch import ARITHMETIC, INT32_MAX, alignment, three, unit_stride
from swinkernels.window_spec import WindowSpec

# Programs that a kernel which walks over windows is cut into: a few waves on a GPU of some 130 multiprocessors, on any
# GPU, so that the order of sums, and with it the result, does not depend on the GPU.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 1024
# More windows for a program would leave a long last wave; by then the bias tile costs little per window.
MAX_FORWARD_WINDOWS = 8
FOLD_ROWS = 16  # table entries of a program that folds dbias
FOLD_KEYS = 256  # keys that it takes at a time
LARGEST_MASK = 1e38  # with one of float32's largest numbers, log2(e) times a score would be infinite


class Tiles(NamedTuple):
    """How a kernel is cut: tokens of a query and of a key tile, and the compiler's launch options."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def is_whole(volume: int, itemsize: int) -> bool:
    """Whether a window is one tile; float32 tiles of 64 tokens do not fit the registers of a backward program."""
    return volume <= (64 if itemsize == 2 else 32)


def tiles(name: str, volume: int, head_dim: int, itemsize: int) -> Tiles:
    """The tiles of a kernel; the one place to tune. Reasoned from registers and shared memory, not measured."""
    wide = head_dim > 64
    whole = max(16, triton.next_power_of_2(volume))
    if itemsize == 4:
        # Products that may not be rounded to TF32 run on the scalar units with operands in registers: small tiles.
        block = whole if name.endswith("whole") else 16 if wide else 32
        return Tiles(block, block, 4, 1)
    if name.endswith("whole"):
        # A warp holds 16 rows of a tile of the matrix units; 64 rows by 4 warps is what Hopper's take at once.
        num_warps = whole // 16
        if name == "bwd_whole":
            # dq, dk, dv and four 64 x 64 float32 tiles: beyond head_dim 32 they need the registers of 8 warps.
            return Tiles(whole, whole, num_warps * (2 if head_dim > 32 else 1), 1)
        return Tiles(whole, whole, num_warps, 1 if wide else 2)
    # Key tiles of 32 where 64 would pad more: N = 144 is 160 keys instead of 192.
    keys = 64 if -(-volume // 64) * 2 == -(-volume // 32) else 32
    return Tiles(64, keys, 8, 1) if wide else Tiles(64, keys, 4, 2)


class Plan(NamedTuple):
    """All of a call that does not depend on the batch: computed once and kept."""

    spec: WindowSpec
    volume: int
    windows: int  # per image
    table_rows: int
    frame: tuple[int, ...]
    geometry: tuple[tuple[int, ...], ...]  # size, roll, cut, before
    flags: dict[str, Any]  # compile-time arguments that all kernels take


@functools.lru_cache(maxsize=1024)
def _plan(size: tuple[int, ...], head_dim: int, has_region_map: bool, *wire: Any) -> Plan:
    spec = WindowSpec.parse(*wire)
    size, window, shift = three(size, 1), three(spec.window_size, 1), three(spec.shift_size, 0)
    table_window, periodic = three(spec.table_window, 1), three(spec.periodic, False)
    roll_then_pad = spec.pad_order == "roll_then_pad"
    num_windows = tuple(-(-s // w) for s, w in zip(size, window, strict=True))
    frame = tuple(n * w for n, w in zip(num_windows, window, strict=True))
    roll = tuple(x % s for x, s in zip(shift, size, strict=True)) if roll_then_pad else shift
    cut = tuple(w if wraps else w - x for w, x, wraps in zip(window, shift, periodic, strict=True))
    return Plan(
        spec=spec,
        volume=spec.volume,
        windows=math.prod(num_windows),
        table_rows=spec.table_rows,
        frame=frame,
        geometry=(size, roll, cut, three(spec.pad_before, 0)),
        flags={
            "WINDOW": window,
            "TABLE_WINDOW": table_window,
            "HEAD_DIM": head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "ROLL_THEN_PAD": roll_then_pad,
            "GRID": spec.grid,
            "HAS_PADDING": frame != size,
            "HAS_MASK": has_region_map or cut != window,
            "PRECISION": "tf32" if spec.allow_tf32 else "ieee",
        },
    )


class _Call(NamedTuple):
    """One call of an op, as the kernels want it."""

    plan: Plan
    batch_windows: int
    num_heads: int
    maps: tuple[Tensor, ...]  # q, k, v; of a packed map, the map three times
    strides: tuple[tuple[int, ...], ...]
    packed_offset: int  # from q to k and from k to v
    align: int
    types: int  # of windows that have a bias of their own
    tables: tuple[Tensor | None, ...]  # bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed
    scale: float
    numbers: tuple[Any, ...]  # scale_log2, mask_log2, drop_below, keep_scale

    @property
    def type_windows(self) -> int | None:
        """Windows of a type in an image, or None if there is one type."""
        return self.plan.windows // self.types if self.types > 1 else None

    def geometry(self) -> tuple[Any, ...]:
        return self.type_windows, self.num_heads, *self.plan.geometry, *self.strides, self.packed_offset

    def groups(self, per_window: int, programs: int, most: int = INT32_MAX) -> tuple[int, int, int]:
        """How windows are dealt out to some ``programs``, of which a window takes ``per_window``: the windows of each
        type, those of a group, which are of one type, and the groups of all types.
        """
        of_type = self.batch_windows // self.types
        each = min(most, of_type, max(1, -(-self.batch_windows * per_window // programs)))
        return of_type, each, self.types * -(-of_type // each)

    def tiles(self, name: str) -> Tiles:
        flags = self.plan.flags
        return tiles(name, self.plan.volume, flags["HEAD_DIM"], self.maps[0].element_size())

    def options(self, tile: Tiles, whole: bool) -> dict[str, Any]:
        blocks = {"BLOCK_N": tile.block_q} if whole else {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **ARITHMETIC}
        return {**self.plan.flags, **blocks, **launch, "ALIGN": self.align, "PACKED": self.packed_offset != 0}


def _prepare(
    maps: Sequence[Tensor],
    bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    region_map: Tensor | None,
    dropout_seed: Tensor | None,
    *wire: Any,
) -> _Call:
    maps = tuple(unit_stride(x) for x in maps)
    x = maps[0]
    packed = len(maps) == 1
    rank = x.dim() - (4 if packed else 3)
    num_heads, head_dim = x.shape[-2:]
    plan = _plan(tuple(x.shape[1 : 1 + rank]), head_dim, region_map is not None, *wire)
    spec = plan.spec
    batch_windows = x.shape[0] * plan.windows
    if batch_windows * num_heads * max(1, -(-plan.volume // 16)) > INT32_MAX:
        raise ValueError(
            f"window_attention: backend='triton' takes fewer than 2**31 tiles of 16 tokens, got {batch_windows} "
            f"windows of {plan.volume} tokens and {num_heads} heads: split the batch"
        )
    steps = [x.stride() for x in maps]
    packed_offset = steps[0][-3] if packed else 0
    align = alignment([packed_offset, *(step for stride in steps for step in stride[:-1])], 16)
    if spec.dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("window_attention: dropout_seed must be given with a dropout_p above 0, got None")
    tables = (bias_table, bias, logit_scale, pad_qkv, region_map, dropout_seed if spec.dropout_p > 0.0 else None)
    strides = tuple((s[0] // align, *three([a // align for a in s[1 : 1 + rank]], 0), s[-2] // align) for s in steps)
    return _Call(
        plan=plan,
        batch_windows=batch_windows,
        num_heads=num_heads,
        maps=maps * 3 if packed else maps,
        strides=strides * 3 if packed else strides,
        packed_offset=packed_offset // align,
        align=align,
        types=1 if bias is None or bias.dim() == 3 else bias.shape[0],
        tables=tuple(None if t is None else t.contiguous() for t in tables),
        scale=spec.scale,
        numbers=(
            spec.scale * kernels.LOG2_E,
            min(max(spec.mask_value * kernels.LOG2_E, -LARGEST_MASK), LARGEST_MASK),
            *_dropout(spec.dropout_p),
        ),
    )


def _dropout(p: float) -> tuple[int, float]:
    """Random numbers, which are int32, below the first one drop a probability; those kept are multiplied by the other.

    With p = 1 the largest number, at which none would be below, is left to multiply by zero.
    """
    return min(round(p * 2**32) - 2**31, INT32_MAX), 1.0 / (1.0 - p) if p < 1.0 else 0.0


def forward(maps: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    """out and lse of either form."""
    call = _prepare(maps, *arguments)
    plan, heads, x = call.plan, call.num_heads, maps[0]
    head_dim = plan.flags["HEAD_DIM"]
    rank = x.dim() - (4 if len(maps) == 1 else 3)
    out = x.new_empty((*x.shape[: 1 + rank], heads * head_dim))
    needs_lse = plan.spec.needs_lse
    lse = x.new_empty((x.shape[0], plan.windows, heads, plan.volume) if needs_lse else (0,), dtype=torch.float32)
    if x.numel() == 0:
        return out, lse
    data = (*call.maps, out, lse if needs_lse else None, *call.tables, *call.numbers)
    if is_whole(plan.volume, x.element_size()):
        of_type, each, groups = call.groups(heads, FORWARD_PROGRAMS, MAX_FORWARD_WINDOWS)
        kernels.fwd_whole[(groups * heads,)](
            *data, of_type, each, *call.geometry(), **call.options(call.tiles("fwd_whole"), True)
        )
    else:
        tile = call.tiles("fwd_tiled")
        kernels.fwd_tiled[(call.batch_windows * -(-plan.volume // tile.block_q) * heads,)](
            *data, *call.geometry(), **call.options(tile, False)
        )
    return out, lse


def backward(dout: Tensor, maps: Sequence[Tensor], lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of the maps (one or three), then dbias_table, dbias, dlogit_scale and dpad_qkv, empty where not
    needed.
    """
    call = _prepare(maps, *arguments[:-1])
    needs_dbias_table, needs_dbias, needs_dlogit_scale, needs_dpad_qkv = (arguments[-1] >> bit & 1 for bit in range(4))
    plan, heads, x = call.plan, call.num_heads, maps[0]
    head_dim, volume = plan.flags["HEAD_DIM"], plan.volume
    dmaps = tuple(torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in maps)
    packed = len(maps) == 1
    gradients = dmaps * 3 if packed else dmaps
    grad_heads = (3 * heads, heads) if packed else (heads, 0)

    def sums(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    dbias_table = sums(plan.table_rows, heads) if needs_dbias_table else sums(0)
    dbias = sums(*arguments[1].shape) if needs_dbias else sums(0)
    dlogit_scale = sums(heads) if needs_dlogit_scale else sums(0)
    dpad_qkv = sums(3, heads, head_dim).zero_() if needs_dpad_qkv else sums(0)
    results = (*dmaps, dbias_table, dbias, dlogit_scale, dpad_qkv)
    if x.numel() == 0:
        for total in results[-4:-1]:
            total.zero_()
        return results
    dout, lse = dout.contiguous(), lse.contiguous()
    needs_dpad_qkv = needs_dpad_qkv and plan.flags["HAS_PADDING"]
    # What programs sum up, to be added in the second stage.
    of_pairs = of_heads = of_pads = None

    def pairs_of(groups: int) -> Tensor | None:
        """dbias of each group of windows; a dense one of which a type has one group is the result."""
        if needs_dbias and groups == call.types:
            return dbias
        return sums(groups, heads, volume, volume) if needs_dbias or needs_dbias_table else None

    if is_whole(volume, x.element_size()):
        of_type, each, groups = call.groups(heads, BACKWARD_PROGRAMS)
        of_pairs = pairs_of(groups)
        of_heads = sums(groups, heads) if needs_dlogit_scale else None
        of_pads = sums(groups, 2, heads, head_dim) if needs_dpad_qkv else None
        kernels.bwd_whole[(groups * heads,)](
            *call.maps, dout, lse, *gradients, of_pairs, of_heads, of_pads, *call.tables, call.scale, *call.numbers,
            of_type, each, *call.geometry(), *grad_heads, **call.options(call.tiles("bwd_whole"), True),
        )  # fmt: skip
    else:
        delta = torch.empty_like(lse)
        tile = call.tiles("bwd_tiled_dq")
        query_tiles = call.batch_windows * -(-volume // tile.block_q)
        of_heads = sums(query_tiles, heads) if needs_dlogit_scale else None
        kernels.bwd_tiled_dq[(query_tiles * heads,)](
            *call.maps, dout, lse, delta, gradients[0], of_heads, *call.tables, call.scale, *call.numbers,
            *call.geometry(), grad_heads[0], **call.options(tile, False),
        )  # fmt: skip
        tile = call.tiles("bwd_tiled_dkdv")
        key_tiles = call.batch_windows * -(-volume // tile.block_k)
        of_pads = sums(key_tiles, 2, heads, head_dim) if needs_dpad_qkv else None
        kernels.bwd_tiled_dkdv[(key_tiles * heads,)](
            *call.maps, dout, lse, delta, *gradients[1:], of_pads, *call.tables, call.scale, *call.numbers,
            *call.geometry(), *grad_heads, **call.options(tile, False),
        )  # fmt: skip
        if needs_dbias_table or needs_dbias:
            tile = call.tiles("bwd_tiled_dbias")
            per_window = -(-volume // tile.block_q) * -(-volume // tile.block_k) * heads
            of_type, each, groups = call.groups(per_window, BACKWARD_PROGRAMS)
            of_pairs = pairs_of(groups)
            kernels.bwd_tiled_dbias[(groups * per_window,)](
                *call.maps, dout, lse, delta, of_pairs, *call.tables, *call.numbers,
                of_type, each, *call.geometry(), **call.options(tile, False),
            )  # fmt: skip
    if of_pairs is not None and needs_dbias_table:
        kernels.fold_dbias[(-(-plan.table_rows // FOLD_ROWS) * heads,)](
            of_pairs.sum(0) if len(of_pairs) > 1 else of_pairs, dbias_table, heads,
            WINDOW=plan.flags["WINDOW"], TABLE_WINDOW=plan.flags["TABLE_WINDOW"],
            BLOCK_N=min(FOLD_KEYS, triton.next_power_of_2(volume)), BLOCK_ROWS=FOLD_ROWS, num_warps=4,
            **ARITHMETIC,
        )  # fmt: skip
    elif of_pairs is not None and of_pairs is not dbias:
        torch.sum(of_pairs.unflatten(0, (call.types, -1)), 1, out=dbias.view(call.types, heads, volume, volume))
    if of_heads is not None:
        torch.sum(of_heads, 0, out=dlogit_scale)
    if of_pads is not None:
        torch.sum(of_pads, 0, out=dpad_qkv[1:])  # a pad token's query has no gradient
    return results
