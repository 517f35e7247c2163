"""Tests that the Triton backend is as accurate for low attention scores as for others, forward and backward."""

from __future__ import annotations

import functools

import pytest

import swinkernels
from swinkernels.testing import check_window_attention
from tests.support.low_scores import CASES
from tests.support.triton_checks import DEVICE, Checks

check = Checks(__name__)


@check(*CASES)
def outputs_and_gradients(name, dtype):
    op = functools.partial(swinkernels.window_attention_qkvpacked, backend="triton")
    check_window_attention(op, CASES[name], dtype, DEVICE)


@pytest.mark.parametrize("name", check.names())
def test_in_the_interpreter_or_on_a_gpu(name):
    check.run(name)
