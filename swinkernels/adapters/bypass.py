"""Inner modules whose work an op may do along with its own: whether anybody would miss their call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def is_traced(x: Any) -> bool:
    """Whether a forward pass is run for its code, which is to be the library's, by torch.fx or torch.jit.trace."""
    return not isinstance(x, Tensor) or torch.jit.is_tracing()  # torch.fx passes a proxy


def class_of(module: Any) -> type:
    """The class of a module, also where torch.export has a proxy in its place, of a subclass that it makes: in models
    that have one module in two places, as MONAI's MLPs do.
    """
    kind = type(module)
    if torch.compiler.is_dynamo_compiling():
        return kind
    bases = kind.__bases__
    return bases[1] if bases[0].__name__ == "AttrProxy" else kind


def child(module: nn.Module, name: str) -> Any:
    """A child of a module, for the forward pass: __getattr__ is slow."""
    return module._modules[name]


def has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def remove_hooks(module: nn.Module) -> None:
    """From a copy: what hooks do with it, such as collecting what passes, would be seen outside."""
    for m in module.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            hooks.clear()


def first_weight(module: nn.Module) -> Tensor:
    """A parameter with the dtype and the device of a module."""
    return next(p for p in module.parameters() if p.is_floating_point())


def replaced_forward(module: nn.Module) -> str | None:
    """Why a module may compute something else than its class says, for a report: its class's forward is not called."""
    return "its forward was replaced on the instance" if "forward" in module.__dict__ else None


def why_not_absorbed(name: str, module: nn.Module, kind: type[nn.Module], known_as: str) -> str | None:
    """Why an inner module has to be called for its work, or None. A subclass may compute something else."""
    if class_of(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, not {known_as}"
    if "forward" in module.__dict__:
        return f"{name}.forward was replaced on the instance"
    return f"a hook is registered on {name}" if has_hooks(module) else None


def why_not_linear(name: str, linear: nn.Module) -> str | None:
    return why_not_absorbed(name, linear, nn.Linear, "an nn.Linear")


def why_not_norm(name: str, norm: Any, width: int) -> str | None:
    """Why a norm of rows of ``width`` elements has to be called for its work, or None."""
    reason = why_not_absorbed(name, norm, nn.LayerNorm, "an nn.LayerNorm")
    if reason is None and norm.normalized_shape != (width,):
        return f"{name} does not normalise rows of {width} elements, but {norm.normalized_shape}"
    return reason


def why_not_window_attention(
    attn: Any, name: str = "attn", kind: type[nn.Module] = nn.Linear, known_as: str = "an nn.Linear"
) -> str | None:
    """Why the work of a window attention module of Microsoft's form (qkv, softmax, attn_drop, proj) cannot be an op's
    at present, or None. What its class is, and how it numbers its bias table, is for the caller to look at.

    Args:
        attn: the module. Without a softmax it calls the function.
        name: what to call it.
        kind, known_as: what its layers qkv and proj have to be.
    """
    if "forward" in attn.__dict__:
        return f"{name}.forward was replaced on the instance"
    # A hook would see other shapes (on qkv, proj, proj_drop: the map instead of windows) or no call (on the others).
    if has_hooks(attn):
        return f"a hook is registered on {name}"
    modules = attn._modules
    for key, module in modules.items():
        if module is not None and has_hooks(module):
            return f"a hook is registered on {name}.{key}"
    # Any other layer may mix tokens, and what it makes of a pad token is not known.
    for key, kinds, right in (
        ("qkv", (kind,), known_as),
        ("proj", (kind,), known_as),
        ("softmax", (nn.Softmax,), "an nn.Softmax"),
        ("attn_drop", (nn.Dropout, nn.Identity), "an nn.Dropout"),
    ):
        if key in modules and class_of(modules[key]) not in kinds:
            return f"{name}.{key} is a {type(modules[key]).__name__}, not {right}"
    return None
