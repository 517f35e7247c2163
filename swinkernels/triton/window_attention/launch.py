"""Launches the Triton kernels of window attention; implements the ops with the suffix ``_triton``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from swinkernels.triton._launch import ARITHMETIC, INT32_MAX, alignment, contiguous, pad_to_3d, unit_stride
from swinkernels.triton.window_attention import backward as backward_kernels
from swinkernels.triton.window_attention import backward_keys as key_kernels
from swinkernels.triton.window_attention import backward_tables as table_kernels
from swinkernels.triton.window_attention import forward as forward_kernels
from swinkernels.triton.window_attention import tuning
from swinkernels.triton.window_attention.call import LOG2_E, Call, Static
from swinkernels.window_spec import WindowSpec

LARGEST_MASK = 1e38  # log2(e) times a score near float32's largest number would be infinite


class _Geometry(NamedTuple):
    """The values of a call that do not depend on the batch; they are computed once and cached."""

    spec: WindowSpec
    num_windows: int  # per image
    axes: dict[str, tuple[int, ...]]  # the fields of Call with a value per axis
    static: Static  # without ALIGN, BLOCK_ROWS and UNIT, which depend on the maps' strides and dtype


@functools.lru_cache(maxsize=1024)
def _geometry(size: tuple[int, ...], head_dim: int, has_region_map: bool, *wire: Any) -> _Geometry:
    spec = WindowSpec.parse(*wire)
    columns = (0,) * (3 - len(spec.window_size)) + spec.window_size if spec.axis_tables else (0, 0, 0)
    size, window, shift = pad_to_3d(size, 1), pad_to_3d(spec.window_size, 1), pad_to_3d(spec.shift_size, 0)
    roll_then_pad = spec.pad_order == "roll_then_pad"
    num_windows = tuple(-(-s // w) for s, w in zip(size, window, strict=True))
    frame = tuple(n * w for n, w in zip(num_windows, window, strict=True))
    roll = tuple(x % s for x, s in zip(shift, size, strict=True)) if roll_then_pad else shift
    periodic = pad_to_3d(spec.periodic, False)
    keys, table = pad_to_3d(spec.key_window, 1), pad_to_3d(spec.table_window, 1)
    table_keys, pairs = keys if keys != window else table, pad_to_3d(spec.table_pairs, False)
    rows = zip(table, table_keys, pairs, strict=True)
    cut = tuple(w if wraps else w - x for w, x, wraps in zip(window, shift, periodic, strict=True))
    return _Geometry(
        spec=spec,
        num_windows=math.prod(num_windows),
        axes={"size": size, "roll": roll, "before": pad_to_3d(spec.pad_before, 0), "cut": cut},
        static=Static(
            WINDOW=window,
            VOLUME=spec.volume,
            KEY_WINDOW=keys,
            KEY_VOLUME=spec.key_volume,
            HAS_KEY_WINDOW=keys != window,
            TABLE_WINDOW=table,
            TABLE_KEY_WINDOW=table_keys,
            TABLE_ROWS=tuple(w * m if is_pairs else w + m - 1 for w, m, is_pairs in rows),
            TABLE_PAIRS=pairs,
            AXIS_COLUMNS=columns,
            AXIS_ROWS=tuple(max(0, 2 * n - 1) for n in columns),
            BLOCK_COLUMNS=max(16, triton.next_power_of_2(sum(columns))),
            BLOCK_ROWS=0,
            HEAD_DIM=head_dim,
            BLOCK_D=max(16, triton.next_power_of_2(head_dim)),
            ALIGN=1,
            ROLL_THEN_PAD=roll_then_pad,
            GRID=spec.grid,
            HAS_PADDING=frame != size or keys != window,
            HAS_MASK=has_region_map or cut != window,
            PRECISION="tf32" if spec.allow_tf32 else "ieee",
            UNIT=1.0,
        ),
    )


class _Prepared(NamedTuple):
    """A call of an op, ready to be launched."""

    geometry: _Geometry
    call: Call
    static: Static
    batch_windows: int
    types: int  # window types with separate biases

    def groups(self, per_window: int, programs: int, most: int = INT32_MAX) -> tuple[int, int, int]:
        """Divide the windows into groups, each processed by ``per_window`` programs, about ``programs`` in all.

        All windows of a group have the same type. Returns the number of windows of each type, the number of windows in
        a group, at most ``most``, and the number of groups.
        """
        of_type = self.batch_windows // self.types
        each = min(most, of_type, max(1, -(-self.batch_windows * per_window // programs)))
        return of_type, each, self.types * -(-of_type // each)

    @property
    def is_whole(self) -> bool:
        """Return True if a window is one tile and has neither axis_tables nor a key_window.

        Models use axis_tables and key windows only with large windows, so only the kernels for several tiles support
        them.
        """
        of_size = tuning.is_whole(self.static.VOLUME, self.call.maps[0].element_size())
        return of_size and self.call.axis_tables is None and not self.static.HAS_KEY_WINDOW

    def options(self, name: str) -> dict[str, Any]:
        """Return the compile-time arguments and launch options of a kernel."""
        static, itemsize = self.static, self.call.maps[0].element_size()
        sizes = static.KEY_VOLUME, static.HEAD_DIM, itemsize
        has_padded_regions = static.HAS_PADDING and self.call.region_map is not None
        tile = tuning.tiles(name, *sizes, sum(static.AXIS_COLUMNS), static.HAS_KEY_WINDOW, has_padded_regions)
        whole = name.endswith("whole")
        blocks = {"BLOCK_N": tile.block_q} if whole else {"BLOCK_Q": tile.block_q, "BLOCK_K": tile.block_k}
        launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages, **ARITHMETIC}
        return {"STATIC": self.static, **blocks, **launch}


def _prepare(
    maps: Sequence[Tensor],
    bias_table: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_qkv: Tensor | None,
    region_map: Tensor | None,
    dropout_seed: Tensor | None,
    *wire: Any,
) -> _Prepared:
    maps = tuple(unit_stride(x) for x in maps)
    x, rank = maps[0], _rank(maps)
    num_heads, head_dim = x.shape[-2:]
    geometry = _geometry(tuple(x.shape[1 : 1 + rank]), head_dim, region_map is not None, *wire)
    spec = geometry.spec
    batch_windows = x.shape[0] * geometry.num_windows
    if batch_windows * num_heads * max(1, -(-spec.key_volume // 16)) > INT32_MAX:
        raise ValueError(
            f"window_attention: backend='triton' supports fewer than 2**31 tiles of 16 keys, got {batch_windows} "
            f"windows of {spec.key_volume} keys and {num_heads} heads: split the batch"
        )
    if spec.dropout_p > 0.0 and dropout_seed is None:
        raise ValueError("window_attention: dropout_seed must be given with a dropout_p above 0, got None")
    align = alignment([step for m in maps for step in m.stride()[:-1]], 16)
    types = spec.table_types if bias is None or bias.dim() < 4 else bias.shape[0]
    unit = 1.0 if x.dtype == torch.float32 else LOG2_E.value
    call = Call(
        maps=maps,
        num_heads=num_heads,
        type_windows=geometry.num_windows // types if types > 1 else None,
        **geometry.axes,
        strides=tuple(_strides(m, rank, align) for m in maps),
        map_heads=3 * num_heads if len(maps) == 1 else num_heads,
        bias_table=contiguous(bias_table),
        table_columns=spec.table_types * num_heads if spec.table_types > 1 else None,
        dense_bias=None if spec.axis_tables else contiguous(bias),
        axis_tables=contiguous(bias) if spec.axis_tables else None,
        logit_scale=contiguous(logit_scale),
        pad_qkv=contiguous(pad_qkv),
        region_map=contiguous(region_map),
        dropout_seed=dropout_seed if spec.dropout_p > 0.0 else None,
        scale=spec.scale,
        unit_scale=spec.scale * unit,
        unit_mask=min(max(spec.mask_value * unit, -LARGEST_MASK), LARGEST_MASK),
        # Random numbers are int32. For p = 1 the bound is clamped to INT32_MAX: a pair whose random number is INT32_MAX
        # is still not dropped, but multiplied by keep_scale = 0.
        drop_below=min(round(spec.dropout_p * 2**32) - 2**31, INT32_MAX),
        keep_scale=1.0 / (1.0 - spec.dropout_p) if spec.dropout_p < 1.0 else 0.0,
    )
    static = geometry.static._replace(ALIGN=align, BLOCK_ROWS=tuning.axis_rows(x.element_size()), UNIT=unit)
    return _Prepared(geometry, call, static, batch_windows, types)


def _rank(maps: Sequence[Tensor]) -> int:
    """Return the number of token axes of the maps. A single map of q, k and v has an additional axis for the three."""
    return maps[0].dim() - (4 if len(maps) == 1 else 3)


def _strides(x: Tensor, rank: int, align: int) -> tuple[int, ...]:
    """Return a map's strides, in units of ``align``: batch, three axes, heads and, if q, k and v are one map, parts."""
    batch, *steps = (step // align for step in x.stride()[:-1])
    return (batch, *pad_to_3d(steps[:rank], 0), steps[-1], *steps[rank:-1])


def forward(maps: Sequence[Tensor], *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return out and lse; ``maps`` contains q, k and v, or one map of all three."""
    prepared = _prepare(maps, *arguments)
    call, static, x = prepared.call, prepared.static, maps[0]
    heads, volume = call.num_heads, static.VOLUME
    out = x.new_empty((*x.shape[: 1 + _rank(maps)], heads * static.HEAD_DIM))
    needs_lse = prepared.geometry.spec.needs_lse
    shape = (x.shape[0], prepared.geometry.num_windows, heads, volume) if needs_lse else (0,)
    lse = x.new_empty(shape, dtype=torch.float32)
    if x.numel() == 0:
        return out, lse
    results = out, lse if needs_lse else None
    if prepared.is_whole:
        of_type, each, groups = prepared.groups(heads, tuning.FORWARD_PROGRAMS, tuning.MAX_FORWARD_WINDOWS)
        options = prepared.options("fwd_whole")
        forward_kernels.fwd_whole[(groups * heads,)](call, *results, of_type, each, **options)
    else:
        options = prepared.options("fwd_tiled")
        tiles = prepared.batch_windows * -(-volume // options["BLOCK_Q"])
        forward_kernels.fwd_tiled[(tiles * heads,)](call, *results, **options)
    return out, lse


def backward(dout: Tensor, maps: Sequence[Tensor], lse: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    """Return the gradients of the maps, dbias_table, dbias, dlogit_scale and dpad_qkv; those not needed are empty."""
    prepared = _prepare(maps, *arguments[:-1])
    needs_dbias_table, needs_dbias, needs_dlogit_scale, needs_dpad_qkv = (arguments[-1] >> bit & 1 for bit in range(4))
    call, static, x = prepared.call, prepared.static, maps[0]
    heads, head_dim, volume = call.num_heads, static.HEAD_DIM, static.VOLUME
    dmaps = tuple(torch.empty(m.shape, dtype=m.dtype, device=m.device) for m in maps)

    def sums(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    dbias_table = sums(*arguments[0].shape) if needs_dbias_table else sums(0)
    dbias = sums(*arguments[1].shape) if needs_dbias else sums(0)
    dlogit_scale = sums(heads) if needs_dlogit_scale else sums(0)
    dpad_qkv = sums(3, heads, head_dim).zero_() if needs_dpad_qkv else sums(0)
    results = (*dmaps, dbias_table, dbias, dlogit_scale, dpad_qkv)
    if x.numel() == 0:
        for total in results[-4:-1]:
            total.zero_()
        return results
    dout, lse = dout.contiguous(), lse.contiguous()
    pads = needs_dpad_qkv and static.HAS_PADDING
    has_axes = call.axis_tables is not None
    # Partial sums of the programs or groups, which are added up at the end.
    pair_sums = head_sums = pad_sums = None

    def new_pair_sums(groups: int) -> Tensor | None:
        """Allocate a sum of dS for each group of windows, or return ``dbias`` itself if each type has one group."""
        if needs_dbias and groups == prepared.types:
            return dbias
        return sums(groups, heads, volume, static.KEY_VOLUME) if needs_dbias or needs_dbias_table else None

    def new_products() -> Tensor:
        """Allocate A or dA of axis_tables."""
        return sums(prepared.batch_windows, heads, volume, sum(static.AXIS_COLUMNS))

    if prepared.is_whole:
        of_type, each, groups = prepared.groups(heads, tuning.BACKWARD_PROGRAMS)
        pair_sums = new_pair_sums(groups)
        head_sums = sums(groups, heads) if needs_dlogit_scale else None
        pad_sums = sums(groups, 2, heads, head_dim) if pads else None
        backward_kernels.bwd_whole[(groups * heads,)](
            call, dout, lse, dmaps, pair_sums, head_sums, pad_sums, of_type, each, **prepared.options("bwd_whole")
        )
    else:
        delta = torch.empty_like(lse)
        options = prepared.options("bwd_tiled_dq")
        programs = prepared.batch_windows * -(-volume // options["BLOCK_Q"])
        head_sums = sums(programs, heads) if needs_dlogit_scale else None
        products = new_products() if has_axes else None
        dproducts = new_products() if has_axes and needs_dbias else None
        backward_kernels.bwd_tiled_dq[(programs * heads,)](
            call, dout, lse, delta, dmaps, head_sums, products, dproducts, **options
        )
        options = prepared.options("bwd_tiled_dkdv")
        programs = prepared.batch_windows * -(-static.KEY_VOLUME // options["BLOCK_K"])
        pad_sums = sums(programs, 2, heads, head_dim) if pads else None
        shape = prepared.batch_windows, heads, 2, static.KEY_VOLUME, head_dim
        of_windows = sums(*shape) if static.HAS_KEY_WINDOW else None
        backward_kernels.bwd_tiled_dkdv[(programs * heads,)](
            call, dout, lse, delta, dmaps, pad_sums, products, of_windows, **options
        )
        if of_windows is not None:
            options = prepared.options("sum_key_gradients")
            programs = prepared.batch_windows * -(-volume // options["BLOCK_Q"]) * heads
            key_kernels.sum_key_gradients[(programs,)](call, of_windows, dmaps, **options)
        if dproducts is not None:
            options = prepared.options("bwd_axis_tables")
            per_window = -(-sum(static.AXIS_ROWS) // static.BLOCK_ROWS) * heads
            of_type, each, groups = prepared.groups(per_window, tuning.BACKWARD_PROGRAMS)
            table_sums = sums(groups, heads, *dbias.shape)
            table_kernels.bwd_axis_tables[(groups * per_window,)](call, dproducts, table_sums, of_type, each, **options)
            torch.sum(table_sums, (0, 1), out=dbias)
        elif needs_dbias_table or needs_dbias:
            options = prepared.options("bwd_tiled_dbias")
            per_window = -(-volume // options["BLOCK_Q"]) * -(-static.KEY_VOLUME // options["BLOCK_K"]) * heads
            of_type, each, groups = prepared.groups(per_window, tuning.BACKWARD_PROGRAMS)
            pair_sums = new_pair_sums(groups)
            backward_kernels.bwd_tiled_dbias[(groups * per_window,)](
                call, dout, lse, delta, pair_sums, of_type, each, **options
            )
    if pair_sums is not None and pair_sums is not dbias:
        of_types = pair_sums.unflatten(0, (prepared.types, -1))
        if needs_dbias:
            torch.sum(of_types, 1, out=dbias.view(prepared.types, heads, volume, static.KEY_VOLUME))
        else:
            _fold(of_types.sum(1) if of_types.shape[1] > 1 else pair_sums, dbias_table, static)
    if head_sums is not None:
        torch.sum(head_sums, 0, out=dlogit_scale)
    if pad_sums is not None:
        torch.sum(pad_sums, 0, out=dpad_qkv[1:])  # a pad token's query has no gradient
    return results


def _fold(dbias: Tensor, dbias_table: Tensor, static: Static) -> None:
    """Fold dbias (types, heads, N, M) onto the rows of dbias_table."""
    columns = dbias_table.shape[1:].numel()
    table_kernels.fold_dbias[(-(-len(dbias_table) // tuning.FOLD_ROWS) * columns,)](
        dbias, dbias_table, columns, STATIC=static,
        BLOCK_N=min(tuning.FOLD_KEYS, triton.next_power_of_2(static.KEY_VOLUME)), BLOCK_ROWS=tuning.FOLD_ROWS,
        num_warps=4, **ARITHMETIC,
    )  # fmt: skip
