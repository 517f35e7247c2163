"""Write docs/gpu.md and the README's GPU figures, only from the lines of runs on a GPU (``make gpu-check``).

Each file ``*.jsonl`` in a folder of ``benchmarks/results`` is one run. The page shows each kernel's results from the
newest run that contains the kernel.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks import goals, memory_bound
from swinkernels.ops import _backends

PAGE = "docs/gpu.md"
NOT_YET = "not yet run"
ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
PAIRS = ("float32", "float16", "bfloat16", "float32-bfloat16")
DIRECTIONS = ("fwd", "bwd")
Line = dict[str, Any]
Runs = list[list[Line]]  # oldest first

HEAD = """# On a GPU

Written by `python -m benchmarks report` from the results of `make gpu-check`; an edit here is lost.

A kernel is confirmed if its outputs (forward) or all its gradients (backward) were within the error budget of the tests
in every case of the run, compared with the reference in float64 on the same device. The last column compares its speed
with a device copy of the same bytes, which is timed in the same way: in replays of a CUDA graph over inputs that rotate
through more than the L2 cache.
"""


def read_lines(path: Path) -> list[Line]:
    """Read the lines of a run, and leave out an incomplete last line."""
    return [json.loads(text) for text in path.read_text().splitlines(keepends=True) if text.endswith("\n")]


def read(results: Path) -> Runs:
    """Read the runs in the subfolders of ``results``, except rehearsals; the newest run is last."""
    runs = []
    for path in sorted(results.glob("*/*.jsonl")):
        lines = read_lines(path)
        if lines and not any(line.get("rehearsed") for line in lines):
            runs.append(lines)
    return sorted(runs, key=lambda lines: lines[-1]["date"])


def kernels() -> Iterable[tuple[str, str, str]]:
    """Yield (op, backend, dtype) for every GPU kernel."""
    for op, bench in {"window_attention": None, **memory_bound.BENCHES}.items():
        if bench is not None and not bench.bare_backward:
            continue  # the op contains torch's Linear
        implemented = _backends.IMPLEMENTED[op if bench is None else bench.implemented]
        for backend in (name for name in implemented if name != "cpu"):
            for dtype in ARITHMETICS if bench is None else PAIRS:
                yield op, backend, dtype


def _newest(runs: Runs, **labels: str) -> list[Line]:
    """Return the lines with these labels from the newest run that has at least one, or none."""
    for lines in reversed(runs):
        found = [x for x in lines if all(x.get(k) == v for k, v in labels.items())]
        if found:
            return found
    return []


def _verdict(lines: Sequence[Line]) -> str:
    """Return the verdict on one kernel in one direction, given the lines of its cases."""
    if not lines:
        return NOT_YET
    where = f"{lines[0].get('device', 'unknown')}, commit {lines[0]['commit']}"
    wrong = [line for line in lines if line["result"] != "ok"]
    if not wrong:
        worst = max(line["value"] for line in lines if line["value"] is not None)
        return f"confirmed: {where}, {worst:.2f} eps at most"
    error = "" if wrong[0].get("value") is None else f", {wrong[0]['value']:.3g} eps"
    return f"**{wrong[0]['result']}** at {wrong[0]['case']}{error}: {where}"


def _percent(runs: Runs, op: str, backend: str, dtype: str) -> str:
    """Return the speed as a percentage of a copy's, forward / backward, each at the first shape with a valid time."""
    cells = []
    for direction in DIRECTIONS:
        found = _newest(runs, step="time", op=op, backend=backend, dtype=dtype, direction=direction, build="shipped")
        right = [line for line in found if line["result"] == "ok" and line["unit"] == "% of copy"]
        cells.append(f"{right[0]['value']:.0f} ({right[0]['shape']})" if right else "")
    return " / ".join(cells) if any(cells) else NOT_YET


def _table(rows: Sequence[Line]) -> str:
    return tabulate(rows, headers="keys", tablefmt="pipe", disable_numparse=True) + "\n"


def page_text(runs: Runs) -> str:
    rows = []
    for op, backend, dtype in kernels():
        labels = {"step": "smoke", "op": op, "backend": backend, "dtype": dtype}
        verdicts = {d: _verdict(_newest(runs, **labels, direction=d)) for d in DIRECTIONS}
        of_copy = _percent(runs, op, backend, dtype)
        rows.append({"op": op, "kernels": backend, "dtype": dtype, **verdicts, "% of copy, fwd / bwd": of_copy})
    parts = [HEAD, "## Kernels\n", _table(rows)]
    for title, table in (("Times", _times(runs)), ("Models", _models(runs)), ("Goals", _goals(runs))):
        if table:
            parts += [f"## {title}\n", table]
    return "\n".join(parts)


def _shown(runs: Runs, step: str) -> list[Line]:
    """Return the lines with a valid time of the shipped build, from the newest run of a step."""
    found = _newest(runs, step=step)
    return [x for x in found if "us" in x and x["result"] == "ok" and x.get("build", "shipped") == "shipped"]


def _times(runs: Runs) -> str:
    rows = [
        {
            "op": x["op"],
            "shape": x["shape"],
            "kernels": x["backend"],
            "dtype": x["dtype"],
            "direction": x["direction"],
            "us": f"{x['us']:.1f}",
            "% of copy": f"{x['value']:.0f}",
            "goal": "" if x.get("goal") is None else f"{x['goal']:g}",
        }
        for x in _shown(runs, "time")
        if x["unit"] == "% of copy"
    ]
    return _table(rows) if rows else ""


def _models(runs: Runs) -> str:
    rows = [
        {
            "model": x["shape"],
            "step": f"{x['direction']}, {x['dtype']}",
            "as": x["backend"],
            "ms": f"{x['us'] / 1e3:.3g}",
        }
        for x in _shown(runs, "models")
    ]
    return _table(rows) if rows else ""


def _goals(runs: Runs) -> str:
    """Return the measured goals with their verdicts."""
    rows = [
        {
            "goal": x["goal"],
            "wanted": f"{x['wanted']:g} {x['unit']}",
            "reached": f"{x['reached']:.3g}",
            "verdict": x["verdict"],
        }
        for x in goals.of_lines([line for run in runs for line in run])
        if x["reached"] is not None
    ]
    return _table(rows) if rows else ""


def readme_text(runs: Runs) -> str:
    """Return the README's sentence about the speed of window attention on CUDA in bfloat16, if it was measured."""
    shown = [x for x in _shown(runs, "time") if x["backend"] == "cuda" and x["op"] == "window_attention"]
    shown = [x for x in shown if x["unit"] == "% of copy" and x["dtype"] == "bfloat16"]
    if not shown:
        return "**No kernel has been timed on a GPU yet**; `make gpu-check` does that ([docs/gpu.md](docs/gpu.md)).\n"
    found: dict[str, dict[str, str]] = {}
    for x in shown:
        found.setdefault(x["shape"], {})[x["direction"]] = f"{x['value']:.0f}"
    cells = ", ".join(f"{shape} {' / '.join(by.values())}" for shape, by in found.items())
    where = f"{shown[0]['device']} ({shown[0]['torch']}, commit {shown[0]['commit']})"
    return (
        f"**{where}**: window attention on CUDA in bfloat16, forward / backward in percent of a device copy of the "
        f"same bytes:\n{cells}. [docs/gpu.md](docs/gpu.md) has every kernel.\n"
    )
