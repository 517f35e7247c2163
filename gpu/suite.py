"""Runs the tests that need a GPU in several processes, and emits a line per failed test and the number that passed.

Most of the time is spent on compiling Triton kernels, on one core per process. If a test ends its process, or if the
process can no longer use the GPU, the remaining tests run in a new process.
"""

from __future__ import annotations

import os

import pytest

from gpu import ROOT
from gpu.lines import FAILED, SKIPPED, Emitter
from gpu.plan import Setting
from gpu.runner import DEVICE_IS_LOST
from gpu.work import device_is_lost

FILES = (
    "tests/cuda/test_window_attention_gpu.py",
    "tests/cuda/test_layer_norm_gpu.py",
    "tests/cuda/test_window_partition_gpu.py",
    "tests/triton/test_window_attention.py",
    "tests/triton/test_memory_bound_ops.py",
)
# For a rehearsal: tests that are fast and need no GPU.
REHEARSED = ("tests/cuda/test_resources.py", "-k", "understood or local_memory")


def cases(group: str, emit: Emitter, setting: Setting, skip: int) -> None:
    """Run shard ``group`` of the tests, except its first ``skip`` tests. PYTEST_ARGS adds arguments such as -k."""
    os.environ["OMP_NUM_THREADS"] = "1"
    chosen = REHEARSED if setting.rehearse else ("-m", "gpu", *FILES)
    teller = _Teller(emit, skip)
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", f"--shard={group}", f"--rootdir={ROOT}", *chosen]
    status = pytest.main([*arguments, *os.environ.get("PYTEST_ARGS", "").split()], plugins=[teller])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        emit.line(case=f"tests {group}", result=FAILED, detail=f"pytest ended with {status!r}")
    emit.line(case=f"tests {group}", value=teller.passed, unit="passed")
    if teller.skipped:
        reasons = ", ".join(f"{n} {why}" for why, n in teller.skipped.items())
        emit.line(case=f"tests {group}", result=SKIPPED, detail=reasons[:300])


class _Teller:
    """A pytest plugin that emits a line for each failure, and counts passed and skipped tests."""

    def __init__(self, emit: Emitter, skip: int):
        self.emit, self.skip = emit, skip
        self.passed = 0
        self.skipped: dict[str, int] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_finish(self, session: pytest.Session):
        result = yield  # this selects the shard
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
        if device_is_lost():
            self.emit.line(result=FAILED, detail="it left the process without its GPU")
            os._exit(DEVICE_IS_LOST)
