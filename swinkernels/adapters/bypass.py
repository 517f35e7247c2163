"""Decides whether an op may do a module's work without calling the module: not if it has hooks or changed code.

An op replaces code that the library published. ``watch`` records the published methods of a class when an adapter is
imported; ``replaced_method`` and the functions that build on it compare at every call, so a method patched later, on
the class or on one instance, is called. Adapters outside this package should watch the classes whose work ops do.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _torch_module

from swinkernels._at_import import at_import
from swinkernels.ops._arguments import why_beyond_limits


def is_traced(x: Any) -> bool:
    """Return True if torch.fx or torch.jit.trace runs this forward pass to record the library's code."""
    return not isinstance(x, Tensor) or torch.jit.is_tracing()  # torch.fx passes a proxy


def is_distributed(x: Any) -> bool:
    """Return True if a tensor is a DTensor, whatever its placement."""
    if type(x) is Tensor:
        return False
    dtensor = sys.modules.get("torch.distributed.tensor")  # an import would take long
    return dtensor is not None and isinstance(x, dtensor.DTensor)


def why_distributed(module: nn.Module) -> str | None:
    """Return the reason to skip a module that is sharded over devices, or None."""
    if any(is_distributed(x) for x in (*module.parameters(), *module.buffers())):
        return "its parameters are sharded over devices (DTensor): accelerate the model before sharding it"
    return None


def class_of(module: Any) -> type:
    """Return a module's class; for one of torch.export's proxies, the class for which the proxy stands.

    torch.export makes proxies in models that register one module under two names, as MONAI's MLPs do.
    """
    kind = type(module)
    if torch.compiler.is_dynamo_compiling():
        return kind
    bases = kind.__bases__
    return bases[1] if bases[0].__name__ == "AttrProxy" else kind


def child(module: nn.Module, name: str) -> Any:
    """Return a child of a module without __getattr__, which is slow in a forward pass."""
    return module._modules[name]


# Package -> the other packages whose decorators it applies to its methods.
_DECORATED_BY = {"mmcv": ("mmengine",), "mmpretrain": ("mmengine",)}
# The published methods of the classes whose work ops do; None marks a method that was already patched.
_PUBLISHED: dict[type, tuple[tuple[str, Any], ...]] = {}


def watch(*kinds: Any, methods: Sequence[str] = ()) -> None:
    """Record the published code of classes whose work an op does: ``forward``, ``__call__``, and the named methods.

    Names that this version of the library lacks are skipped.
    """
    for kind in kinds:
        names = [name for name in ("forward", "__call__", *methods) if hasattr(kind, name)]
        _PUBLISHED[kind] = tuple((name, _published(kind, name)) for name in names)


def _published(kind: type, name: str) -> Any:
    """Return a method, or None if it was already patched: its code is not from the package of its class."""
    method = getattr(kind, name)
    owner = next(cls for cls in kind.__mro__ if name in vars(cls))
    package = owner.__module__.partition(".")[0]
    packages = (package, *_DECORATED_BY.get(package, ()))
    return method if any(_is_code_of(package, method) for package in packages) else None


def _is_code_of(package: str, method: Any) -> bool:
    folder = os.path.dirname(getattr(sys.modules[package], "__file__", None) or "")
    if not folder:  # an interactive session or a namespace package
        return True
    file = os.path.abspath(getattr(getattr(method, "__code__", None), "co_filename", ""))
    return file.startswith(folder + os.sep)


def watch_unless_watched(kind: Any) -> None:
    """Record a class's current forward and ``__call__`` as its published ones, unless the class is already watched.

    The class may come from any package.
    """
    _PUBLISHED.setdefault(kind, (("forward", kind.forward), ("__call__", kind.__call__)))


def is_patched(kind: Any) -> bool:
    """Return True if ``forward`` or ``__call__`` of a watched class is not the published one."""
    forward, call, *_ = _PUBLISHED[kind]
    return kind.forward is not forward[1] or call_is_patched(kind, call[1])


def call_is_patched(kind: Any, published: Any) -> bool:
    """Return True if a class's ``__call__`` is neither the published one nor torch's own, which torch.fx patches."""
    call: Any = kind.__call__
    # A decorator of torch, such as no_grad, wraps a patch in its own code.
    return call is not published and not all(_is_code_of("torch", code) for code in (call, inspect.unwrap(call)))


watch(nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear, nn.Softmax, nn.Unfold)


def replaced_method(module: nn.Module, kind: Any, name: str = "") -> str | None:
    """Return the reason why a module may compute something other than its class's published code, or None.

    Args:
        module: the module.
        kind: the module's class before ``accelerate``. If this class is not watched, only a forward replaced on the
            instance counts.
        name: the name of an inner module. Without a name, the module is the accelerated one, whose forward is running:
            a forward on the instance does not count.
    """
    own = module.__dict__
    for method, published in _PUBLISHED.get(kind) or (("forward", kind.forward),):
        if method in own and (name or method != "forward") and not is_bound_method(module, type(module), own[method]):
            return f"{f'{name}.' if name else 'its '}{method} was replaced on the instance"
        if getattr(kind, method) is not published and (method != "__call__" or call_is_patched(kind, published)):
            return f"{kind.__name__}.{method} was replaced on the class"
    return None


# torch's global hooks, which run for all modules. Each dict stays the same object.
_OF_ALL_FORWARD, _OF_ALL_FORWARD_PRE = _torch_module._global_forward_hooks, _torch_module._global_forward_pre_hooks
_OF_ALL_BACKWARD, _OF_ALL_BACKWARD_PRE = _torch_module._global_backward_hooks, _torch_module._global_backward_pre_hooks


# The Python module with the global hooks of torch's FLOP counter, which only record the running module.
_HARMLESS = "torch.utils.module_tracker"


def all_modules_have_hooks() -> bool:
    """Return True if a global hook, which runs for all modules, is registered, except for the FLOP counter's."""
    if not (_OF_ALL_FORWARD or _OF_ALL_FORWARD_PRE or _OF_ALL_BACKWARD or _OF_ALL_BACKWARD_PRE):
        return False
    hooks = (*_OF_ALL_FORWARD.values(), *_OF_ALL_FORWARD_PRE.values())
    others = any(getattr(hook, "__module__", "") != _HARMLESS for hook in hooks)
    return others or bool(_OF_ALL_BACKWARD or _OF_ALL_BACKWARD_PRE)


def has_own_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of a module would run a hook, the module's or a global one."""
    return has_own_hooks(module) or all_modules_have_hooks()


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks of a copied module: their effects, such as collected outputs, would be visible outside."""
    for m in module.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            hooks.clear()


def first_weight(module: nn.Module) -> Tensor:
    """Return a module's first floating-point parameter, which has the module's dtype and device."""
    return next(p for p in module.parameters() if p.dtype.is_floating_point)


def is_bound_method(module: nn.Module, kind: type, value: Any) -> bool:
    """Return True if a value is a class's method bound to a module, as ``module.forward`` is."""
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is module
        and getattr(kind, value.__name__, None) is value.__func__
    )


def replaced_forward(module: nn.Module) -> str | None:
    """Return the reason, for a report, if a module's forward differs from its class's forward, or None."""
    forward = module.__dict__.get("forward")
    if forward is None or is_bound_method(module, type(module), forward):
        return None
    return "its forward was replaced on the instance"


def _class_name(module: Any) -> str:
    """Return the name of a module's class, qualified if torch.nn has another class of that name (peft's Linear)."""
    cls = type(module)
    return cls.__name__ if getattr(nn, cls.__name__, cls) is cls else f"{cls.__module__}.{cls.__qualname__}"


def why_not_absorbed(name: str, module: nn.Module, kind: type[nn.Module], known_as: str) -> str | None:
    """Return the reason why an inner module has to be called, or None.

    A subclass of ``kind`` has to be called, because it may compute something else.
    """
    if class_of(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, not {known_as}"
    reason = replaced_method(module, kind, name)
    return f"a hook is registered on {name}" if reason is None and has_hooks(module) else reason


def why_not_linear(name: str, linear: nn.Module) -> str | None:
    return why_not_absorbed(name, linear, nn.Linear, "an nn.Linear")


# peft's LoRA class around a Linear, added once peft is imported.
_LORA: set[type] = set()


def _note_lora(layers: types.ModuleType) -> None:
    watch(layers.Linear)
    _LORA.add(layers.Linear)


at_import("peft.tuners.lora.layer", _note_lora)


def _why_not_lora(name: str, layer: Any) -> str | None:
    """Return the reason why a LoRA layer may not compute W x + b + B A x token by token, or None.

    For a pad token, x = 0, a LoRA layer that computes this returns the bias b.
    """
    reason = replaced_method(layer, type(layer), name)
    if reason is None and (getattr(layer, "lora_variant", None) or any(getattr(layer, "lora_bias", {}).values())):
        reason = f"{name} is a LoRA layer with a bias, or of a variant such as DoRA"
    linears = {"base_layer": layer.base_layer}
    linears |= {f"{part}.{key}": m for part in ("lora_A", "lora_B") for key, m in getattr(layer, part).items()}
    for key, linear in linears.items():
        reason = reason or why_not_linear(f"{name}.{key}", linear)
    for key, dropout in layer.lora_dropout.items():
        reason = reason or why_not_dropout(f"{name}.lora_dropout.{key}", dropout)
    return reason


def why_not_norm(name: str, norm: Any, width: int) -> str | None:
    """Return the reason why a norm over rows of ``width`` elements has to be called, or None."""
    reason = why_not_absorbed(name, norm, nn.LayerNorm, "an nn.LayerNorm")
    if reason is None and norm.normalized_shape != (width,):
        return f"{name} does not normalise rows of {width} elements, but {norm.normalized_shape}"
    if reason is None and norm.weight is not None and norm.weight.shape != (width,):
        return f"{name} has a weight of shape {tuple(norm.weight.shape)} for rows of {width} elements"
    return reason


def why_not_dropout(name: str, dropout: nn.Module) -> str | None:
    """Return the reason why a dropout has to be called, or None. An nn.Identity, which drops nothing, is accepted."""
    return why_not_absorbed(
        name, dropout, nn.Identity if class_of(dropout) is nn.Identity else nn.Dropout, "an nn.Dropout"
    )


def why_not_window_attention(
    attn: Any,
    name: str = "attn",
    kind: type[nn.Module] = nn.Linear,
    known_as: str = "an nn.Linear",
    takes_lora: bool = False,
) -> str | None:
    """Return the reason why no op can currently do a window attention's work, or None.

    The module has Microsoft's form (qkv, softmax, attn_drop, proj). Callers check its class and the numbering of its
    bias table.

    Args:
        attn: the module. It may lack a softmax module and call the function instead.
        name: the module's name in the message.
        kind, known_as: the class that the layers qkv and proj must have, and its readable name.
        takes_lora: True if peft's LoRA may wrap qkv and proj; False if the library's code reads their weights itself.
    """
    reason = replaced_method(attn, class_of(attn), name)
    if reason is not None:
        return reason
    # Hooks on qkv, proj and proj_drop would get the map instead of windows; hooks on the other modules would not run.
    if has_hooks(attn):
        return f"a hook is registered on {name}"
    modules = attn._modules
    for key, module in modules.items():
        if module is not None and has_own_hooks(module):
            return f"a hook is registered on {name}.{key}"
    # Layers of other classes may mix tokens or change the result for a pad token; a layer after proj gets the map.
    for key, kinds, right in (
        ("qkv", (kind,), known_as),
        ("proj", (kind,), known_as),
        ("softmax", (nn.Softmax,), "an nn.Softmax"),
        ("attn_drop", (nn.Dropout, nn.Identity), "an nn.Dropout"),
        ("proj_drop", (nn.Dropout, nn.Identity), "an nn.Dropout"),
    ):
        if key in modules:
            module = modules[key]
            of = class_of(module)
            if takes_lora and of in _LORA and key in ("qkv", "proj"):
                reason = _why_not_lora(f"{name}.{key}", module)
                if reason is not None:
                    return reason
                continue
            if of not in kinds:
                return f"{name}.{key} is a {_class_name(module)}, not {right}"
            if "forward" in module.__dict__ or is_patched(of):
                reason = replaced_method(module, of, f"{name}.{key}")
                if reason is not None:
                    return reason
    if getattr(modules.get("softmax"), "dim", -1) != -1:
        return f"{name}.softmax is along axis {modules['softmax'].dim}, not the last one"
    qkv = modules["qkv"]
    return why_beyond_limits((qkv.out_features if kind is nn.Linear else qkv.out_channels) // (3 * attn.num_heads))
