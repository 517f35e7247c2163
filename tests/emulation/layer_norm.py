"""The CUDA kernels of the norms as functions of CPU tensors, with the arguments and results of the ops.

Each method that is named after an op of ``torch.ops.swinkernels`` computes this op with the emulated kernels.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests import emulation

_NORM, _RESIDUAL, _POST_NORM = range(3)
_PLAIN, _MERGING, _EXPANDING = range(3)


class _Rows(ctypes.Structure):
    _fields_ = [
        ("layout", ctypes.c_int32),
        ("length", ctypes.c_int32),
        ("count", ctypes.c_int64),
        ("size", ctypes.c_int32 * 3),
        ("factor", ctypes.c_int32 * 3),
        ("neighbours", ctypes.c_int32 * 8),
    ]


class _Forward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "in_dtype", "out_dtype", "weight_dtype", "bias_dtype")),
        ("rows", _Rows),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("x", "y", "drop_path_scale")),
        ("rows_per_sample", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "s", "z", "mean", "rstd")),
    ]


class _Backward(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("op", "in_dtype", "out_dtype", "weight_dtype")),
        ("rows", _Rows),
        *((name, ctypes.c_void_p) for name in ("normalised", "dz", "ds", "drop_path_scale")),
        ("rows_per_sample", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "mean", "rstd", "dx", "dy", "dweight", "dbias", "workspace")),
    ]


def _plain(x: Tensor) -> _Rows:
    return _Rows(layout=_PLAIN, length=x.shape[-1], count=math.prod(x.shape[:-1]))


def _of_map(
    layout: int, x: Tensor, z_shape: Sequence[int], factor: Sequence[int], neighbours: Sequence[int] = ()
) -> _Rows:
    rows = _Rows(layout=layout, length=z_shape[-1], count=math.prod(z_shape[:-1]))
    rows.size[:] = emulation.three(x.shape[1:-1], 1)
    rows.factor[:] = factor
    rows.neighbours[: len(neighbours)] = neighbours
    return rows


class LayerNormLibrary(emulation.Library):
    def __init__(self, path: Path):
        super().__init__(path)
        functions = self.functions
        for name in ("sizeof_layer_norm_forward_params", "sizeof_layer_norm_backward_params"):
            getattr(functions, name).restype = ctypes.c_int64
        functions.emulated_layer_norm_backward_workspace_bytes.restype = ctypes.c_int64
        assert functions.sizeof_layer_norm_forward_params() == ctypes.sizeof(_Forward), (
            "mirror differs from csrc/params"
        )
        assert functions.sizeof_layer_norm_backward_params() == ctypes.sizeof(_Backward), "mirror differs"
        self.max_row = functions.layer_norm_max_row()

    def _in(self, x: Tensor | None) -> Tensor | None:
        """Return a copy of ``x`` that ends at an inaccessible page, or None if ``x`` is None."""
        return None if x is None else self.copy(x.detach())

    def _run_forward(
        self,
        op: int,
        rows: _Rows,
        dtypes: tuple[torch.dtype, torch.dtype],
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
        eps: float,
    ) -> None:
        held = {name: self._in(x) for name, x in inputs.items()}
        params = _Forward(op=op, rows=rows, eps=eps)
        params.in_dtype, params.out_dtype = (emulation.DTYPES[dtype] for dtype in dtypes)
        for name in ("weight", "bias"):
            parameter = held.get(name)
            if parameter is not None:
                setattr(params, f"{name}_dtype", emulation.DTYPES[parameter.dtype])
        for name, x in {**held, **outputs}.items():
            setattr(params, name, emulation.pointer(x))
        scale = held.get("drop_path_scale")
        params.rows_per_sample = 0 if scale is None or len(scale) == 0 else rows.count // len(scale)
        self.check(self.functions.emulated_layer_norm_forward(ctypes.byref(params)))

    def _run_backward(
        self,
        op: int,
        rows: _Rows,
        dtypes: tuple[torch.dtype, torch.dtype],
        inputs: dict[str, Tensor | None],
        outputs: dict[str, Tensor],
        needs_dweight: bool,
        needs_dbias: bool,
    ) -> tuple[Tensor, Tensor]:
        held = {name: self._in(x) for name, x in inputs.items()}
        sums = {
            "dweight": self.empty((rows.length if needs_dweight else 0,), torch.float32),
            "dbias": self.empty((rows.length if needs_dbias else 0,), torch.float32),
        }
        params = _Backward(op=op, rows=rows)
        params.in_dtype, params.out_dtype = (emulation.DTYPES[dtype] for dtype in dtypes)
        weight, scale = held.get("weight"), held.get("drop_path_scale")
        if weight is not None:
            params.weight_dtype = emulation.DTYPES[weight.dtype]
        for name, x in {**held, **outputs, **sums}.items():
            setattr(params, name, emulation.pointer(x))
        params.rows_per_sample = 0 if scale is None or len(scale) == 0 else rows.count // len(scale)
        size = self.functions.emulated_layer_norm_backward_workspace_bytes(ctypes.byref(params))
        workspace = self.empty((size,), torch.uint8, alignment=emulation.WORKSPACE_ALIGNMENT)
        params.workspace = emulation.pointer(workspace)
        self.check(self.functions.emulated_layer_norm_backward(ctypes.byref(params)))
        return sums["dweight"], sums["dbias"]

    def _statistics(self, shape: Sequence[int]) -> dict[str, Tensor]:
        return {name: self.empty(shape, torch.float32) for name in ("mean", "rstd")}

    def _norm_fwd(self, rows, x, weight, bias, z_shape, eps, dtype):
        outputs = {"z": self.empty(z_shape, dtype), **self._statistics(z_shape[:-1])}
        self._run_forward(_NORM, rows, (x.dtype, dtype), {"x": x, "weight": weight, "bias": bias}, outputs, eps)
        return outputs["z"], outputs["mean"], outputs["rstd"]

    def _norm_bwd(self, rows, dz, x, weight, mean, rstd, needs_dweight, needs_dbias):
        dx = self.empty(x.shape, x.dtype)
        inputs = {"normalised": x, "dz": dz, "weight": weight, "mean": mean, "rstd": rstd}
        needs = (needs_dweight, needs_dbias)
        return dx, *self._run_backward(_NORM, rows, (x.dtype, dz.dtype), inputs, {"dx": dx}, *needs)

    def patch_merging_norm_fwd(self, x, weight, bias, factor, neighbours, eps, dtype):
        size = [-(-s // f) for s, f in zip(x.shape[1:-1], factor[-(x.dim() - 2) :], strict=True)]
        z_shape = (x.shape[0], *size, math.prod(factor) * x.shape[-1])
        rows = _of_map(_MERGING, x, z_shape, factor, neighbours)
        return self._norm_fwd(rows, x, weight, bias, z_shape, eps, dtype)

    def patch_merging_norm_bwd(
        self, dz, x, weight, mean, rstd, factor, neighbours, needs_dweight=True, needs_dbias=True
    ):
        rows = _of_map(_MERGING, x, dz.shape, factor, neighbours)
        return self._norm_bwd(rows, dz, x, weight, mean, rstd, needs_dweight, needs_dbias)

    def layer_norm_fwd(self, x, weight, bias, factor, eps, dtype):
        if not factor:
            return self._norm_fwd(_plain(x), x, weight, bias, x.shape, eps, dtype)
        size = [s * f for s, f in zip(x.shape[1:-1], factor[-(x.dim() - 2) :], strict=True)]
        z_shape = (x.shape[0], *size, x.shape[-1] // math.prod(factor))
        return self._norm_fwd(_of_map(_EXPANDING, x, z_shape, factor), x, weight, bias, z_shape, eps, dtype)

    def layer_norm_bwd(self, dz, x, weight, mean, rstd, factor, needs_dweight=True, needs_dbias=True):
        rows = _of_map(_EXPANDING, x, dz.shape, factor) if factor else _plain(x)
        return self._norm_bwd(rows, dz, x, weight, mean, rstd, needs_dweight, needs_dbias)

    def residual_layer_norm_fwd(self, x, y, drop_path_scale, weight, bias, eps):
        inputs = {"x": x, "y": y, "drop_path_scale": drop_path_scale, "weight": weight, "bias": bias}
        outputs = {"s": self.empty(x.shape, x.dtype), "z": self.empty(y.shape, y.dtype)}
        outputs |= self._statistics(x.shape[:-1])
        self._run_forward(_RESIDUAL, _plain(x), (x.dtype, y.dtype), inputs, outputs, eps)
        return tuple(outputs.values())

    def residual_layer_norm_bwd(
        self, ds, dz, s, drop_path_scale, weight, mean, rstd, needs_dweight=True, needs_dbias=True
    ):
        inputs = {"normalised": s, "dz": dz, "ds": ds, "drop_path_scale": drop_path_scale, "weight": weight}
        inputs |= {"mean": mean, "rstd": rstd}
        is_dx = drop_path_scale is None and dz.dtype == s.dtype
        outputs = {"dx": self.empty(s.shape, s.dtype), "dy": self.empty((0,) if is_dx else s.shape, dz.dtype)}
        needs = (needs_dweight, needs_dbias)
        sums = self._run_backward(_RESIDUAL, _plain(s), (s.dtype, dz.dtype), inputs, outputs, *needs)
        return *outputs.values(), *sums

    def residual_post_norm_fwd(self, x, y, drop_path_scale, weight, bias, eps):
        inputs = {"x": x, "y": y, "drop_path_scale": drop_path_scale, "weight": weight, "bias": bias}
        outputs = {"s": self.empty(x.shape, x.dtype), **self._statistics(x.shape[:-1])}
        self._run_forward(_POST_NORM, _plain(x), (x.dtype, y.dtype), inputs, outputs, eps)
        return tuple(outputs.values())

    def residual_post_norm_bwd(self, ds, y, drop_path_scale, weight, mean, rstd, needs_dweight=True, needs_dbias=True):
        inputs = {"normalised": y, "ds": ds, "drop_path_scale": drop_path_scale, "weight": weight}
        inputs |= {"mean": mean, "rstd": rstd}
        dy = self.empty(y.shape, y.dtype)
        needs = (needs_dweight, needs_dbias)
        return dy, *self._run_backward(_POST_NORM, _plain(y), (ds.dtype, y.dtype), inputs, {"dy": dy}, *needs)


@functools.cache
def layer_norm_library() -> LayerNormLibrary:
    sources = [Path(__file__).with_suffix(".cpp"), *emulation.kernel_sources("layer_norm")]
    return LayerNormLibrary(emulation.build("layer_norm", sources))
