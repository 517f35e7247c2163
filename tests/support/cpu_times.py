"""Measures the CPU time of each test, including child processes: a pytest plugin, and a summary of its output.

    make test PYTEST_ARGS="-p tests.support.cpu_times --cpu-times times.txt"
    python -m tests.support.cpu_times times.txt

CPU time is nearly independent of the machine's load. It is read from /proc, so the plugin works only on Linux.
"""

from __future__ import annotations

import collections
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


def seconds_of_all_processes() -> float:
    """Return the CPU seconds of this process, its running descendants, and the ended children that they waited for."""
    own: dict[int, float] = {}
    children: dict[int, list[int]] = collections.defaultdict(list)
    for folder in Path("/proc").iterdir():
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split() if folder.name.isdigit() else []
        except OSError:  # the process has ended in the meantime
            continue
        if fields:
            own[int(folder.name)] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
            children[int(fields[1])].append(int(folder.name))
    total, waiting = 0.0, [os.getpid()]
    while waiting:
        process = waiting.pop()
        total += own.get(process, 0.0)
        waiting += children[process]
    return total


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-times", type=Path, metavar="FILE", help="write seconds and name of each test to FILE")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    before = seconds_of_all_processes()
    result = yield
    if (file := item.config.option.cpu_times) is not None:
        with file.open("a") as lines:
            lines.write(f"{seconds_of_all_processes() - before:.2f} {item.nodeid}\n")
    return result


def main(file: Path) -> None:
    """Print the total CPU time in ``file``, and the 40 slowest tests."""
    times = [(float(seconds), test) for seconds, _, test in (x.partition(" ") for x in file.read_text().splitlines())]
    print(f"{len(times)} tests, {sum(seconds for seconds, _ in times) / 60:.1f} CPU minutes\n")
    print("| CPU s | test |\n|---|---|")
    for seconds, test in sorted(times, reverse=True)[:40]:
        print(f"| {seconds:.1f} | `{test.removeprefix('tests/')}` |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
