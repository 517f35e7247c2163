"""What modules of unknown classes have in common, whole blocks and attention alone: how a window attention of
Microsoft's form keeps its parameters, when two modules are of one make, and how a class that was made for them pickles.
"""

from __future__ import annotations

import copyreg
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.integrations._adapter import Accelerated, Adapter, original_class

# The name of the adapters in reports.
NAME = "structural"


def resembles_attention(attn: nn.Module | None) -> bool:
    """Whether a module keeps what a window attention of Microsoft's form, v1 or v2, keeps."""
    if attn is None or isinstance(attn, torch.jit.ScriptModule):
        return False
    has_bias = "relative_position_bias_table" in attn._parameters or (
        "cpb_mlp" in attn._modules and "logit_scale" in attn._parameters
    )
    return has_bias and all(name in attn._modules for name in ("qkv", "proj")) and hasattr(attn, "num_heads")


def is_cosine(attn: nn.Module) -> bool:
    return "logit_scale" in attn._parameters


def qkv_bias(attn: Any) -> Tensor | None:
    if attn.qkv.bias is not None or getattr(attn, "q_bias", None) is None:
        return attn.qkv.bias
    return torch.cat([attn.q_bias, torch.zeros_like(attn.v_bias), attn.v_bias])


def qkv_of(attn: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    return attn.qkv(x) if bias is attn.qkv.bias else F.linear(x, attn.qkv.weight, bias)


def bias_table(attn: Any) -> Tensor:
    """(prod(2 * window - 1), num_heads)"""
    if not is_cosine(attn):
        return attn.relative_position_bias_table
    return 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).reshape(-1, attn.num_heads))


def score_factor(attn: Any) -> dict[str, Any]:
    """The op's arguments for it: v1's or v2's."""
    return {"logit_scale": attn.logit_scale} if is_cosine(attn) else {"scale": getattr(attn, "scale", None)}


def dropout_p(attn: Any) -> float:
    return getattr(attn._modules.get("attn_drop"), "p", 0.0)


def dropout_at_call(attn: Any) -> float:
    drop = attn._modules.get("attn_drop")
    return dropout_p(attn) if drop is not None and drop.training else 0.0


def projected(attn: Any, out: Tensor) -> Tensor:
    drop = attn._modules.get("proj_drop")
    out = attn.proj(out)
    return out if drop is None else drop(out)


def parameters_of(original: Any) -> list[inspect.Parameter]:
    """What the forward of a class takes beside self."""
    taken = list(inspect.signature(original.forward).parameters.values())[1:]
    return [p for p in taken if p.kind is not inspect.Parameter.VAR_KEYWORD]


# torch's own, what changes from call to call or from module to module of one make, and what a trial replaces.
_NOT_COMPARED = {*nn.Module().__dict__, "H", "W", "input_resolution", "p", "drop_prob"}


def make_of(module: nn.Module, *others: Any) -> tuple[Any, ...]:
    """What a forward may depend on but for the values of tensors: equal for modules that one trial is enough for."""
    found: list[Any] = [original_class(module).forward, *others]
    found += [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    for path, m in module.named_modules():
        found += [path, original_class(m), original_class(m).forward]
        for name, value in sorted(m.__dict__.items()):
            if name in _NOT_COMPARED or name.startswith("_swinkernels_"):
                continue
            if isinstance(value, (bool, int, float, str, tuple, list, type(None))) or callable(value):
                found.append((name, repr(value)))
    return tuple(found)


class Remade(Accelerated):
    """A base of accelerated classes that are made at run time, for an original class and a form."""

    _swinkernels_form: Any
    # (original, form) -> the adapter with the class; a function that pickle can import.
    _swinkernels_adapter: Callable[[Any, Any], Adapter]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Its class cannot be imported, so it is made again."""
        cls, reduced = type(self), super().__reduce_ex__(max(2, protocol))
        if reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced
        made_from = cls._swinkernels_adapter, original_class(self), cls._swinkernels_form
        return _remake, (*made_from, *reduced[1][1:]), *reduced[2:]


def _remake(adapter: Callable[[Any, Any], Adapter], original: Any, form: Any, *args: Any) -> nn.Module:
    accelerated: Any = adapter(original, form).accelerated
    return accelerated.__new__(accelerated, *args)


def remade_class(base: type[Remade], original: Any, form: Any, adapter: Any, **namespace: Any) -> type[nn.Module]:
    """A subclass of a class for a form that its instances follow."""
    namespace = {
        "_swinkernels_form": form,
        "_swinkernels_adapter": staticmethod(adapter),
        "__module__": original.__module__,
        "__doc__": base.__doc__,
        **namespace,
    }
    return type(f"Accelerated{original.__name__}", (base, original), namespace)
