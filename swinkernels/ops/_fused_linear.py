"""Runs a Linear layer with its bias, GELU or residual connection in one pass on a CPU.

F.linear on a CPU writes the bias into the result before the product, and GELU and the sum are separate passes, so the
result is traversed three or four times, in as many parallel regions. torch's oneDNN applies bias, GELU and sum to each
tile while the tile is still in registers, in float32, and rounds once.

The ops ``fused_linear`` and ``fused_mlp`` of ``torch.ops.swinkernels`` (csrc/kernels/cpu/linear.inl) take the place of
oneDNN in float32 and bfloat16, for more than one row and weights whose rows are contiguous, on CPUs with AVX2. They
multiply bfloat16 numbers with AMX or, on AMD's CPUs, AVX512_BF16. Elsewhere they widen them to float32 and multiply
those, which takes about as long as in float32; without AVX512_BF16, oneDNN takes four times as long, and with AVX2 it
has no such product. The ops have no derivative. They can normalise the rows that they read and, in an MLP, the rows of
the result.
"""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Buffer, Parameter

from swinkernels import _extension
from swinkernels.ops import _onednn
from swinkernels.ops._library import (
    PLAIN_TYPES,
    any_requires_grad,
    autocast_dtype,
    constant_when_compiled,
    define,
    is_plain,
    linear_dtype,
    register_without_derivative,
)
from swinkernels.ops._onednn import is_large, is_undisturbed

# norm is "", "pre" (of x) or, in fused_mlp, "post" (of the result, before the residual is added). If by_layers is true,
# fc2 begins when fc1 has computed all rows (or many); if it is None, the op chooses the faster way.
define(
    "fused_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias, "
    "str gelu, str norm, float eps) -> Tensor"
)
define(
    "fused_mlp(Tensor x, Tensor fc1_weight, Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, Tensor? residual, "
    "Tensor? norm_weight, Tensor? norm_bias, str gelu, str norm, float eps, bool? by_layers) -> Tensor"
)


def _register(name: str, last_weight: int) -> Callable[..., Tensor]:
    """Register an op whose tensor ``last_weight`` is the weight of its last Linear layer."""

    def fake(*arguments):
        x, weight = arguments[0], arguments[last_weight]
        return x.new_empty((*x.shape[:-1], weight.shape[0]))

    return register_without_derivative(name, fake, "torch's functions")


_LINEAR_OP = _register("fused_linear", 1)
_MLP_OP = _register("fused_mlp", 3)

Layer = tuple[Tensor, Tensor | None]  # the weight and the bias of a Linear layer


class Norm(NamedTuple):
    """A layer norm of rows, whose parameters have the dtype of the rows."""

    weight: Tensor | None
    bias: Tensor | None
    eps: float
    place: str = "pre"  # "pre": before the first Linear layer, or "post": after the last one


NO_NORM = Norm(None, None, 0.0, "")


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Return torch's layer norm of the rows of x."""
    if weight is None and bias is not None:  # with only a bias, torch 2.14's second derivative is wrong or raises
        return F.layer_norm(x, x.shape[-1:], None, None, eps) + bias
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


_KERNEL_DTYPES = frozenset([torch.float32, torch.bfloat16])


@functools.cache
def _instruction_set() -> str:
    """Return the instruction set of the extension's kernels, or "baseline" if there are none."""
    build = _extension.build
    has_kernels = build is not None and build["has_cpu_kernels"]
    return str(_extension.ops.cpu_instruction_set()) if has_kernels else "baseline"


@constant_when_compiled
def _least_channels_alone() -> int:
    """Return the number of input channels from which on the kernels compute a bfloat16 layer alone; see runs_alone."""
    return {"amx": 768, "avx512_bf16": 384}.get(_instruction_set(), 0)


@functools.cache
def _has_kernels() -> bool:
    """Return True if the extension's kernels take the place of oneDNN: only where that has been measured.

    With AVX-512, float32 has been measured on AMD's Zen 4 and 5, on Intel's Ice Lake, on an Emerald Rapids whose AMX
    and BF16 were hidden, and on a Xeon with AMX; bfloat16 on Zen 5 (on Zen 4 only its products), on the Xeon with AMX
    and, widened, on both Xeons.
    """
    return _instruction_set() not in ("baseline", "emulated_amx")


def why_not_fused(dtype: torch.dtype) -> str | None:
    """Return the reason why fusing Linear layers of a dtype is impossible or no faster on this machine, or None."""
    return None if dtype in _KERNEL_DTYPES and _has_kernels() else _onednn.why_not_fused(dtype)


def _is_available(dtype: torch.dtype) -> bool:
    """Return True if oneDNN or a kernel may now compute Linear layers of a dtype in place of torch's functions."""
    return is_undisturbed() and why_not_fused(dtype) is None


def _may_use_kernels(dtype: torch.dtype) -> bool:
    allowed = dtype == torch.bfloat16 or (dtype == torch.float32 and not _allows_bfloat16_products())
    return allowed and _has_kernels()


def _is_compiled() -> bool:
    """Return True in code that torch.compile compiles for this machine, without modes that intercept functions.

    Exported code must run elsewhere, too. The ops have no forward-mode derivative.
    """
    return (
        torch.compiler.is_dynamo_compiling()
        and not torch.compiler.is_exporting()
        and forward_ad._current_level < 0
        and torch._C._len_torch_function_stack() == 0
    )


@constant_when_compiled
def _compiles_kernels(dtype: torch.dtype) -> bool:
    """Return True if compiled inference in a dtype may call the kernels."""
    return is_undisturbed() and _may_use_kernels(dtype)


def _has_kernels_for(x: Tensor, *weights: Tensor) -> bool:
    """Return True if the kernels run here and are fast: they pad a single row."""
    return _may_use_kernels(x.dtype) and x.numel() > x.shape[-1] and _are_readable_weights(x, weights)


def _are_readable_weights(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Return True if the kernels read weights where they lie, and in bfloat16 if their channels are pairs."""
    return all(w.stride(1) == 1 and (x.dtype == torch.float32 or w.shape[1] % 2 == 0) for w in weights)


def runs_alone(x: Tensor, weight: Tensor) -> bool:
    """Return True if the kernels, where they run, compute a Linear layer that is not part of a half faster than oneDNN.

    With fast products of bfloat16 and few channels, writing the result takes the kernels longer. With AVX512_BF16, on
    two threads of an AMD EPYC (Zen 5), they took 1.1 to 1.4 times as long for 96 channels, 0.9 to 1.2 times for 192,
    and 0.7 to 1.0 times for 384 and 768. With AMX, on one thread of a Xeon, they took 1.2 to 2.1 times as long for 96
    to 384 channels, and 0.75 times for 768.
    """
    is_slow = x.dtype == torch.bfloat16 and weight.shape[1] < _least_channels_alone()
    return is_large(x, weight) and not is_slow


def _allows_bfloat16_products() -> bool:
    """Return True if the user allows torch to multiply float32 matrices in bfloat16, which oneDNN then does."""
    return getattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision", "none") == "bf16"


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    gelu: str | None = None,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    on_kernels: bool = False,
) -> Tensor:
    """Return Linear(x), GELU(Linear(x)) with ``gelu`` as its approximation, or residual + Linear(x).

    With a ``norm``, norm(x) takes the place of x. ``x``, ``weight`` and ``bias`` have the same dtype; the sum has the
    residual's dtype. If no fused function applies, torch's separate functions run. ``on_kernels`` is True if the caller
    has found that the extension's kernels run: the residual then has the result's shape.
    """
    if on_kernels:
        norm_weight, norm_bias, eps, place = norm or NO_NORM
        return run(_LINEAR_OP, x, weight, bias, residual, norm_weight, norm_bias, gelu or "", place, eps)
    is_fused = x.device.type == "cpu" and _is_fused(x, (weight, bias))
    has_kernels = is_fused and _has_kernels_for(x, weight) and runs_alone(x, weight)
    if has_kernels or (is_fused and _onednn.why_not_fused(x.dtype) is None):
        added = residual if residual is not None and _can_be_added(residual, x, weight) else None
        if norm is not None and not (has_kernels and _are_like(x, norm.weight, norm.bias)):
            x, norm = layer_norm(x, *norm[:3]), None
        if has_kernels:
            y = linear(x, weight, bias, gelu=gelu, residual=added, norm=norm, on_kernels=True)
        elif added is not None:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, added, weight, bias, "add")
        else:
            attribute, form = ("none", "none") if gelu is None else ("gelu", gelu)
            y = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, attribute, [], form)
        if added is not None:
            return y
    else:
        y = _onednn.linear(x if norm is None else layer_norm(x, *norm[:3]), weight, bias)
        y = y if gelu is None else F.gelu(y, approximate=gelu)
    return y if residual is None else (residual + y).to(residual.dtype)


def cast_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return Linear(x) without a bias, in the autocast dtype if autocast is on, else in the dtype of x."""
    if autocast_dtype(x) is None or weight.dtype == torch.float64:  # autocast does not cast float64
        weight = weight.to(x.dtype)
    return linear(x, weight, None)


def mlp(
    x: Tensor,
    fc1: Layer,
    fc2: Layer,
    *,
    gelu: str,
    residual: Tensor | None = None,
    norm: Norm | None = None,
    on_kernels: bool = False,
) -> Tensor:
    """Return fc2(GELU(fc1(x))), plus ``residual`` if given, with a ``norm`` of x or of fc2's result.

    A large GELU result is never whole in memory: its rows are computed and used piece by piece. ``on_kernels`` is as in
    :func:`linear`.
    """
    if on_kernels or _is_one_op(x, fc1, fc2, residual, norm):
        norm_weight, norm_bias, eps, place = norm or NO_NORM
        return run(_MLP_OP, x, *fc1, *fc2, residual, norm_weight, norm_bias, gelu, place, eps, None)
    if norm is not None and norm.place == "post":
        y = layer_norm(mlp(x, fc1, fc2, gelu=gelu), *norm[:3])
        return y if residual is None else (residual + y).to(residual.dtype)
    width, rows = fc1[0].shape[0], x.numel() // max(x.shape[-1], 1)
    is_broadcast = residual is not None and residual.shape != (*x.shape[:-1], fc2[0].shape[0])
    if rows * width * x.element_size() <= _LARGE or is_broadcast or x.device.type != "cpu" or not _is_fused(x, fc1):
        return linear(linear(x, *fc1, gelu=gelu, norm=norm), *fc2, residual=residual)
    of_x = x.reshape(rows, x.shape[-1])
    of_residual = None if residual is None else residual.reshape(rows, residual.shape[-1])
    y = x.new_empty(rows, fc2[0].shape[0], dtype=x.dtype if residual is None else residual.dtype)
    step = max(_PIECE // (width * x.element_size()), 1)
    for first in range(0, rows, step):
        piece = slice(first, first + step)
        added = None if of_residual is None else of_residual[piece]
        y[piece] = linear(linear(of_x[piece], *fc1, gelu=gelu, norm=norm), *fc2, residual=added)
    return y.reshape(*x.shape[:-1], y.shape[-1])


class Call(NamedTuple):
    """A call of :func:`run`."""

    op: Any
    arguments: tuple[Any, ...]
    result: Tensor


class _Recorded(threading.local):
    # To this list, unless it is None, run adds its calls in this thread.
    calls: list[Call] | None = None


recorded = _Recorded()


def run(op: Any, *arguments: Any) -> Tensor:
    """Run an op on tensors that need no gradient and that are known to be plain, except in compiled code."""
    if torch.compiler.is_compiling():
        return op.overload(*arguments)
    with torch._C._AutoDispatchBelowAutograd():
        result = op.overload(*arguments)
    if recorded.calls is not None:
        recorded.calls.append(Call(op, arguments, result))
    return result


# glibc returns blocks of more than 32 MiB to the system when they are freed, so every call would have to map their
# pages again. Pieces of 8 MiB are reused, and fit into most processors' last-level caches.
_LARGE, _PIECE = 32 << 20, 8 << 20


def fuses(x: Tensor) -> bool:
    """Return True if a module with input ``x`` should call :func:`linear`: in eager CPU inference, if that is fused."""
    return _is_inference(x) and is_plain((x,)) and _is_available(x.dtype)


def _is_inference(x: Tensor) -> bool:
    """Return True in inference on a CPU, but not under autocast: torch caches cast weights only for its functions."""
    return x.device.type == "cpu" and not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


def joins(x: Tensor) -> bool:
    """Return True if a module with input ``x`` should leave norms to Linear layers, and maps to their halves.

    This is the case if the extension's kernels compute inference in the dtype of ``x`` here, also in compiled code.
    """
    if _is_compiled():
        return _is_inference(x) and _compiles_kernels(x.dtype)
    return _is_inference(x) and is_plain((x,)) and is_undisturbed() and _may_use_kernels(x.dtype)


_PLACE = frozenset([(torch.strided, torch.device("cpu"))])


def _are_readable(x: Tensor, tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if a fused function with the input x, one of ``tensors``, may read all of them without torch."""
    return (
        is_plain(tensors)
        and not any_requires_grad(tensors)
        and _is_available(x.dtype)
        and _PLACE.issuperset((t.layout, t.device) for t in tensors if t is not None)
        and linear_dtype(x) == x.dtype
    )


def _is_fused(x: Tensor, *layers: Layer) -> bool:
    """Return True if Linear layers, of which the first has the input ``x``, can be computed by fused functions."""
    return (
        is_plain((x,))  # before the sizes, on which a compiler would put guards
        and layers[0][0].dim() == 2
        and is_large(x, layers[0][0])  # usually False in small models
        and _are_readable(x, (x, *(t for layer in layers for t in layer)))
        and all(_is_layer(weight, bias, x.dtype) for weight, bias in layers)
        and all(one.shape[0] == other.shape[1] for (one, _), (other, _) in itertools.pairwise(layers))
        and x.shape[-1] == layers[0][0].shape[1]
    )


def fit_kernels(x: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Return True if the kernels compute Linear layers of the input x, one of ``tensors``.

    The result depends only on the metadata of ``tensors``. See :func:`run_on_kernels`.
    """
    fits = x.device.type == "cpu" and x.dtype in _KERNEL_DTYPES and autocast_dtype(x) is None
    kind = x.dtype, x.device, torch.strided
    return fits and all(t is None or (t.dtype, t.device, t.layout) == kind for t in tensors)


def run_on_kernels(x: Tensor, weights: Sequence[Tensor], tensors: Sequence[Tensor | None]) -> bool:
    """Return True if the kernels may run now on ``tensors``, for which :func:`fit_kernels` returned True.

    Compiled code, whose sizes must not become guards, calls the kernels for any number of rows.
    """
    if _is_compiled():
        are_plain = all(t is None or type(t) in (Tensor, Parameter, Buffer) for t in tensors)
        may_run = are_plain and not torch.is_grad_enabled() and _compiles_kernels(x.dtype)
        return may_run and _are_readable_weights(x, weights)
    return (
        is_plain(tensors)  # first, because a compiler cannot trace the others
        and not any_requires_grad(tensors)
        and is_undisturbed()
        and _has_kernels_for(x, *weights)
    )


def _is_layer(weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    # oneDNN reads every bias as if it were contiguous (torch 2.14).
    is_bias = bias is None or (bias.is_contiguous() and bias.dtype == dtype and bias.shape == weight.shape[:1])
    return weight.dim() == 2 and weight.dtype == dtype and is_bias


def _are_like(x: Tensor, *tensors: Tensor | None) -> bool:
    """Return True if a kernel that may read x may also read ``tensors``, whatever their shapes."""
    return not any_requires_grad(tensors) and all(
        t is None or (type(t) in PLAIN_TYPES and t.dtype == x.dtype and (t.layout, t.device) in _PLACE) for t in tensors
    )


def _is_one_op(x: Tensor, fc1: Layer, fc2: Layer, residual: Tensor | None, norm: Norm | None) -> bool:
    if not (x.device.type == "cpu" and is_plain((x,)) and is_undisturbed() and _may_use_kernels(x.dtype)):
        return False  # first, because a compiler cannot trace the others
    is_paired = x.dtype == torch.float32 or fc2[0].shape[0] % 2 == 0  # as the norm of the result requires
    return (
        _is_fused(x, fc1, fc2)
        and _has_kernels_for(x, fc1[0], fc2[0])
        and (residual is None or _can_be_added(residual, x, fc2[0]))
        and (norm is None or (_are_like(x, norm.weight, norm.bias) and (norm.place == "pre" or is_paired)))
    )


def _can_be_added(residual: Tensor, x: Tensor, weight: Tensor) -> bool:
    return residual.shape == (*x.shape[:-1], weight.shape[0]) and _are_like(x, residual)
