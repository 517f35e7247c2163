"""The tests that need a GPU, in several processes: a line for each that fails, and one for how many passed.

Most of their time goes into compiling Triton's kernels, on one core a process. A test that ends its process, or leaves
it without its GPU, costs the others nothing: the process is started again behind it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import pytest

from gpu import ROOT
from gpu.lines import FAILED, SKIPPED, Emitter
from gpu.plan import Setting
from gpu.runner import DEVICE_IS_LOST

FILES = (
    "tests/cuda/test_window_attention_gpu.py",
    "tests/cuda/test_layer_norm_gpu.py",
    "tests/cuda/test_window_partition_gpu.py",
    "tests/triton/test_window_attention.py",
    "tests/triton/test_memory_bound_ops.py",
)
# Of a rehearsal: a file whose tests need no GPU and take no time.
REHEARSED = ("tests/cuda/test_resources.py", "-k", "understood or local_memory")


def cases(group: str, emit: Emitter, setting: Setting, skip: int) -> Iterable[tuple[str, Callable[[], None]]]:
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = list(REHEARSED) if setting.rehearse else ["-m", "gpu", *FILES]
    # Further arguments of pytest, such as -k.
    chosen += os.environ.get("PYTEST_ARGS", "").split()

    def run() -> None:
        teller = _Teller(emit, skip)
        arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--shard={group}", f"--rootdir={ROOT}"]
        status = pytest.main([*arguments, *chosen], plugins=[teller])
        if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise RuntimeError(f"pytest ended with {status!r}")
        emit.line(case=f"tests {group}", value=teller.passed, unit="passed")
        if teller.skipped:
            reasons = ", ".join(f"{n} {why}" for why, n in teller.skipped.items())
            emit.line(case=f"tests {group}", result=SKIPPED, detail=reasons[:300])

    yield group, run


class _Teller:
    """A plugin of pytest that tells the run what the tests do."""

    def __init__(self, emit: Emitter, skip: int):
        self.emit, self.skip = emit, skip
        self.passed = 0
        self.skipped: dict[str, int] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self, session: pytest.Session):
        result = yield  # after the shard was chosen
        del session.items[: self.skip]
        return result

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.emit.begin(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            words = getattr(getattr(report.longrepr, "reprcrash", None), "message", str(report.longrepr))
            self.emit.line(result=FAILED, detail=f"{report.when}: {words}".partition("\n")[0][:300])
        elif report.skipped:
            why = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[why] = self.skipped.get(why, 0) + 1
        elif report.when == "call":
            self.passed += 1

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        from gpu.work import device_is_lost

        if device_is_lost():
            self.emit.line(result=FAILED, detail="it left the process without its GPU")
            os._exit(DEVICE_IS_LOST)
