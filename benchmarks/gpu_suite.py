"""One run that answers how fast the kernels are on this GPU: ``python -m benchmarks.gpu_suite`` (``make gpu-bench``).

Checks every backend and times it on a few shapes against what PyTorch has, writes attention.csv, memory_bound.csv and
goals.csv, and ends with the goals of the project, each met or not met. It fails if a result of ours is wrong, not if a
goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, contest, memory_bound, record, shapes
from swinkernels import info

# Percent of a device copy of the same bytes that the CUDA kernels are to reach at shapes.GOAL in bfloat16.
GOALS = {"fwd": 65.0, "bwd": 50.0}
# The same for the memory-bound ops, at every shape of shapes.MAP_GOALS.
MEMORY_GOALS = {
    ("window_partition", "fwd"): 92.0,
    ("window_reverse", "fwd"): 92.0,
    ("patch_merging_norm", "fwd"): 88.0,
    ("patch_merging_norm", "bwd"): 75.0,
    ("residual_layer_norm", "fwd"): 88.0,
    ("residual_layer_norm", "bwd"): 75.0,
    ("residual_post_norm", "fwd"): 88.0,
    ("residual_post_norm", "bwd"): 75.0,
}
# How many times faster than a peer each of those ops, and the whole patch merging, is to be. A peer's backward pass
# is not timed alone, so it counts together with forward.
PEER_GOALS = {"eager": 3.0, "eager-compiled": 1.3}
PEER_OPS = (*dict.fromkeys(op for op, _ in MEMORY_GOALS), "patch_merging")
PEER_DIRECTIONS = ("fwd", "fwd+bwd")
# Of the Linear alone and a copy of the bytes of gather and norm, what a whole patch merging may take forward.
MERGING_GOAL = 1.15
# Ops that autocast gives a float32 stream.
AUTOCAST_OPS = ("patch_merging_norm", "patch_merging", "residual_layer_norm", "residual_post_norm")
UNCOMPILED = ("eager", "sdpa")
QUICK = ("cuda", "triton", "eager")
ATTENTION_SHARE = 0.45  # of the time, the rest being for the memory-bound ops, whose peers compile at every goal


def plan() -> list[tuple[str, str, bool]]:
    """(shape, dtype, whether torch.compile takes part: it needs most of the time, so it does so once)."""
    return [
        (shapes.GOAL, "bfloat16", True),
        *((key, "bfloat16", False) for key in shapes.QUICK if key != shapes.GOAL),
        (shapes.GOAL, "float16", False),
        (shapes.GOAL, "float32", False),
    ]


def memory_plan() -> list[tuple[str, str, str, tuple[str, ...]]]:
    """(op, shape, dtype, contestants), in the order of what a run that ends early should have measured.

    First what the goals are about, then their compiled peers, which take most of the time, then what has no goal.
    """
    goals = [(op, key) for key in shapes.MAP_GOALS for op in (*PEER_OPS, "patch_merging_gemm")]
    compiled = [(op, key) for key in shapes.MAP_GOALS for op in PEER_OPS]
    every = [(op, key) for op in memory_bound.BENCHES for key in memory_bound.cases(op)]
    return [
        *((op, key, "bfloat16", QUICK) for op, key in goals),
        *((op, key, "bfloat16", ("eager-compiled",)) for op, key in compiled),
        *((op, key, "bfloat16", QUICK) for op, key in every if (op, key) not in goals),
        *((op, next(iter(shapes.MAP_GOALS)), "float32-bfloat16", QUICK) for op in AUTOCAST_OPS),
    ]


def _goal(
    goal: str, mine: dict[str, Any] | None, reached: float | None, wanted: float, unit: str, *, at_most: bool = False
) -> dict[str, Any]:
    """The verdict on a goal; a wrong result of ours (``mine``) does not meet any."""
    met = reached is not None and (reached <= wanted if at_most else reached >= wanted)
    if mine is not None and mine["result"] == "WRONG":
        verdict = "not met"
    else:
        verdict = "met" if met else ("not measured" if reached is None else "not met")
    return {"goal": goal, "reached": reached, "wanted": wanted, "unit": unit, "verdict": verdict}


def _find(rows: list[dict[str, Any]], **labels: str) -> dict[str, Any] | None:
    return next((row for row in rows if all(row.get(key) == value for key, value in labels.items())), None)


def _time(row: dict[str, Any] | None) -> float | None:
    return row["median_us"] if row is not None and row["result"] == "ok" else None


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was reached of each goal of window attention."""
    results = []
    for direction, wanted in GOALS.items():
        mine = _find(rows, shape=shapes.GOAL, dtype="bfloat16", backend="cuda", direction=direction)
        goal = f"CUDA {direction} at {shapes.GOAL} ({shapes.ATTENTION[shapes.GOAL]}), bfloat16"
        results.append(_goal(goal, mine, mine and mine["percent_of_copy"], wanted, "% of copy"))
    return results


def memory_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for the memory-bound ops, on CUDA in bfloat16."""
    results = []
    for (op, direction), wanted in MEMORY_GOALS.items():
        for shape in shapes.MAP_GOALS:
            labels = {"op": op, "shape": shape, "dtype": "bfloat16", "direction": direction}
            mine = _find(rows, **labels, backend="cuda")
            goal = f"{op} {direction} at {shape}"
            results.append(_goal(goal, mine, mine and mine["percent_of_copy"], wanted, "% of copy"))
    for op, shape, direction in itertools.product(PEER_OPS, shapes.MAP_GOALS, PEER_DIRECTIONS):
        labels = {"op": op, "shape": shape, "dtype": "bfloat16", "direction": direction}
        mine = _find(rows, **labels, backend="cuda")
        for peer, times in PEER_GOALS.items():
            ours, theirs = _time(mine), _time(_find(rows, **labels, backend=peer))
            ratio = theirs / ours if ours and theirs else None
            goal = f"{op} {direction} at {shape} against {peer}"
            results.append(_goal(goal, mine, ratio, times, "times as fast"))
    for shape in shapes.MAP_GOALS:
        labels = {"shape": shape, "dtype": "bfloat16", "direction": "fwd"}
        mine = _find(rows, **labels, op="patch_merging", backend="cuda")
        gather = _find(rows, **labels, op="patch_merging_norm", backend="cuda")
        whole, linear = _time(mine), _time(_find(rows, **labels, op="patch_merging_gemm", backend="eager"))
        ratio = whole / (linear + gather["copy_us"]) if whole and linear and gather else None
        goal = f"patch_merging fwd at {shape}"
        results.append(_goal(goal, mine, ratio, MERGING_GOAL, "of Linear and copy", at_most=True))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV files")
    parser.add_argument("--seconds", type=float, default=420, help="start no further shape after this time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_suite: torch sees no CUDA GPU; python -m benchmarks.attention runs on a CPU")
    device = torch.device("cuda")
    print(info.describe(info.collect()), flush=True)
    started = time.monotonic()
    left_out = []

    def in_time(seconds: float, what: str) -> bool:
        spent = time.monotonic() - started
        if spent > seconds:
            left_out.append(what)
            return False
        print(f"{spent:4.0f} s  {what}", flush=True)
        return True

    rows: list[dict[str, Any]] = []
    for shape, dtype, compiled in plan():
        if in_time(options.seconds * ATTENTION_SHARE, f"{shape} {dtype}"):
            names = attention.contestants(device, () if compiled else (*attention.OURS, *UNCOMPILED))
            rows += attention.benchmark(shape, shapes.ATTENTION[shape], attention.DTYPES[dtype], device, names)
            record.write_csv(options.out / "attention.csv", rows, device)
    moving: list[dict[str, Any]] = []
    for op, shape, dtype, wanted in memory_plan():
        if in_time(options.seconds, f"{op} {shape} {dtype} {' '.join(wanted)}"):
            names = memory_bound.contestants(op, device, wanted)
            moving += memory_bound.benchmark(op, shape, memory_bound.cases(op)[shape], dtype, device, names)
            record.write_csv(options.out / "memory_bound.csv", moving, device)
    reached = goals(rows) + memory_goals(moving)
    record.write_csv(options.out / "goals.csv", reached, device)
    print(f"\n{contest.show(rows, device)}\n\n{contest.show(moving, device)}\n")
    if left_out:
        print(f"left out for lack of time: {', '.join(left_out)}")
    print(record.table(reached))
    bad = [row for row in (*rows, *moving) if row["result"] != "ok"]
    wrong = sorted({f"{r['backend']} {r.get('op', 'window_attention')} {r['shape']} {r['dtype']}" for r in bad})
    if wrong:
        print(f"wrong results: {', '.join(wrong)}")
    sys.exit(1 if any(w.split()[0] in attention.OURS for w in wrong) else 0)


if __name__ == "__main__":
    main()
