"""Tests that the table in docs/interop.md agrees with the recorded results, and that its rows name existing tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop import table
from tests.interop.test_training import TOOLS

ROOT = Path(__file__).resolve().parents[2]
THIS = str(Path(__file__).relative_to(ROOT))
ROW = {"tool": "A", "package": "torch", "version": "1", "how": "", "works": True, "passed": True, "tests": ["t.py"]}


def test_the_page_is_written_from_the_results() -> None:
    page = table.PAGE.read_text()
    assert table.with_table(page, table.read()) == page, "python -m tests.interop.table writes it"


def test_every_tool_has_a_row_and_every_row_its_tests() -> None:
    """The recorded results list the tools and test files of all ``tool`` marks, and no others."""
    mark = re.compile(r"""mark\.tool\(\s*(["'])(.+?)\1""")
    sources = {str(path.relative_to(ROOT)): path.read_text() for path in sorted((ROOT / "tests").rglob("test_*.py"))}
    marked = {(name, path) for path, text in sources.items() for _, name in mark.findall(text) if path != THIS}
    marked |= {(name, "tests/interop/test_training.py") for name, *_ in TOOLS.values()}
    assert marked == {(name, path) for name, row in table.read().items() for path in row["tests"]}


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "works"),
        ({"how": "on the op"}, "works: on the op"),
        ({"works": False, "words": "no"}, 'does not work, and says "no"'),
        ({"works": False, "how": "use B"}, "does not work: use B"),
        ({"passed": False}, "the test failed in the last run"),
    ],
)
def test_verdicts(row: dict, said: str) -> None:
    assert table.table({"A": {**ROW, **row}}).splitlines()[-1] == f"| A | torch 1 | {said} | `t.py` |"


PROBE = """
import pytest
tool = pytest.mark.tool
@tool("B", "pytest", "so")
def test_passes(): pass
@tool("C")
@pytest.mark.parametrize("good", [True, False])
def test_fails(good): assert good
@tool("D")
def test_skipped(): pytest.skip("no D")
@tool("E", "torch", works=False)
def test_refused(record_property): record_property("words", "not E")
"""


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.long)])
def test_the_recorder(tmp_path: Path, workers: str, request: pytest.FixtureRequest) -> None:
    """With and without pytest-xdist, failed tests are recorded, and a row whose tests are all skipped is kept."""
    if workers != "0":
        pytest.importorskip("xdist", reason="pytest-xdist is not installed")
    (tmp_path / "test_probe.py").write_text(PROBE)
    (tmp_path / "conftest.py").write_text(
        "from pathlib import Path\nfrom tests.interop.table import Recorder\n"
        "def pytest_configure(config):\n"
        "    config.addinivalue_line('markers', 'tool: t')\n"
        "    config.pluginmanager.register(Recorder(Path('tools.json').absolute()))\n"
    )
    (tmp_path / "tools.json").write_text(json.dumps({"D": {**ROW, "tool": "D"}}))
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", ".", "-n", workers, "test_probe.py"]
    environ = {"PYTHONPATH": str(ROOT), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
    rows = json.loads((tmp_path / "tools.json").read_text())
    assert {name: row["passed"] for name, row in rows.items()} == {"B": True, "C": False, "D": True, "E": True}, done
    assert rows["E"]["words"] == "not E"
    assert rows["B"]["how"] == "so"
