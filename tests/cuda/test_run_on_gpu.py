"""The summary that `make gpu-test` prints, and its sharing of tests among processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cuda import run_on_gpu

CONFTEST = Path(__file__).parents[1] / "conftest.py"

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="x" time="1.5"/>
<testcase classname="tests.test_a" name="y" time="0.5"><failure message="assert 1 == 2&#10;more"/></testcase>
<testcase classname="tests.test_b" name="z" time="0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_summary(tmp_path: Path) -> None:
    junit = tmp_path / "t.xml"
    junit.write_text(JUNIT)
    rows = run_on_gpu.read(junit)
    assert [(row["outcome"], row["message"]) for row in rows] == [
        ("passed", ""),
        ("failure", "assert 1 == 2"),
        ("skipped", "no GPU"),
    ]
    assert run_on_gpu.summarize(rows)[-1] == {
        "file": "all",
        "passed": 1,
        "failure": 1,
        "error": 0,
        "skipped": 1,
        "seconds": 2.0,
    }


def test_every_test_runs_in_one_of_the_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_some.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(5))\n"
        "def test_number(i): assert i != 3\n"
        "def test_chosen_away(): pass\n"
    )
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    arguments = ["-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-k", "number", str(tmp_path)]
    rows, bad = run_on_gpu.run(arguments, processes=2, seconds=120)
    assert sorted((row["test"], row["outcome"]) for row in rows) == [
        (f"test_number[{i}]", "failure" if i == 3 else "passed") for i in range(5)
    ]
    assert bad == 1
    assert "assert 3 != 3" in capsys.readouterr().out


def test_tests_that_hang_are_interrupted(tmp_path: Path) -> None:
    (tmp_path / "test_hang.py").write_text("import time\ndef test_hang(): time.sleep(300)\n")
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    _, bad = run_on_gpu.run(["--rootdir", str(tmp_path), str(tmp_path)], processes=1, seconds=0)
    assert bad == 1
