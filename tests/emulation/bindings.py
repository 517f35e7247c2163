"""The bindings of the CUDA ops over the emulated kernels: an op library whose backend "cuda" takes CPU tensors.

It is loaded in place of swinkernels._ops by a process that sets ``environment()`` and, once swinkernels is imported,
calls ``attach()``. What runs is all of a call but the GPU: argument checks, dispatch, autograd, bindings, kernels.
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
    """Built unless it is in the emulator's cache; the kernels' objects are those of the other emulated libraries."""
    bindings = [path for path in emulation.bindings_folder().glob("*.cpp") if path.name != "module.cpp"]
    kernels = [path for op in KERNELS for path in emulation.kernel_sources(op)]
    return emulation.build("bindings", [Path(__file__).with_suffix(".cpp"), *sorted(bindings), *kernels])


def environment() -> dict[str, str]:
    """For a process that is to load the library."""
    from swinkernels import _extension

    return {**os.environ, _extension.OTHER_LIBRARY: str(library()), "CUDA_VISIBLE_DEVICES": ""}


def attach() -> None:
    """Let backend "cuda" take CPU tensors, and nothing else: the CPU kernels are not in the library."""
    from swinkernels.ops import _backends

    def reasons(backend: str, op: str, device: torch.device) -> list[str]:
        if backend != "cuda":
            return ["the emulated library has CUDA kernels alone"]
        return [] if backend in _backends.IMPLEMENTED[op] else [f"it does not implement {op}"]

    _backends._reasons = reasons
    _backends.unavailable = lambda backend: None if backend in ("cuda", "reference") else "not emulated"
