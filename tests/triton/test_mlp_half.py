"""Tests the Triton kernel of the MLP half against the reference, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

import swinkernels
from swinkernels import reference
from swinkernels.testing import assert_within_budget
from swinkernels.triton._mlp_half_kernels import gelu
from tests.support.triton_checks import DEVICE, ON_GPU, Checks

check = Checks(__name__)
ops = torch.ops.swinkernels
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


class Case(NamedTuple):
    """A call of the op: the shape and dtype of x, the dtype of the products, and the arguments that are given."""

    shape: tuple[int, ...] = (2, 5, 13, 96)  # two rows more than a program processes
    read: torch.dtype = F32
    product: torch.dtype = F32
    hidden: int = 4  # times the channels
    post: bool = False
    tanh: bool = False
    branch: bool = False
    bare: bool = False  # without the norm's parameters and the biases
    eps: float = 1e-5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def inputs(case: Case) -> dict[str, Tensor]:
    """Return random tensors for the op, with weights scaled so that products are about as large as their inputs."""
    c = case.shape[-1]
    hidden = case.hidden * c
    given = {
        "x": draw(*case.shape).to(case.read),
        "norm_weight": (1 + 0.3 * draw(c, seed=1)).to(case.read),
        "norm_bias": draw(c, seed=2).to(case.read),
        "fc1_weight": (c**-0.5 * draw(hidden, c, seed=3)).to(case.product),
        "fc1_bias": draw(hidden, seed=4).to(case.product),
        "fc2_weight": (hidden**-0.5 * draw(c, hidden, seed=5)).to(case.product),
        "fc2_bias": draw(c, seed=6).to(case.product),
        "branch": draw(*case.shape, seed=7).to(case.product),
    }
    absent = {"norm_weight", "norm_bias", "fc1_bias", "fc2_bias"} if case.bare else set()
    return {name: t for name, t in given.items() if name not in absent and (case.branch or name != "branch")}


def run(case: Case, given: dict[str, Tensor]) -> Tensor:
    names = ("x", "branch", "norm_weight", "norm_bias", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
    return ops.mlp_half_triton(*map(given.get, names), case.eps, case.post, case.tanh)


def exact(case: Case, given: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    options: dict[str, Any] = {"norm": "post" if case.post else "pre", "approximate": "tanh" if case.tanh else "none"}
    parameters = dict.fromkeys(("norm_weight", "norm_bias", "fc1_bias", "fc2_bias"))
    wide = {name: t.to(dtype) for name, t in given.items()}
    return reference.mlp_half(**{**parameters, **wide}, eps=case.eps, **options)


def check_case(case: Case, given: dict[str, Tensor] | None = None) -> Tensor:
    given = inputs(case) if given is None else given
    got = run(case, given)
    assert got.dtype == case.read and got.is_contiguous()
    # Products in a narrower dtype round z and the output of GELU, so the eps of this dtype sets the budget.
    eps = torch.finfo(case.product).eps
    assert_within_budget(got, exact(case, given, torch.float64), exact(case, given, F32), eps=eps, name=str(case))
    return got


PRE, POST = Case(), Case(post=True)
CASES = {
    "pre": PRE,
    "post": POST,
    "wide": Case((1, 7, 192)),
    "one_row": Case((1, 1, 96), post=True),
    "several_programs": Case((3, 100, 96), hidden=1),
    "branch": Case(branch=True),
    "branch_post": Case(branch=True, post=True),
    "bare": Case(bare=True),
    "bare_post": Case(bare=True, post=True, branch=True),
    "tanh": Case(tanh=True),
    "narrow_hidden": Case((5, 192), hidden=1),
    "eps": Case(eps=0.5),
    "eps_post": Case(eps=0.5, post=True),
    "fewest_channels": Case((3, 3, 32), hidden=1),
}
LOW = (F16, BF16) if ON_GPU else (F16,)


@check(*CASES, dtypes=(None,))
def in_float32(name):
    check_case(CASES[name])


@check(*CASES, dtypes=LOW)
def in_16_bits(name, dtype):
    check_case(CASES[name]._replace(read=dtype, product=dtype))


@check("pre", "post", "branch", "wide", dtypes=LOW)
def a_float32_stream_and_narrow_products(name, dtype):
    check_case(CASES[name]._replace(product=dtype))


@check("pre", "post", dtypes=(F32,))
def a_large_mean_leaves_the_variance(name, dtype):
    case = CASES[name]
    given = inputs(case)
    large = "fc2_bias" if case.post else "x"
    given[large] = 1000 + given[large]
    check_case(case, given)


@check("pre", "post", dtypes=(F16,))
def rows_do_not_depend_on_others(name, dtype):
    """A row's result is bit-identical if a different program computes it, or if other rows are missing or NaN."""
    case = CASES[name]._replace(read=dtype, product=dtype)
    given = inputs(case)
    rows = {**given, "x": given["x"].flatten(0, -2)}
    whole = run(case, rows)
    torch.testing.assert_close(run(case, {**rows, "x": rows["x"][-3:]}), whole[-3:], rtol=0, atol=0)
    rows["x"][-3:] = float("nan")
    torch.testing.assert_close(run(case, rows)[:-3], whole[:-3], rtol=0, atol=0)


@check("x", "fc1_weight", "fc2_weight", "norm_weight", "branch", dtypes=(F16,))
def strided_arguments(name, dtype):
    case = CASES["branch"]._replace(read=dtype, product=dtype)
    given = inputs(case)
    expected = run(case, given)
    strided = torch.stack([given[name], given[name]], dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(run(case, {**given, name: strided}), expected)


@check(dtypes=(F32,))
def an_empty_batch(dtype):
    given = inputs(PRE)
    assert run(PRE, {**given, "x": given["x"][:0]}).shape == (0, *PRE.shape[1:])


@check((40, 128), (96, 48), dtypes=(None,))
def other_widths_are_refused(channels, hidden):
    weights = torch.zeros(hidden, channels, device=DEVICE), torch.zeros(channels, hidden, device=DEVICE)
    x = torch.zeros(2, channels, device=DEVICE)
    with pytest.raises(
        ValueError, match=rf"mlp_half: .* the sum of two powers of two .*, got .*\({hidden}, {channels}\)"
    ):
        ops.mlp_half_triton(x, None, None, None, weights[0], None, weights[1], None, 1e-5, False, False)


@check(dtypes=(F32,))
def opcheck(dtype):
    case = CASES["fewest_channels"]
    arguments = [inputs(case)[name] for name in ("x", "norm_weight", "norm_bias")]
    weights = [inputs(case)[name] for name in ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")]
    torch.library.opcheck(
        ops.mlp_half_triton.default, (arguments[0], None, *arguments[1:], *weights, 1e-5, False, False)
    )


@check("x", "fc2_bias", dtypes=(F32,))
def a_derivative_is_refused(name, dtype):
    given = inputs(CASES["fewest_channels"])
    given[name].requires_grad_()
    with pytest.raises(NotImplementedError, match=r"mlp_half_triton has no derivative: .* torch\.no_grad\(\)"):
        run(CASES["fewest_channels"], given).sum().backward()


# ---- GELU ------------------------------------------------------------------------------------------------------------


@triton.jit
def _apply_gelu(x, y, FORM: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, gelu(tl.load(x + at), FORM))


def _gelu(x: Tensor, form: str) -> Tensor:
    y = torch.empty_like(x)
    _apply_gelu[(len(x) // 1024,)](x, y, FORM=form, BLOCK=1024)
    return y


@check(*itertools.product(("tail", "tanh"), (F16, BF16)), dtypes=(None,))
def gelu_of_every_number(form, dtype):
    """GELU, rounded to 16 bits, has an error of at most 0.8 units in the last place plus 5e-10.

    A correctly rounded result has an error of at most 0.5 units.
    """
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    got = _gelu(every.float().to(DEVICE), form).cpu()
    finite = every.isfinite()
    x, y = every[finite].double(), got[finite].to(dtype)
    wide = F.gelu(x, approximate="tanh") if form == "tanh" else x * torch.special.ndtr(x)
    error = (y.double() - wide).abs()
    _, exponent = torch.frexp(wide)
    info = torch.finfo(dtype)
    unit = (info.eps * torch.exp2(exponent - 1.0)).clamp(min=info.eps * info.tiny)
    assert (error <= 0.8 * unit + 5e-10).all(), (x[error > 0.8 * unit + 5e-10], (error / unit).max())
    single = F.gelu(x.float(), approximate="tanh" if form == "tanh" else "none")
    assert_within_budget(y, wide, single, name=form)
    if form == "tail":
        edges = torch.tensor([torch.inf, -torch.inf] * 512, device=DEVICE)
        assert _gelu(edges, form)[:2].tolist() == [torch.inf, 0.0]
    assert got[every.isnan()].isnan().all()


# ---- the public function ---------------------------------------------------------------------------------------------


def half(given: dict[str, Tensor], **options: Any) -> Tensor:
    return swinkernels.mlp_half(**{"norm_weight": None, "norm_bias": None, "fc1_bias": None, "fc2_bias": None, **given},
                                **options)  # fmt: skip


@check("pre", "post", "branch", "branch_post", "bare", "tanh", dtypes=(F16,))
@torch.no_grad()
def the_public_function(name, dtype):
    case = CASES[name]._replace(read=dtype, product=dtype)
    given = inputs(case)
    options: dict[str, Any] = {"norm": "post" if case.post else "pre", "approximate": "tanh" if case.tanh else "none"}
    got = half(given, backend="triton", **options)
    assert_within_budget(got, exact(case, given, torch.float64), exact(case, given, F32), name=name)


@check(dtypes=(F16,))
@torch.no_grad()
def layer_scale_and_autocast(dtype):
    given = inputs(PRE)
    scale = draw(96, seed=8)
    with torch.autocast(DEVICE, dtype):
        got = half(given, layer_scale=scale, backend="triton")
    assert got.dtype == F32
    wide = {name: t.double() for name, t in given.items()}
    expected = half(wide, layer_scale=scale.double(), backend="reference")
    assert_within_budget(got, expected, expected.float(), eps=torch.finfo(dtype).eps, name="autocast")


@check(dtypes=(F16,))
def what_the_kernel_does_not_have_is_named(dtype):
    case = PRE._replace(read=dtype, product=dtype)
    given = inputs(case)
    d = torch.ones(2, device=DEVICE)

    def reason(changes: dict[str, Any] | None = None, **options: Any) -> str:
        with pytest.raises(NotImplementedError, match="mlp_half: backend='triton' cannot run this call: ") as error:
            half({**given, **(changes or {})}, backend="triton", **options)
        return str(error.value)

    assert "implement drop_path_scale." in reason(drop_path_scale=d)
    assert "implement branch_scale." in reason(branch=given["x"], branch_scale=d)
    assert "implement layer_scale with norm='post'." in reason(layer_scale=given["norm_bias"], norm="post")
    assert "implement residual=False." in reason(residual=False)
    learns = given["fc1_bias"].clone().requires_grad_()
    assert "implement gradients (use torch.no_grad())." in reason({"fc1_bias": learns})
    with torch.no_grad():
        half({**given, "fc1_bias": learns}, backend="triton")
    single = inputs(PRE)
    assert "no kernel that reads torch.float32 and multiplies torch.float32" in reason(single)
    narrow = inputs(Case((3, 48), read=dtype, product=dtype, hidden=1))
    message = reason(narrow)
    assert "it takes 96 or 192 channels, got 48" in message and "a multiple of 32 hidden channels, got 48" in message


@check(dtypes=(F16,))
@torch.no_grad()
def auto_takes_what_is_measured(dtype):
    """backend="auto" does not choose the kernel, because it has not been timed yet."""
    given = inputs(PRE._replace(read=dtype, product=dtype))
    expected = half(given, backend="cuda" if ON_GPU else "torch")
    assert torch.equal(half(given), expected)


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements():
    """The last rows give the same result as on their own, because a program's offsets are 64 bits wide."""
    given = inputs(Case((1, 96), BF16, BF16))
    x = torch.randint(-100, 100, (2**31 // 96 + 1000, 96), dtype=torch.int8, device="cuda").bfloat16()
    assert x.numel() > 2**31
    case = Case(read=BF16, product=BF16)
    assert torch.equal(run(case, {**given, "x": x})[-500:], run(case, {**given, "x": x[-500:]}))
