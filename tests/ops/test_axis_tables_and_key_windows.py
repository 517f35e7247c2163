"""Tests decomposed relative positions, key windows and bias tables with window types against the reference, on every
backend that supports them.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

import swinkernels
from swinkernels.ops import _backends
from swinkernels.ops.window_attention import spec_of, window_attention_reasons
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import check_window_attention
from tests.ops.test_fallback import assert_same, both

AXES = {"has_table": False, "has_axis_tables": True}
AXIS_TABLES = {
    "window 4, shifted": Case(2, (9, 14), 2, 16, 4, 1, has_pad_qkv=True, **AXES),
    "two sizes": Case(1, (6, 10), 3, 8, (3, 5), (1, 2), options={"scale": 0.3}, **AXES),
    "SAM-B": Case(1, (20, 28), 2, 64, 14, has_pad_qkv=True, **AXES),
    "SAM-H": Case(1, (14, 14), 1, 80, 14, **AXES),
    "global": Case(1, (9, 12), 1, 32, (9, 12), **AXES),
    "beyond 1024 tokens": Case(1, (36, 40), 1, 16, (36, 40), **AXES),
    "3D": Case(1, (4, 5, 6), 2, 16, (2, 3, 4), (1, 1, 0), has_pad_qkv=True, **AXES),
    "grid": Case(1, (8, 12), 2, 16, 4, options={"grid": True}, **AXES),
    "masked out": Case(1, (8, 12), 2, 16, 4, 2, options={"mask_value": -math.inf}, **AXES),
}
KEY_WINDOWS = {
    "HAT": Case(1, (32, 16), 2, 30, 16, options={"key_window": 24}),
    "two sizes": Case(2, (6, 8), 2, 16, (3, 4), options={"key_window": (7, 4)}),
    "padded": Case(1, (7, 9), 2, 16, 4, has_pad_qkv=True, options={"key_window": 6, "pad_before": (0, 2)}),
    "wider than the map": Case(1, (4, 5), 2, 16, 4, has_pad_qkv=True, options={"key_window": 10}),
    "3D": Case(1, (4, 5, 6), 2, 16, (2, 3, 4), has_pad_qkv=True, options={"key_window": (4, 5, 4)}),
    "dense": Case(2, (8, 8), 2, 16, 4, has_table=False, bias_types=0, options={"key_window": 6}),
    "types": Case(1, (8, 8), 2, 16, 4, has_table=False, bias_types=2, options={"key_window": 6}),
    "no bias": Case(1, (8, 8), 2, 16, 4, has_table=False, options={"key_window": 6}),
    "v2": Case(1, (7, 8), 2, 16, 4, has_pad_qkv=True, has_logit_scale=True, options={"key_window": 6}),
}
PANGU = {"table_pairs": (True, True, False)}
TABLES = {
    "types": Case(2, (8, 8), 2, 16, 4, 2, table_types=2),
    "types, cosines, pads": Case(2, (7, 9), 3, 8, 4, 1, has_pad_qkv=True, has_logit_scale=True, table_types=3),
    "Pangu": Case(1, (4, 6, 12), 2, 8, (2, 3, 6), (1, 1, 3), table_types=4, options=PANGU),
    "Pangu, padded": Case(
        2,
        (3, 7, 12),
        2,
        8,
        (2, 3, 6),
        (1, 1, 3),
        has_pad_qkv=True,
        table_types=6,
        options={**PANGU, "pad_before": (0, 1, 0)},
    ),
    "pairs of the last axis": Case(1, (6, 8), 2, 16, (3, 4), (1, 2), options={"table_pairs": (False, True)}),
    "pairs of all axes": Case(1, (9, 20), 2, 16, (9, 10), options={"table_pairs": True}),
}
CASES = {
    **{f"bias_table: {name}": case for name, case in TABLES.items()},
    **{f"axis_tables: {name}": case for name, case in AXIS_TABLES.items()},
    **{f"key_window: {name}": case for name, case in KEY_WINDOWS.items()},
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def separate(qkv, bias_table=None, *, num_heads, **arguments):
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return swinkernels.window_attention(q, k, v, bias_table, num_heads=num_heads, **arguments)


@pytest.mark.parametrize("name", CASES)
def test_the_torch_backend_is_the_references_in_float64(name):
    assert_same(*both(CASES[name], torch.float64))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_torch_backend_rounds_as_plain_pytorch_does(name, dtype):
    case = CASES[name]
    got, rounded = both(case, dtype)
    inputs = {name: x.double() for name, x in case.inputs(dtype).items()}
    op = functools.partial(swinkernels.window_attention_qkvpacked, backend="reference")
    exact = swinkernels.testing.run_case(op, inputs, case.arguments())
    for name, x in exact.items():
        error, base = ((y[name].double() - x).square().mean().sqrt() for y in (got, rounded))
        limit = 4 * torch.finfo(dtype).eps * x.square().mean().sqrt() + 4 * base
        assert error <= limit, (name, float(error / limit))


@pytest.mark.parametrize("name", CASES)
def test_without_gradients_the_result_is_the_same(name):
    """Without gradients, scaled_dot_product_attention runs unless logit_scale is given; the output is the same."""
    case = CASES[name]
    inputs = {name: x.double() for name, x in case.inputs(torch.float32).items()}
    op = functools.partial(swinkernels.window_attention_qkvpacked, backend="torch")
    with_gradients = swinkernels.testing.run_case(op, inputs, case.arguments())["out"]
    tensors = swinkernels.testing.named_inputs(inputs)
    for call in (op, functools.partial(separate, backend="torch")):
        torch.testing.assert_close(call(**tensors, **case.arguments()), with_gradients, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("op", [swinkernels.window_attention_qkvpacked, separate], ids=["packed", "separate"])
@pytest.mark.parametrize("name", CASES)
def test_the_cpu_kernels(name, op):
    if (missing := _backends.unavailable("cpu")) is not None:
        pytest.skip(f"no CPU backend: {missing}")
    for dtype in DTYPES:
        check_window_attention(functools.partial(op, backend="cpu"), CASES[name], dtype)


def test_a_compiled_call_with_axis_tables_is_the_call():
    """Compiled and eager outputs and gradients agree; the op takes the axis tables concatenated into one tensor."""
    case = AXIS_TABLES["window 4, shifted"]
    inputs, arguments = case.inputs(torch.float32), {**case.arguments(), "backend": "auto"}
    op = swinkernels.window_attention_qkvpacked
    compiled = torch.compile(lambda **given: op(**given), backend="aot_eager", fullgraph=True)
    got, want = (swinkernels.testing.run_case(call, inputs, arguments) for call in (compiled, op))
    for name, x in want.items():
        torch.testing.assert_close(got[name], x, rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_kernels_that_have_not_an_argument_refuse_it_by_name(backend):
    """Triton implements key_window, and CUDA does not."""
    spec = spec_of("op", torch.zeros(0), (8, 8), 8, num_heads=2, window_size=4, key_window=6)
    reasons = window_attention_reasons(backend, spec, 8, torch.float32, torch.device("cpu"))
    assert ("it does not implement key_window" in reasons) == (backend == "cuda")


CUDA_LIMITS = {
    "max_window_volume": 1024,
    "shared_bytes_of_longest": 160 * 1024,
    "max_window_volume_in_less": 256,
    "max_axis_tables_window": 16,
    "max_axis_tables_head_dim": 64,
    "max_axis_tables_volume_in_less": 196,
}


@pytest.mark.parametrize(
    ("window", "head_dim", "dtype", "dropout_p", "room", "message"),
    [
        ((14, 14), 64, torch.bfloat16, 0.0, 99, None),
        ((16, 16), 64, torch.float16, 0.0, 163, None),
        ((3, 5), 8, torch.float16, 0.0, 99, None),
        ((14, 14), 64, torch.float32, 0.0, 227, "kernels for float16 and bfloat16, got float32"),
        ((17, 14), 64, torch.bfloat16, 0.0, 227, "windows of at most 16 x 16 tokens, got 17 x 14"),
        ((2, 4, 4), 64, torch.bfloat16, 0.0, 227, "windows of at most 16 x 16 tokens, got 2 x 4 x 4"),
        ((14, 14), 80, torch.bfloat16, 0.0, 227, "multiple of 8 of at most 64, got 80"),
        ((14, 14), 60, torch.bfloat16, 0.0, 227, "multiple of 8 of at most 64, got 60"),
        ((14, 14), 64, torch.bfloat16, 0.1, 227, "does not implement dropout_p"),
        ((16, 16), 64, torch.bfloat16, 0.0, 99, "at most 196 tokens on a GPU with less than 160 KB"),
    ],
)
def test_limits_of_the_cuda_kernels_for_axis_tables(monkeypatch, window, head_dim, dtype, dropout_p, room, message):
    monkeypatch.setitem(_backends.LIMITS, "cuda", CUDA_LIMITS)
    monkeypatch.setattr(_backends, "_shared_bytes", lambda device: room * 1024)
    monkeypatch.setattr(_backends, "_reasons", lambda *_: [])
    tables = tuple(torch.zeros(2 * w - 1, head_dim) for w in window)
    options = {"num_heads": 1, "window_size": window, "axis_tables": tables, "dropout_p": dropout_p}
    spec = spec_of("op", torch.zeros(0), window, head_dim, **options)
    reasons = window_attention_reasons("cuda", spec, head_dim, dtype, torch.device("cuda", 0))
    assert len(reasons) == (message is not None)
    assert all(message in reason for reason in reasons)


def test_a_call_is_looked_up_by_the_shapes_of_its_axis_tables():
    qkv, right = torch.randn(1, 4, 4, 24), (torch.randn(7, 4), torch.randn(7, 4))
    call = functools.partial(swinkernels.window_attention_qkvpacked, qkv, num_heads=2, window_size=4)
    call(axis_tables=right)
    with pytest.raises(ValueError, match="axis_tables must be"):
        call(axis_tables=(torch.cat(right), torch.zeros(0, 4)))
    assert not torch.equal(call(axis_tables=right), call())


@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_a_key_window_reads_pads_of_a_map_of_whole_windows(backend):
    """Output and gradients equal those of a direct call of swinkernels.reference with the same arguments."""
    torch.manual_seed(0)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    qkv, pad = torch.randn(1, 4, 4, 3 * 16, dtype=dtype), torch.randn(3 * 16, dtype=dtype)
    table = torch.randn(25, 2, dtype=dtype)
    options = {"num_heads": 2, "window_size": 2, "key_window": 4}
    found = []
    for call in (
        lambda q, t, p: swinkernels.window_attention_qkvpacked(q, t, pad_qkv=p, backend=backend, **options),
        lambda q, t, p: swinkernels.reference.window_attention_qkvpacked(q, t, pad_qkv=p, **options),
    ):
        leaves = [t.clone().requires_grad_() for t in (qkv, table, pad)]
        out = call(*leaves)
        found.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("window", "is_taken"), [((2, 254), True), ((64, 64), True), ((2, 255), False)])
def test_triton_refuses_a_tile_with_too_many_columns(window, is_taken):
    tables = tuple(torch.zeros(2 * w - 1, 8) for w in window)
    spec = spec_of("op", torch.empty(0), window, 8, num_heads=1, window_size=window, axis_tables=tables)
    reasons = window_attention_reasons("triton", spec, 8, torch.float32, torch.device("cpu"))
    assert any("may add up to 256, got 2 + 255" in reason for reason in reasons) is not is_taken
