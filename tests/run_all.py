"""Runs all tests and checks all planted faults, part by part, and records the results: ``make test-all``.

    python -m tests.run_all [PART...]

A part is either a folder of tests/ (such as ``cuda``), including its tests marked ``long``, or the faults of one area
(such as ``faults-cuda``). Its counts are written to tests/last_full_run.json when it ends. Without names, all parts
that have not passed at this commit are run, so an interrupted run resumes. A full run takes hours on two cores. Do a
full run before each release, and commit the result.
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
from typing import Any

import torch

from benchmarks import record
from tests.faults import all_faults

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "tests" / "last_full_run.json"
FOLDERS = sorted({path.parent.name for path in ROOT.glob("tests/*/test_*.py")})
AREAS = dict.fromkeys(name.partition("-")[0] for name in all_faults())
PARTS = [*FOLDERS, *(f"faults-{area}" for area in AREAS)]


def run_tests(folder: str) -> dict[str, int]:
    """Run the tests of ``folder``, and return how many passed, failed and were skipped."""
    with tempfile.TemporaryDirectory() as temporary:
        report = Path(temporary) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1"}
        subprocess.run([*command, f"--junitxml={report}", f"tests/{folder}"], cwd=ROOT, env=environment, check=False)
        return count(ET.parse(report).getroot())


def count(report: ET.Element) -> dict[str, int]:
    counts: collections.Counter[str] = collections.Counter({"passed": 0, "failed": 0, "skipped": 0})
    for test in report.iter("testcase"):
        outcomes = {"failure": "failed", "error": "failed", "skipped": "skipped"}
        counts[next((outcomes[child.tag] for child in test if child.tag in outcomes), "passed")] += 1
    return dict(counts)


def run_faults(area: str) -> dict[str, int]:
    """Check the planted faults of ``area``, and return how many the tests detect (passed) and miss (failed)."""
    command = [sys.executable, "-m", "tests.faults", f"{area}-"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = None
    for line in process.stdout:
        print(line, end="", flush=True)
        found = re.match(r"(\d+) of (\d+) faults found", line) or found
    process.wait()
    return {"passed": int(found[1]), "failed": int(found[2]) - int(found[1])} if found else {"passed": 0, "failed": 1}


def recorded() -> dict[str, dict[str, Any]]:
    """Return the recorded results of all parts that still exist."""
    results = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    return {part: results[part] for part in PARTS if part in results}


def left(commit: str) -> list[str]:
    """Return the parts that have not passed at ``commit``, or all parts if ``commit`` is not a clean commit's hash."""
    results = recorded() if re.fullmatch("[0-9a-f]{12}", commit) else {}
    return [p for p in PARTS if p not in results or results[p]["commit"] != commit or results[p]["failed"]]


def run(part: str, commit: str) -> dict[str, Any]:
    began = time.time()
    of_faults, _, area = part.partition("-")
    counts = run_faults(area) if of_faults == "faults" else run_tests(part)
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "processors": os.cpu_count(),
        "minutes": round((time.time() - began) / 60, 1),
        **counts,
    }


def main(names: list[str]) -> int:
    if unknown := set(names) - set(PARTS):
        sys.exit(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    commit = record.commit(but=str(RESULT.relative_to(ROOT)))
    failed = 0
    for part in names or left(commit):
        print(f"\n{part}\n", flush=True)
        results = {**recorded(), part: run(part, commit)}
        RESULT.write_text(json.dumps({part: results[part] for part in PARTS if part in results}, indent=2) + "\n")
        failed += results[part]["failed"]
    print(f"{failed} failed; left at {commit}: {', '.join(left(commit)) or 'nothing'}. See {RESULT}, and commit it.")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
