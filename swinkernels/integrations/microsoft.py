"""The interface of Microsoft's ``window_process`` extension. To use it, change one import.

Replace ``from kernels.window_process.window_process import WindowProcess, WindowProcessReverse`` with::

    from swinkernels.integrations.microsoft import WindowProcess, WindowProcessReverse

Source: kernels/window_process of microsoft/Swin-Transformer, and its callers in models/swin_transformer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from swinkernels.ops import _arguments
from swinkernels.ops._arguments import Ints
from swinkernels.ops.window_partition import partition, reverse

_NO_PADDING = "pad_then_roll"  # without padding, roll_then_pad gives the same result


def _check_geometry(
    op: str, batch: Any, height: Any, width: Any, channels: Any, shift_size: Any, window_size: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Check the geometry; return the map's size, the roll and the window, as two ints each."""
    _arguments.check_count(op, "B", batch, at_least=0)
    for name, value in (("H", height), ("W", width), ("C", channels)):
        _arguments.check_count(op, name, value)
    size = (height, width)
    window, _ = _arguments.check_window(op, window_size, 0, 2)
    if any(s % w != 0 for s, w in zip(size, window, strict=True)):
        raise ValueError(
            f"{op}: H and W must be multiples of window_size, got {size} for window {window}. To pad the map, call "
            "swinkernels.window_partition and window_reverse"
        )
    return size, _arguments.check_roll(op, shift_size, 2), window


def _wrapped(shift: Sequence[int], size: Sequence[int]) -> list[int]:
    """Return ``shift`` modulo ``size``, per axis."""
    # The remainder is computed only if needed, because it makes torch.compile specialise on the size.
    return [s if 0 <= s < n else s % n for s, n in zip(shift, size, strict=True)]


class WindowProcess:
    """Rolls a feature map and cuts it into windows in one pass. Call ``WindowProcess.apply(...)``."""

    @staticmethod
    def apply(
        input: Tensor,
        B: int,
        H: int,
        W: int,
        C: int,
        shift_size: Ints,
        window_size: Ints,
        *,
        backend: str = "auto",
    ) -> Tensor:
        r"""Roll a feature map by ``shift_size``, then cut it into windows.

        .. math:: windows = window\_partition(roll(input, +shift\_size))

        The sign is that of ``torch.roll``: Swin models, which roll the map by -s before attention, pass -s here.

        Args:
            input: (B, H, W, C) or (B, H * W, C), of any dtype and strides.
            B, H, W, C: the map's sizes; H and W are multiples of the window.
            shift_size: tokens by which the map is rolled, an int or one for each of H and W. It may be negative or
                larger than the map.
            window_size: tokens per axis, an int or one for each of H and W.
            backend: "auto", "cuda", "triton", "torch" or "reference". "auto" picks the fastest usable one.

        Returns:
            (B * num_windows, window, window, C) in the dtype of input, contiguous, ordered by image and then by window
            in row-major order. An empty batch gives an empty result. Differentiable in input, any number of times.

        Raises:
            ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
            NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

        Source: ``WindowProcess`` of kernels/window_process/window_process.py, microsoft/Swin-Transformer.
        """
        op = "WindowProcess"
        size, roll, window = _check_geometry(op, B, H, W, C, shift_size, window_size)
        _arguments.check_forms(op, "input", input, (B, H, W, C), (B, H * W, C))
        shift = _wrapped([-r for r in roll], size)  # the ops shift in the opposite direction
        windows = partition(op, input.reshape(B, H, W, C), window, shift, _NO_PADDING, backend)
        return windows.unflatten(1, window)


class WindowProcessReverse:
    """Puts windows back into a feature map and rolls it in one pass. Call ``WindowProcessReverse.apply(...)``."""

    @staticmethod
    def apply(
        input: Tensor,
        B: int,
        H: int,
        W: int,
        C: int,
        shift_size: Ints,
        window_size: Ints,
        *,
        backend: str = "auto",
    ) -> Tensor:
        r"""Put windows back into the feature map, then roll it by ``shift_size``.

        .. math:: x = roll(window\_reverse(input), +shift\_size)

        This is the inverse of :class:`WindowProcess` with the opposite shift_size.

        Args:
            input: (B * num_windows, window, window, C) or (B * num_windows, window * window, C), of any dtype.
            B, H, W, C, shift_size, window_size, backend: as for :meth:`WindowProcess.apply`.

        Returns:
            (B, H, W, C) in the dtype of input, contiguous. An empty batch gives an empty result. Differentiable in
            input, any number of times.

        Raises:
            ValueError, TypeError, NotImplementedError: as for :meth:`WindowProcess.apply`.

        Source: ``WindowProcessReverse`` of kernels/window_process/window_process.py, microsoft/Swin-Transformer.
        """
        op = "WindowProcessReverse"
        size, roll, window = _check_geometry(op, B, H, W, C, shift_size, window_size)
        n = window[0] * window[1]
        count = B * (H * W // n)
        _arguments.check_forms(op, "input", input, (count, *window, C), (count, n, C))
        return reverse(op, input.reshape(count, n, C), window, size, _wrapped(roll, size), _NO_PADDING, backend)
