"""Tests backend "torch", which implements every op in fast PyTorch code, against the reference in all dtypes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings

import swinkernels
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import run_case
from tests.support.attention_cases import cases
from tests.support.side_by_side import draw


def assert_same(got: dict, expected: dict) -> None:
    for name, x in expected.items():
        torch.testing.assert_close(got[name], x, rtol=1e-9, atol=1e-9 * float(x.abs().max()) + 1e-12, msg=name)


def both(case: Case, dtype: torch.dtype, **more) -> tuple[dict, dict]:
    inputs = case.inputs(dtype)
    inputs = {name: x.double() if dtype == torch.float64 else x for name, x in inputs.items()}
    arguments = {**case.arguments(), **more}
    got, expected = (
        run_case(swinkernels.window_attention_qkvpacked, inputs, {**arguments, "backend": backend})
        for backend in ("torch", "reference")
    )
    return got, expected


@settings(max_examples=120)
@given(cases())
def test_attention_is_the_references_in_float64(case):
    assert_same(*both(case, torch.float64))


LONG = Case(2, (16, 17), 2, 8, 12, 5, has_pad_qkv=True)
DIFFERENT = [
    LONG,
    Case(1, (9, 14), 2, 16, (4, 5), (1, 2), has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    Case(1, (16, 16), 2, 16, 8, 4, has_logit_scale=True),
    Case(1, (4, 8, 6), 2, 8, (2, 4, 3), (1, 2, 0), has_table=False, bias_types=2),
    Case(1, (9, 14), 2, 16, (4, 5), (1, 2), has_pad_qkv=True, options={"mask_value": -math.inf}),
    Case(3, (8, 8), 2, 8, 4, 2, has_table=False),
    Case(2, (4, 8, 6), 2, 8, (2, 4, 3), (1, 2, 0), has_table=False, bias_types=2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", DIFFERENT, ids=str)
def test_attention_rounds_as_plain_pytorch_does(case, dtype):
    """The RMS error is at most 4 eps of the result's RMS, plus 4 times the reference's error in the same dtype."""
    got, rounded = both(case, dtype)
    inputs = {name: x.double() for name, x in case.inputs(dtype).items()}
    exact = run_case(swinkernels.window_attention_qkvpacked, inputs, {**case.arguments(), "backend": "reference"})
    for name, x in exact.items():
        error, base = ((y[name].double() - x).square().mean().sqrt() for y in (got, rounded))
        limit = 4 * torch.finfo(dtype).eps * x.square().mean().sqrt() + 4 * base
        assert error <= limit, (name, float(error / limit))


@pytest.mark.parametrize("case", DIFFERENT, ids=str)
def test_attention_without_gradients_takes_the_fused_kernel(case, monkeypatch):
    """Without gradients, scaled_dot_product_attention runs unless logit_scale is given; outputs are the reference's."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def watched(*args, **kwargs):
        calls.append(args)
        return fused(*args, **kwargs)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", watched)
    inputs = {name: x.double() for name, x in case.inputs(torch.float32).items() if name != "dout"}
    got, expected = (
        swinkernels.window_attention_qkvpacked(**inputs, **case.arguments(), backend=backend)
        for backend in ("torch", "reference")
    )
    assert len(calls) == (not case.has_logit_scale)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_attention_drops_what_the_reference_drops(p):
    case = DIFFERENT[1]
    got, expected = (
        swinkernels.window_attention_qkvpacked(
            **{n: x.double() for n, x in case.inputs(torch.float32).items() if n != "dout"},
            **case.arguments(), dropout_p=p, return_attention=True, backend=backend,
            generator=torch.Generator().manual_seed(3),
        )
        for backend in ("torch", "reference")
    )  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_dropout_without_a_generator_keeps_the_expectation():
    torch.manual_seed(0)
    case = Case(4, (16, 16), 4, 16, 8)
    inputs = {n: x for n, x in case.inputs(torch.float32).items() if n != "dout"}
    weights = [
        swinkernels.window_attention_qkvpacked(
            **inputs, **case.arguments(), dropout_p=p, return_attention=True, backend="torch"
        )[1]
        for p in (0.0, 0.25)
    ]
    assert abs(float((weights[1] == 0).float().mean()) - 0.25) < 0.01
    kept = weights[1] != 0
    torch.testing.assert_close(weights[1][kept], weights[0][kept] / 0.75, rtol=1e-4, atol=1e-6)


def test_separate_maps_of_other_strides():
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 9, 10, 8, dtype=torch.float64, generator=g).permute(0, 2, 3, 1, 4) for _ in range(3))
    table = torch.randn(49, 3, dtype=torch.float64, generator=g)
    arguments = {"num_heads": 3, "window_size": 4, "shift_size": (1, 2), "mask_value": -3.0}
    got, expected = (
        swinkernels.window_attention(q, k, v, table, **arguments, backend=backend) for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pad_order", ["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("size", [(9, 14), (3, 6, 7)], ids=str)
def test_windows(size, pad_order):
    x = draw(2, *size, 3)
    window, shift = (4,) * len(size), (1, 3, 2)[: len(size)]
    options = {"pad_order": pad_order}
    got = swinkernels.window_partition(x, window, shift, **options, backend="torch")
    assert torch.equal(got, swinkernels.window_partition(x, window, shift, **options, backend="reference"))
    assert torch.equal(swinkernels.window_reverse(got, window, size, shift, **options, backend="torch"), x)


CALLS = {
    "layer_norm": lambda x, w, b, **o: swinkernels.layer_norm(x, w, b, **o),
    "residual_layer_norm": lambda x, w, b, **o: swinkernels.residual_layer_norm(x, x.flip(1), w, b, **o)[1],
    "residual_post_norm": lambda x, w, b, **o: swinkernels.residual_post_norm(x, x.flip(1), w, b, **o),
    "drop_path": lambda x, w, b, **o: swinkernels.residual_post_norm(
        x, x.flip(1), w, b, drop_path_scale=torch.tensor([0.0, 2.0]), **o
    ),
    "patch_expanding": lambda x, w, b, **o: swinkernels.patch_expanding(
        x, draw(4 * len(w), x.shape[-1]).to(x.dtype), w, b, **o
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_norms(name):
    x, w, b = draw(2, 5, 7, 12), draw(12, seed=1), draw(12, seed=2)
    results = []
    for backend in ("torch", "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        out = CALLS[name](*leaves, backend=backend)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("order", ["swin", "row_major", "unfold", "monai", "monai_legacy"])
@pytest.mark.parametrize("rank", [2, 3])
def test_patch_merging(order, norm, rank):
    x, weight = draw(2, 4, 5, 7, 3), draw(6, 3 * 2**rank, seed=1)
    parameters = [draw(weight.shape[norm == "pre"], seed=s) for s in (2, 3)]
    got, expected = (
        swinkernels.patch_merging(x, *parameters, weight, order=order, norm=norm, backend=backend)
        for backend in ("torch", "reference")
    )
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_a_norm_of_16_bit_rows_to_float32_is_not_rounded_between():
    x, w = draw(50, 96).to(torch.bfloat16), draw(96).float()
    got = swinkernels.layer_norm(x, w, dtype=torch.float32, backend="torch")
    exact = swinkernels.layer_norm(x.double(), w.double(), backend="reference")
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_auto_takes_it_where_no_kernel_runs(device, monkeypatch):
    """Backend "auto" chooses "torch" for float64, which no kernel supports, and on devices without kernels."""
    from swinkernels import reference

    for name in ("window_attention_qkvpacked", "window_partition", "layer_norm", "patch_merging"):
        monkeypatch.setattr(reference, name, None)
    x = torch.zeros(2, 8, 8, 12, dtype=torch.float64, device=device)
    assert swinkernels.window_attention_qkvpacked(x, num_heads=2, window_size=4, shift_size=2).shape == (2, 8, 8, 4)
    assert swinkernels.window_partition(x, 4, 2).shape == (8, 16, 12)
    assert swinkernels.layer_norm(x).shape == x.shape
    merged = swinkernels.patch_merging(x, None, None, torch.zeros(5, 48, dtype=x.dtype, device=device))
    assert merged.shape == (2, 4, 4, 5)


def test_nothing_fake_is_kept_for_later_calls():
    from torch._subclasses.fake_tensor import FakeTensorMode

    def call() -> torch.Tensor:
        qkv, table = torch.ones(1, 8, 8, 12), torch.ones(49, 2)
        arguments = {"num_heads": 2, "window_size": 4, "shift_size": 2}
        return swinkernels.window_attention_qkvpacked(qkv, table, **arguments, backend="torch")

    with FakeTensorMode():
        assert call().shape == (1, 8, 8, 4)
    torch.testing.assert_close(call(), torch.ones(1, 8, 8, 4))
