"""What a part of a module runs on, for the report, and why it is not something faster."""

from __future__ import annotations

from torch import nn

from swinkernels.adapters.adapter import Adapter
from swinkernels.adapters.part import Part
from swinkernels.ops._backends import PREFERENCE, choose, why_no_kernels


def backend_choice(adapter: Adapter, module: nn.Module, requested: str) -> tuple[str, tuple[str, ...]]:
    """The backend of a module's first part in eval mode, and remarks on what runs on none or not on a faster one.

    Where the library's own code runs, its name stands for the backend.
    """
    backends, remarks = [], []
    for part in adapter.parts:
        name = part.name.capitalize()
        chosen, why = _part_choice(adapter, part, module, requested, training=False)
        backends.append(chosen)
        if why:
            remarks.append(f"{name}: {why}")
        in_training, why_in_training = _part_choice(adapter, part, module, requested, training=True)
        # Nothing new is said where a backend is already out of the question in eval mode.
        if in_training != chosen or (why_in_training and not why):
            remarks.append(f"{name} in training: {why_in_training}")
    return backends[0] if backends else adapter.name, tuple(dict.fromkeys(remarks))


def _part_choice(adapter: Adapter, part: Part, module: nn.Module, requested: str, training: bool) -> tuple[str, str]:
    """What runs a part, and why nothing faster does."""
    own_code = f"{adapter.name}'s own code"
    reason = part.reason_to_fall_back(module)
    if reason is not None:
        return adapter.name, f"{own_code}; {reason}"

    device = adapter.weight(module).device
    no_kernels = why_no_kernels(device) if requested == "auto" else None
    if no_kernels is not None:
        return adapter.name, f"{own_code}; {no_kernels}"

    def why_not(backend: str) -> str:
        return "; ".join(part.reasons(module, backend, training))

    if requested != "auto":
        why = why_not(requested)
        if not why:
            return requested, ""
        cannot = f"{requested} cannot run it: {why}"
        return (adapter.name, f"{own_code}. {cannot}") if part.or_own_code else (requested, cannot)
    chosen = choose("accelerate", "auto", device, lambda backend: part.reasons(module, backend, training))
    better = PREFERENCE.get(device.type, ())
    better = better[: better.index(chosen)] if chosen in better else better
    why = ". ".join(f"Not {b}: {why_not(b)}" for b in better)
    own = chosen == "torch" and part.or_own_code
    return adapter.name if own else chosen, f"{own_code if own else chosen}. {why}" if why else ""
