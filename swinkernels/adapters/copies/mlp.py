"""Replaces the forward of MLPs of unknown classes by their layers, which ops can fuse or recompute.

An MLP is a candidate if its layers are Linear, GELU and Linear, with dropouts. Its class may combine the layers in any
way, so a trial on random inputs compares the module with the layers called one after the other.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from swinkernels.adapters import linear_layers
from swinkernels.adapters.bypass import child, class_of
from swinkernels.adapters.copies.snapshot import Snapshot, largest_number
from swinkernels.adapters.copies.trial import Case, NotCovered, Trial, Verdicts

_TRIALS = Verdicts()
_MOST_TOKENS = 20_000
_LARGE = 1e6
_IN_TRIAL = "_swinkernels_is_composed"


@functools.cache
def layers_of(kind: Any, drop: str | None, drop_kind: Any) -> linear_layers.Mlp:
    """Describe a block's ``mlp`` of class ``kind`` and the drop path after it, the block's module ``drop``."""
    return linear_layers.Mlp((("mlp", kind, ()),), drop, drop_kind)


class _Owner(nn.Module):
    """A module with an MLP in the attribute ``mlp``, as in a block."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp


def _compute(mlp: Any, x: Tensor) -> Tensor:
    """Call ``mlp`` on ``x``; in the accelerated twin, call its layers one after the other instead."""
    if _IN_TRIAL not in mlp.__dict__:
        return mlp(x)
    layers = layers_of(class_of(mlp), None, nn.Dropout).layers(_Owner(mlp), x)
    if layers is None:
        raise NotCovered("its layers are not those of an MLP")
    return layers(x)


class _Autocast(TorchFunctionMode):
    """Detects computations for which autocast is disabled."""

    was_disabled = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) for x in args):
            self.was_disabled |= not all(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
        return func(*args, **(kwargs or {}))


def _disables_autocast(mlp: nn.Module, x: Tensor) -> bool:
    """Return True if a call of ``mlp`` disables autocast for some of its computations."""
    on_gpus = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)  # torch.autocast("cuda") would warn on a machine without a GPU
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), _Autocast() as mode:
            mlp(x)
    finally:
        torch.set_autocast_enabled("cuda", on_gpus)
    return mode.was_disabled


def trusted(mlp: nn.Module, axes: int, in_training: bool) -> Snapshot | None:
    """Return a snapshot of ``mlp`` if a trial showed that its layers, called in turn, can replace its forward.

    Otherwise return None.

    Args:
        mlp: the MLP of a block.
        axes: the number of axes of its input, not counting the batch and the channels.
        in_training: True to compare gradients and training mode, too.
    """
    linears = [m for m in mlp._modules.values() if isinstance(m, nn.Linear)]
    if len(linears) != 2 or any(p.is_meta for p in mlp.parameters()):
        return None
    try:
        return Snapshot(mlp) if _is_composition(mlp, axes, linears[0].in_features, in_training) else None
    except Exception:  # an unknown class may store anything in its attributes
        return None


def _is_composition(mlp: nn.Module, axes: int, channels: int, in_training: bool) -> bool:
    number = largest_number(mlp, _MOST_TOKENS, channels)
    cases = [Case((2, *(3,) * axes, channels), "rows", 0)]
    if number:
        cases += [Case((1, *(1,) * (axes - 1), n, channels), f"{n} rows", 0) for n in (number, number + 1)]

    def attempt(trial: Trial) -> str | None:
        passed, reason = trial.run(cases)
        if len(passed) < len(cases):
            return reason or "it has no known form"
        # Large numbers exceed the limits of a clamp.
        of_large = replace(trial, call=lambda m, x: _compute(m, _LARGE * x), is_short=True, in_dtypes=False)
        passed, reason = of_large.run(cases[:1])
        return None if passed else reason

    def swap_class(m: Any) -> None:
        m.__dict__[_IN_TRIAL] = True

    def compute(m: Any, x: Tensor) -> Tensor:
        if in_training and _disables_autocast(m, x):
            raise NotCovered("it disables autocast")
        return _compute(m, x)

    def make(**options: Any) -> Trial:
        return Trial(mlp, swap_class, compute, is_short=not in_training, in_dtypes=True)

    return _TRIALS.why_not(mlp, (axes, in_training), None, make, attempt) is None


def fused(block: Any, z: Tensor, s: Tensor | None, drop: str | None, drop_kind: Any) -> Tensor | None:
    """Compute MLP(z), or s + drop(MLP(z)) if ``s`` is given, with fused matrix products.

    Return None if they cannot be used. ``drop`` and ``drop_kind`` are the name and the class of the drop path that
    follows the MLP in the block.
    """
    if not linear_layers.fuses(z):
        return None
    snapshot, mlp = block._swinkernels_mlp, child(block, "mlp")
    if snapshot is None or mlp.training or snapshot.differs(mlp) is not None:
        return None
    return layers_of(class_of(mlp), drop, drop_kind).fused(block, z, s)
