"""Tests the C++ kernels of Linear layers and MLPs: shapes, strides, GELU, special values, threads, instruction sets."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels import _extension
from swinkernels.ops import _fused_linear  # registers the ops' fake kernels
from swinkernels.testing import assert_within_budget
from tests.support import instruction_sets

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

OPS = torch.ops.swinkernels
GELUS = ["", "none", "tanh"]
DTYPES = [torch.float32, torch.bfloat16]
# A vector has up to 16 lanes, a panel up to 64 rows, a block up to 128, and a tail up to 4; a slice of the weight is 48
# by 256 channels (in bfloat16 up to 512), and an MLP computes 256 hidden channels at a time (in bfloat16 512).
ROWS = [1, 7, 16, 33, 34, 64, 128, 129, 131, 300]
IN = [1, 8, 31, 256, 257, 600]
OUT = [1, 8, 47, 48, 100, 193]

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def pairs(channels: list[int], dtype: torch.dtype) -> list[int]:
    """Return the numbers of channels as the kernels of a dtype can sum them: even ones in bfloat16."""
    return channels if dtype == torch.float32 else [c + c % 2 for c in channels]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape))).to(dtype)


def layer(of: int, into: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return (draw(into, of, seed=seed) / of**0.5).to(dtype), draw(into, seed=seed + 1, dtype=dtype)


Norm = tuple[Tensor | None, Tensor | None, str, float]  # the last arguments of the ops: weight, bias, place, eps
NO_NORM: Norm = (None, None, "", 0.0)


def fused_linear(x, weight, bias, residual, gelu, norm: Norm = NO_NORM) -> Tensor:
    return OPS.fused_linear(x, weight, bias, residual, *norm[:2], gelu, *norm[2:])


def fused_mlp(x, w1, b1, w2, b2, residual, gelu, norm: Norm = NO_NORM, by_layers: bool | None = False) -> Tensor:
    return OPS.fused_mlp(x, w1, b1, w2, b2, residual, *norm[:2], gelu, *norm[2:], by_layers)


MLPS = (fused_mlp, functools.partial(fused_mlp, by_layers=True))


def normed(x: Tensor, norm: Norm, place: str) -> Tensor:
    weight, bias, of, eps = norm
    if of != place:
        return x
    weight, bias = (None if t is None else t.to(x.dtype) for t in (weight, bias))
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def activate(x: Tensor, gelu: str) -> Tensor:
    return F.gelu(x, approximate=gelu) if gelu else x


def plain_linear(x, weight, bias, residual, gelu, norm: Norm = NO_NORM) -> Tensor:
    y = activate(F.linear(normed(x, norm, "pre"), weight, bias), gelu)
    return y if residual is None else residual + y


def plain_mlp(x, w1, b1, w2, b2, residual, gelu, norm: Norm = NO_NORM) -> Tensor:
    h = activate(F.linear(normed(x, norm, "pre"), w1, b1), gelu)
    y = normed(F.linear(h, w2, b2), norm, "post")
    return y if residual is None else residual + y


def norm_of(channels: int, place: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Norm:
    """Return a norm; every fourth seed leaves out the weight, the next one the bias."""
    weight, bias = draw(channels, seed=seed, dtype=dtype), draw(channels, seed=seed + 50, dtype=dtype)
    return None if seed % 4 == 1 else weight, None if seed % 4 == 2 else bias, place, 1e-5


def check(op, plain, *arguments) -> Tensor:
    def as_double(x):
        return x.double() if isinstance(x, Tensor) else x

    def widened(x):
        return tuple(map(as_double, x)) if isinstance(x, tuple) else as_double(x)

    y, exact = op(*arguments), plain(*map(widened, arguments))
    if y.numel() >= 500:
        assert_within_budget(y, exact, lambda: plain(*arguments))
    elif y.dtype == torch.float32:  # too few results to compare mean errors
        torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=4e-6)
    else:
        assert (y - exact).abs().max() <= 1.5 * (plain(*arguments) - exact).abs().max() + 2**-8 * exact.abs().max()
    return y


@dtypes
@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows, gelu, dtype):
    for of, into in itertools.product(pairs(IN, dtype), OUT):
        weight, bias = layer(of, into, seed=1, dtype=dtype)
        x, residual = draw(rows, of, seed=3, dtype=dtype), draw(rows, into, seed=4, dtype=dtype)
        odd = (of + into) % 2 == 1
        check(fused_linear, plain_linear, x, weight, bias if odd else None, None if odd else residual, gelu)


@dtypes
@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("rows", ROWS)
def test_mlp(rows, gelu, dtype):
    of_hidden = pairs([5, 192, 500], dtype)
    for i, (of, hidden, into) in enumerate(itertools.product(pairs([1, 31, 257], dtype), of_hidden, [1, 48, 100])):
        (w1, b1), (w2, b2) = layer(of, hidden, seed=1, dtype=dtype), layer(hidden, into, seed=5, dtype=dtype)
        x, residual = draw(rows, of, seed=3, dtype=dtype), draw(rows, into, seed=4, dtype=dtype)
        odd = i % 2 == 1
        biases = (b1, None) if odd else (None, b2)
        for mlp in MLPS:
            check(mlp, plain_mlp, x, w1, biases[0], w2, biases[1], residual if odd else None, gelu)


@dtypes
@pytest.mark.parametrize("rows", ROWS)
def test_norms(rows, dtype):
    widths = pairs([8, 31, 257, 600], dtype), pairs([5, 48, 100], dtype)
    for seed, (of, into) in enumerate(itertools.product(*widths)):
        weight, bias = layer(of, into, seed=1, dtype=dtype)
        x = draw(rows, of, seed=3, dtype=dtype) * 3 + 5
        check(fused_linear, plain_linear, x, weight, bias, None, "none", norm_of(of, "pre", seed, dtype))
        w2, b2 = layer(into, of, seed=5, dtype=dtype)
        for mlp, place in itertools.product(MLPS, ("pre", "post")):
            check(mlp, plain_mlp, x, weight, bias, w2, b2, x, "none", norm_of(of, place, seed, dtype))


@dtypes
def test_norm_of_equal_values(dtype):
    """A row of equal values is normalised to the bias, also if it is large; NaN and infinities become NaN."""
    x = torch.full((40, 24), 1e4, dtype=dtype)
    x[1], x[2, 3], x[3, 0] = 0.0, torch.nan, torch.inf
    weight, bias = layer(24, 8, seed=1, dtype=dtype)
    y = fused_linear(x, weight, bias, None, "", (None, None, "pre", 1e-5))
    assert y[2:4].isnan().all()
    torch.testing.assert_close(y[[0, 1, 39]], bias.expand(3, 8), rtol=0, atol=0)


@dtypes
def test_large(dtype):
    """Several blocks, whose columns are divided into tasks or not; the rows of an MLP's block depend on its width."""
    for rows, of, into in ((3000, 96, 288), (200, 384, 1536), (49, 1536, 384), (49, 768, 2304)):
        weight, bias = layer(of, into, seed=1, dtype=dtype)
        x = draw(rows, of, dtype=dtype)
        check(fused_linear, plain_linear, x, weight, bias, None, "none")
        w2, b2 = layer(into, of, seed=2, dtype=dtype)
        for mlp in MLPS:
            check(mlp, plain_mlp, x, weight, bias, w2, b2, x, "none")


@dtypes
def test_layers_of_many_rows(dtype):
    """A hidden layer of more than 8 MiB is computed in pieces of rows."""
    (w1, b1), (w2, b2) = layer(8, 1500, seed=1, dtype=dtype), layer(1500, 8, seed=5, dtype=dtype)
    x = draw(3000, 8, dtype=dtype)
    for norm in (NO_NORM, norm_of(8, "pre", dtype=dtype), norm_of(8, "post", dtype=dtype)):
        y = check(MLPS[1], plain_mlp, x, w1, b1, w2, b2, x, "none", norm)
        few = MLPS[1](x[2000:2005], w1, b1, w2, b2, x[2000:2005], "none", norm)
        assert torch.equal(y[2000:2005], few)


def behind_an_offset(x: Tensor) -> Tensor:
    """Return a contiguous copy of x that lies one element behind the start of its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


@dtypes
def test_strides_and_leading_axes(dtype):
    (w1, b1), (w2, b2) = layer(24, 40, seed=1, dtype=dtype), layer(40, 24, seed=5, dtype=dtype)
    x = draw(2, 5, 24, 6, dtype=dtype).transpose(2, 3)
    residual = draw(2, 24, 6, 5, dtype=dtype).permute(0, 3, 2, 1)
    wide = torch.stack([w1, -w1], 1).flatten(1)[:, :24]  # rows are 48 apart
    odd = F.pad(w1, (0, 1))[:, :24]  # in bfloat16, every second row begins between two multiples of 4 bytes
    for weight in (w1, wide, odd, w1.t().contiguous().t(), behind_an_offset(w1)):
        bias = torch.stack([b1, -b1], 1)[:, 0]
        for given, mlp in itertools.product((x, behind_an_offset(x)), MLPS):
            y = mlp(given, weight, bias, w2, b2, residual, "tanh")
            assert y.is_contiguous()
            assert torch.equal(y, mlp(x.contiguous(), w1, b1, w2, b2, residual.contiguous(), "tanh"))
        assert torch.equal(fused_linear(x, weight, bias, None, ""), fused_linear(x.contiguous(), w1, b1, None, ""))
    check(MLPS[0], plain_mlp, x, w1, b1, w2, b2, residual, "tanh")
    assert fused_linear(x[0, 0, 0], w1, b1, None, "").shape == (40,)


def test_nothing():
    """Without rows the result is empty; without input or hidden channels it is the bias."""
    weight, bias = layer(8, 4, seed=1)
    assert fused_linear(draw(0, 8), weight, bias, None, "").shape == (0, 4)
    for mlp in MLPS:
        assert mlp(draw(3, 0, 8), weight, bias, weight.t(), None, None, "none").shape == (3, 0, 8)
        y = mlp(draw(3, 8), weight[:0], None, weight[:, :0], bias, None, "none")
        torch.testing.assert_close(y, bias.expand(3, 4))
    assert fused_linear(draw(3, 8), weight[:0], None, None, "").shape == (3, 0)
    torch.testing.assert_close(fused_linear(draw(3, 0), weight[:, :0], bias, None, ""), bias.expand(3, 4))


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_gelu(gelu):
    """Every part of the range, and at least as exact as torch's, relative to the result wherever that is above -3."""
    x = torch.cat([torch.linspace(-20, 20, 400001), torch.logspace(-40, 38, 1000), -torch.logspace(-40, 38, 1000)])
    exact = F.gelu(x.double(), approximate=gelu)
    errors = [
        (y.double() - exact).abs()
        for y in (fused_linear(x[:, None], torch.ones(1, 1), None, None, gelu)[:, 0], F.gelu(x, approximate=gelu))
    ]
    middle = x.abs() <= 20
    assert errors[0][middle].max() <= 1.25 * errors[1][middle].max()
    near = (x > -3) & (x != 0)
    # The smallest normal number bounds the errors of results below it.
    assert (errors[0] / exact.abs().clamp(min=2.0**-126))[near].max() < 1.2e-6
    assert errors[0][x <= -20].max() < 1e-30


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_gelu_in_bfloat16(gelu):
    """Every value, and in each part of the range at most a little less exact than rounding."""
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = bits[bits.isfinite()]
    exact = F.gelu(x.double(), approximate=gelu)
    y = fused_linear(torch.stack([x, 0 * x], 1), torch.eye(2, dtype=x.dtype)[:1], None, None, gelu)[:, 0]
    errors, least = (y.double() - exact).abs(), (exact.bfloat16().double() - exact).abs()
    for low, high in itertools.pairwise((-4, -2, -1, -0.1, 0, 0.1, 1, 2, 4, 1e38)):
        part = (x > low) & (x <= high)
        assert errors[part].mean() <= 1.1 * least[part].mean() + 2.0**-126
        assert errors[part].max() <= 1.25 * least[part].max() + 2.0**-126
    near = (x > -4) & (exact.abs() > 2.0**-120)
    assert (errors / exact.abs())[near].max() < 1.1 * 2**-8
    assert errors[(x <= -4) & (x > -6)].max() < 2.6e-7
    assert errors[x <= -6].max() < 1e-9


@dtypes
@pytest.mark.parametrize("gelu", GELUS)
def test_special_values(gelu, dtype):
    """NaN stays NaN, and GELU of an infinity is its limit; only their own rows are affected."""
    x = draw(40, 16, dtype=dtype)
    weight, bias = layer(16, 24, seed=1, dtype=dtype)
    expected = fused_linear(x, weight, bias, None, gelu)
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    got = fused_linear(x, weight, bias, None, gelu)
    others = [i for i in range(40) if i not in (3, 17)]
    torch.testing.assert_close(got[others], expected[others], rtol=0, atol=0)
    assert got[3].isnan().all()
    limits = weight[:, 0] * torch.inf
    torch.testing.assert_close(got[17], limits if gelu == "" else limits.clamp(min=0), rtol=0, atol=1e-30)


@dtypes
def test_results_do_not_depend_on_threads_or_other_rows(dtype):
    x, (w1, b1), (w2, b2) = draw(700, 96, dtype=dtype), layer(96, 384, 1, dtype), layer(384, 96, 5, dtype)

    def run(rows: slice) -> list[Tensor]:
        z = x[rows]
        norms = [NO_NORM, norm_of(96, "pre", dtype=dtype), norm_of(96, "post", dtype=dtype)]
        linears = [fused_linear(z, w1, b1, None, "none", norm) for norm in norms[:2]]
        return linears + [mlp(z, w1, b1, w2, b2, z, "none", norm) for mlp in MLPS for norm in norms]

    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(run(slice(None)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    for rows in (slice(5, 6), slice(100, 333), slice(7, 57), slice(0, 67)):
        assert all(torch.equal(one, other[rows]) for one, other in zip(run(rows), results[0], strict=True))


@dtypes
def test_both_ways_of_an_mlp_give_the_same_bits(dtype):
    """So the number of threads changes nothing. In bfloat16 this excludes a norm of the result."""
    for rows, of, hidden in itertools.product((5, 130, 700), pairs([31, 600], dtype), pairs([5, 257, 1300], dtype)):
        (w1, b1), (w2, b2) = layer(of, hidden, 1, dtype), layer(hidden, of, 5, dtype)
        x = draw(rows, of, dtype=dtype)
        for place in ("", "pre", "post") if dtype == torch.float32 else ("", "pre"):
            norm = norm_of(of, place, dtype=dtype) if place else NO_NORM
            one, other = (mlp(x, w1, b1, w2, b2, x, "none", norm) for mlp in MLPS)
            assert torch.equal(one, other)


def test_which_mlps_are_by_layers():
    """Those of few rows or many channels. In bfloat16 they round a result before its norm, which shows the way."""
    before, least = torch.get_num_threads(), 64 if OPS.cpu_instruction_set().endswith("amx") else 256
    try:
        for rows, threads, channels, expected in (
            (2 * least, 2, 64, False), (2 * least - 1, 2, 64, True), (2 * least - 1, 1, 64, False),
            (256, 1, 1024, False), (256, 1, 1026, True),
        ):  # fmt: skip
            torch.set_num_threads(threads)
            (w1, b1), (w2, b2) = (layer(*shape, 1, torch.bfloat16) for shape in ((channels, 400), (400, channels)))
            norm = norm_of(channels, "post", dtype=torch.bfloat16)
            given = (draw(rows, channels, dtype=torch.bfloat16), w1, b1, w2, b2, None, "none", norm)
            ways = [mlp(*given) for mlp in MLPS]
            assert not torch.equal(*ways)
            assert torch.equal(fused_mlp(*given, by_layers=None), ways[expected])
    finally:
        torch.set_num_threads(before)


def test_wrong_arguments():
    x, weight, bias = draw(3, 8), draw(4, 8), draw(4)
    for arguments, words in (
        ((x.double(), weight, bias, None, ""), "float32"),
        ((x, weight.half(), bias, None, ""), "float32"),
        ((x, weight[:, :7], bias, None, ""), "as many columns"),
        ((x, weight, bias[:3], None, ""), "one value for each row"),
        ((x, weight, bias, draw(3, 5), ""), "the result's shape"),
        ((x, weight, bias, None, "erf"), "gelu must be"),
        ((x, weight, bias, None, "", (None, None, "after", 1e-5)), "norm must be"),
        ((x, weight, bias, None, "", (None, None, "post", 1e-5)), "no norm after"),
        ((x, weight, bias, None, "", (draw(4), None, "pre", 1e-5)), "one value for each channel"),
        ((x, weight, bias, None, "", (None, draw(8).double(), "pre", 1e-5)), "float32"),
        ((x.bfloat16(), weight, bias, None, ""), "all of the map's dtype"),
        ((x, weight, bias.bfloat16(), None, ""), "all of the map's dtype"),
        ((x[:, :7].bfloat16(), weight[:, :7].bfloat16(), bias.bfloat16(), None, ""), "must be even, got 7"),
    ):
        with pytest.raises(RuntimeError, match=words):
            fused_linear(*arguments)
    total = _fused_linear._LINEAR_OP(x.requires_grad_(), weight, bias, None, None, None, "", "", 0.0).sum()
    with pytest.raises(NotImplementedError, match="no derivative"):
        total.backward()


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("placed", [torch.clone, behind_an_offset, every_second])
@pytest.mark.parametrize("index", range(8))
def test_freed_memory(index, placed):
    """A tensor whose memory was freed, as sharding and offloading do with parameters, raises an error."""
    (w1, b1), (w2, b2) = layer(24, 40, seed=1), layer(40, 24, seed=5)
    tensors = [draw(30, 24), w1, b1, w2, b2, draw(30, 24, seed=2), draw(24), draw(24)]
    tensors[index] = placed(tensors[index])
    tensors[index].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        fused_mlp(*tensors[:6], "none", (*tensors[6:], "pre", 1e-5))


def test_opcheck():
    (w1, b1), (w2, b2) = layer(24, 40, seed=1), layer(40, 24, seed=5)
    x = draw(2, 3, 24)
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    of_linear = (x, w1, b1, None, None, None, "none", "pre", 1e-5)
    torch.library.opcheck(OPS.fused_linear.default, of_linear, test_utils=names)
    torch.library.opcheck(
        OPS.fused_mlp.default,
        (x, w1, b1, w2, b2, x, draw(24), draw(24), "tanh", "post", 1e-5, True),
        test_utils=names,
    )


@pytest.mark.parametrize("name", instruction_sets.SETS)
def test_instruction_set(name):
    if name == OPS.cpu_instruction_set():
        pytest.skip("the other tests use these kernels")
    code = """
from tests.cpu import test_linear as tests
for dtype in tests.DTYPES:
    for rows in tests.ROWS:
        tests.test_norms(rows, dtype)
    for gelu in tests.GELUS:
        for rows in tests.ROWS:
            tests.test_linear(rows, gelu, dtype)
            tests.test_mlp(rows, gelu, dtype)
        tests.test_special_values(gelu, dtype)
    tests.test_both_ways_of_an_mlp_give_the_same_bits(dtype)
    tests.test_large(dtype)
    tests.test_strides_and_leading_axes(dtype)
for gelu in tests.GELUS[1:]:
    tests.test_gelu(gelu)
    tests.test_gelu_in_bfloat16(gelu)
"""
    instruction_sets.check_with(name, code)
