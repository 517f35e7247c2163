"""Attaches the Triton kernels to the ops with the suffix ``_triton``.

Triton is imported on the first call, not with the package.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from swinkernels._namespace import NAMESPACE

_lib = torch.library.Library(NAMESPACE, "IMPL")

# In Triton's interpreter (TRITON_INTERPRET=1) the kernels also run on the CPU.
_KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on") else ("CUDA",)


@functools.cache
def _launcher(name: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{name}")


def launch_captured(op: str, launch: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``launch`` during a CUDA graph capture; raise RuntimeError if Triton would have to compile a kernel.

    A newly compiled kernel is loaded into the GPU's memory, which CUDA forbids during a capture.
    """
    from triton import knobs

    def refuse(**_: Any) -> None:
        raise RuntimeError(
            f"{op}: Triton has no compiled kernel for this call yet, and none can be loaded while a CUDA graph is "
            "being captured: call the op once with tensors of these shapes, dtypes and strides before capturing"
        )

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = refuse
        return launch(*arguments)


def _attach(op: str, launch: Callable[..., Any]) -> None:
    """Register ``launch`` as the implementation of ``{op}_triton``.

    Triton launches on the current device, so each call first makes the tensors' GPU current.
    """

    def run(x, *arguments):
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            with torch.cuda.device(x.device):
                return run(x, *arguments)
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return launch_captured(op, launch, x, *arguments)
        return launch(x, *arguments)

    for key in _KEYS:
        _lib.impl(f"{op}_triton", run, key)


def _qkvpacked_fwd(qkv, *arguments):
    return _launcher("window_attention.launch").forward((qkv,), *arguments)


def _qkvpacked_bwd(dout, qkv, lse, *arguments):
    return _launcher("window_attention.launch").backward(dout, (qkv,), lse, *arguments)


def _separate_fwd(q, k, v, *arguments):
    return _launcher("window_attention.launch").forward((q, k, v), *arguments)


def _separate_bwd(dout, q, k, v, lse, *arguments):
    return _launcher("window_attention.launch").backward(dout, (q, k, v), lse, *arguments)


_attach("window_attention_qkvpacked_fwd", _qkvpacked_fwd)
_attach("window_attention_qkvpacked_bwd", _qkvpacked_bwd)
_attach("window_attention_fwd", _separate_fwd)
_attach("window_attention_bwd", _separate_bwd)
_attach("window_partition", lambda *arguments: _launcher("window_partition").partition(*arguments))
_attach("window_reverse", lambda *arguments: _launcher("window_partition").reverse(*arguments))
_attach("patch_merging_norm_fwd", lambda *arguments: _launcher("patch_merging").forward(*arguments))
_attach("patch_merging_norm_bwd", lambda *arguments: _launcher("patch_merging").backward(*arguments))
_attach("mlp_half", lambda *arguments: _launcher("mlp_half").forward(*arguments))
