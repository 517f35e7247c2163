"""Decides whether an op may replace the call of a module. It may not if the module has hooks or its code was changed.

An op gives the same result as the library's published code. ``watch`` records the published methods of a class when an
adapter is imported. ``replaced_method`` and the functions that build on it compare the current methods with the
recorded ones at every call; if a method was patched later, on the class or on one instance, the module is called.
Adapters outside this package should watch each class that their op replaces.
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

from swinkernels._at_import import at_import
from swinkernels.nn._inner import GLOBAL_HOOKS, has_own_hooks, is_set_on_instance
from swinkernels.ops._arguments import why_beyond_limits
from swinkernels.ops._library import constant_when_compiled


def is_traced(x: Any) -> bool:
    """Return True while torch.fx or torch.jit.trace records this forward pass."""
    return not isinstance(x, Tensor) or torch.jit.is_tracing()  # torch.fx passes a proxy


def is_distributed(x: Any) -> bool:
    """Return True if a tensor is a DTensor, whatever its placement."""
    if type(x) is Tensor:
        return False
    dtensor = sys.modules.get("torch.distributed.tensor")  # importing it takes long
    return dtensor is not None and isinstance(x, dtensor.DTensor)


def why_distributed(module: nn.Module) -> str | None:
    """Return the reason to skip a module whose parameters or buffers are sharded over devices, or None."""
    if any(is_distributed(x) for x in (*module.parameters(), *module.buffers())):
        return "its parameters are sharded over devices (DTensor): accelerate the model before sharding it"
    return None


def why_not_accelerated(name: str, module: Any, accelerated: Any) -> str | None:
    """Return the reason why a call of the inner module ``name`` may do more than its class ``accelerated``, or None."""
    original = accelerated._swinkernels_original
    if class_of(module) is not accelerated:
        return f"{name} is a {class_of(module).__name__}"
    reason = replaced_method(module, original, name)
    return f"a hook is registered on {name}" if reason is None and has_hooks(module) else reason


def class_of(module: Any) -> type:
    """Return a module's class. For a proxy made by torch.export, return the class of the module behind the proxy.

    torch.export makes such proxies if a model registers one module under two names, as MONAI does with its MLPs.
    """
    kind = type(module)
    if torch.compiler.is_dynamo_compiling():
        return kind
    bases = kind.__bases__
    return bases[1] if bases[0].__name__ == "AttrProxy" else kind


def child(module: nn.Module, name: str) -> Any:
    """Return a child of a module. This bypasses __getattr__, which is slow in a forward pass."""
    return module._modules[name]


# Package -> other packages that contain the decorators of its methods.
_DECORATED_BY = {"mmcv": ("mmengine",), "mmpretrain": ("mmengine",)}
# Watched class -> its published methods by name, with None for a method that was already patched.
_PUBLISHED: dict[type, tuple[tuple[str, Any], ...]] = {}


def watch(*kinds: Any, methods: Sequence[str] = ()) -> None:
    """Record the published ``forward``, ``__call__`` and ``methods`` of the classes ``kinds``, which an op replaces.

    Methods that do not exist in the installed version of the library are skipped.
    """
    for kind in kinds:
        names = [name for name in ("forward", "__call__", *methods) if hasattr(kind, name)]
        _PUBLISHED[kind] = tuple((name, _published(kind, name)) for name in names)


def _published(kind: type, name: str) -> Any:
    """Return a method of a class, or None if it was already patched, that is, if its code is from another package."""
    method = getattr(kind, name)
    owner = next(cls for cls in kind.__mro__ if name in vars(cls))
    package = owner.__module__.partition(".")[0]
    packages = (package, *_DECORATED_BY.get(package, ()))
    return method if any(_is_code_of(package, method) for package in packages) else None


def _is_code_of(package: str, method: Any) -> bool:
    folder = os.path.dirname(getattr(sys.modules[package], "__file__", None) or "")
    if not folder:  # __main__ of an interactive session, or a namespace package
        return True
    file = os.path.abspath(getattr(getattr(method, "__code__", None), "co_filename", ""))
    return file.startswith(folder + os.sep)


def watch_unless_watched(kind: Any) -> None:
    """Record a class's current ``forward`` and ``__call__`` as the published ones, unless the class is already watched.

    Unlike :func:`watch`, this accepts methods from any package.
    """
    _PUBLISHED.setdefault(kind, (("forward", kind.forward), ("__call__", kind.__call__)))


@constant_when_compiled
def is_patched(kind: Any) -> bool:
    """Return True if the ``forward`` or ``__call__`` of a watched class was replaced."""
    forward, call, *_ = _PUBLISHED[kind]
    return kind.forward is not forward[1] or call_is_patched(kind, call[1])


def call_is_patched(kind: Any, published: Any) -> bool:
    """Return True if a class's ``__call__`` was replaced by code other than torch's; torch.fx patches ``__call__``."""
    call: Any = kind.__call__
    # Both the outer and the unwrapped function are checked, because a torch decorator such as no_grad hides a patch
    # inside its own code.
    return call is not published and not all(_is_code_of("torch", code) for code in (call, inspect.unwrap(call)))


watch(nn.Conv2d, nn.Dropout, nn.GELU, nn.Identity, nn.LayerNorm, nn.Linear)
watch(nn.ReLU, nn.Sequential, nn.Softmax, nn.Unfold)


# In compiled code, methods of classes count as constants. A function of modules must not be marked like this: torch
# would guard on their identity, so that equal blocks could not share compiled code.
@constant_when_compiled
def _methods_of(kind: Any) -> tuple[str, ...]:
    """Return the names of the methods of a class that an attribute of an instance may replace."""
    names = [method for method, _ in _PUBLISHED.get(kind) or (("forward", None),)]
    return tuple(name for name in names if name != "__call__")  # Python calls the one of the class in any case


@constant_when_compiled
def _replaced_on_class(kind: Any) -> str | None:
    for method, published in _PUBLISHED.get(kind) or ():
        if getattr(kind, method) is not published and (method != "__call__" or call_is_patched(kind, published)):
            return f"{kind.__name__}.{method} was replaced on the class"
    return None


def replaced_method(module: nn.Module, kind: Any, name: str = "") -> str | None:
    """Return the reason why a module may compute something other than its class's published code, or None.

    Args:
        module: the module.
        kind: the module's class before ``accelerate``. If this class is not watched, only a ``forward`` replaced on the
            instance is detected.
        name: the name of an inner module, for the message. Leave it empty for the accelerated module itself; a
            ``forward`` set on its instance is then ignored.
    """
    own = module.__dict__
    for method in _methods_of(kind):
        if (not name and method == "forward") or not is_set_on_instance(module, method):
            continue
        if not is_bound_method(module, type(module), own[method]):
            return f"{f'{name}.' if name else 'its '}{method} was replaced on the instance"
    reason = _replaced_on_class(kind)
    if reason is not None:
        return reason
    if name and own.get("_compiled_call_impl") is not None:  # set by nn.Module.compile
        return f"{name} is compiled"
    return None


# The Python module that defines the hooks of torch's FLOP counter. They only record which module is running.
_HARMLESS = "torch.utils.module_tracker"


def all_modules_have_hooks() -> bool:
    """Return True if a global hook, which runs for all modules, is registered. The FLOP counter's hooks are ignored."""
    if not any(GLOBAL_HOOKS):
        return False
    forward, forward_pre, backward, backward_pre = GLOBAL_HOOKS
    hooks = (*forward.values(), *forward_pre.values())
    others = any(getattr(hook, "__module__", "") != _HARMLESS for hook in hooks)
    return others or bool(backward or backward_pre)


def weight_and_bias(layer: Any) -> tuple[Any, Any]:
    """Return the parameters of a norm or a Linear layer. This bypasses __getattr__, as :func:`child` does."""
    own = layer._parameters
    return (own["weight"], own["bias"]) if "weight" in own and "bias" in own else (layer.weight, layer.bias)


def has_hooks(module: nn.Module) -> bool:
    """Return True if a call of the module would run one of its hooks or a global hook."""
    return has_own_hooks(module) or all_modules_have_hooks()


def remove_hooks(module: nn.Module) -> None:
    """Remove the hooks from a copied module, so that calling it has no side effects, such as collecting outputs."""
    for m in module.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            hooks.clear()


def first_weight(module: nn.Module) -> Tensor:
    """Return a module's first floating-point parameter, from which callers read the dtype and device of the module."""
    return next(p for p in module.parameters() if p.dtype.is_floating_point)


def is_bound_method(module: nn.Module, kind: type, value: Any) -> bool:
    """Return True if ``value`` is a method of ``kind`` bound to ``module``, as ``module.forward`` is."""
    return (
        isinstance(value, types.MethodType)
        and value.__self__ is module
        and getattr(kind, value.__name__, None) is value.__func__
    )


def replaced_forward(module: nn.Module) -> str | None:
    """Return a reason for the report if a module's forward was replaced on the instance, else None."""
    forward = module.__dict__.get("forward")
    if forward is None or is_bound_method(module, type(module), forward):
        return None
    return "its forward was replaced on the instance"


def _class_name(module: Any) -> str:
    """Return the name of a module's class, qualified if torch.nn has a class of that name (as for peft's Linear)."""
    cls = type(module)
    return cls.__name__ if getattr(nn, cls.__name__, cls) is cls else f"{cls.__module__}.{cls.__qualname__}"


def why_not_absorbed(name: str, module: nn.Module, kind: type[nn.Module], known_as: str) -> str | None:
    """Return the reason why an op cannot replace the call of an inner module, or None.

    A module of a subclass of ``kind`` is never replaced, because the subclass may compute something else.
    """
    if class_of(module) is not kind:
        return f"{name} is a {type(module).__module__}.{type(module).__qualname__}, not {known_as}"
    reason = replaced_method(module, kind, name)
    return f"a hook is registered on {name}" if reason is None and has_hooks(module) else reason


def why_not_linear(name: str, linear: nn.Module) -> str | None:
    return why_not_absorbed(name, linear, nn.Linear, "an nn.Linear")


# peft's LoRA layer for an nn.Linear. The set stays empty until peft is imported.
_LORA: set[type] = set()


def _note_lora(layers: types.ModuleType) -> None:
    watch(layers.Linear)
    _LORA.add(layers.Linear)


at_import("peft.tuners.lora.layer", _note_lora)


def _why_not_lora(name: str, layer: Any) -> str | None:
    """Return the reason why a LoRA layer may compute something other than W x + b + B A x for each token, or None.

    The formula gives b for a pad token (x = 0), which is the value that the op uses for pad tokens.
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
    """Return the reason why an op cannot replace a norm over rows of ``width`` elements, or None."""
    reason = why_not_absorbed(name, norm, nn.LayerNorm, "an nn.LayerNorm")
    if reason is None and norm.normalized_shape != (width,):
        return f"{name} does not normalise rows of {width} elements, but {norm.normalized_shape}"
    if reason is None and norm.weight is not None and norm.weight.shape != (width,):
        return f"{name} has a weight of shape {tuple(norm.weight.shape)} for rows of {width} elements"
    return reason


def why_not_dropout(name: str, dropout: nn.Module) -> str | None:
    """Return the reason why an op cannot replace ``dropout``, or None. An nn.Identity is accepted: it drops nothing."""
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
    """Return the reason why no op can currently replace a window attention module, or None.

    The module must have Microsoft's form (qkv, softmax, attn_drop, proj). The caller checks the module's class and the
    index of its bias table.

    Args:
        attn: the module. It may call the softmax function instead of a softmax module.
        name: the module's name in the message.
        kind, known_as: the class that qkv and proj must have, and the name of this class in the message.
        takes_lora: True if qkv and proj may be wrapped by peft's LoRA; False if the library reads their weights
            directly.
    """
    reason = replaced_method(attn, class_of(attn), name)
    if reason is not None:
        return reason
    # If the op ran, hooks on qkv, proj and proj_drop would get the whole map instead of windows, and hooks on the other
    # modules would not run.
    if has_hooks(attn):
        return f"a hook is registered on {name}"
    modules = attn._modules
    for key, module in modules.items():
        if module is not None and has_own_hooks(module):
            return f"a hook is registered on {name}.{key}"
    # A layer of another class may mix tokens or compute something else for pad tokens, and a layer after proj would get
    # the whole map instead of windows.
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
            if is_set_on_instance(module, "forward") or is_patched(of):
                reason = replaced_method(module, of, f"{name}.{key}")
                if reason is not None:
                    return reason
    if getattr(modules.get("softmax"), "dim", -1) != -1:
        return f"{name}.softmax is along axis {modules['softmax'].dim}, not the last one"
    qkv = modules["qkv"]
    return why_beyond_limits((qkv.out_features if kind is nn.Linear else qkv.out_channels) // (3 * attn.num_heads))
