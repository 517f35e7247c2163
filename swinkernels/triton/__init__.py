"""The ops in Triton: attaches their kernels to the ops with the suffix ``_triton``.

Triton is imported with the first call, not with the package.
"""

from __future__ import annotations

import functools
import os
from types import ModuleType

import torch

_lib = torch.library.Library("swinkernels", "IMPL")


@functools.cache
def _window_attention() -> ModuleType:
    from swinkernels.triton import window_attention

    return window_attention


def _qkvpacked_fwd(qkv, *arguments):
    return _window_attention().forward((qkv,), *arguments)


def _qkvpacked_bwd(dout, qkv, lse, *arguments):
    return _window_attention().backward(dout, (qkv,), lse, *arguments)


def _separate_fwd(q, k, v, *arguments):
    return _window_attention().forward((q, k, v), *arguments)


def _separate_bwd(dout, q, k, v, lse, *arguments):
    return _window_attention().backward(dout, (q, k, v), lse, *arguments)


# In Triton's interpreter (TRITON_INTERPRET=1) kernels run on the CPU.
_KEYS = ("CUDA", "CPU") if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on") else ("CUDA",)
for _key in _KEYS:
    _lib.impl("window_attention_qkvpacked_fwd_triton", _qkvpacked_fwd, _key)
    _lib.impl("window_attention_qkvpacked_bwd_triton", _qkvpacked_bwd, _key)
    _lib.impl("window_attention_fwd_triton", _separate_fwd, _key)
    _lib.impl("window_attention_bwd_triton", _separate_bwd, _key)
