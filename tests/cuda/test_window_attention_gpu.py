"""Tests the backends on a real GPU; `make gpu-test` runs this file and all other tests marked gpu."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import swinkernels
from swinkernels.ops import _backends
from swinkernels.testing import (
    WindowAttentionCase,
    check_window_attention,
    op_arguments,
    opcheck_forward_and_backward,
    run_case,
)
from tests.cuda.test_axis_tables_emulated import CASES as AXIS_TABLES
from tests.cuda.test_window_attention_emulated import (
    DROPOUT,
    FEATURES,
    GEOMETRY,
    HEAD_DIMS,
    LONG,
    ODD_HEAD_DIMS,
    WINDOWS,
)
from tests.support.philox import kept_weights

pytestmark = pytest.mark.gpu
needs_cuda = pytest.mark.skipif(_backends.unavailable("cuda") is not None, reason=str(_backends.unavailable("cuda")))

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TF32_EPS = 2.0**-10
PADDED = WindowAttentionCase(2, (10, 17), 3, 32, 7, 3, has_pad_qkv=True)
STAGES = [WindowAttentionCase(2, (56 >> i, 56 >> i), 3 << i, 32, 7, 3 if i < 3 else 0) for i in range(4)]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    reason = _backends.unavailable(request.param)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def attend(backend: str):
    return functools.partial(swinkernels.window_attention_qkvpacked, backend=backend)


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*STAGES, PADDED], ids=str)
def test_stages_of_a_model(backend: str, case: WindowAttentionCase, dtype: torch.dtype) -> None:
    check_window_attention(attend(backend), case, dtype, DEVICE)


@pytest.mark.parametrize("form", ["window_attention_qkvpacked", "window_attention"])
def test_opcheck(backend: str, form: str) -> None:
    case = WindowAttentionCase(2, (5, 9), 2, 8, (4, 3), (2, 1), has_pad_qkv=True)
    suffix = "_triton" if backend == "triton" else ""
    opcheck_forward_and_backward(form, suffix, op_arguments(case, form, torch.float32, DEVICE))


# Covers the CUDA kernels' choices of tiles and loops; tests/triton covers the choices of Triton's kernels.
@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("case", [*WINDOWS, *HEAD_DIMS, *ODD_HEAD_DIMS, *LONG.values()], ids=str)
def test_sizes(case: WindowAttentionCase, dtype: torch.dtype) -> None:
    check_window_attention(attend("cuda"), case, dtype, DEVICE, rounds_unit_rows=True)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(name: str, dtype: torch.dtype) -> None:
    check_window_attention(attend("cuda"), GEOMETRY[name], dtype, DEVICE)


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=dtype_id)
@pytest.mark.parametrize("name", AXIS_TABLES)
def test_decomposed_relative_positions(name: str, dtype: torch.dtype) -> None:
    case = AXIS_TABLES[name]
    check_window_attention(attend("cuda"), case, dtype, DEVICE, cancels=1 in case.window_tuple)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", FEATURES)
def test_cosine_attention_and_dense_biases(name: str, dtype: torch.dtype) -> None:
    check_window_attention(attend("cuda"), FEATURES[name], dtype, DEVICE, rounds_unit_rows=True)


@needs_cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference uses the kernels' dropout mask."""
    case = DROPOUT[name]
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(3))
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    shape = (case.batch, windows, case.num_heads, math.prod(case.window_tuple))
    kept = kept_weights(seed.item(), case.options["dropout_p"], *shape)
    monkeypatch.setattr(Tensor, "bernoulli_", lambda self, p, generator=None: self.copy_(kept))
    generator = torch.Generator(DEVICE).manual_seed(3)
    op = functools.partial(attend("cuda"), generator=generator)
    check_window_attention(op, case, dtype, DEVICE, rounds_unit_rows=True)


@pytest.mark.parametrize("case", [*WINDOWS[3:6], PADDED], ids=str)
def test_tf32_follows_torchs_switch(backend: str, case: WindowAttentionCase, allow_tf32: Callable) -> None:
    allow_tf32(True)
    rounded = check_window_attention(attend(backend), case, torch.float32, DEVICE, eps=TF32_EPS)
    allow_tf32(False)
    exact = check_window_attention(attend(backend), case, torch.float32, DEVICE)
    assert not torch.equal(rounded["out"], exact["out"])


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_same_input_same_bits(backend: str, dtype: torch.dtype) -> None:
    case = WindowAttentionCase(64, (56, 56), 3, 32, 7, 3)
    inputs = case.inputs(dtype, DEVICE)
    first = run_case(attend(backend), inputs, case.arguments())
    for _ in range(3):
        again = run_case(attend(backend), inputs, case.arguments())
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def test_strides_are_honoured_and_nothing_is_modified(backend: str) -> None:
    inputs = PADDED.inputs(torch.bfloat16, DEVICE)
    expected = run_case(attend(backend), inputs, PADDED.arguments())
    wide = torch.randn(2, 10, 17, 5 * 96, device=DEVICE, dtype=torch.bfloat16)
    wide[..., 96:384] = inputs["qkv"]
    strided = {**inputs, "qkv": wide[..., 96:384]}
    before = {name: x.clone() for name, x in strided.items()}
    leaves = {name: x.detach().requires_grad_() for name, x in strided.items() if name != "dout"}
    out = swinkernels.window_attention_qkvpacked(**leaves, **PADDED.arguments(), backend=backend)
    dout = inputs["dout"].transpose(1, 2).contiguous().transpose(1, 2)
    grads = torch.autograd.grad(out, list(leaves.values()), dout)
    assert torch.equal(out, expected["out"])
    for name, grad in zip(leaves, grads, strict=True):
        assert torch.equal(grad, expected[f"d{name}"]), name
    for name, x in strided.items():
        assert torch.equal(x, before[name]), name


def test_empty_batch(backend: str) -> None:
    case = WindowAttentionCase(0, (8, 9), 2, 32, 4, 2, has_pad_qkv=True)
    results = run_case(attend(backend), case.inputs(torch.bfloat16, DEVICE), case.arguments())
    assert results["out"].shape == (0, 8, 9, 64)
    assert not results["dbias_table"].any()
    assert not results["dpad_qkv"].any()


def test_side_stream_and_cuda_graph(backend: str) -> None:
    case = WindowAttentionCase(8, (28, 28), 6, 32, 7, 3)
    inputs, others = (case.inputs(torch.bfloat16, DEVICE, seed) for seed in (0, 1))
    expected, different = (run_case(attend(backend), x, case.arguments()) for x in (inputs, others))
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "dout"}
    dout = inputs["dout"].clone()

    def run() -> list[Tensor]:
        out = swinkernels.window_attention_qkvpacked(**leaves, **case.arguments(), backend=backend)
        return [out, *torch.autograd.grad(out, list(leaves.values()), dout)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = run()
    stream.synchronize()
    for got, value in zip(results, expected.values(), strict=True):
        assert torch.equal(got, value)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = run()
    for source, wanted in ((others, different), (inputs, expected)):
        with torch.no_grad():
            for name, leaf in leaves.items():
                leaf.copy_(source[name])
        dout.copy_(source["dout"])
        graph.replay()
        for got, value in zip(captured, wanted.values(), strict=True):
            assert torch.equal(got, value)


def test_a_device_that_is_not_the_current_one(backend: str) -> None:
    """Kernels run on the device of the tensors, the current device does not change, and a decision cached for one
    device is not used on another.
    """
    if torch.cuda.device_count() < 2:
        pytest.skip("torch sees one CUDA GPU")
    here, there = (torch.device("cuda", i) for i in range(2))
    with torch.cuda.device(here):
        inputs = PADDED.inputs(torch.bfloat16, here)
        expected = run_case(attend(backend), inputs, PADDED.arguments())
        for _ in range(2):
            got = run_case(attend(backend), {k: x.to(there) for k, x in inputs.items()}, PADDED.arguments())
            assert torch.cuda.current_device() == here.index
            for name, value in expected.items():
                assert got[name].device == there, name
                assert torch.equal(got[name].to(here), value), name
        with pytest.raises(ValueError, match="the same device"):
            attend(backend)(inputs["qkv"], inputs["bias_table"].to(there), **PADDED.arguments())


@needs_cuda
def test_a_call_is_the_same_on_every_stream() -> None:
    case = WindowAttentionCase(2, (10, 17), 3, 32, 7, 3, has_pad_qkv=True)
    inputs = case.inputs(torch.bfloat16, DEVICE)
    called = run_case(attend("cuda"), inputs, case.arguments())
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
        aside = run_case(attend("cuda"), inputs, case.arguments())
    torch.cuda.synchronize()
    for name, value in called.items():
        assert torch.equal(aside[name], value), name


def test_replays_of_a_graph_draw_dropout_anew(backend: str) -> None:
    """Both passes of a replay use the same mask: out is linear in v, so out * dout and v * dv have equal sums."""
    case = WindowAttentionCase(8, (28, 28), 6, 32, 7, 3, options={"dropout_p": 0.3})
    inputs = case.inputs(torch.float32, DEVICE)
    qkv = inputs["qkv"].requires_grad_()

    def run() -> tuple[Tensor, Tensor]:
        out = attend(backend)(qkv=qkv, bias_table=inputs["bias_table"], **case.arguments())
        return out.detach(), torch.autograd.grad(out, qkv, inputs["dout"])[0]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()  # compiles
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out, dqkv = run()
    outputs = []
    for _ in range(3):
        graph.replay()
        v, dv = (x.double().chunk(3, dim=-1)[2] for x in (qkv.detach(), dqkv))
        torch.testing.assert_close((v * dv).sum(), (out.double() * inputs["dout"].double()).sum(), rtol=1e-4, atol=1e-2)
        outputs.append(out.clone())
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


def test_more_than_two_to_the_31_elements(backend: str) -> None:
    """The last images of a batch of more than 2 ** 16 windows give the same results as in a batch of their own."""
    batch = 2400
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    case = WindowAttentionCase(batch, (56, 56), 3, 32, 7, 3, has_table=False)
    generator = torch.Generator(DEVICE).manual_seed(0)
    qkv, dout = (
        torch.randn(batch, 56, 56, c, device=DEVICE, dtype=torch.bfloat16, generator=generator) for c in (288, 96)
    )
    assert qkv.numel() > 2**31
    whole = run_case(attend(backend), {"qkv": qkv, "dout": dout}, case.arguments())
    last = run_case(attend(backend), {"qkv": qkv[-2:], "dout": dout[-2:]}, case.arguments())
    for name, value in last.items():
        assert torch.equal(whole[name][-2:], value), name


def test_auto_takes_the_best_backend_and_autocast_casts() -> None:
    best = next(name for name in _backends.PREFERENCE["cuda"] if _backends.unavailable(name) is None)
    inputs = PADDED.inputs(torch.float32, DEVICE)
    del inputs["dout"]
    with torch.autocast("cuda", torch.bfloat16):
        out = swinkernels.window_attention_qkvpacked(**inputs, **PADDED.arguments())
    assert out.dtype == torch.bfloat16
    low = {name: x if name == "bias_table" else x.bfloat16() for name, x in inputs.items()}
    assert torch.equal(out, swinkernels.window_attention_qkvpacked(**low, **PADDED.arguments(), backend=best))


@pytest.mark.parametrize("fullgraph", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_accelerated_timm_model(backend: str, name: str, fullgraph: bool) -> None:
    """Logits and gradients of a whole model in float32 equal timm's up to the order of summation."""
    timm = pytest.importorskip("timm", reason="timm is not installed")
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=224, num_classes=10, drop_path_rate=0.0).to(DEVICE).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):  # v2 initialises the weights to 0, so branches return 0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    accelerated = copy.deepcopy(model)
    report = swinkernels.accelerate(accelerated, backend=backend)
    assert len(report.replaced) == 1 + 12 + 3
    images = torch.randn(4, 3, 224, 224, device=DEVICE)
    run = torch.compile(accelerated, fullgraph=True) if fullgraph else accelerated
    expected, got = model(images), run(images)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    for net, logits in ((model, expected), (accelerated, got)):
        logits.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
    for (name, p), q in zip(model.named_parameters(), accelerated.parameters(), strict=True):
        error = (p.grad - q.grad).norm() / p.grad.norm().clamp(min=1e-6)
        assert error < 1e-3, f"{name}: {error}"
