"""Models as they are and accelerated: every contestant gets ready in its own process, then one is timed at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from benchmarks import models
from benchmarks.timing import time_on_cpu
from gpu.lines import SKIPPED, Emitter
from gpu.plan import Setting
from gpu.timing import RESULTS


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    """``group`` is a suite, a model of shapes.MODELS, a mode and one of models.CONTESTANTS."""
    suite, model, mode, contestant = group.split()

    def case() -> None:
        if missing := models.not_installed([model]):
            emit.line(result=SKIPPED, detail=f"{', '.join(missing)} is not installed")
            return
        if setting.rehearse:
            models.time_on_cpu = lambda calls, seconds: time_on_cpu(calls, seconds=0.1, rounds=2)
        rows = models.benchmark(
            suite,
            model,
            torch.float32 if setting.rehearse else torch.bfloat16,
            torch.device(setting.device),
            [contestant],
            batch=1 if setting.rehearse or suite == "latency" else None,
            modes=(mode,),
            before_timing=emit.turn,
        )
        for row in rows:
            labels = {k: row[k] for k in ("suite", "op", "shape", "backend", "dtype", "direction", "case")}
            times = {k: row[k] for k in ("error_eps", "noisy", "peak_mib", "host_us", "gpu_busy_us", "first_call_s")}
            value = {"value": row["median_us"], "unit": "us", "us": row["median_us"]}
            emit.line(**labels, **value, **times, result=RESULTS[row["result"]])

    yield group, case
