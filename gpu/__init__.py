"""``make gpu-check`` and ``make gpu-bundle``: all checks that need a GPU, within eight minutes.

``python -m gpu check`` runs the steps of plan.py, each in its own processes (runner.py). It appends a JSON line for
every result (lines.py) and ends with a table (summary.py). A process is ``python -m gpu work`` (work.py), which runs
the cases of smoke.py, bits.py, timing.py, profile.py, sanitize.py, suite.py or models.py. ``--rehearse`` runs the same
code with tiny sizes on a machine without a GPU: the CUDA kernels are emulated, Triton's are interpreted, and the CPU is
timed. ``python -m gpu bundle`` makes a folder with a build and with packages that the machine with the GPU may lack.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "carried"  # in a bundle: Python packages that the machine may lack; installed ones take precedence
if CARRIED.is_dir():
    sys.path.append(str(CARRIED))
