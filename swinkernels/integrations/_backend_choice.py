"""What a replaced module runs on, and why not on something faster."""

from __future__ import annotations

from torch import nn

from swinkernels.integrations._adapter import Adapter
from swinkernels.ops._arguments import WindowArguments, check_arguments
from swinkernels.ops._backends import PREFERENCE, choose_window_attention, window_attention_reasons


def _window_arguments(adapter: Adapter, module: nn.Module, dropout_p: float) -> WindowArguments:
    arguments = {
        "bias": None,
        "table_window": None,
        "logit_scale": None,
        "pad_before": 0,
        "periodic": False,
        "region_map": None,
        "generator": None,
        "grid": False,
        **adapter.attention_arguments(module),
        "dropout_p": dropout_p,
    }
    weight = adapter.qkv_weight(module)
    head_dim = weight.shape[0] // (3 * arguments["num_heads"])
    no_tokens = weight.new_empty(0)
    return check_arguments("accelerate", no_tokens, adapter.map_size(module), head_dim, **arguments)


def backend_choice(adapter: Adapter, module: nn.Module, requested: str) -> tuple[str, tuple[str, ...]]:
    """The backend of a module's forward pass in eval mode, and remarks on why it is not a faster one."""
    weight = adapter.qkv_weight(module)
    dtype, device = weight.dtype, weight.device

    def choose(dropout_p: float) -> tuple[str, str]:
        args = _window_arguments(adapter, module, dropout_p)

        def why_not(backend: str) -> str:
            return "; ".join(window_attention_reasons(backend, args, dtype, device))

        if requested != "auto":
            reasons = why_not(requested)
            return requested, f"{requested} cannot run it: {reasons}" if reasons else ""
        chosen = choose_window_attention("auto", args, dtype, device)
        preference = PREFERENCE.get(device.type)
        if preference is None:
            return chosen, f"no fast backend runs on {device.type} tensors"
        return chosen, ". ".join(f"Not {b}: {why_not(b)}" for b in preference[: preference.index(chosen)])

    backend, why = choose(0.0)
    remarks = [why] if why else []
    p = adapter.dropout_p(module)
    in_training, why_in_training = choose(p)
    # Nothing new is said where a backend is already out of the question in eval mode.
    if in_training != backend or (why_in_training and not why):
        remarks.append(f"In training, with attention dropout {p:g}: {in_training}. {why_in_training}")
    return backend, tuple(remarks)
