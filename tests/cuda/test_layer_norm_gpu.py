"""Tests the norms on a real GPU: the ops case by case as in the emulator, and the public functions that use them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import swinkernels
from swinkernels.ops import _backends
from tests.cuda.test_layer_norm_emulated import (
    EXPANDING,
    FAR_FROM_ZERO,
    KINDS,
    LONGEST,
    MERGING,
    ORDERS,
    REPEATED,
    RESIDUAL,
    ROWS,
    kind,
    plain,
)
from tests.support.norm_checks import BF16, EPS, F16, F32, NORM_PAIRS, PAIRS, NormCase, call, check, in_every_pair

UNAVAILABLE = _backends.unavailable("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))]

DEVICE = "cuda"
OPS = torch.ops.swinkernels

# Calls of published models at the shapes that have a speed goal, with smaller batches.
MODELS = [
    NormCase("patch_merging_norm", (4, 56, 56, 96), factor=(1, 2, 2)),
    NormCase("patch_merging_norm", (4, 28, 28, 192), factor=(1, 2, 2)),
    NormCase("patch_merging_norm", (1, 48, 48, 48, 48), factor=(2, 2, 2)),
    NormCase("layer_norm", (2, 28, 28, 4 * 192), factor=(1, 2, 2)),
    NormCase("layer_norm", (1, 14, 14, 16 * 96), factor=(1, 4, 4)),
    plain(4, 56 * 56, 96),
    plain(64, 49, 768),
    NormCase("residual_layer_norm", (4, 56, 56, 96), has_drop_path=True),
    NormCase("residual_layer_norm", (2, 28, 28, 192)),
    NormCase("residual_post_norm", (4, 56, 56, 96), has_drop_path=True),
    NormCase("residual_post_norm", (3, 8, 8, 1536)),
]


@pytest.mark.parametrize("case", in_every_pair(MODELS, PAIRS), ids=str)
def test_models(case: NormCase) -> None:
    check(OPS, case, DEVICE)


@pytest.mark.parametrize(
    "case",
    [
        *in_every_pair(ROWS, NORM_PAIRS),
        *in_every_pair(EXPANDING, NORM_PAIRS),
        *in_every_pair(MERGING, PAIRS),
        *in_every_pair(ORDERS, [(BF16, BF16), (F32, F32)]),
        *in_every_pair(REPEATED, PAIRS),
        *in_every_pair(RESIDUAL, PAIRS),
        *LONGEST,
        *FAR_FROM_ZERO,
        *(replace(case, has_weight=False, has_bias=False) for case in KINDS),
        *(replace(case, parameter_dtype=dtype) for case in KINDS for dtype in (F16, BF16)),
        *(replace(case, shape=(0, *case.shape[1:])) for case in KINDS),
    ],
    ids=str,
)
def test_cases(case: NormCase) -> None:
    check(OPS, case, DEVICE)


@pytest.mark.parametrize("case", in_every_pair(MODELS, [(BF16, BF16), (F32, F16)]), ids=str)
def test_same_input_same_bits(case: NormCase) -> None:
    inputs = {name: x.to(DEVICE) for name, x in replace(case, shape=(16, *case.shape[1:])).inputs().items()}
    first = call(OPS, case, inputs)
    for _ in range(3):
        again = call(OPS, case, inputs)
        for name, value in first.items():
            assert torch.equal(again[name], value), name


def spread(x: Tensor) -> Tensor:
    """Return a copy of ``x`` that is neither contiguous nor aligned."""
    memory = x.new_empty(2 * x.numel() + 1)
    view = memory[1:].view(*x.shape, 2)[..., 0]
    return view.copy_(x)


@pytest.mark.parametrize("pair", [(BF16, BF16), (F32, BF16)], ids=str)
@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_any_strides_and_nothing_is_modified(case: NormCase, pair: tuple[torch.dtype, torch.dtype]) -> None:
    case = replace(case, pair=pair)
    dense = {name: x.to(DEVICE) for name, x in case.inputs().items()}
    strided = {name: spread(x) for name, x in dense.items()}
    off_by_one = {name: x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x) for name, x in dense.items()}
    expected = call(OPS, case, dense)
    for inputs in (strided, off_by_one):
        before = {name: x.clone() for name, x in inputs.items()}
        for name, value in call(OPS, case, inputs).items():
            assert torch.equal(value, expected[name]), name
        for name, x in inputs.items():
            assert torch.equal(x, before[name]), name


@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_opcheck(case: NormCase) -> None:
    inputs = {name: x.to(DEVICE) for name, x in case.inputs().items()}
    calls: list[tuple[str, tuple[Any, ...]]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            def run(*args: Any) -> Any:
                calls.append((name, args))
                return getattr(OPS, name)(*args)

            return run

    call(Recorder(), case, inputs)
    assert len(calls) == 2
    differentiable = {"x", "y", "weight", "bias"}
    for name, args in calls:
        if name.endswith("_fwd"):
            wanted = [inputs[n] for n in differentiable if n in inputs]
            args = tuple(a.clone().requires_grad_() if any(a is w for w in wanted) else a for a in args)
        torch.library.opcheck(getattr(OPS, name).default, args)


def draw(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def norm_parameters(length: int, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {f"{prefix}weight": (length,), f"{prefix}bias": (length,)}


# The public functions and their tensor arguments, all of which require a gradient.
PUBLIC: dict[str, tuple[Callable[..., Any], dict[str, Tensor]]] = {
    "layer_norm": (swinkernels.layer_norm, draw(x=(2, 9, 7, 96), **norm_parameters(96))),
    "patch_merging": (
        swinkernels.patch_merging,
        draw(x=(2, 9, 7, 96), **norm_parameters(384, "norm_"), weight=(192, 384)),
    ),
    "patch_merging, post": (
        lambda *args, **kwargs: swinkernels.patch_merging(*args, **kwargs, norm="post"),
        draw(x=(2, 9, 7, 96), **norm_parameters(192, "norm_"), weight=(192, 384)),
    ),
    "patch_merging, unfold, 3D": (
        lambda *args, **kwargs: swinkernels.patch_merging(*args, **kwargs, order="unfold"),
        draw(x=(1, 5, 6, 4, 24), **norm_parameters(192, "norm_"), weight=(48, 192)),
    ),
    "patch_merging, legacy": (
        lambda *args, **kwargs: swinkernels.patch_merging(*args, **kwargs, order="monai_legacy"),
        draw(x=(1, 5, 6, 3, 24), **norm_parameters(192, "norm_"), weight=(48, 192)),
    ),
    "patch_expanding": (
        swinkernels.patch_expanding,
        draw(x=(2, 5, 7, 96), **norm_parameters(48, "norm_"), weight=(192, 96)),
    ),
    "residual_layer_norm": (
        swinkernels.residual_layer_norm,
        draw(x=(3, 8, 5, 96), y=(3, 8, 5, 96), **norm_parameters(96)),
    ),
    "residual_post_norm": (
        swinkernels.residual_post_norm,
        draw(x=(3, 8, 5, 96), y=(3, 8, 5, 96), **norm_parameters(96)),
    ),
}


def run_public(name: str, inputs: dict[str, Tensor], backend: str) -> list[Tensor]:
    """Call a public function; return its results and the gradients of all inputs."""
    function, _ = PUBLIC[name]
    leaves = {n: x.detach().clone().requires_grad_() for n, x in inputs.items()}
    # Arguments are positional, because patch_merging and patch_expanding name them differently.
    order = ["x", "y", "weight", "bias"]
    if "norm_weight" in leaves:
        order = ["x", "norm_weight", "norm_bias", "weight"]
        if name == "patch_expanding":
            order = ["x", "weight", "norm_weight", "norm_bias"]
    out = function(*(leaves[n] for n in order if n in leaves), backend=backend)
    outs = list(out) if isinstance(out, tuple) else [out]
    g = torch.Generator().manual_seed(1)
    douts = [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, list(leaves.values()), douts)]


def assert_close(got: list[Tensor], exact: list[Tensor], eps: float) -> None:
    """Check that relative errors are at most ``eps``, a wide tolerance: tests above check each op's error budget."""
    for i, (g, e) in enumerate(zip(got, exact, strict=True)):
        assert g.shape == e.shape
        error = (g.cpu().double() - e.double()).norm() / e.double().norm()
        assert error <= eps, f"result {i}: {error / eps:.2f} of the allowed error"


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_public_functions(name: str, dtype: torch.dtype) -> None:
    inputs = {n: x.to(dtype) for n, x in PUBLIC[name][1].items()}
    exact = run_public(name, {n: x.double() for n, x in inputs.items()}, "reference")
    got = run_public(name, {n: x.to(DEVICE) for n, x in inputs.items()}, "cuda")
    assert all(g.dtype == dtype for g in got)
    assert_close(got, exact, {F32: 16, F16: 1, BF16: 1}[dtype] * torch.finfo(dtype).eps)


@pytest.mark.parametrize("low", [F16, BF16], ids=str)
@pytest.mark.parametrize("name", PUBLIC)
def test_autocast(name: str, low: torch.dtype) -> None:
    """Parameters and residual stream are float32; the input and output of a Linear have the autocast dtype."""
    inputs = {n: x.to(DEVICE) for n, x in PUBLIC[name][1].items()}
    if "y" in inputs:
        inputs["y"] = inputs["y"].to(low)  # the output of the branch's last Linear
    exact = run_public(name, {n: x.cpu().double() for n, x in inputs.items()}, "reference")
    with torch.autocast(DEVICE, low):
        got = run_public(name, inputs, "cuda")
    outs = len(got) - len(inputs)
    expected = {
        "residual_layer_norm": [F32, low],
        "patch_merging": [low],
        "patch_merging, unfold, 3D": [low],
        "patch_merging, legacy": [low],
    }.get(name, [F32])
    assert [g.dtype for g in got[:outs]] == expected
    assert [g.dtype for g in got[outs:]] == [x.dtype for x in inputs.values()]
    assert_close(got, exact, 2 * torch.finfo(low).eps)


@pytest.mark.parametrize("name", PUBLIC)
def test_auto_takes_the_kernels(name: str) -> None:
    inputs = {n: x.to(DEVICE, BF16) for n, x in PUBLIC[name][1].items()}
    for got, wanted in zip(run_public(name, inputs, "auto"), run_public(name, inputs, "cuda"), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("case", in_every_pair(KINDS, [(F32, BF16)]), ids=kind)
def test_side_stream_and_cuda_graph(case: NormCase) -> None:
    case = replace(case, shape=(8, *case.shape[1:]))
    inputs, others = ({n: x.to(DEVICE) for n, x in case.inputs(seed).items()} for seed in (0, 1))
    expected, different = (call(OPS, case, x) for x in (inputs, others))
    static = {n: x.clone() for n, x in inputs.items()}
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call(OPS, case, static)
    stream.synchronize()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = call(OPS, case, static)
    for source, wanted in ((others, different), (inputs, expected)):
        for name, x in static.items():
            x.copy_(source[name])
        graph.replay()
        for name, value in wanted.items():
            assert torch.equal(captured[name], value), name


@pytest.mark.parametrize(
    "case",
    [
        plain(7200, 56 * 56, 96),
        NormCase("patch_merging_norm", (7200, 56, 56, 96), factor=(1, 2, 2)),
        NormCase("layer_norm", (7200, 14, 14, 16 * 96), factor=(1, 4, 4)),
        NormCase("residual_layer_norm", (7200, 56, 56, 96)),
        NormCase("residual_post_norm", (7200, 56, 56, 96)),
    ],
    ids=kind,
)
def test_more_than_two_to_the_31_elements(case: NormCase) -> None:
    """The last images of a huge batch give the same results as in a batch of their own."""
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    case = replace(case, pair=(BF16, BF16), has_weight=False, has_bias=False)
    g = torch.Generator(DEVICE).manual_seed(0)

    def random(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=BF16, generator=g)

    x = random(case.shape)
    assert x.numel() > 2**31
    whole = {"x": x}
    if case.op.startswith("residual"):
        whole |= {"y": random(case.shape), "ds": random(case.shape)}
    if case.op != "residual_post_norm":
        whole["dz"] = random(tuple(case.rows(torch.empty(case.shape, device="meta")).shape))
    last = {name: t[-2:].clone() for name, t in whole.items()}
    expected = call(OPS, replace(case, shape=(2, *case.shape[1:])), last)
    for name, value in call(OPS, case, whole).items():
        assert torch.equal(value[-2:], expected[name]), name


def test_rows_that_are_too_long_say_so() -> None:
    x = torch.zeros(2, 8193, device=DEVICE)
    with pytest.raises(NotImplementedError, match="at most 8192 elements"):
        swinkernels.layer_norm(x, backend="cuda")
    torch.testing.assert_close(swinkernels.layer_norm(x, eps=EPS), torch.zeros_like(x))
