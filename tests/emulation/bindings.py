"""The bindings of the CUDA ops over the emulated kernels: an op library whose backend "cuda" accepts CPU tensors.

A process that sets ``environment()`` loads it in place of swinkernels._ops, and calls ``attach()`` after importing
swinkernels. Calls then run argument checks, dispatch, autograd, bindings and kernels as on a GPU.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import torch

from tests import emulation

KERNELS = ("window_attention", "layer_norm", "window_partition")


@functools.cache
def library() -> Path:
    """Build the library unless it is cached; it shares the kernels' objects with the other emulated libraries."""
    bindings = [path for path in emulation.bindings_folder().glob("*.cpp") if path.name != "module.cpp"]
    kernels = [path for op in KERNELS for path in emulation.kernel_sources(op)]
    return emulation.build("bindings", [Path(__file__).with_suffix(".cpp"), *sorted(bindings), *kernels])


def environment() -> dict[str, str]:
    """Return the environment of a process that loads the library."""
    from swinkernels import _extension

    return {**os.environ, _extension.OTHER_LIBRARY: str(library()), "CUDA_VISIBLE_DEVICES": ""}


def attach() -> None:
    """Let backend "cuda" accept CPU tensors, and make other kernels unavailable, because the library lacks them."""
    from swinkernels.ops import _backends

    def reasons(backend: str, op: str, device: torch.device) -> list[str]:
        if backend != "cuda":
            return ["the emulated library has only CUDA kernels"]
        return [] if backend in _backends.IMPLEMENTED[op] else [f"it does not implement {op}"]

    _backends._reasons = reasons
    _backends.unavailable = lambda backend: None if backend in ("cuda", "reference") else "not emulated"
