"""Runs a model once and records the ops that its replaced modules call, and the backends of these calls."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swinkernels.adapters.adapter import Accelerated
from swinkernels.ops._backends import observe_choices


@dataclass(frozen=True)
class Ran:
    """The ops that one replaced module called during one run of the model."""

    path: str
    module_class: str
    # (op, backend) -> number of calls, excluding calls by replaced modules nested in this one.
    calls: dict[tuple[str, str], int]
    # The reason why the op of the module's main part was not called, or None if it was called.
    reason: str | None = None

    def __str__(self) -> str:
        if not self.calls:
            return f"no op: {self.reason}"
        ran = ", ".join(f"{op} on {backend}, {n}x" for (op, backend), n in self.calls.items())
        return ran if self.reason is None else f"{ran}; the rest is the library's own code: {self.reason}"


class _Plain(TorchDispatchMode):
    """A dispatch mode without side effects. While one is active, ops bypass their cache, so every call is observed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def run_and_watch(
    model: nn.Module, replaced: dict[str, tuple[str, Callable[[nn.Module], str | None]]], inputs: Any, options: Any
) -> list[Ran]:
    """Call ``model(*inputs, **options)`` once, without gradients, and return one :class:`Ran` per replaced module.

    ``replaced`` maps the path of each replaced module to a pair: the op of the module's main part, and a function that
    returns the reason why the module runs the library's own code in every call, or None if it does not.
    """
    modules = {path: model.get_submodule(path) for path in replaced}
    known = {modules[path]: of_module for path, of_module in replaced.items()}
    calls: dict[nn.Module, Counter[tuple[str, str]]] = {}
    reasons: dict[nn.Module, str] = {}
    running: list[nn.Module] = []

    def entered(module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if module not in known:
            return forward(module, *args, **kwargs)
        op, why_own_code = known[module]
        seen = calls.setdefault(module, Counter())
        before = seen.copy()
        running.append(module)
        try:
            return forward(module, *args, **kwargs)
        finally:
            running.pop()
            called = seen - before
            if not any(name.startswith(op) for name, _ in called):
                reason = _reason(module, args, kwargs) or why_own_code(module)
                if reason is not None or not called:
                    reasons[module] = reason or _OTHER_CALL

    def chosen(op: str, backend: str) -> None:
        if running:
            calls[running[-1]][op, backend] += 1

    # Forwards are patched instead of hooked, because modules with hooks run the library's own code.
    with contextlib.ExitStack() as stack:
        for cls in {type(m) for m in modules.values() if isinstance(m, Accelerated)}:
            stack.enter_context(_wrapped_forward(cls, entered))
        stack.enter_context(observe_choices(chosen))
        stack.enter_context(_Plain())
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng())
        model(*inputs, **options)
    result = []
    for path, module in modules.items():
        reason = None
        if not isinstance(module, Accelerated):
            reason = "it no longer has its accelerated class"
        elif module not in calls:
            reason = "it was not called"
        else:
            reason = reasons.get(module)
        result.append(Ran(path, type(module).__name__, dict(calls.get(module, {})), reason))
    return result


_OTHER_CALL = "its own code ran: the op does not accept this call's map, mask, dtype or device"


def _reason(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Return the reason why ``module`` runs its own code in this call, or None.

    The result is always None for a module that is not a copy of published code.
    """
    call = getattr(module, "_swinkernels_call", None)
    if call is None or not args:
        return None
    reason = call(args[0], args[1:], kwargs)
    return reason if isinstance(reason, str) else None


@contextlib.contextmanager
def _wrapped_forward(cls: Any, entered: Callable[..., Any]) -> Iterator[None]:
    own, forward = "forward" in vars(cls), cls.forward
    cls.forward = lambda self, *args, **kwargs: entered(self, forward, args, kwargs)
    try:
        yield
    finally:
        if own:
            cls.forward = forward
        else:
            del cls.forward
