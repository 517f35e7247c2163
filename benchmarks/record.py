"""What every benchmark writes down: where and when it ran, CSV rows, and tables for people."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from swinkernels import info

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of the sources, with "+" if they were edited since; "unknown" without a git repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An unpacked archive may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def environment(device: torch.device | str) -> dict[str, str]:
    """The columns that every row of every CSV ends with."""
    facts = info.collect()
    versions = facts["versions"]
    on_gpu = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else f"CPU, {torch.get_num_threads()} threads",
        "driver": versions["driver"] or "",
        "torch": versions["torch"],
        "cuda": versions["torch_cuda"] or "",
        "triton": versions["triton"] or "",
        "python": versions["python"],
        "swinkernels": versions["swinkernels"],
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], device: torch.device | str) -> None:
    """Write the rows, which share their keys, each followed by the environment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = environment(device)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *columns] if rows else [*columns])
        writer.writeheader()
        writer.writerows({**row, **columns} for row in rows)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows, which share their keys, as aligned text."""
    return tabulate(rows, headers="keys", floatfmt=".2f") if rows else "(nothing)"
