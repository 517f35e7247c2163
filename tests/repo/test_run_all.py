"""Tests that ``make test-all`` records each part when it ends, and resumes an interrupted run."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests import run_all

COMMIT = "0123456789ab"
RIGHT, WRONG = {"passed": 3, "failed": 0, "skipped": 1}, {"passed": 1, "failed": 2, "skipped": 1}


@pytest.fixture
def ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that records each part that runs. Part "nn" fails; the first run of "ops" is interrupted."""
    parts: list[str] = []

    def run_tests(folder: str) -> dict[str, int]:
        parts.append(folder)
        if parts.count("ops") == 1 and folder == "ops":
            raise KeyboardInterrupt
        return WRONG if folder == "nn" else RIGHT

    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(run_all, "ROOT", tmp_path)
    monkeypatch.setattr(run_all, "RESULT", tmp_path / "tests" / "last_full_run.json")
    monkeypatch.setattr(run_all, "PARTS", ["cpu", "nn", "ops", "faults-cpu"])
    monkeypatch.setattr(run_all, "run_tests", run_tests)
    monkeypatch.setattr(run_all, "run_faults", lambda area: run_tests(f"faults of {area}"))
    monkeypatch.setattr(run_all.record, "commit", lambda but: {"tests/last_full_run.json": COMMIT}[but])
    return parts


def test_goes_on_where_it_was_interrupted_and_with_what_failed(ran: list[str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_all.main([])
    assert list(json.loads(run_all.RESULT.read_text())) == ["cpu", "nn"]
    assert run_all.main([]) == 1
    assert ran == ["cpu", "nn", "ops", "nn", "ops", "faults of cpu"]
    results = json.loads(run_all.RESULT.read_text())
    assert {part: result["failed"] for part, result in results.items()} == {
        "cpu": 0,
        "nn": 2,
        "ops": 0,
        "faults-cpu": 0,
    }
    assert all(result["commit"] == COMMIT for result in results.values())


@pytest.mark.parametrize("commit", ["ba9876543210", COMMIT + "+", "unknown"])
def test_what_passed_with_other_sources_says_nothing(
    ran: list[str], monkeypatch: pytest.MonkeyPatch, commit: str
) -> None:
    assert run_all.main(["cpu"]) == 0
    monkeypatch.setattr(run_all.record, "commit", lambda but: commit)
    run_all.main(["cpu"])
    assert ("cpu" in run_all.left(commit)) == (commit != "ba9876543210")
    assert run_all.left(COMMIT) == run_all.PARTS


def test_parts_are_known(ran: list[str]) -> None:
    with pytest.raises(SystemExit, match="no part is called cuda; there are cpu, nn, ops, faults-cpu"):
        run_all.main(["cuda"])
    assert ran == []


def test_every_test_is_in_a_part() -> None:
    tests = Path(__file__).parents[1]
    assert {path.parent.parent for path in tests.rglob("test_*.py")} == {tests}
    assert {path.parent.name for path in tests.rglob("test_*.py")} == set(run_all.FOLDERS)


def test_an_error_is_a_failure() -> None:
    report = ET.fromstring(
        "<testsuites><testsuite><testcase/><testcase><skipped/></testcase><testcase><failure/></testcase>"
        "<testcase><error/></testcase></testsuite></testsuites>"
    )
    assert run_all.count(report) == {"passed": 1, "failed": 2, "skipped": 1}
