"""Performance goals for kernels and models on a GPU, and verdicts on them computed from measured rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from benchmarks import attention, contest, models, shapes


class AttentionGoal(NamedTuple):
    """The goals of the CUDA kernels at one shape in bfloat16, forward and backward."""

    fwd: float
    bwd: float
    # Speed as a multiple of the fastest peer's: forward, and forward and backward together.
    peers_fwd: float
    peers_both: float
    unit: str = "% of copy"  # unit of fwd and bwd: % of a device copy's speed (minimum), or us (maximum)


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
GOAL = shapes.GOAL
# Goals at the shape GOAL: the maximum float16 time as a multiple of the bfloat16 time, and the minimum speeds of TF32
# and of Triton as percentages of the speed of a device copy.
FLOAT16_GOAL = 1.03  # the same time, up to the variation between runs
TF32_GOAL = 70.0
TRITON_GOALS = {"fwd": 60.0, "bwd": 50.0}
# The minimum speed of the memory-bound ops at each shape in shapes.MAP_GOALS, as a percentage of the speed of a
# device copy.
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
# The minimum speed of each op in PEER_OPS, as a multiple of each peer's. A peer's backward pass is not timed alone, so
# the forward and backward passes are compared together.
PEER_GOALS = {"eager": 3.0, "eager-compiled": 1.3}
PEER_OPS = (*dict.fromkeys(op for op, _ in MEMORY_GOALS), "patch_merging")
PEER_DIRECTIONS = ("fwd", "fwd+bwd")
# The longest forward time of a whole patch merging, as a multiple of the time of its Linear alone plus the time of a
# copy of the bytes that the gather and the norm move.
MERGING_GOAL = 1.15


class ModelGoal(NamedTuple):
    """The minimum speed of contestant ``mine``, as a multiple of the speed of the fastest of ``others``."""

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
# The maximum peak memory of a training step at shapes.MODEL_GOAL, as a multiple of the best compiled original's peak.
MODEL_MEMORY_GOAL = 0.85
# Comparisons of models: (suite, model, contestants, modes). The last contestant is accelerated and must not be slower
# than any other.
MODEL_CONTESTS = (
    ("models", "swin_t", models.KINDS, models.MODES),
    ("models", "swinv2_t_w8", models.KINDS, models.MODES),
    ("models", "swin_unetr96", models.KINDS, models.MODES),
    ("models", "swin_t", COMPILED_MODELS, models.MODES),
    ("latency", "swin_t", models.GRAPHS, ("inference",)),
    ("latency", "swin_t", models.KINDS, ("inference",)),
)


def of_time(row: Mapping[str, Any]) -> float | None:
    """Return the goal for a row of our kernels: a minimum speed in % of a copy's, a maximum time in us, or None."""
    op, shape, backend, direction = (row[k] for k in ("op", "shape", "backend", "direction"))
    if direction not in ("fwd", "bwd"):
        return None
    if op != "window_attention":
        return MEMORY_GOALS.get((op, direction)) if backend == "cuda" and row["dtype"] == "bfloat16" else None
    if shape == GOAL and backend == "triton" and row["dtype"] == "bfloat16":
        return TRITON_GOALS[direction]
    if shape == GOAL and backend == "cuda" and row["dtype"] == "tf32":
        return TF32_GOAL
    if shape in ATTENTION_GOALS and backend == "cuda" and row["dtype"] == "bfloat16":
        return getattr(ATTENTION_GOALS[shape], direction)
    return None


def of_lines(lines: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on all goals, given lines of GPU runs (gpu/lines.py); later lines replace earlier ones."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for line in lines:
        if line["step"] in ("time", "peers", "models") and line.get("build", "shipped") == "shipped" and "us" in line:
            row = {
                **line,
                "result": {"ok": "ok", "wrong": "WRONG"}.get(line["result"], "FAILED"),
                "median_us": line["us"],
                "percent_of_copy": line["value"] if line["unit"] == "% of copy" else None,
            }
            rows[tuple(line.get(k) for k in ("suite", "op", "shape", "dtype", "backend", "direction"))] = row
    found = list(rows.values())
    of_attention = [row for row in found if row["op"] == "window_attention"]  # other ops use the same shape names
    of_models = [row for row in found if row["step"] == "models"]
    return goals(of_attention) + memory_goals([r for r in found if r["step"] != "models"]) + model_goals(of_models)


def _goal(
    goal: str, mine: dict[str, Any] | None, reached: float | None, wanted: float, unit: str, *, at_most: bool = False
) -> dict[str, Any]:
    """Return the verdict on one goal. The goal is not met if our result (``mine``) is wrong."""
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
    """Return the smallest value of ``column`` in the correct rows, or None if any row is missing or none is correct."""
    found = list(rows)
    values = [row[column] for row in found if row is not None and row["result"] == "ok" and row[column] is not None]
    return min(values) if values and None not in found else None


def _best_peer(rows: list[dict[str, Any]], shape: str, direction: str) -> float | None:
    return _best(_find(rows, shape=shape, dtype="bfloat16", backend=p, direction=direction) for p in attention.PEERS)


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the goals of window attention."""
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
        return _find(rows, shape=GOAL, dtype=dtype, backend=backend, direction=direction)

    for direction, limit in TRITON_GOALS.items():
        row = at_goal(direction, "bfloat16", "triton")
        results.append(_goal(f"Triton {direction} at {GOAL}", row, row and row["percent_of_copy"], limit, "% of copy"))
    for direction in ("fwd", "bwd"):
        half, single = at_goal(direction, "float16"), at_goal(direction, "tf32")
        ours, theirs = _time(half), _time(at_goal(direction, "bfloat16"))
        ratio = ours / theirs if ours and theirs else None
        goal = f"float16 {direction} at {GOAL}"
        results.append(_goal(goal, half, ratio, FLOAT16_GOAL, "of bfloat16's time", at_most=True))
        goal = f"TF32 {direction} at {GOAL}"
        results.append(_goal(goal, single, single and single["percent_of_copy"], TF32_GOAL, "% of copy"))
    return results


def memory_goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the verdicts on the goals of the memory-bound ops, on CUDA in bfloat16."""
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
    """Return the verdicts on the goals of models in bfloat16, among them that none is slower than its original."""

    def contest_of(
        suite: str, shape: str, mode: str, mine: str, others: Iterable[str], column: str = "median_us"
    ) -> tuple[dict[str, Any] | None, float | None]:
        """Return the row of ``mine``, and the ratio of its value to the best value measured for ``others``."""
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
    for suite, shape, (*others, mine), modes in MODEL_CONTESTS:
        for mode in modes:
            row, ratio = contest_of(suite, shape, mode, mine, others)
            goal = f"{name(suite, shape, mode, mine)} is not slower"
            results.append(_goal(goal, row, ratio and 1 / ratio, 1.0, "times as fast"))
    return results
