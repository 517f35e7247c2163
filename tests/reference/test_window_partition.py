"""Tests reference window partition and reverse: round trip, token order, published modules and both pad orders."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from swinkernels import reference
from tests.support.side_by_side import assert_same, draw


def geometry(data):
    rank = data.draw(st.sampled_from([2, 3]))
    size = data.draw(st.tuples(*[st.integers(1, 9 if rank == 2 else 5)] * rank))
    window = data.draw(st.tuples(*[st.integers(1, 5)] * rank))
    frame = [math.ceil(s / w) * w for s, w in zip(size, window, strict=True)]
    shift = tuple(data.draw(st.integers(0, p - 1)) for p in frame)
    return size, window, shift, data.draw(st.sampled_from(["pad_then_roll", "roll_then_pad"]))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_reverse_undoes_partition_bit_for_bit(data):
    size, window, shift, pad_order = geometry(data)
    dtype = data.draw(st.sampled_from([torch.float64, torch.bfloat16, torch.int64]))
    x = (100 * draw(2, *size, 3)).to(dtype)
    windows = reference.window_partition(x, window, shift, pad_order=pad_order)
    num_windows = math.prod(math.ceil(s / w) for s, w in zip(size, window, strict=True))
    assert windows.shape == (2 * num_windows, math.prod(window), 3)
    assert windows.dtype == dtype
    back = reference.window_reverse(windows, window, size, shift, pad_order=pad_order)
    assert back.dtype == dtype
    assert torch.equal(back, x)
    # Every token occurs once, and all other elements are zero.
    assert (windows.double().square().sum() - x.double().square().sum()).abs() < 1e-6


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_roll_pad_and_view(data):
    size, window, shift, pad_order = geometry(data)
    axes = tuple(range(1, 1 + len(size)))
    x = draw(2, *size, 3)
    pads = [n for s, w in zip(reversed(size), reversed(window), strict=True) for n in (0, -s % w)]

    def literal():
        y = x
        if pad_order == "roll_then_pad":
            y = torch.roll(y, [-s for s in shift], axes)
        y = F.pad(y, (0, 0, *pads))
        if pad_order == "pad_then_roll":
            y = torch.roll(y, [-s for s in shift], axes)
        for axis, w in enumerate(window):
            y = y.unflatten(1 + 2 * axis, (-1, w))
        rank = len(size)
        y = y.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
        return y.reshape(-1, math.prod(window), 3)

    assert_same(lambda: reference.window_partition(x, window, shift, pad_order=pad_order), literal, [x])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_the_two_are_adjoint(data):
    """Each op's gradient is the other op: <partition(x), y> = <x, reverse(y)>."""
    size, window, shift, pad_order = geometry(data)
    x = draw(2, *size, 3).requires_grad_()
    windows = reference.window_partition(x, window, shift, pad_order=pad_order)
    y = draw(*windows.shape, seed=3).requires_grad_()
    back = reference.window_reverse(y, window, size, shift, pad_order=pad_order)
    dout = draw(*back.shape, seed=4)
    assert torch.equal(torch.autograd.grad(windows, x, y)[0], back)
    expected = reference.window_partition(dout, window, shift, pad_order=pad_order)
    assert torch.equal(torch.autograd.grad(back, y, dout)[0], expected)


@pytest.mark.parametrize(("size", "window"), [((8, 12), (4, 3)), ((5, 5), (5, 5))])
def test_timm(size, window):
    swin = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    x = draw(2, *size, 3)
    expected = swin.window_partition(x, window)
    assert torch.equal(reference.window_partition(x, window), expected.flatten(1, 2))
    assert torch.equal(reference.window_reverse(expected.flatten(1, 2), window, size), x)


@pytest.mark.parametrize(("size", "window"), [((8, 12), (4, 3)), ((4, 6, 4), (2, 3, 4))])
def test_monai(size, window):
    unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="monai is not installed")
    x = draw(2, *size, 3)
    assert torch.equal(reference.window_partition(x, window), unetr.window_partition(x, window))
    windows = reference.window_partition(x, window)
    assert torch.equal(
        reference.window_reverse(windows, window, size), unetr.window_reverse(windows, window, (2, *size))
    )


def test_shift_by_a_window_permutes_the_windows():
    x = draw(1, 6, 8, 3)
    windows = reference.window_partition(x, (3, 2)).reshape(2, 4, 6, 3)
    rolled = reference.window_partition(x.roll((-3, -2), (1, 2)), (3, 2)).reshape(2, 4, 6, 3)
    assert torch.equal(rolled, windows.roll((-1, -1), (0, 1)))


def test_sign_of_the_shift():
    x = torch.arange(16).reshape(1, 4, 4, 1)
    assert reference.window_partition(x, 2, 1)[0, :, 0].tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize(("pad_order", "expected"), [("pad_then_roll", [2, 3, 0, 1]), ("roll_then_pad", [2, 3, 1, 0])])
def test_pad_orders_differ(pad_order, expected):
    """Tokens 1, 2, 3 become 2, 3, 0, 1 if they are padded before the roll, and 2, 3, 1, 0 if padded after it."""
    x = torch.tensor([[1], [2], [3]]).reshape(1, 1, 3, 1)
    windows = reference.window_partition(x, (1, 2), (0, 1), pad_order=pad_order)
    assert windows.flatten().tolist() == expected


def test_empty_batch_and_strides():
    x = draw(0, 5, 6, 3).requires_grad_()
    windows = reference.window_partition(x, 4, 2)
    assert windows.shape == (0, 16, 3)
    back = reference.window_reverse(windows, 4, (5, 6), 2)
    assert back.shape == x.shape
    assert torch.autograd.grad(back.sum(), x)[0].shape == x.shape
    y = draw(2, 3, 6, 5).permute(0, 3, 2, 1)
    assert torch.equal(reference.window_partition(y, 4, 2), reference.window_partition(y.contiguous(), 4, 2))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reference.window_partition(draw(4, 4, 3), 2), "x must be"),
        (lambda: reference.window_partition(draw(1, 4, 4, 3), 0), "window_size"),
        (lambda: reference.window_partition(draw(1, 4, 3, 3), 2, 4), "shift_size must be in 0..frame - 1"),
        (lambda: reference.window_partition(draw(1, 4, 4, 3), 2, -1), "shift_size"),
        (lambda: reference.window_partition(draw(1, 4, 4, 3), 2, pad_order="both"), "pad_order"),
        (lambda: reference.window_reverse(draw(5, 4, 3), 2, (4, 4)), "windows"),
        (lambda: reference.window_reverse(draw(4, 3, 3), 2, (4, 4)), "windows"),
        (lambda: reference.window_reverse(draw(4, 4, 3), 2, (4,)), "axes"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()
