"""Tests the CUDA kernels, run on the CPU by the emulator, on cases with low scores."""

from __future__ import annotations

import functools

import pytest
import torch

from swinkernels.testing import check_window_attention
from tests.support.low_scores import CASES
from tests.support.sweeps import in_turn


@pytest.mark.parametrize(("name", "dtype"), in_turn(CASES, [torch.float16, torch.bfloat16, torch.float32]))
def test_outputs_and_gradients(library, name, dtype):
    op = functools.partial(library.window_attention_qkvpacked)
    check_window_attention(op, CASES[name], dtype, rounds_unit_rows=True)
