"""Tests that the examples run as their docstrings describe, some of them on a smaller scale."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def run(tmp_path: Path, *command: str, timeout: float = 120) -> str:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def number(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    assert found is not None, text
    return float(found[1])


def test_train_digits_in_float32(tmp_path):
    """In the full run of 100 steps, the losses of both models differ by at most 1e-4."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    out = run(tmp_path, str(EXAMPLES / "train_digits.py"))
    assert number(r"differ by at most (\S+) in 100 steps", out) <= 1e-4
    assert number(r"Accuracy of the original model: (\S+)", out) > 0.9
    assert (tmp_path / "train_digits.png").stat().st_size > 5000


@pytest.mark.long
def test_train_digits_in_bfloat16(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    out = run(tmp_path, str(EXAMPLES / "train_digits.py"), "--dtype", "bfloat16")
    apart = number(r"Accuracy of the original model: (\S+)", out) - number(
        r"Accuracy of the accelerated model: (\S+)", out
    )
    assert abs(apart) <= 0.03


@pytest.mark.long
def test_train_digits_on_two_processes_is_training_on_one(tmp_path):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    script = str(EXAMPLES / "train_digits.py")
    steps = "--steps", "10", "--batch-size", "32"
    two = run(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *steps)
    one = run(tmp_path, script, *steps)
    assert number(r"differ by at most (\S+) in", two) <= 1e-5
    last = r"last loss of the accelerated model: (\S+)"
    assert number(last, two) == pytest.approx(number(last, one), rel=1e-4)


def test_classify_photo(tmp_path):
    out = run(tmp_path, str(EXAMPLES / "classify_photo.py"))
    assert number(r"by at most (\S+) of the largest", out) < 1e-5
    assert len(re.findall(r"^ +\d+\.\d%  \S", out, re.M)) == 5


def test_segment_coins(tmp_path):
    out = run(tmp_path, str(EXAMPLES / "segment_coins.py"))
    assert number(r"not seen: (\S+)", out) > 0.85
    assert (tmp_path / "segment_coins.png").stat().st_size > 5000


@pytest.mark.long
def test_swin_unetr_volume(tmp_path):
    pytest.importorskip("monai", reason="MONAI is not installed")
    out = run(tmp_path, str(EXAMPLES / "swin_unetr_volume.py"), "--size", "64", "--steps", "1")
    assert number(r"difference (\S+) of", out) < 1e-5
