"""Defines and builds variants of the kernels, to be timed against the shipped build: ``make gpu-variants``.

Variants change defaults that can only be chosen by measurement. In the CUDA kernels for attention and the memory-bound
ops, these are SWINKERNELS_* macros, such as the number of copies in flight or of warps per multiprocessor; in the
Triton kernels, they are programs, warps and stages (swinkernels/triton/window_attention/tuning.py). A CUDA variant is
an op library with bfloat16 attention only; building it needs no GPU. The step "variants" times all variants that it
finds, in turn.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from gpu import ROOT
from gpu.plan import VARIANTS

PREFIX = "SWINKERNELS_"
# Maps the name of each variant to its macros, without the prefix.
CUDA: dict[str, dict[str, int]] = {
    "attention one stage": {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1},
    "attention fewer warps": {"FORWARD_WARPS": 12, "BACKWARD_WARPS": 8},
    "attention more warps": {"FORWARD_WARPS": 20, "BACKWARD_WARPS": 16},
    "attention one stage, more warps": {
        "FORWARD_STAGES": 1, "BACKWARD_STAGES": 1, "FORWARD_WARPS": 20, "BACKWARD_WARPS": 16,
    },
    "memory two vectors a thread; four blocks backward": {"COPY_VECTORS": 2, "NORM_BACKWARD_BLOCKS": 4},
    "memory eight vectors a thread; two blocks backward": {"COPY_VECTORS": 8, "NORM_BACKWARD_BLOCKS": 2},
    "memory blocks of 128 for copies; no prefetch": {
        "COPY_THREADS": 128, "NORM_FORWARD_PREFETCH": 0, "NORM_BACKWARD_PREFETCH": 0,
    },
}  # fmt: skip
# Maps the name of each variant to attributes of the module ``tuning``, or to fields of a kernel's Tiles.
TRITON: dict[str, dict[str, Any]] = {
    "one stage forward": {"fwd_whole": {"num_stages": 1}},
    "three stages forward, two backward": {"fwd_whole": {"num_stages": 3}, "bwd_whole": {"num_stages": 2}},
    "eight warps": {"fwd_whole": {"num_warps": 8}, "bwd_whole": {"num_warps": 8}},
    "a window a program forward": {"MAX_FORWARD_WINDOWS": 1},
    "longer programs": {"FORWARD_PROGRAMS": 1024, "MAX_FORWARD_WINDOWS": 32, "BACKWARD_PROGRAMS": 512},
    "shorter programs": {"FORWARD_PROGRAMS": 4096, "BACKWARD_PROGRAMS": 2048},
}


def build() -> int:
    """Build every CUDA variant for this GPU, or for TORCH_CUDA_ARCH_LIST; return the number of failures."""
    failed = []
    for name, macros in CUDA.items():
        print(name, flush=True)
        flags = [f"-D{PREFIX}{macro}={value}" for macro, value in macros.items()]
        flags = " ".join([os.environ.get("NVCC_APPEND_FLAGS", ""), *flags]).strip()
        base = VARIANTS / name
        command = [sys.executable, "setup.py", "-q", "build", f"--build-base={base}", f"--build-lib={base}"]
        environment = {**os.environ, "SWINKERNELS_BUILD": "hot", "NVCC_APPEND_FLAGS": flags}
        if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
            failed.append(name)  # continue: the other variants can still be timed
    if failed:
        print(f"These variants were not built: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def apply(tuning: Any, changes: dict[str, Any]) -> None:
    """Apply a Triton variant to the module ``tuning``."""
    tiles = tuning.tiles
    of_kernels = {name: change for name, change in changes.items() if isinstance(change, dict)}
    for name in changes.keys() - of_kernels.keys():
        assert hasattr(tuning, name), name
        setattr(tuning, name, changes[name])
    tuning.tiles = lambda kernel, *args: tiles(kernel, *args)._replace(**of_kernels.get(kernel, {}))
