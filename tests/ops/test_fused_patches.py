"""Tests the op of Linear layers of patches, and the functions and modules that call it."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swinkernels
from swinkernels import _extension
from swinkernels.nn import PatchEmbed
from swinkernels.ops._fused_linear import Norm
from swinkernels.ops._fused_patches import _OP, patch_linear
from swinkernels.ops.patch_merging import RUNS
from swinkernels.testing import assert_within_budget
from tests.cpu.test_linear import DTYPES, NO_NORM, behind_an_offset, draw, dtypes, layer, norm_of
from tests.support import instruction_sets
from tests.support.fused_products import called_ops, modules_seen_by_hooks, run_kernels_anywhere

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))
OP = torch.ops.swinkernels.fused_patch_linear
NAME = "swinkernels::fused_patch_linear"


def fused(x, weight, bias, norm, factor, neighbours=None) -> Tensor:
    padded = [1] * (3 - len(factor)) + list(factor)
    return OP(x, weight, bias, *norm[:2], padded, list(neighbours or ()), neighbours is None, *norm[2:])


def patches(x: Tensor, factor: tuple[int, ...], neighbours: tuple[int, ...] | None) -> Tensor:
    """Return the rows of the layer's input."""
    rank = len(factor)
    if neighbours is None:
        for axis, f in enumerate(factor):
            x = x.unflatten(2 + 2 * axis, (-1, f))
        return x.permute(0, *range(2, 2 + 2 * rank, 2), 1, *range(3, 3 + 2 * rank, 2)).flatten(1 + rank)
    x = F.pad(x, [0, 0, *itertools.chain(*((0, -s % f) for s, f in zip(x.shape[-2:0:-1], factor[::-1], strict=True)))])
    parts = []
    for number in neighbours:
        part = x
        for axis in reversed(range(rank)):
            part = part.narrow(1 + axis, number % factor[axis], part.shape[1 + axis] - number % factor[axis])
            part = part[(slice(None),) * (1 + axis) + (slice(None, None, factor[axis]),)]
            number //= factor[axis]
        parts.append(part)
    return torch.cat(parts, -1)


def plain(x, weight, bias, norm, factor, neighbours=None) -> Tensor:
    def normed(y: Tensor, place: str) -> Tensor:
        return F.layer_norm(y, y.shape[-1:], *norm[:2], norm[3]) if norm[2] == place else y

    return normed(F.linear(normed(patches(x, factor, neighbours), "pre"), weight, bias), "post")


MAPS = [  # the map, the block, and the order of its tokens
    ((2, 6, 8, 24), (2, 2), RUNS["swin", 2]),
    ((1, 7, 9, 16), (2, 2), RUNS["swin", 2]),
    ((1, 1, 1, 6), (2, 2), RUNS["row_major", 2]),
    ((1, 28, 28, 40), (2, 2), RUNS["swin", 2]),
    ((2, 3, 5, 4, 10), (2, 2, 2), RUNS["monai", 3]),
    ((1, 4, 6, 7, 12), (2, 2, 2), RUNS["monai_legacy", 3]),
    ((1, 3, 5, 6, 12), (1, 2, 2), RUNS["swin", 2]),
    ((2, 5, 9, 8), (3, 2), (5, 0)),
]
IMAGES = [  # the image, and the patch size
    ((2, 3, 8, 12), (4, 4)),
    ((1, 1, 6, 64), (3, 2)),
    ((3, 2, 32, 40), (16, 8)),
    ((1, 3, 64, 132), (4, 4)),
    ((2, 4, 4, 6, 8), (2, 3, 4)),
]
CASES = [*MAPS, *((*image, None) for image in IMAGES)]


def columns(shape: tuple[int, ...], factor: tuple[int, ...], neighbours: tuple[int, ...] | None) -> int:
    return shape[1] * math.prod(factor) if neighbours is None else shape[-1] * len(neighbours)


def compare(dtype: torch.dtype, case: tuple, place: str, out: int, seed: int) -> None:
    shape, factor, neighbours = case
    weight, bias = layer(columns(*case), out, seed=1, dtype=dtype)
    width = {"": 0, "pre": weight.shape[1], "post": out}[place]
    norm = norm_of(width, place, seed, dtype) if place else NO_NORM
    given = [draw(*shape, seed=3, dtype=dtype) * 2 + 1, weight, bias if seed % 2 else None, norm, factor, neighbours]
    wide = [x.double() if isinstance(x, Tensor) else x for x in given]
    wide[3] = tuple(x.double() if isinstance(x, Tensor) else x for x in norm)
    y, exact = fused(*given), plain(*wide)
    assert y.dtype == dtype
    if y.numel() >= 500:
        assert_within_budget(y, exact, lambda: plain(*given))
    else:
        tolerances = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.03}
        torch.testing.assert_close(y.double(), exact, **tolerances)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_float64(case, dtype):
    for seed, (place, out) in enumerate(itertools.product(("", "pre", "post"), (6, 48, 200))):
        compare(dtype, case, place, out, seed)


@dtypes
@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows_are_those_of_a_linear_layer(case, dtype):
    """The bits are those of fused_linear for rows that were gathered in memory."""
    shape, factor, neighbours = case
    x, (weight, bias) = draw(*shape, dtype=dtype), layer(columns(*case), 50, seed=1, dtype=dtype)
    norm = norm_of(weight.shape[1], "pre", dtype=dtype)
    rows = patches(x, factor, neighbours)
    for given in (x, behind_an_offset(x), x.transpose(1, 2).contiguous().transpose(1, 2)):
        got = fused(given, weight, bias, norm, factor, neighbours)
        expected = torch.ops.swinkernels.fused_linear(rows, weight, bias, None, *norm[:2], "", *norm[2:])
        assert torch.equal(got, expected)


@dtypes
def test_special_values(dtype):
    """NaN stays in the row of its patch; tokens outside the map are zeros, whatever lies behind it in memory."""
    memory = torch.full((2 * 5 * 7 * 8 + 200,), torch.nan, dtype=dtype)
    x = memory[: 2 * 5 * 7 * 8].view(2, 5, 7, 8)
    x.copy_(draw(2, 5, 7, 8, dtype=dtype))
    weight, bias = layer(32, 20, seed=1, dtype=dtype)
    expected = fused(x, weight, bias, NO_NORM, (2, 2), RUNS["swin", 2])
    assert expected.isfinite().all()
    x[1, 2, 3, 4] = torch.nan
    got = fused(x, weight, bias, NO_NORM, (2, 2), RUNS["swin", 2])
    assert got[1, 1, 1].isnan().all()
    got[1, 1, 1] = expected[1, 1, 1]
    assert torch.equal(got, expected)


def test_threads():
    x, (weight, bias) = draw(2, 3, 64, 128), layer(48, 96, seed=1)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(fused(x, weight, bias, norm_of(96, "post"), (4, 4)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results[1:])


def test_nothing():
    weight, bias = layer(32, 4, seed=1)
    assert fused(draw(0, 5, 7, 8), weight, bias, NO_NORM, (2, 2), (0, 1, 2, 3)).shape == (0, 3, 4, 4)
    assert fused(draw(1, 0, 7, 8), weight, bias, NO_NORM, (2, 2), (0, 1, 2, 3)).shape == (1, 0, 4, 4)
    y = fused(draw(1, 3, 3, 0), weight[:, :0], bias, NO_NORM, (2, 2), (0, 1, 2, 3))
    torch.testing.assert_close(y, bias.expand(1, 2, 2, 4))
    y = fused(draw(1, 0, 4, 4), weight[:, :0], bias, NO_NORM, (2, 2))
    torch.testing.assert_close(y, bias.expand(1, 2, 2, 4))


def test_wrong_arguments():
    x, (weight, bias) = draw(1, 4, 6, 8), layer(32, 4, seed=1)
    order = [0, 1, 2, 3]
    no_norm = (None, None)
    for arguments, words in (
        ((x.double(), weight, bias, *no_norm, [1, 2, 2], order, False, "", 0.0), "float32"),
        ((x, weight[:, 1:], bias, *no_norm, [1, 2, 2], order, False, "", 0.0), "as many columns"),
        ((x, weight, bias, *no_norm, [2, 2], order, False, "", 0.0), "three positive numbers"),
        ((x, weight, bias, *no_norm, [2, 2, 2], order, False, "", 0.0), "the first is 1 for a 2D map"),
        ((x, weight, bias, *no_norm, [1, 2, 0], order, False, "", 0.0), "three positive numbers"),
        ((x, weight, bias, *no_norm, [1, 2, 2], [0, 1, 2, 4], False, "", 0.0), "numbers of tokens of a block"),
        ((x, weight, bias, *no_norm, [1, 2, 2], [0, 1, 2, -1], False, "", 0.0), "numbers of tokens of a block"),
        ((x, weight, bias, *no_norm, [1, 2, 2], order, True, "", 0.0), "only for channels last"),
        ((x, weight, bias, *no_norm, [1, 4, 4], [], True, "", 0.0), "a multiple of the patch size"),
        ((x[0], weight, bias, *no_norm, [1, 2, 2], order, False, "", 0.0), "4 or 5 axes"),
        ((x, weight, bias, *no_norm, [1, 2, 2], order, False, "last", 0.0), "norm must be"),
        ((x, weight, bias, bias, None, [1, 2, 2], order, False, "pre", 0.0), "one value for each channel"),
        ((x.bfloat16()[..., :7], weight.bfloat16(), None, *no_norm, [1, 2, 2], order, False, "", 0.0), "got 7"),
    ):
        with pytest.raises(RuntimeError, match=words):
            OP(*arguments)
    with pytest.raises(NotImplementedError, match="no derivative"):
        _OP(x.requires_grad_(), weight, bias, *no_norm, [1, 2, 2], order, False, "", 0.0).sum().backward()
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        OP(x.detach(), weight, bias, *no_norm, [1, 2, 2], order, False, "", 0.0)


@pytest.mark.parametrize("name", instruction_sets.SETS)
def test_instruction_set(name):
    if name == torch.ops.swinkernels.cpu_instruction_set():
        pytest.skip("the other tests use these kernels")
    code = """
from tests.ops import test_fused_patches as tests
for dtype in tests.DTYPES:
    for case in tests.CASES:
        tests.test_against_float64(case, dtype)
        tests.test_rows_are_those_of_a_linear_layer(case, dtype)
    tests.test_special_values(dtype)
"""
    instruction_sets.check_with(name, code)


def test_opcheck():
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight, bias = layer(32, 4, seed=1)
    rest = (None, None, [1, 2, 2], [0, 1, 2, 3], False, "post", 1e-5)
    torch.library.opcheck(OP.default, (draw(1, 5, 6, 8), weight, bias, *rest), test_utils=names)
    rest = (None, None, [1, 4, 4], [], True, "pre", 1e-5)
    torch.library.opcheck(OP.default, (draw(1, 2, 8, 12), weight, bias, *rest), test_utils=names)


def test_which_calls_use_the_op(monkeypatch):
    """None in training, under autocast, in another dtype, and for pieces of odd length in bfloat16."""
    run_kernels_anywhere(monkeypatch)
    x, (weight, bias) = draw(1, 4, 6, 8), layer(32, 4, seed=1)
    given = (x, weight, bias, None, (2, 2), RUNS["swin", 2])
    with torch.no_grad():
        assert torch.equal(patch_linear(*given), fused(x, weight, bias, NO_NORM, *given[4:]))
        assert patch_linear(x, weight.double(), bias, *given[3:]) is None
        assert patch_linear(x.double(), weight.double(), bias.double(), *given[3:]) is None
        low = [t.bfloat16() for t in (draw(1, 4, 6, 7), weight[:, :28], bias)]
        assert patch_linear(*low, *given[3:]) is None
        odd = [t.bfloat16() for t in (x, weight[:3], bias[:3])]
        assert patch_linear(*odd, Norm(None, None, 1e-5, "post"), *given[4:]) is None
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert patch_linear(*given) is None
    assert patch_linear(x, weight.requires_grad_(), bias, *given[3:]) is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_patch_merging(norm, dtype, monkeypatch):
    """The public function calls the op in inference, for every order but "unfold"."""
    run_kernels_anywhere(monkeypatch, dtype)
    orders = ("swin", "row_major", "monai", "unfold")
    for shape, order in itertools.product(((1, 12, 19, 16), (2, 5, 8, 6, 8)), orders):
        x, k = draw(*shape, dtype=dtype), 4 if len(shape) == 4 else 8
        weight, _ = layer(k * shape[-1], 20, seed=1, dtype=dtype)
        parameters = norm_of(weight.shape[1] if norm == "pre" else 20, norm, dtype=dtype)[:2]
        with torch.no_grad(), called_ops() as called:
            y = swinkernels.patch_merging(x, *parameters, weight, order=order, norm=norm)
        assert (NAME in called) == (order != "unfold")
        given = (x, *parameters, weight)
        merge = functools.partial(swinkernels.patch_merging, order=order, norm=norm, backend="reference")
        assert_within_budget(y, merge(*(t.double() for t in given)), functools.partial(merge, *given))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(30, 41), (5, 9, 8)])
def test_patch_embed(size, dtype, monkeypatch):
    """The module calls the op in inference, but not if the convolution or the norm has a hook."""
    run_kernels_anywhere(monkeypatch, dtype)
    for norm in (True, False):
        module = PatchEmbed(4, 3, 24, spatial_dims=len(size), norm=norm).to(dtype)
        if norm:
            torch.nn.init.normal_(module.norm.weight)
        x = draw(2, 3, *size, dtype=dtype)
        exact = copy.deepcopy(module).double()(x.double()).detach()
        with torch.no_grad(), called_ops() as called:
            y = module(x)
        assert NAME in called
        assert_within_budget(y, exact, lambda module=module, x=x: module(x).detach())
        for inner in filter(None, (module.proj, module.norm)):
            handle = inner.register_forward_hook(lambda *_: None)
            with torch.no_grad(), called_ops() as called:
                module(x)
            assert NAME not in called
            handle.remove()


class ScaledConv(torch.nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


@pytest.mark.parametrize(
    "proj",
    [
        ScaledConv(3, 24, 4, 4), torch.nn.Conv2d(3, 24, 4, 4, padding=2), torch.nn.Conv2d(3, 24, 4, 2, padding=1),
        torch.nn.Conv2d(3, 24, 7, 4, padding=3), torch.nn.Conv2d(3, 24, 3, 4, dilation=2, padding=1),
        torch.nn.Sequential(torch.nn.Conv2d(3, 24, 4, 4), torch.nn.ReLU()),
    ],
    ids=str,
)  # fmt: skip
def test_another_projection_is_called(proj, monkeypatch):
    run_kernels_anywhere(monkeypatch)
    module: Any = PatchEmbed(4, 3, 24)
    module.proj = proj
    x = draw(1, 3, 16, 24)
    expected = module(x)
    with torch.no_grad():
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-5)


def test_hooks_of_all_modules_and_backends(monkeypatch):
    run_kernels_anywhere(monkeypatch)
    module: Any = PatchEmbed(4, 3, 24)
    x = draw(1, 3, 16, 24)
    with modules_seen_by_hooks() as seen:
        module(x)
    assert seen == ["Conv2d", "PatchEmbed"]
    module.backend = "reference"
    with torch.no_grad(), called_ops() as called:
        module(x)
    assert NAME not in called
    module.backend = "cuda"
    with torch.no_grad(), pytest.raises(NotImplementedError, match="cuda"):
        module(x)


def test_a_parameter_on_another_device_is_an_error(monkeypatch):
    """torch's functions raise it; the op must not run."""
    run_kernels_anywhere(monkeypatch)
    module: Any = PatchEmbed(4, 3, 24)
    module.norm.to("meta")
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="device"):
        module(draw(1, 3, 16, 24))
    weight, _ = layer(32, 4, seed=1)
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError), match="device"):
        swinkernels.patch_merging(draw(1, 4, 6, 8), torch.ones(32, device="meta"), None, weight)
