"""What became faster or slower between two runs, beyond what their spread explains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import record

# Medians of one quiet machine repeat to a few percent from run to run, also where each run's own spread is smaller.
REPEATS_TO = 0.05


def compare(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per measurement that both have: the ratio of the medians, and a verdict.

    "slower" or "faster" is said where the ranges from the 20th to the 80th percentile do not meet and the medians
    differ by over 5 %; a result that is no longer right is "WRONG" or "FAILED", whatever its time.
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
    """Prints what changed; 1 if anything is slower or no longer right, 2 if the files have nothing in common."""
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
