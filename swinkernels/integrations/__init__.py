"""Integrations with the model registries of timm and mmpretrain, and the interface of Microsoft's window_process.

The adapters moved to ``swinkernels.adapters`` in 0.2.0. Their old module paths remain importable until 0.3.0, so that
models pickled with 0.1.0 load.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from swinkernels.adapters import Replaced, Report, Skipped, VerificationError, accelerate, restore

__all__ = ["Replaced", "Report", "Skipped", "VerificationError", "accelerate", "restore"]

_MOVED = {
    "_accelerate": "engine",
    "_adapter": "adapter",
    "_foreign": "copies.dynamic_class",
    "_report": "report",
    "_verify": "verify",
    "monai": "libraries.monai",
    "structural": "copies.block",
    "structural_attention": "copies.attention",
    **{f"timm.{name}": f"libraries.timm.{name}" for name in ("maxvit", "swin", "swin_v2", "swin_v2_cr", "vit")},
    "torchvision": "libraries.torchvision",
    "transformers": "libraries.transformers",
    **{
        f"transformers.{name}": f"libraries.transformers.{name}"
        for name in ("clap", "donut", "maskformer", "swin", "swin2sr", "swinv2")
    },
}


class _MovedModules(MetaPathFinder, Loader):
    """Imports a module listed in ``_MOVED`` under its old name. The old and new names give the same module object."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(__name__) and fullname.removeprefix(f"{__name__}.") in _MOVED:
            return ModuleSpec(fullname, self, is_package=True)
        return None

    def exec_module(self, module: ModuleType) -> None:
        old = module.__name__
        new = f"swinkernels.adapters.{_MOVED[old.removeprefix(f'{__name__}.')]}"
        warnings.warn(f"{old} is now {new}; swinkernels 0.3.0 removes the old name", FutureWarning, stacklevel=2)
        sys.modules[old] = importlib.import_module(new)


if not any(type(finder).__name__ == _MovedModules.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _MovedModules())  # before the path-based finder, which would import a second copy
