"""Which backend runs a call, and why another cannot.

Each backend has one function that lists the reasons it cannot run some inputs; the choice, the error texts and the
test skips all read that list.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from swinkernels import _extension
from swinkernels.ops._arguments import WindowArguments

BACKENDS = ("cuda", "triton", "cpu", "reference")
# What `auto` tries on a device, best first.
PREFERENCE = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

_LOW_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter. Triton decides it when kernels are defined, so it is read once."""
    return _INTERPRETING


_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _not_installed() -> dict[str, str | None]:
    """Per backend, why this installation does not have it, or None."""
    missing: dict[str, str | None] = {"reference": None, "cpu": _extension.error, "cuda": _extension.error}
    if _extension.build is not None:
        info = _extension.build.build_info()
        if not info["cuda"]:
            missing["cuda"] = f"the extension was built without CUDA: {info['cuda_missing']}"
    has_triton = importlib.util.find_spec("triton") is not None
    missing["triton"] = None if has_triton else "triton is not installed (pip install triton)"
    return missing


NOT_INSTALLED = _not_installed()
# Of the values that the argument checks let through, what a backend takes. The CUDA ones come from its own header.
LIMITS: dict[str, dict[str, int]] = {"triton": {"max_window_volume": 256}}
if NOT_INSTALLED["cuda"] is None and _extension.build is not None:
    LIMITS["cuda"] = _extension.build.build_info()["window_attention_limits"]


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything in this process, or None if it can run something."""
    if NOT_INSTALLED[backend] is not None:
        return NOT_INSTALLED[backend]
    if backend == "cuda" or (backend == "triton" and not _INTERPRETING):
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        if torch.cuda.get_device_capability() < (8, 0):
            return f"it needs compute capability 8.0 or newer, got {torch.cuda.get_device_capability()}"
    return None


def window_attention_reasons(
    backend: str, args: WindowArguments, dtype: torch.dtype, device: torch.device
) -> list[str]:
    """The reasons why a backend cannot run these inputs; empty if it can."""
    if backend == "reference":
        return []
    reasons = []
    missing = NOT_INSTALLED[backend]
    if missing is not None:
        reasons.append(missing)
    wanted = "cpu" if backend == "cpu" or (backend == "triton" and _INTERPRETING) else "cuda"
    if device.type != wanted:
        reasons.append(f"it runs on {wanted} tensors, got {device.type}")
    elif wanted == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("it needs a GPU of compute capability 8.0 or newer")
    if dtype not in _LOW_AND_SINGLE:
        reasons.append(f"it has no {dtype} kernel")
    if backend == "triton" and _INTERPRETING and dtype == torch.bfloat16:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    if args.logit_scale is not None:
        reasons.append("it does not implement logit_scale (v2 cosine attention)")
    if args.bias is not None:
        reasons.append("it does not implement a dense bias (bias=)")
    if args.dropout_p > 0.0:
        reasons.append("it does not implement dropout_p")
    limits = LIMITS.get(backend, {})
    largest, multiple = limits.get("max_window_volume", args.window_volume), limits.get("head_dim_multiple", 1)
    if args.window_volume > largest:
        reasons.append(f"it takes windows of at most {largest} tokens, got {args.window_volume}")
    if args.head_dim % multiple != 0:
        reasons.append(f"it takes a head_dim that is a multiple of {multiple}, got {args.head_dim}")
    return reasons


def choose_window_attention(requested: str, args: WindowArguments, dtype: torch.dtype, device: torch.device) -> str:
    """The backend for a call: the requested one, or for "auto" the first that can run it."""
    if requested == "auto":
        for backend in PREFERENCE.get(device.type, ("reference",)):
            if not window_attention_reasons(backend, args, dtype, device):
                return backend
        return "reference"
    if requested not in BACKENDS:
        raise ValueError(f"{args.op}: backend must be 'auto' or one of {BACKENDS}, got {requested!r}")
    reasons = window_attention_reasons(requested, args, dtype, device)
    if reasons:
        raise NotImplementedError(
            f"{args.op}: backend={requested!r} cannot run this call: {'; '.join(reasons)}. "
            "Use backend='auto', which takes one that can."
        )
    return requested
