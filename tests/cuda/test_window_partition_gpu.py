"""Tests window_partition and window_reverse on a real GPU, bit for bit against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import swinkernels
from swinkernels import reference
from swinkernels.ops import _backends
from tests.cuda.test_window_partition_emulated import GEOMETRY, PAD_ORDERS, Case, assert_same_bits, expected_windows

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.float64, torch.complex128)
SHIFTED = Case(3, (20, 17), (7, 7), (3, 3))
SHAPES = [  # the stages of a Swin-T, a 3D map, and rows that are hard to vectorise
    (Case(2, (56, 56), (7, 7), (3, 3)), 96),
    (Case(2, (28, 28), (7, 7), (3, 3)), 192),
    (Case(2, (14, 14), (7, 7), (3, 3)), 384),
    (Case(2, (7, 7), (7, 7), (0, 0)), 768),
    (Case(1, (24, 26, 28), (7, 7, 7), (3, 3, 3)), 48),
    *((SHIFTED, channels) for channels in (1, 3, 30, 97)),
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = _backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def draw(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, device=DEVICE, dtype=dtype, generator=generator)
    return torch.randint(0, 128, shape, device=DEVICE, dtype=dtype, generator=generator)


def partition(x: Tensor, case: Case, backend: str) -> Tensor:
    return swinkernels.window_partition(x, case.window, case.shift, pad_order=case.pad_order, backend=backend)


def reverse(windows: Tensor, case: Case, backend: str) -> Tensor:
    return swinkernels.window_reverse(
        windows, case.window, case.size, case.shift, pad_order=case.pad_order, backend=backend
    )


def op(name: str, backend: str):
    return getattr(torch.ops.swinkernels, f"{name}_triton" if backend == "triton" else name)


def geometry(case: Case) -> tuple[list[int], list[int], bool]:
    """Return the window, the shift and roll_then_pad as the ops accept them: with three values per list."""
    leading = 3 - len(case.size)
    return [1] * leading + [*case.window], [0] * leading + [*case.shift], case.pad_order == "roll_then_pad"


def needs_free_memory(gib: int) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, got {free:.0f}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "channels"), SHAPES, ids=str)
def test_shapes(backend: str, case: Case, channels: int, dtype: torch.dtype) -> None:
    for pad_order in PAD_ORDERS:
        case = case._replace(pad_order=pad_order)
        x = draw(case.batch, *case.size, channels, dtype=dtype)
        windows = partition(x, case, backend)
        assert_same_bits(windows, expected_windows(x, case))
        assert_same_bits(reverse(windows, case, backend), x)


@pytest.mark.parametrize("pad_order", PAD_ORDERS)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(backend: str, name: str, pad_order: str) -> None:
    """The ops, which also accept shifts of more than a window, handle every geometry."""
    case = GEOMETRY[name]._replace(pad_order=pad_order)
    x = draw(case.batch, *case.size, 12)
    windows = op("window_partition", backend)(x, *geometry(case))
    assert_same_bits(windows, expected_windows(x, case))
    assert_same_bits(op("window_reverse", backend)(windows, case.size, *geometry(case)), x)


def test_strides_are_honoured_and_nothing_is_modified(backend: str) -> None:
    wide = draw(3, 20, 17, 5 * 48)
    for x in (wide[..., 48:96], wide[..., 50:98], wide[..., 1:49], wide.movedim(-1, 1).contiguous().movedim(1, -1)):
        before = wide.clone()
        windows = partition(x, SHIFTED, backend)
        assert_same_bits(windows, expected_windows(x, SHIFTED))
        spread = torch.empty(*windows.shape[:2], 2 * windows.shape[2], dtype=x.dtype, device=DEVICE)
        for strided in (spread[..., : windows.shape[2]], windows.transpose(0, 1).contiguous().transpose(0, 1)):
            strided.copy_(windows)
            assert_same_bits(reverse(strided, SHIFTED, backend), x)
        assert torch.equal(wide, before)


def test_gradients(backend: str) -> None:
    """The backward pass of each op is the other op, also in double backward; gradients may have any strides."""
    x = draw(3, 20, 17, 32, dtype=torch.float32).requires_grad_()
    windows = partition(x, SHIFTED, backend)
    dwindows = draw(*windows.shape, dtype=torch.float32, seed=1).requires_grad_()
    (dx,) = torch.autograd.grad(windows, x, dwindows, create_graph=True)
    expected = reference.window_reverse(dwindows, SHIFTED.window, SHIFTED.size, SHIFTED.shift)
    assert torch.equal(dx, expected)
    ddx = draw(*x.shape, dtype=torch.float32, seed=2)
    (back,) = torch.autograd.grad(dx, dwindows, ddx)
    assert torch.equal(back, expected_windows(ddx, SHIFTED))
    (ones,) = torch.autograd.grad(partition(x, SHIFTED, backend).sum(), x)
    assert torch.equal(ones, torch.ones_like(x))


def test_opcheck(backend: str) -> None:
    x = draw(2, 5, 9, 8, dtype=torch.float32).requires_grad_()
    case = Case(2, (5, 9), (4, 3), (2, 1))
    torch.library.opcheck(op("window_partition", backend).default, (x, *geometry(case)))
    windows = partition(x, case, backend).detach().requires_grad_()
    torch.library.opcheck(op("window_reverse", backend).default, (windows, [5, 9], *geometry(case)))


def test_empty_batch(backend: str) -> None:
    case = SHIFTED._replace(batch=0)
    x = draw(0, 20, 17, 8).requires_grad_()
    windows = partition(x, case, backend)
    assert windows.shape == (0, 49, 8)
    assert torch.autograd.grad(windows.sum(), x)[0].shape == x.shape
    assert reverse(windows, case, backend).shape == x.shape


def test_side_stream_and_cuda_graph(backend: str) -> None:
    case = Case(8, (28, 28), (7, 7), (3, 3))
    inputs = [draw(8, 28, 28, 192, seed=seed) for seed in (0, 1)]
    x = inputs[0].clone().requires_grad_()
    dback = draw(8, 28, 28, 192, seed=2)

    def run() -> list[Tensor]:
        windows = partition(x, case, backend)
        back = reverse(windows * 2, case, backend)
        return [windows, back, torch.autograd.grad(back, x, dback)[0]]

    def check(results: list[Tensor], source: Tensor) -> None:
        windows, back, dx = results
        assert torch.equal(windows, expected_windows(source, case))
        assert torch.equal(back, source * 2)
        assert torch.equal(dx, dback * 2)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run()
    stream.synchronize()
    check(results, inputs[0])

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for source in reversed(inputs):
        with torch.no_grad():
            x.copy_(source)
        graph.replay()
        check(captured, source)


def test_more_than_65535_windows(backend: str) -> None:
    case = Case(2, (1030, 1023), (4, 4), (2, 2))
    x = draw(2, 1030, 1023, 8)
    windows = partition(x, case, backend)
    assert windows.shape[0] > 2**17
    assert_same_bits(windows, expected_windows(x, case))
    assert_same_bits(reverse(windows, case, backend), x)


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """The last images of a huge batch give the same results as in a batch of their own."""
    needs_free_memory(18)
    case = Case(7200, (56, 56), (7, 7), (3, 3))
    x = draw(case.batch, 56, 56, 96)
    assert x.numel() > 2**31
    windows = partition(x, case, backend)
    assert_same_bits(windows[-2 * 64 :], expected_windows(x[-2:], case))
    assert torch.equal(reverse(windows, case, backend), x)


def test_more_than_two_to_the_31_tokens_in_one_image(backend: str) -> None:
    """An image with rows of one byte has more vectors than one launch allows, so it is split into several launches."""
    needs_free_memory(12)
    n, window, shift = 46400, 8, 4
    assert n * n > 2**31
    case = Case(1, (n, n), (window, window), (shift, shift))
    x = draw(1, n, n, 1, dtype=torch.uint8)
    windows = partition(x, case, backend).unflatten(0, (n // window, n // window))
    assert math.prod(windows.shape) == x.numel()
    for row in (0, 1, 2899, 2900, n // window - 1):  # rows of windows
        strip = x[:, [(row * window + shift + t) % n for t in range(window)]].roll(-shift, 2)
        assert torch.equal(windows[row], reference.window_partition(strip, window))
    assert torch.equal(reverse(windows.flatten(0, 1), case, backend), x)


@pytest.mark.parametrize("fullgraph", [False, True], ids=["eager", "compiled"])
def test_in_a_compiled_model(backend: str, fullgraph: bool) -> None:
    def model(x: Tensor) -> Tensor:
        windows = partition(x * 2, SHIFTED, backend)
        return reverse(windows + 1, SHIFTED, backend)

    run = torch.compile(model, fullgraph=True) if fullgraph else model
    x = draw(3, 20, 17, 32, dtype=torch.float32).requires_grad_()
    out = run(x)
    assert torch.equal(out, x * 2 + 1)
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full_like(x, 2))
