"""Setup of every test: fresh memory is NaN, GPU tests are skipped if there is no GPU, and caches start empty.

In CI, Hypothesis draws the same examples every time. Opt-in fixtures replace kernels by plain PyTorch.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

# On few cores, a pool of compiler processes costs more time than it saves, because each imports torch.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

hypothesis.settings.register_profile("local", deadline=None)
# Hypothesis draws the same examples every time, so that an unrelated change does not fail because a new example reveals
# an existing fault. It writes nothing to disk.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


STARTED = pytest.StashKey[float]()
# Tests that use the GPU if there is one, and Triton's interpreter otherwise.
ON_A_GPU_IF_THERE_IS_ONE = {
    Path(__file__).parent / "triton" / f"test_{name}.py"
    for name in ("low_scores", "memory_bound_ops", "window_attention")
}


def pytest_configure(config: pytest.Config) -> None:
    if config.option.tools:
        from tests.interop.table import Recorder

        config.pluginmanager.register(Recorder(Path(config.option.tools).absolute()))
    # mmengine imports yapf, whose first import writes a file to the user's cache. Another process may read the file
    # half-written, so import yapf here, before pytest-xdist starts its workers.
    with contextlib.suppress(ImportError):
        importlib.import_module("yapf")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seconds", type=float, help="start no test after this time; skip the remaining tests")
    parser.addoption("--tools", help="record here which tools work, for docs/interop.md", metavar="tools.json")
    parser.addoption("--shard", help="i/n: run every n-th of the selected tests, starting with the i-th", metavar="i/n")


@pytest.hookimpl(tryfirst=True)  # before pytest applies -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    there_is_one = torch.cuda.is_available()
    for item in items:
        if there_is_one and item.path in ON_A_GPU_IF_THERE_IS_ONE:
            item.add_marker(pytest.mark.gpu)
        if not there_is_one and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="torch sees no CUDA GPU"))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.option.shard:
        first, count = map(int, session.config.option.shard.split("/"))
        session.items[:] = session.items[first::count]
    # Otherwise, Python's collector visits all imported libraries and collected tests a hundred times.
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[STARTED] = time.monotonic()


def pytest_runtest_setup(item: pytest.Item) -> None:
    seconds = item.config.option.seconds
    if seconds is not None and time.monotonic() - item.config.stash[STARTED] > seconds:
        pytest.skip(f"--seconds {seconds:g} have passed")


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan():
    """Fill uninitialised tensors with NaN, so that comparisons fail for output elements that no kernel writes."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        # PyTorch's own code, with which the kernels are compared, may be nondeterministic.
        warnings.filterwarnings("ignore", message=".*deterministic", category=UserWarning)
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def nothing_is_known_of_earlier_calls():
    from swinkernels.ops._library import forget

    forget()
    yield
    forget()


@pytest.fixture
def allow_tf32() -> Iterator[Callable[[bool], None]]:
    """Yield a function that sets torch's TF32 switch for CUDA, and restore the switch after the test.

    monkeypatch cannot restore the switch, because it is not a plain attribute.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision

    def allow(allowed: bool) -> None:
        matmul.fp32_precision = "tf32" if allowed else "ieee"

    yield allow
    matmul.fp32_precision = before


@pytest.fixture
def plain_kernels(monkeypatch: pytest.MonkeyPatch):
    """Run the ops of backends "cuda" (memory-bound ops) and "triton" (also attention) in plain PyTorch on the CPU."""
    from swinkernels.ops import _backends
    from tests.support.plain_kernels import attached

    def reasons(backend: str, op: str, device: torch.device) -> list[str]:
        return [] if backend in _backends.IMPLEMENTED[op] else [f"it does not implement {op}"]

    monkeypatch.setattr(_backends, "_reasons", reasons)
    with attached():
        yield


@pytest.fixture
def as_on_a_gpu(plain_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make "auto" choose backend "cuda" for CPU tensors, with plain PyTorch in place of its kernels.

    Attention runs the reference.
    """
    from swinkernels.ops import _backends

    monkeypatch.setitem(_backends.PREFERENCE, "cpu", ("cuda", "reference"))
    monkeypatch.setitem(_backends.IMPLEMENTED, "window_attention", ())
