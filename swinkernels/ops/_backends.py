"""Which backend runs a call, and why another cannot.

Each op has one function that lists the reasons why a backend cannot run some inputs; the choice, the error texts and
the test skips all read that list. Window attention's is beside its op, where its options are.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from swinkernels import _extension
from swinkernels.ops._library import constant_when_compiled

BACKENDS = ("cuda", "triton", "cpu", "torch", "reference")
# What `auto` tries on a device, best first; where none of these runs a call, and on other devices, it takes "torch".
PREFERENCE = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}
# Plain PyTorch, which runs every op: fast code (ops/fallback.py), and the definition.
PLAIN = ("torch", "reference")

# Which kernels an op has. window_partition stands for window_reverse, too.
IMPLEMENTED = {
    "window_attention": ("cuda", "triton", "cpu"),
    "window_partition": ("cuda", "triton"),
    "patch_merging": ("cuda", "triton"),
    "layer_norm": ("cuda",),
    "residual_layer_norm": ("cuda",),
}

_LOW_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
# What a norm's kernel reads and writes: one dtype, or the two of autocast, in either order.
NORM_DTYPES = frozenset((a, b) for a in _LOW_AND_SINGLE for b in _LOW_AND_SINGLE if a == b or torch.float32 in (a, b))


def interpreting() -> bool:
    """Whether Triton runs in its CPU interpreter. Triton decides it when kernels are defined, so it is read once."""
    return _INTERPRETING


_INTERPRETING = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


def _not_installed() -> dict[str, str | None]:
    """Per backend, why this installation does not have it, or None."""
    missing: dict[str, str | None] = {**dict.fromkeys(PLAIN), "cpu": _extension.error, "cuda": _extension.error}
    if _extension.build is not None:
        if not _extension.build["cuda"]:
            missing["cuda"] = f"the extension was built without CUDA: {_extension.build['cuda_missing']}"
    has_triton = importlib.util.find_spec("triton") is not None
    missing["triton"] = None if has_triton else "triton is not installed (pip install triton)"
    return missing


NOT_INSTALLED = _not_installed()
# Of the values that the argument checks let through, what a backend takes: its header says.
LIMITS: dict[str, dict[str, int]] = {}
NORM_LIMITS: dict[str, int] = {"triton": 8192}  # the longest row
if NOT_INSTALLED["cuda"] is None and _extension.build is not None:
    LIMITS["cuda"] = _extension.build["window_attention_limits"]
    NORM_LIMITS["cuda"] = _extension.build["layer_norm_limits"]["max_row"]


def has_machine_code(arch_list: list[str], capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for arch_list ("8.0", "9.0+PTX", ...) run on a GPU of a compute capability."""
    for arch in arch_list:
        match = re.fullmatch(r"(\d+)\.(\d+)(a|f)?(\+PTX)?", arch)
        if match is None:
            return True  # a name, such as Ampere: torch's tools know what it stands for
        major, minor, specific, ptx = int(match[1]), int(match[2]), match[3], match[4]
        if specific:
            if (major, minor) == capability:
                return True
        elif (major == capability[0] and minor <= capability[1]) or (ptx and (major, minor) <= capability):
            return True
    return False


@constant_when_compiled
def gpu_reason(backend: str, device: torch.device) -> str | None:
    """Why a backend's kernels do not run on a GPU, or None. A GPU does not change, so it is asked once."""
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
                f"its kernels were built for {' '.join(built)}, the GPU is {capability[0]}.{capability[1]}: build "
                "again with TORCH_CUDA_ARCH_LIST unset, or with that architecture in it"
            )
    return None


@constant_when_compiled
def why_no_kernels(device: torch.device) -> str | None:
    """Why "auto" finds no kernel on a device whatever the call, or None."""
    return _find_why_no_kernels(device)


@functools.cache
def _find_why_no_kernels(device: torch.device) -> str | None:
    if device.type == "meta":  # without values: as on any device
        return None
    if device.type not in PREFERENCE:
        return f"no kernel runs on {device.type} tensors"
    if device.type == "cuda" and torch.version.hip is not None:
        return "no kernel is tested on ROCm: backend='triton' asks for those of Triton"
    return gpu_reason("triton", device) if device.type == "cuda" else None


def unavailable(backend: str) -> str | None:
    """Why a backend cannot run anything in this process, or None if it can run something."""
    if NOT_INSTALLED[backend] is not None:
        return NOT_INSTALLED[backend]
    if backend == "cuda" or (backend == "triton" and not _INTERPRETING):
        if not torch.cuda.is_available():
            return "torch sees no CUDA GPU"
        return gpu_reason(backend, torch.device("cuda", torch.cuda.current_device()))
    return None


def _reasons(backend: str, op: str, device: torch.device) -> list[str]:
    """The reasons that do not depend on what an op is given but for the device."""
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
    """The most tokens of a window that a backend takes, if that is fewer than the op takes."""
    limits = LIMITS.get(backend)
    if limits is None or device.type != "cuda":
        return None
    has_room = _shared_bytes(device) >= limits["shared_bytes_of_longest"]
    return limits["max_window_volume" if has_room else "max_window_volume_in_less"]


@constant_when_compiled
def _shared_bytes(device: torch.device) -> int:
    """The shared memory that a block may have on a GPU."""
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def window_volume_reasons(backend: str, volume: int, device: torch.device) -> list[str]:
    """Why a backend cannot take windows of so many tokens, as a list of one reason or none."""
    largest = _longest_window(backend, device)
    if largest is None or volume <= largest:
        return []
    whole = LIMITS[backend]["max_window_volume"]
    room = f" where a block has {_shared_bytes(device) // 1024} KB of shared memory" if largest < whole else ""
    return [f"it takes windows of at most {largest} tokens{room}, got {volume}"]


def window_partition_reasons(backend: str, device: torch.device) -> list[str]:
    """The reasons why a backend cannot cut a map into windows or put them back; empty if it can."""
    return [] if backend in PLAIN else _reasons(backend, "window_partition", device)


def norm_reasons(
    backend: str, op: str, row: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> list[str]:
    """The reasons why a backend cannot run an op that normalises rows; empty if it can.

    ``row`` is how many elements are normalised together, ``dtypes`` are those that are read and written.
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
    """As norm_reasons, for a residual connection and its norm; ``dtypes`` are those of the stream and the branch."""
    reasons = norm_reasons(backend, "residual_layer_norm", row, dtypes, device)
    stream, branch = dtypes
    if backend not in PLAIN and stream != torch.float32 and branch == torch.float32:
        reasons.append(f"it adds a branch of the stream's dtype or a narrower one, got {branch} to {stream}")
    return reasons


def patch_merging_reasons(
    backend: str, norm: str, row: int, dtypes: tuple[torch.dtype, torch.dtype], device: torch.device
) -> list[str]:
    """As norm_reasons, for patch merging with its norm before the reduction ("pre") or after it ("post")."""
    if norm == "pre":
        return norm_reasons(backend, "patch_merging", row, dtypes, device)
    # Triton cuts the windows, and torch normalises.
    of_norm = [] if backend == "triton" else norm_reasons(backend, "layer_norm", row, dtypes, device)
    return list(dict.fromkeys(window_partition_reasons(backend, device) + of_norm))


def check_backend(op: str, requested: Any) -> None:
    """Refuse what is neither "auto" nor the name of a backend."""
    if requested != "auto" and requested not in BACKENDS:
        raise ValueError(f"{op}: backend must be 'auto' or one of {BACKENDS}, got {requested!r}")


def choose(op: str, requested: str, device: torch.device, reasons_of: Callable[[str], list[str]]) -> str:
    """The backend for a call of ``op``, by the reasons why each one cannot run it."""
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
    """Have a function told the op and the backend of every choice. Calls that are looked up make none."""
    _OBSERVERS.append(observe)
    try:
        yield
    finally:
        _OBSERVERS.remove(observe)


def backend_beside(op: str, requested: str) -> str:
    """The backend of an op beside a module's attention: the attention's if it has that op, else "auto"."""
    return requested if requested in ("auto", *PLAIN, *IMPLEMENTED[op]) else "auto"
