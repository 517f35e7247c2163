"""Runs all checks that need a GPU, within eight minutes: ``make gpu-check`` and ``make gpu-bundle``.

``python -m gpu check`` runs the steps of plan.py, each in its own processes (runner.py). It appends a JSON line to a
file for every result (lines.py) and prints a table at the end (summary.py). Each process is ``python -m gpu work``
(work.py), which runs the cases of smoke.py, bits.py, timing.py, profile.py, sanitize.py, suite.py or models.py.
``--rehearse`` runs the same code with tiny sizes on a machine without a GPU: the CUDA kernels are emulated, the Triton
kernels are interpreted, and times are measured on the CPU. ``python -m gpu bundle`` makes a folder with a build and
with packages that may be missing on the machine with the GPU.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "carried"  # only in a bundle: Python packages for use if they are not installed
if CARRIED.is_dir():
    sys.path.append(str(CARRIED))
