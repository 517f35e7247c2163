"""One run that answers how fast this package is on this GPU: ``python -m benchmarks.gpu_suite`` (``make gpu-bench``).

Checks every backend and times it on a few shapes against what PyTorch has, and a few models against what their library
has; writes ops.csv, models.csv, latency.csv, goals.csv and a report.md with pictures, and ends with the goals of the
project, each met or not met. It fails if a result of ours is wrong, not if a goal is missed.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import attention, contest, memory_bound, models, record, report, shapes
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


class ModelGoal(NamedTuple):
    """How many times as fast a contestant is to be as the fastest of the others."""

    suite: str
    shape: str
    mode: str
    mine: str
    others: tuple[str, ...]
    wanted: float


COMPILED_MODELS = models.PLAIN[len(models.KINDS) :]
MODEL_GOALS = (
    ModelGoal("models", "swin_t", "inference", "accelerate", ("eager",), 1.8),
    ModelGoal("models", "swin_t", "inference", "accelerate-compiled", COMPILED_MODELS[:-1], 1.7),
    ModelGoal("models", "swin_t", "training", "accelerate-compiled", COMPILED_MODELS[:-1], 1.35),
    ModelGoal("latency", "swin_t", "inference", "accelerate-graphs", models.GRAPHS[:-1], 1.4),
    ModelGoal("models", "swinv2_t_w8", "inference", "accelerate", ("eager",), 2.0),
    ModelGoal("models", "swinv2_t_w8", "training", "accelerate", ("eager",), 1.7),
    ModelGoal("models", "swin_unetr96", "inference", "accelerate", ("eager",), 2.0),
    ModelGoal("models", "swin_unetr96", "training", "accelerate", ("eager",), 1.7),
)
# Of the peak memory of a training step of the compiled original that takes least, at shapes.MODEL_GOAL.
MODEL_MEMORY_GOAL = 0.85
# When each part starts nothing further, as a share of all the time: the peers of the memory-bound ops, and models,
# compile for most of theirs.
SHARES = {"attention": 0.25, "memory": 0.55, "models": 1.0}


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


def model_plan() -> list[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """(suite, model, contestants, modes), in the order of what a run that ends early should have measured."""
    return [
        ("models", "swin_t", models.KINDS, models.MODES),
        ("models", "swinv2_t_w8", models.KINDS, models.MODES),
        ("models", "swin_unetr96", models.KINDS, models.MODES),
        ("models", "swin_t", COMPILED_MODELS, ("inference",)),
        ("latency", "swin_t", models.GRAPHS, ("inference",)),
        ("models", "swin_t", COMPILED_MODELS, ("training",)),
        ("latency", "swin_t", models.KINDS, ("inference",)),
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


def _best(rows: Iterable[dict[str, Any] | None], column: str = "median_us") -> float | None:
    """The smallest value of the rows that are right, once all of them have had their turn."""
    found = list(rows)
    values = [row[column] for row in found if row is not None and row["result"] == "ok" and row[column] is not None]
    return min(values) if values and None not in found else None


def _best_peer(rows: list[dict[str, Any]], shape: str, direction: str) -> float | None:
    return _best(_find(rows, shape=shape, dtype="bfloat16", backend=p, direction=direction) for p in attention.PEERS)


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


def model_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same for models in bfloat16, and that none is slower than its original."""

    def contest_of(
        suite: str, shape: str, mode: str, mine: str, others: Iterable[str], column: str = "median_us"
    ) -> tuple[dict[str, Any] | None, float | None]:
        """The row of mine, and its value over the best of the others: they took turns, so all that exist are there."""
        labels = {"suite": suite, "shape": shape, "dtype": "bfloat16", "direction": mode}
        row = _find(rows, **labels, backend=mine)
        theirs = _best((r for o in others if (r := _find(rows, **labels, backend=o)) is not None), column)
        ours = row[column] if row is not None and row["result"] == "ok" else None
        return row, ours / theirs if ours and theirs else None

    def name(suite: str, shape: str, mode: str, mine: str) -> str:
        return f"{mine} {mode} of {shape}{' at batch 1' if suite == 'latency' else ''}"

    results = []
    for suite, shape, mode, mine, others, wanted in MODEL_GOALS:
        row, ratio = contest_of(suite, shape, mode, mine, others)
        goal = f"{name(suite, shape, mode, mine)} against {' and '.join(others)}"
        results.append(_goal(goal, row, ratio and 1 / ratio, wanted, "times as fast"))
    mine, others = COMPILED_MODELS[-1], COMPILED_MODELS[:-1]
    row, ratio = contest_of("models", shapes.MODEL_GOAL, "training", mine, others, "peak_mib")
    goal = f"peak memory of {name('models', shapes.MODEL_GOAL, 'training', mine)}"
    results.append(_goal(goal, row, ratio, MODEL_MEMORY_GOAL, "of the compiled original's", at_most=True))
    for suite, shape, (*others, mine), modes in model_plan():
        for mode in modes:
            row, ratio = contest_of(suite, shape, mode, mine, others)
            goal = f"{name(suite, shape, mode, mine)} is not slower"
            results.append(_goal(goal, row, ratio and 1 / ratio, 1.0, "times as fast"))
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV files")
    parser.add_argument("--parts", nargs="+", choices=SHARES, default=[*SHARES], help="default: all")
    parser.add_argument("--seconds", type=float, default=1200, help="start nothing further after this time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_suite: torch sees no CUDA GPU; python -m benchmarks all runs on a CPU")
    device = torch.device("cuda")
    print(info.describe(info.collect()), flush=True)
    started = time.monotonic()
    left_out = []

    def in_time(part: str, what: str) -> bool:
        if part not in options.parts:
            return False
        spent = time.monotonic() - started
        is_last = part == [p for p in SHARES if p in options.parts][-1]
        if spent > options.seconds * (1.0 if is_last else SHARES[part]):
            left_out.append(f"{what} for lack of time")
            return False
        print(f"{spent:4.0f} s  {what}", flush=True)
        return True

    ops: list[dict[str, Any]] = []
    for shape, arithmetic, wanted in plan():
        if in_time("attention", f"{shape} {arithmetic} {' '.join(wanted)}"):
            names = attention.contestants(device, wanted)
            is_tf32 = arithmetic == "tf32"
            dtype = torch.float32 if is_tf32 else contest.DTYPES[arithmetic]
            ops += attention.benchmark(shape, shapes.ATTENTION[shape], dtype, device, names, tf32=is_tf32)
            record.write_csv(options.out / "ops.csv", ops, device)
    for op, shape, dtype_name, wanted in memory_plan():
        if in_time("memory", f"{op} {shape} {dtype_name} {' '.join(wanted)}"):
            names = memory_bound.contestants(op, device, wanted)
            ops += memory_bound.benchmark(op, shape, memory_bound.cases(op)[shape], dtype_name, device, names)
            record.write_csv(options.out / "ops.csv", ops, device)
    steps: list[dict[str, Any]] = []
    missing = [name for names in models.not_installed(shapes.MODELS).values() for name in names]
    for suite, shape, wanted, modes in model_plan():
        if shape in missing:
            left_out.append(f"{shape}, whose library is not installed")
        elif in_time("models", f"{suite} {shape} {' '.join(wanted)} {' '.join(modes)}"):
            batch = 1 if suite == "latency" else None
            steps += models.benchmark(suite, shape, torch.bfloat16, device, wanted, batch=batch, modes=modes)
            of_suite = [row for row in steps if row["suite"] == suite]
            record.write_csv(options.out / f"{suite}.csv", of_suite, device)
    of_attention = [row for row in ops if row["op"] == "window_attention"]  # names of shapes are those of maps, too
    reached = goals(of_attention) + memory_goals(ops) + model_goals(steps)
    record.write_csv(options.out / "goals.csv", reached, device)
    report.write_run(options.out)
    print(f"\n{contest.show(ops, device)}\n\n{contest.show(steps, device)}\n")
    if left_out:
        print(f"left out: {', '.join(left_out)}")
    print(record.table(reached))
    bad = [row for row in (*ops, *steps) if row["result"] != "ok"]
    wrong = sorted({f"{r['backend']} {r['op']} {r['shape']} {r['dtype']}" for r in bad})
    if wrong:
        print(f"wrong results: {', '.join(wrong)}")
    ours = (*attention.OURS, *models.OURS)
    sys.exit(1 if any(w.split()[0] in ours for w in wrong) else 0)


if __name__ == "__main__":
    main()
