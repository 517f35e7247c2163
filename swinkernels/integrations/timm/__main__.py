"""Run a script that imports only timm, such as timm's train.py, with the accelerated models registered.

python -m swinkernels.integrations.timm validate.py DATA --model swinkernels_swin_tiny_patch4_window7_224
torchrun --nproc-per-node 8 -m swinkernels.integrations.timm train.py ...
"""

from __future__ import annotations

import os
import runpy
import sys

# python -m imports the package first, which registers the models.


def main() -> None:
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    script = sys.argv[1]
    if not os.path.isfile(script):
        sys.exit(f"python -m swinkernels.integrations.timm: there is no script {script!r}")
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))  # as Python does for a script
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":  # not in the processes that a DataLoader spawns
    main()
