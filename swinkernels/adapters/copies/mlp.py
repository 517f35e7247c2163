"""Runs the MLPs of blocks of unknown classes with fused matrix products, for inference on a CPU.

An MLP is a candidate if its layers are Linear, GELU and Linear, with dropouts. Its class may combine the layers in any
way, so a trial on random inputs compares the module with the layers called one after the other.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from swinkernels.adapters import linear_layers
from swinkernels.adapters.bypass import child, class_of
from swinkernels.adapters.copies.snapshot import Snapshot, largest_number
from swinkernels.adapters.copies.trial import Case, NotCovered, Trial, Verdicts

_TRIALS = Verdicts()
_MOST_TOKENS = 20_000
_IN_TRIAL = "_swinkernels_is_composed"


@functools.cache
def _mlp(kind: Any, drop: str | None, drop_kind: Any) -> linear_layers.Mlp:
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
    layers = _mlp(class_of(mlp), None, nn.Dropout).layers(_Owner(mlp), x)
    if layers is None:
        raise NotCovered("its layers are not those of an MLP")
    return layers(x)


def trusted(mlp: nn.Module, axes: int) -> Snapshot | None:
    """Return a snapshot of ``mlp`` if a trial showed that its layers, called in turn, can replace its forward.

    Otherwise return None. ``axes`` is the number of axes of the MLP's input, not counting the batch and the channels.
    """
    linears = [m for m in mlp._modules.values() if isinstance(m, nn.Linear)]
    if len(linears) != 2 or any(p.is_meta for p in mlp.parameters()):
        return None
    try:
        return Snapshot(mlp) if _is_composition(mlp, axes, linears[0].in_features) else None
    except Exception:  # an unknown class may store anything in its attributes
        return None


def _is_composition(mlp: nn.Module, axes: int, channels: int) -> bool:
    number = largest_number(mlp, _MOST_TOKENS, channels)
    cases = [Case((2, *(3,) * axes, channels), "rows", 0)]
    if number:
        cases += [Case((1, *(1,) * (axes - 1), n, channels), f"{n} rows", 0) for n in (number, number + 1)]

    def attempt(trial: Trial) -> str | None:
        passed, reason = trial.run(cases)
        return None if len(passed) == len(cases) else reason or "it has no known form"

    def make(**options: Any) -> Trial:
        return Trial(mlp, lambda m: m.__dict__.update({_IN_TRIAL: True}), _compute, is_short=True, in_dtypes=True)

    return _TRIALS.why_not(mlp, (axes,), None, make, attempt) is None


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
    return _mlp(class_of(mlp), drop, drop_kind).fused(block, z, s)
