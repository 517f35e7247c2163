"""Accelerated backbones for mmpretrain's configs, by their type alone::

    custom_imports = dict(imports=["swinkernels.integrations.mmpretrain"])
    model = dict(backbone=dict(type="SwinKernelsSwinTransformer", arch="tiny"))  # or SwinKernelsSwinTransformerV2

They are functions: mmpretrain compares a backbone's class with its own to read old checkpoints, so the model keeps
mmpretrain's class.
"""

from __future__ import annotations

from typing import Any

from mmpretrain.models.backbones import SwinTransformer, SwinTransformerV2
from mmpretrain.registry import MODELS

from swinkernels.adapters import accelerate


@MODELS.register_module()
def SwinKernelsSwinTransformer(*args: Any, backend: str = "auto", **kwargs: Any) -> SwinTransformer:
    """mmpretrain's SwinTransformer with its arguments, accelerated.

    Args:
        backend: as of :func:`swinkernels.accelerate`.
    """
    model = SwinTransformer(*args, **kwargs)
    accelerate(model, backend=backend)
    return model


@MODELS.register_module()
def SwinKernelsSwinTransformerV2(*args: Any, backend: str = "auto", **kwargs: Any) -> SwinTransformerV2:
    """As :func:`SwinKernelsSwinTransformer`, for mmpretrain's SwinTransformerV2."""
    model = SwinTransformerV2(*args, **kwargs)
    accelerate(model, backend=backend)
    return model


def __getattr__(name: str) -> Any:
    """The adapter's classes, which lived here in 0.1.0: pickles name them by this module."""
    from swinkernels.adapters.libraries import mmpretrain as adapter

    try:
        return getattr(adapter, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
