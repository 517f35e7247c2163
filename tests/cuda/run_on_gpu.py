"""Runs the tests marked gpu in several processes and sums them up: ``python tests/cuda/run_on_gpu.py --out results``.

Most of the time goes into compiling Triton kernels, which uses one core a process, so that one process would take too
long; pytest-xdist may be missing where a GPU is. Writes gpu-test.csv, a row for each test, and ends with a table.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 (after the path that finds the sources this file belongs to)

from benchmarks import record  # noqa: E402

OUTCOMES = ("failure", "error", "skipped")


def read(junit: Path) -> list[dict[str, Any]]:
    """One row per test of a JUnit file: file, name, outcome, seconds, and in one line why it did not pass."""
    rows = []
    for case in ElementTree.parse(junit).iter("testcase"):
        found = next((node for kind in OUTCOMES if (node := case.find(kind)) is not None), None)
        rows.append(
            {
                "file": case.get("classname", ""),
                "test": case.get("name", ""),
                "outcome": "passed" if found is None else found.tag,
                "seconds": float(case.get("time", 0)),
                "message": "" if found is None else (found.get("message") or "").partition("\n")[0],
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


def run(arguments: list[str], processes: int, seconds: float) -> tuple[list[dict[str, Any]], int]:
    """The rows of all tests and the number of processes that did not end well. Prints what those wrote."""
    deadline = time.monotonic() + seconds
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for i in range(processes):
            junit, log = Path(folder, f"{i}.xml"), Path(folder, f"{i}.log")
            command = [sys.executable, "-m", "pytest", "-q", f"--shard={i}/{processes}", f"--junitxml={junit}"]
            with log.open("w") as file:
                process = subprocess.Popen([*command, *arguments], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            started.append((process, junit, log))
        for process, junit, log in started:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)  # pytest then still writes down what it has done
                try:
                    process.wait(20)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            # 5: no test in this shard
            good = process.returncode in (0, 5)
            bad += not good
            text = log.read_text()
            print(text if not good else text.strip().rpartition("\n")[2], flush=True)
            if junit.exists():
                rows += read(junit)
    return rows, bad


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python tests/cuda/run_on_gpu.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for gpu-test.csv")
    parser.add_argument("--processes", type=int, default=max(1, min(6, (os.cpu_count() or 1) // 2)))
    parser.add_argument("--seconds", type=float, default=330, help="interrupt the tests after this time")
    parser.add_argument("pytest", nargs="*", help="further arguments of pytest, after --")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("run_on_gpu: torch sees no CUDA GPU; make test runs what needs none")
    started = time.monotonic()
    rows, bad = run(["-m", "gpu", *options.pytest], options.processes, options.seconds)
    record.write_csv(options.out / "gpu-test.csv", rows, "cuda")
    print(record.table(summarize(rows)))
    print(f"{time.monotonic() - started:.0f} s, {torch.cuda.get_device_name()}, commit {record.commit()}")
    if bad:
        print(f"{bad} of {options.processes} processes did not end well: see their output above")
    sys.exit(1 if bad or not rows else 0)


if __name__ == "__main__":
    main()
