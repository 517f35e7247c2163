"""Tests the C++ kernels of Linear layers and MLPs: shapes, strides, GELU, special values, threads, instruction sets."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from swinkernels import _extension
from swinkernels.ops import _fused_linear  # registers the ops' fake kernels
from swinkernels.testing import assert_within_budget

pytestmark = pytest.mark.skipif(_extension.error is not None, reason=str(_extension.error))

ROOT = Path(__file__).resolve().parents[2]
OPS = torch.ops.swinkernels
GELUS = ["", "none", "tanh"]
# A vector has up to 16 lanes, a panel up to 64 rows, a block up to 128, and a tail up to 4; a slice of the weight is 48
# by 256, and an MLP computes 192 hidden channels at a time.
ROWS = [1, 7, 16, 33, 34, 64, 128, 129, 131, 300]
IN = [1, 8, 31, 256, 257, 600]
OUT = [1, 8, 47, 48, 100, 193]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1000 * sum(shape)))


def layer(of: int, into: int, seed: int) -> tuple[Tensor, Tensor]:
    return draw(into, of, seed=seed) / of**0.5, draw(into, seed=seed + 1)


def activate(x: Tensor, gelu: str) -> Tensor:
    return F.gelu(x, approximate=gelu) if gelu else x


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, gelu: str) -> Tensor:
    y = activate(F.linear(x, weight, bias), gelu)
    return y if residual is None else residual + y


def plain_mlp(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None, *rest) -> Tensor:
    residual, gelu = rest
    return plain_linear(activate(F.linear(x, w1, b1), gelu), w2, b2, residual, "")


def check(op, plain, *arguments) -> Tensor:
    def as_double(x):
        return x.double() if isinstance(x, Tensor) else x

    y, exact = op(*arguments), plain(*map(as_double, arguments))
    if y.numel() >= 500:
        assert_within_budget(y, exact, lambda: plain(*arguments))
    else:  # too few results to compare mean errors
        torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=4e-6)
    return y


@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("rows", ROWS)
def test_linear(rows, gelu):
    for of, into in itertools.product(IN, OUT):
        weight, bias = layer(of, into, seed=1)
        x, residual = draw(rows, of, seed=3), draw(rows, into, seed=4)
        odd = (of + into) % 2 == 1
        check(OPS.fused_linear, plain_linear, x, weight, bias if odd else None, None if odd else residual, gelu)


@pytest.mark.parametrize("gelu", GELUS)
@pytest.mark.parametrize("rows", ROWS)
def test_mlp(rows, gelu):
    for of, hidden, into in itertools.product([1, 31, 257], [5, 192, 500], [1, 48, 100]):
        (w1, b1), (w2, b2) = layer(of, hidden, seed=1), layer(hidden, into, seed=5)
        x, residual = draw(rows, of, seed=3), draw(rows, into, seed=4)
        odd = (of + hidden + into) % 2 == 1
        biases = (b1, None) if odd else (None, b2)
        check(OPS.fused_mlp, plain_mlp, x, w1, biases[0], w2, biases[1], residual if odd else None, gelu)


def test_large():
    """Several blocks, whose columns are divided into tasks or not; the rows of an MLP's block depend on its width."""
    for rows, of, into in ((3000, 96, 288), (200, 384, 1536), (49, 1536, 384), (49, 768, 2304)):
        weight, bias = layer(of, into, seed=1)
        x = draw(rows, of)
        check(OPS.fused_linear, plain_linear, x, weight, bias, None, "none")
        w2, b2 = layer(into, of, seed=2)
        check(OPS.fused_mlp, plain_mlp, x, weight, bias, w2, b2, x, "none")


def behind_an_offset(x: Tensor) -> Tensor:
    """Return a contiguous copy of x that lies one element behind the start of its memory."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def test_strides_and_leading_axes():
    (w1, b1), (w2, b2) = layer(24, 40, seed=1), layer(40, 24, seed=5)
    x = draw(2, 5, 24, 6).transpose(2, 3)
    residual = draw(2, 24, 6, 5).permute(0, 3, 2, 1)
    wide = torch.stack([w1, -w1], 1).flatten(1)[:, :24]  # rows are 48 apart
    for weight in (w1, wide, w1.t().contiguous().t(), behind_an_offset(w1)):
        bias = torch.stack([b1, -b1], 1)[:, 0]
        y = OPS.fused_mlp(x, weight, bias, w2, b2, residual, "tanh")
        assert y.is_contiguous()
        torch.testing.assert_close(y, plain_mlp(x, weight, bias, w2, b2, residual, "tanh"))
        torch.testing.assert_close(OPS.fused_linear(x, weight, bias, None, ""), F.linear(x, weight, bias))
    assert OPS.fused_linear(x[0, 0, 0], w1, b1, None, "").shape == (40,)


def test_nothing():
    """Without rows the result is empty; without input or hidden channels it is the bias."""
    weight, bias = layer(8, 4, seed=1)
    assert OPS.fused_linear(draw(0, 8), weight, bias, None, "").shape == (0, 4)
    assert OPS.fused_mlp(draw(3, 0, 8), weight, bias, weight.t(), None, None, "none").shape == (3, 0, 8)
    assert OPS.fused_linear(draw(3, 8), weight[:0], None, None, "").shape == (3, 0)
    torch.testing.assert_close(OPS.fused_linear(draw(3, 0), weight[:, :0], bias, None, ""), bias.expand(3, 4))
    y = OPS.fused_mlp(draw(3, 8), weight[:0], None, weight[:, :0], bias, None, "none")
    torch.testing.assert_close(y, bias.expand(3, 4))


@pytest.mark.parametrize("gelu", ["none", "tanh"])
def test_gelu(gelu):
    """Every part of the range, and at least as exact as torch's, relative to the result wherever that is above -3."""
    x = torch.cat([torch.linspace(-20, 20, 400001), torch.logspace(-40, 38, 1000), -torch.logspace(-40, 38, 1000)])
    exact = F.gelu(x.double(), approximate=gelu)
    errors = [
        (y.double() - exact).abs()
        for y in (OPS.fused_linear(x[:, None], torch.ones(1, 1), None, None, gelu)[:, 0], F.gelu(x, approximate=gelu))
    ]
    middle = x.abs() <= 20
    assert errors[0][middle].max() <= 1.25 * errors[1][middle].max()
    near = (x > -3) & (x != 0)
    # The smallest normal number bounds the errors of results below it.
    assert (errors[0] / exact.abs().clamp(min=2.0**-126))[near].max() < 1.2e-6
    assert errors[0][x <= -20].max() < 1e-30


@pytest.mark.parametrize("gelu", GELUS)
def test_special_values(gelu):
    """NaN stays NaN, and GELU of an infinity is its limit; only their own rows are affected."""
    x = draw(40, 16)
    weight, bias = layer(16, 24, seed=1)
    expected = OPS.fused_linear(x, weight, bias, None, gelu)
    x[3, 5], x[17, 0] = torch.nan, torch.inf
    got = OPS.fused_linear(x, weight, bias, None, gelu)
    others = [i for i in range(40) if i not in (3, 17)]
    torch.testing.assert_close(got[others], expected[others], rtol=0, atol=0)
    assert got[3].isnan().all()
    limits = weight[:, 0] * torch.inf
    torch.testing.assert_close(got[17], limits if gelu == "" else limits.clamp(min=0), rtol=0, atol=1e-30)


def test_results_do_not_depend_on_threads_or_other_rows():
    x, (w1, b1), (w2, b2) = draw(700, 96), layer(96, 384, seed=1), layer(384, 96, seed=5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append((OPS.fused_linear(x, w1, b1, None, "none"), OPS.fused_mlp(x, w1, b1, w2, b2, x, "none")))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))
    for rows in (slice(5, 6), slice(100, 333), slice(7, 57), slice(0, 67)):
        assert torch.equal(OPS.fused_linear(x[rows], w1, b1, None, "none"), results[0][0][rows])
        assert torch.equal(OPS.fused_mlp(x[rows], w1, b1, w2, b2, x[rows], "none"), results[0][1][rows])


def test_wrong_arguments():
    x, weight, bias = draw(3, 8), draw(4, 8), draw(4)
    for arguments, words in (
        ((x.double(), weight, bias, None, ""), "float32"),
        ((x, weight.half(), bias, None, ""), "float32"),
        ((x, weight[:, :7], bias, None, ""), "as many columns"),
        ((x, weight, bias[:3], None, ""), "one value for each row"),
        ((x, weight, bias, draw(3, 5), ""), "the result's shape"),
        ((x, weight, bias, None, "erf"), "gelu must be"),
    ):
        with pytest.raises(RuntimeError, match=words):
            OPS.fused_linear(*arguments)
    with pytest.raises(NotImplementedError, match="no derivative"):
        _fused_linear._LINEAR_OP(x.requires_grad_(), weight, bias, None, "").sum().backward()


def every_second(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


@pytest.mark.parametrize("placed", [torch.clone, behind_an_offset, every_second])
@pytest.mark.parametrize("index", range(6))
def test_freed_memory(index, placed):
    """A tensor whose memory was freed, as sharding and offloading do with parameters, raises an error."""
    (w1, b1), (w2, b2) = layer(24, 40, seed=1), layer(40, 24, seed=5)
    tensors = [draw(30, 24), w1, b1, w2, b2, draw(30, 24, seed=2)]
    tensors[index] = placed(tensors[index])
    tensors[index].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has been freed"):
        OPS.fused_mlp(*tensors, "none")


def test_opcheck():
    (w1, b1), (w2, b2) = layer(24, 40, seed=1), layer(40, 24, seed=5)
    x = draw(2, 3, 24)
    names = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.fused_linear.default, (x, w1, b1, None, "none"), test_utils=names)
    torch.library.opcheck(OPS.fused_mlp.default, (x, w1, b1, w2, b2, x, "tanh"), test_utils=names)


ISA_CASES = """
import os, sys
import torch
from tests.cpu import test_linear as tests
try:
    used = torch.ops.swinkernels.cpu_instruction_set()
except (RuntimeError, ValueError) as error:
    print(error)
    sys.exit(77)
assert used == os.environ["SWINKERNELS_CPU_ISA"]
for gelu in tests.GELUS:
    for rows in tests.ROWS:
        tests.test_linear(rows, gelu)
        tests.test_mlp(rows, gelu)
    tests.test_special_values(gelu)
for gelu in tests.GELUS[1:]:
    tests.test_gelu(gelu)
tests.test_large()
"""


@pytest.mark.parametrize("name", ["baseline", "avx2", "avx512"])
def test_instruction_set(name):
    if name == OPS.cpu_instruction_set():
        pytest.skip("the other tests use these kernels")
    environ = {**os.environ, "SWINKERNELS_CPU_ISA": name, "OMP_NUM_THREADS": "1"}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", ISA_CASES]
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode == 77:
        assert "SWINKERNELS_CPU_ISA must be an instruction set that this machine supports" in done.stdout
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
