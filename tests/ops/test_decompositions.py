"""Tests that the forward ops, decomposed into plain PyTorch, give the same results, also in dynamic-shape exports."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import swinkernels
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.ops._decompositions import DECOMPOSITIONS
from swinkernels.ops.window_partition import window_partition as cut
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import assert_within_budget, op_arguments
from tests.ops.test_window_attention_transforms import CLASSES, FORMS, WITHOUT_DROPOUT
from tests.support import norm_checks
from tests.support.attention_cases import all_ops
from tests.support.norm_checks import BF16, F16, F32, NormCase

needs_cpu = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
ops = torch.ops.swinkernels


def decomposed(name: str, *arguments: Any) -> Any:
    return DECOMPOSITIONS[getattr(ops, name).default](*arguments)


def test_every_forward_op_has_a_decomposition() -> None:
    assert {op._schema.name.partition("::")[2] for op in DECOMPOSITIONS} == {n for n in all_ops() if "_bwd" not in n}


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_window_attention(name: str, form: str) -> None:
    """The decomposition's output and log-sum-exp equal the CPU kernel's."""
    arguments = [x.detach() if isinstance(x, Tensor) else x for x in op_arguments(CLASSES[name], form, torch.float32)]
    for got, want in zip(decomposed(f"{form}_fwd", *arguments), getattr(ops, f"{form}_fwd")(*arguments), strict=True):
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_dropout_is_refused() -> None:
    arguments = op_arguments(CLASSES["dropout"], "window_attention", torch.float32)
    with pytest.raises(NotImplementedError, match=r"dropout_p > 0 .* model\.eval\(\) .* swinkernels\.restore"):
        decomposed("window_attention_fwd", *arguments)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_mlp_half(norm: str, approximate: str) -> None:
    shapes = {"norm_weight": (6,), "norm_bias": (6,), "fc1_weight": (10, 6), "fc1_bias": (10,)}
    shapes |= {"fc2_weight": (6, 10), "fc2_bias": (6,)}
    x, branch, *drawn = (torch.randn(s, dtype=torch.float64) for s in ((2, 3, 6), (2, 3, 6), *shapes.values()))
    got = decomposed("mlp_half_triton", x, branch, *drawn, 1e-3, norm == "post", approximate == "tanh")
    expected = reference.mlp_half(x, *drawn, branch=branch, norm=norm, approximate=approximate, eps=1e-3)
    torch.testing.assert_close(got, expected)


@needs_cpu
@pytest.mark.parametrize("gelu", ["", "none", "tanh"])
def test_linear_layers(gelu: str) -> None:
    """The decompositions equal the CPU kernels."""
    x, residual, fc1, bias, fc2 = (torch.randn(s) for s in ((2, 3, 6), (2, 3, 6), (10, 6), (10,), (6, 10)))
    for name, *arguments in (
        ("fused_linear", x, fc1, bias, None, None, None, gelu, "", 0.0),
        ("fused_linear", x, fc2.t()[:6], None, residual, fc2[:, 0], fc2[:, 1], gelu, "pre", 1e-3),
        ("fused_mlp", x, fc1, bias, fc2, None, residual, fc2[:, 0], None, gelu, "pre", 1e-3, False),
        ("fused_mlp", x, fc1, bias, fc2, None, residual, None, fc2[:, 1], gelu, "post", 1e-3, True),
        ("fused_position_bias", x, fc1, bias, fc2),
    ):
        torch.testing.assert_close(decomposed(name, *arguments), getattr(ops, name)(*arguments))


@needs_cpu
@pytest.mark.parametrize("norm", ["", "pre", "post"])
def test_patches(norm: str) -> None:
    """The decomposition equals the CPU kernel, for maps with and without padding, and for images."""
    torch.manual_seed(0)
    for shape, factor, neighbours, columns in (
        ((2, 4, 6, 3), [1, 2, 2], [0, 2, 1, 3], 12), ((1, 3, 5, 7, 4), [2, 2, 2], [7, 1], 8),
        ((2, 3, 8, 6), [1, 4, 3], [], 36), ((1, 2, 4, 6, 4), [2, 3, 2], [], 24),
    ):  # fmt: skip
        of_norm = torch.randn(columns if norm == "pre" else 10)
        arguments = (torch.randn(shape), torch.randn(10, columns), torch.randn(10), of_norm, None, factor, neighbours)
        arguments = (*arguments, not neighbours, norm, 1e-3)
        torch.testing.assert_close(decomposed("fused_patch_linear", *arguments), ops.fused_patch_linear(*arguments))


@needs_cpu
@pytest.mark.parametrize("norm", ["", "pre", "post"])
def test_attention_half(norm: str) -> None:
    """The decomposition equals the CPU kernel."""
    torch.manual_seed(0)
    x, q, k, v, bias = (torch.randn(s) for s in ((2, 5, 6, 12), (8, 12), (8, 12), (8, 12), (24,)))
    proj, table, logit_scale, of_norm = (torch.randn(s) for s in ((12, 8), (15, 2), (2,), (12,)))
    rest = "window_size=2,3;shift_size=1,0", 0.3, -100.0, 2, norm != "", norm, 1e-3, norm == "post"
    for weights, tables in (
        ((torch.cat([q, k, v]), None, None), (table, None, None, None)),
        ((q, k, v), (None, torch.randn(2, 6, 6), logit_scale, None)),
    ):
        arguments = (x, *weights, bias, proj, None, of_norm, None, *tables, *rest)
        got = decomposed("fused_attention_half", *arguments)
        torch.testing.assert_close(got, ops.fused_attention_half(*arguments))


@pytest.mark.parametrize("pad_order", ["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize(("size", "window", "shift"), [((4, 6), (2, 3), (1, 0)), ((5, 3, 7), (2, 4, 3), (1, 3, 2))])
def test_windows(size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], pad_order: str) -> None:
    x = torch.arange(2.0 * math.prod(size) * 3).reshape(2, *size, 3) + 1
    geometry = [[1] * (3 - len(size)) + list(window), [0] * (3 - len(size)) + list(shift), pad_order == "roll_then_pad"]
    windows = decomposed("window_partition", x, *geometry)
    assert torch.equal(windows, cut(x, window, shift, pad_order=pad_order, backend="reference"))
    assert torch.equal(decomposed("window_reverse", windows, list(size), *geometry), x)


@pytest.mark.parametrize(
    "case",
    [
        NormCase("layer_norm", (3, 4, 40)),
        NormCase("layer_norm", (2, 3, 5, 64), (F16, F32), factor=(1, 2, 2), has_bias=False),
        NormCase("layer_norm", (1, 2, 3, 2, 96), (F32, BF16), factor=(1, 2, 1), has_weight=False),
        NormCase("patch_merging_norm", (2, 5, 4, 12), factor=(1, 2, 2)),
        NormCase("patch_merging_norm", (1, 3, 4, 5, 8), (BF16, BF16), factor=(2, 2, 2), order="monai"),
        NormCase("patch_merging_norm", (1, 2, 5, 3, 8), factor=(1, 2, 2), order="row_major"),
        NormCase("residual_layer_norm", (3, 4, 40), (F32, BF16), has_drop_path=True),
        NormCase("residual_post_norm", (3, 4, 40), (F32, F16), has_drop_path=True),
    ],
    ids=str,
)
def test_norms(case: NormCase) -> None:
    inputs = case.inputs()
    parameters = (inputs.get("weight"), inputs.get("bias"))
    if case.op.startswith("residual"):
        names = ("s", "z", "mean", "rstd") if case.op == "residual_layer_norm" else ("s", "mean", "rstd")
        arguments = (inputs["x"], inputs["y"], inputs.get("drop_path_scale"), *parameters, norm_checks.EPS)
    else:
        names = ("z", "mean", "rstd")
        where = [list(case.factor), case.numbers] if case.op == "patch_merging_norm" else [list(case.factor)]
        arguments = (inputs["x"], *parameters, *where, norm_checks.EPS, case.pair[1])
    got = dict(zip(names, decomposed(f"{case.op}_fwd", *arguments), strict=True))
    exact, _ = norm_checks.define(case, inputs, got.get("s"), torch.float64)
    single, _ = norm_checks.define(case, inputs, got.get("s"), F32)
    for name, x in got.items():
        assert x.dtype == {"s": case.pair[0], "z": case.pair[1]}.get(name, F32), name
        assert_within_budget(x, exact[name], single[name], name=name)


# --- exported programs


class Attend(nn.Module):
    """A module with one window attention call, for maps of any size."""

    def __init__(self, case: Case, backend: str) -> None:
        super().__init__()
        self.options = {**case.arguments(), "backend": backend}

    def forward(self, qkv: Tensor, tables: dict[str, Tensor]) -> Tensor:
        return swinkernels.window_attention_qkvpacked(qkv, **tables, **self.options)


def targets(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@needs_cpu
@pytest.mark.parametrize(
    "case",
    [
        Case(2, (10, 13), 2, 4, 4, 2, has_pad_qkv=True),
        Case(2, (10, 13), 2, 4, (3, 4), (1, 2), has_logit_scale=True, options={"pad_order": "roll_then_pad"}),
        Case(2, (5, 6, 9), 1, 4, (2, 4, 3), (1, 0, 2)),
        Case(2, (12, 12), 2, 4, 3, 0, has_table=False, options={"grid": True}),
    ],
    ids=str,
)
@pytest.mark.tool("`run_decompositions(swinkernels.decompositions())`", "torch", "core ATen, any size in one program")
def test_one_program_serves_all_sizes(case: Case) -> None:
    """A program with dynamic sizes accepts maps with and without padding; run_decompositions() keeps its op."""
    dynamic = dict.fromkeys(range(1 + len(case.size)), Dim.DYNAMIC)
    inputs = case.inputs(torch.float32)
    tables = {n: x for n, x in inputs.items() if n not in ("qkv", "dout")}
    shapes = (dynamic, dict.fromkeys(tables))
    program = torch.export.export(Attend(case, "cpu"), (inputs["qkv"], tables), dynamic_shapes=shapes)
    op = "swinkernels.window_attention_qkvpacked_fwd.default"
    assert op in targets(program.run_decompositions())
    plain = program.run_decompositions(swinkernels.decompositions())
    assert not any("swinkernels" in name for name in targets(plain))
    assert "aten.logsumexp.default" not in targets(plain)
    whole = [w * 3 for w in case.window_tuple]
    for batch, size in ((2, case.size), (3, [s + 3 for s in case.size]), (4, whole)):
        given = dataclasses.replace(case, batch=batch, size=tuple(size)).inputs(torch.float32)
        qkv = given.pop("qkv")
        del given["dout"]
        want = reference.window_attention_qkvpacked(qkv, **given, **case.arguments())
        torch.testing.assert_close(plain.module()(qkv, given), want, rtol=1e-5, atol=1e-5)


def test_fakes_of_symbolic_sizes_are_the_ops_own() -> None:
    """Fake tensors of symbolic size use the ops' fake kernels; decompositions would complicate a graph's guards."""
    assert all(op in torch._decomp.meta_table for op in DECOMPOSITIONS)
    assert not any(op in torch.export.default_decompositions() for op in DECOMPOSITIONS)
