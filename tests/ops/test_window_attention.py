"""Tests window attention as a torch op: schema, fake kernel, autograd, autocast, compile and backend choice."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import swinkernels
from swinkernels.ops import _backends
from swinkernels.ops.window_attention import _tf32_switch, spec_of, window_attention_reasons
from swinkernels.testing import (
    WindowAttentionCase,
    check_window_attention,
    op_arguments,
    opcheck_forward_and_backward,
    run_case,
)
from tests.support.no_gradient import NoGradient
from tests.support.sweeps import in_turn

FORMS = ("window_attention_qkvpacked", "window_attention")
needs_cpu = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))

PADDED = WindowAttentionCase(2, (5, 9), 2, 8, (4, 3), (2, 1), has_pad_qkv=True, options={"pad_order": "roll_then_pad"})
PLAIN = WindowAttentionCase(2, (6, 9), 2, 8, 3, 1)
VOLUME = WindowAttentionCase(1, (4, 5, 6), 2, 8, (2, 3, 3), (1, 0, 1), has_pad_qkv=True)
BARE = WindowAttentionCase(1, (4, 8), 1, 16, 4, 0, has_table=False)
COSINE = dataclasses.replace(PADDED, has_logit_scale=True)
DENSE = WindowAttentionCase(1, (4, 8), 2, 8, 4, 2, has_table=False, has_logit_scale=True, bias_types=0)
TYPES = WindowAttentionCase(2, (4, 8), 2, 8, 4, 2, has_table=False, bias_types=2)
CASES = [PADDED, PLAIN, VOLUME, BARE, COSINE, DENSE, TYPES]


def separate(qkv, bias_table=None, *, num_heads, **arguments):
    """Call window_attention with the packed form's arguments: q, k and v are strided views of qkv."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return swinkernels.window_attention(q, k, v, bias_table, num_heads=num_heads, **arguments)


@needs_cpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case, form):
    opcheck_forward_and_backward(form, "", op_arguments(case, form, torch.float32))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_separate_is_packed(case, backend):
    if _backends.unavailable(backend):
        pytest.skip(_backends.unavailable(backend))
    inputs = case.inputs(torch.float32)
    arguments = {**case.arguments(), "backend": backend}
    packed = run_case(swinkernels.window_attention_qkvpacked, inputs, arguments)
    apart = run_case(separate, inputs, arguments)
    for name, value in packed.items():
        assert torch.equal(value, apart[name]), name


def test_forms_of_qkv_agree():
    inputs = PLAIN.inputs(torch.float32)
    flat = swinkernels.window_attention_qkvpacked(inputs["qkv"], inputs["bias_table"], **PLAIN.arguments())
    split = swinkernels.window_attention_qkvpacked(
        inputs["qkv"].unflatten(-1, (3, 2, 8)), inputs["bias_table"], **PLAIN.arguments()
    )
    assert torch.equal(flat, split)


def test_auto_takes_what_can_run():
    inputs = PLAIN.inputs(torch.float32)
    dropped = swinkernels.window_attention_qkvpacked(
        inputs["qkv"], inputs["bias_table"], **PLAIN.arguments(), dropout_p=1.0
    )
    assert torch.equal(dropped, torch.zeros_like(dropped))  # the dropout is neither ignored nor refused
    exact = swinkernels.window_attention_qkvpacked(
        inputs["qkv"].double(), inputs["bias_table"].double(), **PLAIN.arguments()
    )
    assert exact.dtype == torch.float64


@needs_cpu
def test_backend_says_by_name_what_it_lacks():
    with pytest.raises(
        NotImplementedError, match=r"backend='cpu' cannot run this call.*it does not implement dropout_p"
    ):
        swinkernels.window_attention_qkvpacked(
            PLAIN.inputs(torch.float32)["qkv"], **PLAIN.arguments(), dropout_p=0.1, backend="cpu"
        )


def test_long_windows_need_shared_memory(monkeypatch):
    """On a GPU with less shared memory per block, backend "cuda" accepts only shorter windows; "triton" accepts all."""
    limits = {"max_window_volume": 1024, "shared_bytes_of_longest": 160 * 1024, "max_window_volume_in_less": 256}
    monkeypatch.setitem(_backends.LIMITS, "cuda", limits)
    case = WindowAttentionCase(1, (17, 17), 2, 8, 17, 0)
    qkv = case.inputs(torch.float32)["qkv"]
    spec = spec_of("op", qkv, (17, 17), 8, num_heads=2, window_size=17)
    for backend, room, refused in (("cuda", 99 * 1024, True), ("cuda", 163 * 1024, False), ("triton", 0, False)):
        monkeypatch.setattr(_backends, "_shared_bytes", lambda device, room=room: room)
        monkeypatch.setattr(_backends, "_reasons", lambda *_: [])
        reasons = window_attention_reasons(backend, spec, 8, torch.float32, torch.device("cuda", 0))
        assert reasons == (
            [
                "it takes windows of at most 256 tokens on a GPU with "
                f"{room // 1024} KB of shared memory per block, got 289"
            ]
            if refused
            else []
        )


@needs_cpu
def test_double_backward_with_dropout_is_refused_by_a_kernel():
    from swinkernels.ops.window_attention import _reference_gradients

    spec = spec_of("op", torch.empty(0), (4, 4), 8, num_heads=1, window_size=2, dropout_p=0.5)
    with pytest.raises(NotImplementedError, match=r"dropout_p = 0\.5: use backend='torch' or 'reference'"):
        _reference_gradients("window_attention", [], (spec.wire(), *spec.numbers, 0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_the_map_and_keeps_the_table(dtype):
    inputs = PADDED.inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        got = run_case(swinkernels.window_attention_qkvpacked, inputs, PADDED.arguments())
        apart = run_case(separate, inputs, PADDED.arguments())
    assert got["out"].dtype == apart["out"].dtype == dtype
    assert all(got[f"d{name}"].dtype == torch.float32 for name in ("qkv", "bias_table", "pad_qkv"))
    rounded = {name: x.to(dtype) if name != "bias_table" else x for name, x in inputs.items()}
    with torch.autocast("cpu", dtype):  # rounds the matrix products of a backward in plain PyTorch
        by_hand = run_case(swinkernels.window_attention_qkvpacked, rounded, PADDED.arguments())
    for name in got:
        assert torch.equal(got[name], by_hand[name].to(got[name].dtype)), name


def test_gradient_dtypes_follow_their_tensors():
    inputs = {name: x.to(torch.bfloat16) for name, x in PADDED.inputs(torch.float32).items()}
    got = run_case(swinkernels.window_attention_qkvpacked, inputs, PADDED.arguments())
    assert {x.dtype for x in got.values()} == {torch.bfloat16}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_only_what_is_wanted_gets_a_gradient(backend):
    if _backends.unavailable(backend):
        pytest.skip(_backends.unavailable(backend))
    inputs = PADDED.inputs(torch.float32)
    full = run_case(swinkernels.window_attention_qkvpacked, inputs, {**PADDED.arguments(), "backend": backend})
    for wanted in ("qkv", "bias_table", "pad_qkv"):
        leaves = {k: v.clone().requires_grad_(k == wanted) for k, v in inputs.items() if k != "dout"}
        out = swinkernels.window_attention_qkvpacked(**leaves, **PADDED.arguments(), backend=backend)
        out.backward(inputs["dout"])
        assert torch.equal(leaves[wanted].grad, full[f"d{wanted}"])
        assert all(leaf.grad is None for name, leaf in leaves.items() if name != wanted)


@needs_cpu
@pytest.mark.parametrize("op", [swinkernels.window_attention_qkvpacked, separate])
def test_a_loss_that_hands_no_gradient_on(op):
    """The op's backward pass accepts an undefined gradient for its output."""
    leaves = {k: x.requires_grad_() for k, x in PADDED.inputs(torch.float32).items() if k != "dout"}
    NoGradient.apply(op(**leaves, **PADDED.arguments(), backend="cpu")).backward()
    assert all(leaf.grad is None for leaf in leaves.values())


@pytest.mark.parametrize(("dynamic", "backend"), in_turn([None, True], ["reference", "cpu"]))
def test_compile_fullgraph(backend, dynamic):
    if _backends.unavailable(backend):
        pytest.skip(_backends.unavailable(backend))
    torch._dynamo.reset()

    def op(qkv, bias_table, pad_qkv):
        return swinkernels.window_attention_qkvpacked(
            qkv, bias_table, pad_qkv=pad_qkv, **PADDED.arguments(), backend=backend
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (4, 7, 6):  # sizes that no other axis has, because dynamo gives equal sizes one symbol
        inputs = dataclasses.replace(PADDED, batch=batch).inputs(torch.float32)
        want, got = (run_case(f, inputs, {}) for f in (op, compiled))
        for name in want:
            torch.testing.assert_close(got[name], want[name], rtol=1e-6, atol=1e-6)
    # dynamic=None: one graph for the first batch size, a second for all others. dynamic=True: one graph for all, but
    # the float arguments restart the analysis once.
    assert counter.frame_count <= 2


def test_compiled_code_may_ask_for_the_tf32_switch():
    compiled = torch.compile(lambda x: x + (1 if _tf32_switch() else 2), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == (1 if _tf32_switch() else 2)


def test_compiled_code_may_ask_what_a_gpu_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    device = torch.device("cuda", 63)
    compiled = torch.compile(
        lambda x: x + (1 if _backends.gpu_reason("triton", device) else 2), fullgraph=True, backend="eager"
    )
    assert compiled(torch.zeros(1)).item() == 1
    assert "8.0 or newer, got 7.5" in str(_backends.gpu_reason("triton", device))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_deterministic_mode_is_accepted(backend):
    if _backends.unavailable(backend):
        pytest.skip(_backends.unavailable(backend))
    torch.use_deterministic_algorithms(True)
    try:  # the mode also fills uninitialised memory with NaN, which reveals unwritten elements
        check_window_attention(swinkernels.window_attention_qkvpacked, PADDED, torch.float32, backend=backend)
    finally:
        torch.use_deterministic_algorithms(False)


def test_nothing_is_modified():
    inputs = PADDED.inputs(torch.float32)
    before = {name: x.clone() for name, x in inputs.items()}
    run_case(swinkernels.window_attention_qkvpacked, inputs, PADDED.arguments())
    assert all(torch.equal(before[name], x) for name, x in inputs.items())


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (["8.0", "9.0+PTX"], (8, 0), True),
        (["8.0", "9.0+PTX"], (8, 9), True),  # machine code runs on later GPUs of its major version
        (["8.0", "9.0+PTX"], (12, 0), True),  # PTX runs on all later GPUs
        (["9.0+PTX"], (8, 0), False),
        (["9.0"], (10, 0), False),
        (["8.6"], (8, 0), False),
        (["9.0a"], (9, 0), True),
        (["9.0a+PTX"], (10, 0), False),
        (["Hopper"], (9, 0), True),
        ([], (9, 0), False),
    ],
)
def test_kernels_run_where_they_were_built_for(built, capability, runs):
    assert _backends.has_machine_code(built, capability) is runs


def test_a_gpu_that_the_kernels_were_not_built_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    monkeypatch.setattr(_backends._extension, "build", {"arch_list": ["8.0", "9.0"]})
    device = torch.device("cuda", 62)  # no other test uses this index, so nothing is cached for it
    expected = "built for 8.0 9.0, but the GPU is 12.0: build again with TORCH_CUDA_ARCH_LIST unset"
    assert expected in _backends.gpu_reason("cuda", device)
    assert _backends.gpu_reason("triton", device) is None


@needs_cpu
def test_transforms_are_right_or_refused():
    inputs = PLAIN.inputs(torch.float32)
    qkv, table = torch.stack([inputs["qkv"], -inputs["qkv"]]), inputs["bias_table"]

    def attend(qkv):
        return swinkernels.window_attention_qkvpacked(qkv, table, **PLAIN.arguments(), backend="cpu")

    assert torch.equal(torch.func.vmap(attend)(qkv), torch.stack([attend(x) for x in qkv]))
    leaf = qkv[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(attend(leaf).sum(), leaf)
    assert torch.equal(torch.func.grad(lambda x: attend(x).sum())(qkv[0]), expected)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(attend, (qkv[0],), (qkv[1],))
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(NotImplementedError, match="forward-mode"),
    ):
        attend(torch.autograd.forward_ad.make_dual(qkv[0], qkv[1]))


@needs_cpu
def test_without_gradients_the_result_is_the_same():
    inputs = PLAIN.inputs(torch.float32)
    qkv = inputs["qkv"].requires_grad_()
    out = swinkernels.window_attention_qkvpacked(qkv, inputs["bias_table"], **PLAIN.arguments(), backend="cpu")
    assert out.requires_grad
    with torch.no_grad():
        still = swinkernels.window_attention_qkvpacked(qkv, inputs["bias_table"], **PLAIN.arguments(), backend="cpu")
    assert not still.requires_grad
    assert torch.equal(still, out)
