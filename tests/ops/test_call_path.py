"""Tests that few of this package's functions run between the public window attention functions and the op.

docs/architecture.md shows the whole path, C++ included.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import swinkernels
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase

PACKAGE = str(Path(swinkernels.__file__).parent)
CASE = WindowAttentionCase(2, (6, 9), 2, 16, (4, 4), (2, 2))

pytestmark = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))


def is_ours(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(PACKAGE)


def ours_on_the_stack(frame: FrameType | None) -> list[str]:
    names = []
    while frame is not None:
        if is_ours(frame):
            names.append(frame.f_code.co_name)
        frame = frame.f_back
    return names[::-1]


def make_call(*, requires_grad: bool = False) -> Callable[[], Tensor]:
    inputs = CASE.inputs(torch.float32)
    del inputs["dout"]
    inputs["qkv"].requires_grad_(requires_grad)
    return functools.partial(swinkernels.window_attention_qkvpacked, **inputs, **CASE.arguments(), backend="cpu")


def path_of(call: Callable[[], Any]) -> tuple[list[str], list[str]]:
    """Return the names of our functions that ``call`` enters, and of those on the stack when it calls the op."""
    entered: list[str] = []
    stack: list[str] = []

    def watch(frame: FrameType, event: str, _: Any) -> None:
        if event != "call":
            return
        if is_ours(frame) and not frame.f_code.co_name.startswith("<"):  # no comprehensions
            entered.append(frame.f_code.co_name)
        elif isinstance(frame.f_locals.get("self"), torch._ops.OpOverload) and frame.f_code.co_name == "__call__":
            stack[:] = ours_on_the_stack(frame.f_back)

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered, stack


def test_a_cached_call_takes_two_functions_to_its_op() -> None:
    call = make_call()
    first, stack = path_of(call)
    assert stack == ["window_attention_qkvpacked", "_attend"]
    assert "_make_plan" in first
    cached, stack = path_of(call)
    assert stack == ["window_attention_qkvpacked", "_attend"]
    # The last three functions decide whether the call may be cached, under which key, and whether autograd records it.
    # Calls with dropout, or with tables to convert, also enter _fit.
    assert cached == ["window_attention_qkvpacked", "_attend", "is_plain", "call_key", "any_requires_grad"]


def test_a_recorded_call_takes_one_function_more() -> None:
    call = make_call(requires_grad=True)
    call()
    entered, stack = path_of(call)
    assert stack == ["window_attention_qkvpacked", "_attend", "forward"]
    assert entered[-2:] == ["forward", "setup_context"]
