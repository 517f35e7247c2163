"""Loads the compiled op library once, or records why it is missing."""

from __future__ import annotations

import json
import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch

from swinkernels._namespace import NAMESPACE

# The namespace of all ops, whether compiled or defined in Python.
ops = getattr(torch.ops, NAMESPACE)
# The result of the op build_info, or None if the op library is not loaded.
build: dict[str, Any] | None = None
# The reason why the op library is not loaded, or None if it is.
error: str | None = None
# The environment variable that names another op library to load, for example another build for comparison.
OTHER_LIBRARY = "SWINKERNELS_OPS"

_NOT_BUILT = (
    "the compiled extension is not installed: reinstall with a C++ compiler and ninja present "
    "(pip install --no-build-isolation .) and without SWINKERNELS_BUILD=none"
)
_OUTDATED = (
    "the compiled extension is older than the Python code: build it again "
    "(pip install --no-build-isolation ., or make build in a checkout)"
)
# The newest entry of build_info(). An extension without it is older than the Python code and has different ops.
_NEWEST_FACT = "has_cpu_kernels"


def _library(folder: Path) -> Path | None:
    """Return the path of the op library in a folder, or None. It is not a Python module: torch loads it."""
    names = (f"_ops{suffix}" for suffix in (".abi3.so", *EXTENSION_SUFFIXES, ".pyd"))
    return next((folder / name for name in names if (folder / name).exists()), None)


def find_library() -> Path | None:
    """Return the path of the op library to load, from SWINKERNELS_OPS or else from the package, or None."""
    other = os.environ.get(OTHER_LIBRARY)
    return Path(other) if other else _library(Path(__file__).parent)


def _why_missing(folder: Path) -> str:
    """Return the reason why ``folder`` has no op library: none was built, or sources shadow the installed package."""
    elsewhere = (Path(entry).resolve() / folder.name for entry in sys.path)
    installed = next((other for other in elsewhere if other != folder.resolve() and _library(other)), None)
    if installed is None:
        return _NOT_BUILT
    return (
        f"the compiled extension is missing: Python imports the source folder {folder}, which has none and hides the "
        f"installed package {installed}, which has one. Start Python in a directory other than {folder.parent}, or "
        "compile the sources in place (pip install --no-build-isolation -e . there)"
    )


def _load() -> None:
    global build, error
    library = find_library()
    if library is None:
        error = _why_missing(Path(__file__).parent)
        return
    try:
        torch.ops.load_library(str(library))
    except (ImportError, OSError, RuntimeError) as e:
        error = f"the compiled extension does not load under torch {torch.__version__}: {e}. Reinstall swinkernels."
        return
    try:
        build = json.loads(ops.build_info())
    except AttributeError:  # an older library without the op build_info
        build = {}
    if _NEWEST_FACT not in build:
        build, error = None, _OUTDATED


_load()
