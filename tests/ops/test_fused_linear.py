"""Tests Linear layers with GELU or a residual connection: fused on a CPU, or as separate calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode

import swinkernels
from swinkernels import _extension
from swinkernels.ops import _fused_linear, _onednn
from swinkernels.ops._fused_linear import Norm
from swinkernels.testing import assert_within_budget
from tests.support.fused_products import computed_by_layers, fused_calls

ROWS, IN, OUT = (3, 7, 25), 40, 900  # large enough to be fused in each dtype


@pytest.fixture(autouse=True)
def trains_on_torchs_products(monkeypatch) -> None:
    monkeypatch.setattr(_onednn, "outruns_mkl", lambda: False)


def need_fused(dtype: torch.dtype) -> None:
    reason = _fused_linear.why_not_fused(dtype)
    if reason is not None:
        pytest.skip(reason)


def draw(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random x, weight, bias and residual."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*ROWS, IN), (OUT, IN), (OUT,), (*ROWS, OUT))
    x, weight, bias, residual = (torch.randn(shape, generator=generator) for shape in shapes)
    return x.to(dtype), (weight / IN**0.5).to(dtype), bias.to(dtype), residual.to(dtype)


@pytest.fixture(params=["onednn", "kernels"])
def either(request, monkeypatch) -> str:
    """Run a test once with oneDNN and once with the extension's kernels, whichever this machine prefers."""
    if request.param == "kernels" and _extension.error is not None:
        pytest.skip(_extension.error)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: request.param == "kernels")
    return request.param


def plain(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: str | None, residual: Tensor | None) -> Tensor:
    y = F.linear(x, weight, bias)
    y = y if gelu is None else F.gelu(y, approximate=gelu)
    return y if residual is None else residual + y


@pytest.mark.parametrize(
    ("dtype", "either"),
    [
        *((dtype, "kernels") for dtype in (torch.float32, torch.bfloat16)),
        *((dtype, "onednn") for dtype in (torch.float32, torch.bfloat16, torch.float16)),
    ],
    indirect=["either"],
)
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "none"])
@pytest.mark.parametrize(("gelu", "is_added"), [(None, False), ("none", False), ("tanh", False), (None, True)])
def test_results(gelu, is_added, has_bias, dtype, either, monkeypatch):
    need_fused(dtype)
    monkeypatch.setattr(_fused_linear, "runs_alone", lambda x, weight: True)
    x, weight, bias, residual = draw(dtype)
    given = (x, weight, bias if has_bias else None, gelu, residual if is_added else None)
    before = residual.clone()
    with fused_calls() as called:
        y = _fused_linear.linear(*given[:3], gelu=gelu, residual=given[4])
    assert called == ["swinkernels::fused_linear" if either == "kernels" else "mkldnn::_linear_pointwise"]
    assert y.dtype == dtype
    torch.testing.assert_close(residual, before, rtol=0, atol=0)
    exact = plain(*(t.double() if isinstance(t, Tensor) else t for t in given))
    assert_within_budget(y, exact, lambda: plain(*(t.float() if isinstance(t, Tensor) else t for t in given)))


@pytest.mark.parametrize("least", [0, 384])
@pytest.mark.parametrize("channels", [64, 384])
def test_kernels_compute_a_layer_alone(channels, least, monkeypatch):
    """All but layers of few channels in bfloat16 where the CPU has products of bfloat16: oneDNN computes those."""
    if _extension.error is not None:
        pytest.skip(_extension.error)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    monkeypatch.setattr(_fused_linear, "_least_channels_alone", lambda: least)
    for dtype in (torch.float32, torch.bfloat16):
        need_fused(dtype)
        with fused_calls() as called:
            _fused_linear.linear(torch.ones(1000, channels, dtype=dtype), torch.ones(384, channels, dtype=dtype), None)
        on_kernels = dtype == torch.float32 or channels >= least
        assert called == ["swinkernels::fused_linear" if on_kernels else "mkldnn::_linear_pointwise"]


def test_bfloat16_where_only_kernels_have_products(monkeypatch):
    """With AVX2, torch's oneDNN has no product of bfloat16: what the kernels do not compute is left to torch."""
    if _extension.error is not None:
        pytest.skip(_extension.error)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    monkeypatch.setattr(_fused_linear, "_least_channels_alone", lambda: 0)
    monkeypatch.setattr(_onednn, "why_not_fused", lambda dtype: "no product" if dtype == torch.bfloat16 else None)
    assert _fused_linear.why_not_fused(torch.bfloat16) is None
    with torch.no_grad():
        assert _fused_linear.fuses(torch.ones(4, 4, dtype=torch.bfloat16))
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for rows, channels, hidden, kernel in ((1000, 64, 128, True), (1000, 63, 127, False), (1, 64, 128, False)):
        x, w1, w2, bias = random(rows, channels), random(hidden, channels), random(channels, hidden), random(channels)
        given = {"gelu": "none", "residual": x, "norm": Norm(None, None, 1e-5)}
        layers = w1, bias.new_zeros(hidden), w2, bias
        with fused_calls() as called:
            y = _fused_linear.linear(x, w1, None, gelu="none")
            z = _fused_linear.mlp(x, layers[:2], layers[2:], **given)
        assert called == (["swinkernels::fused_linear", *["swinkernels::fused_mlp"] * 2] if kernel else [])
        exact_y = F.gelu(x.double() @ w1.double().T)
        normed = F.layer_norm(x.double(), (channels,))
        exact_z = x.double() + F.gelu(normed @ w1.double().T) @ w2.double().T + bias.double()
        for got, exact in ((y, exact_y), (z, exact_z)):
            assert (got - exact).norm() <= 2**-7 * exact.norm()


def test_other_strides(either):
    """Any tensor may be strided. oneDNN itself would read a strided bias as if it were contiguous."""
    need_fused(torch.float32)
    x, weight, bias, residual = draw()
    strided_x, strided_weight = x.transpose(0, 1).contiguous().transpose(0, 1), weight.t().contiguous().t()
    strided_residual = residual.transpose(1, 2).contiguous().transpose(1, 2)
    for strided_bias in (bias, torch.stack([bias, -bias], 1)[:, 0], bias[:1].expand(OUT)):
        y = _fused_linear.linear(strided_x, strided_weight, strided_bias, residual=strided_residual)
        torch.testing.assert_close(y, plain(x, weight, strided_bias, None, residual), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("learns", ["x", "weight", "bias", "residual"])
def test_gradients_are_recorded(learns):
    tensors = dict(zip(("x", "weight", "bias", "residual"), draw(), strict=True))
    leaf = tensors[learns].requires_grad_()
    y, expected = _fused_linear.linear(**tensors), plain(*list(tensors.values())[:3], None, tensors["residual"])
    got = torch.autograd.grad(y.square().sum(), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), leaf))


def test_which_calls_are_fused():
    need_fused(torch.float32)
    x, weight, bias, _ = draw()

    def is_fused(*tensors: Tensor) -> bool:
        with fused_calls() as called:
            _fused_linear.linear(*tensors)
        return called != []

    assert is_fused(x, weight, bias)
    assert not is_fused(x[:1, :1], weight, bias)  # few rows
    assert not is_fused(x[:0], weight, bias)
    assert not is_fused(x.double(), weight.double(), bias.double())
    assert not is_fused(x, weight, bias[:1].expand(OUT))
    assert not is_fused(x, weight.clone().requires_grad_(), bias)
    with torch.no_grad():
        assert is_fused(x, torch.nn.Parameter(weight), bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert not is_fused(x, weight, bias)


def test_which_calls_use_the_kernels(monkeypatch):
    """One row and weights with other strides are left to oneDNN."""
    need_fused(torch.float32)
    if _extension.error is not None:
        pytest.skip(_extension.error)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    x, weight, bias, _ = draw()
    narrow, one_row = weight.t().contiguous(), torch.randn(1, 4000)

    def ops(*arguments: Any, function: Any = _fused_linear.linear, **options: Any) -> list[str]:
        with fused_calls() as called:
            function(*arguments, **options)
        return [name.partition("::")[0] for name in called]

    assert ops(x, weight, bias) == ["swinkernels"]
    assert ops(x, narrow.t(), bias) == ["mkldnn"]
    assert ops(one_row, torch.randn(6000, 4000), None) == ["mkldnn"]
    of_mlp = {"function": _fused_linear.mlp, "gelu": "none"}
    assert ops(x, (weight, bias), (narrow, None), **of_mlp) == ["swinkernels"] * 2
    assert ops(x, (weight, bias), (weight.t(), None), **of_mlp) == ["swinkernels", "mkldnn"]


class Marked(Tensor):
    """A subclass of Tensor that overrides nothing."""


def test_what_others_see_is_not_fused():
    """Under compilers, exporters, tracers, modes and transforms, and for subclasses, torch's own functions run."""
    x, weight, bias, residual = draw()
    expected = plain(x, weight, bias, None, residual)

    def linear(x: Tensor) -> Tensor:
        return _fused_linear.linear(x, weight, bias, residual=residual)

    with fused_calls() as called:
        found = [
            torch.compile(linear, backend="eager", fullgraph=True)(x),
            torch.jit.trace(linear, (x,), check_trace=False)(x),
            torch.func.vmap(lambda w: _fused_linear.linear(x, w, bias, residual=residual))(weight[None])[0],
            linear(x.as_subclass(Marked)),
        ]
        with FakeTensorMode() as mode:
            fake = [mode.from_tensor(t) for t in (x, weight, bias, residual)]
            assert _fused_linear.linear(*fake[:3], residual=fake[3]).shape == expected.shape
    assert called == []
    for y in found:
        torch.testing.assert_close(y, expected)


def test_float32_is_float32_until_torch_is_told_otherwise(either):
    need_fused(torch.float32)
    x, weight, bias, _ = draw()
    exact = plain(x.double(), weight.double(), bias.double(), None, None)
    matmul = torch.backends.mkldnn.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has no precision of float32 products on CPUs")
    before, errors = matmul.fp32_precision, []
    try:
        for precision in ("ieee", "bf16"):
            matmul.fp32_precision = precision
            results = (_fused_linear.linear(x, weight, bias), F.linear(x, weight, bias))
            errors.append([(y - exact).abs().max().item() for y in results])
    finally:
        matmul.fp32_precision = before
    assert errors[0][0] < 1e-5
    assert (errors[1][0] > 1e-3) == (errors[1][1] > 1e-3)  # both use oneDNN's bfloat16 products, or neither does


@pytest.mark.parametrize("is_added", [True, False])
@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_mlp_in_one_op(monkeypatch, gelu, is_added):
    """With the extension's kernels, an MLP is one op."""
    need_fused(torch.float32)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: _extension.error is None)
    if _extension.error is not None:
        pytest.skip(_extension.error)
    x, fc1, bias, _ = draw()
    generator = torch.Generator().manual_seed(2)
    fc2, residual = (torch.randn(s, generator=generator) for s in ((IN, OUT), (*ROWS, IN)))
    tensors = (x, fc1, bias, fc2 / OUT**0.5, residual if is_added else None)

    def composed(*tensors: Tensor | None) -> Tensor:
        x, fc1, bias, fc2, residual = tensors
        return plain(plain(x, fc1, bias, gelu, None), fc2, None, None, residual)

    for by_layers in (False, True):
        with computed_by_layers(by_layers), fused_calls() as names:
            y = _fused_linear.mlp(x, (fc1, bias), (tensors[3], None), gelu=gelu, residual=tensors[4])
        assert names == ["swinkernels::fused_mlp"] * 2
        exact = composed(*(t if t is None else t.double() for t in tensors))
        assert_within_budget(y, exact, lambda: composed(*tensors))


def test_a_halfs_products_on_a_cpu(either):
    """In inference, mlp_half fuses fc1 with GELU, and fc2 with the residual connection."""
    need_fused(torch.float32)
    generator = torch.Generator().manual_seed(1)
    c = 32
    x, fc1, fc2 = (torch.randn(s, generator=generator) for s in ((2, 40, 60, c), (4 * c, c), (c, 4 * c)))
    tensors = (x, None, None, fc1 / c**0.5, None, fc2 / (4 * c) ** 0.5, None)
    with fused_calls() as called:
        y = swinkernels.mlp_half(*tensors)
    assert len(called) == 2
    exact = swinkernels.reference.mlp_half(*(t if t is None else t.double() for t in tensors))
    assert_within_budget(y, exact, lambda: swinkernels.reference.mlp_half(*tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("is_added", [True, False])
def test_mlp_piece_by_piece(monkeypatch, is_added, dtype):
    """A large hidden layer is computed in pieces of rows, the last of which is smaller."""
    need_fused(dtype)
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: False)
    x, fc1, bias, _ = draw(dtype)
    generator = torch.Generator().manual_seed(2)
    fc2 = (torch.randn(IN, OUT, generator=generator) / OUT**0.5).to(dtype)
    residual = torch.randn(*ROWS, IN, generator=generator).to(dtype) if is_added else None
    whole_rows = x.numel() // IN
    monkeypatch.setattr(_fused_linear, "_LARGE", whole_rows * OUT * dtype.itemsize - 1)
    monkeypatch.setattr(_fused_linear, "_PIECE", 100 * OUT * dtype.itemsize)
    monkeypatch.setattr(_fused_linear, "is_large", lambda x, weight: True)

    def exact(*tensors: Tensor | None) -> Tensor:
        x, fc1, bias, fc2, residual = tensors
        return plain(F.gelu(F.linear(x, fc1, bias)), fc2, None, None, residual)

    tensors = (x, fc1, bias, fc2, residual)
    with fused_calls() as called:
        y = _fused_linear.mlp(x, (fc1, bias), (fc2, None), gelu="none", residual=residual)
    assert whole_rows % 100 != 0
    assert len(called) == 2 * -(-whole_rows // 100)
    assert y.shape == (*ROWS, IN)
    assert y.dtype == dtype
    assert_within_budget(
        y,
        exact(*(t if t is None else t.double() for t in tensors)),
        lambda: exact(*(t if t is None else t.float() for t in tensors)),
    )
    monkeypatch.setattr(_fused_linear, "_LARGE", whole_rows * OUT * dtype.itemsize)
    with fused_calls() as called:
        _fused_linear.mlp(x, (fc1, bias), (fc2, None), gelu="none", residual=residual)
    assert len(called) == 2


def test_an_mlp_with_gradients_is_not_computed_in_pieces(monkeypatch):
    need_fused(torch.float32)
    monkeypatch.setattr(_fused_linear, "_LARGE", 0)
    monkeypatch.setattr(_fused_linear, "_PIECE", 100 * OUT * torch.float32.itemsize)
    x, fc1, bias, _ = draw()
    fc2 = fc1.t().contiguous()
    leaf = x.clone().requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = _fused_linear.mlp(leaf, (fc1, bias), (fc2, None), gelu="tanh")
    assert [event.name for event in profile.events()].count("aten::linear") == 2
    expected = F.linear(plain(leaf, fc1, bias, "tanh", None), fc2)
    (got,) = torch.autograd.grad(y.square().mean(), leaf)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().mean(), leaf)[0], rtol=0, atol=0)


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        y = func(*args, **(kwargs or {}))
        return 2 * y if func in (F.linear, F.gelu) else y


def test_modes_and_functions_in_the_place_of_torchs_see_their_calls(monkeypatch):
    need_fused(torch.float32)
    x, weight, bias, _ = draw()
    exact = 2 * plain(x, weight, bias, None, None)
    with Doubled():
        torch.testing.assert_close(_fused_linear.linear(x, weight, bias), exact)
    with torch.device("cpu"), fused_calls() as called:  # the mode of torch.set_default_device
        _fused_linear.linear(x, weight, bias)
    assert called
    linear = F.linear
    monkeypatch.setattr(F, "linear", lambda *args: 2 * linear(*args))
    torch.testing.assert_close(_fused_linear.linear(x, weight, bias), exact)


def test_sparse_weights_have_the_separate_calls():
    need_fused(torch.float32)
    x, weight, bias, _ = draw()
    got = _fused_linear.linear(x, weight.to_sparse_csr(), bias)
    torch.testing.assert_close(got, plain(x, weight, bias, None, None), rtol=1e-4, atol=1e-4)
