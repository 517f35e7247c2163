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
from typing import Any, NamedTuple

import torch

from benchmarks import attention, contest, memory_bound, record, shapes
from swinkernels import info


class AttentionGoal(NamedTuple):
    """What the CUDA kernels are to reach at a shape in bfloat16, in both directions."""

    fwd: float
    bwd: float
    # How many times faster than the best of all peers, forward and with backward.
    peers_fwd: float
    peers_both: float
    unit: str = "% of copy"  # of fwd and bwd: percent of a device copy of the same bytes, or microseconds at most


ATTENTION_GOALS = {
    "swin_t.1": AttentionGoal(85, 70, 5, 4),
    "swin_t.2": AttentionGoal(85, 70, 5, 4),
    "swin_t.3": AttentionGoal(80, 65, 4, 4),
    "swin_t.4": AttentionGoal(80, 65, 4, 4),
    "swin_b.1": AttentionGoal(88, 72, 4, 4),
    "swinv2_t.1": AttentionGoal(88, 72, 4, 4),
    "batch1.1": AttentionGoal(6, 12, 3, 3, unit="us"),
    "swin_b384.1": AttentionGoal(75, 60, 3, 3),
    "swinv2_t_w16.1": AttentionGoal(50, 40, 2, 3),
    "swin_unetr.1": AttentionGoal(50, 40, 2, 3),
}
# At shapes.GOAL: float16 against bfloat16 in time, TF32 and Triton in percent of a copy.
FLOAT16_GOAL = 1.03  # "as fast" as far as runs repeat
TF32_GOAL = 70.0
TRITON_GOALS = {"fwd": 60.0, "bwd": 50.0}
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
QUICK = ("cuda", "triton", "eager")
COMPILED = tuple(name for name in attention.PEERS if name.endswith("compiled"))
ATTENTION_SHARE = 0.45  # of the time, the rest being for the memory-bound ops, whose peers compile at every goal


def plan() -> list[tuple[str, str, tuple[str, ...]]]:
    """(shape, arithmetic, contestants), in the order of what a run that ends early should have measured.

    First what takes seconds; peers that compile, which take most of the time, last.
    """
    return [
        *((key, "bfloat16", (*attention.OURS, "eager", "sdpa")) for key in ATTENTION_GOALS),
        *((shapes.GOAL, arithmetic, attention.OURS) for arithmetic in ("float16", "tf32", "float32")),
        *((key, "bfloat16", COMPILED) for key in ATTENTION_GOALS),
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


def _best_peer(rows: list[dict[str, Any]], shape: str, direction: str) -> float | None:
    """The time of the fastest peer that is right, once all of them have had their turn."""
    found = [_find(rows, shape=shape, dtype="bfloat16", backend=p, direction=direction) for p in attention.PEERS]
    times = [t for row in found if (t := _time(row)) is not None]
    return min(times) if times and None not in found else None


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was reached of each goal of window attention."""
    results = []
    for shape, wanted in ATTENTION_GOALS.items():
        what = f"{shape} ({shapes.ATTENTION[shape]})"
        mine = {d: _find(rows, shape=shape, dtype="bfloat16", backend="cuda", direction=d) for d in contest.DIRECTIONS}
        in_time = wanted.unit == "us"
        for direction, limit in (("fwd", wanted.fwd), ("bwd", wanted.bwd)):
            row = mine[direction]
            reached = _time(row) if in_time else row and row["percent_of_copy"]
            results.append(_goal(f"{direction} at {what}", row, reached, limit, wanted.unit, at_most=in_time))
        for direction, times in (("fwd", wanted.peers_fwd), ("fwd+bwd", wanted.peers_both)):
            ours, theirs = _time(mine[direction]), _best_peer(rows, shape, direction)
            ratio = theirs / ours if ours and theirs else None
            results.append(
                _goal(f"{direction} at {what} against the best peer", mine[direction], ratio, times, "times as fast")
            )

    def at_goal(direction: str, dtype: str, backend: str = "cuda") -> dict[str, Any] | None:
        return _find(rows, shape=shapes.GOAL, dtype=dtype, backend=backend, direction=direction)

    for direction, limit in TRITON_GOALS.items():
        row = at_goal(direction, "bfloat16", "triton")
        results.append(
            _goal(f"Triton {direction} at {shapes.GOAL}", row, row and row["percent_of_copy"], limit, "% of copy")
        )
    for direction in ("fwd", "bwd"):
        half, single = at_goal(direction, "float16"), at_goal(direction, "tf32")
        ours, theirs = _time(half), _time(at_goal(direction, "bfloat16"))
        ratio = ours / theirs if ours and theirs else None
        goal = f"float16 {direction} at {shapes.GOAL}"
        results.append(_goal(goal, half, ratio, FLOAT16_GOAL, "of bfloat16's time", at_most=True))
        goal = f"TF32 {direction} at {shapes.GOAL}"
        results.append(_goal(goal, single, single and single["percent_of_copy"], TF32_GOAL, "% of copy"))
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
    for shape, arithmetic, wanted in plan():
        if in_time(options.seconds * ATTENTION_SHARE, f"{shape} {arithmetic} {' '.join(wanted)}"):
            names = attention.contestants(device, wanted)
            is_tf32 = arithmetic == "tf32"
            dtype = torch.float32 if is_tf32 else attention.DTYPES[arithmetic]
            rows += attention.benchmark(shape, shapes.ATTENTION[shape], dtype, device, names, tf32=is_tf32)
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
