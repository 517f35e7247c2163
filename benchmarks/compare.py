"""Compare times between two runs, and instruction counts with a baseline.

Times are compared between two files from the same machine. Instruction counts depend only on the compiler, so they are
compared with a committed file.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

# The smallest relative change of a median that is reported. Even on a quiet machine, medians vary more between runs
# than times vary within a run.
REPEATS_TO = 0.05
# The fraction by which a kernel's instructions may exceed the baseline.
GROWTH = 0.02


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per measurement that is in both ``before`` and ``after``: the ratio of its medians and a verdict.

    "slower" or "faster" means that the ranges from the 20th to the 80th percentile are disjoint and the medians differ
    by more than 5 %. If a result is no longer correct, the verdict is "WRONG" or "FAILED", regardless of the time.
    """
    old = {tuple(row[key] for key in record.KEYS): row for row in before}
    rows = []
    for row in after:
        labels = tuple(row[key] for key in record.KEYS)
        was = old.get(labels)
        if was is None:
            continue
        ratio = row["median_us"] / was["median_us"] if row["median_us"] and was["median_us"] else None
        if row["result"] != record.RESULT_OK:
            verdict = row["result"] if was["result"] == record.RESULT_OK else "as before"
        elif was["result"] != record.RESULT_OK:
            verdict = "right now"
        elif ratio is None:
            verdict = "not timed"
        elif row["p20_us"] > was["p80_us"] and ratio > 1 + REPEATS_TO:
            verdict = "slower"
        elif row["p80_us"] < was["p20_us"] and ratio < 1 - REPEATS_TO:
            verdict = "faster"
        else:
            verdict = "within noise"
        rows.append(
            {
                **{key: row[key] for key in ("suite", "op", "shape", "dtype", "backend", "direction")},
                "before_us": was["median_us"],
                "after_us": row["median_us"],
                "after / before": ratio,
                "verdict": verdict,
            }
        )
    return rows


def main(before: Path, after: Path) -> int:
    """Print the changes; return 1 if anything is slower or no longer correct, 2 if nothing can be compared."""
    old, new = record.read_csv(before), record.read_csv(after)
    rows = compare(old, new)
    if not rows:
        print(f"{before} and {after} have no measurement in common", file=sys.stderr)
        return 2
    for column in ("device", "torch", "triton", "driver"):
        values = [sorted({row[column] or "" for row in side}) for side in (old, new)]
        if values[0] != values[1]:
            print(f"{column} differs: {', '.join(values[0])}; {', '.join(values[1])}")
    changed = [row for row in rows if row["verdict"] not in ("within noise", "as before", "not timed")]
    print(record.table(changed) if changed else "no change beyond the noise")
    known = {tuple(row[key] for key in record.KEYS) for row in old}
    unknown = sum(tuple(row[key] for key in record.KEYS) not in known for row in new)
    print(f"{len(rows)} measurements compared, {len(changed)} changed; {unknown} of the second file are new")
    return 1 if any(row["verdict"] in ("slower", record.RESULT_WRONG, record.RESULT_FAILED) for row in changed) else 0


class NoBaselineError(Exception):
    """The baseline has no row for any of the counts."""


def read_baseline(path: Path) -> list[dict[str, str]]:
    """Return the rows of a file of counts, or an empty list if the file does not exist."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_baseline(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write ``rows`` to the file; they replace all of its rows for the same compilers."""
    compilers = {row["compiler"] for row in rows}
    kept = [row for row in read_baseline(path) if row["compiler"] not in compilers]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(sorted([*kept, *rows], key=lambda row: row["compiler"]))


def _parts(text: str) -> dict[str, int]:
    return {name: int(number) for name, _, number in (part.rpartition(": ") for part in text.split("; ") if part)}


def grown(
    rows: Sequence[dict[str, Any]],
    baseline: Sequence[dict[str, Any]],
    keys: Sequence[str],
    *,
    count: str = "instructions",
    most: float = GROWTH,
) -> list[str]:
    """Return one line of text for each row whose count exceeds its baseline by more than the fraction ``most``.

    ``count`` is the column to compare. A row is compared with the row of ``baseline`` that has the same values in the
    columns ``keys``. If rows have a column ``of_functions``, the line also names the functions that grew. Raises
    NoBaselineError if no row has a baseline.
    """
    before = {tuple(str(row[key]) for key in keys): row for row in baseline}
    lines, compared = [], 0
    for row in rows:
        was = before.get(tuple(str(row[key]) for key in keys))
        if was is None:
            continue
        compared += 1
        old, new = int(was[count]), int(row[count])
        if new <= old * (1 + most):
            continue
        of, of_old = _parts(row.get("of_functions", "")), _parts(was.get("of_functions", ""))
        larger = [f"{name} {of_old.get(name, 0)} to {n}" for name, n in of.items() if n > of_old.get(name, 0)]
        growth = f"{new / old - 1:.1%}" if old else "from none"
        lines.append(
            f"{row['arch']} {row['kernel']}, {row['case']}: {old} to {new} ({growth})"
            + (f": {', '.join(larger)}" if larger else "")
        )
    if not compared:
        known = ", ".join(sorted({str(row["compiler"]) for row in baseline})) or "none"
        raise NoBaselineError(f"no baseline for {rows[0]['compiler']}, only for: {known}")
    return lines
