"""Tests the Python cache of window attention calls: a cached call gives the same result as the first."""

from __future__ import annotations

import dataclasses
import gc
import importlib
import threading
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import swinkernels
from swinkernels.ops import _arguments, _backends, _library
from swinkernels.testing import WindowAttentionCase, op_arguments, run_case

module = importlib.import_module("swinkernels.ops.window_attention")
needs_cpu = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))
attend = swinkernels.window_attention_qkvpacked

FORM = "window_attention_qkvpacked"
PLAIN = WindowAttentionCase(2, (6, 9), 2, 8, 3, 1)
PADDED = WindowAttentionCase(2, (5, 9), 2, 8, (4, 3), (2, 1), has_pad_qkv=True, options={"pad_order": "roll_then_pad"})
CASES = [
    PLAIN,
    PADDED,
    dataclasses.replace(
        PADDED, has_logit_scale=True, options={**PADDED.options, "pad_before": (1, 0), "periodic": (True, False)}
    ),
    WindowAttentionCase(1, (4, 5, 6), 2, 8, (2, 3, 3), (1, 0, 1), has_pad_qkv=True),
    WindowAttentionCase(1, (4, 8), 2, 8, 4, 2, has_table=False, bias_types=0, options={"scale": 0.3}),
    WindowAttentionCase(2, (4, 8), 2, 8, 4, 2, has_table=False, bias_types=2, options={"mask_value": -7.5}),
    WindowAttentionCase(1, (8, 8), 2, 8, 4, 0, options={"grid": True}),
    WindowAttentionCase(1, (4, 8), 2, 8, 4, 2, options={"table_window": (5, 6)}),
    WindowAttentionCase(
        1, (3, 8), 2, 8, 4, 2, has_pad_qkv=True, options={"region_map": torch.arange(32).reshape(4, 8).short() % 3}
    ),
]


def test_a_known_call_is_not_checked_again(monkeypatch):
    qkv = PLAIN.inputs(torch.float32)["qkv"]
    first = attend(qkv, **PLAIN.arguments())

    def fail(*args, **kwargs):
        raise AssertionError("checked again")

    monkeypatch.setattr(_arguments, "make_window_spec", fail)
    assert torch.equal(attend(qkv.clone(), **PLAIN.arguments()), first)
    for changed in ({"qkv": qkv[:1]}, {"qkv": qkv.bfloat16()}, {"shift_size": 0}, {"bias_table": torch.zeros(25, 2)}):
        with pytest.raises(AssertionError, match="checked again"):
            attend(**{"qkv": qkv, **PLAIN.arguments(), **changed})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"window_size": 1}, {"window_size": True}),
        ({"window_size": (2, 3)}, {"window_size": (2, 3.0)}),
        ({"window_size": (1, 3)}, {"window_size": (True, 3)}),
        ({"shift_size": 0}, {"shift_size": False}),
        ({"shift_size": (1, 0)}, {"shift_size": (1.0, 0)}),
        ({"num_heads": 2}, {"num_heads": 2.0}),
        ({"num_heads": 1}, {"num_heads": True}),
        ({"pad_before": 0}, {"pad_before": 0.0}),
        ({"periodic": True}, {"periodic": 1}),
        ({"periodic": (True, False)}, {"periodic": (True, 0)}),
        ({"scale": 1.0}, {"scale": True}),
        ({"mask_value": 0.0}, {"mask_value": False}),
        ({"dropout_p": 0.0}, {"dropout_p": False}),
        ({"grid": False}, {"grid": 0}),
        ({"return_attention": False}, {"return_attention": 0}),
    ],
    ids=str,
)
def test_equal_is_not_the_same(right, wrong):
    """True, 1 and 1.0 are the same dictionary key, but an argument may accept only one of them."""
    given = {"qkv": torch.zeros(1, 2, 3, 12), "num_heads": 2, "window_size": (2, 3)}
    attend(**{**given, **right})
    assert next(iter(right.values())) == next(iter(wrong.values()))
    with pytest.raises(TypeError, match=next(iter(wrong))):
        attend(**{**given, **wrong})


def test_tensors_of_other_kinds_are_other_calls():
    qkv, table = torch.zeros(1, 2, 3, 12), torch.zeros(15, 2)
    given = {"num_heads": 2, "window_size": (2, 3)}
    attend(qkv, table, **given)
    for wrong, error in (
        (table.long(), TypeError),
        (table.to("meta"), ValueError),
        (table.to_sparse(), TypeError),
        (table.T, ValueError),
        (table.tolist(), TypeError),
    ):
        with pytest.raises(error, match="bias_table"):
            attend(qkv, wrong, **given)


def test_what_is_remembered_is_bounded():
    found = _library.Found(most=3)
    for i in range(10):
        found.put(i, -i)
    assert len(found) == 3
    assert [found.get(i) for i in (6, 7, 9)] == [None, -7, -9]
    _library._ALL_FOUND.remove(found)
    for height in range(1, 20):
        attend(torch.zeros(1, height, 2, 6), num_heads=1, window_size=2)
    assert len(module._PLANS) == 19
    assert module._PLANS._most <= 2048


def test_no_tensor_is_kept_alive():
    inputs = PADDED.inputs(torch.float32)
    attend(**{k: v for k, v in inputs.items() if k != "dout"}, **PADDED.arguments())
    kept = [weakref.ref(x) for x in inputs.values()]
    assert len(module._PLANS) > 0
    del inputs
    gc.collect()
    assert all(ref() is None for ref in kept)


def test_autocast_is_asked_at_every_call():
    qkv = PLAIN.inputs(torch.float32)["qkv"]
    for _ in range(2):
        assert attend(qkv, **PLAIN.arguments()).dtype == torch.float32
        for dtype in (torch.bfloat16, torch.float16):
            with torch.autocast("cpu", dtype):
                assert attend(qkv, **PLAIN.arguments()).dtype == dtype
        with torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else torch.no_grad():
            assert attend(qkv, **PLAIN.arguments()).dtype == torch.float32


@pytest.mark.parametrize("allowed", [False, True])
def test_the_tf32_switch_is_asked_at_every_call(allow_tf32, allowed):
    """Each call reads torch's TF32 switch.

    The switch affects only float32 on a GPU; the test therefore makes the cached plan of a CPU call read it.
    """
    seen = []
    qkv = PLAIN.inputs(torch.float32)["qkv"]
    attend(qkv, **PLAIN.arguments())
    ((key, plan),) = module._PLANS._values.items()

    class Op:
        @staticmethod
        def overload(*arguments):
            seen.append("allow_tf32=1" in arguments[-4])
            return qkv, None

    module._PLANS.put(key, plan._replace(op=Op(), asks_for_tf32=True))
    allow_tf32(allowed)
    attend(qkv, **PLAIN.arguments())
    allow_tf32(not allowed)
    attend(qkv, **PLAIN.arguments())
    assert seen == [allowed, not allowed]


def test_a_generator_or_a_symbolic_size_is_not_remembered():
    qkv = PLAIN.inputs(torch.float32)["qkv"]
    attend(qkv, **PLAIN.arguments(), dropout_p=0.5, generator=torch.Generator())
    torch.compiler.reset()
    run = torch.compile(lambda x: attend(x, **PLAIN.arguments()), fullgraph=True, dynamic=True, backend="eager")
    for batch in (2, 3, 4):
        x = torch.randn(batch, 6, 9, 48)
        got = run(x)
        assert len(module._PLANS) == 0
        assert got.shape == (batch, 6, 9, 16)


@needs_cpu
def test_backends_are_chosen_for_each_request():
    inputs = PLAIN.inputs(torch.float32)
    for _ in range(2):
        cpu, reference = (attend(inputs["qkv"], **PLAIN.arguments(), backend=b) for b in ("cpu", "reference"))
        assert not torch.equal(cpu, reference)  # the two backends differ in the last bits
        torch.testing.assert_close(cpu, reference, rtol=1e-4, atol=1e-5)
        with pytest.raises(NotImplementedError, match="backend='triton'"):
            attend(inputs["qkv"].double(), **PLAIN.arguments(), backend="triton")


def test_threads_share_what_is_known():
    inputs = [torch.randn(1, h, w, 12, generator=torch.Generator().manual_seed(h)) for h in (2, 4, 6) for w in (3, 6)]
    expected = [attend(x, num_heads=2, window_size=(2, 3), shift_size=(1, 1)) for x in inputs]
    errors = []

    def work(seed):
        try:
            for i in torch.randint(len(inputs), (60,), generator=torch.Generator().manual_seed(seed)).tolist():
                if i == 0:
                    _library.forget()
                got = attend(inputs[i], num_heads=2, window_size=(2, 3), shift_size=(1, 1))
                assert torch.equal(got, expected[i])
        except Exception as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


# --- the op that a call runs


@needs_cpu
@pytest.mark.parametrize("form", ["window_attention_qkvpacked", "window_attention"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("batch", [0, 2])
def test_a_call_is_its_op(case, form, batch):
    case = dataclasses.replace(case, batch=batch)
    inputs = case.inputs(torch.float32)

    def separate(qkv, bias_table=None, *, num_heads, **arguments):
        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
        return swinkernels.window_attention(q, k, v, bias_table, num_heads=num_heads, **arguments)

    op = attend if form == "window_attention_qkvpacked" else separate
    called = run_case(op, inputs, case.arguments())
    arguments = op_arguments(case, form, torch.float32)
    out, lse = getattr(torch.ops.swinkernels, f"{form}_fwd")(*arguments)
    assert torch.equal(out, called["out"])
    assert lse.dim() == 4
    *tensors, wire = arguments[:-3]
    out, lse = getattr(torch.ops.swinkernels, f"{form}_fwd")(*tensors, f"{wire};needs_lse=0", *arguments[-3:])
    assert torch.equal(out, called["out"])
    assert lse.shape == (0,)


@needs_cpu
@pytest.mark.parametrize("wanted", ["qkv", "bias_table", "logit_scale", "pad_qkv"])
def test_a_call_returns_the_gradient_that_is_wanted(wanted):
    case = dataclasses.replace(PADDED, has_logit_scale=True)
    inputs = case.inputs(torch.float32)
    full = run_case(attend, inputs, case.arguments())
    leaves = {k: v.clone().requires_grad_(k == wanted) for k, v in inputs.items() if k != "dout"}
    attend(**leaves, **case.arguments()).backward(inputs["dout"])
    assert torch.equal(leaves[wanted].grad, full[f"d{wanted}"])


@needs_cpu
def test_an_lse_is_computed_only_where_a_gradient_may_be_asked_for(monkeypatch):
    """The op is called with needs_lse=0 if gradients are disabled or no tensor requires one."""
    seen = []
    op = module._FORWARD["window_attention_qkvpacked", ""]

    def watch(name):
        way = getattr(op, name)

        def watched(*arguments):
            seen.append("needs_lse=0" not in str(arguments[-4:]))
            return way(*arguments)

        monkeypatch.setattr(op, name, watched)

    watch("apply")
    watch("overload")
    inputs = PLAIN.inputs(torch.float32)
    table = inputs["bias_table"].requires_grad_()
    attend(inputs["qkv"], table, **PLAIN.arguments())
    attend(inputs["qkv"], table.detach(), **PLAIN.arguments())
    with torch.no_grad():
        attend(inputs["qkv"], table, **PLAIN.arguments())
    assert seen == [True, False, False]


@needs_cpu
def test_modes_and_subclasses_see_the_op_itself():
    """A dispatch mode sees the registered forward and backward ops; the output has the tensor subclass of the input."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    inputs = PLAIN.inputs(torch.float32)
    expected = run_case(attend, inputs, PLAIN.arguments())
    with Watch():
        got = run_case(attend, inputs, PLAIN.arguments())
    ops = [name for name in seen if "window_attention" in name]
    assert ops == [f"swinkernels.window_attention_qkvpacked_{d}.default" for d in ("fwd", "bwd")]
    for name, value in expected.items():
        assert torch.equal(got[name], value), name

    class Mine(torch.Tensor):
        pass

    out = attend(inputs["qkv"].as_subclass(Mine), **PLAIN.arguments())
    assert type(out) is Mine


@needs_cpu
@pytest.mark.parametrize(
    ("wire", "message"),
    [
        ("window_size=4,4;color=3", "no window spec has color"),
        ("window_size", "a window spec is name=value"),
        ("window_size=4,4,x", "no window spec has window_size as in"),
    ],
)
def test_a_wrong_spec_is_refused_by_the_binding(wire, message):
    args = [x.detach() if x is not None else x for x in op_arguments(PLAIN, FORM, torch.float32)[:7]]
    op = torch.ops.swinkernels.window_attention_qkvpacked_fwd.default
    with pytest.raises(RuntimeError, match=message), torch._C._AutoDispatchBelowAutograd():
        op(*args, wire, 1.0, 0.0, 0.0)


@needs_cpu
def test_a_gradient_of_nothing_is_refused_by_the_binding():
    args = [x.detach() if isinstance(x, torch.Tensor) else x for x in op_arguments(PLAIN, FORM, torch.float32)]
    out, lse = torch.ops.swinkernels.window_attention_qkvpacked_fwd(*args)
    for wanted in (2, 4, 8):
        with pytest.raises(RuntimeError, match="tensor that was not given"):
            torch.ops.swinkernels.window_attention_qkvpacked_bwd(out, args[0], lse, *args[1:], wanted)
    with pytest.raises(RuntimeError, match="needs the lse"):
        torch.ops.swinkernels.window_attention_qkvpacked_bwd(out, args[0], lse[:0], *args[1:], 0)


# --- return_attention


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_weights(case, dtype):
    """Attention weights are probabilities and equal the reference's; returning them does not change the output."""
    inputs = {k: v.to(dtype) for k, v in case.inputs(torch.float32).items() if k != "dout"}
    out, weights = attend(**inputs, **case.arguments(), return_attention=True)
    eps = torch.finfo(dtype).eps
    definition = attend(**inputs, **case.arguments(), backend="reference")
    assert (out - definition).abs().max() <= 4 * eps * definition.abs().max()
    n, frame = 1, 1
    for s, w in zip(case.size, case.window_tuple, strict=True):
        n, frame = n * w, frame * (-(-s // w) * w)
    assert weights.shape == (case.batch, frame // n, case.num_heads, n, n)
    assert weights.dtype == out.dtype == dtype
    assert (weights.double().sum(-1) - 1).abs().max() < n * eps
    assert weights.min() >= 0
    expected = swinkernels.reference.window_attention_qkvpacked(**inputs, **case.arguments(), return_attention=True)
    assert (weights - expected[1]).abs().max() <= 4 * eps


def test_attention_weights_of_both_forms_and_their_gradients():
    inputs = PLAIN.inputs(torch.float64)
    inputs["bias_table"] = inputs["bias_table"].double()
    qkv, table = inputs["qkv"].requires_grad_(), inputs["bias_table"].requires_grad_()
    _, weights = attend(qkv, table, **PLAIN.arguments(), return_attention=True)
    q, k, v = qkv.unflatten(-1, (3, 2, 8)).unbind(-3)
    apart = swinkernels.window_attention(q, k, v, table, **PLAIN.arguments(), return_attention=True)
    assert torch.equal(weights, apart[1])
    # The gradient through the attention weights alone, compared with a finite difference along a random direction.
    direction, g = torch.randn_like(qkv), torch.randn_like(weights)
    dqkv, dtable = torch.autograd.grad((weights * g).sum(), (qkv, table))
    assert dtable.abs().max() > 0
    step = 1e-6
    with torch.no_grad():
        ends = [
            attend(qkv + sign * step * direction, table, **PLAIN.arguments(), return_attention=True)[1]
            for sign in (1, -1)
        ]
    slope = ((ends[0] - ends[1]) * g).sum() / (2 * step)
    torch.testing.assert_close((dqkv * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_attention_weights_are_after_dropout():
    qkv = torch.randn(2, 8, 8, 3 * 8)
    given = {"num_heads": 2, "window_size": 4, "return_attention": True}
    _, weights = attend(qkv, **given, dropout_p=0.5, generator=torch.Generator().manual_seed(1))
    _, full = attend(qkv, **given)
    assert 0.4 < (weights == 0).float().mean() < 0.6
    torch.testing.assert_close(weights[weights != 0], 2 * full[weights != 0])
    torch.manual_seed(3)
    first = attend(qkv, **given, dropout_p=0.5)[1]
    assert not torch.equal(first, attend(qkv, **given, dropout_p=0.5)[1])


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_fast_backends_have_no_attention_weights(backend):
    qkv = PLAIN.inputs(torch.float32)["qkv"]
    with pytest.raises(NotImplementedError, match=r"does not return the attention weights.*Use backend='auto'"):
        attend(qkv, **PLAIN.arguments(), return_attention=True, backend=backend)
    with pytest.raises(TypeError, match="return_attention must be a bool, got 1"):
        attend(qkv, **PLAIN.arguments(), return_attention=1)


def test_attention_weights_compile():
    torch.compiler.reset()
    inputs = PADDED.inputs(torch.float32)
    del inputs["dout"]
    run = torch.compile(
        lambda **x: attend(**x, **PADDED.arguments(), return_attention=True), fullgraph=True, backend="eager"
    )
    for got, expected in zip(run(**inputs), attend(**inputs, **PADDED.arguments(), return_attention=True), strict=True):
        torch.testing.assert_close(got, expected)


# --- the other ops

ops = swinkernels.ops
X, W = torch.zeros(2, 4, 6, 8), torch.ones(8)
WINDOWS = torch.zeros(16, 3, 8)
# For each op, the arguments of a valid call, and the function in _arguments that checks them.
OTHERS = {
    "layer_norm": ({"x": X, "weight": W}, "check_rows"),
    "residual_layer_norm": ({"x": X, "y": X, "weight": W, "bias": W}, "check_rows"),
    "residual_post_norm": ({"x": X, "y": X, "weight": W, "bias": W}, "check_rows"),
    "window_partition": ({"x": X, "window_size": (1, 3)}, "check_features"),
    "window_reverse": ({"windows": WINDOWS, "window_size": (1, 3), "size": (4, 6)}, "check_windows"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_ops_remember_and_tell_apart(name, monkeypatch):
    right, check = OTHERS[name]

    def call(**changed):
        return getattr(ops, name)(**{**right, **changed})

    first = call()
    call()
    wrong = [{"backend": 1}, {"backend": "none"}]
    if "norm" in name:
        wrong += [{"eps": True}, {"weight": torch.ones(7)}, {"weight": W.long()}, {"weight": W.tolist()}]
        call(eps=1)
    else:
        wrong += [{"window_size": (True, 3)}, {"window_size": (1.0, 3)}, {"shift_size": False}, {"pad_order": "roll"}]
        call(shift_size=0)
    if name == "layer_norm":
        wrong += [{"dtype": "float32"}, {"dtype": [torch.float32]}]
        assert call(dtype=torch.bfloat16).dtype == torch.bfloat16
        assert call(dtype=torch.float16).dtype == torch.float16
    if name == "window_reverse":
        wrong += [{"size": (4, 6.0)}, {"size": (3, 7)}, {"size": torch.zeros(2)}]
        call(size=torch.Size((4, 6)))
    for changed in wrong:
        with pytest.raises(
            (TypeError, ValueError), match=next(iter(changed)) if "size" not in changed else "S = |size"
        ):
            call(**changed)

    def fail(*args, **kwargs):
        raise AssertionError("checked again")

    monkeypatch.setattr(_arguments, check, fail)
    again = call()
    pairs = zip(first, again, strict=True) if isinstance(first, tuple) else [(first, again)]
    assert all(torch.equal(a, b) for a, b in pairs)


def test_a_scale_that_learns_is_another_call():
    _library.forget()
    scale = torch.ones(2)
    given = {"x": X, "y": X, "weight": W, "bias": W}
    ops.residual_layer_norm(**given, drop_path_scale=scale)
    ops.residual_layer_norm(**given, drop_path_scale=scale.clone().requires_grad_())
    residual = importlib.import_module("swinkernels.ops.residual_layer_norm")
    assert len(residual._KNOWN) == 2
