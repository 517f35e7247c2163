"""What is done with a GPU at hand for a quarter of an hour: ``make gpu-check``, and the bundle it may start from.

``python -m gpu check`` runs the steps of plan.py, each in processes of its own (runner.py). It appends a JSON line for
every result (lines.py) and ends with a table (summary.py). Such a process is ``python -m gpu work`` (work.py), which
does what smoke.py, bits.py, timing.py, profile.py, sanitize.py, suite.py or models.py has. ``--rehearse`` does the same
on a machine without a GPU, in tiny sizes: the CUDA kernels are emulated, Triton's are interpreted, and what is timed
runs on the CPU. ``python -m gpu bundle`` makes a folder that carries a build, and what a machine may lack, to a GPU.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CARRIED = ROOT / "carried"  # of a bundle: Python packages that the machine may lack; its own come first
if CARRIED.is_dir():
    sys.path.append(str(CARRIED))
