"""Tests that wrong arguments raise the right error, with a message naming op, argument, given and accepted values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swinkernels
from swinkernels.ops import _backends
from tests.support.side_by_side import draw

# A valid call: S = (5, 6), padded by one row to (6, 6), window (2, 3) of N = 6 tokens, 2 heads of 4 channels.
QKV = (2, 5, 6, 24)
RIGHT = {"num_heads": 2, "window_size": (2, 3), "backend": "reference"}


def packed(qkv=None, **changes):
    qkv = torch.zeros(QKV) if qkv is None else qkv
    return swinkernels.window_attention_qkvpacked(qkv, **{**RIGHT, **changes})


def separate(q=None, k=None, v=None, **changes):
    q, k, v = (torch.zeros(2, 5, 6, 2, 4) if x is None else x for x in (q, k, v))
    return swinkernels.window_attention(q, k, v, **{**RIGHT, **changes})


def huge(*shape):
    """Return a tensor of any shape that occupies four bytes of memory."""
    return torch.zeros((1,) * len(shape)).expand(shape)


zeros, meta = torch.zeros, torch.zeros(1, device="meta")
TABLES = (zeros(3, 4), zeros(5, 4))  # valid axis_tables
ids = lambda v: "-".join(v) if isinstance(v, dict) else None  # noqa: E731


def check(call, error, *words):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    return message


@pytest.mark.parametrize("op", [packed, separate], ids=["window_attention_qkvpacked", "window_attention"])
@pytest.mark.parametrize(
    ("changes", "error", "got", "accepted"),
    [
        # geometry
        ({"window_size": 0}, ValueError, "(0, 0)", "at least 1"),
        ({"window_size": (2, -3)}, ValueError, "(2, -3)", "at least 1"),
        ({"window_size": (2, 3, 4)}, ValueError, "(2, 3, 4)", "2 axes"),
        ({"window_size": ()}, ValueError, "()", "2 axes"),
        ({"window_size": 2.0}, TypeError, "2.0", "int"),
        ({"window_size": "23"}, TypeError, "'23'", "int"),
        ({"window_size": True}, TypeError, "True", "int"),
        ({"window_size": None}, TypeError, "None", "int"),
        ({"window_size": (33, 32)}, ValueError, "1056", "1024"),
        ({"window_size": 2**70}, ValueError, str(2**70), "1024"),
        ({"shift_size": (2, 0)}, ValueError, "(2, 0)", "0..window_size - 1"),
        ({"shift_size": 3}, ValueError, "(3, 3)", "0..window_size - 1"),
        ({"shift_size": -1}, ValueError, "(-1, -1)", "0..window_size - 1"),
        ({"shift_size": (1,)}, ValueError, "(1,)", "2 axes"),
        ({"shift_size": 0.5}, TypeError, "0.5", "int"),
        ({"pad_order": "roll"}, ValueError, "'roll'", "roll_then_pad"),
        ({"pad_order": 1}, TypeError, "1", "pad_then_roll"),
        ({"pad_before": (2, 0)}, ValueError, "(2, 0)", "(1, 0)"),
        ({"pad_before": -1}, ValueError, "(-1, -1)", "0..padding"),
        ({"pad_before": (0, 0, 0)}, ValueError, "(0, 0, 0)", "2 axes"),
        ({"pad_before": 0.0}, TypeError, "0.0", "int"),
        ({"periodic": 1}, TypeError, "1", "bool"),
        ({"periodic": (True, 0)}, TypeError, "(True, 0)", "bool"),
        ({"periodic": (True,)}, ValueError, "(True,)", "2 axes"),
        ({"grid": 1}, TypeError, "1", "bool"),
        ({"shift_size": (1, 0), "grid": True}, ValueError, "(1, 0)", "must be 0"),
        # heads
        ({"num_heads": 0}, ValueError, "0", "at least 1"),
        ({"num_heads": -2}, ValueError, "-2", "at least 1"),
        ({"num_heads": 2.0}, TypeError, "2.0", "int"),
        ({"num_heads": True}, TypeError, "True", "int"),
        # numbers
        ({"scale": math.nan}, ValueError, "nan", "finite"),
        ({"scale": math.inf}, ValueError, "inf", "finite"),
        ({"scale": "1"}, TypeError, "'1'", "number"),
        ({"scale": 1j}, TypeError, "1j", "number"),
        ({"scale": zeros(1)}, TypeError, "tensor", "number"),
        ({"mask_value": math.nan}, ValueError, "nan", "finite"),
        ({"mask_value": math.inf}, ValueError, "inf", "finite float32 number or -inf"),
        ({"mask_value": -1e39}, ValueError, "-1e+39", "finite float32"),
        ({"mask_value": 10**400}, ValueError, "1000", "finite"),
        ({"mask_value": None}, TypeError, "None", "number"),
        ({"dropout_p": 1.5}, ValueError, "1.5", "0..1"),
        ({"dropout_p": -0.1}, ValueError, "-0.1", "0..1"),
        ({"dropout_p": math.nan}, ValueError, "nan", "finite"),
        ({"dropout_p": True}, TypeError, "True", "number"),
        ({"generator": 42}, TypeError, "int", "torch.Generator"),
        # tensors
        ({"bias_table": zeros(14, 2)}, ValueError, "(14, 2)", "(15, 2)"),
        ({"bias_table": zeros(15, 3)}, ValueError, "(15, 3)", "(15, 2)"),
        ({"bias_table": zeros(2, 15)}, ValueError, "(2, 15)", "(15, 2)"),
        ({"bias_table": zeros(15)}, ValueError, "(15,)", "(15, 2)"),
        ({"bias_table": zeros(15, 2).long()}, TypeError, "torch.int64", "float32"),
        ({"bias_table": zeros(15, 2).to(torch.complex64)}, TypeError, "torch.complex64", "float32"),
        ({"bias_table": zeros(15, 2).to_sparse()}, TypeError, "torch.sparse_coo", "strided"),
        ({"bias_table": [[0.0] * 2] * 15}, TypeError, "list", "tensor"),
        ({"bias_table": meta.expand(15, 2)}, ValueError, "meta", "the same device"),
        ({"table_window": (3, 3)}, ValueError, "(3, 3)", "bias_table"),
        ({"table_window": (3, 3), "bias_table": zeros(15, 2)}, ValueError, "(15, 2)", "(25, 2)"),
        ({"table_window": (1, 3), "bias_table": zeros(5, 2)}, ValueError, "(1, 3)", "6 tokens"),
        ({"table_window": (0, 9), "bias_table": zeros(15, 2)}, ValueError, "(0, 9)", "at least 1"),
        ({"table_window": (2,), "bias_table": zeros(15, 2)}, ValueError, "(2,)", "2 axes"),
        ({"table_window": 2.5, "bias_table": zeros(15, 2)}, TypeError, "2.5", "int"),
        ({"bias": zeros(2, 6, 5)}, ValueError, "(2, 6, 5)", "(2, 6, 6)"),
        ({"bias": zeros(1, 6, 6)}, ValueError, "(1, 6, 6)", "(2, 6, 6)"),
        ({"bias": zeros(6, 6)}, ValueError, "(6, 6)", "(2, 6, 6)"),
        ({"bias": zeros(4, 2, 6, 6)}, ValueError, "(4, 2, 6, 6)", "6 windows"),
        ({"bias": zeros(0, 2, 6, 6)}, ValueError, "(0, 2, 6, 6)", "6 windows"),
        ({"bias": zeros(2, 6, 6).bool()}, TypeError, "torch.bool", "float32"),
        ({"bias": meta.expand(2, 6, 6)}, ValueError, "meta", "the same device"),
        ({"bias": zeros(2, 6, 6), "bias_table": zeros(15, 2)}, ValueError, "both", "bias_table"),
        ({"logit_scale": zeros(3)}, ValueError, "(3,)", "(2)"),
        ({"logit_scale": 1.0}, TypeError, "float", "tensor"),
        ({"logit_scale": zeros(2).int()}, TypeError, "torch.int32", "float32"),
        ({"logit_scale": meta.expand(2)}, ValueError, "meta", "the same device"),
        ({"scale": 0.5, "logit_scale": zeros(2)}, ValueError, "0.5", "None"),
        ({"pad_qkv": zeros(8)}, ValueError, "(8,)", "(24,)"),
        ({"pad_qkv": zeros(3, 4, 2)}, ValueError, "(3, 4, 2)", "(3, 2, 4)"),
        ({"pad_qkv": zeros(24).int()}, TypeError, "torch.int32", "float32"),
        ({"pad_qkv": 0}, TypeError, "int", "tensor"),
        ({"pad_qkv": meta.expand(24)}, ValueError, "meta", "the same device"),
        ({"region_map": zeros(5, 6).int()}, ValueError, "(5, 6)", "(6, 6)"),
        ({"region_map": zeros(6, 6)}, TypeError, "torch.float32", "int32, int16, int8 or uint8"),
        ({"region_map": zeros(6, 6).bool()}, TypeError, "torch.bool", "int32, int16, int8 or uint8"),
        ({"region_map": zeros(6, 6).long()}, TypeError, "torch.int64", "int32"),  # values would be truncated to 32 bits
        ({"region_map": meta.expand(6, 6).int()}, ValueError, "meta", "the same device"),
        ({"periodic": (False, True), "region_map": zeros(6, 6).int()}, ValueError, "(False, True)", "must be False"),
        ({"bias_table": zeros(15, 4, 2)}, ValueError, "(15, 4, 2)", "6 windows"),
        ({"bias_table": zeros(15, 0, 2)}, ValueError, "(15, 0, 2)", "6 windows"),
        ({"table_pairs": True}, ValueError, "True", "bias_table"),
        ({"table_pairs": 1, "bias_table": zeros(36, 2)}, TypeError, "1", "bool"),
        ({"table_pairs": (True,), "bias_table": zeros(36, 2)}, ValueError, "(True,)", "2 axes"),
        ({"table_pairs": True, "bias_table": zeros(36, 2), "table_window": (3, 3)}, ValueError, "True", "window_size"),
        ({"bias_table": zeros(15, 2), "table_pairs": (True, False)}, ValueError, "(15, 2)", "(20, 2)"),
        ({"key_window": (4, 5), "table_pairs": True, "bias_table": zeros(36, 2)}, ValueError, "table_pairs", "(2, 3)"),
        ({"axis_tables": zeros(8, 4)}, TypeError, "Tensor", "tuple of one tensor"),
        ({"axis_tables": (zeros(3, 4),)}, ValueError, "got 1", "each of the 2 axes"),
        ({"axis_tables": (zeros(5, 4), zeros(3, 4))}, ValueError, "(5, 4) and (3, 4)", "(3, 4) and (5, 4)"),
        ({"axis_tables": (zeros(3, 4), zeros(5, 8))}, ValueError, "(5, 8)", "head_dim"),
        ({"axis_tables": (zeros(3, 4), zeros(5, 4).int())}, TypeError, "torch.int32", "float32"),
        ({"axis_tables": (zeros(3, 4), zeros(5, 4).half())}, TypeError, "torch.float16", "the same dtype"),
        ({"axis_tables": (zeros(3, 4), meta.expand(5, 4))}, ValueError, "meta", "the same device"),
        ({"axis_tables": (zeros(3, 4), None)}, TypeError, "NoneType", "tensor"),
        ({"axis_tables": TABLES, "logit_scale": zeros(2)}, ValueError, "logit_scale", "must be None"),
        ({"key_window": (4, 4)}, ValueError, "(4, 4)", "an even number"),
        ({"key_window": (2, 1)}, ValueError, "(2, 1)", "an even number"),
        ({"key_window": (34, 33)}, ValueError, "1122", "1024"),
        ({"key_window": 4.0}, TypeError, "4.0", "int"),
        ({"key_window": (4,)}, ValueError, "(4,)", "2 axes"),
        ({"key_window": (4, 5), "shift_size": 1}, ValueError, "shift_size", "window_size, (2, 3)"),
        ({"key_window": (4, 5), "grid": True}, ValueError, "grid", "window_size, (2, 3)"),
        ({"key_window": (4, 5), "periodic": True}, ValueError, "periodic", "window_size, (2, 3)"),
        ({"key_window": (4, 5), "region_map": zeros(6, 6).int()}, ValueError, "region_map", "window_size, (2, 3)"),
        ({"key_window": (4, 5), "axis_tables": TABLES}, ValueError, "axis_tables", "window_size, (2, 3)"),
        ({"key_window": (4, 5), "bias_table": zeros(15, 2)}, ValueError, "(15, 2)", "(35, 2)"),
        ({"key_window": (4, 5), "bias": zeros(2, 6, 6)}, ValueError, "(2, 6, 6)", "(2, 6, 20)"),
        # backends
        ({"backend": "gpu"}, ValueError, "'gpu'", "'triton'"),
        ({"backend": None}, ValueError, "None", "'reference'"),
    ],
    ids=ids,
)
def test_wrong_argument(op, changes, error, got, accepted):
    name = "window_attention_qkvpacked" if op is packed else "window_attention"
    message = check(lambda: op(**changes), error, got, accepted, next(iter(changes)))
    assert message.startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("qkv", "changes", "error", "words"),
    [
        (zeros(5, 6, 24), {}, ValueError, ["(5, 6, 24)", "(B, *S, 3C)"]),
        (zeros(24), {}, ValueError, ["(24,)", "(B, *S, 3C)"]),
        (zeros(1, 1, 1, 1, 1, 3, 2, 4), {}, ValueError, ["(1, 1, 1, 1, 1, 3, 2, 4)", "(D, H, W)"]),
        (zeros(2, 5, 6, 25), {}, ValueError, ["25", "multiple of 6"]),
        (zeros(2, 5, 6, 0), {}, ValueError, ["0", "multiple of 6"]),
        (zeros(2, 5, 6, 24), {"num_heads": 3}, ValueError, ["24", "multiple of 9", "num_heads=3"]),
        (zeros(2, 5, 6, 3, 4, 2), {}, ValueError, ["(2, 5, 6, 3, 4, 2)", "num_heads=2"]),
        (zeros(2, 5, 6, 2, 2, 4), {}, ValueError, ["(2, 5, 6, 2, 2, 4)", "(3, num_heads, head_dim)"]),
        (zeros(2, 5, 6, 3, 2, 0), {}, ValueError, ["head_dim", "0", "1..128"]),
        (zeros(1, 2, 3, 3 * 2 * 129), {}, ValueError, ["head_dim", "129", "1..128"]),
        (zeros(2, 0, 6, 24), {}, ValueError, ["S = (0, 6)", "at least one token"]),
        (zeros(QKV).int(), {}, TypeError, ["torch.int32", "bfloat16"]),
        (zeros(QKV).to(torch.complex64), {}, TypeError, ["torch.complex64", "bfloat16"]),
        (zeros(QKV).to(torch.float8_e4m3fn), {}, TypeError, ["float8", "bfloat16"]),
        (zeros(QKV).to_sparse(), {}, TypeError, ["sparse", "strided"]),
        ([[0.0]], {}, TypeError, ["list", "tensor"]),
        # sizes whose product overflows: an int64 cannot count the scores of all windows
        (huge(2**32, 2**11, 2**11, 6), {"window_size": 32}, ValueError, [str(2**32), "int64", "qkv"]),
        (huge(2**40, 2**19, 1, 6), {"window_size": 32}, ValueError, [str(2**40), "int64", "qkv"]),
        (meta.expand(2**40, 2**19, 1, 6), {"window_size": 32}, ValueError, [str(2**40), "int64", "qkv"]),
    ],
)
def test_wrong_map(qkv, changes, error, words):
    message = check(lambda: packed(qkv, **changes), error, *words)
    assert message.startswith("window_attention_qkvpacked: ")


@pytest.mark.parametrize(
    ("maps", "error", "words"),
    [
        ({"q": zeros(2, 5, 6, 8)}, ValueError, ["q", "(2, 5, 6, 8)", "(B, *S, num_heads, head_dim)"]),
        ({"k": zeros(2, 5, 6, 2, 5)}, ValueError, ["k", "(2, 5, 6, 2, 5)", "the same shape"]),
        ({"v": zeros(2, 5, 7, 2, 4)}, ValueError, ["v", "(2, 5, 7, 2, 4)", "the same shape"]),
        ({"v": zeros(1, 2, 5, 6, 2, 4)}, ValueError, ["v", "(1, 2, 5, 6, 2, 4)", "the same shape"]),
        ({"k": zeros(2, 5, 6, 2, 4).double()}, TypeError, ["k", "torch.float64", "the same dtype"]),
        ({"k": zeros(2, 5, 6, 2, 4).half()}, TypeError, ["k", "torch.float16", "the same dtype"]),
        ({"v": zeros(2, 5, 6, 2, 4).long()}, TypeError, ["v", "torch.int64", "bfloat16"]),
        ({"v": meta.expand(2, 5, 6, 2, 4)}, ValueError, ["v", "meta", "the same device"]),
        ({"q": meta.expand(2, 5, 6, 2, 4)}, ValueError, ["k", "meta", "the same device"]),
        ({"k": "k"}, TypeError, ["k", "str", "tensor"]),
        ({n: zeros(2, 5, 6, 3, 4) for n in "qkv"}, ValueError, ["num_heads", "3", "got 2"]),
        ({n: zeros(2, 5, 0, 2, 4) for n in "qkv"}, ValueError, ["S = (5, 0)", "at least one token"]),
        ({n: huge(2**32, 2**11, 2**11, 2, 1) for n in "qkv"}, ValueError, [str(2**32), "int64"]),
    ],
)
def test_wrong_separate_maps(maps, error, words):
    window = {"window_size": 32} if maps.get("q", meta).shape[0] == 2**32 else {}
    message = check(lambda: separate(**maps, **window), error, *words)
    assert message.startswith("window_attention: ")


def test_zero_heads_are_refused():
    """num_heads=0 is refused, although it matches the shape of maps without heads."""
    q = zeros(2, 5, 6, 0, 4)
    check(lambda: separate(q, q, q, num_heads=0), ValueError, "num_heads", "at least 1", "got 0")


def test_generator_of_another_device():
    class CudaGenerator(torch.Generator):  # a real CUDA generator needs a GPU
        device = torch.device("cuda")

    check(lambda: packed(dropout_p=0.5, generator=CudaGenerator()), ValueError, "generator", "cuda", "cpu")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
def test_backend_that_cannot_run(backend):
    """Kernel backends refuse float64 with a reason, on any machine: only plain PyTorch supports it."""
    message = check(
        lambda: packed(zeros(QKV).double(), backend=backend),
        NotImplementedError,
        f"backend='{backend}'",
        "auto",
        "float64",
    )
    assert message.startswith("window_attention_qkvpacked: ")
    missing = _backends.NOT_INSTALLED[backend]
    assert missing is None or missing in message


def test_errors_come_before_any_work():
    """A wrong argument is reported even if the backend could not run the call anyway."""
    check(lambda: packed(window_size=0, backend="cuda"), ValueError, "window_size")


# --- valid arguments are accepted


def test_lists_and_sizes_are_sequences():
    expected = packed(draw(*QKV), shift_size=(1, 2))
    for window, shift in (([2, 3], [1, 2]), (torch.Size((2, 3)), torch.Size((1, 2)))):
        assert torch.equal(packed(draw(*QKV), window_size=window, shift_size=shift), expected)


@pytest.mark.parametrize("shape", [(2,), (2, 1, 1), (1, 2, 1)])
def test_shapes_of_logit_scale(shape):
    expected = packed(draw(*QKV), logit_scale=torch.tensor([1.0, 2.0]))
    assert torch.equal(packed(draw(*QKV), logit_scale=torch.tensor([1.0, 2.0]).reshape(shape)), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16])
def test_dtypes_of_region_map(dtype):
    regions = torch.arange(36, dtype=torch.int32).reshape(6, 6) % 3
    assert torch.equal(packed(draw(*QKV), region_map=regions.to(dtype)), packed(draw(*QKV), region_map=regions))


def test_shapes_of_pad_qkv():
    pad = draw(24, seed=3)
    assert torch.equal(packed(draw(*QKV), pad_qkv=pad), packed(draw(*QKV), pad_qkv=pad.reshape(3, 2, 4)))


# --- properties

junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 40),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=5),
    st.binary(max_size=3),
    st.lists(st.integers(-2, 9), max_size=4),
    st.tuples(st.integers(-2, 9), st.integers(-2, 9)),
    st.tuples(st.booleans(), st.booleans()),
    st.lists(st.one_of(st.none(), st.floats(), st.text(max_size=2)), max_size=3),
    st.dictionaries(st.integers(), st.integers(), max_size=2),
    st.builds(object),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Generator(), len, int, math]),
    st.builds(
        lambda shape, dtype, device: torch.zeros(shape, dtype=dtype, device=device),
        st.lists(st.integers(0, 7), max_size=7),
        st.sampled_from([torch.float32, torch.float64, torch.int64, torch.bool, torch.complex64, torch.bfloat16]),
        st.sampled_from(["cpu", "cpu", "meta"]),
    ),
)
ARGUMENTS = [
    "num_heads", "window_size", "shift_size", "scale", "bias", "bias_table", "table_window", "logit_scale", "pad_qkv",
    "pad_order", "pad_before", "periodic", "region_map", "mask_value", "dropout_p", "generator", "grid", "axis_tables",
    "key_window", "table_pairs", "backend",
]  # fmt: skip


@settings(max_examples=400, deadline=None, derandomize=True)
@given(changes=st.dictionaries(st.sampled_from(ARGUMENTS), junk, min_size=1, max_size=3), is_packed=st.booleans())
def test_malformed_arguments_raise_nothing_else(changes, is_packed):
    op = packed if is_packed else separate
    message = None
    try:
        out = op(**changes)
    except (ValueError, TypeError, NotImplementedError) as e:
        message = str(e)
    if message is None:
        assert out.shape == (2, 5, 6, 8)
    else:
        assert message.startswith("window_attention_qkvpacked: " if is_packed else "window_attention: ")


@settings(max_examples=150, deadline=None, derandomize=True)
@given(maps=st.lists(junk, min_size=3, max_size=3))
def test_malformed_maps_raise_nothing_else(maps):
    for name, call in (
        ("window_attention_qkvpacked", lambda: packed(maps[0] if maps[0] is not None else ())),
        ("window_attention", lambda: separate(*(m if m is not None else () for m in maps))),
    ):
        message = f"{name}: "
        try:
            call()
        except (ValueError, TypeError, NotImplementedError) as e:
            message = str(e)
        assert message.startswith(f"{name}: ")


FULL = {
    "bias_table": draw(15, 2, seed=2),
    "pad_qkv": draw(24, seed=3),
    "logit_scale": draw(2, seed=4),
    "shift_size": (1, 2),
}


def leaves_of(qkv):
    return {
        "qkv": qkv.requires_grad_(),
        **{n: v.clone().requires_grad_() for n, v in FULL.items() if n != "shift_size"},
    }


def test_empty_batch_with_gradients():
    leaves = leaves_of(draw(0, 5, 6, 24))
    out = packed(**leaves, shift_size=(1, 2))
    assert out.shape == (0, 5, 6, 8)
    for name, grad in zip(leaves, torch.autograd.grad(out.sum(), list(leaves.values())), strict=True):
        assert torch.equal(grad, torch.zeros_like(leaves[name]))


@pytest.mark.parametrize("is_packed", [True, False])
def test_non_contiguous_inputs(is_packed):
    """Outputs and gradients of strided tensors with offsets are bit-identical to those of contiguous copies."""

    def spread(x):
        wide = torch.full([2 * n for n in x.shape], math.nan if x.is_floating_point() else -1, dtype=x.dtype)
        view = wide[(slice(1, None, 2),) * x.dim()]
        view.copy_(x)
        assert not view.is_contiguous()
        return view

    results = []
    for layout in (torch.Tensor.contiguous, spread):
        leaves = {n: layout(v.detach()).requires_grad_() for n, v in leaves_of(draw(*QKV)).items()}
        regions = layout(torch.arange(36, dtype=torch.int32).reshape(6, 6) % 4)
        arguments = {n: v for n, v in leaves.items() if n != "qkv"} | {"shift_size": (1, 2), "region_map": regions}
        if is_packed:
            out = packed(leaves["qkv"], **arguments)
        else:
            out = separate(*leaves["qkv"].unflatten(-1, (3, 2, 4)).unbind(-3), **arguments)
        results.append([out, *torch.autograd.grad(out, list(leaves.values()), draw(*out.shape, seed=9))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_inputs_are_never_modified():
    leaves = leaves_of(draw(*QKV))
    regions, dout = torch.arange(36, dtype=torch.int32).reshape(6, 6) % 4, draw(2, 5, 6, 8, seed=9)
    everything = [*leaves.values(), regions, dout]
    before, versions = [x.detach().clone() for x in everything], [x._version for x in everything]
    out = packed(**leaves, shift_size=(1, 2), region_map=regions, dropout_p=0.5)
    torch.autograd.grad(out, list(leaves.values()), dout)
    assert all(torch.equal(x, y) for x, y in zip(everything, before, strict=True))
    assert [x._version for x in everything] == versions


def test_compiles_with_dynamic_shapes():
    """The argument checks can be traced with symbolic sizes and floats, and one graph serves several sizes."""
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def run(qkv, table, scale):
        return packed(
            qkv, bias_table=table, shift_size=(1, 2), scale=scale, mask_value=-50.0, pad_order="roll_then_pad"
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=count)
    table = draw(15, 2, seed=2)
    for size in ((5, 7), (7, 5), (9, 11)):
        qkv = draw(2, *size, 24)
        torch.testing.assert_close(compiled(qkv, table, 0.3), run(qkv, table, 0.3))
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="bias_table"):
        run(qkv, table[:14], 0.3)
