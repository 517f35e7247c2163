"""The Adapter class, the base of accelerated classes, and the registry of adapters."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.bypass import (
    is_bound_method,
    is_distributed,
    is_patched,
    is_traced,
    watch_unless_watched,
)
from swinkernels.adapters.checks import Checks, begin
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.part import Part
from swinkernels.ops._backends import why_no_kernels

# Name of a module that is imported with every model of a library -> the library's adapters and forms, or the name of
# the module of this package whose ADAPTERS lists them. That module is imported only after the library's.
_ADAPTERS: dict[str, str | tuple[Adapter | Form, ...]] = {
    "monai.networks.nets.swin_unetr": "swinkernels.adapters.libraries.monai",
    "mmpretrain.models.backbones": "swinkernels.adapters.libraries.mmpretrain",
    "timm.models": "swinkernels.adapters.libraries.timm",
    "torchvision.models.swin_transformer": "swinkernels.adapters.libraries.torchvision",
    "torchvision.models.video.swin_transformer": "swinkernels.adapters.libraries.torchvision_windows",
    "transformers.models.clap.modeling_clap": "swinkernels.adapters.libraries.transformers.clap",
    "transformers.models.donut.modeling_donut_swin": "swinkernels.adapters.libraries.transformers.donut",
    "transformers.models.florence2.modeling_florence2": "swinkernels.adapters.libraries.transformers.florence2",
    "transformers.models.got_ocr2.modeling_got_ocr2": "swinkernels.adapters.libraries.transformers.got_ocr2",
    "transformers.models.hiera.modeling_hiera": "swinkernels.adapters.libraries.transformers.hiera",
    "transformers.models.maskformer.modeling_maskformer_swin": "swinkernels.adapters.libraries.transformers.maskformer",
    "transformers.models.sam.modeling_sam": "swinkernels.adapters.libraries.transformers.sam",
    "transformers.models.sam_hq.modeling_sam_hq": "swinkernels.adapters.libraries.transformers.sam_hq",
    "transformers.models.sam2.modeling_sam2": "swinkernels.adapters.libraries.transformers.sam2",
    "transformers.models.swin.modeling_swin": "swinkernels.adapters.libraries.transformers.swin",
    "transformers.models.swin2sr.modeling_swin2sr": "swinkernels.adapters.libraries.transformers.swin2sr",
    "transformers.models.swinv2.modeling_swinv2": "swinkernels.adapters.libraries.transformers.swinv2",
    "transformers.models.vitdet.modeling_vitdet": "swinkernels.adapters.libraries.transformers.vitdet",
}

SUPPORTED = "Swin Transformer block or patch merging of a known library"


def _never_recomputes(module: Any) -> str | None:
    return "recompute is not implemented for this class"


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    return type(module).forward(module, x)


@dataclass(frozen=True)
class Adapter:
    """Describes how the modules of one class of a library use this package's ops.

    ``accelerated`` is a subclass of ``original`` that adds no parameters or buffers, so only the module's ``__class__``
    changes. The module stores the backend in the attribute that ``BACKEND_ATTRIBUTE`` names.
    """

    name: str
    original: type[nn.Module]
    accelerated: type[nn.Module]
    # The functions below accept a module of the class ``original`` or ``accelerated``.
    # Returns the reason to leave a module of exactly this class as it is, or None. This function may read the values of
    # tensors, so forward passes do not call it.
    reason_to_skip: Callable[[Any], str | None]
    # The parts of the module that ops can compute. The report names the first part's backend, or the library if there
    # are no parts.
    parts: tuple[Part, ...]
    # Returns the size of the maps that the module was made for: (*S, C), the tokens per axis S and the channels C.
    input_shape: Callable[[Any], tuple[int, ...]]
    # Returns a parameter with the module's dtype and device.
    weight: Callable[[Any], Tensor]
    # Calls the forward of the module's class, without hooks, on a map (B, *input_shape), with the layout and the
    # further arguments that this forward requires (a sequence and its size, a mask), and returns the resulting tensor.
    run: Callable[[Any, Tensor], Tensor] = _forward
    # Returns the reason why accelerate(recompute=True) has no effect on training steps of this module, or None.
    why_not_recompute: Callable[[Any], str | None] = _never_recomputes
    # Returns False for modules of the class that ``accelerate`` does not even report, because the adapter is meant for
    # other uses of the class.
    concerns: Callable[[Any], bool] = lambda module: True
    # True if ``accelerate`` also looks for adapters for the module's submodules, such as a stage's blocks.
    looks_inside: bool = False


BACKEND_ATTRIBUTE = "_swinkernels_backend"


class Accelerated(nn.Module):
    """First base class of every ``accelerated`` class; the second base is the ``original`` class."""

    _swinkernels_backend = "auto"
    # True if a block recomputes norms and GELU in the backward pass, so that it saves fewer tensors.
    _swinkernels_recomputes = False
    # The original class; accelerated classes set this.
    _swinkernels_original: Any = None
    # The stored tensors at the time when the class was swapped or the module was last moved. Compiled code guards on
    # their identity.
    _swinkernels_seen: tuple[Tensor | None, ...] = ()
    # True if the checks of a call may keep their results, see adapters/checks.py.
    _swinkernels_keeps_results = True

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        first, *others = cls.__bases__
        if others and issubclass(first, Accelerated) and first._swinkernels_original is None:
            cls._swinkernels_original = others[0]
            watch_unless_watched(cls._swinkernels_original)

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        """Return the tensors, such as masks, that this module and its submodules store but that ops do not read."""
        return ()

    def _swinkernels_look(self) -> None:
        """Compare the stored tensors with those that ops compute, and cache the result for compiled code."""

    def _swinkernels_remember(self) -> None:
        self.__dict__["_swinkernels_seen"] = self._swinkernels_stored()

    def _swinkernels_own_code(self, x: Any) -> bool:
        """Return True if a forward pass must run the library's code.

        This holds while the code is traced, after the code was replaced, for an input sharded over devices and, if
        the backend is "auto", on devices without a kernel. If it does not hold, the call begins with the checks whose
        results :func:`~swinkernels.adapters.checks.settled` keeps. In compiled code this call also makes dynamo guard
        on the identity of the stored tensors.
        """
        if torch.compiler.is_dynamo_compiling():
            for tensor, seen in zip(self._swinkernels_stored(), self._swinkernels_seen, strict=False):
                _ = tensor is seen
        if is_traced(x) or is_patched(self._swinkernels_original) or is_distributed(x):
            return True
        if self._swinkernels_backend == "auto" and why_no_kernels(x.device) is not None:
            return True
        if self._swinkernels_keeps_results and not torch.compiler.is_compiling():
            begin(self)
        return False

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Apply ``fn`` to all tensors, for example to move them, and check the stored tensors again."""
        applied = super()._apply(fn, recurse)
        self._swinkernels_remember()
        self._swinkernels_look()
        return applied

    def _swinkernels_swapped(self) -> None:
        """Record the module's state after its class was swapped; subclasses override this method."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile a module that swinkernels.accelerate has replaced: call "
            "swinkernels.restore(model) before scripting it, or use torch.jit.trace, torch.export or torch.compile"
        )


def original_class(module: nn.Module) -> type[nn.Module]:
    """Return a module's class; for an accelerated module, its class before ``accelerate``."""
    return module._swinkernels_original if isinstance(module, Accelerated) else type(module)


def derived_since(module: nn.Module) -> bool:
    """Return True if other code changed an accelerated module's class to a subclass, as torch's fully_shard does."""
    return isinstance(module, Accelerated) and not _is_accelerated_class(type(module))


def _is_accelerated_class(cls: type) -> bool:
    return "_swinkernels_original" in vars(cls)


def swap_class(adapter: Adapter, module: nn.Module, backend: str, recompute: bool = False) -> None:
    """Change the class of ``module`` to ``adapter.accelerated``, which uses this package's ops."""
    _change_class(module, adapter.accelerated)
    module.__dict__[BACKEND_ATTRIBUTE] = backend
    module.__dict__["_swinkernels_recomputes"] = recompute
    module.__dict__[Checks.ATTRIBUTE] = Checks()
    module._swinkernels_swapped()  # type: ignore[operator]
    module._swinkernels_remember()  # type: ignore[operator]
    module._swinkernels_look()  # type: ignore[operator]


def restore_class(module: nn.Module) -> None:
    """Undo :func:`swap_class`. A module that is not accelerated stays as it is."""
    original = original_class(module)
    if original is not type(module):
        _change_class(module, original)
        for name in [n for n in module.__dict__ if n.startswith("_swinkernels_")]:
            del module.__dict__[name]


def _change_class(module: nn.Module, to: type[nn.Module]) -> None:
    """Change a module's class, and rebind the bound methods that other code has stored in the module's attributes.

    Tools that offload weights, for example, store the forward that they wrap.
    """
    of = type(module)
    bound = {n: m for n, m in module.__dict__.items() if is_bound_method(module, of, m)}
    module.__class__ = to
    for name, method in bound.items():
        module.__dict__[name] = getattr(to, method.__name__).__get__(module)


def loaded_adapters() -> tuple[list[Adapter], list[Form]]:
    """Return the adapters and the forms of the libraries that this process has imported."""
    loaded = [ours for theirs, ours in _ADAPTERS.items() if theirs in sys.modules]
    groups = [importlib.import_module(ours).ADAPTERS if isinstance(ours, str) else ours for ours in loaded]
    known = [adapter for group in groups for adapter in group]
    return [a for a in known if isinstance(a, Adapter)], [f for f in known if isinstance(f, Form)]


def register(library: str, *adapters: Adapter | Form) -> None:
    """Register adapters and forms that :func:`swinkernels.accelerate` uses for a library's modules.

    Args:
        library: a module or package that is imported wherever one of the library's models exists, such as
            "timm.models". Registering the same name again replaces its adapters.
        adapters: an adapter or a form for each class. A :class:`Form` describes less than an :class:`Adapter`, so
            ``accelerate`` tests it on random inputs before using it.

    Raises:
        TypeError: ``library`` is not a string, or one of ``adapters`` is neither an :class:`Adapter` nor a
            :class:`Form`.
        ValueError: no adapter is given.
    """
    if not isinstance(library, str):
        raise TypeError(f"register: library must be the name of a module, got {type(library).__name__}")
    if not adapters:
        raise ValueError(f"register: at least one adapter is needed for {library}, got none")
    for adapter in adapters:
        if not isinstance(adapter, (Adapter, Form)):
            raise TypeError(
                "register: an adapter must be a swinkernels.adapters.Adapter or a swinkernels.adapters.Form, got "
                f"{type(adapter).__name__}"
            )
    _ADAPTERS[library] = adapters
