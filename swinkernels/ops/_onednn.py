"""Decides when oneDNN, which torch ships, computes Linear layers on a CPU, and differentiates its float32 products.

torch's own F.linear and mm call MKL in float32. On AMD's processors MKL multiplies with AVX2, which is half as fast as
AVX-512 since Zen 5: one thread of an AMD EPYC reached 110 GFLOP/s with MKL and 240 with oneDNN.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from swinkernels.ops._library import any_requires_grad, is_plain, is_untraced

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


@functools.cache
def outruns_mkl() -> bool:
    """Return True if oneDNN's float32 products are faster than MKL's: on the processors where that was measured."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    try:
        first, *_ = Path("/proc/cpuinfo").read_text().split("\n\n")
    except OSError:
        return False
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    return facts.get("vendor_id") == "AuthenticAMD" and int(facts.get("cpu family", 0)) >= 26  # Zen 5


_FUNCTIONS = F.linear, F.gelu, F.layer_norm


def is_available(dtype: torch.dtype) -> bool:
    """Return True if oneDNN may now compute Linear layers of a dtype in place of torch's functions."""
    return why_not_fused(dtype) is None and bool(torch.backends.mkldnn.enabled) and not _is_intercepted()


def _is_intercepted() -> bool:
    """Return True if a torch function mode intercepts the functions that are fused, or if one of them was replaced."""
    if (F.linear, F.gelu, F.layer_norm) != _FUNCTIONS:
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN saves more than its overhead (in float32 20 us per call, against 2 us of F.linear)."""
    products = x.numel() * weight.shape[0]
    if x.dtype == torch.float32:
        return products >= 1 << 24
    return products > 1 << 13 and x.numel() >= 16 * x.shape[-1]


# ---- Training ----


def is_for_training(*tensors: Tensor | None) -> bool:
    """Return True if a module should call :func:`linear`: in float32 training, where it is faster.

    ``tensors`` are the input x and, if they are known, the weight and the bias.
    """
    x = tensors[0]
    return (
        x is not None
        and x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # before a cached function, which a compiler would warn about
        and outruns_mkl()
        and x.dtype == torch.float32
        and is_untraced(tensors)
        and is_available(x.dtype)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), computed and differentiated by oneDNN's products if they are faster.

    Autograd saves x and the weight, as for F.linear.
    """
    tensors = (x, weight, bias)
    if (
        is_for_training(*tensors)
        and any_requires_grad(tensors)
        and not torch.jit.is_tracing()
        and all(t is None or (t.dtype, t.device, t.layout) == (x.dtype, x.device, torch.strided) for t in tensors)
        and x.dim() > 1
        and weight.dim() == 2
        and x.shape[-1] == weight.shape[1]
        and is_large(x, weight)
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        return _Linear.apply(x, weight, bias)
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        return _product(x, weight, bias) if _runs(x, weight) else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, *needs = ctx.needs_input_grad
        return input_gradient(dy, weight) if needs_x else None, *parameter_gradients(dy, x, needs)


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a Linear layer's input, dy @ weight."""
    return _product(dy, weight.t()) if _runs(dy, weight.t()) else dy @ weight


def parameter_gradients(dy: Tensor, x: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a Linear layer's weight and bias, or None for one that is not needed.

    ``x`` may be None if the weight's gradient is not needed.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    dweight = _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if x is not None and needs[0] else None
    return dweight, rows.sum(0) if needs[1] else None


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if not _runs(dy.t(), x.t()):
        return dy.t() @ x
    # oneDNN reads its second operand in place, but copies a first operand whose rows are not contiguous. So the
    # narrower one comes first.
    if dy.shape[1] <= x.shape[1]:
        return _product(dy.t(), x.t())
    return _product(x.t(), dy.t()).t().contiguous()


def _runs(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN computes x @ weight.t(), a product that autograd does not record."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and not torch.is_grad_enabled()
        and is_plain((x, weight))  # otherwise, a mode may count the products
        and outruns_mkl()
        and is_available(x.dtype)
        and not torch.is_autocast_enabled("cpu")
        and is_large(x, weight)
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # oneDNN reads every bias as if it were contiguous (torch 2.14).
    of_bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, of_bias, "none", [], "none")
