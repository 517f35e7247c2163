"""Tests the CUDA kernels of window_partition and window_reverse, run on the CPU by the emulator.

The kernels move bytes, so the results are compared bit for bit, and the data are random bytes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinkernels import reference
from tests import emulation
from tests.emulation.window_partition import WindowPartitionLibrary, window_partition_library

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

PAD_ORDERS = ("pad_then_roll", "roll_then_pad")
DTYPES = (torch.int8, torch.bfloat16, torch.float32, torch.complex64, torch.complex128)  # 1, 2, 4, 8 and 16 bytes


class Case(NamedTuple):
    batch: int
    size: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    pad_order: str = "pad_then_roll"


GEOMETRY = {
    "whole windows": Case(2, (8, 12), (4, 4), (2, 2)),
    "no shift": Case(2, (8, 12), (4, 4), (0, 0)),
    "odd": Case(2, (13, 11), (4, 4), (1, 3)),
    "rectangular": Case(1, (5, 17), (3, 7), (2, 0)),
    "one token": Case(3, (1, 1), (1, 1), (0, 0)),
    "one token in a window": Case(2, (1, 1), (4, 3), (3, 1)),
    "windows of one token": Case(2, (5, 4), (1, 1), (0, 0)),
    "one window": Case(2, (7, 7), (7, 7), (3, 3)),
    "map smaller than the window": Case(1, (3, 2), (5, 7), (4, 6)),
    "3D": Case(2, (4, 6, 5), (2, 3, 4), (1, 1, 2)),
    "3D, one slab": Case(1, (1, 9, 8), (2, 4, 4), (1, 2, 2)),
    "shift of more than a window": Case(2, (9, 10), (4, 4), (7, 11)),
    "3D, shift of more than a window": Case(1, (5, 6, 7), (2, 3, 4), (4, 4, 5)),
}


@pytest.fixture(scope="module")
def built() -> WindowPartitionLibrary:
    return window_partition_library()


@pytest.fixture
def library(built: WindowPartitionLibrary) -> Iterator[WindowPartitionLibrary]:
    built.configure()
    yield built
    built.configure()


def draw(library: emulation.Library, shape: Sequence[int], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Return a tensor of random bytes, in memory between inaccessible pages."""
    count = math.prod(shape) * dtype.itemsize
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator).view(dtype)
    return library.copy(data.reshape(tuple(shape)))


def assert_same_bits(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert torch.equal(got.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def expected_windows(x: Tensor, case: Case) -> Tensor:
    """Return the reference's windows; for a shift not below the window, roll the (padded) map before the partition."""
    if all(s < w for s, w in zip(case.shift, case.window, strict=True)):
        return reference.window_partition(x, case.window, case.shift, pad_order=case.pad_order)
    axes = tuple(range(1, x.dim() - 1))
    if case.pad_order == "pad_then_roll":
        pads = [n for s, w in zip(reversed(case.size), reversed(case.window), strict=True) for n in (0, -s % w)]
        x = F.pad(x, (0, 0, *pads))
    return reference.window_partition(x.roll([-s for s in case.shift], axes), case.window)


def check(library: WindowPartitionLibrary, x: Tensor, case: Case, max_vectors: int = 0) -> None:
    """Compare window_partition with the reference; check that window_reverse restores ``x`` and ignores pad tokens."""
    arguments = (case.window, case.shift, case.pad_order)
    windows = library.window_partition(x, *arguments, max_vectors=max_vectors)
    assert_same_bits(windows, expected_windows(x, case))
    size = x.shape[1:-1]
    assert_same_bits(library.window_reverse(windows, size, *arguments, max_vectors=max_vectors), x)
    filled = draw(library, windows.shape, x.dtype, seed=1)
    back = library.window_reverse(filled, size, *arguments, max_vectors=max_vectors)
    if all(s < w for s, w in zip(case.shift, case.window, strict=True)):
        assert_same_bits(
            back, reference.window_reverse(filled, case.window, size, case.shift, pad_order=case.pad_order)
        )
    mask = library.window_partition(library.copy(torch.ones_like(x)), *arguments) != 0
    assert_same_bits(library.window_partition(back, *arguments), torch.where(mask, filled, torch.zeros_like(filled)))


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(library, name, pad_order):
    case = GEOMETRY[name]._replace(pad_order=pad_order)
    check(library, draw(library, (case.batch, *case.size, 12), torch.bfloat16), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 30, 96, 97])
def test_widths(library, channels, dtype):
    """Rows of 1 to 1,552 bytes are moved in vectors of 1 to 16 bytes."""
    case = Case(1, (5, 6), (4, 4), (1, 2))
    check(library, draw(library, (1, 5, 6, channels), dtype), case)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rows_that_begin_anywhere(library, offset):
    """Maps and windows start ``offset`` bytes after a multiple of 16; the emulator reports misaligned vectors."""
    case = Case(2, (5, 6), (4, 4), (1, 2))
    x = draw(library, (2, 5, 6, 48), torch.uint8)[..., offset : offset + 16]
    check(library, x, case)
    windows = draw(library, (8, 16, 48), torch.uint8)[..., offset : offset + 16]
    back = library.window_reverse(windows, case.size, case.window, case.shift)
    assert_same_bits(back, reference.window_reverse(windows, case.window, case.size, case.shift))


def with_odd_stride(library: emulation.Library, shape: Sequence[int], axis: int) -> Tensor:
    """Return random bytes of ``shape``; all strides are multiples of 16, except those of ``axis`` and the last axis."""
    strides = [1]
    for i in reversed(range(len(shape) - 1)):
        strides.insert(0, math.ceil(strides[0] * shape[i + 1] / 16) * 16 + (i == axis))
    count = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    return draw(library, (count,), torch.uint8).as_strided(shape, strides)


def test_every_stride_counts(library):
    """An odd stride along any axis rules out wide vectors."""
    case = Case(2, (5, 6), (4, 4), (1, 2))
    for axis in range(3):
        check(library, with_odd_stride(library, (2, 5, 6, 16), axis), case)
    for axis in range(2):
        windows = with_odd_stride(library, (8, 16, 16), axis)
        back = library.window_reverse(windows, case.size, case.window, case.shift)
        assert_same_bits(back, reference.window_reverse(windows, case.window, case.size, case.shift))


def test_strides_of_any_kind(library):
    """Maps and windows may be permuted, sliced from larger tensors, or expanded."""
    for case, x in (
        (Case(2, (5, 6), (4, 4), (1, 2)), draw(library, (2, 5, 6, 40), torch.float16)[..., 8:24]),
        (Case(2, (6, 5), (4, 3), (1, 2)), draw(library, (2, 5, 6, 16), torch.float16).transpose(1, 2)),
        (Case(5, (2, 6), (2, 3), (1, 1)), draw(library, (2, 5, 6, 16), torch.float16).transpose(0, 1)),
        (Case(2, (4, 6), (4, 4), (2, 1)), draw(library, (3, 5, 7, 18), torch.float16)[1:, 1:, :6, 1:17]),
        (Case(2, (4, 4, 3), (2, 4, 4), (1, 1, 1)), draw(library, (2, 3, 4, 4, 8), torch.float32).transpose(1, 3)),
        (Case(3, (5, 6), (4, 4), (1, 2)), draw(library, (1, 5, 6, 16), torch.float16).expand(3, 5, 6, 16)),
    ):
        check(library, x, case)
    case = Case(2, (5, 6), (4, 4), (1, 2))
    for windows in (
        draw(library, (8, 16, 40), torch.float16)[..., 8:24],
        draw(library, (16, 8, 16), torch.float16).transpose(0, 1),
        draw(library, (9, 18, 18), torch.float16)[1:, 1:17, 2:],
        draw(library, (1, 16, 16), torch.float16).expand(8, 16, 16),
    ):
        back = library.window_reverse(windows, case.size, case.window, case.shift)
        assert_same_bits(back, reference.window_reverse(windows, case.window, case.size, case.shift))


@pytest.mark.parametrize("windows", [1, 2, 3, 5, 7, 12, 20, 50])
@pytest.mark.parametrize("size", [(3, 5, 7), (5, 7)], ids=str)
def test_more_launches_than_one(library, size, windows):
    """Work beyond the limit of vectors per launch is split by image, slab, row of windows, or window."""
    vectors_per_window = 16
    case = Case(3, size, (2,) * len(size), (1,) * len(size))
    channels = 4 * vectors_per_window // 2 ** len(size)  # four channels per vector
    check(library, draw(library, (3, *size, channels), torch.float32), case, windows * vectors_per_window)


def test_reverse_does_not_read_pads(library):
    """The memory of the windows ends with the row of the map's last token, so reading a later pad token faults."""
    if not library.catches_faults:
        pytest.skip("faults are caught on x86-64 Linux only")
    x, window, shift = draw(library, (1, 3, 3, 4), torch.float32), (4, 4), (0, 0)
    whole = library.window_partition(x, window, shift)
    rows = library.copy(whole[0, : 2 * 4 + 3])
    back = library.empty(x.shape, x.dtype)
    params = library.params(back, whole, window, shift, "pad_then_roll")
    params.windows.data = rows.data_ptr()
    library.check(library.functions.emulated_window_reverse(ctypes.byref(params), 0))
    assert_same_bits(back, x)


def test_what_a_launch_refuses(library):
    x = draw(library, (1, 8, 8, 16), torch.float32)
    with pytest.raises(emulation.LaunchError, match="refused"):
        library.window_partition(x, (4, 4), (0, 0), max_vectors=16 * 4 - 1)
    library.window_partition(x, (4, 4), (0, 0), max_vectors=16 * 4)
    for shift in ((8, 0), (0, -1)):
        with pytest.raises(emulation.LaunchError, match="refused"):
            library.window_partition(x, (4, 4), shift)


@pytest.mark.parametrize("shape", [(0, 5, 6, 8), (2, 5, 6, 0), (0, 3, 5, 6, 8)])
def test_nothing_to_do(library, shape):
    window, shift = (4,) * (len(shape) - 2), (1,) * (len(shape) - 2)
    windows = library.window_partition(torch.empty(shape), window, shift)
    assert windows.numel() == 0
    assert library.window_reverse(windows, shape[1:-1], window, shift).shape == shape


def test_same_bits_whatever_the_schedule(library):
    """The bits would differ if a thread ran before all row addresses were written."""
    case = Case(2, (13, 11), (4, 4), (1, 3))
    x = draw(library, (2, 13, 11, 30), torch.float16)
    for seed in (1, 2, 3):
        library.configure(seed=seed)
        check(library, x, case)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_case(built, data):
    rank = data.draw(st.sampled_from([2, 3]))
    size = data.draw(st.tuples(*[st.integers(1, 9 if rank == 2 else 5)] * rank))
    window = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    frame = [math.ceil(s / w) * w for s, w in zip(size, window, strict=True)]
    shift = tuple(data.draw(st.integers(0, p - 1)) for p in frame)
    case = Case(data.draw(st.integers(0, 3)), size, window, shift, data.draw(st.sampled_from(PAD_ORDERS)))
    dtype, channels = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 20))
    built.configure(seed=data.draw(st.integers(0, 3)))
    check(built, draw(built, (case.batch, *size, channels), dtype), case)
