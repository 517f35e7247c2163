"""Accelerated backbones for mmpretrain's configs, selected by their type::

    custom_imports = dict(imports=["swinkernels.integrations.mmpretrain"])
    model = dict(backbone=dict(type="SwinKernelsSwinTransformer", arch="tiny"))  # or SwinKernelsSwinTransformerV2

Both types are functions that return a model of mmpretrain's own class, because mmpretrain tests for this class when it
loads old checkpoints.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import SwinTransformer, SwinTransformerV2
from mmpretrain.registry import MODELS

from swinkernels.adapters import accelerate


@MODELS.register_module()
def SwinKernelsSwinTransformer(*args: Any, backend: str = "auto", **kwargs: Any) -> SwinTransformer:
    """Create mmpretrain's SwinTransformer from ``args`` and ``kwargs``, and accelerate it.

    Args:
        backend: the ``backend`` argument of :func:`swinkernels.accelerate`.
    """
    model = SwinTransformer(*args, **kwargs)
    accelerate(model, backend=backend)
    return model


@MODELS.register_module()
def SwinKernelsSwinTransformerV2(*args: Any, backend: str = "auto", **kwargs: Any) -> SwinTransformerV2:
    """Create mmpretrain's SwinTransformerV2 from ``args`` and ``kwargs``, and accelerate it."""
    model = SwinTransformerV2(*args, **kwargs)
    accelerate(model, backend=backend)
    return model


def __getattr__(name: str) -> Any:
    """Return the adapter's class ``name``, for pickles from 0.1.0, in which this module defined the adapter."""
    from swinkernels.adapters.libraries import mmpretrain as adapter

    try:
        return getattr(adapter, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
