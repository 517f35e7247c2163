"""Tests that CPU backends are as accurate for low attention scores as for others, forward and backward."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from swinkernels import reference
from swinkernels.ops import _backends, window_attention_qkvpacked
from swinkernels.testing import check_window_attention
from tests.support.low_scores import CASES, LowScores

BACKENDS = ("cpu", "torch", "reference")
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def on(backend: str) -> functools.partial:
    reason = _backends.unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    return functools.partial(window_attention_qkvpacked, backend=backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_and_gradients(backend, name, dtype):
    op = on(backend)
    if backend == "reference" and dtype != torch.float32:
        op = functools.partial(reference_in_float32, op)  # rounds the inputs only
    check_window_attention(op, CASES[name], dtype)


def reference_in_float32(op, qkv, **arguments):
    pads = arguments.pop("pad_qkv", None)
    out = op(qkv.float(), pad_qkv=None if pads is None else pads.float(), **arguments)
    return out.to(qkv.dtype)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_low(name):
    case = CASES[name]
    inputs = case.inputs(torch.float16)
    inputs.pop("dout")
    _, lse = reference.window_attention_qkvpacked(**inputs, **case.arguments(), return_lse=True)
    assert lse.min() < -88


@settings(max_examples=40, deadline=None)
@given(
    n=st.sampled_from([1, 4, 16, 49, 63, 64, 65, 128, 192]),
    lowest=st.floats(-3e4, 100.0, width=32),
    dtype=st.sampled_from(DTYPES),
    dense=st.booleans(),
    backend=st.sampled_from(["cpu", "torch"]),
)
def test_any_range(n, lowest, dtype, dense, backend):
    case = LowScores(1, (1, n), 2, 8, (1, n), has_table=not dense, bias_types=0 if dense else None, lowest=lowest)
    check_window_attention(on(backend), case, dtype)
