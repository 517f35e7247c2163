"""The CUDA window attention kernels, run on the CPU by the emulator, against the float64 reference."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import emulation
import pytest
import torch
from torch import Tensor

from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import cancelling_terms, check_window_attention, run_case

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

# As torch.finfo counts, for 10 bits of mantissa. Attention in float64 whose matrix products round their operands to
# TF32, and nothing else, has RMS errors of 0.42 to 0.50 of this in the gradients of q, k and v.
TF32_EPS = 2.0**-10


@pytest.fixture
def library() -> Iterator[emulation.WindowAttentionLibrary]:
    built = emulation.window_attention_library()
    built.configure()
    yield built
    built.configure()


def _check(library: emulation.WindowAttentionLibrary, case: Case, arithmetic: str, seed: int = 0) -> dict[str, Tensor]:
    if arithmetic == "tf32":
        op = functools.partial(library.window_attention_qkvpacked, allow_tf32=True)
        return check_window_attention(op, case, torch.float32, eps=TF32_EPS, seed=seed)
    return check_window_attention(library.window_attention_qkvpacked, case, getattr(torch, arithmetic), seed=seed)


def _regions(*frame: int) -> Tensor:
    return torch.randint(0, 3, frame, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}
# Windows of 4 to 256 tokens, each with another head_dim, size and padding: what chooses tiles, loops and tails.
WINDOWS = [
    Case(2, (4, 6), 2, 8, 2, 1),
    Case(2, (7, 5), 1, 16, 3, 1, has_pad_qkv=True),
    Case(1, (8, 8), 2, 24, 4, 2),
    Case(1, (12, 9), 2, 32, 5, 2, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(2, (12, 14), 2, 32, 7, 3, has_pad_qkv=True),
    Case(1, (13, 14), 1, 40, 7, 3, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(3, (8, 16), 1, 64, 8, 4),
    Case(1, (12, 10), 1, 32, 10, 5, has_pad_qkv=True),
    Case(1, (12, 12), 2, 16, 12, 6),
    Case(1, (16, 9), 1, 32, 16, 7, has_pad_qkv=True),
]
# Every head_dim class.
HEAD_DIMS = [Case(1, (6, 9), 1, head_dim, 5, 2, has_pad_qkv=True) for head_dim in (48, 72, 96, 128)]
# What the geometry can say, on maps where each matters.
GEOMETRY = {
    "no table": Case(1, (7, 8), 2, 32, 4, 1, has_table=False, has_pad_qkv=True),
    "zero pads": Case(1, (7, 8), 2, 32, 4, 1),
    "no shift": Case(2, (8, 8), 2, 32, 4, 0),
    "window and shift of two sizes": Case(1, (9, 8), 2, 16, (3, 5), (1, 2), has_pad_qkv=True),
    "one row of windows": Case(3, (7, 21), 1, 32, 7, (0, 3)),
    "map smaller than the window": Case(2, (3, 2), 1, 16, 5, 4, has_pad_qkv=True),
    "map smaller than the shift, rolled first": Case(2, (3, 2), 1, 16, 5, 4, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "pads before": Case(1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (1, 1)}),
    "pads before, rolled first": Case(
        1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (2, 0), **ROLL_THEN_PAD}
    ),
    "periodic axis": Case(1, (8, 8), 2, 16, 4, 2, options={"periodic": (False, True)}),
    "region map": Case(1, (7, 8), 2, 16, 4, 1, has_pad_qkv=True, options={"region_map": _regions(8, 8)}),
    "grid": Case(2, (8, 12), 2, 32, 4, 0, options={"grid": True}),
    "grid with pads": Case(1, (7, 9), 1, 32, 5, 0, has_pad_qkv=True, options={"grid": True}),
    "grid with a region map": Case(1, (8, 8), 1, 16, 4, 0, options={"grid": True, "region_map": _regions(8, 8)}),
    "scale and mask value": Case(1, (8, 8), 2, 16, 4, 2, options={"scale": 0.5, "mask_value": -3.0}),
    "3D": Case(1, (4, 6, 5), 2, 16, (2, 3, 3), (1, 1, 1), has_pad_qkv=True),
    "3D, rolled first": Case(1, (3, 6, 5), 1, 32, (2, 4, 4), (1, 2, 2), has_pad_qkv=True, options=ROLL_THEN_PAD),
    "3D, window decoded in a larger one": Case(1, (2, 4, 4), 2, 16, (2, 4, 4), 0, options={"table_window": (8, 7, 7)}),
    "2D, long window, region map": Case(1, (9, 9), 1, 16, 9, 4, options={"region_map": _regions(9, 9)}),
    "long window decoded in a larger one": Case(1, (9, 10), 1, 16, (9, 10), 0, options={"table_window": (10, 12)}),
    "3D, long window": Case(1, (2, 8, 10), 1, 16, (2, 8, 8), (1, 4, 4), has_pad_qkv=True),
    "large bias table": Case(1, (6, 16, 2), 1, 16, (6, 16, 2), 0, options={"table_window": (10, 16, 10)}),
    # Most keys alike: what is left over of the sums of P, were it not taken out, would add up.
    "nearly all pads": Case(1, (16, 1), 1, 32, (7, 6), has_table=False, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "nearly all pads, long": Case(3, (1, 11), 3, 24, (9, 16), 0, has_pad_qkv=True, options={"scale": 0.1}),
    "many heads": Case(1, (4, 4), 24, 8, 4, 1),
    "many windows": Case(7, (6, 6), 1, 16, 2, 1),
}


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32", "tf32"])
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(library, case, arithmetic):
    _check(library, case, arithmetic)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("case", HEAD_DIMS, ids=str)
def test_head_dims(library, case, arithmetic):
    _check(library, case, arithmetic)


@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(library, name):
    _check(library, GEOMETRY[name], "float16")


@pytest.mark.parametrize("seed", range(3))
def test_exact_products_do_not_add_up_the_rounding_of_lse(library, seed):
    """A row of dS sums to zero, and so does dbias, although P is recomputed from a rounded lse."""
    case = GEOMETRY["nearly all pads, long"]
    got = _check(library, case, "float32", seed=seed)["dbias_table"].double()
    terms = cancelling_terms(case, {k: x.double() for k, x in case.inputs(torch.float32, seed=seed).items()})
    # Without the correction up to 8.6 of these units are left over, with it at most 2.6.
    unit = 2.0**-27 * terms["dbias_table"].sum(0)
    assert (got.sum(0).abs() <= 3 * unit).all()


@pytest.mark.parametrize("case", [WINDOWS[1], WINDOWS[4], WINDOWS[6], WINDOWS[7]], ids=str)
@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
def test_same_bits_whatever_the_schedule(library, case, arithmetic):
    """The threads' order must not matter: a missing barrier, or sums in the order of arrival, would show."""
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    inputs = case.inputs(dtype)
    arguments = {**case.arguments(), "allow_tf32": arithmetic == "tf32"}
    first = run_case(library.window_attention_qkvpacked, inputs, arguments)
    for seed in (1, 2, 3):
        library.configure(seed=seed)
        again = run_case(library.window_attention_qkvpacked, inputs, arguments)
        for name in first:
            assert torch.equal(first[name], again[name]), f"{name} differs with schedule {seed}"


@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 200])
def test_any_number_of_multiprocessors(library, multiprocessors):
    """From one block that loops over everything to more blocks than there is work."""
    library.configure(multiprocessors=multiprocessors)
    for case in (Case(3, (8, 6), 2, 32, 4, 1, has_pad_qkv=True), Case(1, (12, 10), 1, 32, 9, 4, has_pad_qkv=True)):
        _check(library, case, "bfloat16")


def test_rows_of_a_larger_tensor(library):
    """Heads, rows and images need not be next to each other."""
    case = Case(2, (7, 6), 2, 16, 4, 1, has_pad_qkv=True)
    inputs = case.inputs(torch.float16)
    dense = library.run(**inputs, **case.arguments())
    strided = library.run(**inputs, **case.arguments(), spread=True)
    for name in dense:
        assert torch.equal(dense[name], strided[name]), name


def test_lse(library):
    """The log-sum-exp of the scores, in natural units, in the order (batch, window, head, query)."""
    case = Case(2, (4, 8), 2, 16, 4, 0)
    inputs = case.inputs(torch.float16)
    lse = library.run(**inputs, **case.arguments())["lse"]
    q, k, _ = inputs["qkv"].double().reshape(2, 4, 2, 4, 3, 2, 16).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 5)
    token = torch.arange(16)
    offset = (token // 4)[:, None] - (token // 4) + 3, (token % 4)[:, None] - token % 4 + 3
    bias = inputs["bias_table"].double()[offset[0] * 7 + offset[1]].permute(2, 0, 1)
    expected = torch.logsumexp(q @ k.mT / math.sqrt(16) + bias, -1)
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=2e-5)


def test_empty_batch(library):
    results = _check(library, Case(0, (8, 8), 2, 16, 4, 1), "float16")
    assert results["out"].shape == (0, 8, 8, 32)
    assert results["dbias_table"].eq(0).all()


def test_gradients_that_nobody_wants(library):
    case = Case(1, (7, 8), 2, 16, 4, 1, has_pad_qkv=True)
    inputs = case.inputs(torch.float16)
    wanted = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    qkv = inputs["qkv"].clone().requires_grad_()
    out = library.window_attention_qkvpacked(qkv, inputs["bias_table"], pad_qkv=inputs["pad_qkv"], **case.arguments())
    (dqkv,) = torch.autograd.grad(out, qkv, inputs["dout"])
    assert torch.equal(dqkv, wanted["dqkv"])


@pytest.mark.parametrize(
    "case",
    [Case(1, (17, 17), 1, 16, 17, 0), Case(1, (4, 4), 1, 12, 4, 0), Case(1, (4, 4), 1, 136, 4, 0)],
    ids=["window volume", "head_dim multiple", "head_dim"],
)
def test_what_has_no_kernel_is_refused(library, case):
    case_inputs = case.inputs(torch.float16)
    case_inputs.pop("dout")
    with pytest.raises((emulation.LaunchError, ValueError)):
        library.window_attention_qkvpacked(**case_inputs, **case.arguments())
