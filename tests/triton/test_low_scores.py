"""Low scores on the Triton backend, with 16-bit maps.

In float32, Triton's scores are in units of log 2 and round a little more than plain PyTorch's if they are large.
"""

from __future__ import annotations

import functools

import pytest
import torch

import swinkernels
from swinkernels.testing import check_window_attention
from tests.support.low_scores import CASES
from tests.support.triton_checks import DEVICE, DTYPES, Checks

check = Checks(__name__)


@check(*CASES, dtypes=tuple(dtype for dtype in DTYPES if dtype != torch.float32))
def outputs_and_gradients(name, dtype):
    op = functools.partial(swinkernels.window_attention_qkvpacked, backend="triton")
    check_window_attention(op, CASES[name], dtype, DEVICE)


@pytest.mark.parametrize("name", check.names())
def test_in_the_interpreter_or_on_a_gpu(name):
    check.run(name)
