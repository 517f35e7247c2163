"""Backend support and choice: one function per op lists the reasons why a backend cannot run a call.

Backend choice, error messages and test skips all use these reasons. The function for window attention is next to its
op, in ``ops/window_attention.py``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from swinkernels import _extension
from swinkernels.ops._library import constant_when_compiled

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
# The backends with kernels that "auto" tries on each device, best first. If none can run the call, "auto" falls back to
# "torch".
PREFERENCE = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
# Backends in plain PyTorch, which run every op: the fast code (ops/fallback.py) and the reference.
PLAIN = ("torch", "reference")

# The backends with kernels for each op. The entry for window_partition also covers window_reverse.
IMPLEMENTED = {
    "window_attention": ("cuda", "triton", "cpu"),
    "window_partition": ("cuda", "triton"),
    "patch_merging": ("cuda", "triton"),
    "patch_embed": (),
    "layer_norm": ("cuda",),
    "residual_layer_norm": ("cuda",),
    "mlp_half": ("triton",),  # the whole half as one kernel; other backends compose it from the ops above
}

_LOW_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
# The pairs of dtypes that a norm's kernel can read and write: equal ones, or float32 and another, in either order.
NORM_DTYPES = frozenset((a, b) for a in _LOW_AND_SINGLE for b in _LOW_AND_SINGLE if a == b or torch.float32 in (a, b))


def interpreting() -> bool:
    """Return True if Triton runs in its CPU interpreter. Triton decides this when a kernel is defined."""
    return _INTERPRETING


_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _not_installed() -> dict[str, str | None]:
    """Return, for each backend, the reason why it is not installed, or None."""
    missing: dict[str, str | None] = {**dict.fromkeys(PLAIN), "cpu": _extension.error, "cuda": _extension.error}
    if _extension.build is not None:
        if not _extension.build["cuda"]:
            missing["cuda"] = f"the extension was built without CUDA: {_extension.build['cuda_missing']}"
    has_triton = importlib.util.find_spec("triton") is not None
    missing["triton"] = None if has_triton else "triton is not installed (pip install triton)"
    return missing


NOT_INSTALLED = _not_installed()
# Limits of a backend that are narrower than the limits in the argument checks. The kernels' headers define them.
LIMITS: dict[str, dict[str, int]] = {}
MLP_HALF_CHANNELS, MLP_HALF_CHUNK = (96, 192), 32  # channels, and the divisor of the hidden channels
NORM_LIMITS: dict[str, int] = {"triton": 8192}  # the longest row
if NOT_INSTALLED["cuda"] is None and _extension.build is not None:
    LIMITS["cuda"] = _extension.build["window_attention_limits"]
    NORM_LIMITS["cuda"] = _extension.build["layer_norm_limits"]["max_row"]


def has_machine_code(arch_list: list[str], capability: tuple[int, int]) -> bool:
    """Return True if kernels compiled for ``arch_list`` ("8.0", "9.0+PTX", ...) run on GPUs of ``capability``."""
    for arch in arch_list:
        match = re.fullmatch(r"(\d+)\.(\d+)(a|f)?(\+PTX)?", arch)
        if match is None:
            return True  # a name, such as Ampere, that only torch's build tools can resolve
        major, minor, specific, ptx = int(match[1]), int(match[2]), match[3], match[4]
        if specific:
            if (major, minor) == capability:
                return True
        elif (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


@constant_when_compiled
def gpu_reason(backend: str, device: torch.device) -> str | None:
    """Return why the kernels of ``backend`` do not run on the GPU ``device``, or None if they do; cached per GPU."""
    return _find_gpu_reason(backend, device)


@functools.cache
def _find_gpu_reason(backend: str, device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"it needs a GPU of compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    if backend == "cuda" and _extension.build is not None:
        built = _extension.build["arch_list"]
        if not has_machine_code(built, capability):
            return (
                f"its kernels were built for {' '.join(built)}, but the GPU is {capability[0]}.{capability[1]}: build "
                "again with TORCH_CUDA_ARCH_LIST unset, or with that architecture in it"
            )
    return None


@constant_when_compiled
def why_no_kernels(device: torch.device) -> str | None:
    """Return why "auto" finds no kernel for any call on ``device``, or None if it may find one."""
    return _find_why_no_kernels(device)


@functools.cache
def _find_why_no_kernels(device: torch.device) -> str | None:
    if device.type == "meta":  # a meta tensor stands for any device
        return None
    if device.type not in PREFERENCE:
        return f"no kernel runs on {device.type} tensors"
    if device.type == "cuda" and torch.version.hip is not None:
        return "no kernel is tested on ROCm: to run Triton's kernels anyway, pass backend='triton'"
    return gpu_reason("triton", device) if device.type == "cuda" else None


def unavailable(backend: str) -> str | None:
    """Return why a backend cannot run any call in this process, or None if it can run some."""
    if NOT_INSTALLED[backend] is not None:
        return NOT_INSTALLED[backend]
    if backend == "cuda" or (backend == "triton" and not _INTERPRETING):
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        return gpu_reason(backend, torch.device("cuda", torch.cuda.current_device()))
    return None


def _reasons(backend: str, op: str, device: torch.device) -> list[str]:
    """List the reasons against a backend that depend only on the op and the device."""
    if backend not in IMPLEMENTED[op]:
        return [f"it does not implement {op}"]
    reasons = []
    missing = NOT_INSTALLED[backend]
    if missing is not None:
        reasons.append(missing)
    wanted = "cpu" if backend == "cpu" or (backend == "triton" and _INTERPRETING) else "cuda"
    if device.type != wanted:
        reasons.append(f"it runs on {wanted} tensors, got {device.type}")
    elif wanted == "cuda" and (reason := gpu_reason(backend, device)) is not None:
        reasons.append(reason)
    return reasons


def _dtype_reasons(backend: str, *dtypes: torch.dtype) -> list[str]:
    reasons = [f"it has no {dtype} kernel" for dtype in dict.fromkeys(dtypes) if dtype not in _LOW_AND_SINGLE]
    if backend == "triton" and _INTERPRETING and torch.bfloat16 in dtypes:
        reasons.append("Triton's interpreter computes bfloat16 wrongly")
    return reasons


def _longest_window(backend: str, device: torch.device) -> int | None:
    """Return the largest window volume that ``backend`` accepts on ``device``, or None if only the op limits it."""
    limits = LIMITS.get(backend)
    if limits is None or device.type != "cuda":
        return None
    return limits["max_window_volume" if has_room_for_longest(backend, device) else "max_window_volume_in_less"]


def has_room_for_longest(backend: str, device: torch.device) -> bool:
    """Return False for a GPU with too little shared memory per block for the largest windows, otherwise True."""
    return device.type != "cuda" or _shared_bytes(device) >= LIMITS[backend]["shared_bytes_of_longest"]


@constant_when_compiled
def _shared_bytes(device: torch.device) -> int:
    """Return the maximum shared memory per block on the GPU ``device``, in bytes."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def window_volume_reasons(backend: str, volume: int, device: torch.device) -> list[str]:
    """List the reason, if any, why ``backend`` does not accept windows of ``volume`` tokens."""
    largest = _longest_window(backend, device)
    if largest is None or volume <= largest:
        return []
    whole = LIMITS[backend]["max_window_volume"]
    room = f" on a GPU with {_shared_bytes(device) // 1024} KB of shared memory per block" if largest < whole else ""
    return [f"it takes windows of at most {largest} tokens{room}, got {volume}"]


def window_partition_reasons(backend: str, device: torch.device) -> list[str]:
    """List the reasons why a backend cannot partition a map into windows or reverse the partition."""
    return [] if backend in PLAIN else _reasons(backend, "window_partition", device)


def norm_reasons(
    backend: str, op: str, row: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> list[str]:
    """List the reasons why ``backend`` cannot run the norm of ``op``.

    ``row`` is the number of elements normalised together, ``dtypes`` the dtypes read and written.
    """
    if backend in PLAIN:
        return []
    reasons = _reasons(backend, op, device) + _dtype_reasons(backend, *dtypes)
    if not reasons and dtypes not in NORM_DTYPES:
        reasons.append(f"it has no kernel that reads {dtypes[0]} and writes {dtypes[1]}")
    longest = NORM_LIMITS.get(backend, row)
    if row > longest:
        reasons.append(f"it normalises at most {longest} elements together, got {row}")
    return reasons


def residual_reasons(
    backend: str, row: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> list[str]:
    """List the reasons why a backend cannot run a residual connection with a norm.

    ``dtypes`` are the dtypes of the residual stream and of the branch.
    """
    reasons = norm_reasons(backend, "residual_layer_norm", row, dtypes, device)
    stream, branch = dtypes
    if backend not in PLAIN and stream != torch.float32 and branch == torch.float32:
        reasons.append(f"it can only add a branch of the stream's dtype or a narrower one, got {branch} for {stream}")
    return reasons


def patch_merging_reasons(
    backend: str, norm: str, row: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> list[str]:
    """List the reasons why a backend cannot merge patches.

    ``norm`` is "pre" for a norm before the reduction, "post" for one after it.
    """
    if norm == "pre":
        return norm_reasons(backend, "patch_merging", row, dtypes, device)
    # With backend "triton", torch computes the norm after the reduction.
    of_norm = [] if backend == "triton" else norm_reasons(backend, "layer_norm", row, dtypes, device)
    return list(dict.fromkeys(window_partition_reasons(backend, device) + of_norm))


def patch_embed_reasons(backend: str, device: torch.device) -> list[str]:
    """List the reasons why a backend cannot embed patches. Only plain PyTorch has this op."""
    return [] if backend in PLAIN else _reasons(backend, "patch_embed", device)


def mlp_half_reasons(
    backend: str,
    widths: tuple[int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    device: torch.device,
    unsupported: Sequence[str],
) -> list[str]:
    """List the reasons why a backend cannot run a whole MLP half as one kernel.

    ``widths`` are the numbers of channels and of hidden channels, ``dtypes`` the dtypes of x and of the products, and
    ``unsupported`` names the arguments of the call that the kernel does not support.
    """
    reasons = _reasons(backend, "mlp_half", device) + _dtype_reasons(backend, *dtypes)
    if not reasons and (dtypes not in NORM_DTYPES or dtypes[1] == torch.float32):
        reasons.append(f"it has no kernel that reads {dtypes[0]} and multiplies {dtypes[1]}")
    channels, hidden = widths
    if channels not in MLP_HALF_CHANNELS:
        reasons.append(f"it takes {' or '.join(map(str, MLP_HALF_CHANNELS))} channels, got {channels}")
    if hidden % MLP_HALF_CHUNK != 0:
        reasons.append(f"it takes a multiple of {MLP_HALF_CHUNK} hidden channels, got {hidden}")
    return reasons + [f"it does not implement {name}" for name in unsupported]


def check_backend(op: str, requested: Any) -> None:
    """Raise ValueError unless ``requested`` is "auto" or the name of a backend."""
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"{op}: backend must be 'auto' or one of {BACKENDS}, got {requested!r}")


def choose(op: str, requested: str, device: torch.device, reasons_of: Callable[[str], list[str]]) -> str:
    """Return the backend for a call of ``op``; ``reasons_of`` lists the reasons against each backend."""
    check_backend(op, requested)
    reasons = [] if requested == "auto" else reasons_of(requested)
    if requested != "auto" and not reasons:
        return _observed(op, requested)
    candidates = PREFERENCE[device.type] if why_no_kernels(device) is None and device.type in PREFERENCE else ()
    best = next((b for b in candidates if not reasons_of(b)), "torch")
    if reasons:
        raise NotImplementedError(
            f"{op}: backend={requested!r} cannot run this call: {'; '.join(reasons)}. "
            f"Use backend='auto', which takes {best!r} here."
        )
    return _observed(op, best)


_OBSERVERS: list[Callable[[str, str], None]] = []


def _observed(op: str, backend: str) -> str:
    for observe in _OBSERVERS:
        observe(op, backend)
    return backend


@contextlib.contextmanager
def observe_choices(observe: Callable[[str, str], None]) -> Iterator[None]:
    """Call ``observe(op, backend)`` whenever a backend is chosen; op calls found in the call cache choose none."""
    _OBSERVERS.append(observe)
    try:
        yield
    finally:
        _OBSERVERS.remove(observe)


def backend_beside(op: str, requested: str) -> str:
    """Return the backend for ``op`` called next to attention: ``requested`` if that implements ``op``, else "auto"."""
    return requested if requested in ("auto", *PLAIN, *IMPLEMENTED[op]) else "auto"
