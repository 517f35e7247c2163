"""Defines accelerate and restore, which swap the classes of a model's supported modules."""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from swinkernels.adapters.adapter import (
    SUPPORTED,
    Accelerated,
    Adapter,
    derived_since,
    loaded_adapters,
    original_class,
    restore_class,
    swap_class,
)
from swinkernels.adapters.backend_choice import backend_choice
from swinkernels.adapters.bypass import why_distributed
from swinkernels.adapters.copies import attention, block, lookalike
from swinkernels.adapters.copies.dynamic_class import NAME as STRUCTURAL
from swinkernels.adapters.copies.trial import told_after_seconds
from swinkernels.adapters.forms import described, published, weather
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.report import NotRecomputed, Replaced, Report, Skipped, outermost
from swinkernels.adapters.verify import verify as verify_module
from swinkernels.ops._backends import check_backend, why_no_kernels


def accelerate(model: nn.Module, *, backend: str = "auto", recompute: bool = False, verify: bool = False) -> Report:
    """Make the supported modules of a model use this package's ops, in place.

    Only the modules' classes change, to subclasses that compute the same results with ops. Parameters, buffers,
    ``state_dict``, hooks and ``isinstance`` are unaffected, ``copy.deepcopy`` and ``pickle`` work, and :func:`restore`
    undoes the change. Call ``accelerate`` again to change the backend, or after changing the model.

    Args:
        model: any module, on any device, in any dtype. It may contain modules for which there is an adapter or a form,
            and copies of Microsoft's Swin block from any package. Modules with a form, and copies, are replaced only if
            a trial on random inputs gives the same results with ops as with the module's own forward.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference", as for the ops. "auto" chooses at every call.
            On a device without kernels it leaves all work to the library's own code; elsewhere, calls that no kernel
            can run use plain PyTorch. A named backend raises NotImplementedError for a call that it cannot run, except
            that norms, residual connections and patch merging are left to "auto" if the backend has no such op.
        recompute: if True, blocks compute norms and GELU again in the backward pass of eager training instead of
            saving their results. This applies to the Swin blocks of timm, torchvision, transformers, MONAI and
            mmpretrain, and to copies; ``Report.not_recomputed`` lists the other modules, with the reasons. A training
            step of timm's Swin-T then keeps 0.6 times as many bytes for the backward pass as with the original model;
            without ``recompute``, 0.92 times.
        verify: if True, first compare each replaced module's outputs and gradients with the original's, on a random map
            of the size that the module was made for, if it stores one.

    Returns:
        A :class:`Report` that lists the replaced modules with their backends, and the modules left as they were, with
        the reasons. If the model contains no supported module, ``Report.reason`` says so.

    Raises:
        TypeError: ``model`` is not a module, or ``recompute`` is not a bool.
        ValueError: ``backend`` is not one of these names.
        VerificationError: ``verify`` found a module that differs; the model is unchanged.
    """
    _check_module("accelerate", model)
    check_backend("accelerate", backend)
    if not isinstance(recompute, bool):
        raise TypeError(f"accelerate: recompute must be a bool, got {recompute!r}")
    report = Report()
    to_accelerate: dict[nn.Module, Adapter] = {}
    paths: dict[nn.Module, str] = {}
    to_restore: list[nn.Module] = []
    with told_after_seconds():
        adapters, forms = loaded_adapters()
        candidates = list(_candidates(model, adapters, [*forms, *published.FORMS, *weather.FORMS]))
    for path, module, adapter, reason in candidates:
        if adapter is not None and reason is None:
            reason = why_distributed(module) or adapter.reason_to_skip(module)
        name = original_class(module).__name__
        if adapter is None or reason is not None:
            library = STRUCTURAL if adapter is None else adapter.name
            report.skipped.append(Skipped(path, name, library, str(reason)))
            was_changed = isinstance(module, Accelerated) and not derived_since(module)
            if was_changed and why_distributed(module) is None:  # a sharded module stays as it is
                to_restore.append(module)
            continue
        chosen, remarks = backend_choice(adapter, module, backend)
        report.replaced.append(Replaced(path, name, adapter.name, chosen, remarks))
        to_accelerate[module], paths[module] = adapter, path
    if verify:
        for module, path in paths.items():
            verify_module(to_accelerate, path, module, backend, recompute)
    report._model = weakref.ref(model)
    for module, adapter in to_accelerate.items():
        main = adapter.parts[0].op if adapter.parts else ""
        report._parts[paths[module]] = main, functools.partial(_why_own_code, adapter)
        swap_class(adapter, module, backend, recompute)
    for module in to_restore:
        restore_class(module)
    if recompute:
        _note_not_recomputed(report, {paths[module]: (adapter, module) for module, adapter in to_accelerate.items()})
    if not report.replaced and not report.skipped:
        report.reason = f"Nothing to replace in {type(model).__name__}: it contains no {SUPPORTED}."
    return report


def _note_not_recomputed(report: Report, replaced: dict[str, tuple[Adapter, nn.Module]]) -> None:
    """Add to ``report.not_recomputed`` the modules of ``replaced`` for which recompute=True has no effect in training.

    A stage that only calls blocks is not added, but its blocks are.
    """
    for entry in outermost([entry for entry in report.replaced if replaced[entry.path][0].parts]):
        adapter, module = replaced[entry.path]
        reason = adapter.why_not_recompute(module)
        if reason is None and module._swinkernels_backend == "auto":
            no_kernels = why_no_kernels(adapter.weight(module).device)
            reason = None if no_kernels is None else f"{adapter.name}'s own code runs; {no_kernels}"
        if reason is not None:
            report.not_recomputed.append(NotRecomputed(entry.path, entry.module_class, entry.adapter, reason))


def _why_own_code(adapter: Adapter, module: nn.Module) -> str | None:
    """Return the reason why the library's own code runs in parts of ``module``, or None."""
    reasons = (part.reason_to_fall_back(module) for part in adapter.parts)
    return "; ".join(dict.fromkeys(reason for reason in reasons if reason is not None)) or None


def restore(model: nn.Module) -> None:
    """Undo :func:`accelerate`: give every replaced module its original class again. Other modules stay as they are.

    Raises:
        TypeError: ``model`` is not a module.
        RuntimeError: other code has changed the class of a replaced module, as ``fully_shard`` does; nothing is undone.
    """
    _check_module("restore", model)
    for path, module in model.named_modules():
        if derived_since(module):
            raise RuntimeError(
                f"restore: other code, such as torch's fully_shard, derived the class {type(module).__name__} of "
                f"{path or 'the model'} from an accelerated class: restore the model before running that code"
            )
    for module in model.modules():
        restore_class(module)


def _check_module(op: str, model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")


# Path, module, its adapter (None if the module only resembles a supported one) and, if known, the reason to leave the
# module as it is.
Candidate = tuple[str, nn.Module, Adapter | None, str | None]


def _candidates(model: nn.Module, adapters: list[Adapter], forms: list[Form]) -> Iterator[Candidate]:
    """Yield a Candidate for each module that has an adapter or a form, or that resembles such a module.

    A module that occurs several times in the model is visited once. An adapter registered for the module's exact class
    takes precedence.
    """
    by_class = {cls: adapter for adapter in adapters for cls in (adapter.original, adapter.accelerated)}

    def adapter_of(module: nn.Module) -> tuple[Adapter | None, bool]:
        """Return the adapter of the module's class and True, or of its base class and False."""
        exact = by_class.get(type(module))
        found = exact or next((adapter for adapter in adapters if isinstance(module, adapter.original)), None)
        return (found, exact is not None) if found is not None and found.concerns(module) else (None, False)

    seen: set[nn.Module] = set()

    def walk(path: str, module: nn.Module, reported: bool = False) -> Iterator[Candidate]:
        if module in seen:
            return
        seen.add(module)
        closed = _closed(module)
        if closed is not None:
            seen.update(module.modules())
            inside = list(module.modules())
            found = {a.name: a for a in reversed(adapters) if any(_resembles(m, a) for m in inside)}
            for of_library in found.values():  # one per library
                yield path, module, of_library, closed
            named = [form.name for form in forms if any(form.fits(m) for m in inside)]
            if named:
                yield path, module, None, f"{closed} ({', '.join(named)})"
            elif any(block.resembles(m) and not any(_resembles(m, a) for a in adapters) for m in inside):
                yield path, module, None, closed
            return
        adapter, is_exact = adapter_of(module)
        if is_exact:
            yield path, module, adapter, None
        elif adapter is not None:
            name = type(module).__name__
            why = "derived from an accelerated class" if derived_since(module) else "which may compute something else"
            yield path, module, adapter, f"{name} is a subclass, {why}"
        elif derived_since(module):
            yield path, module, None, f"{type(module).__name__} is a subclass, derived from an accelerated class"
        else:
            adapter, reason = (
                described.match(module, forms) or block.match(module) or attention.match(module) or (None, None)
            )
            if adapter is None and reason is None:
                unknown = lookalike.why_unknown(module)
                reason = None if reported else unknown
            # Once a block is reported, its attention module is reported only if that module is replaced.
            if adapter is not None or (reason is not None and not reported):
                yield path, module, adapter, reason
            reported = reported or adapter is not None or reason is not None
        if adapter is not None and not adapter.looks_inside:
            return
        for name, child in module.named_children():
            yield from walk(f"{path}.{name}" if path else name, child, reported)

    yield from walk("", model)


def _resembles(module: nn.Module, adapter: Adapter) -> bool:
    original = adapter.original
    if isinstance(module, original):
        return adapter.concerns(module)
    if isinstance(module, torch.jit.ScriptModule):  # its class differs, but it records the original class's name
        name = str(module._c._type().qualified_name())
        return module.original_name == original.__name__ and f".{original.__module__}." in name
    return False


def _closed(module: nn.Module) -> str | None:
    """Return the reason why ``module`` and the modules inside it must not be changed, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is compiled by TorchScript: accelerate the model before compiling it"
    if isinstance(module, torch.fx.GraphModule):
        return "it is a torch.fx graph: accelerate the model before tracing it"
    eval_frame = sys.modules.get("torch._dynamo.eval_frame")  # an import would take seconds
    compiled = eval_frame is not None and isinstance(module, eval_frame.OptimizedModule)
    if compiled or getattr(module, "_compiled_call_impl", None) is not None:
        return "it is compiled by torch.compile: accelerate the model first, then compile it"
    return None
