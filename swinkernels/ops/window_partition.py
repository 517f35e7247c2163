"""Shift, padding and window partition as one gather, and the inverse: schemas, fakes, autograd, public functions.

The ops ``window_partition`` and ``window_reverse`` of ``torch.ops.swinkernels`` have a CUDA kernel; the ops of the same
names with the suffix ``_triton`` have a Triton kernel. The backward pass of each op is the other op.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from swinkernels import reference
from swinkernels.ops import _arguments, fallback
from swinkernels.ops._arguments import Ints
from swinkernels.ops._backends import PLAIN, choose, window_partition_reasons
from swinkernels.ops._library import Found, define, looked_up, register, three

# The geometry lists have three values each, slowest axis first, as in FrameGeometry (csrc/params); `size` has one value
# per axis of the map. The ops allow any shift below the frame's size.
_GEOMETRY = "int[] window_size, int[] shift_size, bool roll_then_pad"


def _define(suffix: str) -> dict[str, Callable]:
    partition, reverse = f"window_partition{suffix}", f"window_reverse{suffix}"
    define(f"{partition}(Tensor x, {_GEOMETRY}) -> Tensor")
    define(f"{reverse}(Tensor windows, SymInt[] size, {_GEOMETRY}) -> Tensor")

    def fake_partition(x, window_size, shift_size, roll_then_pad):
        size, window = x.shape[1:-1], window_size[-(x.dim() - 2) :]
        n = math.prod(window)
        windows = math.prod(_arguments.frame_size(size, window)) // n
        return x.new_empty((x.shape[0] * windows, n, x.shape[-1]))

    def fake_reverse(windows, size, window_size, shift_size, roll_then_pad):
        window = window_size[-len(size) :]
        per_image = math.prod(_arguments.frame_size(size, window)) // math.prod(window)
        return windows.new_empty((windows.shape[0] // per_image, *size, windows.shape[-1]))

    def setup_partition(ctx, tensors, others, output):
        ctx.size, ctx.geometry = tensors[0].shape[1:-1], others

    def setup_reverse(ctx, tensors, others, output):
        ctx.geometry = others[1:]

    def backward_partition(ctx, dwindows):
        return (call_reverse(dwindows, ctx.size, *ctx.geometry),)

    def backward_reverse(ctx, dx):
        return (call_partition(dx, *ctx.geometry),)

    call_partition = register(partition, fake_partition, setup_partition, backward_partition)
    call_reverse = register(reverse, fake_reverse, setup_reverse, backward_reverse)
    return {partition: call_partition, reverse: call_reverse}


_OPS = _define("") | _define("_triton")


def _op(name: str, backend: str) -> Callable:
    return _OPS[f"{name}_triton" if backend == "triton" else name]


def _geometry(window: Sequence[int], shift: Sequence[int], pad_order: str) -> tuple[list[int], list[int], bool]:
    return three(window, 1), three(shift, 0), pad_order == "roll_then_pad"


def _check_count(op: str, batch: int, size: Sequence[int], window: Sequence[int], channels: int) -> None:
    if max(batch, 1) * math.prod(_arguments.frame_size(size, window)) * channels > _arguments.MAX_ELEMENTS:
        raise ValueError(
            f"{op}: the padded map is too large: it must have at most 2**63 - 1 elements (int64), got {batch} maps of "
            f"size {tuple(size)}, {channels} channels and window_size {tuple(window)}; split the batch"
        )


def partition(
    op: str, x: Tensor, window: Sequence[int], shift: Sequence[int], pad_order: str, backend: str = "auto"
) -> Tensor:
    """Run :func:`window_partition` on checked arguments, for any shift below the frame; errors name the op ``op``."""
    return _partition(x, window, shift, pad_order, _choice(op, x, backend))


def _choice(op: str, x: Tensor, requested: str) -> str:
    return choose(op, requested, x.device, lambda b: window_partition_reasons(b, x.device))


def _partition(x: Tensor, window: Sequence[int], shift: Sequence[int], pad_order: str, backend: str) -> Tensor:
    if backend in PLAIN:
        return (fallback if backend == "torch" else reference).window_partition(x, window, shift, pad_order=pad_order)
    return _op("window_partition", backend)(x, *_geometry(window, shift, pad_order))


def reverse(
    op: str,
    windows: Tensor,
    window: Sequence[int],
    size: Sequence[int],
    shift: Sequence[int],
    pad_order: str,
    backend: str = "auto",
) -> Tensor:
    """Run :func:`window_reverse` on checked arguments, for any shift below the frame; errors name the op ``op``."""
    return _reverse(windows, window, size, shift, pad_order, _choice(op, windows, backend))


def _reverse(
    windows: Tensor, window: Sequence[int], size: Sequence[int], shift: Sequence[int], pad_order: str, backend: str
) -> Tensor:
    if backend in PLAIN:
        return (fallback if backend == "torch" else reference).window_reverse(
            windows, window, size, shift, pad_order=pad_order
        )
    return _op("window_reverse", backend)(windows, size, *_geometry(window, shift, pad_order))


_KNOWN = Found()


def window_partition(
    x: Tensor, window_size: Ints, shift_size: Ints = 0, *, pad_order: str = "pad_then_roll", backend: str = "auto"
) -> Tensor:
    r"""Cut a shifted and zero-padded feature map into windows: roll, pad, partition and copy in one gather.

    .. math:: windows_{b \cdot num\_windows + w, t} = x_{b, y(w, t)}

    where y(w, t) is the map token that the cyclic shift moves to token t of window w, or a pad token, which is zero.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), any dtype; read without a copy if its last axis is contiguous.
        window_size: tokens per axis, an int or one per axis, slowest first.
        shift_size: tokens per axis, 0..window - 1; a shift of s is ``torch.roll(x, -s)``.
        pad_order: order of padding and shift if S is not a multiple of the window: "pad_then_roll" (Microsoft,
            torchvision, transformers, MONAI, mmpretrain) or "roll_then_pad" (timm).
        backend: "auto", "cuda", "triton", "torch" or "reference". "auto" picks the fastest usable one.

    Returns:
        (B * num_windows, N, C) in the dtype of x, contiguous, image-major, windows and their tokens row-major. An empty
        batch gives an empty result. Differentiable in x, any number of times: the derivative is
        :func:`window_reverse`, so the gradient of a pad token is dropped.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: ``window_partition`` of microsoft/Swin-Transformer, with the padding and ``torch.roll`` that precede it.
    """
    op = "window_partition"

    def check() -> tuple[tuple[int, ...], tuple[int, ...], str]:
        _arguments.check_features(op, "x", x, floating=False)
        window, shift = _arguments.check_window(op, window_size, shift_size, x.dim() - 2)
        _arguments.check_choice(op, "pad_order", pad_order, _arguments.PAD_ORDERS)
        _check_count(op, x.shape[0], x.shape[1:-1], window, x.shape[-1])
        return window, shift, _choice(op, x, backend)

    window, shift, chosen = looked_up(_KNOWN, (x,), (op, window_size, shift_size, pad_order, backend), check)
    return _partition(x, window, shift, pad_order, chosen)


def window_reverse(
    windows: Tensor,
    window_size: Ints,
    size: Sequence[int],
    shift_size: Ints = 0,
    *,
    pad_order: str = "pad_then_roll",
    backend: str = "auto",
) -> Tensor:
    r"""Put the windows of :func:`window_partition` back into the feature map, in one pass; pad tokens are dropped.

    .. math:: x_{b, y(w, t)} = windows_{b \cdot num\_windows + w, t}

    Args:
        windows: (B * num_windows, N, C), any dtype.
        window_size, shift_size, pad_order, backend: as for :func:`window_partition`.
        size: S, the tokens of the map per axis, (H, W) or (D, H, W).

    Returns:
        (B, \*S, C), contiguous, in the dtype of windows; the inverse of :func:`window_partition`, bit for bit.
        Differentiable in windows, any number of times; the gradient of a pad token is zero.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: ``window_reverse`` of microsoft/Swin-Transformer, with the ``torch.roll`` and the crop that follow it.
    """
    op = "window_reverse"

    def check() -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], str]:
        tokens = _arguments.check_size(op, size)
        window, shift = _arguments.check_window(op, window_size, shift_size, len(tokens))
        _arguments.check_choice(op, "pad_order", pad_order, _arguments.PAD_ORDERS)
        _arguments.check_windows(op, windows, tokens, window)
        # The padded maps of a nonempty batch have as many elements as `windows`, so checking one map is enough.
        _check_count(op, 1, tokens, window, windows.shape[2])
        return window, tokens, shift, _choice(op, windows, backend)

    options = (op, window_size, tuple(size) if type(size) is torch.Size else size, shift_size, pad_order, backend)
    window, tokens, shift, chosen = looked_up(_KNOWN, (windows,), options, check)
    return _reverse(windows, window, tokens, shift, pad_order, chosen)
