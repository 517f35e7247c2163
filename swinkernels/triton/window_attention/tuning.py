"""Tile sizes and launch options, derived from register and shared-memory use; they have not been tuned on a GPU."""

from __future__ import annotations

from typing import NamedTuple

import triton

# The number of programs of a kernel that walks over windows: several waves on a GPU with about 130 multiprocessors. It
# is the same on every GPU, and so are the partial sums of each program. torch.sum adds the partial sums, in an order
# that may depend on the GPU.
FORWARD_PROGRAMS = 2048
BACKWARD_PROGRAMS = 1024
# More windows per program would make the last wave long. With 8, loading the bias tile costs little per window.
MAX_FORWARD_WINDOWS = 8
FOLD_ROWS = 16  # table rows per program of fold_dbias
FOLD_KEYS = 256  # keys per step of fold_dbias


class Tiles(NamedTuple):
    """The numbers of tokens in a query tile and in a key tile of a kernel, and the launch options."""

    block_q: int
    block_k: int
    num_warps: int
    num_stages: int


def is_whole(volume: int, itemsize: int) -> bool:
    """Return True if a window is one tile. A float32 tile of 64 tokens would exceed a backward program's registers."""
    return volume <= (64 if itemsize == 2 else 32)


def axis_rows(itemsize: int) -> int:
    """Return the number of rows of axis_tables that a program processes at a time."""
    return 64 if itemsize == 2 else 32


def tiles(
    name: str,
    keys: int,
    head_dim: int,
    itemsize: int,
    axis_columns: int = 0,
    has_key_window: bool = False,
    has_padded_regions: bool = False,
) -> Tiles:
    """Return the tile sizes and launch options of a kernel.

    Args:
        name: the kernel's name.
        keys: the keys per window.
        head_dim: channels per head.
        itemsize: bytes of an element of the maps.
        axis_columns: with axis_tables, the number of columns of A.
        has_key_window: True if the keys' window is larger than the window.
        has_padded_regions: True for a padded map with a region map.
    """
    wide = head_dim > 64
    if axis_columns > 64:  # two tiles of all columns are kept in registers
        return Tiles(32, 32, 4, 1) if itemsize == 2 else Tiles(16, 16, 4, 1)
    if axis_columns and name in ("bwd_tiled_dq", "bwd_axis_tables"):  # dA or a tile of dtable is kept in registers
        return tiles(name, keys, head_dim, itemsize)._replace(num_warps=8)
    whole = max(16, triton.next_power_of_2(keys))
    if itemsize == 4:
        # Without TF32, float32 products run on the CUDA cores, with operands in registers, so tiles are small.
        block = whole if name.endswith("whole") else 16 if wide else 32
        return Tiles(block, block, 4, 1)
    if name.endswith("whole"):
        # A tensor core instruction computes 16 rows of a tile per warp; on Hopper four warps together compute 64 rows.
        num_warps = whole // 16
        if name == "bwd_whole":
            # Beyond head_dim 32, dq, dk, dv and four 64 x 64 float32 tiles need the registers of 8 warps.
            return Tiles(whole, whole, num_warps * (2 if head_dim > 32 else 1), 1)
        return Tiles(whole, whole, num_warps, 1 if wide else 2)
    # A key tile has 32 keys if tiles of 64 would add more padding (N = 144 becomes 160 keys instead of 192), or with a
    # key_window, because each key then has a separate address, and 64 addresses would not all stay in registers.
    block_k = 64 if -(-keys // 64) * 2 == -(-keys // 32) and not has_key_window else 32
    if wide and has_padded_regions and name.startswith("bwd"):  # tiles of 64 queries would spill 128 to 392 bytes
        return Tiles(32, block_k, 8, 1)
    return Tiles(64, block_k, 8, 1) if wide else Tiles(64, block_k, 4, 2)
