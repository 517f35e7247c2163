"""Generates the table of tools in docs/interop.md from test results.

    python -m pytest tests --tools tests/interop/tools.json    # record the results of the tools' tests
    python -m tests.interop.table                              # write the table from them

The mark ``tool(name, package, how, works=True)`` names the tool that a test covers, the distribution whose version
is shown, and a note for the reader. A row is confirmed if all tests of its tool that ran passed. If all were skipped
because the package is missing, the row of an earlier run is kept. A test of an unsupported tool passes if the tool
raises an error, and records the error's message with ``record_property("words", ...)``.
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE, RESULTS = ROOT / "docs" / "interop.md", ROOT / "tests" / "interop" / "tools.json"
BEGIN, END = "<!-- tools: python -m tests.interop.table -->", "<!-- end of tools -->"
Row = dict[str, Any]


class Recorder:
    """A pytest plugin that records the outcome of every test with the mark ``tool``, also under pytest-xdist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[str, Row] = {}

    @pytest.hookimpl
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        for mark in item.iter_markers("tool"):
            item.user_properties.append(("tool", describe(mark)))

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.skipped or not (report.when == "call" or report.failed):
            return
        words = next((value for name, value in report.user_properties if name == "words"), None)
        for row in [value for name, value in report.user_properties if name == "tool"]:
            known = self._rows.setdefault(row["tool"], {**row, "passed": True, "tests": []})
            known["passed"] &= report.passed
            known["words"] = known.get("words") or words
            known["tests"] = sorted({*known["tests"], report.nodeid.partition("::")[0]})

    @pytest.hookimpl
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if not hasattr(session.config, "workerinput"):  # the process that collects all results
            self._path.write_text(json.dumps({**read(self._path), **self._rows}, indent=2, sort_keys=True) + "\n")


def describe(mark: pytest.Mark) -> Row:
    def tool(name: str, package: str = "torch", how: str = "", works: bool = True) -> Row:
        version = importlib.metadata.version(package).partition("+")[0] if installed(package) else None
        return {"tool": name, "package": package, "version": version, "how": how, "works": works}

    return tool(*mark.args, **mark.kwargs)


def installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def read(path: Path = RESULTS) -> dict[str, Row]:
    return json.loads(path.read_text()) if path.exists() else {}


def verdict(row: Row) -> str:
    if not row["passed"]:
        return "the test failed in the last run"
    if row["works"]:
        return f"works{': ' if row['how'] else ''}{row['how']}"
    said = f', and says "{row["words"]}"' if row.get("words") else ""
    return f"does not work{said}{': ' if row['how'] else ''}{row['how']}"


def table(rows: dict[str, Row]) -> str:
    lines = ["| tool | version | accelerated models | test |", "|---|---|---|---|"]
    for row in sorted(rows.values(), key=lambda row: (not row["works"], row["tool"].strip("`").lower())):
        tests = ", ".join(f"`{test}`" for test in row["tests"])
        lines.append(f"| {row['tool']} | {row['package']} {row['version']} | {verdict(row)} | {tests} |")
    return "\n".join(lines)


def with_table(page: str, rows: dict[str, Row]) -> str:
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert begin and end, f"docs/interop.md lacks the line {BEGIN} or the line {END}"
    return f"{before}{BEGIN}\n\n{table(rows)}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text(), read()))
