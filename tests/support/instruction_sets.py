"""Runs code with the CPU kernels of one instruction set, in a new process, because a process chooses its set once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SETS = ["baseline", "emulated_amx", "avx2", "avx512", "avx512_bf16", "amx"]
UNSUPPORTED = 77  # the exit status of code that found that this machine does not support the set

_ASK = f"""
import os, sys
import torch, swinkernels
try:
    used = torch.ops.swinkernels.cpu_instruction_set()
except (RuntimeError, ValueError) as error:
    print(error)
    sys.exit({UNSUPPORTED})
assert used == os.environ["SWINKERNELS_CPU_ISA"]
"""


def run_with(name: str, code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with the instruction set ``name``."""
    environ = {**os.environ, "SWINKERNELS_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)


def check_with(name: str, code: str) -> None:
    """Fail if ``code`` fails with the instruction set ``name``; skip the test if this machine does not support it."""
    done = run_with(name, _ASK + code)
    if done.returncode == UNSUPPORTED:
        assert "SWINKERNELS_CPU_ISA must be an instruction set that this machine supports" in done.stdout
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
