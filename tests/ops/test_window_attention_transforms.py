"""Tests derivatives, transforms, compilation, huge maps and numerical range of window attention.

CLASSES has one case for each kind of argument with its own code path; the backends' own tests cover sizes.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import swinkernels
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.testing import (
    WindowAttentionCase,
    check_window_attention,
    named_inputs,
    op_arguments,
    opcheck_forward_and_backward,
    run_case,
)

Case = WindowAttentionCase
FORMS = ("window_attention_qkvpacked", "window_attention")
needs_cpu = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
attend = swinkernels.window_attention_qkvpacked


def regions(*frame: int) -> Tensor:
    return torch.arange(math.prod(frame), dtype=torch.int32).reshape(frame) * 7919 % 3


# Small enough for finite differences in every element.
CLASSES = {
    "table": Case(1, (4, 2), 1, 2, 2, 1),
    "no bias": Case(1, (2, 2), 2, 2, 2, 0, has_table=False),
    "dense bias": Case(1, (4, 2), 1, 2, 2, 1, has_table=False, bias_types=0),
    "bias by type": Case(1, (4, 2), 1, 2, 2, 1, has_table=False, bias_types=2),
    "v2": Case(1, (2, 4), 1, 2, 2, 1, has_logit_scale=True),
    "v2, dense bias": Case(1, (2, 2), 2, 2, 2, 0, has_table=False, has_logit_scale=True, bias_types=0),
    "pads": Case(1, (3, 2), 1, 2, 2, 1, has_pad_qkv=True),
    "pads, rolled first": Case(1, (3, 2), 1, 2, 2, 1, has_pad_qkv=True, options={"pad_order": "roll_then_pad"}),
    "pads before": Case(1, (3, 2), 1, 2, 2, 1, has_pad_qkv=True, options={"pad_before": (1, 0)}),
    "v2, pads": Case(1, (3, 2), 1, 2, 2, 1, has_pad_qkv=True, has_logit_scale=True),
    "periodic": Case(1, (4, 2), 1, 2, 2, 1, options={"periodic": (True, False)}),
    "region map": Case(1, (3, 2), 1, 2, 2, 1, has_pad_qkv=True, options={"region_map": regions(4, 2)}),
    "grid": Case(1, (4, 2), 1, 2, 2, 0, options={"grid": True}),
    "table window": Case(1, (4, 2), 1, 2, 2, 1, options={"table_window": (3, 2)}),
    "volume": Case(1, (2, 2, 2), 1, 2, (1, 2, 2), (0, 1, 1)),
    "scale, mask value": Case(1, (4, 2), 1, 2, 2, 1, options={"scale": -0.4, "mask_value": 1.5}),
    "axis tables": Case(1, (4, 2), 1, 2, 2, 1, has_table=False, has_axis_tables=True),
    "key window": Case(1, (3, 4), 1, 2, 2, 0, has_pad_qkv=True, options={"key_window": 4}),
    "table by type": Case(1, (4, 2), 1, 2, 2, 1, table_types=2, options={"table_pairs": (True, False)}),
    "dropout": Case(1, (4, 2), 1, 2, 2, 1, options={"dropout_p": 0.4}),
}
WITHOUT_DROPOUT = {name: case for name, case in CLASSES.items() if name != "dropout"}


@pytest.mark.parametrize("name", CLASSES)
def test_gradcheck_of_the_reference(name: str) -> None:
    """Gradients of the output and of the attention weights agree with finite differences in float64."""
    case = CLASSES[name]
    inputs = {n: x.double().requires_grad_() for n, x in case.inputs(torch.float32).items() if n != "dout"}
    if "logit_scale" in inputs:  # the clamp has a kink
        inputs["logit_scale"] = inputs["logit_scale"].detach().clamp(max=1.5).requires_grad_()

    def call(*leaves: Tensor) -> Any:
        generator = torch.Generator().manual_seed(1) if name == "dropout" else None
        given = named_inputs(dict(zip(inputs, leaves, strict=True)))
        return reference.window_attention_qkvpacked(
            **given, **case.arguments(), generator=generator, return_attention=True
        )

    assert torch.autograd.gradcheck(call, tuple(inputs.values()))


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_opcheck(name: str, form: str) -> None:
    opcheck_forward_and_backward(form, "", op_arguments(CLASSES[name], form, torch.float32))


@pytest.mark.skipif(_backends.interpreting(), reason="Triton's interpreter has its own kernels on the CPU")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["dropout", "v2, pads", "region map"])
def test_opcheck_of_plain_kernels(plain_kernels: None, name: str, form: str) -> None:
    opcheck_forward_and_backward(form, "_triton", op_arguments(CLASSES[name], form, torch.float32))


# --- dropout, with kernels in plain PyTorch


@pytest.mark.skipif(_backends.interpreting(), reason="Triton's interpreter has its own kernels on the CPU")
@pytest.mark.parametrize("packed", [True, False])
def test_dropout_draws_a_seed_and_backward_has_the_same(
    plain_kernels: None, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    case = Case(2, (5, 8), 2, 4, 4, 2, has_pad_qkv=True, has_logit_scale=True, options={"dropout_p": 0.3})
    inputs = case.inputs(torch.float32)

    def op(qkv: Tensor, **arguments: Any) -> Tensor:
        if packed:
            return attend(qkv, **arguments, backend="triton")
        return swinkernels.window_attention(*qkv.unflatten(-1, (3, 2, 4)).unbind(-3), **arguments, backend="triton")

    def expected(seed: Tensor) -> dict[str, Tensor]:
        return run_case(
            lambda **given: reference.window_attention_qkvpacked(
                **given, generator=torch.Generator().manual_seed(seed.item())
            ),
            inputs,
            case.arguments(),
        )

    draw = functools.partial(torch.randint, -(2**63), 2**63 - 1, (1,))
    torch.manual_seed(11)
    seeds = [draw(), draw()]
    torch.manual_seed(11)
    results = [run_case(op, inputs, case.arguments()) for _ in seeds]
    for got, seed in zip(results, seeds, strict=True):
        for name, value in expected(seed).items():
            torch.testing.assert_close(got[name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert not torch.equal(results[0]["out"], results[1]["out"])  # a cached call also draws a new seed

    generator = torch.Generator().manual_seed(5)
    own = run_case(op, inputs, {**case.arguments(), "generator": generator})
    for name, value in expected(draw(generator=torch.Generator().manual_seed(5))).items():
        torch.testing.assert_close(own[name], value)


# --- transforms


@needs_cpu
@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0)])
def test_vmap_is_a_loop(dims: tuple[int | None, int | None]) -> None:
    """vmap, which uses torch's fallback for ops without a rule, gives the same outputs and gradients as a loop."""
    case = Case(2, (6, 9), 2, 8, 3, 1)
    inputs = case.inputs(torch.float32)
    given = [inputs["qkv"], inputs["bias_table"]]
    leaves = [
        (torch.stack([x, -0.5 * x]) if dim == 0 else x).requires_grad_() for x, dim in zip(given, dims, strict=True)
    ]

    def call(qkv: Tensor, table: Tensor) -> Tensor:
        return attend(qkv, table, **case.arguments(), backend="cpu")

    looped = torch.stack([call(*(x[i] if d == 0 else x for x, d in zip(leaves, dims, strict=True))) for i in range(2)])
    mapped = torch.func.vmap(call, in_dims=dims)(*leaves)
    assert torch.equal(mapped, looped)
    dout = torch.stack([inputs["dout"], inputs["dout"].flip(1)])
    for a, b in zip(torch.autograd.grad(mapped, leaves, dout), torch.autograd.grad(looped, leaves, dout), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@needs_cpu
def test_batched_gradients_are_a_loop() -> None:
    case = Case(2, (6, 9), 2, 8, 3, 1)
    inputs = case.inputs(torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    out = attend(qkv, inputs["bias_table"], **case.arguments(), backend="cpu")
    douts = torch.stack([inputs["dout"], inputs["dout"].flip(1), 2 * inputs["dout"]])
    (batched,) = torch.autograd.grad(out, qkv, douts, retain_graph=True, is_grads_batched=True)
    looped = [torch.autograd.grad(out, qkv, dout, retain_graph=True)[0] for dout in douts]
    assert torch.equal(batched, torch.stack(looped))


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
def test_gradients_per_sample(form: str) -> None:
    """``vmap(grad(loss))`` gives the per-sample gradients of the map and of the shared parameters."""
    case = dataclasses.replace(CLASSES["v2, pads"], batch=3)
    inputs = case.inputs(torch.float32)
    dout = inputs.pop("dout")
    qkv = inputs.pop("qkv")

    def loss(qkv: Tensor, parameters: dict[str, Tensor], dout: Tensor, backend: str) -> Tensor:
        qkv = qkv[None].unflatten(-1, (3, case.num_heads, case.head_dim))
        maps = (qkv,) if form == "window_attention_qkvpacked" else qkv.unbind(-3)
        return (getattr(swinkernels, form)(*maps, **parameters, **case.arguments(), backend=backend) * dout).sum()

    def per_sample(backend: str) -> Any:
        one = torch.func.grad(functools.partial(loss, backend=backend), argnums=(0, 1))
        return torch.func.vmap(one, in_dims=(0, None, 0))(qkv, inputs, dout)

    (got, got_tables), (want, want_tables) = per_sample("cpu"), per_sample("torch")
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got_tables, want_tables, rtol=1e-5, atol=1e-5)


@needs_cpu
@pytest.mark.tool("`torch.func`: `vmap`, `grad`, `jacrev`", "torch")
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_derivatives_of_functorch(transform: Any) -> None:
    case = Case(1, (2, 4), 1, 2, 2, 1)
    inputs = case.inputs(torch.float32)

    def call(qkv: Tensor, backend: str) -> Tensor:
        out = attend(qkv, inputs["bias_table"], **case.arguments(), backend=backend)
        return out.sin().sum() if transform is torch.func.grad else out

    got, want = (transform(functools.partial(call, backend=b))(inputs["qkv"]) for b in ("cpu", "torch"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize(
    ("transform", "reason"),
    [(torch.func.jacfwd, "forward-mode"), (torch.func.hessian, "forward-mode")],
)
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.tool(
    "`torch.func`: `jvp`, `jacfwd`, `hessian`", "torch", 'use `backend="reference"` or `"torch"`', works=False
)
def test_derivatives_of_functorch_that_are_refused(
    transform: Any, reason: str, batched: bool, record_property: Any
) -> None:
    """Forward-mode transforms raise an error that names the backends which support them."""
    case = Case(1, (2, 4), 1, 2, 2, 1)
    qkv = case.inputs(torch.float32)["qkv"]

    def call(x: Tensor) -> Tensor:
        return attend(x, **case.arguments(), backend="cpu").sum()

    with pytest.raises(NotImplementedError) as refused:
        torch.func.vmap(transform(call))(torch.stack([qkv, qkv])) if batched else transform(call)(qkv)
    assert reason in str(refused.value)
    assert "backend='torch' or 'reference'" in str(refused.value)
    record_property("words", str(refused.value))


@needs_cpu
@pytest.mark.tool("`torch.profiler`", "torch")
def test_profilers_show_the_ops_by_name() -> None:
    case = CLASSES["table"]
    inputs = case.inputs(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = attend(inputs["qkv"].requires_grad_(), **case.arguments(), backend="cpu")
        out.sum().backward()
    assert type(out.grad_fn).__name__ == "WindowAttentionQkvpackedBackward"
    seen = {event.key for event in profile.key_averages()}
    assert {
        "WindowAttentionQkvpacked", "WindowAttentionQkvpackedBackward", "swinkernels::window_attention_qkvpacked_fwd",
        "swinkernels::window_attention_qkvpacked_bwd",
    } <= seen  # fmt: skip


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WITHOUT_DROPOUT)
def test_second_and_third_derivatives(name: str, form: str) -> None:
    """Derivatives of the CPU kernel agree with the reference's in float64, for all differentiable tensors."""
    case = WITHOUT_DROPOUT[name]
    given = {n: x for n, x in case.inputs(torch.float32).items() if n != "dout"}
    if "logit_scale" in given:  # scores that are far apart magnify errors
        given["logit_scale"] = given["logit_scale"].clamp(max=1.5)

    def derivatives(backend: str, dtype: torch.dtype) -> list[Tensor]:
        leaves = {n: x.to(dtype).requires_grad_() for n, x in given.items()}
        tensors = named_inputs(leaves)
        if form == "window_attention":
            maps = tensors.pop("qkv").unflatten(-1, (3, case.num_heads, -1)).unbind(-3)
            tensors.update(zip("qkv", maps, strict=True))
        y, found = getattr(swinkernels, form)(**tensors, **case.arguments(), backend=backend), []
        for _ in range(3):
            of_each = torch.autograd.grad(y.sin().sum(), list(leaves.values()), create_graph=True)
            y = torch.cat([g.flatten() for g in of_each])
            found.append(y.detach().double())
            y = y / found[-1].abs().max()
        return found

    for got, want in zip(derivatives("cpu", torch.float32), derivatives("reference", torch.float64), strict=True):
        assert want.abs().max() > 1e-3
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@needs_cpu
@pytest.mark.parametrize("batched", [False, True])
def test_second_derivatives_of_functorch(batched: bool) -> None:
    case = Case(1, (2, 4), 1, 2, 2, 1)
    inputs = case.inputs(torch.float32)

    def penalty(qkv: Tensor, backend: str) -> Tensor:
        first = torch.func.grad(
            lambda x: attend(x, inputs["bias_table"], **case.arguments(), backend=backend).square().sum()
        )
        return torch.func.grad(lambda x: first(x).square().sum())(qkv)

    def call(backend: str) -> Tensor:
        function = functools.partial(penalty, backend=backend)
        qkv = inputs["qkv"]
        return torch.func.vmap(function)(torch.stack([qkv, 2 * qkv])) if batched else function(qkv)

    torch.testing.assert_close(call("cpu"), call("reference"), rtol=1e-4, atol=1e-5)


@needs_cpu
def test_second_derivatives_with_a_region_map() -> None:
    case = Case(1, (4, 4), 1, 2, 2, 1)
    inputs = case.inputs(torch.float32)
    regions = (torch.arange(16).reshape(4, 4) // 5).to(torch.int8)
    found = []
    for backend in ("cpu", "reference"):
        qkv = inputs["qkv"].clone().requires_grad_()
        out = attend(qkv, inputs["bias_table"], **case.arguments(), region_map=regions, backend=backend)
        (first,) = torch.autograd.grad(out.square().sum(), qkv, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), qkv)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


# --- compilation


@needs_cpu
@pytest.mark.parametrize(
    ("dynamic", "most"), [(None, 4), (True, 2)], ids=["as they come", "at once"]
)  # None: recompiles when each of B, H and W first changes; True: one restart for the float arguments
def test_one_graph_serves_all_sizes(dynamic: bool | None, most: int) -> None:
    torch.compiler.reset()
    case = Case(2, (5, 9), 2, 8, (4, 5), (2, 1), has_pad_qkv=True)
    counter = CompileCounterWithBackend("aot_eager")
    op = functools.partial(attend, **case.arguments(), backend="cpu")
    compiled = torch.compile(
        lambda qkv, bias_table, pad_qkv: op(qkv, bias_table, pad_qkv=pad_qkv),
        fullgraph=True, dynamic=dynamic, backend=counter,
    )  # fmt: skip
    counts = []
    for batch, size in [(7, (5, 9)), (11, (5, 9)), (6, (13, 9)), (13, (17, 14)), (12, (9, 19)), (14, (21, 22))]:
        inputs = dataclasses.replace(case, batch=batch, size=size).inputs(torch.float32)
        want, got = (run_case(f, inputs, {}) for f in (lambda **x: op(**x), compiled))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)
    assert counts[-1] <= most
    assert counts[-1] == counts[-3]  # the last two sizes need no new graph


# --- huge maps


@needs_cpu
@pytest.mark.parametrize("case", [Case(2**14 + 5, (2, 8), 1, 4, 2), Case(1, (2, 2**18 + 6), 1, 3, 2, 1)], ids=str)
def test_more_than_two_to_the_16_windows(case: Case) -> None:
    windows = case.batch * math.prod(case.size) // 4
    assert windows > 2**16
    check_window_attention(functools.partial(attend, backend="cpu"), case, torch.bfloat16)


def sparse_buffer(elements: int) -> Tensor:
    """Return an uninitialised tensor, whose memory pages the system allocates when they are first written."""
    return torch.from_numpy(np.empty(elements, dtype=np.float32))


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
def test_offsets_beyond_two_to_the_31(form: str) -> None:
    """Images over 2 ** 31 elements apart, with unallocated memory in between, give the results of adjacent images."""
    case = Case(2, (5, 6), 2, 8, 4, 2, has_pad_qkv=True)
    inputs = case.inputs(torch.float32)
    apart = 2**31 + 48
    buffer = sparse_buffer(apart + 5 * 6 * 48)
    qkv = buffer.as_strided(inputs["qkv"].shape, (apart, 6 * 48, 48, 1))
    qkv.copy_(inputs["qkv"])

    def op(qkv: Tensor, bias_table: Tensor, pad_qkv: Tensor) -> Tensor:
        given = {**case.arguments(), "pad_qkv": pad_qkv, "backend": "cpu"}
        if form == "window_attention_qkvpacked":
            return attend(qkv, bias_table, **given)
        return swinkernels.window_attention(*qkv.unflatten(-1, (3, 2, 8)).unbind(-3), bias_table, **given)

    results = []
    for x in (qkv, inputs["qkv"]):
        leaves = [t.detach().requires_grad_() for t in (x, inputs["bias_table"], inputs["pad_qkv"])]
        out = op(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, inputs["dout"])])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def available_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@needs_cpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements() -> None:
    """The last image of a batch of more than 2 ** 31 elements has the same output and gradient as in a batch of one."""
    if available_bytes() < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    torch.use_deterministic_algorithms(False)  # otherwise torch would fill the buffer with NaN first
    case = Case(1, (64, 64), 4, 32, 8, 4, has_table=False)
    inputs = case.inputs(torch.bfloat16)
    batch = 2**31 // inputs["qkv"].numel() + 2
    qkv = inputs["qkv"].expand(batch, -1, -1, -1).contiguous()
    qkv[-1] = qkv[-1].flip(0)
    assert qkv.numel() > 2**31
    dout = inputs["dout"].expand(batch, -1, -1, -1)
    alone, together = (
        run_case(functools.partial(attend, backend="cpu"), {"qkv": x, "dout": g}, case.arguments())
        for x, g in ((qkv[-1:], dout[-1:]), (qkv, dout))
    )
    for name, value in alone.items():
        assert torch.equal(together[name][-1:], value), name
        assert torch.equal(together[name][0], together[name][-2]), name


# --- range

FAR_MASK = {"mask_value": -(2.0**20)}


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        pytest.param("cpu", marks=needs_cpu),
        *(pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "triton")),
    ],
)
@pytest.mark.parametrize(
    "case",
    [
        Case(1, (8, 8), 2, 16, 4, 2, options=FAR_MASK),
        Case(1, (9, 10), 2, 64, 7, 3, has_pad_qkv=True, options=FAR_MASK),
        Case(1, (8, 8), 2, 32, 4, 2, has_logit_scale=True),
        Case(1, (8, 8), 2, 16, 4, 2, has_table=False, bias_types=0, options=FAR_MASK),
        Case(1, (16, 16), 1, 16, 16, 8, options=FAR_MASK),
    ],
    ids=str,
)
@pytest.mark.parametrize(("size", "gradient"), [(2.0**15, 1.0), (300.0, 6e4), (6e-5, 6e-5)])
def test_float16_is_finite_where_the_result_is(backend: str, case: Case, size: float, gradient: float) -> None:
    """Results within float16's range are finite even if intermediate products exceed it, and no result is NaN.

    The scales of head_dim 16 and 64 are powers of two, so that float32 represents the scores exactly; otherwise
    rounding would make equal scores differ, and one of them would be the largest.
    """
    reason = _backends.unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    device = "cuda" if backend in ("cuda", "triton") else "cpu"
    inputs = case.inputs(torch.float16)
    inputs["qkv"] = (inputs["qkv"].sign() * size).half()
    inputs["dout"] = (inputs["dout"].sign() * gradient).half()
    for name in ("bias_table", "bias"):
        if name in inputs:
            inputs[name] = inputs[name].sign() * 2.0**15
    try:
        got = run_case(attend, {n: x.to(device) for n, x in inputs.items()}, {**case.arguments(), "backend": backend})
    except NotImplementedError as missing:
        pytest.skip(str(missing))
    wide = {name: x.double() for name, x in inputs.items()}
    exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
    for name, value in got.items():
        fits = exact[name].abs() < torch.finfo(value.dtype).max / 2  # larger values may round to infinity
        assert value.cpu()[fits].isfinite().all(), name
        assert not value.isnan().any(), name


@needs_cpu
def test_compiled_forward_mode() -> None:
    """Compiled forward mode avoids torch's fused attention, which has no forward derivative on a CPU."""
    x, table = torch.randn(1, 4, 4, 12), torch.randn(9, 2)

    def tangent(x: Tensor) -> Tensor:
        def call(x: Tensor) -> Tensor:
            return attend(x, table, num_heads=2, window_size=2, shift_size=1, backend="torch")

        return torch.func.jvp(call, (x,), (x,))[1]

    got = torch.compile(tangent, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, tangent(x))
