"""Tests that the emulator for CUDA kernels executes instructions correctly and detects mistakes in kernels."""

from __future__ import annotations

import ctypes

import pytest
import torch

from tests import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))


@pytest.fixture(params=[0, 1, 2])
def library(request: pytest.FixtureRequest) -> emulation.Library:
    """Return the library of the emulator's self-test, set to each of three schedules in turn."""
    built = emulation.self_test_library()
    built.configure(seed=request.param)
    return built


def _pointers(*tensors: torch.Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


@pytest.mark.parametrize(
    ("kind", "dtype", "depth"),
    [(0, torch.float16, 16), (1, torch.bfloat16, 16), (2, torch.float16, 8), (3, torch.bfloat16, 8)],
)
def test_mma_of_16_bit_elements_is_a_matmul(library, kind, dtype, depth):
    g = torch.Generator().manual_seed(kind)
    a = library.copy(torch.randn(16, depth, generator=g).to(dtype))
    b = library.copy(torch.randn(depth, 8, generator=g).to(dtype))
    d = library.empty((16, 8), torch.float32)
    library.check(library.functions.self_mma(kind, *_pointers(a, b, d)))
    torch.testing.assert_close(d, a.float() @ b.float(), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("rounded", [False, True])
def test_tf32_mma_drops_the_low_bits(library, rounded):
    g = torch.Generator().manual_seed(0)
    a, b = (library.copy(torch.randn(*shape, generator=g)) for shape in ((16, 8), (8, 8)))
    d = library.empty((16, 8), torch.float32)
    library.check(library.functions.self_mma(5 if rounded else 4, *_pointers(a, b, d)))

    def tf32(x):
        bits = x.view(torch.int32)
        return ((bits + 0x1000 if rounded else bits) & ~0x1FFF).view(torch.float32)

    torch.testing.assert_close(d, tf32(a) @ tf32(b), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(d, a @ b, rtol=1e-6, atol=1e-6)


def test_launches_are_kept_to_the_shared_memory_of_a_block(library):
    x, y = library.empty((4, 8, 8), torch.int16), library.empty((4, 8, 8), torch.int16)
    library.launches()
    library.check(library.functions.self_transpose(*_pointers(x, y)))
    (launch,) = library.launches()
    assert "transpose_kernel" in launch.kernel
    assert launch[1:] == (512, 32)
    library.configure(shared_bytes=511)
    with pytest.raises(emulation.LaunchError, match="512 bytes of dynamic shared memory"):
        library.check(library.functions.self_transpose(*_pointers(x, y)))
    assert library.launches() == []
    library.configure()


def test_transposing_ldmatrix(library):
    x = library.copy(torch.arange(256, dtype=torch.int16).reshape(4, 8, 8))
    y = library.empty((4, 8, 8), torch.int16)
    library.check(library.functions.self_transpose(*_pointers(x, y)))
    assert torch.equal(y, x.transpose(1, 2))


@pytest.mark.parametrize(("how", "row_limit"), [(0, 32), (1, 32), (2, 32), (3, 32), (3, 27), (3, 17)])
def test_packed_fragments_reach_their_rows(library, how, row_limit):
    """With and without stmatrix, only the rows below the limit are written; the others keep their values."""
    x = library.copy(
        torch.randint(1, 2**31 - 1, (16, 20), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    )
    y = library.empty((32, 32), torch.int32)
    library.check(library.functions.self_write_packed(*_pointers(x, y), how, row_limit))
    expected = torch.zeros(32, 32, dtype=torch.int32)
    expected[16:row_limit, :20] = x[: row_limit - 16]
    assert torch.equal(y, expected)


def test_shuffles_and_ballot(library):
    x = library.copy(torch.randint(0, 1000, (32,), generator=torch.Generator().manual_seed(0), dtype=torch.int32))
    y = library.empty((5, 32), torch.int32)
    library.check(library.functions.self_shuffle(*_pointers(x, y)))
    lane = torch.arange(32)
    total = x.sum().expand(32).clone()
    total[:8] += x[lane[:8] ^ 1]
    assert torch.equal(y[0].long(), total)
    assert torch.equal(y[1], x[torch.where(lane < 31, lane + 1, lane)])
    assert torch.equal(y[2], x[torch.where(lane % 8 > 0, lane - 1, lane)])
    assert torch.equal(y[3], x[lane // 8 * 8 + 3])
    ballot = sum(1 << i for i in range(32) if x[i] % 2)
    assert (y[4].long() & 0xFFFFFFFF).eq(ballot).all()


def _run_async(library, rows, wait, barrier):
    x = library.copy(torch.randn(rows, 256, generator=torch.Generator().manual_seed(0)))
    y = library.empty((rows, 256), torch.float32)
    library.check(library.functions.self_async(*_pointers(x, y), rows, wait, barrier))
    x[:, -4:] = 0  # here, the kernel writes zeros instead of reading x
    return x, y


def test_asynchronous_copy_in_a_persistent_loop(library):
    x, y = _run_async(library, 5, True, True)
    assert torch.equal(x, y)


def test_missing_wait_and_missing_barrier_are_seen(library):
    _, y = _run_async(library, 5, False, True)
    assert y.isnan().any()
    x, y = _run_async(library, 5, True, False)
    assert not torch.equal(x, y)


MISTAKES = {
    1: "waits for lane 7, which has exited|lane 7, which has exited|no thread of the block can go on",
    2: "different collectives",
    3: "different barriers",
    4: "no thread of the block can go on",
    5: r"byte \d+ of the 256 bytes of dynamic shared memory",
    6: "wrote 0 bytes past the 257 bytes of dynamic shared memory",
    7: "byte 256 of a global buffer of 256 bytes",
    8: "byte -4100 of a global buffer",
    9: "misaligned",
    10: "not a multiple of 16 bytes",
    11: "array index out of range",
    12: "reads lane 20, which takes no part",
}
FAULTS = {5, 7, 8, 9, 11}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_mistakes_are_reported(library, mistake):
    if mistake in FAULTS and not library.catches_faults:
        pytest.skip("faults are caught on x86-64 Linux only")
    x = library.copy(torch.zeros(64))
    with pytest.raises(emulation.LaunchError, match=MISTAKES[mistake]):
        library.check(library.functions.self_mistake(*_pointers(x), 64, mistake))
    library.check(library.functions.self_mistake(*_pointers(x), 64, 0))  # the next launch is unaffected


@pytest.mark.parametrize("portable", [False, True])
def test_conversions_round_as_torch_does(portable):
    library = emulation.self_test_library()
    every_16_bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = torch.cat([every_16_bits.view(torch.float16).float(), every_16_bits.view(torch.bfloat16).float()])
    values = values[~values.isnan()]
    bits = values.view(torch.int32)
    between = torch.cat([bits + 0x0FFF, bits + 0x1000, bits + 0x1001, bits + 0x7FFF, bits + 0x8000, bits + 0x8001])
    x = torch.cat([values, between.view(torch.float32)])
    x = x[~x.isnan()]
    half, back, pair = x.clone(), torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
    library.functions.self_convert(*_pointers(half, back, pair), ctypes.c_int64(len(x)), portable)
    assert torch.equal(half, x.half().float())
    assert torch.equal(back, x.bfloat16().float())
    assert torch.equal(pair, x.bfloat16().view(torch.int16).int() << 16 | x.half().view(torch.int16).int() & 0xFFFF)
