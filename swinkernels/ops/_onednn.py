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
    """Return the reason why oneDNN cannot fuse Linear layers of a dtype, or not faster, on this machine, or None."""
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
    return is_undisturbed() and why_not_fused(dtype) is None


def is_undisturbed() -> bool:
    """Return True unless a tracer, a mode or the user's settings require torch's own functions now."""
    # A tracer also refuses the ops that cached functions call, so callers must check this first.
    return not torch.jit.is_tracing() and bool(torch.backends.mkldnn.enabled) and not _is_intercepted()


def _is_intercepted() -> bool:
    """Return True if a torch function mode intercepts the functions that are fused, or if one of them was replaced."""
    if (F.linear, F.gelu, F.layer_norm) != _FUNCTIONS:
        return True
    modes = torch._C._len_torch_function_stack()
    return modes > 0 and not all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN saves more than its overhead (in float32 20 us per call, against 2 us of F.linear).

    In compiled code every layer is large: its sizes, which may be symbols, must not become guards.
    """
    if torch.compiler.is_compiling():
        return True
    products = x.numel() * weight.shape[0]
    if x.dtype == torch.float32:
        return products >= 1 << 24
    return products > 1 << 13 and x.numel() >= 16 * x.shape[-1]


# ---- Training ----

_LEAST = 1 << 14  # elements of x below which a layer of unknown weight counts as small


def is_for_training(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None) -> bool:
    """Return True if :func:`linear` may be faster than F.linear: in float32 training with a large layer.

    ``weight`` and ``bias`` are those of the layer, if they are known.
    """
    return (
        x.device.type == "cpu"
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()  # before the sizes, on which a compiler would put guards
        and outruns_mkl()
        and (x.numel() >= _LEAST if weight is None else weight.dim() == 2 and is_large(x, weight))
        and is_untraced((x, weight, bias))
        and _is_faster(x)
    )


def _is_faster(x: Tensor) -> bool:
    """Return True if oneDNN may now compute products of ``x``, and does so faster than torch's own functions."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and outruns_mkl()
        and is_available(x.dtype)
        and not torch.is_autocast_enabled("cpu")
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias), computed and differentiated by oneDNN's products if they are faster.

    Autograd saves the same tensors as for F.linear, in the same order, so that checkpointing may compute a layer with
    either function.
    """
    if not (is_for_training(x, weight, bias) and _is_layer(x, weight, bias)):
        return F.linear(x, weight, bias)
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    y = _Linear.apply(rows, weight.t(), bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[0])


def _is_layer(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    tensors = (x, weight, bias)
    return (
        any_requires_grad(tensors)
        and all(t is None or (t.dtype, t.device, t.layout) == (x.dtype, x.device, torch.strided) for t in tensors)
        and x.dim() > 1
        and x.shape[-1] == weight.shape[1]
        and (bias is None or bias.shape == weight.shape[:1])
    )


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight_t, bias):
        needs_x, needs_weight, _ = ctx.needs_input_grad
        saved = (x if needs_weight else None, weight_t if needs_x else None)
        ctx.has_bias = bias is not None
        ctx.save_for_backward(*(saved if ctx.has_bias else saved[::-1]))
        weight = weight_t.t()
        return _product(x, weight, bias) if _runs(x, weight) else F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight_t = ctx.saved_tensors if ctx.has_bias else ctx.saved_tensors[::-1]
        needs_x, *needs = ctx.needs_input_grad
        dx = input_gradient(dy, weight_t.t()) if needs_x else None
        dweight, dbias = linear_gradients(dy, x, needs)
        return dx, None if dweight is None else dweight.t(), dbias


def input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of a Linear layer's input, dy @ weight."""
    rows = dy.reshape(-1, dy.shape[-1])
    if not (rows.is_contiguous() and _runs(rows, weight.t())):
        return dy @ weight
    return _product(rows, weight.t()).view(*dy.shape[:-1], weight.shape[1])


def linear_gradients(dy: Tensor, x: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of a Linear layer's weight and bias, or None for one that is not needed.

    ``x`` may be None if the weight's gradient is not needed.
    """
    rows = dy.reshape(-1, dy.shape[-1])
    dweight = _weight_gradient(rows, x.reshape(-1, x.shape[-1])) if x is not None and needs[0] else None
    return dweight, rows.sum(0) if needs[1] else None


def _weight_gradient(dy: Tensor, x: Tensor) -> Tensor:
    if not (dy.is_contiguous() and _runs(dy.t(), x.t())):
        return dy.t() @ x
    # oneDNN reads its second operand in place, but copies a first operand whose rows are not contiguous. If dy is wide
    # and has many rows, copying it takes longer than transposing the result.
    if x.shape[1] < dy.shape[1] and 8 * x.shape[1] <= x.shape[0]:
        return _product(x.t(), dy.t()).t().contiguous()
    return _product(dy.t(), x.t())


def _runs(x: Tensor, weight: Tensor) -> bool:
    """Return True if oneDNN computes x @ weight.t(), a product that autograd does not record."""
    return (
        not torch.is_grad_enabled()
        and is_plain((x, weight))  # otherwise, a mode may count the products
        and _is_faster(x)
        and weight.dtype == x.dtype
        and is_large(x, weight)
        and _is_dense(x)
        and _is_dense(weight)
    )


def _is_dense(matrix: Tensor) -> bool:
    """Return True if the rows or the columns are contiguous and do not overlap.

    For other matrices, such as expanded gradients, oneDNN takes hundreds of times as long, or raises an error.
    """
    (rows, columns), (row, column) = matrix.shape, matrix.stride()
    return (column == 1 and row >= columns) or (row == 1 and column >= rows)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    # oneDNN reads every bias as if it were contiguous (torch 2.14).
    of_bias = None if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, of_bias, "none", [], "none")
