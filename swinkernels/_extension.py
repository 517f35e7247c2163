"""Loads the compiled parts, once, and remembers why one is missing."""

from __future__ import annotations

import importlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

# build: swinkernels._C, the pybind11 module that says what was compiled, or None.
# error: why the op library is not loaded, or None when it is.
build: ModuleType | None = None
error: str | None = None

_NOT_BUILT = (
    "the compiled extension is not installed: reinstall with a C++ compiler and ninja present "
    "(pip install --no-build-isolation .) and without SWINKERNELS_BUILD=none"
)
_OUTDATED = (
    "the compiled extension is older than the Python code beside it: build it again "
    "(pip install --no-build-isolation ., or make build in a checkout)"
)
# Of what build_info() says, the newest: an extension that does not say it has other ops than the Python code calls.
_NEWEST_FACT = "layer_norm_limits"


def _load() -> None:
    global build, error
    folder = Path(__file__).parent
    # The op library has no Python module in it: torch loads it and its ops register themselves.
    library = next((p for s in (".abi3.so", *EXTENSION_SUFFIXES, ".pyd") if (p := folder / f"_ops{s}").exists()), None)
    if library is None:
        error = _NOT_BUILT
        return
    try:
        torch.ops.load_library(str(library))
        build = importlib.import_module("swinkernels._C")
    except (ImportError, OSError, RuntimeError) as e:
        error = f"the compiled extension does not load under torch {torch.__version__}: {e}. Reinstall swinkernels."
        return
    if _NEWEST_FACT not in build.build_info():
        build, error = None, _OUTDATED


_load()
