"""Determines the backend that the report shows for each part of a module, and why faster backends cannot run it."""

from __future__ import annotations

from torch import nn

from swinkernels.adapters.adapter import Adapter
from swinkernels.adapters.part import Part
from swinkernels.ops._backends import PREFERENCE, backend_beside, choose, why_no_kernels


def backend_choice(adapter: Adapter, module: nn.Module, requested: str) -> tuple[str, tuple[str, ...]]:
    """Return the backend of a module's first part in eval mode, and remarks that explain why faster ones are not used.

    If the library's own code runs a part, the library's name is returned instead of a backend.
    """
    backends, remarks = [], []
    for part in adapter.parts:
        name = part.name.capitalize()
        chosen, why = _part_choice(adapter, part, module, requested, training=False)
        backends.append(chosen)
        if why:
            remarks.append(f"{name}: {why}")
        in_training, why_in_training = _part_choice(adapter, part, module, requested, training=True)
        # Omit the remark on training if it would repeat the remark on eval mode.
        if in_training != chosen or (why_in_training and not why):
            remarks.append(f"{name} in training: {why_in_training}")
    return backends[0] if backends else adapter.name, tuple(dict.fromkeys(remarks))


def _part_choice(adapter: Adapter, part: Part, module: nn.Module, requested: str, training: bool) -> tuple[str, str]:
    """Return the backend of a part, and the reasons why faster backends cannot run it ("" if there are none)."""
    reason = part.reason_to_fall_back(module)
    if reason is not None:
        return adapter.name, f"{adapter.name}'s own code; {reason}"

    device = adapter.weight(module).device
    no_kernels = why_no_kernels(device) if requested == "auto" else None
    if no_kernels is not None:
        return adapter.name, f"{adapter.name}'s own code; {no_kernels}"

    def why_not(backend: str) -> str:
        return "; ".join(part.reasons(module, backend, training))

    if backend_beside(part.op, requested) != "auto":
        why = why_not(requested)
        return requested, f"{requested} cannot run it: {why}" if why else ""
    chosen = choose("accelerate", "auto", device, lambda backend: part.reasons(module, backend, training))
    faster = PREFERENCE.get(device.type, ())
    faster = faster[: faster.index(chosen)] if chosen in faster else faster
    passed_over = dict.fromkeys(faster if requested == "auto" else (requested, *faster))
    why = ". ".join(f"Not {b}: {why_not(b)}" for b in passed_over)
    return chosen, f"{chosen}. {why}" if why else ""
