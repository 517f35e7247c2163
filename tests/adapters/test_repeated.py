"""Tests that a block repeats the ops of an earlier call only where they give the same result."""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import swinkernels
from swinkernels.adapters import halves, norms, repeated
from swinkernels.ops import _fused_linear
from swinkernels.ops._fused_linear import Call
from tests.support.fused_products import run_kernels_anywhere

SIZE = (1, 14, 14, 384)


def blocks(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """Return timm's block, and a copy of it that is accelerated and has been called."""
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.swin_transformer import SwinTransformerBlock

    run_kernels_anywhere(monkeypatch)
    torch.manual_seed(0)
    plain = SwinTransformerBlock(384, (14, 14), num_heads=12, window_size=7, shift_size=3, drop_path=0.5).eval()
    for p in plain.parameters():
        p.data += 0.1 * torch.randn(p.shape)
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    with torch.no_grad():
        fast(torch.randn(SIZE))
    return plain, fast


def check(plain: Any, fast: Any, x: Tensor | None = None) -> None:
    x = torch.randn(SIZE) if x is None else x
    with torch.no_grad():
        exact = copy.deepcopy(plain).double()(x.double())
        assert (fast(x) - exact).abs().max() <= 1e-5 * exact.abs().max()


def refuse(*_: Any) -> None:
    raise AssertionError("the decisions were made again")


def test_a_later_call_runs_only_the_ops(monkeypatch):
    plain, fast = blocks(monkeypatch)
    monkeypatch.setattr(halves.Halves, "_inferred", refuse)
    for _ in range(2):
        check(plain, fast)
    with torch.inference_mode():
        fast(torch.randn(SIZE))
    for other in ((2, 14, 14, 384), (1, 7, 21, 384)):
        with torch.no_grad(), pytest.raises(AssertionError, match="made again"):
            fast(torch.randn(other))


def test_a_block_of_torchvision_runs_only_the_ops(monkeypatch):
    pytest.importorskip("torchvision", reason="torchvision is not installed")
    from torchvision.models.swin_transformer import SwinTransformerBlock

    run_kernels_anywhere(monkeypatch)
    plain = SwinTransformerBlock(384, 12, window_size=[7, 7], shift_size=[3, 3]).eval()
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    check(plain, fast)
    monkeypatch.setattr(halves.Halves, "_inferred", refuse)
    check(plain, fast)


def test_the_current_parameters_are_read(monkeypatch):
    plain, fast = blocks(monkeypatch)
    monkeypatch.setattr(halves.Halves, "_inferred", refuse)
    for change in (
        lambda b: b.mlp.fc1.weight.data.mul_(1.5),
        lambda b: setattr(b.attn.qkv, "bias", nn.Parameter(torch.linspace(-1, 1, 1152))),
        lambda b: setattr(b.norm2.weight, "data", torch.linspace(0, 2, 384)),
        lambda b: setattr(b.attn, "relative_position_bias_table", nn.Parameter(torch.arange(2028.0).reshape(169, 12))),
        lambda b: b.load_state_dict({k: 0.9 * v for k, v in b.state_dict().items() if "index" not in k}, strict=False),
        lambda b: setattr(b.attn.proj.weight, "data", b.attn.proj.weight.data.t()),
    ):
        change(plain)
        change(fast)
        check(plain, fast)


# What makes the ops of a call differ from those before -> a function that changes the block.
CHANGES: dict[str, Callable[[Any], Any]] = {
    "eps": lambda b: setattr(b.norm1, "eps", 0.5),
    "scale": lambda b: setattr(b.attn, "scale", 1.0) or setattr(b.attn, "fused_attn", False),
    "hook": lambda b: b.mlp.fc2.register_forward_hook(lambda module, args, out: 2 * out),
    "bias removed": lambda b: setattr(b.mlp.fc1, "bias", None),
    "norm": lambda b: setattr(b, "norm2", nn.Identity()),
    "order of parameters": lambda b: (lambda weight: (delattr(b.norm1, "weight"), setattr(b.norm1, "weight", weight)))(
        b.norm1.weight
    ),
    "parametrization": lambda b: (
        parametrize.register_parametrization(b.norm2, "weight", nn.Identity()),
        parametrize.remove_parametrizations(b.norm2, "weight"),
    ),
    "one tensor with two names": lambda b: setattr(b.norm2, "weight", b.norm1.weight),
    "forward": lambda b: setattr(b.mlp, "forward", lambda x: -x),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_ends_the_repetition(change, monkeypatch):
    plain, fast = blocks(monkeypatch)
    check(plain, fast)
    change(plain)
    change(fast)
    for _ in range(3):
        check(plain, fast)


def test_two_names_of_one_tensor_may_become_two_tensors(monkeypatch):
    plain, fast = blocks(monkeypatch)
    for block in (plain, fast):
        block.norm2.weight = block.norm1.weight
    x = torch.randn(2, *SIZE[1:])  # the first call with two images
    for _ in range(3):
        check(plain, fast, x)
    for block in (plain, fast):
        block.norm2.weight = nn.Parameter(torch.linspace(0, 2, 384))
    for _ in range(2):
        check(plain, fast, x)


def test_drop_paths_are_drawn_in_every_call(monkeypatch):
    _, fast = blocks(monkeypatch)
    x = torch.randn(64, *SIZE[1:])
    fast.train()
    with torch.no_grad():
        first, second = fast(x), fast(x)
    dropped = [(y == x).flatten(1).all(1) for y in (first, second)]
    assert all(0 < int(d.sum()) < 64 for d in dropped)
    assert not dropped[0].equal(dropped[1])


def test_autocast_and_gradients_are_not_repeated(monkeypatch):
    _, fast = blocks(monkeypatch)
    x = torch.randn(SIZE)
    assert fast(x).requires_grad
    with torch.no_grad():
        y = fast(x)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = fast(x)
    assert not y.equal(rounded.float())


def test_patch_merging_is_repeated(monkeypatch):
    pytest.importorskip("timm", reason="timm is not installed")
    from timm.models.swin_transformer import PatchMerging

    run_kernels_anywhere(monkeypatch)
    plain = PatchMerging(192)
    fast = copy.deepcopy(plain)
    assert swinkernels.accelerate(fast).replaced
    check(plain, fast, torch.randn(1, 28, 28, 192))
    monkeypatch.setattr(norms.Merging, "_run", refuse)
    check(plain, fast, torch.randn(1, 28, 28, 192))


def test_threads_get_their_own_results(monkeypatch):
    plain, fast = blocks(monkeypatch)
    xs = [torch.randn(SIZE) for _ in range(4)]
    wrong: list[BaseException] = []

    def work(x: Tensor) -> None:
        try:
            for _ in range(20):
                check(plain, fast, x)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(x,)) for x in xs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_is_recorded_after_an_error(monkeypatch):
    _, fast = blocks(monkeypatch)
    with torch.no_grad(), mock.patch.object(halves.Halves, "_inferred", refuse), pytest.raises(AssertionError):
        fast(torch.randn(2, *SIZE[1:]))
    assert _fused_linear.recorded.calls is None


def test_inputs_and_results_are_not_kept_alive(monkeypatch):
    _, fast = blocks(monkeypatch)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            for batch in (2, 2):
                x = torch.randn(batch, *SIZE[1:])
                y = fast(x)
                seen = [weakref.ref(x), weakref.ref(y)]
                del x, y
                assert not any(reference() is not None for reference in seen)
    finally:
        gc.enable()


X, WEIGHT, BIAS, OTHER = (torch.full((2,), float(i)) for i in range(4))


def add(*arguments: Any) -> Call:
    """Call an op that adds two tensors and a constant."""
    op = mock.Mock(overload=lambda a, b, c: a + b + c)
    return Call(op, arguments, op.overload(*arguments))


def test_ops_read_known_tensors():
    first = add(X, WEIGHT, 1.0)
    second = add(first.result, BIAS, 2)
    third = add(first.result, second.result, 1.0)
    ops = repeated._ops_of(X, (WEIGHT, None, BIAS), [first, second, third], third.result)
    found = ops.run(torch.full((2,), 10.0), (torch.full((2,), 100.0), None, torch.full((2,), 1000.0)))
    assert found.tolist() == [1225.0] * 2  # 111 + (111 + 1002) + 1


def test_other_calls_are_not_repeated():
    first = add(X, WEIGHT, 1.0)
    second = add(first.result, BIAS, 2)
    unknown = add(first.result, OTHER, 2)
    mutable = Call(mock.Mock(), (X, {}), OTHER)
    for calls, result in (
        ([], X),
        ([], None),
        ([first, second], None),
        ([first, second], second.result.clone()),  # other code ran after the ops
        ([first, unknown], unknown.result),
        ([second], second.result),
        ([second, first], first.result),
        ([mutable], OTHER),
    ):
        assert repeated._ops_of(X, (WEIGHT, BIAS), calls, result) is None


def test_a_tensor_with_two_names_is_not_repeated():
    call = add(X, WEIGHT, 1.0)
    for tensors in ((WEIGHT, WEIGHT), (WEIGHT, X)):
        assert repeated._ops_of(X, tensors, [call], call.result) is None
