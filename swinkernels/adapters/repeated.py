"""Repeats the ops of an earlier call of a module, where such a call consists of nothing else.

In inference on a CPU, a block is two ops on its input, its parameters and its buffers, and patch merging is one. The
ops and their other arguments depend on the module's state and on the metadata of the input. So as long as neither
changes, a call can run the same ops on the current tensors, without the checks that lead to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.checks import Tensors, keep, results_and_tensors
from swinkernels.ops._fused_linear import Call, recorded
from swinkernels.ops._library import metadata


class _Ops:
    """The ops of a call.

    All tensors and constants that an op may read are in one list: the call's input, the module's tensors, constants and
    the results of the ops before it. An op comes with a function that reads its arguments from the list.
    """

    def __init__(self, ops: list[tuple[Any, Callable[[list[Any]], Any]]], constants: list[Any]) -> None:
        self._ops, self._constants = ops, constants

    def run(self, x: Tensor, tensors: Tensors) -> Tensor:
        known: list[Any] = [x, *tensors, *self._constants]
        with torch._C._AutoDispatchBelowAutograd():
            for op, read in self._ops:
                known.append(op.overload(*read(known)))
        return known[-1]


def _is_constant(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else (value,)
    return all(type(v) in (type(None), bool, int, float, str) for v in values)


def _ops_of(x: Tensor, tensors: Tensors, calls: list[Call], result: Tensor | None) -> _Ops | None:
    """Return the ops of a call with the input ``x``, or None if the call consisted of more than these ``calls``."""
    if not calls or calls[-1].result is not result:
        return None
    constants = [a for call in calls for a in call.arguments if not isinstance(a, Tensor)]
    given = x, *tensors
    place = {id(t): i for i, t in enumerate(given) if t is not None}
    # A tensor with two names may become two tensors.
    if not all(map(_is_constant, constants)) or len(place) < sum(t is not None for t in given):
        return None
    next_constant = itertools.count(len(given))
    ops: list[tuple[Any, Callable[[list[Any]], Any]]] = []
    for i, call in enumerate(calls):
        read = [place.get(id(a)) if isinstance(a, Tensor) else next(next_constant) for a in call.arguments]
        if None in read:
            return None  # other code computed a tensor
        ops.append((call.op, itemgetter(*read)))
        place[id(call.result)] = len(given) + len(constants) + i
    return _Ops(ops, constants)


_UNKNOWN = object()


def repeated(module: nn.Module, by: Any, x: Tensor, run: Callable[[], Tensor | None]) -> Tensor | None:
    """Return run(), or its result by the ops that it ran before for an input with the metadata of ``x``.

    This is for calls without gradients where ``joins(x)`` is True. It must be the first function that uses kept results
    in a call of ``module``. ``run`` must not change a tensor in place, and all tensors on which its result depends must
    be arguments of its ops. It must follow the rules of :func:`~swinkernels.adapters.checks.kept`, with the metadata of
    ``x`` as the key.

    Args:
        module: the accelerated module.
        by: any hashable object that is the same in all calls with this ``run``.
        x: the only tensor that the ops read, apart from the module's own and the results of earlier ops.
        run: computes the result.
    """
    found = results_and_tensors(module)
    if found is None:
        return run()
    results, tensors = found
    key = _Ops, by, *metadata(x)
    ops = results.get(key, _UNKNOWN)
    if ops is None:
        return run()
    if ops is not _UNKNOWN:
        return ops.run(x, tensors)
    before, recorded.calls = recorded.calls, []
    try:
        result = run()
        keep(results, key, _ops_of(x, tensors, recorded.calls, result))
    finally:
        recorded.calls = before
    return result
