"""Tests that the AOTInductor example in C++ is exported, compiled and run as its docstring describes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swinkernels import _extension

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "aotinductor_cpp"
pytestmark = [
    pytest.mark.long,
    pytest.mark.tool("AOTInductor, in C++", "torch", "without Python, with the op library loaded by `dlopen`"),
    pytest.mark.skipif(_extension.build is None, reason=str(_extension.error)),
    pytest.mark.skipif(not (shutil.which("g++") and shutil.which("make")), reason="no C++ compiler or no make"),
]


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*map(str, command)], env=environ, capture_output=True, text=True, check=False)


def test_a_program_without_python(tmp_path: Path) -> None:
    library, program = _extension.find_library(), tmp_path / "run"
    for command in (
        (sys.executable, EXAMPLE / "export.py", "--out", tmp_path, "--model", "small"),
        ("make", "-C", EXAMPLE, f"OUT={tmp_path}", f"PYTHON={sys.executable}"),
    ):
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr

    done = run(program, library, tmp_path)
    assert done.returncode == 0, done.stderr
    differences = re.findall(r"^batch (\d): the logits differ by at most (\S+) of (\S+)$", done.stdout, re.MULTILINE)
    assert [int(batch) for batch, *_ in differences] == [1, 2, 3, 4]
    assert all(float(difference) <= 1e-4 * float(largest) for _, difference, largest in differences), differences

    for binary in (program, library):
        assert "python" not in re.sub(r"=> \S+", "", run("ldd", binary).stdout), "neither links Python"

    # Without the package's op library, the error names the missing op or the missing library.
    for wrong, said in (("libm.so.6", "Could not find schema for swinkernels::"), ("none.so", "none.so: cannot open")):
        failed = run(program, wrong, tmp_path)
        assert failed.returncode == 1
        assert said in failed.stderr
