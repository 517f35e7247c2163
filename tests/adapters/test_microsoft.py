"""Tests that WindowProcess, as in Microsoft's extension, gives the results of the rolls and views that it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from swinkernels.integrations.microsoft import WindowProcess, WindowProcessReverse
from swinkernels.ops import _backends
from tests.ops.test_window_attention_arguments import check
from tests.support.side_by_side import draw

FAST = ("reference", "cuda", "triton")
every_backend = pytest.mark.parametrize("backend", FAST)


def pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return value if isinstance(value, tuple) else (value, value)


def partitioned(x: Tensor, roll: int | tuple[int, int], window: int | tuple[int, int]) -> Tensor:
    """Apply torch.roll and window_partition to (B, H, W, C), as the models do without the extension."""
    (h, w), (b, height, width, c) = pair(window), x.shape
    x = torch.roll(x, pair(roll), (1, 2)).reshape(b, height // h, h, width // w, w, c)
    return x.transpose(2, 3).reshape(-1, h, w, c)


def put_back(windows: Tensor, size: tuple[int, int], roll: int | tuple[int, int]) -> Tensor:
    """Apply window_reverse and torch.roll to (B * windows, h, w, C)."""
    (height, width), (_, h, w, c) = size, windows.shape
    x = windows.reshape(-1, height // h, width // w, h, w, c).transpose(2, 3).reshape(-1, height, width, c)
    return torch.roll(x, pair(roll), (1, 2))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_roll_and_windows(data):
    """Results agree bit for bit for rolls of either sign and any length, on rectangular maps and windows."""
    window = data.draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    size = tuple(w * data.draw(st.integers(1, 4)) for w in window)
    roll = data.draw(st.one_of(st.integers(-40, 40), st.tuples(st.integers(-40, 40), st.integers(-40, 40))))
    batch, channels = data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1, 3, 8]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    arguments = (batch, *size, channels, roll, window)
    x = draw(batch, *size, channels).to(dtype).requires_grad_()

    windows = WindowProcess.apply(x, *arguments)
    expected = partitioned(x, roll, window)
    dwindows = draw(*expected.shape, seed=2).to(dtype)
    assert torch.equal(windows, expected)
    assert windows.dtype == dtype
    assert torch.equal(*(torch.autograd.grad(w, x, dwindows)[0] for w in (windows, expected)))

    given_windows = windows.detach().requires_grad_()
    back = WindowProcessReverse.apply(given_windows, *arguments)
    expected = put_back(given_windows, size, roll)
    dx = draw(*expected.shape, seed=3).to(dtype)
    assert torch.equal(back, expected)
    assert torch.equal(*(torch.autograd.grad(y, given_windows, dx)[0] for y in (back, expected)))


@every_backend
@pytest.mark.parametrize("roll", [-3, 3, -9, 100, (0, -1), (-13, 7)])
def test_around_a_kernel(backend, roll, plain_kernels):
    """The kernels accept a shift of 0..size - 1, which may exceed the window; each is the other's backward pass."""
    x = draw(2, 8, 12, 3).requires_grad_()
    arguments = (2, 8, 12, 3, roll, 4)
    windows = WindowProcess.apply(x, *arguments, backend=backend)
    expected = partitioned(x, roll, 4)
    assert torch.equal(windows, expected)
    assert windows.is_contiguous()
    back = WindowProcessReverse.apply(windows, *arguments, backend=backend)
    assert torch.equal(back, put_back(expected, (8, 12), roll))
    dout = draw(*back.shape, seed=2)
    got = torch.autograd.grad(back, x, dout)[0]
    assert torch.equal(got, torch.autograd.grad(put_back(expected, (8, 12), roll), x, dout)[0])


@every_backend
def test_as_the_models_call_it(backend, plain_kernels):
    """A partition with roll -s and a reverse with roll +s return tokens to their places, on maps and on sequences."""
    b, h, w, c, shift, window = 2, 8, 12, 3, 2, 4
    x = draw(b, h * w, c)
    windows = WindowProcess.apply(x.view(b, h, w, c), b, h, w, c, -shift, window, backend=backend)
    assert torch.equal(windows, WindowProcess.apply(x, b, h, w, c, -shift, window, backend=backend))
    for merged in (2 * windows, (2 * windows).view(-1, window * window, c)):
        back = WindowProcessReverse.apply(merged, b, h, w, c, shift, window, backend=backend)
        assert torch.equal(back.view(b, h * w, c), 2 * x)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.complex128])
def test_any_dtype(dtype):
    x = (5 * draw(2, 4, 6, 3)).to(dtype)
    windows = WindowProcess.apply(x, 2, 4, 6, 3, -1, 2)
    assert torch.equal(windows, partitioned(x, -1, 2))
    assert torch.equal(WindowProcessReverse.apply(windows, 2, 4, 6, 3, 1, 2), x)


def test_more_than_65535_windows():
    """Any number of windows works; the extension, with windows on the z axis of a CUDA grid, allows only 65,535."""
    x = torch.arange(2 * 2 * 65536).reshape(2, 2, 65536, 1)
    windows = WindowProcess.apply(x, 2, 2, 65536, 1, -1, 1)
    assert windows.shape == (2 * 2 * 65536, 1, 1, 1)
    assert torch.equal(windows, partitioned(x, -1, 1))
    assert torch.equal(WindowProcessReverse.apply(windows, 2, 2, 65536, 1, 1, 1), x)


@every_backend
def test_strided_input(backend, plain_kernels):
    x = draw(2, 3, 12, 8).permute(0, 3, 2, 1)
    windows = WindowProcess.apply(x, 2, 8, 12, 3, -1, 4, backend=backend)
    assert torch.equal(windows, partitioned(x, -1, 4))
    spread = windows.mT.contiguous().mT
    assert torch.equal(WindowProcessReverse.apply(spread, 2, 8, 12, 3, 1, 4, backend=backend), x)


@every_backend
def test_twice_differentiable(backend, plain_kernels):
    x = draw(1, 4, 6, 2).requires_grad_()

    def there_and_back(x):
        windows = WindowProcess.apply(x, 1, 4, 6, 2, -3, 2, backend=backend)
        return WindowProcessReverse.apply(windows.pow(3), 1, 4, 6, 2, 5, 2, backend=backend)

    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


def test_compile_fullgraph(plain_kernels):
    """One compiled graph, with its backward pass, is used for all sizes and batches."""

    def there_and_back(x):
        b, h, w, c = x.shape
        windows = WindowProcess.apply(x, b, h, w, c, -2, 4, backend="cuda")
        return WindowProcessReverse.apply(windows.sin(), b, h, w, c, 2, 4, backend="cuda")

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend=counter)
    for shape in ((3, 8, 12, 5), (7, 20, 16, 5), (2, 12, 28, 5)):
        x = draw(*shape).requires_grad_()
        got, expected = compiled(x), there_and_back(x)
        assert torch.equal(got, expected)
        assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (got, expected)))
    assert counter.frame_count == 1


def test_autocast_changes_nothing():
    x = draw(2, 4, 6, 3).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(WindowProcess.apply(x, 2, 4, 6, 3, -1, 2), partitioned(x, -1, 2))


RIGHT = {"B": 2, "H": 8, "W": 12, "C": 3, "shift_size": -2, "window_size": 4}
INPUTS = {WindowProcess: torch.zeros(2, 8, 12, 3), WindowProcessReverse: torch.zeros(12, 4, 4, 3)}
each_process = pytest.mark.parametrize("process", INPUTS, ids=lambda process: process.__name__)


@each_process
@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"H": 9}, ValueError, ["H and W must be multiples of window_size", "(9, 12)", "(4, 4)", "window_partition"]),
        ({"W": 10}, ValueError, ["H and W must be multiples of window_size", "(8, 10)"]),
        ({"window_size": 16}, ValueError, ["multiples of window_size", "(16, 16)"]),
        ({"window_size": 0}, ValueError, ["window_size", "at least 1", "(0, 0)"]),
        ({"window_size": 4.0}, TypeError, ["window_size", "int", "4.0"]),
        ({"window_size": (4, 4, 4)}, ValueError, ["window_size", "2 axes", "(4, 4, 4)"]),
        ({"shift_size": 1.5}, TypeError, ["shift_size", "int", "1.5"]),
        ({"shift_size": None}, TypeError, ["shift_size", "int", "None"]),
        ({"shift_size": (1, 2, 3)}, ValueError, ["shift_size", "2 axes", "(1, 2, 3)"]),
        ({"B": -1}, ValueError, ["B must be at least 0", "got -1"]),
        ({"B": 2.0}, TypeError, ["B must be an int", "2.0"]),
        ({"H": 8.0}, TypeError, ["H must be an int", "8.0"]),
        ({"W": 0}, ValueError, ["W must be at least 1", "got 0"]),
        ({"C": "3"}, TypeError, ["C must be an int", "'3'"]),
        ({"input": [1]}, TypeError, ["input", "tensor", "list"]),
        ({"input": torch.zeros(2, 8, 12, 3).to_sparse()}, TypeError, ["input", "strided", "sparse"]),
        ({"backend": "gpu"}, ValueError, ["backend", "'gpu'", "'triton'"]),
    ],
)
def test_wrong_arguments(process, changes, error, words):
    arguments = {"input": INPUTS[process], **RIGHT, **changes}
    message = check(lambda: process.apply(**arguments), error, *words)
    assert message.startswith(f"{process.__name__}: ")


@pytest.mark.parametrize(
    ("process", "shape", "changes", "accepted"),
    [
        (WindowProcess, (2, 12, 8, 3), {}, "(2, 8, 12, 3) or (2, 96, 3)"),
        (WindowProcess, (2, 8, 12, 3), {"B": 3}, "(3, 8, 12, 3) or (3, 96, 3)"),
        (WindowProcess, (2, 8, 12, 3), {"C": 4}, "(2, 8, 12, 4) or (2, 96, 4)"),
        (WindowProcess, (2, 8, 12, 3), {"H": 4, "W": 24}, "(2, 4, 24, 3) or (2, 96, 3)"),
        (WindowProcess, (12, 4, 4, 3), {}, "(2, 8, 12, 3) or (2, 96, 3)"),
        (WindowProcessReverse, (2, 8, 12, 3), {}, "(12, 4, 4, 3) or (12, 16, 3)"),
        (WindowProcessReverse, (12, 4, 4, 3), {"B": 3}, "(18, 4, 4, 3) or (18, 16, 3)"),
        (WindowProcessReverse, (12, 4, 4, 3), {"window_size": (2, 4)}, "(24, 2, 4, 3) or (24, 8, 3)"),
    ],
)
def test_wrong_shapes(process, shape, changes, accepted):
    arguments = {"input": torch.zeros(shape), **RIGHT, **changes}
    message = check(lambda: process.apply(**arguments), ValueError, "input must be", accepted, str(shape))
    assert message.startswith(f"{process.__name__}: ")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@each_process
def test_backend_that_cannot_run(process, backend):
    if backend == "triton" and _backends.interpreting():
        pytest.skip("Triton's interpreter runs on the CPU")
    with pytest.raises(NotImplementedError, match=f"^{process.__name__}: backend='{backend}' cannot run this call"):
        process.apply(INPUTS[process], **RIGHT, backend=backend)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_in_a_cuda_graph(backend):
    """Forward and backward are captured once and replayed with other input values (bfloat16, rectangular map)."""
    if _backends.unavailable(backend):
        pytest.skip(str(_backends.unavailable(backend)))
    b, h, w, c, shift, window = 700, 56, 84, 8, 3, 7  # 67,200 windows
    arguments = (b, h, w, c)
    x, dout, others = (draw(b, h, w, c, seed=i).to("cuda", torch.bfloat16) for i in range(3))
    x.requires_grad_()

    def run() -> tuple[Tensor, Tensor, Tensor]:
        windows = WindowProcess.apply(x, *arguments, -shift, window, backend=backend)
        out = WindowProcessReverse.apply(windows, *arguments, shift - 1, window, backend=backend)
        return windows, out, torch.autograd.grad(out, x, dout)[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        windows, out, dx = run()
    with torch.no_grad():
        x.copy_(others)
    graph.replay()
    assert torch.equal(windows, partitioned(others, -shift, window))
    assert torch.equal(out, torch.roll(others, (-1, -1), (1, 2)))
    assert torch.equal(dx, torch.roll(dout, (1, 1), (1, 2)))
