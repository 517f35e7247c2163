"""accelerate and restore: they find the modules that an adapter knows and swap their classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from swinkernels.integrations._adapter import (
    SUPPORTED,
    Accelerated,
    Adapter,
    loaded_adapters,
    original_class,
    put_in_place,
    take_back,
)
from swinkernels.integrations._backend_choice import backend_choice
from swinkernels.integrations._report import Replaced, Report, Skipped
from swinkernels.integrations._verify import verify as _verify
from swinkernels.ops._backends import check_backend


def accelerate(model: nn.Module, *, backend: str = "auto", verify: bool = False) -> Report:
    """Let the supported modules of a model run on this package's ops, in place.

    Only the class of a module changes, to a subclass that computes the same in another way: parameters, buffers,
    ``state_dict``, hooks and ``isinstance`` stay, ``copy.deepcopy`` and ``pickle`` work, and :func:`restore` undoes it.
    It may be called again, with another backend, or after the model was changed.

    Args:
        model: any module; supported are Swin Transformer blocks and their like of the libraries that have an adapter,
            on any device, in any dtype.
        backend: "auto", "cuda", "triton", "cpu" or "reference", as in the ops. "auto" chooses at every call. Norms,
            residual connections and patch merging stay the library's own code where "auto" finds no fast backend and
            where the named one does not have them; attention is then the reference's, or refused.
        verify: compare each replaced module with the original on a random map, of the module's own size if it has one,
            outputs and gradients, before anything is changed.

    Returns:
        A :class:`Report` of what was replaced, what it runs on, and what was left and why. A model without supported
        modules is left as it is, and ``Report.reason`` says so.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: there is no such backend.
        VerificationError: ``verify`` found a module that differs; the model is as it was.
    """
    _check_module("accelerate", model)
    check_backend("accelerate", backend)
    report = Report()
    to_accelerate: dict[nn.Module, Adapter] = {}
    paths: dict[nn.Module, str] = {}
    to_restore: list[nn.Module] = []
    for path, module, adapter, reason in _candidates(model, loaded_adapters()):
        if reason is None:
            reason = adapter.reason_to_skip(module)
        name = original_class(module).__name__
        if reason is not None:
            report.skipped.append(Skipped(path, name, adapter.name, reason))
            if isinstance(module, Accelerated):  # it has been changed since
                to_restore.append(module)
            continue
        chosen, remarks = backend_choice(adapter, module, backend)
        report.replaced.append(Replaced(path, name, adapter.name, chosen, remarks))
        to_accelerate[module], paths[module] = adapter, path
    if verify:
        for module, path in paths.items():
            _verify(to_accelerate, path, module, backend)
    for module, adapter in to_accelerate.items():
        put_in_place(adapter, module, backend)
    for module in to_restore:
        take_back(module)
    if not report.replaced and not report.skipped:
        report.reason = f"Nothing to replace in {type(model).__name__}: it contains no {SUPPORTED}."
    return report


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: every replaced module is the library's own again. Other modules are left alone.

    Raises:
        TypeError: ``model`` is not a module.
    """
    _check_module("restore", model)
    for module in model.modules():
        take_back(module)


def _check_module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


def _candidates(model: nn.Module, adapters: list[Adapter]) -> Iterator[tuple[str, nn.Module, Adapter, str | None]]:
    """Every module that an adapter knows, each once: path, module, adapter and, if it is clear, why not to touch it."""
    by_class = {cls: adapter for adapter in adapters for cls in (adapter.original, adapter.accelerated)}
    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, Adapter, str | None]]:
        if module in seen:
            return
        seen.add(module)
        closed = _closed(module)
        if closed is not None:
            seen.update(module.modules())
            inside = list(module.modules())
            found = {a.name: a for a in reversed(adapters) if any(_resembles(m, a) for m in inside)}
            for adapter in found.values():  # one of each library
                yield path, module, adapter, closed
            return
        known = by_class.get(type(module))
        if known is not None:
            yield path, module, known, None
        else:
            known = next((adapter for adapter in adapters if isinstance(module, adapter.original)), None)
            if known is not None:
                name = type(module).__name__
                yield path, module, known, f"{name} is a subclass, which may compute something else"
        if known is not None and not known.looks_inside:
            return
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child)

    yield from walk("", model)


def _resembles(module: nn.Module, adapter: Adapter) -> bool:
    original = adapter.original
    if isinstance(module, torch.jit.ScriptModule):  # it has another class, and remembers its first one
        name = str(module._c._type().qualified_name())
        return module.original_name == original.__name__ and f".{original.__module__}." in name
    return isinstance(module, original)


def _closed(module: nn.Module) -> str | None:
    """Why nothing inside a module may be changed, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: accelerate the model before"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a torch.fx graph: accelerate the model before making it"
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # an import would take seconds
    compiled = eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)
    if compiled or getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled by torch.compile: accelerate the model first, then compile it"
    return None
