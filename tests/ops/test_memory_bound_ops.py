"""Tests the code around the kernels of partition, reverse, merging, expanding and norms, on any machine.

With the fixture ``plain_kernels``, the backends "cuda" and "triton" run kernels in plain PyTorch on the CPU. Schema,
fake kernel, autograd formula, reordering of parameters and dtypes are the same as on a GPU.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import swinkernels
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.ops.patch_merging import ORDERS, RUNS, _by_neighbour, _row_major_columns
from swinkernels.reference.patch_merging import ORDERS as REFERENCE_ORDERS
from swinkernels.reference.patch_merging import neighbours
from tests.support.no_gradient import NoGradient
from tests.support.plain_kernels import WITH_TRITON
from tests.support.side_by_side import draw

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPS, zeros = torch.ops.swinkernels, torch.zeros
MAPS = ("x", "y", "windows")


@dataclass(frozen=True)
class Case:
    """A call of a public function: the shapes of its tensors and its other arguments."""

    op: str
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def definition(self) -> Callable:
        return functools.partial(getattr(reference, self.op), **self.options)

    def leaves(self, *dtypes: torch.dtype) -> dict[str, Tensor]:
        """Return random leaves by name, with the given ``dtypes`` in order; all further leaves have the last dtype."""
        dtypes = dtypes + (dtypes[-1],) * len(self.shapes)
        tensors = {n: draw(*s, seed=i) for i, (n, s) in enumerate(self.shapes.items(), start=1)}
        return {n: t.to(d).requires_grad_() for (n, t), d in zip(tensors.items(), dtypes, strict=False)}

    def with_batch(self, batch: int) -> Case:
        """Return this case with ``batch`` maps; the number of windows, given for two maps, is scaled accordingly."""
        maps = {
            n: (batch * s[0] // 2 if n == "windows" else batch, *s[1:]) for n, s in self.shapes.items() if n in MAPS
        }
        options = {n: v.new_ones(batch) if n == "drop_path_scale" else v for n, v in self.options.items()}
        return Case(self.op, {**self.shapes, **maps}, options)

    def outputs(
        self, leaves: dict[str, Tensor], function: Callable | None = None, **options: Any
    ) -> tuple[Tensor, ...]:
        """Return the results of ``function``, or of the case's public op if it is None, as a tuple."""
        function = function or functools.partial(getattr(swinkernels, self.op), **self.options)
        outs = function(**leaves, **options)
        return outs if isinstance(outs, tuple) else (outs,)

    def run(self, leaves: dict[str, Tensor], function: Callable | None = None, **options: Any) -> dict[str, Tensor]:
        """Return, by name, the outputs and the gradient of each leaf that requires one."""
        outs = self.outputs(leaves, function, **options)
        results = {f"out {i}": out.detach() for i, out in enumerate(outs)}
        wanted = {n: t for n, t in leaves.items() if t.requires_grad}
        douts = [draw(*out.shape, seed=20 + i).to(out.dtype) for i, out in enumerate(outs) if out.requires_grad]
        grads = torch.autograd.grad([out for out in outs if out.requires_grad], list(wanted.values()), douts)
        return {**results, **{f"d{n}": g for n, g in zip(wanted, grads, strict=True)}}


def merging(size: tuple[int, ...], rank: int, **options: Any) -> Case:
    c, out = 3, 7
    width = out if options.get("norm") == "post" else 2**rank * c
    shapes = {"x": (2, *size, c), "norm_weight": (width,), "norm_bias": (width,), "weight": (out, 2**rank * c)}
    return Case("patch_merging", shapes, options)


NORM = {"weight": (5,), "bias": (5,)}
PARTS = {"norm_weight": (3,), "norm_bias": (3,)}
STREAM = {"x": (2, 3, 4, 5), "y": (2, 3, 4, 5)}
CASES = {
    "norm": Case("layer_norm", {"x": (2, 3, 4, 5), **NORM}, {"eps": 0.1}),
    "norm_of_one_row": Case("layer_norm", {"x": (5,), "bias": (5,)}),
    "norm_bare": Case("layer_norm", {"x": (4, 5)}),
    "expand": Case("patch_expanding", {"x": (2, 3, 4, 6), "weight": (12, 6), **PARTS}, {"eps": 0.1}),
    "expand_by_4_and_1": Case("patch_expanding", {"x": (2, 3, 4, 6), "weight": (12, 6), **PARTS}, {"factor": (4, 1)}),
    "expand_frames": Case("patch_expanding", {"x": (2, 3, 2, 4, 6), "weight": (12, 6), **PARTS}, {"factor": (1, 2, 2)}),
    "expand_3d": Case("patch_expanding", {"x": (1, 3, 2, 4, 6), "weight": (24, 6), **PARTS}),
    "expand_alone": Case(
        "patch_expanding", {"x": (2, 3, 4, 12)}, {"weight": None, "norm_weight": None, "norm_bias": None}
    ),
    **{
        f"merge_{order}_{norm}_{'x'.join(map(str, size))}_{rank}": merging(size, rank, order=order, norm=norm, eps=0.1)
        for order, norm, (size, rank) in itertools.product(
            ORDERS, ("pre", "post"), [((5, 4), 2), ((3, 4, 5), 3), ((3, 4, 5), 2)]
        )
    },
    "residual": Case("residual_layer_norm", {**STREAM, **NORM}, {"eps": 0.1}),
    "residual_bare": Case("residual_layer_norm", STREAM),
    "residual_dropped": Case("residual_layer_norm", {**STREAM, **NORM}, {"drop_path_scale": torch.tensor([0.0, 1.25])}),
    "post": Case("residual_post_norm", {**STREAM, **NORM}, {"eps": 0.1}),
    "post_bare": Case("residual_post_norm", {"x": (2, 5), "y": (2, 5), "weight": (5,)}),
    "post_dropped": Case("residual_post_norm", {**STREAM, **NORM}, {"drop_path_scale": torch.tensor([0.0, 1.25])}),
    "partition": Case("window_partition", {"x": (2, 5, 7, 3)}, {"window_size": (2, 4), "shift_size": (1, 3)}),
    "partition_3d": Case(
        "window_partition",
        {"x": (2, 3, 5, 4, 3)},
        {"window_size": 3, "shift_size": (1, 0, 2), "pad_order": "roll_then_pad"},
    ),
    "reverse": Case(
        "window_reverse", {"windows": (12, 8, 3)}, {"window_size": (2, 4), "size": (5, 7), "shift_size": (1, 3)}
    ),
    "reverse_3d": Case(
        "window_reverse",
        {"windows": (8, 27, 3)},
        {"window_size": 3, "size": (3, 5, 4), "shift_size": (1, 0, 2), "pad_order": "roll_then_pad"},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
some_cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name)
        for name, case in CASES.items()
        if case.op != "patch_merging" or name in ("merge_unfold_pre_5x4_2", "merge_monai_post_3x4x5_3")
    ],
)


def backends_of(case: Case) -> list[str]:
    op = {
        "window_reverse": "window_partition",
        "patch_expanding": "layer_norm",
        "residual_post_norm": "residual_layer_norm",
    }
    return list(_backends.IMPLEMENTED[op.get(case.op, case.op)])


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> None:
    assert got.keys() == expected.keys()
    for name, exact in expected.items():
        limit = eps * max(1.0, exact.abs().max().item() if exact.numel() else 0.0)
        torch.testing.assert_close(
            got[name].double(), exact.double(), rtol=0, atol=limit, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- the same function on every backend


@every_case
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_on_a_cpu_is_plain_pytorch(case, dtype):
    got, named = case.run(case.leaves(dtype)), case.run(case.leaves(dtype), backend="torch")
    assert all(value.dtype == dtype for value in got.values())
    assert_close(got, named, torch.finfo(dtype).eps)  # BLAS may round differently at another address
    exact = case.run(case.leaves(torch.float64), case.definition)
    assert_close(got, exact, 1e-12 if dtype == torch.float64 else 32 * torch.finfo(dtype).eps)


@every_case
def test_around_a_kernel(case, plain_kernels):
    """Outputs and gradients equal the reference's for all neighbour orders, optional parameters and factors."""
    exact = case.run(case.leaves(torch.float64), case.definition)
    for backend in backends_of(case):
        got = case.run(case.leaves(torch.float32), backend=backend)
        assert all(value.dtype == torch.float32 for value in got.values())
        assert_close(got, exact, 1e-5)


@pytest.mark.parametrize(
    ("name", "dtypes", "results"),
    [
        # x, y, then weight and bias of the norm: float32 x and parameters, 16-bit branch y, as under autocast
        ("residual", (torch.float32, torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)),
        ("residual_dropped", (torch.float32, torch.float16, torch.float32), (torch.float32, torch.float16)),
        ("residual", (torch.bfloat16,), (torch.bfloat16, torch.bfloat16)),
        ("residual_bare", (torch.float16, torch.float16), (torch.float16, torch.float16)),
        ("post", (torch.float32, torch.bfloat16, torch.float32), (torch.float32,)),
        ("post_dropped", (torch.bfloat16,), (torch.bfloat16,)),
        ("norm", (torch.bfloat16, torch.float32), (torch.bfloat16,)),
        ("norm", (torch.float32, torch.float64, torch.bfloat16), (torch.float32,)),
        ("expand", (torch.bfloat16, torch.float32), (torch.bfloat16,)),
        ("merge_swin_pre_5x4_2", (torch.bfloat16, torch.float32), (torch.bfloat16,)),
        ("merge_unfold_post_3x4x5_3", (torch.float16, torch.float64), (torch.float16,)),
    ],
)
def test_dtypes_around_a_kernel(name, dtypes, results, plain_kernels):
    """Outputs have the expected dtypes, gradients those of their tensors; parameters may have any floating dtype."""
    case = CASES[name]
    leaves = case.leaves(*dtypes)
    exact = case.run({n: t.detach().double().requires_grad_() for n, t in leaves.items()}, case.definition)
    coarsest = max(torch.finfo(t.dtype).eps for t in leaves.values())
    for backend in backends_of(case):
        got = case.run(leaves, backend=backend)
        assert tuple(v.dtype for n, v in got.items() if n.startswith("out")) == results
        assert all(got[f"d{n}"].dtype == t.dtype for n, t in leaves.items())
        assert_close(got, exact, 4 * coarsest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtype_of_a_norm(dtype, plain_kernels):
    case = CASES["norm"]
    for x_dtype, backend in itertools.product((torch.float32, torch.bfloat16), ("auto", "cuda")):
        if (x_dtype, dtype) not in _backends.NORM_DTYPES and backend == "cuda":
            continue
        out = swinkernels.layer_norm(**case.leaves(x_dtype), dtype=dtype, backend=backend)
        expected = reference.layer_norm(**case.leaves(x_dtype), dtype=dtype)
        assert out.dtype == dtype
        torch.testing.assert_close(
            out, expected, rtol=1e-5 if dtype in (torch.float32, torch.float64) else 0.01, atol=1e-5
        )


@some_cases
def test_gradient_of_one_alone(case, plain_kernels):
    """If only one tensor requires a gradient, only that gradient is computed, and it is the same as with all."""
    for backend in ("reference", backends_of(case)[0]):
        full = case.run(case.leaves(torch.float32), backend=backend)
        for name in case.shapes:
            leaves = case.leaves(torch.float32)
            got = case.run({n: t.requires_grad_(n == name) for n, t in leaves.items()}, backend=backend)
            assert [n for n in got if n.startswith("d")] == [f"d{name}"]
            assert_close(got, {n: full[n] for n in got}, 1e-6)


@some_cases
def test_a_loss_that_hands_no_gradient_on(case, plain_kernels):
    """The backward pass of an op accepts undefined gradients for all its outputs."""
    leaves = case.leaves(torch.float32)
    NoGradient.apply(*case.outputs(leaves, backend=backends_of(case)[0])).backward()
    assert all(leaf.grad is None or not leaf.grad.any() for leaf in leaves.values())


def test_only_one_result_used(plain_kernels):
    """Gradients of residual_layer_norm are correct if the loss uses only the sum s or only the normalised z."""
    case = CASES["residual"]
    for index in (0, 1):
        grads = []
        for backend in ("reference", "cuda"):
            leaves = case.leaves(torch.float32)
            out = case.outputs(leaves, backend=backend)[index]
            found = torch.autograd.grad(out.square().sum(), list(leaves.values()), allow_unused=True)
            grads.append({n: zeros(()) if g is None else g for n, g in zip(leaves, found, strict=True)})
        for name, exact in grads[0].items():
            torch.testing.assert_close(grads[1][name], exact.expand_as(grads[1][name]), rtol=1e-5, atol=1e-5)


def test_gradient_of_drop_path_scale():
    """No kernel computes the gradient of drop_path_scale: "auto" runs plain PyTorch, "cuda" raises an error."""
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64, requires_grad=True)
    x, y = draw(2, 3, 5), draw(2, 3, 5, seed=2)
    for op in (swinkernels.residual_layer_norm, swinkernels.residual_post_norm):
        results = op(x, y, drop_path_scale=scale)
        total = sum(result.sum() for result in results)
        assert torch.autograd.grad(total, scale)[0].shape == (2,)
        with pytest.raises(NotImplementedError, match="does not differentiate drop_path_scale"):
            op(x, y, drop_path_scale=scale, backend="cuda")


# --- autocast


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["auto", "cuda", "triton"])
def test_autocast_of_merging_and_expanding(backend, low, plain_kernels):
    """An op that ends with its linear layer returns the autocast dtype; an op that ends with a norm returns float32."""
    for name, dtype in (
        ("merge_swin_pre_5x4_2", low),
        ("merge_unfold_pre_5x4_2", low),
        ("merge_swin_post_5x4_2", torch.float32),
        ("merge_monai_post_3x4x5_3", torch.float32),
        ("expand", torch.float32),
        ("expand_alone", torch.float32),
    ):
        case = CASES[name]
        if backend not in ("auto", *backends_of(case)):
            continue
        exact = case.run(case.leaves(torch.float64), case.definition)
        for x_dtype, parameters in (
            (torch.float32, torch.float32),
            (low, torch.float32),
            (torch.float32, torch.float64),
        ):
            leaves = case.leaves(x_dtype, parameters)
            with torch.autocast("cpu", low):
                got = case.run(leaves, backend=backend)
            assert got["out 0"].dtype == dtype
            assert all(got[f"d{n}"].dtype == t.dtype for n, t in leaves.items())
            assert_close(got, exact, 6 * torch.finfo(low).eps)
        with torch.autocast("cpu", low):  # leaves float64 alone
            assert case.run(case.leaves(torch.float64))["out 0"].dtype == torch.float64


@pytest.mark.parametrize("name", ["norm", "residual", "post", "partition", "reverse"])
def test_autocast_changes_nothing_else(name):
    case = CASES[name]
    expected = case.run(case.leaves(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        got = case.run(case.leaves(torch.float32))
    assert all(torch.equal(got[n], v) for n, v in expected.items())


def test_a_norm_into_a_linear_under_autocast(plain_kernels):
    """layer_norm reads a float32 residual stream and writes the Linear's bfloat16 input in one pass; dx is float32."""
    x, weight = draw(2, 3, 5).float().requires_grad_(), draw(4, 5).float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        z = swinkernels.layer_norm(x, dtype=torch.get_autocast_dtype("cpu"), backend="cuda")
        out = torch.nn.functional.linear(z, weight)
    assert z.dtype == out.dtype == torch.bfloat16
    assert torch.autograd.grad(out.sum(), x)[0].dtype == torch.float32


# --- schema, fake kernel and autograd registration


def op_calls() -> dict[str, tuple[str, tuple]]:
    """Return calls by label: the op's name in torch.ops.swinkernels, and its arguments, with shapes for tensors."""
    norm = ((5,), (5,))
    statistics = ((2, 3, 4), (2, 3, 4))
    merged, factor, order = (2, 3, 2), [1, 2, 2], [0, 2, 1, 3]
    volume, twice = (1, 2, 3, 1), [0, 4, 2, 1, 5, 2, 1, 7]
    row = (2, 3, 4, 5)
    return {
        "window_partition": ("window_partition", ((2, 5, 7, 3), [1, 2, 4], [0, 1, 3], False)),
        "window_partition_3d": ("window_partition", ((2, 3, 5, 4, 3), [3, 3, 3], [1, 0, 2], True)),
        "window_partition_far": ("window_partition", ((2, 4, 6, 3), [1, 2, 2], [0, 3, 5], True)),
        "window_reverse": ("window_reverse", ((12, 8, 3), [5, 7], [1, 2, 4], [0, 1, 3], False)),
        "window_reverse_3d": ("window_reverse", ((8, 27, 3), [3, 5, 4], [3, 3, 3], [1, 0, 2], True)),
        "patch_merging_norm_fwd": (
            "patch_merging_norm_fwd", ((2, 5, 4, 3), (12,), (12,), factor, order, 1e-5, torch.bfloat16)
        ),
        "patch_merging_norm_fwd_3d": (
            "patch_merging_norm_fwd", ((1, 3, 5, 2, 3), None, (24,), [2, 2, 2], twice, 1e-5, torch.float32)
        ),
        "patch_merging_norm_bwd": (
            "patch_merging_norm_bwd", ((*merged, 12), (2, 5, 4, 3), (12,), merged, merged, factor, order, True, True)
        ),
        "patch_merging_norm_bwd_3d": (
            "patch_merging_norm_bwd",
            ((*volume, 24), (1, 3, 5, 2, 3), None, volume, volume, [2, 2, 2], twice, False, True),
        ),
        "layer_norm_fwd": ("layer_norm_fwd", (row, *norm, [], 1e-5, torch.float16)),
        "layer_norm_fwd_expanding": ("layer_norm_fwd", ((2, 3, 4, 20), None, None, factor, 1e-5, torch.float32)),
        "layer_norm_bwd": ("layer_norm_bwd", (row, row, norm[0], *statistics, [], True, False)),
        "layer_norm_bwd_expanding": (
            "layer_norm_bwd", ((2, 6, 8, 5), (2, 3, 4, 20), None, (2, 6, 8), (2, 6, 8), factor, False, False)
        ),
        "residual_layer_norm_fwd": ("residual_layer_norm_fwd", (row, row, (2,), *norm, 1e-5)),
        "residual_layer_norm_bwd": (
            "residual_layer_norm_bwd", (row, row, row, (2,), norm[0], *statistics, True, True)
        ),
        "residual_layer_norm_bwd_one_gradient": (
            "residual_layer_norm_bwd", (row, row, row, None, None, *statistics, False, True)
        ),
        "residual_post_norm_fwd": ("residual_post_norm_fwd", (row, row, None, *norm, 1e-5)),
        "residual_post_norm_bwd": ("residual_post_norm_bwd", (row, row, (2,), norm[0], *statistics, True, False)),
    }  # fmt: skip


OP_CALLS = {
    f"{label}{suffix}": (f"{name}{suffix}", arguments)
    for label, (name, arguments) in op_calls().items()
    for suffix in (("", "_triton") if name in WITH_TRITON else ("",))
}
every_op_call = pytest.mark.parametrize(("name", "arguments"), OP_CALLS.values(), ids=list(OP_CALLS))


def arguments_on(arguments: tuple, device: str, requires_grad: bool = False) -> tuple:
    def tensor(shape: tuple[int, ...], seed: int) -> Tensor:
        return draw(*shape, seed=seed).float().abs().to(device).requires_grad_(requires_grad)

    return tuple(tensor(a, i) if isinstance(a, tuple) else a for i, a in enumerate(arguments))


def described(results: Any) -> list[tuple]:
    results = results if isinstance(results, tuple) else (results,)
    return [(tuple(r.shape), r.dtype, r.is_contiguous()) for r in results]


@every_op_call
def test_opcheck(name, arguments, plain_kernels):
    """opcheck accepts the schema, fake kernel, autograd registration, and traced graph with dynamic shapes."""
    differentiable = "_bwd" not in name
    torch.library.opcheck(getattr(OPS, name).default, arguments_on(arguments, "cpu", differentiable))


@every_op_call
def test_fake_on_meta_tensors(name, arguments, plain_kernels):
    op = getattr(OPS, name)
    assert described(op(*arguments_on(arguments, "meta"))) == described(op(*arguments_on(arguments, "cpu")))


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@some_cases
def test_gradients_on_meta_tensors(case, backend, monkeypatch):
    """Outputs and gradients of meta tensors have the right shapes and dtypes, and no kernel runs."""
    if backend not in backends_of(case):
        return
    expected = case.run(case.leaves(torch.float32))
    monkeypatch.setattr(_backends, "_reasons", lambda backend, op, device: [])
    leaves = {n: t.detach().to("meta").requires_grad_() for n, t in case.leaves(torch.float32).items()}
    options = {n: v.to("meta") if isinstance(v, Tensor) else v for n, v in case.options.items()}
    outs = Case(case.op, case.shapes, options).outputs(leaves, backend=backend)
    grads = torch.autograd.grad(outs, list(leaves.values()), [torch.empty_like(out) for out in outs])
    results = [*outs, *grads]
    assert [(r.shape, r.dtype) for r in results] == [(e.shape, e.dtype) for e in expected.values()]
    assert all(r.device.type == "meta" for r in results)


def test_fakes_with_symbolic_sizes():
    """Fake kernels return symbolic sizes for inputs with symbolic sizes."""
    real = torch.empty(4, 11, 13, 6)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x = mode.from_tensor(real, static_shapes=False)
        windows = OPS.window_partition(x, [1, 4, 5], [0, 1, 2], False)
        back = OPS.window_reverse(windows, list(x.shape[1:3]), [1, 4, 5], [0, 1, 2], False)
        merged, mean, _ = OPS.patch_merging_norm_fwd(x, None, None, [1, 2, 2], [0, 2, 1, 3], 1e-5, torch.float16)
        parts, _, rstd = OPS.layer_norm_fwd(x, None, None, [1, 2, 3], 1e-5, torch.float32)
        sizes = [x.shape[0] * 9, 4 * 6 * 7 * 24, x.numel()]
        found = [windows.shape[0], merged.numel(), parts.numel()]
        assert all(isinstance(n, torch.SymInt) for n in found)
        assert found == sizes
        assert windows.shape[1:] == (20, 6)
        assert back.shape == x.shape
        assert mean.shape == (4, 6, 7)
        assert rstd.shape == (4, 22, 39)


COMPILED = [
    "norm", "expand", "merge_unfold_pre_5x4_2", "merge_monai_post_3x4x5_3", "residual", "post", "partition", "reverse"
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "backend", "dynamic"),
    [
        *((name, "cuda", None) for name in COMPILED),
        *((name, "cuda", True) for name in ("norm", "expand", "merge_unfold_pre_5x4_2", "reverse")),
        *((name, "reference", None) for name in ("merge_unfold_pre_5x4_2", "partition", "post")),
    ],
)
def test_compile_fullgraph(name, backend, dynamic, plain_kernels):
    """One forward and backward graph serves all batch sizes, after at most one recompilation."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(**leaves):
        return getattr(swinkernels, CASES[name].op)(**leaves, **CASES[name].options, backend=backend)

    compiled = torch.compile(call, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (9, 11, 13):  # sizes that no other axis has, because dynamo gives equal sizes one symbol
        case = CASES[name].with_batch(batch)
        expected = case.run(case.leaves(torch.float32), call)
        assert_close(case.run(case.leaves(torch.float32), compiled), expected, 1e-6)
    assert counter.frame_count <= 2


# --- inputs


def spread(x: Tensor) -> Tensor:
    """Return a strided copy of ``x`` with a storage offset, in memory that is otherwise filled with NaN."""
    wide = torch.full([2 * n for n in x.shape], math.nan, dtype=x.dtype)
    view = wide[(slice(1, None, 2),) * x.dim()]
    view.copy_(x)
    return view


@some_cases
@pytest.mark.parametrize("rearranged", [spread, lambda x: x.mT.contiguous().mT if x.dim() > 1 else spread(x)])
def test_non_contiguous_inputs(case, rearranged, plain_kernels):
    """Strided tensors give the same results as contiguous ones."""
    for backend in ("auto", *backends_of(case)):
        expected = case.run(case.leaves(torch.float32), backend=backend)
        leaves = {n: rearranged(t.detach()).requires_grad_() for n, t in case.leaves(torch.float32).items()}
        assert any(not t.is_contiguous() for t in leaves.values())
        got = case.run(leaves, backend=backend)
        assert_close(got, expected, 1e-6)  # the order of sums depends on strides


@some_cases
def test_results_are_contiguous_and_of_their_own(case, plain_kernels):
    for backend in ("auto", *backends_of(case)):
        leaves = case.leaves(torch.float32)
        for out in case.outputs(leaves, backend=backend):
            assert out.is_contiguous()
            assert all(out.untyped_storage().data_ptr() != t.untyped_storage().data_ptr() for t in leaves.values())


@some_cases
def test_inputs_are_never_modified(case, plain_kernels):
    for backend in ("auto", *backends_of(case)):
        leaves = case.leaves(torch.float32)
        tensors = [*leaves.values(), *(v for v in case.options.values() if isinstance(v, Tensor))]
        before, versions = [t.detach().clone() for t in tensors], [t._version for t in tensors]
        case.run(leaves, backend=backend)
        assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))
        assert [t._version for t in tensors] == versions


@some_cases
def test_empty_batch(case, plain_kernels):
    """An empty batch gives empty results, and zero gradients for the parameters."""
    if case.shapes.get("x") == (5,):
        return  # a single row has no batch
    case = case.with_batch(0)
    for backend in ("auto", *backends_of(case)):
        got = case.run(case.leaves(torch.float32), backend=backend)
        assert got["out 0"].shape[0] == 0
        for name, leaf in case.leaves(torch.float32).items():
            assert torch.equal(got[f"d{name}"], torch.zeros_like(leaf))


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.uint8, torch.int16, torch.int64, torch.complex64, torch.complex128, torch.float8_e4m3fn]
)
def test_windows_of_any_dtype(dtype):
    x = (10 * draw(2, 5, 7, 3)).to(dtype)
    windows = swinkernels.window_partition(x, 4, (1, 3))
    assert windows.dtype == dtype
    back = swinkernels.window_reverse(windows, 4, (5, 7), (1, 3))
    assert torch.equal(back.view(torch.uint8), x.view(torch.uint8))


# --- derivatives


@every_case
def test_gradcheck(case):
    leaves = case.leaves(torch.float64)

    def function(*values):
        return getattr(swinkernels, case.op)(**dict(zip(leaves, values, strict=True)), **case.options)

    # fast_mode tests one random direction, because all directions would take minutes.
    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize(
    "name", ["norm", "expand", "merge_swin_pre_5x4_2", "merge_swin_post_5x4_2", "residual", "post"]
)
def test_second_derivative_is_in_the_reference_alone(name, plain_kernels):
    case = CASES[name]

    def penalty(backend, **leaves):
        outs = case.outputs(leaves, backend=backend)
        normed = leaves["y" if name == "post" else "x"]
        (dx,) = torch.autograd.grad([out.square().sum() for out in outs], normed, create_graph=True)
        return dx.square().sum()

    leaves = case.leaves(torch.float32)
    for backend in backends_of(case):
        if backend == "triton" and "merge" in name and "post" in name:
            continue  # the norm is torch's
        with pytest.raises(NotImplementedError, match="use backend='torch' or 'reference' for double backward"):
            penalty(backend, **leaves).backward()
    wide = case.leaves(torch.float64)
    assert torch.autograd.gradcheck(
        lambda *v: penalty("reference", **dict(zip(wide, v, strict=True))), tuple(wide.values()), fast_mode=True
    )


@pytest.mark.parametrize("name", ["partition", "partition_3d", "reverse", "reverse_3d"])
def test_partition_and_reverse_are_differentiable_again_and_again(name, plain_kernels):
    """Third derivatives are correct: each op is the derivative of the other, and itself differentiable."""
    case = CASES[name]
    for backend in ("reference", *backends_of(case)):
        leaves = case.leaves(torch.float32)
        (x,), (out,) = leaves.values(), case.outputs(leaves, backend=backend)
        (token,) = torch.autograd.grad(out.sum(), x, retain_graph=True)  # 1 for a token of the map, 0 for a pad
        derivative = out.pow(3)
        for _ in range(3):
            (derivative,) = torch.autograd.grad(derivative.sum(), x, create_graph=True)
        assert torch.equal(derivative, 6 * token)
        assert set(token.unique().tolist()) <= {0.0, 1.0}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_reverse_undoes_partition_bit_for_bit(data):
    """window_reverse restores any map exactly for every shift and pad order, also with windows larger than the map."""
    rank = data.draw(st.sampled_from([2, 3]))
    size = data.draw(st.tuples(*[st.integers(1, 9 if rank == 2 else 5)] * rank))
    window = data.draw(st.tuples(*[st.integers(1, 6)] * rank))
    shift = tuple(data.draw(st.integers(0, w - 1)) for w in window)
    channels, batch = data.draw(st.sampled_from([1, 3, 30, 97])), data.draw(st.integers(0, 3))
    options = {"pad_order": data.draw(st.sampled_from(["pad_then_roll", "roll_then_pad"]))}
    x = draw(batch, *size, channels).to(data.draw(st.sampled_from(DTYPES))).requires_grad_()
    windows = swinkernels.window_partition(x, window, shift, **options)
    n = math.prod(window)
    assert windows.shape == (
        batch * math.prod(-(-s // w) * w for s, w in zip(size, window, strict=True)) // n,
        n,
        channels,
    )
    back = swinkernels.window_reverse(windows, window, size, shift, **options)
    assert torch.equal(back, x)
    dout = draw(*x.shape, seed=2).to(x.dtype)
    assert torch.equal(torch.autograd.grad(back, x, dout)[0], dout)


# --- backends


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@some_cases
def test_backend_that_cannot_run(case, backend):
    """A kernel backend that cannot run a call on CPU tensors raises an error with the reason."""
    if backend == "triton" and _backends.interpreting():
        pytest.skip("Triton's interpreter runs on the CPU")
    with pytest.raises(NotImplementedError) as caught:
        case.outputs(case.leaves(torch.float32), backend=backend)
    message = str(caught.value)
    assert message.startswith(f"{case.op}: backend='{backend}' cannot run this call: ")
    assert message.endswith("Use backend='auto', which takes 'torch' here.")
    if backend not in backends_of(case):
        assert "it does not implement" in message
    else:
        assert "it runs on cuda tensors, got cpu" in message
    missing = _backends.NOT_INSTALLED[backend]
    assert missing is None or missing in message or backend not in backends_of(case)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda x: swinkernels.layer_norm(x.double(), backend="cuda"), "it has no torch.float64 kernel"),
        (
            lambda x: swinkernels.layer_norm(x.half(), dtype=torch.bfloat16, backend="cuda"),
            "it has no kernel that reads torch.float16 and writes torch.bfloat16",
        ),
        (lambda x: swinkernels.layer_norm(x, dtype=torch.float64, backend="cuda"), "it has no torch.float64 kernel"),
        (
            lambda x: swinkernels.residual_layer_norm(x.half(), x, backend="cuda"),
            "it can only add a branch of the stream's dtype or a narrower one, got torch.float32 for torch.float16",
        ),
        (lambda x: swinkernels.patch_merging(x.double(), None, None, zeros(2, 12), backend="triton"), "float64"),
        (
            lambda x: swinkernels.patch_merging(x.double(), None, None, zeros(2, 12), norm="post", backend="cuda"),
            "float64",
        ),
        (lambda x: swinkernels.patch_expanding(x, None, None, None, factor=1, backend="triton"), "does not implement"),
    ],
)
def test_reasons_of_a_backend(call, reason, plain_kernels):
    with pytest.raises(NotImplementedError, match="cannot run this call") as caught:
        call(torch.zeros(1, 2, 2, 3))
    assert reason in str(caught.value)


def test_longest_row(monkeypatch, plain_kernels):
    """If a row is longer than a backend's limit, "auto" chooses another backend."""
    monkeypatch.setitem(_backends.NORM_LIMITS, "cuda", 4)
    monkeypatch.setitem(_backends.PREFERENCE, "cpu", ("cuda",))
    x = draw(2, 5).float()
    with pytest.raises(NotImplementedError, match="at most 4 elements together, got 5"):
        swinkernels.layer_norm(x, backend="cuda")
    assert torch.equal(swinkernels.layer_norm(x), swinkernels.layer_norm(x, backend="torch"))
    parts = draw(1, 2, 2, 16).float()
    assert swinkernels.patch_expanding(parts, None, None, None, backend="cuda").shape == (1, 4, 4, 4)


# --- channel orders of merged patches


@pytest.mark.parametrize(("order", "rank"), list(RUNS))
def test_row_major_columns(order, rank):
    """For every order, a row-major gather followed by a reduction with reordered columns gives patch_merging's result,
    even if a neighbour occurs twice.
    """
    c, out, count = 3, 7, 2**rank
    x, weight = draw(2, *(4,) * rank, c), draw(out, count * c, seed=2)
    expected = reference.patch_merging(x, None, None, weight, order=order, norm="post")
    columns = _by_neighbour(weight, count) if order == "unfold" else weight
    columns = _row_major_columns(columns, RUNS[order, rank])
    gathered = reference.window_partition(x, 2).flatten(1).reshape(2, *(2,) * rank, count * c)
    torch.testing.assert_close(reference.layer_norm(gathered @ columns.T), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rank", [2, 3])
def test_by_neighbour(rank):
    """patch_merging gives the same result for order="unfold" as for order="row_major" with reordered norm parameters
    and reduction weight.
    """
    c, out, count = 3, 7, 2**rank
    x, weight = draw(2, *(3,) * rank, c), draw(out, count * c, seed=2)
    norm = draw(count * c, seed=3), draw(count * c, seed=4)
    reordered = [_by_neighbour(p, count) for p in (*norm, weight)]
    got = reference.patch_merging(x, *reordered, order="row_major")
    expected = reference.patch_merging(x, *norm, weight, order="unfold")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    # Channel i of neighbour n is at i * count + n in the order "unfold", and at n * c + i after _by_neighbour.
    numbered = torch.arange(count * c).reshape(c, count)
    assert torch.equal(_by_neighbour(numbered.flatten(), count), numbered.T.flatten())


def test_orders_of_the_op_are_those_of_the_reference():
    assert ORDERS == REFERENCE_ORDERS
    for (order, rank), numbers in RUNS.items():
        offsets = neighbours(order, rank)
        assert [sum(o << (rank - 1 - i) for i, o in enumerate(offset)) for offset in offsets] == list(numbers)
