"""Tests that wrong arguments of partition, reverse, merging, expanding and norms raise the right error."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import swinkernels
from tests.ops.test_window_attention_arguments import check, huge, ids, junk

zeros, meta = torch.zeros, torch.zeros(1, device="meta")

# The arguments of a valid call of each op.
RIGHT = {
    "window_partition": {"x": zeros(2, 5, 6, 4), "window_size": (2, 3), "shift_size": (1, 0)},
    "window_reverse": {"windows": zeros(12, 6, 4), "window_size": (2, 3), "size": (5, 6), "shift_size": (1, 0)},
    "patch_merging": {
        "x": zeros(2, 5, 6, 4), "norm_weight": zeros(16), "norm_bias": zeros(16), "weight": zeros(7, 16)
    },
    "patch_expanding": {"x": zeros(2, 5, 6, 4), "weight": zeros(8, 4), "norm_weight": zeros(2), "norm_bias": zeros(2)},
    "layer_norm": {"x": zeros(2, 5, 6, 4), "weight": zeros(4), "bias": zeros(4)},
    "residual_layer_norm": {
        "x": zeros(2, 5, 6, 4), "y": zeros(2, 5, 6, 4), "weight": zeros(4), "bias": zeros(4),
        "drop_path_scale": zeros(2),
    },
    "residual_post_norm": {
        "x": zeros(2, 5, 6, 4), "y": zeros(2, 5, 6, 4), "weight": zeros(4), "bias": zeros(4),
        "drop_path_scale": zeros(2),
    },
}  # fmt: skip
SHAPES = {
    "window_partition": (12, 6, 4),
    "window_reverse": (2, 5, 6, 4),
    "patch_merging": (2, 3, 3, 7),
    "patch_expanding": (2, 10, 12, 2),
    "layer_norm": (2, 5, 6, 4),
    "residual_layer_norm": (2, 5, 6, 4),
    "residual_post_norm": (2, 5, 6, 4),
}
WINDOWS = ("window_partition", "window_reverse")
NORMS = ("layer_norm", "residual_layer_norm", "residual_post_norm")
STREAMS = NORMS[1:]
FEATURES = ("window_partition", "patch_merging", "patch_expanding")
every_op = pytest.mark.parametrize("op", list(RIGHT))


def call(op, **changes):
    return getattr(swinkernels, op)(**{**RIGHT[op], **changes})


def for_each(ops, *rows):
    return [(op, *row) for op in ops for row in rows]


@every_op
def test_the_right_calls_are_right(op):
    out = call(op)
    out = out[0] if isinstance(out, tuple) else out
    assert out.shape == SHAPES[op]


@pytest.mark.parametrize(
    ("op", "changes", "error", "got", "accepted"),
    [
        *for_each(
            WINDOWS,
            ({"window_size": 0}, ValueError, "(0, 0)", "at least 1"),
            ({"window_size": (2, -3)}, ValueError, "(2, -3)", "at least 1"),
            ({"window_size": (2, 3, 4)}, ValueError, "(2, 3, 4)", "2 axes"),
            ({"window_size": ()}, ValueError, "()", "2 axes"),
            ({"window_size": 2.0}, TypeError, "2.0", "int"),
            ({"window_size": True}, TypeError, "True", "int"),
            ({"window_size": None}, TypeError, "None", "int"),
            ({"shift_size": (2, 0)}, ValueError, "(2, 0)", "0..window_size - 1"),
            ({"shift_size": 3}, ValueError, "(3, 3)", "0..window_size - 1"),
            ({"shift_size": -1}, ValueError, "(-1, -1)", "0..window_size - 1"),
            ({"shift_size": (1,)}, ValueError, "(1,)", "2 axes"),
            ({"shift_size": 0.5}, TypeError, "0.5", "int"),
            ({"pad_order": "roll"}, ValueError, "'roll'", "roll_then_pad"),
            ({"pad_order": None}, TypeError, "None", "pad_then_roll"),
        ),
        *for_each(
            FEATURES,
            ({"x": zeros(5, 6, 4)}, ValueError, "(5, 6, 4)", "(B, *S, C)"),
            ({"x": zeros(1, 2, 3, 4, 5, 6)}, ValueError, "(1, 2, 3, 4, 5, 6)", "(D, H, W)"),
            ({"x": zeros(2, 0, 6, 4)}, ValueError, "(2, 0, 6, 4)", "at least one"),
            ({"x": zeros(2, 5, 6, 0)}, ValueError, "(2, 5, 6, 0)", "at least one"),
        ),
        *for_each(
            [op for op in RIGHT if op != "window_reverse"],
            ({"x": [[0.0]]}, TypeError, "list", "tensor"),
            ({"x": None}, TypeError, "NoneType", "tensor"),
            ({"x": zeros(2, 5, 6, 4).to_sparse()}, TypeError, "sparse", "strided"),
        ),
        *for_each(
            [op for op in RIGHT if op not in WINDOWS],
            ({"x": zeros(2, 5, 6, 4).int()}, TypeError, "torch.int32", "bfloat16"),
            ({"x": zeros(2, 5, 6, 4).to(torch.complex64)}, TypeError, "torch.complex64", "bfloat16"),
            ({"x": zeros(2, 5, 6, 4).to(torch.float8_e4m3fn)}, TypeError, "float8", "bfloat16"),
            ({"eps": -1e-5}, ValueError, "-1e-05", "at least 0"),
            ({"eps": math.nan}, ValueError, "nan", "finite"),
            ({"eps": math.inf}, ValueError, "inf", "finite"),
            ({"eps": "1e-5"}, TypeError, "'1e-5'", "number"),
            ({"eps": None}, TypeError, "None", "number"),
            ({"eps": True}, TypeError, "True", "number"),
            ({"eps": zeros(())}, TypeError, "tensor", "number"),
        ),
        *for_each(
            RIGHT,
            ({"backend": "gpu"}, ValueError, "'gpu'", "'triton'"),
            ({"backend": None}, ValueError, "None", "'reference'"),
        ),
        *for_each(
            ("window_reverse",),
            ({"windows": zeros(12, 5, 4)}, ValueError, "(12, 5, 4)", "(B * 6, 6, C)"),
            ({"windows": zeros(11, 6, 4)}, ValueError, "(11, 6, 4)", "(B * 6, 6, C)"),
            ({"windows": zeros(12, 6, 0)}, ValueError, "(12, 6, 0)", "(B * 6, 6, C)"),
            ({"windows": zeros(12, 2, 3, 4)}, ValueError, "(12, 2, 3, 4)", "(B * 6, 6, C)"),
            ({"windows": 1}, TypeError, "int", "tensor"),
            ({"windows": zeros(12, 6, 4).to_sparse()}, TypeError, "sparse", "strided"),
            ({"size": (5, 6, 7, 8)}, ValueError, "(5, 6, 7, 8)", "(D, H, W)"),
            ({"size": (5,)}, ValueError, "(5,)", "(H, W)"),
            ({"size": (5, 0)}, ValueError, "(5, 0)", "at least 1"),
            ({"size": 5}, TypeError, "5", "(H, W)"),
            ({"size": (5, 6.0)}, TypeError, "6.0", "(H, W)"),
            ({"size": zeros(2)}, TypeError, "tensor", "(H, W)"),
            ({"size": None}, TypeError, "None", "(H, W)"),
            # maps with more elements than int64 can count; the batch is empty, so the number of windows is valid
            ({"windows": zeros(0, 6, 4), "size": (2**40, 2**40)}, ValueError, str(2**40), "int64"),
        ),
        *for_each(
            ("window_partition",),
            ({"x": zeros(2, 3, 5, 6, 4)}, ValueError, "(2, 3)", "3 axes"),
            ({"window_size": 2**40}, ValueError, str(2**40), "int64"),
            ({"x": huge(2**42, 2**10, 2**10, 1), "window_size": 1023}, ValueError, str(2**42), "int64"),
        ),
        *for_each(
            ("patch_merging",),
            ({"norm_weight": zeros(7)}, ValueError, "(7,)", "(16,)"),
            ({"norm_bias": zeros(4, 4)}, ValueError, "(4, 4)", "(16,)"),
            ({"norm": "post"}, ValueError, "(16,)", "(7,)"),
            ({"norm_weight": zeros(16).int()}, TypeError, "torch.int32", "float32"),
            ({"norm_weight": 1.0}, TypeError, "float", "tensor"),
            ({"norm_bias": meta.expand(16)}, ValueError, "meta", "the same device"),
            ({"weight": zeros(7, 4)}, ValueError, "(7, 4)", "(out, 16)"),
            ({"weight": zeros(7, 32)}, ValueError, "(7, 32)", "(out, 16)"),
            ({"weight": zeros(16)}, ValueError, "(16,)", "(out, 16)"),
            ({"weight": zeros(0, 16)}, ValueError, "(0, 16)", "(out, 16)"),
            ({"weight": None}, TypeError, "NoneType", "tensor"),
            ({"weight": zeros(7, 16).long()}, TypeError, "torch.int64", "float32"),
            ({"weight": zeros(7, 16).to_sparse()}, TypeError, "sparse", "strided"),
            ({"weight": meta.expand(7, 16)}, ValueError, "meta", "the same device"),
            ({"x": zeros(2, 3, 5, 6, 5)}, ValueError, "(2, 3, 5, 6, 5)", "(out, 20) or (out, 40)"),
            ({"order": "timm"}, ValueError, "'timm'", "'row_major'"),
            ({"order": None}, TypeError, "None", "'unfold'"),
            ({"norm": "both"}, ValueError, "'both'", "'post'"),
            ({"norm": True}, TypeError, "True", "'pre'"),
        ),
        *for_each(
            ("patch_expanding",),
            ({"norm_weight": zeros(4)}, ValueError, "(4,)", "(2,)"),
            ({"norm_bias": zeros(1, 2)}, ValueError, "(1, 2)", "(2,)"),
            ({"norm_bias": zeros(2).bool()}, TypeError, "torch.bool", "float32"),
            ({"norm_weight": meta.expand(2)}, ValueError, "meta", "the same device"),
            ({"weight": zeros(8, 5)}, ValueError, "(8, 5)", "(out, 4)"),
            ({"weight": zeros(8)}, ValueError, "(8,)", "(out, 4)"),
            ({"weight": zeros(0, 4)}, ValueError, "(0, 4)", "(out, 4)"),
            ({"weight": "w"}, TypeError, "str", "tensor"),
            ({"weight": meta.expand(8, 4)}, ValueError, "meta", "the same device"),
            ({"weight": zeros(6, 4)}, ValueError, "got 6", "multiple of prod(factor) = 4"),
            ({"factor": 3}, ValueError, "(3, 3)", "multiple of prod(factor) = 9"),
            ({"weight": None, "x": zeros(2, 5, 6, 7)}, ValueError, "got 7", "multiple of prod(factor) = 4"),
            ({"factor": 0}, ValueError, "(0, 0)", "at least 1"),
            ({"factor": (2, -2)}, ValueError, "(2, -2)", "at least 1"),
            ({"factor": (1, 2, 2)}, ValueError, "(1, 2, 2)", "2 axes"),
            ({"factor": 2.0}, TypeError, "2.0", "int"),
            ({"factor": None}, TypeError, "None", "int"),
        ),
        *for_each(
            NORMS,
            ({"weight": zeros(5)}, ValueError, "(5,)", "(4,)"),
            ({"weight": zeros(2, 5, 6, 4)}, ValueError, "(2, 5, 6, 4)", "(4,)"),
            ({"bias": zeros(1)}, ValueError, "(1,)", "(4,)"),
            ({"weight": zeros(4).long()}, TypeError, "torch.int64", "float32"),
            ({"bias": zeros(4).to_sparse()}, TypeError, "sparse", "strided"),
            ({"bias": 0}, TypeError, "int", "tensor"),
            ({"weight": meta.expand(4)}, ValueError, "meta", "the same device"),
        ),
        *for_each(
            ("layer_norm",),
            ({"x": zeros(())}, ValueError, "()", "(..., C)"),
            ({"x": zeros(2, 0)}, ValueError, "(2, 0)", "at least one channel"),
            ({"dtype": torch.int32}, TypeError, "torch.int32", "bfloat16"),
            ({"dtype": "float16"}, TypeError, "'float16'", "bfloat16"),
            ({"dtype": torch.float8_e5m2}, TypeError, "float8", "bfloat16"),
        ),
        *for_each(
            STREAMS,
            ({"x": zeros(4)}, ValueError, "(4,)", "(B, ..., C)"),
            ({"x": zeros(2, 5, 6, 0)}, ValueError, "(2, 5, 6, 0)", "at least one channel"),
            ({"y": zeros(2, 5, 6, 5)}, ValueError, "(2, 5, 6, 5)", "the same shape"),
            ({"y": zeros(2, 30, 4)}, ValueError, "(2, 30, 4)", "the same shape"),
            ({"y": zeros(2, 5, 6, 4).int()}, TypeError, "torch.int32", "bfloat16"),
            ({"y": None}, TypeError, "NoneType", "tensor"),
            ({"y": meta.expand(2, 5, 6, 4)}, ValueError, "meta", "the same device"),
            ({"y": zeros(2, 5, 6, 4).to_sparse()}, TypeError, "sparse", "strided"),
            ({"drop_path_scale": zeros(3)}, ValueError, "(3,)", "(2,)"),
            ({"drop_path_scale": zeros(2, 1, 1, 1)}, ValueError, "(2, 1, 1, 1)", "(2,)"),
            ({"drop_path_scale": 0.5}, TypeError, "float", "tensor"),
            ({"drop_path_scale": zeros(2).bool()}, TypeError, "torch.bool", "float32"),
            ({"drop_path_scale": meta.expand(2)}, ValueError, "meta", "the same device"),
        ),
    ],
    ids=ids,
)
def test_wrong_argument(op, changes, error, got, accepted):
    message = check(lambda: call(op, **changes), error, got, accepted, list(changes)[-1])
    assert message.startswith(f"{op}: ")


@pytest.mark.parametrize("backend", ["cuda", "triton", "cpu"])
@every_op
def test_errors_come_before_any_work(op, backend):
    """A wrong argument is reported even if the backend could not run the call anyway."""
    changes = {"window_size": 0} if op in WINDOWS else {"eps": -1.0}
    check(lambda: call(op, **changes, backend=backend), ValueError, next(iter(changes)))


def test_what_is_right_is_not_refused():
    x = torch.arange(240.0).reshape(2, 5, 6, 4)
    expected = call("window_partition", x=x)
    for window, shift in (([2, 3], [1, 0]), (torch.Size((2, 3)), torch.Size((1, 0)))):
        assert torch.equal(call("window_partition", x=x, window_size=window, shift_size=shift), expected)
    for size in ([5, 6], torch.Size((5, 6)), x.shape[1:3]):
        assert torch.equal(call("window_reverse", windows=expected, size=size), x)
    assert call("layer_norm", eps=0).shape == call("layer_norm", eps=1).shape == x.shape
    assert swinkernels.layer_norm(zeros(4)).shape == (4,)
    for dtype in (torch.float64, torch.float16):  # parameters may have any floating dtype
        assert call("layer_norm", weight=zeros(4).to(dtype)).dtype == torch.float32
        assert call("patch_merging", weight=zeros(7, 16).to(dtype)).dtype == torch.float32


ARGUMENTS = [
    (op, name)
    for op, right in RIGHT.items()
    for name in (*right, "backend", *(("pad_order",) if op in WINDOWS else ("eps",)))
] + [("patch_merging", "order"), ("patch_merging", "norm"), ("patch_expanding", "factor"), ("layer_norm", "dtype")]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(argument=st.sampled_from(ARGUMENTS), value=junk, another=junk, data=st.data())
def test_malformed_arguments_raise_nothing_else(argument, value, another, data):
    op, name = argument
    second = data.draw(st.sampled_from([n for o, n in ARGUMENTS if o == op]))
    message = f"{op}: "
    try:
        call(op, **{second: another, name: value})
    except (ValueError, TypeError, NotImplementedError) as e:
        message = str(e)
    assert message.startswith(f"{op}: ")
