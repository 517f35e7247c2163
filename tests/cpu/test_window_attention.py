"""Tests the C++ CPU backend: geometry, dtypes, strides, threads, instruction sets and extreme values."""

from __future__ import annotations

import math

import pytest
import torch

import swinkernels
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention, run_case
from tests.support import instruction_sets

MISSING = _backends.unavailable("cpu")
pytestmark = pytest.mark.skipif(MISSING is not None, reason=f"no CPU backend: {MISSING}")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def packed(*args, **arguments):
    return swinkernels.window_attention_qkvpacked(*args, **arguments, backend="cpu")


def separate(qkv, bias_table=None, *, num_heads, **arguments):
    """Call window_attention with q, k and v as strided views of ``qkv``."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return swinkernels.window_attention(q, k, v, bias_table, num_heads=num_heads, **arguments, backend="cpu")


def region_map(*frame: int) -> torch.Tensor:
    return torch.arange(math.prod(frame), dtype=torch.int32).reshape(frame) * 7919 % 3 - 1


WINDOWS = [
    Case(2, (2, 3), 2, 8, 1),
    Case(2, (4, 6), 2, 8, 2, 1),
    Case(1, (9, 6), 3, 16, 3, 1),
    Case(2, (8, 12), 2, 32, 4, 2),
    Case(1, (10, 6), 2, 32, (5, 3), (2, 1)),
    Case(2, (14, 21), 3, 32, 7, 3),
    Case(1, (16, 8), 2, 32, 8, 4),
    Case(1, (4, 34), 1, 32, (2, 17), (1, 8)),
    Case(1, (12, 24), 2, 32, 12, 6),
    Case(1, (16, 32), 2, 32, 16, 8),
    Case(1, (25, 24), 1, 16, (25, 24)),
    Case(1, (32, 32), 1, 8, 32, 16),
    Case(1, (1, 130), 1, 16, (1, 65), (0, 7)),
]
GEOMETRIES = [
    *(
        Case(2, (9, 13), 2, 16, (4, 5), (2, 1), has_pad_qkv=pad, options={"pad_order": order})
        for order in ("pad_then_roll", "roll_then_pad")
        for pad in (False, True)
    ),
    *(
        Case(1, (9, 13), 2, 16, (4, 5), (1, 3), has_pad_qkv=True, options={"pad_order": order, "pad_before": (2, 1)})
        for order in ("pad_then_roll", "roll_then_pad")
    ),
    Case(1, (3, 2), 2, 16, 7, 0, has_pad_qkv=True),
    Case(1, (3, 2), 2, 16, 7, 5, has_pad_qkv=True, options={"pad_order": "roll_then_pad", "pad_before": (3, 0)}),
    Case(1, (8, 12), 2, 16, 4, 2, options={"periodic": (False, True)}),
    Case(1, (8, 12), 2, 16, 4, 2, options={"periodic": True}),
    Case(1, (8, 12), 2, 16, 4, 0, options={"grid": True}),
    Case(1, (7, 10), 2, 16, 4, 0, has_pad_qkv=True, options={"grid": True}),
    Case(1, (8, 12), 2, 16, 4, 0, options={"region_map": region_map(8, 12)}),
    Case(1, (7, 10), 2, 16, 4, 3, has_pad_qkv=True, options={"region_map": region_map(8, 12), "mask_value": -3.0}),
    Case(1, (8, 8), 2, 16, 4, 2, options={"mask_value": 1.5, "scale": -0.4}),
    Case(2, (9, 13), 2, 16, (4, 5), (2, 1), has_pad_qkv=True, options={"mask_value": -math.inf}),
    Case(1, (20, 23), 1, 16, 12, 5, has_pad_qkv=True, options={"mask_value": -math.inf, "pad_order": "roll_then_pad"}),
    Case(1, (8, 8), 2, 16, 4, 2, has_table=False),
    Case(1, (6, 10), 2, 16, (3, 5), (1, 2), options={"table_window": (7, 7)}),
    Case(1, (14, 7, 7), 2, 16, (7, 7, 7), (3, 0, 0)),
    Case(2, (5, 6, 7), 2, 8, (2, 3, 4), (1, 1, 2), has_pad_qkv=True),
    Case(1, (5, 6, 7), 2, 8, (2, 3, 4), (1, 0, 2), has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    Case(1, (4, 6, 6), 1, 8, (4, 3, 3), (0, 1, 1), options={"table_window": (8, 7, 7)}),
    Case(1, (4, 6, 6), 1, 8, (2, 3, 3), (1, 1, 1), options={"periodic": (False, False, True)}),
]
COSINE = [  # v2; the first head's logit scale is clamped
    *(
        Case(1, (9, 13), 3, head_dim, (4, 5), (2, 1), has_pad_qkv=True, has_logit_scale=True)
        for head_dim in (1, 4, 10, 30, 32, 48)
    ),
    Case(2, (9, 13), 3, 8, 2, 1, has_pad_qkv=True, has_logit_scale=True),
    Case(2, (6, 9), 3, 8, 3, 1, has_logit_scale=True),
    Case(1, (9, 13), 2, 16, (4, 5), (2, 1), has_logit_scale=True),  # pad tokens are zeros, so their norm is 0
    Case(2, (14, 14), 3, 32, 7, 3, has_logit_scale=True),
    Case(1, (16, 16), 3, 32, 8, 4, has_logit_scale=True),
    Case(1, (16, 32), 2, 32, 16, 8, has_logit_scale=True),
    Case(1, (3, 2), 2, 16, 7, 5, has_pad_qkv=True, has_logit_scale=True, options={"pad_order": "roll_then_pad"}),
    Case(1, (7, 10), 2, 16, 4, 0, has_pad_qkv=True, has_logit_scale=True, options={"grid": True}),
    Case(2, (5, 6, 7), 2, 8, (2, 3, 4), (1, 1, 2), has_pad_qkv=True, has_logit_scale=True),
]
DENSE = [
    *(Case(2, (8, 12), 2, head_dim, 4, 2, has_table=False, bias_types=0) for head_dim in (4, 10, 30, 32)),
    Case(1, (14, 21), 3, 32, 7, 3, has_table=False, bias_types=0),
    Case(1, (9, 13), 2, 16, (4, 5), (2, 1), has_table=False, has_pad_qkv=True, has_logit_scale=True, bias_types=0),
    Case(1, (16, 16), 3, 32, 8, 4, has_table=False, has_logit_scale=True, bias_types=0),
    Case(1, (18, 36), 6, 8, 18, 9, has_table=False, bias_types=0),  # the cache does not hold every head's bias
    Case(2, (5, 6, 7), 2, 8, (2, 3, 4), (1, 1, 2), has_table=False, has_pad_qkv=True, bias_types=0),
    Case(2, (5, 6, 7), 2, 8, (2, 3, 4), (1, 1, 2), has_table=False, has_pad_qkv=True, bias_types=3),
    Case(3, (8, 16), 2, 16, 4, 2, has_table=False, bias_types=8),
    Case(3, (12, 16), 2, 16, 4, 2, has_table=False, has_logit_scale=True, bias_types=3),
]
HEAD_DIMS = [1, 3, 4, 8, 10, 17, 24, 32, 48, 96, 128]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(case, dtype):
    check_window_attention(packed, case, dtype)


@pytest.mark.parametrize("case", GEOMETRIES, ids=str)
def test_geometries(case):
    for dtype in DTYPES:
        check_window_attention(packed, case, dtype)


@pytest.mark.parametrize("case", COSINE + DENSE, ids=str)
def test_cosine_attention_and_dense_bias(case):
    for dtype in DTYPES:
        check_window_attention(packed, case, dtype)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim):
    for dtype in DTYPES:
        check_window_attention(packed, Case(1, (8, 11), 2, head_dim, (4, 5), (2, 1), has_pad_qkv=True), dtype)


@pytest.mark.parametrize("heads", [1, 5, 24])
def test_many_windows(heads):
    """The backward pass divides the windows into chunks and sums the bias and pad gradients of the chunks."""
    check_window_attention(packed, Case(3, (26, 27), heads, 4, 4, 2, has_pad_qkv=True), torch.float32)


@pytest.mark.parametrize("types", [0, 7])
def test_many_windows_with_a_dense_bias(types):
    case = Case(3, (26, 27), 5, 4, 4, 2, has_table=False, has_logit_scale=True, bias_types=types)
    check_window_attention(packed, case, torch.float32)


def embedded(x: torch.Tensor) -> torch.Tensor:
    """Return a copy of ``x`` as an unaligned view of a larger tensor with permuted axes."""
    b, h, *others, c = x.shape
    storage = torch.full((h, b, *(n + 1 for n in others), 2 * c + 3), math.nan)
    view = storage.to(x.dtype).transpose(0, 1)[(slice(None),) * 2 + (slice(1, None),) * len(others)][..., 1 : 1 + c]
    return view.copy_(x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_separate_maps(dtype):
    case = Case(2, (9, 10), 3, 12, 4, 2, has_pad_qkv=True)
    together, apart = (check_window_attention(op, case, dtype) for op in (packed, separate))
    assert all(torch.equal(together[name], apart[name]) for name in together)


def test_strides():
    case = Case(2, (8, 12), 2, 12, 4, 2)
    inputs = case.inputs(torch.float32)
    dense = run_case(packed, inputs, case.arguments())

    qkv = embedded(inputs["qkv"]).requires_grad_()
    out = packed(qkv, inputs["bias_table"], **case.arguments())
    (dqkv,) = torch.autograd.grad(out, qkv, embedded(inputs["dout"]))
    assert torch.equal(out, dense["out"])
    assert torch.equal(dqkv, dense["dqkv"])

    parts = [embedded(x).unflatten(-1, (2, 12)).requires_grad_() for x in inputs["qkv"].chunk(3, dim=-1)]
    # q, k and v may have different layouts, and the bias table may be transposed.
    parts[1] = torch.nn.functional.pad(parts[1].detach(), (0, 4))[..., :12].requires_grad_()
    table = inputs["bias_table"].t().contiguous().t()
    out = swinkernels.window_attention(*parts, table, **case.arguments(), backend="cpu")
    grads = torch.autograd.grad(out, parts, inputs["dout"][..., :1].expand_as(inputs["dout"]))
    expected = run_case(packed, {**inputs, "dout": inputs["dout"][..., :1].repeat(1, 1, 1, 24)}, case.arguments())
    assert torch.equal(out, dense["out"])
    assert torch.equal(torch.cat([g.flatten(-2) for g in grads], -1), expected["dqkv"])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(3, (20, 22), 3, 16, 7, 3, has_pad_qkv=True),
        Case(3, (20, 22), 3, 16, 7, 3, has_pad_qkv=True, has_logit_scale=True),
        Case(3, (20, 22), 3, 16, 7, 3, has_table=False, has_logit_scale=True, bias_types=0),
        Case(3, (20, 22), 3, 16, 7, 3, has_table=False, bias_types=3),
    ],
    ids=str,
)
def test_same_bits_for_any_number_of_threads(case, dtype):
    inputs = case.inputs(dtype)
    copies = {name: x.clone() for name, x in inputs.items()}
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 2, 5):
            torch.set_num_threads(n)
            results.append(run_case(packed, inputs, case.arguments()))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for name, expected in results[0].items():
            assert torch.equal(expected, other[name]), name
    assert all(torch.equal(inputs[name], copies[name]) for name in inputs)  # nothing was modified


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [{}, {"has_logit_scale": True}, {"has_table": False, "bias_types": 0}], ids=str)
def test_an_image_has_the_same_bits_in_any_batch(features, dtype):
    case = Case(5, (20, 22), 3, 16, 7, 3, **features)
    inputs = case.inputs(dtype)
    together = run_case(packed, inputs, case.arguments())
    alone = {name: x[-1:] if name in ("qkv", "dout") else x for name, x in inputs.items()}
    got = run_case(packed, alone, case.arguments())
    for name in ("out", "dqkv"):
        assert torch.equal(got[name], together[name][-1:]), name


def test_empty_batch():
    case = Case(0, (9, 10), 2, 8, 4, 2, has_pad_qkv=True)
    got = check_window_attention(packed, case, torch.float32)
    assert got["out"].shape == (0, 9, 10, 16)
    assert not got["dbias_table"].any()
    assert not got["dpad_qkv"].any()
    case = Case(0, (8, 8), 2, 8, 4, 2, has_table=False, has_logit_scale=True, bias_types=2)
    got = check_window_attention(packed, case, torch.float32)
    assert not got["dbias"].any()
    assert not got["dlogit_scale"].any()


def test_logit_scale_at_the_clamp():
    """ln 100 rounded to float32 exceeds ln 100, so a logit scale of this value has gradient 0, as in torch.clamp."""
    case = Case(1, (8, 8), 3, 16, 4, 2, has_logit_scale=True)
    inputs = case.inputs(torch.float32)
    bound = torch.tensor(math.log(100.0))
    inputs["logit_scale"] = torch.stack([bound, bound.nextafter(torch.tensor(5.0)), bound.nextafter(torch.tensor(4.0))])
    got = run_case(packed, inputs, case.arguments())["dlogit_scale"]
    expected = run_case(swinkernels.reference.window_attention_qkvpacked, inputs, case.arguments())["dlogit_scale"]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert [bool(x) for x in got] == [False, False, True]


def test_rows_too_short_to_be_normalised():
    """A row with a norm below 1e-12 is divided by the constant 1e-12, so its gradient is only scaled."""
    case = Case(1, (8, 8), 2, 16, 4, 2, has_logit_scale=True)
    inputs = case.inputs(torch.float32)
    inputs["qkv"][0, 2, 2, :64] = 0  # q and k of all heads
    inputs["qkv"][0, 5, 6, :64] *= 1e-13
    inputs["qkv"][0, 0, 7, :64] *= 1e-10
    got = run_case(packed, inputs, case.arguments())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(swinkernels.reference.window_attention_qkvpacked, wide, case.arguments())
    for name in ("out", "dlogit_scale", "dbias_table"):
        torch.testing.assert_close(got[name].double(), exact[name], rtol=1e-4, atol=1e-4)
    for token in ((2, 2), (5, 6), (0, 7), (3, 3)):
        row, expected = (gradients["dqkv"][(0, *token)].double() for gradients in (got, exact))
        assert (row - expected).abs().max() <= 1e-4 * expected.abs().max(), token


def test_large_scores():
    """With scores of +-1e4 the softmax picks one key, and the exponential must not overflow."""
    case = Case(1, (14, 14), 2, 32, 7, 3)
    inputs = case.inputs(torch.float32)
    inputs["qkv"] = inputs["qkv"] * 40
    inputs["bias_table"] = inputs["bias_table"] * 1e4
    got = run_case(packed, inputs, case.arguments())
    assert all(x.isfinite().all() for x in got.values())
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(swinkernels.reference.window_attention_qkvpacked, wide, case.arguments())
    torch.testing.assert_close(got["out"].double(), exact["out"], rtol=1e-2, atol=1e-2)


def test_float16_near_overflow():
    """Products beyond float16's range stay in float32, and a result just within the range is finite."""
    case = Case(1, (8, 8), 1, 32, 4, 0, has_table=False)
    inputs = case.inputs(torch.float16)
    inputs["qkv"] = inputs["qkv"].sign() * 6e4
    inputs["dout"] = inputs["dout"].sign()
    got = run_case(packed, inputs, case.arguments())
    assert not any(x.isnan().any() for x in got.values())
    assert got["out"].isfinite().all()
    assert got["out"].abs().max() > 5.9e4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_stays_in_its_window(dtype):
    case = Case(1, (8, 8), 2, 8, 4, 0)
    inputs = case.inputs(dtype)
    inputs["qkv"][0, 1, 2, 3] = math.nan  # affects one query row
    out = packed(inputs["qkv"], inputs["bias_table"], **case.arguments())
    expected = torch.zeros(8, 8, 16, dtype=torch.bool)
    expected[1, 2, :8] = True
    assert torch.equal(out[0].isnan(), expected)
    inputs["qkv"][0, 5, 6, 16 + 3] = math.nan  # affects the whole window
    out = packed(inputs["qkv"], inputs["bias_table"], **case.arguments())
    expected[4:, 4:, :8] = True
    assert torch.equal(out[0].isnan(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounding(dtype):
    """With one token per window, the output is v, for all numbers of the dtype, including infinities and subnormals."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[~values.isnan()]
    values = torch.nn.functional.pad(values, (0, -len(values) % 64)).reshape(1, -1, 1, 64)
    zeros = torch.zeros_like(values)
    out = packed(torch.cat([zeros, zeros, values], -1), num_heads=4, window_size=1)
    assert torch.equal(out, values)


@pytest.mark.parametrize("index", range(4))
def test_freed_memory(index):
    """A tensor whose memory was freed, as sharding and offloading do with parameters, raises an error."""
    *qkv, table = *(torch.randn(1, 8, 8, 16) for _ in range(3)), torch.randn(49, 2)
    (*qkv, table)[index].untyped_storage().resize_(0)
    q, k, v = (x.unflatten(-1, (2, 8)) for x in qkv)
    with pytest.raises(RuntimeError, match="has been freed"):
        swinkernels.window_attention(q, k, v, table, num_heads=2, window_size=4, backend="cpu")


ISA_CASES = """
import sys, torch
sys.path.insert(0, "tests")
from tests.cpu.test_window_attention import COSINE, DENSE, DTYPES, GEOMETRIES, HEAD_DIMS, WINDOWS, Case
from tests.cpu.test_window_attention import check_window_attention, packed, test_rounding
try:
    packed(torch.zeros(1, 1, 1, 3), num_heads=1, window_size=1)
except ValueError as error:
    print(error)
    sys.exit(77)
head_dims = [Case(1, (8, 11), 2, head_dim, (4, 5), (2, 1), has_pad_qkv=True) for head_dim in HEAD_DIMS]
for case in WINDOWS[::2] + GEOMETRIES[::3] + head_dims[::2] + COSINE[::2] + DENSE[::2]:
    for dtype in DTYPES:
        check_window_attention(packed, case, dtype)
for dtype in DTYPES[1:]:
    test_rounding(dtype)
"""


@pytest.mark.parametrize("name", instruction_sets.SETS)
def test_instruction_set(name):
    result = instruction_sets.run_with(name, ISA_CASES)
    if result.returncode == instruction_sets.UNSUPPORTED:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr


def test_unknown_instruction_set():
    result = instruction_sets.run_with("mmx", ISA_CASES)
    assert result.returncode == instruction_sets.UNSUPPORTED
    assert "SWINKERNELS_CPU_ISA must be" in result.stdout
    assert "baseline" in result.stdout
    assert "mmx" in result.stdout
