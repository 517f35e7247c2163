"""What an adapter is, and which there are."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from swinkernels.adapters.part import Part

# A package or module of the library, imported with any of its models -> its adapters, or the module here with its
# ADAPTERS. That is imported only when the library's has been imported already: no model of a library can exist before.
_ADAPTERS: dict[str, str | tuple[Adapter, ...]] = {
    "monai.networks.nets.swin_unetr": "swinkernels.adapters.libraries.monai",
    "mmpretrain.models.backbones": "swinkernels.adapters.libraries.mmpretrain",
    "timm.models": "swinkernels.adapters.libraries.timm",
    "torchvision.models.swin_transformer": "swinkernels.adapters.libraries.torchvision",
    "transformers.models.clap.modeling_clap": "swinkernels.adapters.libraries.transformers.clap",
    "transformers.models.donut.modeling_donut_swin": "swinkernels.adapters.libraries.transformers.donut",
    "transformers.models.maskformer.modeling_maskformer_swin": "swinkernels.adapters.libraries.transformers.maskformer",
    "transformers.models.swin.modeling_swin": "swinkernels.adapters.libraries.transformers.swin",
    "transformers.models.swin2sr.modeling_swin2sr": "swinkernels.adapters.libraries.transformers.swin2sr",
    "transformers.models.swinv2.modeling_swinv2": "swinkernels.adapters.libraries.transformers.swinv2",
}

SUPPORTED = "Swin Transformer block or patch merging of a known library"


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


@dataclass(frozen=True)
class Adapter:
    """How the modules of one class of one library run on this package's ops.

    ``accelerated`` is a subclass of ``original`` without parameters or buffers of its own, so that a module changes
    over by its ``__class__`` alone. It keeps the backend in the instance attribute ``BACKEND_ATTRIBUTE``.
    """

    name: str
    original: type[nn.Module]
    accelerated: type[nn.Module]
    # In what follows, a module is one of the class ``original`` or ``accelerated``.
    # Why a module of exactly this class has to stay as it is, or None. Looks at values, so not for the forward pass.
    reason_to_skip: Callable[[Any], str | None]
    # What ops can take over. The report names the backend of the first part, and the library if there is none.
    parts: tuple[Part, ...]
    # The input that the module was made for, (*S, C).
    input_shape: Callable[[Any], tuple[int, ...]]
    # A parameter with the dtype and the device of the module.
    weight: Callable[[Any], Tensor]
    # Calls the forward of the module's class, past hooks, on a map (B, *input_shape), with whatever else it takes for
    # that map (a sequence and its size, a mask). The tensor that comes out.
    run: Callable[[Any, Tensor], Tensor] = _forward
    # Whether there may be modules inside that have adapters of their own, such as the blocks of a stage.
    looks_inside: bool = False


BACKEND_ATTRIBUTE = "_swinkernels_backend"


class Accelerated(nn.Module):
    """The first base of every ``accelerated`` class; the ``original`` one is the second."""

    _swinkernels_backend = "auto"

    def _swinkernels_swapped(self) -> None:
        """Note what the module was when its class was swapped."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile a module that swinkernels.accelerate has replaced: call "
            "swinkernels.restore(model) before scripting it, or use torch.jit.trace, torch.export or torch.compile"
        )


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or the one that it had before accelerate."""
    if isinstance(module, Accelerated):
        for cls in type(module).__mro__:
            if _is_accelerated_class(cls):
                return cls.__bases__[1]
    return type(module)


def derived_since(module: nn.Module) -> bool:
    """Whether an accelerated module got another class since, a subclass, as torch's fully_shard gives it one."""
    return isinstance(module, Accelerated) and not _is_accelerated_class(type(module))


def _is_accelerated_class(cls: type) -> bool:
    bases = cls.__bases__
    return len(bases) > 1 and issubclass(bases[0], Accelerated)


def swap_class(adapter: Adapter, module: nn.Module, backend: str) -> None:
    """Let a module run on this package's ops."""
    module.__class__ = adapter.accelerated
    module.__dict__[BACKEND_ATTRIBUTE] = backend
    module._swinkernels_swapped()  # type: ignore[operator]


def restore_class(module: nn.Module) -> None:
    """Undo it. A module that does not run on them is left alone."""
    original = original_class(module)
    if original is not type(module):
        module.__class__ = original
        for name in [n for n in module.__dict__ if n.startswith("_swinkernels_")]:
            del module.__dict__[name]


def loaded_adapters() -> list[Adapter]:
    """The adapters of the libraries that this process has imported."""
    loaded = [ours for theirs, ours in _ADAPTERS.items() if theirs in sys.modules]
    groups = [importlib.import_module(ours).ADAPTERS if isinstance(ours, str) else ours for ours in loaded]
    return [adapter for group in groups for adapter in group]


def register(library: str, *adapters: Adapter) -> None:
    """Have :func:`swinkernels.accelerate` use adapters for a library's modules.

    Args:
        library: the module or package of the library that is imported wherever one of its models exists, such as
            "timm.models". Registering it again replaces what it had.
        adapters: one for each class.

    Raises:
        TypeError: ``library`` is not a string, or one of ``adapters`` is not an :class:`Adapter`.
        ValueError: no adapter is given.
    """
    if not isinstance(library, str):
        raise TypeError(f"register: library must be the name of a module, got {type(library).__name__}")
    if not adapters:
        raise ValueError(f"register: at least one adapter is needed for {library}, got none")
    for adapter in adapters:
        if not isinstance(adapter, Adapter):
            raise TypeError(
                f"register: an adapter must be a swinkernels.adapters.Adapter, got {type(adapter).__name__}"
            )
    _ADAPTERS[library] = adapters
