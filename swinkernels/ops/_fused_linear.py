"""Runs a Linear layer with its bias, GELU or residual connection in one pass on a CPU, with torch's oneDNN.

F.linear on a CPU writes the bias into the result before the product, and GELU and the sum are separate passes, so the
result is traversed three or four times, in as many parallel regions. oneDNN applies bias, GELU and sum to each tile
while the tile is still in registers, in float32, and rounds once.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from swinkernels.ops._library import any_requires_grad, is_plain, linear_dtype
from swinkernels.ops.fallback import add

_LOW = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}


@functools.cache
def why_not_fused(dtype: torch.dtype) -> str | None:
    """Return the reason why fusing Linear layers of a dtype is impossible or no faster on this machine, or None."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return "torch was built without oneDNN"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"it has been measured only on x86, not on {platform.machine()}"
    if dtype == torch.float32:
        name = torch.backends.cpu.get_cpu_capability()
        return None if name.startswith("AVX") else f"in float32 it has been measured with AVX2 and AVX-512, not {name}"
    if dtype not in _LOW:
        return f"oneDNN has no {dtype} product"
    return None if getattr(torch.ops.mkldnn, _LOW[dtype])() else f"oneDNN has no {dtype} product on this CPU"


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, gelu: str | None = None, residual: Tensor | None = None
) -> Tensor:
    """Return Linear(x), GELU(Linear(x)) with ``gelu`` as its approximation, or residual + Linear(x).

    ``x``, ``weight`` and ``bias`` have the same dtype; the sum has the residual's dtype. If no fused function applies,
    torch's separate functions run.
    """
    if x.device.type == "cpu" and _is_fused(x, weight, bias):
        if residual is not None and _can_be_added(residual, x, weight):
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")
        attribute, form = ("none", "none") if gelu is None else ("gelu", gelu)
        y = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, attribute, [], form)
    else:
        y = F.linear(x, weight, bias)
        y = y if gelu is None else F.gelu(y, approximate=gelu)
    return y if residual is None else add(residual, y, None)


def mlp(
    x: Tensor,
    fc1: tuple[Tensor, Tensor | None],
    fc2: tuple[Tensor, Tensor | None],
    *,
    gelu: str,
    residual: Tensor | None = None,
) -> Tensor:
    """Return fc2(GELU(fc1(x))), plus ``residual`` if given; ``fc1`` and ``fc2`` are pairs of weight and bias.

    A large GELU result is never whole in memory: its rows are computed and used piece by piece.
    """
    width, rows = fc1[0].shape[0], x.numel() // max(x.shape[-1], 1)
    is_broadcast = residual is not None and residual.shape != (*x.shape[:-1], fc2[0].shape[0])
    if rows * width * x.element_size() <= _LARGE or is_broadcast or x.device.type != "cpu" or not _is_fused(x, *fc1):
        return linear(linear(x, *fc1, gelu=gelu), *fc2, residual=residual)
    of_x = x.reshape(rows, x.shape[-1])
    of_residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
    y = x.new_empty(rows, fc2[0].shape[0], dtype=x.dtype if residual is None else residual.dtype)
    step = max(_PIECE // (width * x.element_size()), 1)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        added = None if of_residual is None else of_residual[piece]
        y[piece] = linear(linear(of_x[piece], *fc1, gelu=gelu), *fc2, residual=added)
    return y.reshape(*x.shape[:-1], y.shape[-1])


# glibc returns blocks of more than 32 MiB to the system when they are freed, so every call would have to map their
# pages again. Pieces of 8 MiB are reused, and fit into most processors' last-level caches.
_LARGE, _PIECE = 32 << 20, 8 << 20


def fuses(x: Tensor) -> bool:
    """Return True if a module with input ``x`` should call :func:`linear`: in eager CPU inference that oneDNN can fuse.

    The result is False under autocast, because torch caches the cast weights only for its own functions.
    """
    return (
        x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and is_plain((x,))
        and not torch.is_autocast_enabled("cpu")
        and _is_available(x.dtype)
    )


_PLACE = frozenset([(torch.strided, torch.device("cpu"))])
_FUNCTIONS = F.linear, F.gelu


def _is_available(dtype: torch.dtype) -> bool:
    return why_not_fused(dtype) is None and bool(torch.backends.mkldnn.enabled) and not _is_intercepted()


def _is_intercepted() -> bool:
    """Return True if a torch function mode intercepts F.linear and F.gelu, or if either function was replaced."""
    if (F.linear, F.gelu) != _FUNCTIONS:
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _is_fused(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight, bias)
    return (
        is_plain(tensors)
        and weight.dim() == 2
        and _is_large(x, weight)  # usually False in small models
        and not any_requires_grad(tensors)
        and _is_available(x.dtype)
        and not torch.jit.is_tracing()
        and _PLACE.issuperset((t.layout, t.device) for t in tensors if t is not None)
        and linear_dtype(x) == weight.dtype == x.dtype
        # oneDNN reads every bias as if it were contiguous (torch 2.14).
        and (bias is None or (bias.is_contiguous() and bias.dtype == x.dtype and bias.shape == weight.shape[:1]))
        and x.shape[-1] == weight.shape[1]
    )


def _can_be_added(residual: Tensor, x: Tensor, weight: Tensor) -> bool:
    shape = (*x.shape[:-1], weight.shape[0])
    same = residual.dtype == x.dtype and residual.shape == shape and (residual.layout, residual.device) in _PLACE
    return same and is_plain((residual,)) and not any_requires_grad((residual,))


def _is_large(x: Tensor, weight: Tensor) -> bool:
    """Return True if fusing saves more than oneDNN's overhead (in float32 20 us per call, against 2 us of F.linear)."""
    products = x.numel() * weight.shape[0]
    if x.dtype == torch.float32:
        return products >= 1 << 24
    return products > 1 << 13 and x.numel() >= 16 * x.shape[-1]
