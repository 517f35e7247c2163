"""Tests attention_half and mlp_half against the reference and torch's modules, and the bytes kept for backward."""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor

import swinkernels
from swinkernels import _extension, reference
from swinkernels.ops import _backends, _fused_linear, _onednn
from swinkernels.ops._library import constant_when_compiled
from tests.support.fused_products import always_fused, computed_by_layers, fused_calls
from tests.support.saved_bytes import kept_bytes
from tests.support.side_by_side import assert_same, draw
from tests.support.sweeps import in_turn

C, HEADS, HIDDEN = 12, 3, 20
DROP = torch.tensor([0.0, 1.25], dtype=torch.float64)
OPS = ("attention_half", "mlp_half")


def case(op: str, size: tuple[int, ...] = (6, 7), *, norm: str = "pre", full: bool = True) -> tuple[list, dict]:
    """Return the arguments of ``op`` in float64: the list of positional tensors, and the keyword arguments."""
    shapes = {"attention_half": (3 * C, C, C), "mlp_half": (HIDDEN, C, HIDDEN)}[op]
    rows, width, inner = shapes
    tensors = [
        draw(2, *size, C), 1 + 0.3 * draw(C, seed=3), draw(C, seed=4), 0.4 * draw(rows, width, seed=5),
        draw(rows, seed=6), 0.4 * draw(C, inner, seed=7), draw(C, seed=8),
    ]  # fmt: skip
    options: dict[str, Any] = {"norm": norm}
    if op == "attention_half":
        window = (2, 3, 4)[-len(size) :]
        options |= {"num_heads": HEADS, "window_size": window, "shift_size": tuple(w // 2 for w in window)}
        rows = 1
        for w in window:
            rows *= 2 * w - 1
        tensors.append(draw(rows, HEADS, seed=9))
        if norm == "post":
            options["logit_scale"] = 2 + draw(HEADS, seed=10)
    if full:
        options |= {"drop_path_scale": DROP, "layer_scale": draw(C, seed=11)}
    else:
        tensors[1] = tensors[2] = tensors[4] = tensors[6] = None
    return tensors, options


def differentiable(tensors: list, options: dict) -> list[Tensor]:
    named = [options.get(name) for name in ("layer_scale", "logit_scale")]
    return [t for t in (*tensors, *named) if t is not None]


def plain_half(op: str, tensors: list, options: dict) -> Tensor:
    """Return the result of ``op``, computed as in published blocks with torch's layers and this package's attention."""
    x, norm_weight, norm_bias, first, first_bias, last, last_bias, *table = tensors
    options = dict(options)
    norm, d, gamma = options.pop("norm"), options.pop("drop_path_scale", None), options.pop("layer_scale", None)
    y = F.layer_norm(x, (C,), norm_weight, norm_bias) if norm == "pre" else x
    y = F.linear(y, first, first_bias)
    if op == "mlp_half":
        y = F.gelu(y)
    else:
        y = swinkernels.window_attention_qkvpacked(y, *table, pad_qkv=first_bias, backend="torch", **options)
    y = F.linear(y, last, last_bias)
    y = F.layer_norm(y, (C,), norm_weight, norm_bias) if norm == "post" else y
    y = y if gamma is None else gamma * y
    return x + (y if d is None else y * d.reshape(-1, *(1,) * (x.dim() - 1)))


@pytest.mark.parametrize("full", [True, False], ids=["full", "bare"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("size", [(6, 8), (6, 7), (3, 6, 7)], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_output_and_every_gradient(op, size, norm, full):
    tensors, options = case(op, size, norm=norm, full=full)
    half, leaves = getattr(swinkernels, op), differentiable(tensors, options)
    expected: Callable[[], Tensor]
    for expected in (lambda: getattr(reference, op)(*tensors, **options), lambda: plain_half(op, tensors, options)):
        assert_same(lambda: half(*tensors, **options), expected, leaves)
        assert_same(lambda: half(*tensors, backend="reference", **options), expected, leaves)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("op", OPS)
def test_without_the_residual_connection(op, norm):
    tensors, options = case(op, norm=norm)
    half = getattr(swinkernels, op)
    assert_same(
        lambda: tensors[0] + half(*tensors, residual=False, **options),
        lambda: half(*tensors, **options),
        differentiable(tensors, options),
    )


@pytest.mark.parametrize("scale", [None, DROP])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_the_half_before_is_added_first(norm, scale):
    (x, *parameters), options = case("mlp_half", norm=norm)
    branch = draw(*x.shape, seed=12)
    given = {"branch": branch, "branch_scale": scale}
    leaves = differentiable([x, branch, *parameters], options)
    d = 1 if scale is None else scale.reshape(-1, 1, 1, 1)
    half = swinkernels.mlp_half
    for expected in (
        lambda: reference.mlp_half(x, *parameters, **given, **options),
        lambda: plain_half("mlp_half", [x + d * branch, *parameters], options),
        lambda: half(x, *parameters, backend="reference", **given, **options),
    ):
        assert_same(lambda: half(x, *parameters, **given, **options), expected, leaves)
    got = half(x, *parameters, residual=False, **given, **options)
    torch.testing.assert_close(got, half(x + d * branch, *parameters, residual=False, **options))
    got = torch.autograd.grad(got.sum(), [x, branch])
    torch.testing.assert_close(got[1], got[0] * d)


@pytest.mark.parametrize("scale", [None, DROP], ids=["plain", "scaled"])
@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_both_derivatives_where_the_half_before_is_added(norm, is_frozen, scale):
    """First and second derivatives are correct, also if ``branch`` is frozen.

    The MLP and the residual connection both read x + branch, so the gradient of that sum has two terms.
    """
    (x, *parameters), options = case("mlp_half", (2, 3), norm=norm)
    branch = draw(*x.shape, seed=12)
    leaves = [t.requires_grad_() for t in (x, *parameters, *([] if is_frozen else [branch]))]

    def derivatives(backend: str) -> tuple[tuple[Tensor, ...], ...]:
        given = {"branch": branch, "branch_scale": scale, "backend": backend, **options}
        loss = swinkernels.mlp_half(x, *parameters, **given).square().sum()
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        differentiable = torch.autograd.grad(loss, leaves, create_graph=True)
        return first, torch.autograd.grad(sum(g.square().sum() for g in differentiable), leaves)

    torch.testing.assert_close(derivatives("torch"), derivatives("reference"))


def test_a_scale_that_learns():
    (x, *parameters), _ = case("mlp_half")
    branch, scale = draw(*x.shape, seed=12), DROP.clone()
    options = {"branch": branch, "branch_scale": scale, "drop_path_scale": 1 + scale}
    assert_same(
        lambda: swinkernels.mlp_half(x, *parameters, **options),
        lambda: reference.mlp_half(x, *parameters, **options),
        [x, scale, branch, *parameters],
    )


@pytest.mark.parametrize("dtypes", ["float32", "float16", "bfloat16", "autocast"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("joined", [False, True], ids=["alone", "joined"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_around_the_kernels_of_a_gpu(norm, joined, scaled, dtypes, plain_kernels):
    """mlp_half with backend="cuda" agrees with the reference; plain PyTorch replaces the CUDA kernels of the norms."""
    dtype = torch.float32 if dtypes == "autocast" else getattr(torch, dtypes)
    tensors, options = case("mlp_half", norm=norm, full=False)
    tensors = [draw(*shape, seed=i) for i, shape in enumerate(s.shape for s in case("mlp_half")[0])]
    tensors.append(draw(*tensors[0].shape, seed=12))
    if scaled:
        options |= {"drop_path_scale": DROP}

    def half(tensors: list, function: Callable, **others: Any) -> Tensor:
        *rest, branch = tensors
        join = {"branch": branch, "branch_scale": options.get("drop_path_scale")} if joined else {}
        return function(*rest, **join, **options, **others)

    low = [t.to(dtype).requires_grad_() for t in tensors]
    if joined and dtypes == "autocast":  # the branch is the previous half's result in bfloat16
        low[-1] = low[-1].detach().bfloat16().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in low]
    exact = half(wide, reference.mlp_half)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtypes == "autocast"):
        got = half(low, swinkernels.mlp_half, backend="cuda")
    eps = torch.finfo(torch.bfloat16 if dtypes == "autocast" else dtype).eps
    assert (got.double() - exact).norm() <= 2 * eps * exact.norm()
    used = len(low) - (not joined)
    gradients = torch.autograd.grad(exact.square().sum(), wide[:used])
    for g, e, t in zip(torch.autograd.grad(got.double().square().sum(), low[:used]), gradients, low, strict=False):
        assert g.dtype == t.dtype
        assert (g.double() - e).norm() <= 8 * eps * e.norm()


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("given", ["drop path and layer scale", "layer scale", "neither, and no biases"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("by_layers", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inference_on_the_kernels_of_linear_layers(op, norm, given, residual, by_layers, dtype, monkeypatch):
    """Both halves run on the CPU kernels in one pass or, if their batch has few rows, layer by layer."""
    if _fused_linear.why_not_fused(dtype) is not None:
        pytest.skip(_fused_linear.why_not_fused(dtype))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    tensors, options = case(op, norm=norm, full="layer scale" in given)
    if "drop path" not in given:
        options.pop("drop_path_scale", None)
    tensors = [None if t is None else t.to(dtype).double() for t in tensors]
    options = {key: t.to(dtype).double() if isinstance(t, Tensor) else t for key, t in options.items()}
    exact = plain_half(op, tensors, options)
    exact = exact if residual else exact - tensors[0]
    single = [None if t is None else t.to(dtype) for t in tensors]
    options = {key: t.to(dtype) if isinstance(t, Tensor) else t for key, t in options.items()}
    with torch.no_grad(), always_fused(), computed_by_layers(by_layers), fused_calls() as called:
        got = getattr(swinkernels, op)(*single, **options, residual=residual)
    assert len(called) == 2
    assert set(called) <= {f"swinkernels::fused_{kind}" for kind in ("linear", "mlp", "attention_half")}
    assert (got - exact).abs().max() <= (1e-5 if dtype == torch.float32 else 2**-7) * exact.abs().max()


def test_tanh_gelu():
    tensors, _ = case("mlp_half")
    assert_same(
        lambda: swinkernels.mlp_half(*tensors, approximate="tanh"),
        lambda: reference.mlp_half(*tensors, approximate="tanh"),
        tensors,
    )
    assert not torch.allclose(swinkernels.mlp_half(*tensors), swinkernels.mlp_half(*tensors, approximate="tanh"))


@pytest.mark.parametrize("frozen", range(7))
@pytest.mark.parametrize("op", OPS)
def test_one_tensor_without_a_gradient(op, frozen):
    """If one input does not require a gradient, the gradients of the others do not change."""
    tensors, options = case(op)
    leaves = [t.requires_grad_() for t in tensors]
    expected = torch.autograd.grad(getattr(reference, op)(*tensors, **options).sum(), leaves)
    leaves[frozen].requires_grad_(False)
    rest = [leaf for leaf in leaves if leaf.requires_grad]
    got = torch.autograd.grad(getattr(swinkernels, op)(*tensors, **options).sum(), rest)
    torch.testing.assert_close(got, tuple(g for i, g in enumerate(expected) if i != frozen))


@pytest.mark.parametrize("op", OPS)
def test_second_derivative(op):
    tensors, options = case(op, (2, 3))
    tensors[0].requires_grad_(), tensors[3].requires_grad_()
    options |= {"backend": "torch"}

    def seconds(half: Callable) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(half(*tensors, **options).square().sum(), tensors[0], create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [tensors[0], tensors[3]])

    got = seconds(getattr(swinkernels, op))
    options["backend"] = "reference"
    torch.testing.assert_close(got, seconds(getattr(swinkernels, op)))


@pytest.mark.parametrize("op", OPS)
def test_transforms(op):
    tensors, options = case(op, (2, 3))
    x, *rest = tensors
    half = lambda x: getattr(swinkernels, op)(x, *rest, backend="torch", **options)  # noqa: E731
    exact = lambda x: getattr(reference, op)(x, *rest, **options)  # noqa: E731
    tangent = draw(*x.shape, seed=20)
    torch.testing.assert_close(torch.func.jvp(half, (x,), (tangent,)), torch.func.jvp(exact, (x,), (tangent,)))
    sums = [torch.func.grad(lambda x, f=f: f(x).square().sum())(x) for f in (half, exact)]
    torch.testing.assert_close(*sums)
    stacked = torch.stack([x, 2 * x])
    torch.testing.assert_close(torch.func.vmap(half)(stacked), torch.stack([half(x), half(2 * x)]))


def low_and_exact(op: str, tensors: list, options: dict, dtype: torch.dtype) -> tuple[list, dict, Tensor, tuple]:
    """Return ``tensors`` (as leaves) and ``options`` in ``dtype``, and the reference's float64 output and gradients."""
    low = [t.to(dtype).requires_grad_() for t in tensors]
    low_options = {k: v.to(dtype) if isinstance(v, Tensor) else v for k, v in options.items()}
    wide = [t.detach().double().requires_grad_() for t in low]
    wide_options = {k: v.double() if isinstance(v, Tensor) else v for k, v in low_options.items()}
    exact = getattr(reference, op)(*wide, **wide_options)
    return low, low_options, exact, torch.autograd.grad(exact.square().sum(), wide)


def assert_close_enough(got: Tensor, low: list, exact: Tensor, gradients: tuple, eps: float) -> None:
    assert (got.double() - exact).norm() <= 2 * eps * exact.norm()
    for g, e, leaf in zip(torch.autograd.grad(got.double().square().sum(), low), gradients, low, strict=True):
        assert g.dtype == leaf.dtype
        assert (g.double() - e).norm() <= 6 * eps * e.norm()


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("op", OPS)
def test_autocast(op, norm):
    """Matrix products are in bfloat16; backward passes inside and outside autocast give the same gradients."""
    low, options, exact, gradients = low_and_exact(op, *case(op, norm=norm), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = getattr(swinkernels, op)(*low, **options)
        inside = torch.autograd.grad(got.sum(), low, retain_graph=True)
    assert got.dtype == torch.float32
    assert (got.double() - exact).norm() > 0.05 * torch.finfo(torch.bfloat16).eps * exact.norm()
    torch.testing.assert_close(torch.autograd.grad(got.sum(), low, retain_graph=True), inside, rtol=0, atol=0)
    assert_close_enough(got, low, exact, gradients, torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_low_precision(op, dtype):
    low, options, exact, gradients = low_and_exact(op, *case(op), dtype)
    got = getattr(swinkernels, op)(*low, **options)
    assert got.dtype == dtype
    assert_close_enough(got, low, exact, gradients, torch.finfo(dtype).eps)


@pytest.mark.parametrize(("op", "dynamic"), in_turn(OPS, [False, True]))
def test_compile_in_one_graph(op, dynamic):
    tensors, options = case(op)
    compiled = torch.compile(
        lambda *tensors: getattr(swinkernels, op)(*tensors, **options),
        fullgraph=True, backend="aot_eager", dynamic=dynamic,
    )  # fmt: skip
    options.pop("drop_path_scale")
    assert_same(
        lambda: compiled(*tensors),
        lambda: getattr(reference, op)(*tensors, **options),
        tensors,
    )


class Half(nn.Module):
    """A module that calls the half ``op``, for the export tests."""

    def __init__(self, op: str) -> None:
        super().__init__()
        (_, *parameters), self.options = case(op)
        self.op = op
        self.parameters_of_half = nn.ParameterList([nn.Parameter(p.float()) for p in parameters])
        self.options = {k: v for k, v in self.options.items() if not isinstance(v, Tensor)}

    def forward(self, x: Tensor) -> Tensor:
        return getattr(swinkernels, self.op)(x, *self.parameters_of_half, **self.options)


@pytest.mark.parametrize("op", OPS)
def test_export_and_deepcopy(op):
    module, x = Half(op), draw(2, 6, 7, C).float()
    expected = module(x)
    torch.testing.assert_close(copy.deepcopy(module)(x), expected)
    program = torch.export.export(module, (x,), dynamic_shapes={"x": {0: torch.export.Dim("batch", min=1, max=64)}})
    torch.testing.assert_close(program.module()(x), expected)
    torch.testing.assert_close(program.module()(torch.cat([x, x])), torch.cat([expected, expected]))


@pytest.mark.parametrize("has_kernels", [True, False], ids=["kernels", "none"])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("op", OPS)
def test_compile_in_one_graph_without_gradients(op, norm, has_kernels, monkeypatch):
    """Compiled inference calls the CPU kernels where there are any, in one graph for all sizes; training does not."""
    reason = _extension.error or _onednn.why_not_fused(torch.float32)
    if has_kernels and reason is not None:
        pytest.skip(str(reason))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: has_kernels)
    tensors, options = case(op, norm=norm, full=False)
    x, *rest = [t if t is None else t.float() for t in tensors]
    options = {name: value.float() if isinstance(value, Tensor) else value for name, value in options.items()}
    half = getattr(swinkernels, op)
    graphs: list[torch.fx.GraphModule] = []

    def collect(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: half(x, *rest, **options), fullgraph=True, backend=collect, dynamic=True)
    with torch.no_grad():
        for images in (2, 3, 400):
            y = draw(images, *x.shape[1:], seed=images).float()
            torch.testing.assert_close(compiled(y), half(y, *rest, **options), rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1
    kernel = "fused_mlp" if op == "mlp_half" else "fused_attention_half"
    assert (kernel in str(graphs[0].code)) == has_kernels
    compiled(y.requires_grad_()).sum().backward()
    assert len(graphs) == 2
    assert kernel not in str(graphs[1].code)
    module, tangent = Half(op), draw(*x.shape, seed=9).float()
    with torch.no_grad():
        program = torch.export.export(module, (x,), strict=True)
        assert kernel not in program.graph_module.code
        if op == "mlp_half":  # the backends of window attention have no forward-mode derivative
            jvp = torch.compile(
                lambda x, v: torch.func.jvp(lambda x: half(x, *rest, **options), (x,), (v,)), backend="eager"
            )
            exact = torch.func.jvp(lambda x: half(x, *rest, backend="torch", **options), (x,), (tangent,))
            torch.testing.assert_close(jvp(x, tangent), exact)


@pytest.mark.parametrize(("op", "kernels"), [("attention_half", ["fused_linear"] * 2), ("mlp_half", ["fused_mlp"])])
def test_compiled_halves_with_a_drop_path_in_bfloat16(op, kernels, monkeypatch):
    """Such a half is not one op, but kernels compute its layers, as in eager code."""
    reason = _extension.error or _fused_linear.why_not_fused(torch.bfloat16)
    if reason is not None:
        pytest.skip(str(reason))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    monkeypatch.setattr(_fused_linear, "_least_channels_alone", constant_when_compiled(lambda: 0))
    (x, *rest), options = case(op, full=True)
    x, *rest = (t if t is None else t.bfloat16() for t in (x, *rest))
    options = {name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in options.items()}
    graphs: list[torch.fx.GraphModule] = []
    torch.compiler.reset()
    compiled = torch.compile(
        lambda x: getattr(swinkernels, op)(x, *rest, **options),
        backend=lambda graph, _: graphs.append(graph) or graph.forward,
        fullgraph=True,
    )
    with torch.no_grad(), always_fused():
        assert_close_to_rounding(compiled(x), getattr(swinkernels, op)(x, *rest, **options))
    called = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert [name.split(".")[1] for name in called if "swinkernels.fused" in name] == kernels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_tracer_that_makes_the_first_call(op, dtype, monkeypatch):
    """A tracer refuses ops that return a bool or a string, which would tell what this CPU supports."""
    for module, name in (
        (_fused_linear, "_instruction_set"),
        (_fused_linear, "_has_kernels"),
        (_onednn, "why_not_fused"),
    ):
        monkeypatch.setattr(module, name, functools.cache(getattr(module, name).__wrapped__))
    (x, *rest), options = case(op, full=False)
    x, *rest = (t if t is None else t.to(dtype) for t in (x, *rest))
    options = {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in options.items()}
    half = getattr(swinkernels, op)
    with torch.no_grad():
        traced = torch.jit.trace(lambda x: half(x, *rest, **options), (x,), check_trace=False)
        assert_close_to_rounding(traced(x), half(x, *rest, **options))


def assert_close_to_rounding(got: Tensor, expected: Tensor) -> None:
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=4 * eps, atol=16 * eps)


def test_compiled_halves_see_modes_and_subclasses(monkeypatch):
    """As in eager code, torch's own functions run in a function mode and with weights of a tensor subclass."""
    reason = _extension.error or _onednn.why_not_fused(torch.float32)
    if reason is not None:
        pytest.skip(str(reason))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: True)
    (x, *rest), options = case("mlp_half", full=False)
    x, *rest = (t if t is None else t.float() for t in (x, *rest))

    class Doubling(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return 2 * y if function is F.linear else y

    def run(x: Tensor, *rest: Any) -> Tensor:
        return swinkernels.mlp_half(x, *rest, **options)

    torch.compiler.reset()
    compiled = torch.compile(run, backend="aot_eager")  # runs ops of ATen, which the mode leaves alone
    with torch.no_grad():
        with Doubling():
            torch.testing.assert_close(compiled(x, *rest), run(x, *rest), rtol=1e-4, atol=1e-5)
        for i, t in enumerate(rest):
            if t is not None:
                marked = [*rest[:i], TwoTensor(t, t), *rest[i + 1 :]]
                torch.testing.assert_close(compiled(x, *marked).a, run(x, *rest), rtol=1e-4, atol=1e-5)


def test_an_empty_batch():
    for op in OPS:
        (x, *rest), options = case(op, full=False)
        x = x[:0].requires_grad_()
        out = getattr(swinkernels, op)(x, *rest, **options)
        assert out.shape == x.shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape


def changed(i: int, value: Any) -> Callable:
    return lambda tensors, options: tensors.__setitem__(i, value(tensors[i]))


@pytest.mark.parametrize(
    ("op", "change", "error", "message"),
    [
        ("mlp_half", changed(0, lambda x: x.long()), TypeError, "x must be float32"),
        ("mlp_half", changed(3, lambda w: w.float()), TypeError, "fc1_weight must have the dtype of x, torch.float64"),
        ("mlp_half", changed(6, lambda b: b.float()), TypeError, "fc2_bias must have the dtype of x, torch.float64"),
        ("mlp_half", changed(3, lambda w: w.t()), ValueError, r"fc1_weight must be \(out, 12\)"),
        ("mlp_half", changed(5, lambda w: w.t()), ValueError, r"fc2_weight must be \(12, 20\)"),
        ("mlp_half", changed(4, lambda b: b[:-1]), ValueError, r"fc1_bias must be \(20,\)"),
        ("mlp_half", changed(1, lambda w: w[:-1]), ValueError, r"norm_weight must be \(12,\)"),
        ("mlp_half", changed(5, lambda w: w.to("meta")), ValueError, "the same device, got fc2_weight"),
        ("mlp_half", changed(5, lambda w: None), TypeError, "fc2_weight must be a tensor, got NoneType"),
        ("mlp_half", lambda t, o: o.update(norm="both"), ValueError, "norm must be one of"),
        ("mlp_half", lambda t, o: o.update(approximate="erf"), ValueError, "approximate must be one of"),
        ("mlp_half", lambda t, o: o.update(residual=1), TypeError, "residual must be a bool"),
        ("mlp_half", lambda t, o: o.update(eps=-1.0), ValueError, "eps must be at least 0"),
        ("mlp_half", lambda t, o: o.update(layer_scale=DROP), ValueError, r"layer_scale must be \(12,\)"),
        ("mlp_half", lambda t, o: o.update(branch=t[0][:1]), ValueError, "branch must have the shape of x"),
        ("mlp_half", lambda t, o: o.update(branch_scale=DROP), ValueError, "branch_scale must be None without"),
        ("mlp_half", lambda t, o: o.update(backend="cpu"), NotImplementedError, "cannot run this call"),
        ("mlp_half", lambda t, o: o.update(backend="gpu"), ValueError, "backend must be"),
        ("attention_half", changed(0, lambda x: x[0, 0]), ValueError, r"x must be \(B, \*S, C\)"),
        ("attention_half", changed(3, lambda w: w.bfloat16()), TypeError, "qkv_weight must have the dtype of x"),
        ("attention_half", lambda t, o: o.update(num_heads=5), ValueError, "qkv_weight must have 3 \\* num_heads"),
        ("attention_half", changed(4, lambda b: b[:-1]), ValueError, r"qkv_bias must be \(36,\)"),
        ("attention_half", changed(5, lambda w: w[:, :-1]), ValueError, r"proj_weight must be \(12, 12\)"),
        ("attention_half", changed(7, lambda t: t[:-1]), ValueError, "bias_table must be"),
        ("attention_half", lambda t, o: o.update(num_heads=0), ValueError, "num_heads must be at least 1"),
        ("attention_half", lambda t, o: o.update(window_size=0), ValueError, "window_size must be at least 1"),
        ("attention_half", lambda t, o: o.update(pad_qkv=t[4]), ValueError, "pad_qkv cannot be given here"),
        ("attention_half", lambda t, o: o.update(return_attention=True), ValueError, "return_attention cannot be"),
        ("attention_half", lambda t, o: o.update(backend="cpu"), NotImplementedError, "float64"),
        ("attention_half", lambda t, o: o.update(drop_path_scale=DROP[:1]), ValueError, "drop_path_scale must be"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(op, change, error, message):
    tensors, options = case(op)
    for _ in range(2):  # a failed call leaves nothing in the cache
        given, others = list(tensors), dict(options)
        change(given, others)
        with pytest.raises(error, match=f"^{op}: .*{message}"):
            getattr(swinkernels, op)(*given, **others)


def test_axis_tables_are_checked_once_per_geometry():
    (x, *parameters), options = case("attention_half", full=False)
    *parameters, _ = parameters  # without a bias table
    tables = [draw(2 * w - 1, C // HEADS, seed=w) for w in options["window_size"]]
    found = importlib.import_module("swinkernels.ops.attention_half")._KNOWN
    found.clear()
    for axis_tables, known in ((tables, 1), ([2 * t for t in tables], 1), (tuple(tables), 2)):
        got, expected = (
            half(x, *parameters, axis_tables=axis_tables, **options)
            for half in (swinkernels.attention_half, reference.attention_half)
        )
        torch.testing.assert_close(got, expected)
        assert len(found) == known
    for wrong in (tables[:1], [tables[0], None], {"h": tables[0]}):
        with pytest.raises((TypeError, ValueError), match=r"attention_half: axis_tables must"):
            swinkernels.attention_half(x, *parameters, axis_tables=wrong, **options)


def test_a_weight_changed_in_place_before_backward_is_refused():
    tensors, options = case("mlp_half")
    out = swinkernels.mlp_half(*[t.requires_grad_() for t in tensors], **options)
    with torch.no_grad():
        tensors[3].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize(("op", "most"), [("attention_half", 5.3), ("mlp_half", 1 + HIDDEN / C + 0.02)])
def test_what_is_kept_for_backward(op, most):
    """attention_half keeps x, q, k, v, the attention's output and lse; mlp_half keeps x and the output of fc1.

    The tensors kept by attention_half have 5.25 times the bytes of x.
    """
    tensors, options = case(op, (32, 32))
    tensors = [t.float().requires_grad_() for t in tensors]
    options = {k: v.float() if isinstance(v, Tensor) else v for k, v in options.items()}
    x, *parameters = tensors
    assert kept_bytes(lambda: getattr(swinkernels, op)(*tensors, **options), parameters) <= most * x.nbytes


def test_second_derivative_of_a_norm_with_a_bias_and_no_weight():
    """In torch 2.14, F.layer_norm itself gives wrong second derivatives for these arguments, or raises an error."""
    torch.manual_seed(0)
    x, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    found = []
    for backend in ("torch", "reference"):
        leaves = [x.clone().requires_grad_(), bias.clone().requires_grad_()]
        y = swinkernels.layer_norm(leaves[0], None, leaves[1], backend=backend)
        first = torch.autograd.grad(y.pow(3).sum(), leaves, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in first), leaves))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def separate(tensors: list) -> list:
    """Return the ``tensors`` of attention_half with its qkv weight split into three leaves."""
    weights = tuple(w.detach().clone().requires_grad_(tensors[3].requires_grad) for w in tensors[3].chunk(3))
    return [*tensors[:3], weights, *tensors[4:]]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_weights_of_q_k_and_v(norm, backend):
    tensors, options = case("attention_half", norm=norm)
    leaves = differentiable(tensors, options)
    for t in leaves:
        t.requires_grad_()
    given = separate(tensors)
    expected = swinkernels.attention_half(*tensors, **options, backend=backend)
    got = swinkernels.attention_half(*given, **options, backend=backend)
    dout = draw(*expected.shape, seed=20)
    of_got = torch.autograd.grad(got, [t for t in leaves if t is not tensors[3]] + list(given[3]), dout)
    wanted = torch.autograd.grad(expected, [t for t in leaves if t is not tensors[3]] + [tensors[3]], dout)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.cat(of_got[-3:]), wanted[-1])
    torch.testing.assert_close(of_got[:-3], wanted[:-1])


@pytest.mark.parametrize("frozen", [(0,), (1, 2), (0, 1, 2)])
def test_frozen_weights_of_q_k_and_v(frozen):
    tensors, options = case("attention_half")
    results = []
    for is_separate in (True, False):
        x = tensors[0].clone().requires_grad_()
        weights = [w.clone().requires_grad_(i not in frozen) for i, w in enumerate(tensors[3].chunk(3))]
        weight = tuple(weights) if is_separate else torch.cat(weights)
        out = swinkernels.attention_half(x, *tensors[1:3], weight, *tensors[4:], **options)
        out.square().sum().backward()
        assert [w.grad is None for w in weights] == [i in frozen for i in range(3)]
        results.append([x.grad, *(w.grad for w in weights if w.grad is not None)])
    torch.testing.assert_close(*results)


def test_second_derivative_with_weights_of_q_k_and_v():
    tensors, options = case("attention_half")
    given = separate(tensors)
    leaves = [t.requires_grad_() for t in (given[0], given[1], *given[3])]
    assert torch.autograd.gradgradcheck(
        lambda x, weight, *weights: swinkernels.attention_half(
            x, weight, given[2], weights, *given[4:], **options, backend="torch"
        ),
        leaves,
        fast_mode=True,
    )


def test_the_packed_weight_is_not_kept():
    tensors, options = case("attention_half")
    for t in differentiable(tensors, options):
        t.requires_grad_()
    given = separate(tensors)
    parameters = [t for t in (*tensors, *given[3], options["layer_scale"]) if isinstance(t, Tensor)]
    kept = [
        kept_bytes(lambda t=t: swinkernels.attention_half(*t, **options), [*parameters[1:], DROP])
        for t in (tensors, given)
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda weights: weights[:2], ValueError, "qkv_weight must be one tensor or a tuple of 3, got a tuple of 2"),
        (lambda weights: (*weights[:2], weights[2][:6]), ValueError, r"qkv_weight must be \(12, 12\)"),
        (lambda weights: (*weights[:2], weights[2].float()), TypeError, "qkv_weight must have the dtype of x"),
        (lambda weights: (*weights[:2], None), TypeError, "qkv_weight"),
    ],
)
def test_wrong_weights_of_q_k_and_v(change, error, message):
    tensors, options = case("attention_half")
    given = separate(tensors)
    given[3] = change(given[3])
    with pytest.raises(error, match=f"^attention_half: .*{message}"):
        swinkernels.attention_half(*given, **options)


def _tied_qk(w: Tensor, wv: Tensor) -> tuple[Tensor, ...]:
    return w, w, wv


def _computed_k(w: Tensor, wv: Tensor) -> tuple[Tensor, ...]:
    return w, 2 * w, wv


@pytest.mark.parametrize("weights", [_tied_qk, _computed_k])
def test_create_graph_with_weights_that_depend_on_each_other(weights):
    shapes = (2, 4, 4, 8), (8,), (8, 8), (8, 8), (8, 8)
    leaves = [draw(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    x, norm, w, wv, proj = leaves
    found = []
    for backend in ("torch", "reference"):
        y = swinkernels.attention_half(
            x, norm, 2 * norm, weights(w, wv), None, proj, None, num_heads=2, window_size=2, backend=backend
        )
        found.append(torch.autograd.grad(y.square().sum(), leaves, create_graph=True))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_create_graph_where_one_half_is_called_twice():
    """With create_graph=True, gradients are correct although the second call's input depends on the parameters."""
    tensors, options = case("mlp_half")
    wanted = [t.requires_grad_() for t in differentiable(tensors, options)]
    found = []
    for backend in ("torch", "reference"):
        y = swinkernels.mlp_half(*tensors, **options, backend=backend)
        y = swinkernels.mlp_half(y, *tensors[1:], **options, backend=backend)
        found.append(torch.autograd.grad(y.square().sum(), wanted, create_graph=True))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
