"""An op library that links the bindings with the emulated kernels, so that backend "cuda" accepts CPU tensors.

A process started with ``environment()`` loads this library in place of swinkernels._ops, and has to call ``attach()``
after importing swinkernels. Calls then run argument checks, dispatch, autograd, bindings and kernels as on a GPU.
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
    """Return the path of the library; build it unless it is cached.

    It shares the object files of the kernels with the other emulated libraries.
    """
    bindings = emulation.bindings_folder().glob("*.cpp")
    kernels = [path for op in KERNELS for path in emulation.kernel_sources(op)]
    return emulation.build("bindings", [Path(__file__).with_suffix(".cpp"), *sorted(bindings), *kernels])


def environment() -> dict[str, str]:
    """Return environment variables with which a process loads the library."""
    from swinkernels import _extension

    return {**os.environ, _extension.OTHER_LIBRARY: str(library()), "CUDA_VISIBLE_DEVICES": ""}


def attach() -> None:
    """Let backend "cuda" accept CPU tensors, and make every backend except "cuda" and "reference" unavailable."""
    from swinkernels.ops import _backends

    def reasons(backend: str, op: str, device: torch.device) -> list[str]:
        if backend != "cuda":
            return ["the emulated library has only CUDA kernels"]
        return [] if backend in _backends.IMPLEMENTED[op] else [f"it does not implement {op}"]

    _backends._reasons = reasons
    _backends.unavailable = lambda backend: None if backend in ("cuda", "reference") else "not emulated"
