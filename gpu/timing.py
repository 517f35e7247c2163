"""Times the shipped build, another build, variants, peers, and device copies of the same bytes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from benchmarks import attention, contest, goals, memory_bound, shapes
from benchmarks.timing import time_on_cpu
from gpu.lines import FAILED, OK, WRONG, Emitter
from gpu.plan import Setting
from gpu.smoke import tiny

ATTENTION = tuple(goals.ATTENTION_GOALS)
MEMORY = tuple(dict.fromkeys(op for op, _ in goals.MEMORY_GOALS))
DIRECTIONS = ("fwd", "bwd")
RESULTS = {"ok": OK, "WRONG": WRONG, "FAILED": FAILED}
BACKENDS = ("cuda", "triton")
Cases = Iterable[tuple[str, Callable[[], None]]]


class _Timer:
    """Builds cases that wait for their turn, time an op with ``benchmarks`` and emit a line per row of the result."""

    def __init__(self, emit: Emitter, setting: Setting, build: str, directions: Sequence[str] = DIRECTIONS):
        self.emit, self.build, self.directions = emit, build, directions
        self.device, self.rehearse = torch.device(setting.device), setting.rehearse
        if setting.rehearse:
            contest.time_on_cpu = functools.partial(time_on_cpu, seconds=0.02, rounds=3)

    def attention(self, shape: str, names: Sequence[str], arithmetic: str = "bfloat16") -> tuple[str, Callable]:
        case = tiny(shapes.ATTENTION[shape]) if self.rehearse else shapes.ATTENTION[shape]
        tf32 = arithmetic == "tf32"
        dtype = torch.float32 if tf32 else getattr(torch, arithmetic)
        run = functools.partial(attention.benchmark, shape, case, dtype, self.device, names, tf32=tf32)
        return f"{shape} {arithmetic}", functools.partial(self._time, run)

    def memory_bound(self, op: str, shape: str, names: Sequence[str]) -> tuple[str, Callable]:
        case = memory_bound.cases(op)[shape]
        names = memory_bound.contestants(op, self.device, names)
        run = functools.partial(memory_bound.benchmark, op, shape, case, "bfloat16", self.device, names)
        return f"{op} {shape}", functools.partial(self._time, run)

    def _time(self, run: Callable[[], list[dict[str, Any]]]) -> None:
        self.emit.turn()
        for row in run():
            if row["direction"] not in self.directions:
                continue
            percent = row["percent_of_copy"]
            value = (row["median_us"], "us") if percent is None else (percent, "% of copy")
            kept = {
                k: row[k] for k in ("op", "backend", "dtype", "direction", "shape", "copy_us", "error_eps", "noisy")
            }
            kept |= {"us": row["median_us"], "value": value[0], "unit": value[1], "goal": goals.of_time(row)}
            self.emit.line(**kept, build=self.build, result=RESULTS[row["result"]])


def cases(group: str, emit: Emitter, setting: Setting) -> Cases:
    """Yield the cases to time, most of which have goals. If two builds are compared, their processes take turns."""
    timer = _Timer(emit, setting, group)
    if setting.rehearse:
        yield timer.attention(ATTENTION[0], ("cpu",), "float32")
        return
    yield from (timer.attention(shape, BACKENDS) for shape in ATTENTION)
    maps = list(shapes.MAP_GOALS) if setting.whole else list(shapes.MAP_GOALS)[:1]
    yield from (timer.memory_bound(op, shape, BACKENDS) for op in MEMORY for shape in maps)
    if setting.whole:
        yield from (timer.attention(shapes.GOAL, BACKENDS, arithmetic) for arithmetic in ("float16", "tf32", "float32"))


def variants(group: str, emit: Emitter, setting: Setting) -> Cases:
    """Yield the cases of ``group``, a variant or the shipped build. The library of a CUDA variant is already loaded."""
    timer, names = _Timer(emit, setting, group), BACKENDS if group == "shipped" else ("cuda",)
    if group.startswith("triton "):
        from gpu.variants import TRITON, apply
        from swinkernels.triton.window_attention import tuning

        names = ("triton",)
        apply(tuning, TRITON[group.removeprefix("triton ")])
    yield from (timer.attention(shape, names) for shape in (shapes.GOAL, "swin_t.3"))
    if group.startswith("memory ") or group == "shipped":
        yield from (timer.memory_bound(op, "swin_t.1", ("cuda",)) for op in MEMORY)


def peers(group: str, emit: Emitter, setting: Setting) -> Cases:
    """Yield the cases for the goals relative to PyTorch; all implementations are timed in turn in this process."""
    timer = _Timer(emit, setting, "shipped", contest.DIRECTIONS)
    if group == "ops":
        names = attention.contestants(timer.device, ("cuda", *attention.PEERS))
        yield from (timer.attention(shape, names) for shape in ATTENTION)
        return
    names = ("cuda", *memory_bound.PEERS)
    ops = (*goals.PEER_OPS, "patch_merging_gemm")
    yield from (timer.memory_bound(op, shape, names) for shape in shapes.MAP_GOALS for op in ops)
