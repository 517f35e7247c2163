"""One run that answers how fast the kernels are on this GPU: ``python -m benchmarks.gpu_suite`` (``make gpu-bench``).

Checks every backend and times it on a few shapes against what PyTorch has, writes attention.csv and goals.csv, and ends
with the goals of the project, each met or not met. It fails if a result of ours is wrong, not if a goal is missed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, record, shapes
from swinkernels import info

# Percent of a device copy of the same bytes that the CUDA kernels are to reach at shapes.GOAL in bfloat16.
GOALS = {"fwd": 65.0, "bwd": 50.0}
UNCOMPILED = ("eager", "sdpa")


def plan() -> list[tuple[str, str, bool]]:
    """(shape, dtype, whether torch.compile takes part: it needs most of the time, so it does so once)."""
    return [
        (shapes.GOAL, "bfloat16", True),
        *((key, "bfloat16", False) for key in shapes.QUICK if key != shapes.GOAL),
        (shapes.GOAL, "float16", False),
        (shapes.GOAL, "float32", False),
    ]


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was reached of each goal; not met where it was not measured or the result is wrong."""
    results = []
    for direction, wanted in GOALS.items():
        row = next(
            (
                row
                for row in rows
                if (row["shape"], row["dtype"], row["backend"], row["direction"])
                == (shapes.GOAL, "bfloat16", "cuda", direction)
            ),
            None,
        )
        reached = None if row is None else row["percent_of_copy"]
        met = row is not None and row["result"] == "ok" and reached is not None and reached >= wanted
        results.append(
            {
                "goal": f"CUDA {direction} at {shapes.GOAL} ({shapes.ATTENTION[shapes.GOAL]}), bfloat16",
                "percent_of_copy": reached,
                "wanted": wanted,
                "verdict": "met" if met else ("not measured" if reached is None else "not met"),
            }
        )
    return results


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_suite", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for the CSV files")
    parser.add_argument("--seconds", type=float, default=330, help="start no further shape after this time")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu_suite: torch sees no CUDA GPU; python -m benchmarks.attention runs on a CPU")
    device = torch.device("cuda")
    print(info.describe(info.collect()), flush=True)
    started = time.monotonic()
    rows: list[dict[str, Any]] = []
    left_out = []
    for shape, dtype, compiled in plan():
        spent = time.monotonic() - started
        if spent > options.seconds:
            left_out.append(f"{shape} {dtype}")
            continue
        print(f"{spent:4.0f} s  {shape} {dtype}", flush=True)
        names = attention.contestants(device, () if compiled else (*attention.OURS, *UNCOMPILED))
        rows += attention.benchmark(shape, shapes.ATTENTION[shape], attention.DTYPES[dtype], device, names)
        record.write_csv(options.out / "attention.csv", rows, device)
    reached = goals(rows)
    record.write_csv(options.out / "goals.csv", reached, device)
    print(f"\n{attention.show(rows, device)}\n")
    if left_out:
        print(f"left out for lack of time: {', '.join(left_out)}")
    print(record.table(reached))
    wrong = sorted({f"{r['backend']} {r['shape']} {r['dtype']}" for r in rows if r["result"] != "ok"})
    wrong_ours = [w for w in wrong if w.split()[0] in attention.OURS]
    if wrong:
        print(f"wrong results: {', '.join(wrong)}")
    sys.exit(1 if wrong_ours else 0)


if __name__ == "__main__":
    main()
