"""Times beside a device copy of the same bytes: of the shipped build, of another one, of variants and of peers."""

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

ATTENTION = (
    "swin_t.1", "swin_t.2", "swin_t.3", "swin_t.4", "batch1.1", "swinv2_t.1", "swin_b384.1", "swinv2_t_w16.1",
    "swin_unetr.1", "swin_b.1",
)  # fmt: skip
MEMORY = ("patch_merging_norm", "window_partition", "window_reverse", "residual_layer_norm", "residual_post_norm")
DIRECTIONS = ("fwd", "bwd")
RESULTS = {"ok": OK, "WRONG": WRONG, "FAILED": FAILED}
Cases = Iterable[tuple[str, Callable[[], None]]]


def cases(group: str, emit: Emitter, setting: Setting) -> Cases:
    """Everything that has a goal, in turns with the other library's process, if there is one."""
    device = torch.device(setting.device)
    backends = ("cpu",) if setting.rehearse else ("cuda", "triton")
    maps = list(shapes.MAP_GOALS) if setting.whole else list(shapes.MAP_GOALS)[:1]
    emit_row = functools.partial(tell, emit, build=group)
    if setting.rehearse:
        contest.time_on_cpu = functools.partial(time_on_cpu, seconds=0.02, rounds=3)
    for shape in ATTENTION[:1] if setting.rehearse else ATTENTION:
        case = shapes.ATTENTION[shape]
        case = tiny(case) if setting.rehearse else case
        dtype = torch.float32 if setting.rehearse else torch.bfloat16
        yield shape, _in_turn(emit, emit_row, attention.benchmark, shape, case, dtype, device, backends)
    for op in () if setting.rehearse else MEMORY:
        for shape in maps:
            names = memory_bound.contestants(op, device, backends)
            case = memory_bound.cases(op)[shape]
            call = _in_turn(emit, emit_row, memory_bound.benchmark, op, shape, case, "bfloat16", device, names)
            yield f"{op} {shape}", call
    if setting.whole:
        for arithmetic in ("float16", "tf32", "float32"):
            dtype = torch.float32 if arithmetic == "tf32" else getattr(torch, arithmetic)
            run = functools.partial(attention.benchmark, tf32=arithmetic == "tf32")
            case = shapes.ATTENTION[shapes.GOAL]
            yield (
                f"{shapes.GOAL} {arithmetic}",
                _in_turn(emit, emit_row, run, shapes.GOAL, case, dtype, device, backends),
            )


def variants(group: str, emit: Emitter, setting: Setting) -> Cases:
    """One variant of the kernels at two shapes; those of CUDA are libraries that the process was started with."""
    from gpu.variants import adjust

    device = torch.device(setting.device)
    if group.startswith("triton "):
        adjust(group.removeprefix("triton "))
    for shape in (shapes.GOAL, "swin_t.3"):
        names = ("triton",) if group.startswith("triton ") else ("cuda", "triton") if group == "shipped" else ("cuda",)
        emit_row = functools.partial(tell, emit, build=group)
        case = shapes.ATTENTION[shape]
        yield shape, _in_turn(emit, emit_row, attention.benchmark, shape, case, torch.bfloat16, device, names)
    if group.startswith("memory ") or group == "shipped":
        for op in MEMORY:
            case = shapes.MAP_GOALS["swin_t.1"]
            call = _in_turn(emit, emit_row, memory_bound.benchmark, op, "swin_t.1", case, "bfloat16", device, ("cuda",))
            yield op, call


def peers(group: str, emit: Emitter, setting: Setting) -> Cases:
    """What PyTorch has for the same, in turns with ours in one process: what the goals against peers are read from."""
    device = torch.device(setting.device)
    emit_row = functools.partial(tell, emit, build="shipped", directions=contest.DIRECTIONS)
    if group == "ops":
        for shape in goals.ATTENTION_GOALS:
            case, names = shapes.ATTENTION[shape], attention.contestants(device, ("cuda", *attention.PEERS))
            yield shape, _in_turn(emit, emit_row, attention.benchmark, shape, case, torch.bfloat16, device, names)
        return
    for shape in shapes.MAP_GOALS:
        for op in (*goals.PEER_OPS, "patch_merging_gemm"):
            names = memory_bound.contestants(op, device, ("cuda", *memory_bound.PEERS))
            case = memory_bound.cases(op)[shape]
            call = _in_turn(emit, emit_row, memory_bound.benchmark, op, shape, case, "bfloat16", device, names)
            yield f"{op} {shape}", call


def _in_turn(
    emit: Emitter, emit_row: Callable[..., None], run: Callable[..., list[dict[str, Any]]], *arguments: Any
) -> Callable[[], None]:
    def case() -> None:
        emit.turn()
        for row in run(*arguments):
            emit_row(row)

    return case


def tell(emit: Emitter, row: dict[str, Any], build: str, directions: Sequence[str] = DIRECTIONS) -> None:
    """A row of the benchmarks as a line: percent of a copy, or the time where there is no copy."""
    if row["direction"] not in directions:
        return
    labels = {k: row[k] for k in ("op", "backend", "dtype", "direction", "shape")}
    percent = row["percent_of_copy"]
    value = {"value": row["median_us"], "unit": "us"} if percent is None else {"value": percent, "unit": "% of copy"}
    times = {"us": row["median_us"], "copy_us": row["copy_us"], "error_eps": row["error_eps"], "noisy": row["noisy"]}
    emit.line(**labels, build=build, **value, **times, result=RESULTS[row["result"]], goal=goals.of_time(row))
