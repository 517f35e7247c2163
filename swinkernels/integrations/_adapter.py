"""What an adapter is, and which there are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

# The library's module that defines the class to replace -> the module here with its ADAPTER. An adapter is imported
# only when the library's module has been imported already: no model of a library can exist before.
_ADAPTERS = {"timm.models.swin_transformer": "swinkernels.integrations.timm"}

SUPPORTED = "timm.models.swin_transformer.SwinTransformerBlock"


@dataclass(frozen=True)
class Adapter:
    """How the modules of one class of one library run on a window attention op.

    ``accelerated`` is a subclass of ``original`` without parameters or buffers of its own, so that a module changes
    over by its ``__class__`` alone. It keeps the backend in the instance attribute ``BACKEND_ATTRIBUTE``.
    """

    name: str
    original: type[nn.Module]
    accelerated: type[nn.Module]
    # In what follows, a module is one of the class ``original`` or ``accelerated``.
    # Why a module of exactly this class has to stay as it is, or None. Looks at values, so not for the forward pass.
    reason_to_skip: Callable[[Any], str | None]
    # The arguments of window_attention_qkvpacked in eval mode, without qkv and backend.
    attention_arguments: Callable[[Any], dict[str, Any]]
    # The probability of attention dropout in training.
    dropout_p: Callable[[Any], float]
    # The map that the module was made for, tokens per axis.
    map_size: Callable[[Any], tuple[int, ...]]
    # The QKV weight, (3C, channels of the input); its dtype and device are those of the module.
    qkv_weight: Callable[[Any], Tensor]
    # The replaced part of the module, on (B, *map_size, channels).
    attention: Callable[[Any, Tensor], Tensor]


BACKEND_ATTRIBUTE = "_swinkernels_backend"


def loaded_adapters() -> list[Adapter]:
    """The adapters of the libraries that this process has imported."""
    return [importlib.import_module(ours).ADAPTER for theirs, ours in _ADAPTERS.items() if theirs in sys.modules]
