"""Explains in the report why a module that resembles a window attention module matches no known form."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from swinkernels.adapters.adapter import original_class
from swinkernels.adapters.copies.dynamic_class import parameters_of
from swinkernels.adapters.microsoft_attention import is_cosine, resembles_attention

_ATTENTION = ("attn", "attention", "msa")


def why_unknown(module: nn.Module) -> str | None:
    """Return a message that lists the missing parts if ``module`` resembles a window attention module, or None."""
    original: Any = original_class(module)
    name = original.__name__.lower()
    is_named = any(word in name for word in _ATTENTION)
    tables = [n for n in module._parameters if "relative_position_bias" in n or n in ("rpb", "rpe_table")]
    windowed = "window" in name or "swin" in name or hasattr(module, "window_size")
    if not windowed or not (is_named or tables) or isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return None
    linears = [n for n, m in module._modules.items() if isinstance(m, nn.Linear)]
    if not linears and not tables:
        return None  # the module only contains an attention module
    missing = []
    if not isinstance(module._modules.get("qkv"), nn.Linear):
        missing.append(f"one nn.Linear named qkv (it has {', '.join(linears) or 'none'})")
    if "proj" not in module._modules:
        missing.append("a layer named proj")
    if not hasattr(module, "num_heads"):
        missing.append("num_heads")
    if not hasattr(module, "window_size"):
        missing.append("window_size")
    if "relative_position_bias_table" not in module._parameters and not is_cosine(module):
        missing.append("a parameter relative_position_bias_table")
    elif is_cosine(module) and "cpb_mlp" not in module._modules:
        missing.append("cpb_mlp")
    taken = [p.name for p in parameters_of(original)]
    if not any("mask" in n for n in taken[1:3]):
        missing.append(f"an argument mask after x (its forward takes {inspect.signature(original.forward)})")
    if not missing and resembles_attention(module):
        return None
    return (
        f"it resembles a window attention, but lacks {'; '.join(missing) or 'its form'}. docs/adapters.md explains how "
        "to write an adapter"
    )
