"""Tests the op of the continuous position bias: the C++ kernel, and the modules that call it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import swinkernels
from swinkernels import _extension
from swinkernels.nn import WindowAttentionV2
from swinkernels.ops import _fused_linear
from swinkernels.ops._position_bias import _OP, fits_op
from swinkernels.testing import assert_within_budget
from tests.cpu.test_linear import DTYPES, behind_an_offset, draw, dtypes
from tests.support import instruction_sets
from tests.support.fused_products import called_ops, modules_seen_by_hooks, run_kernels_anywhere

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

OP = torch.ops.swinkernels.fused_position_bias
NAME = "swinkernels::fused_position_bias"


def plain(offsets: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor) -> Tensor:
    return 16 * torch.sigmoid(F.linear(F.relu(F.linear(offsets.flatten(0, -2), w1, b1)), w2))


def drawn(
    window: tuple[int, ...], hidden: int, heads: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    axes = [torch.linspace(-3, 3, 2 * w - 1) for w in window]
    offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)[None].to(dtype)
    w1, b1 = draw(hidden, len(window), seed=1, dtype=dtype), draw(hidden, seed=2, dtype=dtype)
    return offsets, w1, b1, (draw(heads, hidden, seed=3) * 3 / max(hidden, 1) ** 0.5).to(dtype)


CASES = [((8, 8), 512, 3), ((7, 12), 512, 24), ((1, 2), 6, 1), ((4, 5), 38, 7), ((16, 16), 1200, 4)]


@dtypes
@pytest.mark.parametrize(("window", "hidden", "heads"), CASES)
def test_against_float64(window, hidden, heads, dtype):
    offsets, w1, b1, w2 = drawn(window, hidden, heads, dtype)
    for bias in (b1, None):
        table = OP(offsets, w1, bias, w2)
        assert table.dtype == torch.float32
        exact = plain(offsets.double(), w1.double(), None if bias is None else bias.double(), w2.double())
        assert table.shape == exact.shape
        if table.numel() >= 500:
            assert_within_budget(table.to(dtype), exact, lambda bias=bias: plain(offsets, w1, bias, w2))
        else:
            assert (table - exact).abs().max() < (1e-5 if dtype == torch.float32 else 0.15)


def test_three_axes():
    offsets, w1, b1, w2 = drawn((2, 3, 4), 64, 5, torch.float32)
    torch.testing.assert_close(OP(offsets, w1, b1, w2), plain(offsets, w1, b1, w2), rtol=1e-5, atol=1e-5)


@dtypes
def test_strides(dtype):
    offsets, w1, b1, w2 = drawn((5, 6), 40, 3, dtype)
    expected = OP(offsets, w1, b1, w2)
    transposed = offsets.movedim(-1, 0).contiguous().movedim(0, -1)
    wide = torch.stack([w2, -w2], 1).flatten(1)[:, :40]  # rows are 80 apart
    for given in (offsets, transposed, behind_an_offset(offsets)):
        assert torch.equal(OP(given, w1.t().contiguous().t(), torch.stack([b1, b1], 1)[:, 0], wide), expected)


@dtypes
def test_special_values(dtype):
    """NaN stays NaN, large sums give 0 and 16, and nothing spreads to other rows or heads."""
    offsets, w1, b1, w2 = drawn((4, 4), 16, 3, dtype)
    expected = OP(offsets, w1, b1, w2)
    offsets[0, 2, 3, 1] = torch.nan
    got = OP(offsets, w1, b1, w2)
    row = 2 * 7 + 3
    assert got[row].isnan().all()
    assert torch.equal(got[:row], expected[:row])
    assert torch.equal(got[row + 1 :], expected[row + 1 :])
    ones = torch.ones(1, 16, dtype=dtype)
    far = OP(offsets[:, :2], w1, b1.abs() + 100, torch.cat([ones, -ones, 0 * ones]))
    torch.testing.assert_close(far, torch.tensor([16.0, 0.0, 8.0]).expand(14, 3), rtol=0, atol=1e-30)


def test_threads():
    given = drawn((16, 16), 512, 12, torch.float32)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(OP(*given))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_nothing():
    offsets, w1, b1, w2 = drawn((2, 2), 6, 2, torch.float32)
    assert OP(offsets[:0], w1, b1, w2).shape == (0, 2)
    assert OP(offsets, w1, b1, w2[:0]).shape == (9, 0)
    assert torch.equal(OP(offsets, w1[:0], b1[:0], w2[:, :0]), torch.full((9, 2), 8.0))


def test_wrong_arguments():
    offsets, w1, b1, w2 = drawn((2, 2), 6, 2, torch.float32)
    for arguments, words in (
        ((offsets.double(), w1, b1, w2), "float32"),
        ((offsets, w1.half(), b1, w2), "float32"),
        ((offsets, w1[:, :1], b1, w2), "as many columns"),
        ((offsets, w1, b1, w2[:, :5]), "as many columns"),
        ((offsets, w1, b1[:5], w2), "one value for each row"),
        ((offsets[..., :1].bfloat16(), w1[:, :1].bfloat16(), b1.bfloat16(), w2.bfloat16()), "must be even, got 1"),
    ):
        with pytest.raises(RuntimeError, match=words):
            OP(*arguments)
    with pytest.raises(NotImplementedError, match="no derivative"):
        _OP(offsets, w1.requires_grad_(), b1, w2).sum().backward()
    w1.detach_().untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        OP(offsets, w1, b1, w2)


def test_which_calls_use_the_op():
    """None in training, in another dtype, and for shapes or a bias that the op does not have."""
    offsets, w1, b1, w2 = drawn((4, 4), 16, 3, torch.float32)
    with torch.no_grad():
        assert fits_op(offsets, (w1, b1), (w2, None)) == _fused_linear._may_use_kernels(torch.float32)
        for fc1, fc2 in (
            ((w1, b1), (w2, b1[:3])), ((w1, b1), (w2[:, :15], None)), ((w1[:, :1], b1), (w2, None)),
            ((w1, b1[:15]), (w2, None)), ((w1.double(), b1), (w2, None)), ((w1[0], b1), (w2, None)),
        ):  # fmt: skip
            assert not fits_op(offsets, fc1, fc2)
        assert not fits_op(offsets.double(), (w1.double(), b1.double()), (w2.double(), None))
        assert not fits_op(offsets[..., :1].bfloat16(), (w1[:, :1].bfloat16(), None), (w2.bfloat16(), None))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert not fits_op(offsets, (w1, b1), (w2, None))
    assert not fits_op(offsets, (w1, b1), (w2, None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_module(dtype, monkeypatch):
    """The module calls the op in inference, but not if an inner module has a hook or is of another class."""
    run_kernels_anywhere(monkeypatch, dtype)
    torch.manual_seed(0)
    attention: Any = WindowAttentionV2(32, 4, 2).to(dtype)
    attention.cpb_mlp[2].weight.data.mul_(20)  # a bias that is not constant
    x = draw(1, 8, 8, 32, dtype=dtype)
    assert NAME in _called(lambda: attention(x))
    with torch.no_grad():
        fused = attention(x)
        handle = attention.cpb_mlp[1].register_forward_hook(lambda *_: None)
        assert NAME not in _called(lambda: attention(x))
        assert_within_budget(fused, copy.deepcopy(attention).double()(x.double()), lambda: attention(x))
        handle.remove()
        attention.cpb_mlp[1] = nn.GELU()
        assert NAME not in _called(lambda: attention(x))


def _called(call: Callable[[], Any]) -> list[str]:
    with torch.no_grad(), called_ops() as called:
        call()
    return called


# A v2 block in eval mode, the path of its MLP for the position bias, and the arguments of a call
Library = tuple[Any, ...]


def _map() -> Tensor:
    return draw(1, 16, 16, 96) / 4


def _timm() -> Library:
    model = pytest.importorskip("timm").create_model("swinv2_tiny_window8_256").eval()
    return model.layers[0].blocks[0], "attn.cpb_mlp", _map()


def _torchvision() -> Library:
    models = pytest.importorskip("torchvision").models
    return models.swin_v2_t().eval().features[1][0], "attn.cpb_mlp", _map()


def _transformers() -> Library:
    transformers = pytest.importorskip("transformers")
    config = transformers.Swinv2Config(depths=[1, 1], num_heads=[3, 6], image_size=64)
    layer = transformers.Swinv2Model(config).eval().encoder.layers[0].blocks[0]
    (path,) = (name for name, _ in layer.named_modules() if name.endswith("continuous_position_bias_mlp"))
    return layer, path, _map().flatten(1, 2), (16, 16)


@pytest.mark.parametrize("library", [_timm, _torchvision, _transformers])
def test_libraries(library, monkeypatch):
    """Accelerated blocks call the op, but not if an inner module has a hook, a bias or another class."""
    run_kernels_anywhere(monkeypatch)
    block, path, *arguments = library()

    def call() -> Tensor:
        out = block(*arguments)
        return out[0] if isinstance(out, tuple) else out

    mlp: Any = block.get_submodule(path)
    with torch.no_grad():
        mlp[2].weight.mul_(20)
        for norm in block.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.weight.fill_(1.0)  # some libraries initialise it with 0
        expected = call()
        assert swinkernels.accelerate(block).replaced
        assert NAME in _called(call)
        torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-4)
        for inner in (mlp, *mlp):
            seen = []
            handle = inner.register_forward_hook(lambda *given, seen=seen: seen.append(given))
            assert NAME not in _called(call)
            assert seen
            handle.remove()
            assert NAME in _called(call)
        mlp[2].bias = nn.Parameter(torch.ones(mlp[2].out_features))
        assert NAME not in _called(call)
        mlp[2].bias = None
        mlp[1] = nn.LeakyReLU(0.5)
        assert NAME not in _called(call)
    mlp[1] = nn.ReLU()
    call().sum().backward()
    assert mlp[0].weight.grad.abs().sum() > 0


def test_hooks_of_all_modules_backends_and_devices(monkeypatch):
    run_kernels_anywhere(monkeypatch)
    attention: Any = WindowAttentionV2(32, 4, 2)
    x = draw(1, 8, 8, 32)
    with modules_seen_by_hooks() as seen:
        attention(x)
    assert {"ReLU", "Sequential"} <= set(seen)
    attention.backend = "reference"
    assert NAME not in _called(lambda: attention(x))
    attention.backend = "auto"
    assert NAME in _called(lambda: attention(x))
    attention.cpb_mlp[0].bias = nn.Parameter(torch.zeros(512, device="meta"))
    with torch.no_grad(), pytest.raises(RuntimeError, match="device"):
        attention(x)


@pytest.mark.parametrize("library", [_timm, _torchvision, _transformers])
def test_compiled_libraries(library, monkeypatch):
    """Compiled blocks call the op, too. transformers registers the offsets as an nn.Buffer."""
    run_kernels_anywhere(monkeypatch)
    block, _, *arguments = library()
    swinkernels.accelerate(block)
    torch.compiler.reset()
    compiled = torch.compile(block, backend="eager")
    with torch.no_grad():
        compiled(*arguments)
    assert NAME in _called(lambda: compiled(*arguments))


@pytest.mark.parametrize("name", instruction_sets.SETS)
def test_instruction_set(name):
    if name == torch.ops.swinkernels.cpu_instruction_set():
        pytest.skip("the other tests use these kernels")
    code = """
from tests.ops import test_position_bias as tests
for dtype in tests.DTYPES:
    for case in tests.CASES:
        tests.test_against_float64(*case, dtype)
    tests.test_strides(dtype)
    tests.test_special_values(dtype)
"""
    instruction_sets.check_with(name, code)


def test_opcheck():
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OP.default, drawn((3, 4), 8, 2, torch.float32), test_utils=names)
