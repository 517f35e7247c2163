"""Shift, padding and window partition, and the inverse, in plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from swinkernels.reference._geometry import Ints, check_window, per_axis, source_index


def window_partition(x: Tensor, window_size: Ints, shift_size: Ints = 0, *, pad_order: str = "pad_then_roll") -> Tensor:
    r"""Cut a shifted and zero-padded feature map into windows.

    .. math:: windows_{b \cdot num\_windows + w, t} = x_{b, y(w, t)}

    where y(w, t) is the map token that the cyclic shift moves to token t of window w, or a pad token, which is zero.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), any dtype, any strides.
        window_size: tokens per axis, an int or one per axis, slowest first.
        shift_size: tokens per axis, 0..padded size - 1; a shift of s is ``torch.roll(x, -s)``.
        pad_order: order of padding and shift if S is not a multiple of the window: "pad_then_roll" or
            "roll_then_pad" (timm).

    Returns:
        (B * num_windows, N, C) in the dtype of x, image-major, windows and their tokens row-major. An empty batch gives
        an empty result.

    Raises:
        ValueError: an invalid geometry.

    Source: ``window_partition`` of microsoft/Swin-Transformer, with the padding and ``torch.roll`` that precede it.
    """
    op = "window_partition"
    if x.dim() not in (4, 5):
        raise ValueError(f"{op}: x must be (B, *S, C) with S = (H, W) or (D, H, W), got shape {tuple(x.shape)}")
    batch, *size, channels = x.shape
    window = per_axis(op, "window_size", window_size, len(size))
    shift = per_axis(op, "shift_size", shift_size, len(size))
    check_window(op, size, window, shift, pad_order, below_frame=True)
    index = source_index(size, window, shift, pad_order=pad_order, device=x.device)  # (num_windows, N)
    tokens = x.reshape(batch, math.prod(size), channels)
    tokens = torch.cat([tokens, x.new_zeros(batch, 1, channels)], dim=1)  # the last row is the pad token
    return tokens[:, index].reshape(batch * index.shape[0], index.shape[1], channels)


def window_reverse(
    windows: Tensor,
    window_size: Ints,
    size: Sequence[int],
    shift_size: Ints = 0,
    *,
    pad_order: str = "pad_then_roll",
) -> Tensor:
    r"""Put the windows of :func:`window_partition` back into the feature map; pad tokens are dropped.

    .. math:: x_{b, y(w, t)} = windows_{b \cdot num\_windows + w, t}

    Args:
        windows: (B * num_windows, N, C), any dtype, any strides.
        window_size, shift_size, pad_order: as given to :func:`window_partition`.
        size: S, the tokens of the map per axis, (H, W) or (D, H, W).

    Returns:
        (B, \*S, C) in the dtype of windows, the inverse of :func:`window_partition` bit for bit.

    Raises:
        ValueError: an invalid geometry, or windows of a shape that does not match it.

    Source: ``window_reverse`` of microsoft/Swin-Transformer, with the ``torch.roll`` and the crop that follow it.
    """
    op = "window_reverse"
    size = tuple(size)
    window = per_axis(op, "window_size", window_size, len(size))
    shift = per_axis(op, "shift_size", shift_size, len(size))
    check_window(op, size, window, shift, pad_order, below_frame=True)
    index = source_index(size, window, shift, pad_order=pad_order, device=windows.device)
    num_windows, n = index.shape
    if windows.dim() != 3 or windows.shape[1] != n or windows.shape[0] % num_windows != 0:
        raise ValueError(
            f"{op}: windows must be (B * {num_windows}, {n}, C) for S = {size} and window {window}, "
            f"got shape {tuple(windows.shape)}"
        )
    batch, channels = windows.shape[0] // num_windows, windows.shape[2]
    flat = index.reshape(-1)
    position = torch.empty(math.prod(size) + 1, dtype=torch.long, device=windows.device)
    position[flat] = torch.arange(flat.numel(), device=windows.device)  # the last entry is unused
    return windows.reshape(batch, num_windows * n, channels)[:, position[:-1]].reshape(batch, *size, channels)
