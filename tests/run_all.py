"""Runs everything that there is to run, for minutes by the dozen, and writes down what came out: ``make test-all``.

All tests, those marked ``long`` among them, and the faults that they have to find. Before a release, and every night;
the result is committed with the date and the commit that it is of.
"""

from __future__ import annotations

import collections
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import torch

from benchmarks import record

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "last_full_run.json"


def run_tests(arguments: list[str]) -> dict[str, dict[str, int]]:
    """How many tests of each folder passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
        subprocess.run([*command, f"--junitxml={report}", *arguments], cwd=ROOT, env=environment, check=False)
        return count(ET.parse(report).getroot())


def count(report: ET.Element) -> dict[str, dict[str, int]]:
    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for test in report.iter("testcase"):
        outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        outcome = next((outcomes[child.tag] for child in test if child.tag in outcomes), "passed")
        counts[test.get("classname", "").split(".")[1]][outcome] += 1
    return {folder: dict(sorted(counts[folder].items())) for folder in sorted(counts)}


def run_faults() -> dict[str, int]:
    """How many faults there are, and how many of them the tests found."""
    process = subprocess.Popen([sys.executable, "-m", "tests.faults"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        print(line, end="", flush=True)
        found = re.match(r"(\d+) of (\d+) faults found", line) or found
    process.wait()
    return {"found": int(found[1]), "of": int(found[2])} if found else {"found": 0, "of": 0}


def main() -> int:
    began, commit = time.time(), record.commit()
    tests = run_tests(sys.argv[1:])
    faults = run_faults()
    total: collections.Counter[str] = collections.Counter()
    for counts in tests.values():
        total.update(counts)
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processors": os.cpu_count(),
        "minutes": round((time.time() - began) / 60, 1),
        "tests": dict(total),
        "tests of each folder": tests,
        "faults": faults,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{json.dumps(result['tests'])}, faults {json.dumps(faults)}: see {RESULT.relative_to(ROOT)}, and commit it")
    return 1 if total["failed"] or not faults["of"] or faults["found"] < faults["of"] else 0


if __name__ == "__main__":
    sys.exit(main())
