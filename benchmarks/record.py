"""Write and read the results of benchmarks: rows with the same columns, the environment, and text tables."""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from benchmarks.commit import commit
from benchmarks.timing import Ceiling, Timing
from swinkernels import info

SEED = 0  # for the first set of inputs and the weights of every model
# Columns that identify a measurement: compare.py matches the rows of two runs by them.
KEYS = ("suite", "op", "shape", "case", "dtype", "backend", "direction")
RESULT_OK, RESULT_WRONG, RESULT_FAILED = "ok", "WRONG", "FAILED"


def row(
    labels: Mapping[str, str],
    result: str,
    error_eps: float | None,
    timing: Timing | None = None,
    *,
    ceiling: Ceiling | None = None,
    moved: int | None = None,
    flops: int | None = None,
    copy: Timing | None = None,
    peak: int | None = None,
    first_call_s: float | None = None,
    host_us: float | None = None,
    gpu_busy_us: float | None = None,
) -> dict[str, Any]:
    """Return one row of a CSV file. The row of a wrong result has a time, but no rates or percentages."""
    t = timing
    counts = t if t is not None and result == RESULT_OK else None
    roofline = ceiling.roofline_us(moved or 0, flops or 0) if ceiling and (moved or flops) else None
    return {
        **{key: labels.get(key, "") for key in KEYS},
        "result": result,
        "error_eps": error_eps,
        "median_us": t.median_us if t else None,
        "p20_us": t.p20_us if t else None,
        "p80_us": t.p80_us if t else None,
        "noisy": t.noisy if t else None,
        "moved_mb": moved / 1e6 if moved else None,
        "gflop": flops / 1e9 if flops else None,
        "gb_per_s": moved / counts.median_us * 1e-3 if moved and counts else None,
        "roofline_us": roofline,
        "percent_of_roofline": 100 * roofline / counts.median_us if roofline and counts else None,
        "copy_us": copy.median_us if copy else None,
        "percent_of_copy": 100 * copy.median_us / counts.median_us if copy and counts else None,
        "peak_mib": peak / 2**20 if peak is not None else None,
        "first_call_s": first_call_s,
        "host_us": host_us,
        "gpu_busy_us": gpu_busy_us,
        "ceiling_gb_per_s": ceiling.bytes_per_us * 1e-3 if ceiling else None,
        "ceiling_gflop_per_s": ceiling.flops_per_us * 1e-3 if ceiling else None,
    }


def _cpu() -> str:
    """Return the CPU's name and family, the number of threads, and a note if denormal numbers are flushed to zero.

    The family, and whether there is AMX, tell apart the generations of a processor whose name does not, such as "AMD
    EPYC" in a virtual machine.
    """
    name = "CPU"
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = re.sub(r"\((R|TM)\)", "", facts["model name"]) + f" (family {facts['cpu family']})"
        name += " with AMX" if "amx_tile" in facts.get("flags", "").split() else ""
    except (OSError, KeyError):
        pass
    threads = torch.get_num_threads()
    flushed = ", denormals flushed" if (torch.tensor(2e-38) * 0.1).item() == 0 else ""
    return f"{name}, {threads} thread{'' if threads == 1 else 's'}{flushed}"


def environment(device: torch.device | str) -> dict[str, str]:
    """Return the device, versions, commit, date and seed, which are the last columns of every CSV row."""
    facts = info.collect()
    versions = facts["versions"]
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "driver": versions["driver"] or "",
        "torch": versions["torch"],
        "cuda": versions["torch_cuda"] or "",
        "triton": versions["triton"] or "",
        "python": versions["python"],
        "swinkernels": versions["swinkernels"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "seed": str(SEED),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], device: torch.device | str) -> None:
    """Write rows that have the same keys to a CSV file; append the columns of :func:`environment` to each row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = environment(device)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *columns] if rows else [*columns])
        writer.writeheader()
        writer.writerows({**{key: _short(value) for key, value in row.items()}, **columns} for row in rows)


def _short(value: Any) -> Any:
    """Round a float to six significant digits, which exceeds the precision of any measurement."""
    return f"{value:.6g}" if isinstance(value, float) else value


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read the rows written by :func:`write_csv`; parse numbers and booleans, and return empty cells as None."""

    def parse(key: str, text: str) -> Any:
        if not text:
            return "" if key in KEYS else None
        if text in ("True", "False"):
            return text == "True"
        is_number = key.endswith(("_us", "_mb", "_mib", "_s", "gflop", "_eps")) or key.startswith("percent_")
        is_number = is_number or key in ("wanted", "reached")
        return float(text) if is_number else text

    with path.open(newline="") as file:
        return [{key: parse(key, text) for key, text in row.items()} for row in csv.DictReader(file)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows that have the same keys as an aligned text table."""
    return tabulate(rows, headers="keys", floatfmt=".2f") if rows else "(nothing)"
