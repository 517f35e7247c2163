"""Tests that Triton's kernels of partition, reverse and patch merging compile within their register limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from swinkernels.triton import _patch_merging_kernels as merging_kernels
from swinkernels.triton import _window_partition_kernels as partition_kernels
from swinkernels.triton import patch_merging, window_partition
from tests.support.sweeps import in_turn
from tests.support.triton_compiler import SHARED_BYTES, Launch, kernels_of, recorded, resources


def record_partition(
    dtype: torch.dtype, size: tuple[int, ...], channels: int, window: tuple[int, ...], roll_then_pad: bool = False,
    slice_of: int = 0,
) -> list[Launch]:  # fmt: skip
    """Return the recorded launches of a partition and of its reverse."""
    window = (1,) * (3 - len(window)) + window
    shift = tuple(w // 2 for w in window)
    x = torch.empty(2, *size, slice_of or channels, device="meta", dtype=dtype)[..., :channels]
    with recorded(partition_kernels) as launches:
        windows = window_partition.partition(x, window, shift, roll_then_pad)
        window_partition.reverse(windows, size, window, shift, roll_then_pad)
    return launches


# The kernels copy words: dtypes differ only in the size of an element.
PARTITIONS: dict[str, dict[str, Any]] = {
    "swin": {"dtype": torch.bfloat16, "size": (56, 56), "channels": 96, "window": (7, 7)},
    "float32": {"dtype": torch.float32, "size": (48, 48), "channels": 128, "window": (12, 12)},
    "padded": {"dtype": torch.float16, "size": (30, 40), "channels": 96, "window": (7, 7), "roll_then_pad": True},
    "three_axes": {"dtype": torch.bfloat16, "size": (7, 30, 30), "channels": 48, "window": (4, 7, 7)},
    "merging": {"dtype": torch.bfloat16, "size": (57, 56), "channels": 96, "window": (2, 2)},
    "complex128": {"dtype": torch.complex128, "size": (8, 8), "channels": 3, "window": (4, 4)},
    "8_bytes": {"dtype": torch.float64, "size": (8, 8), "channels": 3, "window": (4, 4)},
    "4_bytes": {"dtype": torch.bfloat16, "size": (8, 8), "channels": 30, "window": (4, 4)},
    "2_bytes": {"dtype": torch.float16, "size": (8, 8), "channels": 97, "window": (4, 4)},
    "1_byte": {"dtype": torch.int8, "size": (8, 8), "channels": 31, "window": (4, 4), "slice_of": 33},
}


def record_merging(
    read: torch.dtype, written: torch.dtype, size: tuple[int, ...], channels: int,
    neighbours: tuple[int, ...] = (0, 2, 1, 3), parameters: torch.dtype | None = torch.float32,
) -> list[Launch]:  # fmt: skip
    """Return the recorded launches of a forward and a backward pass; 4 ``neighbours`` merge two axes, 8 merge three."""
    factor = (1, 2, 2) if len(neighbours) == 4 else (2, 2, 2)
    x = torch.empty(2, *size, channels, device="meta", dtype=read)
    given = None
    if parameters is not None:
        given = torch.empty(len(neighbours) * channels, device="meta", dtype=parameters)
    with recorded(merging_kernels) as launches:
        z, mean, rstd = patch_merging.forward(x, given, given, factor, neighbours, 1e-5, written)
        needed = given is not None
        patch_merging.backward(z, x, given, mean, rstd, factor, neighbours, needed, needed)
    return launches


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
PAIRS = ((F32, F32), (F16, F16), (BF16, BF16), (F32, F16), (F32, BF16))
ROW_MAJOR_3D, LEGACY_3D = (0, 1, 2, 3, 4, 5, 6, 7), (0, 4, 2, 1, 5, 2, 1, 7)
MERGINGS: dict[str, dict[str, Any]] = {
    **{
        f"{str(read)[6:]}_{str(written)[6:]}": {"read": read, "written": written, "size": (56, 56), "channels": 96}
        for read, written in PAIRS
    },
    "two_warps_a_row": {"read": BF16, "written": BF16, "size": (28, 28), "channels": 192, "parameters": BF16},
    "three_axes_odd": {
        "read": BF16, "written": BF16, "size": (47, 48, 48), "channels": 48, "neighbours": ROW_MAJOR_3D
    },
    "longest": {"read": F32, "written": F32, "size": (14, 14, 14), "channels": 1024, "neighbours": ROW_MAJOR_3D},
    "longest_half": {"read": BF16, "written": BF16, "size": (14, 14), "channels": 2048},
    "legacy": {"read": BF16, "written": BF16, "size": (7, 7, 7), "channels": 96, "neighbours": LEGACY_3D},
    "prime_channels": {"read": F32, "written": BF16, "size": (7, 7), "channels": 97},
    "no_parameters": {"read": F16, "written": F16, "size": (7, 7), "channels": 3, "parameters": None},
}  # fmt: skip


STACK_BYTES = 16  # bytes that ptxas may spill so that two blocks of a backward pass fit on a multiprocessor


def check_resources(launches: list[Launch], arch: int) -> None:
    assert launches
    for launch in launches:
        used = resources(launch, arch)
        assert used["LOCAL"] == 0 and used["STACK"] <= STACK_BYTES, (launch.name, used)
        assert used["SHARED"] <= SHARED_BYTES[arch], (launch.name, used)


@pytest.mark.parametrize(("configuration", "arch"), in_turn(PARTITIONS, list(SHARED_BYTES)))
def test_partition_compiles_within_resources(configuration, arch):
    check_resources(record_partition(**PARTITIONS[configuration]), arch)


@pytest.mark.parametrize(("configuration", "arch"), in_turn(MERGINGS, list(SHARED_BYTES)))
def test_merging_compiles_within_resources(configuration, arch):
    check_resources(record_merging(**MERGINGS[configuration]), arch)


def test_every_kernel_is_compiled():
    assert {launch.name for c in PARTITIONS.values() for launch in record_partition(**c)} == {
        *kernels_of(partition_kernels)
    }
    assert {launch.name for c in MERGINGS.values() for launch in record_merging(**c)} == {*kernels_of(merging_kernels)}


def test_batch_size_does_not_recompile():
    """Kernels are not specialised for batch-dependent arguments that are 1 or multiples of 16."""
    for module in (partition_kernels, merging_kernels):
        for name, kernel in kernels_of(module).items():
            for parameter in kernel.params:
                if parameter.name in ("batch_windows", "windows_per_program", "rows", "programs"):
                    assert parameter.do_not_specialize, (name, parameter.name)


def test_what_32_bits_do_not_count_is_refused():
    x = torch.empty(2**15, 256, 257, 2, device="meta", dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"window_partition: .* fewer than 2\*\*31 windows and .*, got 2155872256 and "
    ):
        window_partition.partition(x, (1, 1, 1), (0, 0, 0), False)
    x = torch.empty(1, 2**12, 2**13, 2**10, device="meta", dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"window_partition: .* fewer than 2\*\*31 accesses, got 33554432 tokens of 64 "
    ):
        window_partition.partition(x, (2**12, 2**13), (0, 0), False)
    x = torch.empty(2**16 + 1, 256, 256, 4, device="meta")
    with pytest.raises(ValueError, match=r"patch_merging_norm: .* at most 2\*\*30 merged tokens, got 65537 images"):
        patch_merging.forward(x, None, None, (1, 2, 2), (0, 1, 2, 3), 1e-5, torch.float32)
