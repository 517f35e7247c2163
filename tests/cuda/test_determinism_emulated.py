"""Tests that the bits of the CUDA kernels' results depend only on the conditions listed in docs/numerics.md."""

from __future__ import annotations

import pytest
import torch

from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import run_case
from tests import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

CASES = {
    "short, 16 bits": (Case(6, (14, 14), 2, 32, 7, 3), torch.bfloat16),
    "short, 16 bits, pads": (Case(6, (13, 16), 2, 32, 8, 3, has_pad_qkv=True), torch.float16),
    "short": (Case(6, (8, 8), 2, 16, 4, 1), torch.float32),
    "short, v2": (Case(6, (8, 8), 2, 16, 4, 1, has_logit_scale=True), torch.float32),
    "short, dense bias": (Case(6, (8, 8), 2, 16, 4, 1, has_table=False, bias_types=0), torch.bfloat16),
    "long, a table": (Case(4, (18, 18), 1, 32, 9, 4), torch.bfloat16),
    "long, general": (Case(4, (18, 18), 1, 8, 9, 4, has_logit_scale=True), torch.float32),
}
MAPS = ("out", "dqkv")
each_case = pytest.mark.parametrize(("case", "dtype"), CASES.values(), ids=CASES)


@each_case
def test_maps_have_the_same_bits_for_any_number_of_multiprocessors(library, case, dtype) -> None:
    """Gradients of parameters may differ: they are sums over blocks, whose number depends on the GPU."""
    inputs, arguments = case.inputs(dtype), case.arguments()
    results = []
    for multiprocessors in (1, 2, 200):
        library.configure(multiprocessors=multiprocessors)
        results.append(run_case(library.window_attention_qkvpacked, inputs, arguments))
    first, *others = results
    parameters = set(first) - set(MAPS)
    assert parameters
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in MAPS)
    assert any(not torch.equal(first[name], other[name]) for other in others for name in parameters)


@each_case
def test_an_image_has_the_same_bits_in_any_batch(library, case, dtype) -> None:
    inputs, arguments = case.inputs(dtype), case.arguments()
    together = run_case(library.window_attention_qkvpacked, inputs, arguments)
    alone = {name: x[-1:] if name in ("qkv", "dout") else x for name, x in inputs.items()}
    got = run_case(library.window_attention_qkvpacked, alone, arguments)
    for name in MAPS:
        assert torch.equal(got[name], together[name][-1:]), name
