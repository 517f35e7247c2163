"""What a run stands on: the build for this GPU, and what machine and installation are."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable

from gpu import ROOT
from gpu.lines import FAILED, SKIPPED, Emitter
from gpu.plan import Setting

Cases = Iterable[tuple[str, Callable[[], None]]]


def build(group: str, emit: Emitter, setting: Setting) -> Cases:
    """The extension for this GPU, or the emulated library: minutes, or seconds where nothing changed."""

    def run() -> None:
        if setting.rehearse:
            from tests import emulation
            from tests.emulation import bindings

            if reason := emulation.missing():
                emit.line(result=SKIPPED, detail=reason)
                return
            emit.library(bindings.library())
        else:
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            subprocess.run(command, cwd=ROOT, env={**os.environ, "SWINKERNELS_BUILD": "cuda"}, check=True)
        emit.line()

    yield group, run


def info(group: str, emit: Emitter, setting: Setting) -> Cases:
    import torch

    from benchmarks import record
    from swinkernels import info
    from swinkernels.ops import _backends

    def installation() -> None:
        facts = info.describe(info.collect())
        stamp = record.environment(setting.device)
        emit.environment({k: stamp[k] for k in ("device", "driver", "torch", "triton")})
        emit.line(detail=facts)

    def backends() -> None:
        missing = [f"{name}: {reason}" for name in ("cuda", "triton") if (reason := _backends.unavailable(name))]
        emit.line(**({"result": FAILED, "detail": "; ".join(missing)} if missing else {}))

    def clocks() -> None:
        busy = f"memory is at work {torch.cuda.memory_usage()} % of the time before the run"
        emit.line(value=torch.cuda.clock_rate(), unit="MHz", detail=busy)

    yield "installation", installation
    if not setting.rehearse:
        yield "backends", backends
        yield "clocks", clocks
