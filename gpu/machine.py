"""Builds the extension for this GPU, and reports the machine and the installation."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterable

from gpu import ROOT
from gpu.lines import FAILED, SKIPPED, Emitter
from gpu.plan import Setting

Cases = Iterable[tuple[str, Callable[[], None]]]


def build(group: str, emit: Emitter, setting: Setting) -> Cases:
    """Yield a case that builds the extension for this GPU or, in a rehearsal, the library with emulated kernels."""
    yield group, functools.partial(_build, emit, setting)


def _build(emit: Emitter, setting: Setting) -> None:
    if not setting.rehearse:
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(command, cwd=ROOT, env={**os.environ, "SWINKERNELS_BUILD": "cuda"}, check=True)
        emit.line()
        return
    from tests import emulation
    from tests.emulation import bindings

    if reason := emulation.missing():
        emit.line(result=SKIPPED, detail=reason)
        return
    emit.tell(library=str(bindings.library()))
    emit.line()


def info(group: str, emit: Emitter, setting: Setting) -> Cases:
    import torch

    from benchmarks import record
    from swinkernels import info
    from swinkernels.ops import _backends

    def installation() -> None:
        stamp = record.environment(setting.device)
        emit.tell(environment={k: stamp[k] for k in ("device", "driver", "torch", "triton")})
        emit.line(detail=info.describe(info.collect()))

    def backends() -> None:
        missing = [f"{name}: {reason}" for name in ("cuda", "triton") if (reason := _backends.unavailable(name))]
        emit.line(**({"result": FAILED, "detail": "; ".join(missing)} if missing else {}))

    def clocks() -> None:
        busy = f"the memory is busy {torch.cuda.memory_usage()} % of the time before the run"
        emit.line(value=torch.cuda.clock_rate(), unit="MHz", detail=busy)

    yield "installation", installation
    if not setting.rehearse:
        yield from (("backends", backends), ("clocks", clocks))
