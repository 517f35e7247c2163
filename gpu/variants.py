"""Variants of the kernels, each to be timed beside what is shipped: ``make gpu-variants``.

One run settles the choices that only a measurement can: copies in flight and warps per multiprocessor of the CUDA
attention kernels (the SWINKERNELS_* macros of csrc/kernels/cuda/window_attention/traits.h), tiles, warps and stages of
the Triton ones (swinkernels/triton/window_attention/tuning.py), and the macros of the memory-bound CUDA kernels.
Those of CUDA are libraries, which need no GPU to be built: bfloat16 attention alone, or all but attention's other
dtypes, some 5 MB each. The step "variants" of a run times all that it finds, in turns.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from gpu import ROOT
from gpu.plan import VARIANTS

PREFIX = "SWINKERNELS_"
# Macros, without their prefix; the first variant of each backend is what is shipped.
CUDA: dict[str, dict[str, int]] = {
    "shipped": {},
    "one stage": {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1},
    "fewer warps": {"FORWARD_WARPS": 12, "BACKWARD_WARPS": 8},
    "more warps": {"FORWARD_WARPS": 20, "BACKWARD_WARPS": 16},
    "one stage, more warps": {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1, "FORWARD_WARPS": 20, "BACKWARD_WARPS": 16},
}
MEMORY: dict[str, dict[str, int]] = {
    "shipped": {},
    "two vectors a thread; four blocks backward": {"COPY_VECTORS": 2, "NORM_BACKWARD_BLOCKS": 4},
    "eight vectors a thread; two blocks backward": {"COPY_VECTORS": 8, "NORM_BACKWARD_BLOCKS": 2},
    "blocks of 128 for copies; no prefetch": {
        "COPY_THREADS": 128,
        "NORM_FORWARD_PREFETCH": 0,
        "NORM_BACKWARD_PREFETCH": 0,
    },
}
# Attributes of the module ``tuning``, and of Tiles for its kernels.
TRITON: dict[str, dict[str, Any]] = {
    "shipped": {},
    "one stage forward": {"fwd_whole": {"num_stages": 1}},
    "three stages forward, two backward": {"fwd_whole": {"num_stages": 3}, "bwd_whole": {"num_stages": 2}},
    "eight warps": {"fwd_whole": {"num_warps": 8}, "bwd_whole": {"num_warps": 8}},
    "a window a program forward": {"MAX_FORWARD_WINDOWS": 1},
    "longer programs": {"FORWARD_PROGRAMS": 1024, "MAX_FORWARD_WINDOWS": 32, "BACKWARD_PROGRAMS": 512},
    "shorter programs": {"FORWARD_PROGRAMS": 4096, "BACKWARD_PROGRAMS": 2048},
}


def build() -> int:
    """Build every CUDA variant for the GPU at hand, or for TORCH_CUDA_ARCH_LIST; how many failed."""
    failed = []
    for kind, variants in {"attention": CUDA, "memory": MEMORY}.items():
        for name, macros in variants.items():
            if not macros:
                continue  # what is shipped is there
            folder = VARIANTS / f"{kind} {name}"
            print(f"{kind} {name}", flush=True)
            defines = [f"-D{PREFIX}{macro}={value}" for macro, value in macros.items()]
            flags = " ".join(filter(None, [os.environ.get("NVCC_APPEND_FLAGS"), *defines]))
            command = [sys.executable, "setup.py", "-q", "build", f"--build-base={folder}", f"--build-lib={folder}"]
            environment = {**os.environ, "SWINKERNELS_BUILD": "hot", "NVCC_APPEND_FLAGS": flags}
            if subprocess.run(command, cwd=ROOT, env=environment).returncode != 0:
                failed.append(folder.name)  # the others shall be timed all the same
    if failed:
        print(f"These variants were not built: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def adjust(name: str) -> None:
    """Apply a Triton variant to this process."""
    from swinkernels.triton.window_attention import tuning

    apply(tuning, TRITON[name])


def apply(tuning: Any, changes: dict[str, Any]) -> None:
    tiles: Callable[..., Any] = tuning.tiles
    of_kernels = {name: change for name, change in changes.items() if isinstance(change, dict)}
    for name, value in changes.items():
        if name not in of_kernels:
            assert hasattr(tuning, name), name
            setattr(tuning, name, value)
    tuning.tiles = lambda kernel, *args: tiles(kernel, *args)._replace(**of_kernels.get(kernel, {}))
