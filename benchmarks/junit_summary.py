"""Turns pytest's JUnit file into a CSV and a short table: ``python -m benchmarks.junit_summary tests.xml tests.csv``."""

from __future__ import annotations

import argparse
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import torch

from benchmarks import record

OUTCOMES = ("failure", "error", "skipped")


def read(path: Path) -> list[dict[str, Any]]:
    """One row per test: file, name, outcome, seconds and the first line of why it did not pass."""
    rows = []
    for case in ElementTree.parse(path).iter("testcase"):
        found = next((case.find(kind) for kind in OUTCOMES if case.find(kind) is not None), None)
        message = "" if found is None else (found.get("message") or "").split("\n")[0]
        rows.append(
            {
                "file": case.get("classname", ""),
                "test": case.get("name", ""),
                "outcome": "passed" if found is None else found.tag,
                "seconds": float(case.get("time", 0)),
                "message": message,
            }
        )
    return rows


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per file, and their sum."""
    files = sorted({row["file"] for row in rows})
    groups = [(file, [row for row in rows if row["file"] == file]) for file in files]
    return [
        {
            "file": file,
            **{kind: sum(row["outcome"] == kind for row in group) for kind in ("passed", *OUTCOMES)},
            "seconds": sum(row["seconds"] for row in group),
        }
        for file, group in [*groups, ("all", rows)]
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.junit_summary", description=__doc__.split("\n")[0])
    parser.add_argument("junit", type=Path)
    parser.add_argument("csv", type=Path)
    options = parser.parse_args(arguments)
    rows = read(options.junit)
    record.write_csv(options.csv, rows, "cuda" if torch.cuda.is_available() else "cpu")
    print(record.table(summarize(rows)))


if __name__ == "__main__":
    main()
