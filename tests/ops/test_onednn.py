"""Tests Linear layers in float32 training whose products oneDNN computes, on any machine that has oneDNN."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import swinkernels
from swinkernels.ops import _onednn
from swinkernels.testing import assert_within_budget
from tests.support.fused_products import fused_calls

ROWS, NARROW, WIDE = (3, 7, 5), 24, 40


@pytest.fixture(autouse=True)
def on_onednn(monkeypatch) -> None:
    """Treat every machine as one where oneDNN outruns MKL, and every layer as large."""
    reason = _onednn.why_not_fused(torch.float32)
    if reason is not None:
        pytest.skip(reason)
    monkeypatch.setattr(_onednn, "outruns_mkl", lambda: True)
    monkeypatch.setattr(_onednn, "is_large", lambda x, weight: x.numel() > 0)


def draw(into: int = NARROW, out: int = WIDE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return a random x, weight, bias and gradient of the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*ROWS, into), (out, into), (out,), (*ROWS, out))
    x, weight, bias, dy = (torch.randn(shape, generator=generator) for shape in shapes)
    return x, weight, bias, dy


def products(function: Callable[[], Any]) -> int:
    """Return the number of products that oneDNN computes in a call of ``function``."""
    with fused_calls() as called:
        function()
    return called.count("mkldnn::_linear_pointwise")


def results(function: Callable[..., Tensor], tensors: list[Tensor | None], dy: Tensor) -> list[Tensor | None]:
    """Return the output and the gradients of all tensors that require one."""
    leaves = [None if t is None else t.detach().requires_grad_(t.requires_grad) for t in tensors]
    y = function(*leaves)
    y.backward(dy)
    return [y.detach(), *(None if t is None else t.grad for t in leaves)]


@pytest.mark.parametrize(("into", "out"), [(NARROW, WIDE), (WIDE, NARROW), (NARROW, NARROW), (3, WIDE)])
@pytest.mark.parametrize("learns", [*itertools.product((True, False), repeat=3)][:-1])
def test_output_and_every_gradient(into, out, learns):
    x, weight, bias, dy = draw(into, out)
    given = [t.requires_grad_(needs) for t, needs in zip((x, weight, bias), learns, strict=True)]
    found: list[Any] = []
    # One product for the output and one for each of the gradients of x and the weight.
    assert products(lambda: found.extend(results(_onednn.linear, given, dy))) == 1 + learns[0] + learns[1]
    exact = results(F.linear, [t.double().requires_grad_(t.requires_grad) for t in given], dy.double())
    plain = results(F.linear, given, dy)
    for got, wide, single in zip(found, exact, plain, strict=True):
        assert (got is None) == (wide is None)
        if got is not None:
            assert got.dtype == torch.float32 and got.is_contiguous()
            assert_within_budget(got, wide, lambda single=single: single)


def test_without_a_bias():
    x, weight, _, dy = draw()
    found = results(_onednn.linear, [x.requires_grad_(), weight.requires_grad_(), None], dy)
    exact = results(F.linear, [x.double().requires_grad_(), weight.double().requires_grad_(), None], dy.double())
    assert found[3] is None
    for got, wide in zip(found[:3], exact[:3], strict=True):
        torch.testing.assert_close(got, wide.float(), rtol=1e-5, atol=1e-5)


def test_any_strides():
    """oneDNN itself would read a strided bias as if it were contiguous."""
    x, weight, bias, dy = draw()
    strided = [
        x.transpose(0, 1).contiguous().transpose(0, 1),
        weight.t().contiguous().t(),
        torch.stack([bias, -bias], 1)[:, 0],
    ]
    rows_apart = torch.cat([weight, -weight], 1)[:, :NARROW]
    overlapping = weight.flatten().as_strided((WIDE, NARROW), (1, 1))
    expanded = bias[:1].expand(WIDE)
    for of_weight, of_bias in itertools.product((strided[1], rows_apart, overlapping), (strided[2], expanded)):
        for of_result in (dy, dy[:1, :1, :1, :1].expand(*ROWS, WIDE), dy.transpose(0, 2).contiguous().transpose(0, 2)):
            given = [strided[0].detach().requires_grad_(), of_weight, of_bias.detach().requires_grad_()]
            if of_weight is not overlapping:
                given[1] = of_weight.detach().requires_grad_()
            y, expected = _onednn.linear(*given), F.linear(*given)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            leaves = [t for t in given if t.requires_grad]
            got, wanted = (torch.autograd.grad(out, leaves, of_result) for out in (y, expected))
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=2e-5)


def test_gradients_of_gradients():
    def second(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
        x, weight, bias, dy = (t.to(dtype).requires_grad_() for t in draw())
        first = torch.autograd.grad(function(x, weight, bias).square(), (x, weight, bias), dy, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias, dy))

    exact = second(F.linear, torch.float64)
    for got, wide in zip(second(_onednn.linear, torch.float32), exact, strict=True):
        assert (got - wide).abs().max() <= 2e-6 * wide.abs().max()


def saved_by(function: Callable[..., Tensor], *tensors: Tensor | None) -> list[Any]:
    """Return the addresses, shapes and strides of the tensors that autograd saves."""
    saved: list[Any] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor.data_ptr(), tensor.shape, tensor.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function(*tensors)
    return saved


@pytest.mark.parametrize("learns", [*itertools.product((True, False), repeat=3)][:-1])
def test_autograd_saves_what_it_saves_for_torchs(learns):
    x, weight, bias = (t.requires_grad_(needs) for t, needs in zip(draw()[:3], learns, strict=True))
    for rows, of_bias in itertools.product((x, x.flatten(0, 1), x.flatten(0, 2)), (bias, None)):
        assert saved_by(_onednn.linear, rows, weight, of_bias) == saved_by(F.linear, rows, weight, of_bias)


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_the_result_may_be_modified_in_place(axes):
    x, weight, bias, dy = (t if t.dim() < 4 else t.flatten(0, 4 - axes) for t in draw())
    weight.requires_grad_()
    gradients = []
    for function in (_onednn.linear, F.linear):
        y = function(x, weight, bias)
        y.mul_(2).relu_()
        gradients += torch.autograd.grad(y, weight, dy)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


class PassesThrough(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("mode", [PassesThrough, lambda: torch.backends.mkldnn.flags(enabled=False)])
def test_checkpointing_in_a_mode_of_one_pass(mode, is_first):
    x, weight, bias, dy = draw()
    weight.requires_grad_()
    with mode() if is_first else contextlib.nullcontext():
        y = checkpoint(lambda x: _onednn.linear(x, weight, bias).relu(), x, use_reentrant=False)
    with contextlib.nullcontext() if is_first else mode():
        y.backward(dy)
    (expected,) = torch.autograd.grad(F.linear(x, weight, bias).relu(), weight, dy)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("into", "out"), [(WIDE, NARROW), (NARROW, WIDE)])
def test_an_expanded_gradient_is_left_to_torch(into, out):
    """oneDNN takes hundreds of times as long for operands with zero strides."""
    x, weight, bias, _ = draw(into, out)
    y = _onednn.linear(x.requires_grad_(), weight.requires_grad_(), bias)
    assert products(lambda: y.sum().backward()) == 0
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad, x.sum((0, 1, 2)).expand_as(weight), rtol=1e-5, atol=1e-5)


def test_a_flop_counter_counts_all_products():
    x, weight, bias, dy = draw()
    given = (x.requires_grad_(), weight.requires_grad_(), bias)
    with FlopCounterMode(display=False) as counter:
        _onednn.linear(*given).backward(dy)
    assert counter.get_total_flops() == 3 * 2 * x.numel() * WIDE
    with FlopCounterMode(display=False) as counter:
        y = checkpoint(_onednn.linear, *given, use_reentrant=False)  # only the first forward pass runs in the mode
    y.backward(dy)
    assert counter.get_total_flops() == 2 * x.numel() * WIDE


class Doubles(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        return 2 * result if function is F.linear else result


def test_which_calls_are_torchs(monkeypatch):
    x, weight, bias, _ = draw()
    weight.requires_grad_()

    def count(*tensors: Tensor | None) -> int:
        return products(lambda: _onednn.linear(*tensors))

    assert count(x, weight, bias) == count(x[0, 0], weight, None) == 1
    assert count(x[:0], weight, bias) == count(x[0, 0, 0], weight, bias) == 0
    assert count(x, weight.detach(), bias) == 0  # inference has other functions
    assert count(x.double(), weight.double(), bias.double()) == count(x.bfloat16(), weight.bfloat16(), None) == 0
    with torch.no_grad():
        assert count(x, weight, bias) == 0
    with torch.autocast("cpu"):
        assert count(x, weight, bias) == 0
        assert _onednn.linear(x, weight, bias).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert count(x, weight, bias) == 0
    twice = 2 * F.linear(x, weight, bias)
    with Doubles():
        assert count(x, weight, bias) == 0
        torch.testing.assert_close(_onednn.linear(x, weight, bias), twice)
    of_weight = torch.func.grad(lambda w: _onednn.linear(x, w, bias).sum())(weight.detach())
    torch.testing.assert_close(of_weight, x.sum((0, 1, 2)).expand(WIDE, NARROW), rtol=1e-5, atol=1e-5)
    compiled = torch.compile(_onednn.linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), F.linear(x, weight, bias))
    monkeypatch.setattr(_onednn, "outruns_mkl", lambda: False)
    assert count(x, weight, bias) == 0


def test_backward_under_a_mode_that_is_not_forwards():
    """The backward pass decides again."""
    x, weight, bias, dy = draw()
    y = _onednn.linear(x.requires_grad_(), weight, bias)
    with torch.backends.mkldnn.flags(enabled=False):
        assert products(lambda: y.backward(dy)) == 0
    torch.testing.assert_close(x.grad, dy @ weight, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, weight, bias: (x[..., 1:], weight, bias),
        lambda x, weight, bias: (x, weight, bias[1:]),
        lambda x, weight, bias: (x, weight.double(), bias),
        lambda x, weight, bias: (x, weight[None, None], bias),
        lambda x, weight, bias: (x, weight[0, 0], bias),
        lambda x, weight, bias: (x, weight, bias.double()),
    ],
)
def test_wrong_arguments_get_torchs_error(wrong):
    given = wrong(*(t.requires_grad_() for t in draw()[:3]))
    with pytest.raises(RuntimeError) as expected:
        F.linear(*given)
    with pytest.raises(RuntimeError) as found:
        _onednn.linear(*given)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("op", ["attention_half", "mlp_half"])
def test_gradients_of_halves(op, norm):
    """The backward pass of a half differentiates products of maps, not of rows."""
    generator = torch.Generator().manual_seed(0)
    c = 24

    def draw_scaled(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    x, dy, weight, bias = draw_scaled(2, 6, 9, c), draw_scaled(2, 6, 9, c), draw_scaled(c), draw_scaled(c)
    wide = 3 * c if op == "attention_half" else 4 * c
    layers = [draw_scaled(wide, c), draw_scaled(wide), draw_scaled(c, wide if op == "mlp_half" else c), draw_scaled(c)]
    options: dict[str, Any] = {"num_heads": 3, "window_size": 3} if op == "attention_half" else {}
    half = getattr(swinkernels, op)

    def run(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, weight, bias, *layers)]
        y = half(*leaves, norm=norm, **options)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))]

    found: list[Tensor] = []
    # Two for the gradients of each layer; other kernels may compute the output.
    assert products(lambda: found.extend(run(torch.float32))) >= 4
    for got, exact in zip(found, run(torch.float64), strict=True):
        assert (got - exact).abs().max() <= 2e-5 * exact.abs().max()


def test_processors(monkeypatch, tmp_path):
    """Only AMD's processors since Zen 5 have been measured."""
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")

    def of(vendor: str, family: str) -> bool:
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\ncpu family\t: {family}\n\nx\t: y\n")
        monkeypatch.setattr(_onednn, "Path", lambda path: tmp_path / "cpuinfo")
        return _onednn.outruns_mkl.__wrapped__()

    assert of("AuthenticAMD", "26") and not of("AuthenticAMD", "25") and not of("GenuineIntel", "26")
    (tmp_path / "cpuinfo").unlink()
    monkeypatch.setattr(_onednn, "Path", lambda path: tmp_path / "missing")
    assert not _onednn.outruns_mkl.__wrapped__()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert not _onednn.outruns_mkl.__wrapped__()
