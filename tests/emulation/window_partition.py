"""The CUDA kernels of window_partition and window_reverse as functions of CPU tensors."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from tests import emulation


class _Windows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("window_stride", ctypes.c_int64), ("token_stride", ctypes.c_int64)]


class Params(ctypes.Structure):
    """Mirrors WindowCopyParams of csrc/params/window_partition.h."""

    _fields_ = [
        ("element_bytes", ctypes.c_int32),
        ("channels", ctypes.c_int64),
        ("batch", ctypes.c_int64),
        ("geometry", emulation.FrameGeometry),
        ("map", emulation.FeatureMap),
        ("windows", _Windows),
    ]


class WindowPartitionLibrary(emulation.Library):
    """The kernels, run on uncopied tensors, so that tests control strides, alignment and surrounding memory."""

    def __init__(self, path: Path):
        super().__init__(path)
        self.functions.sizeof_window_copy_params.restype = ctypes.c_int64
        for name in ("emulated_window_partition", "emulated_window_reverse"):
            getattr(self.functions, name).argtypes = [ctypes.c_void_p, ctypes.c_int64]
        assert self.functions.sizeof_window_copy_params() == ctypes.sizeof(Params), "mirror differs from csrc/params"

    def params(self, x: Tensor, windows: Tensor, window: Sequence[int], shift: Sequence[int], pad_order: str) -> Params:
        assert x.stride(-1) == 1 or x.shape[-1] == 1
        assert windows.stride(-1) == 1 or windows.shape[-1] == 1
        rank = x.dim() - 2
        params = Params(element_bytes=x.element_size(), channels=x.shape[-1], batch=x.shape[0])
        params.geometry.fill(x.shape[1:-1], window, shift, (0,) * rank, pad_order)
        axis_stride = (ctypes.c_int64 * 3)(*emulation.three(x.stride()[1:-1], 0))
        params.map = emulation.FeatureMap(emulation.pointer(x), x.stride(0), axis_stride)
        params.windows = _Windows(emulation.pointer(windows), *windows.stride()[:2])
        return params

    def window_partition(
        self,
        x: Tensor,
        window: Sequence[int],
        shift: Sequence[int],
        pad_order: str = "pad_then_roll",
        *,
        max_vectors: int = 0,
    ) -> Tensor:
        num_windows = math.prod(-(-s // w) for s, w in zip(x.shape[1:-1], window, strict=True))
        windows = self.empty((x.shape[0] * num_windows, math.prod(window), x.shape[-1]), x.dtype)
        params = self.params(x, windows, window, shift, pad_order)
        self.check(self.functions.emulated_window_partition(ctypes.byref(params), max_vectors))
        return windows

    def window_reverse(
        self,
        windows: Tensor,
        size: Sequence[int],
        window: Sequence[int],
        shift: Sequence[int],
        pad_order: str = "pad_then_roll",
        *,
        max_vectors: int = 0,
    ) -> Tensor:
        num_windows = math.prod(-(-s // w) for s, w in zip(size, window, strict=True))
        x = self.empty((windows.shape[0] // num_windows, *size, windows.shape[-1]), windows.dtype)
        params = self.params(x, windows, window, shift, pad_order)
        self.check(self.functions.emulated_window_reverse(ctypes.byref(params), max_vectors))
        return x


@functools.cache
def window_partition_library() -> WindowPartitionLibrary:
    sources = [Path(__file__).with_suffix(".cu"), *emulation.kernel_sources("window_partition")]
    return WindowPartitionLibrary(emulation.build("window_partition", sources))
