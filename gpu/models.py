"""Times original and accelerated models: each contestant warms up in its own process, then they are timed in turn."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch

from benchmarks import models
from benchmarks.timing import time_on_cpu
from gpu.lines import SKIPPED, Emitter
from gpu.plan import Setting
from gpu.timing import RESULTS

KEPT = ("suite", "op", "shape", "backend", "dtype", "direction", "case", "error_eps", "noisy", "peak_mib", "host_us",
        "gpu_busy_us", "first_call_s")  # fmt: skip


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    """Yield one case. ``group`` names its suite, its model in shapes.MODELS, its mode and one of models.CONTESTANTS."""
    yield group, functools.partial(_time, *group.split(), emit, setting)


def _time(suite: str, model: str, mode: str, contestant: str, emit: Emitter, setting: Setting) -> None:
    if missing := models.not_installed([model]):
        emit.line(result=SKIPPED, detail=f"{', '.join(missing)} is not installed")
        return
    if setting.rehearse:
        models.time_on_cpu = lambda calls, seconds: time_on_cpu(calls, seconds=0.1, rounds=2)
    dtype = torch.float32 if setting.rehearse else torch.bfloat16
    batch = 1 if setting.rehearse or suite == "latency" else None
    device, run = torch.device(setting.device), functools.partial(models.benchmark, before_timing=emit.turn)
    for row in run(suite, model, dtype, device, [contestant], batch=batch, modes=(mode,)):
        us = row["median_us"]
        emit.line(**{k: row[k] for k in KEPT}, value=us, unit="us", us=us, result=RESULTS[row["result"]])
