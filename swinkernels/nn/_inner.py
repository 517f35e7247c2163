"""Decides whether an op may run instead of inner modules: not if hooks or replaced methods make a call do more."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules import module as _torch_module

# The dicts of torch's global hooks, which run for all modules. torch never replaces these dicts.
GLOBAL_HOOKS: tuple[dict[int, Any], ...] = (
    _torch_module._global_forward_hooks,
    _torch_module._global_forward_pre_hooks,
    _torch_module._global_backward_hooks,
    _torch_module._global_backward_pre_hooks,
)


def has_own_hooks(module: nn.Module) -> bool:
    # In compiled code torch puts no guards on hooks that are read like this, as on those that it reads itself; see
    # torch._dynamo.config.skip_nnmodule_hook_guards. They would take as long as all other guards of a block.
    missing = (
        not module._forward_hooks,
        not module._forward_pre_hooks,
        not module._backward_hooks,
        not module._backward_pre_hooks,
    )
    return False in missing


def all_modules_have_hooks() -> bool:
    """Return True if a global hook, which runs for all modules, is registered."""
    return any(GLOBAL_HOOKS)


def is_set_on_instance(module: nn.Module, method: str) -> bool:
    """Return True if an attribute of the instance takes the place of ``method``, which the module's class has."""
    getattr(module, method)  # torch 2.14 puts a guard on this access in compiled code, but none on the next line
    return method in module.__dict__


def is_bare(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Return True if ``module`` is exactly of class ``kind`` and has no hooks and no replaced forward.

    An op can then run instead of the module.
    """
    if module is None:
        return False
    return type(module) is kind and not is_set_on_instance(module, "forward") and not has_own_hooks(module)
