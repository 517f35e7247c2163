"""Tests the CUDA kernels of the norms, run on the CPU by the emulator, against the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from swinkernels import reference
from swinkernels.reference.patch_merging import ORDERS as MERGING_ORDERS
from tests import emulation
from tests.emulation.layer_norm import LayerNormLibrary, layer_norm_library
from tests.support.norm_checks import BF16, F16, F32, NORM_PAIRS, PAIRS, NormCase, call, check, in_every_pair

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))


@pytest.fixture
def library() -> Iterator[LayerNormLibrary]:
    built = layer_norm_library()
    built.configure()
    yield built
    built.configure()


def plain(*shape: int) -> NormCase:
    return NormCase("layer_norm", shape)


def merging(*shape: int, factor: tuple[int, int, int] = (1, 2, 2), order: str | tuple[int, ...] = "swin") -> NormCase:
    return NormCase("patch_merging_norm", shape, factor=factor, order=order)


def expanding(*shape: int, factor: tuple[int, int, int] = (1, 2, 2)) -> NormCase:
    return NormCase("layer_norm", shape, factor=factor)


# Rows of 1 to 2,304 elements: single elements, vectors of four and eight, few and many vectors per thread, one thread
# to several warps per row, with and without idle lanes.
LENGTHS = (1, 3, 8, 30, 40, 96, 97, 100, 128, 180, 768, 1536, 2304)
ROWS = [plain(72), *(plain(3, 5, length) for length in LENGTHS)]
MERGING = [
    merging(2, 4, 6, 96),
    merging(1, 5, 7, 1),
    merging(2, 5, 4, 3),
    merging(1, 3, 5, 30),
    merging(2, 7, 3, 32),
    merging(1, 1, 1, 97),
    merging(1, 3, 4, 128),
    merging(1, 1, 5, 384),
]
# Every order of neighbours: in 2D, in 3D without merging along the first axis, and in full 3D.
ORDERS = [
    merging(*shape, factor=factor, order=order)
    for order in MERGING_ORDERS
    for shape, factor in (((1, 5, 6, 24), (1, 2, 2)), ((1, 3, 4, 5, 8), (1, 2, 2)), ((2, 3, 4, 5, 12), (2, 2, 2)))
]
# Orders that repeat some neighbours, whose dx is a sum, and omit others, whose dx is zero.
REPEATED = [
    merging(1, 3, 4, 3, 3, factor=(2, 2, 2), order="monai_legacy"),
    merging(2, 3, 5, 16, order=(3, 3, 3, 3)),
    merging(1, 4, 4, 5, order=(0, 2, 2, 0)),
    merging(1, 2, 3, 4, 8, factor=(2, 2, 2), order=(5, 5, 0, 7, 5, 0, 1, 5)),
]
EXPANDING = [
    expanding(2, 3, 5, 4 * 96),
    expanding(1, 1, 1, 4 * 97),
    expanding(2, 1, 3, 16 * 24, factor=(1, 4, 4)),
    expanding(1, 2, 3, 2, 8 * 30, factor=(2, 2, 2)),
    expanding(2, 3, 2, 1, 4 * 16, factor=(1, 2, 2)),
    expanding(1, 3, 2, 30, factor=(1, 1, 3)),
]
RESIDUAL = [
    NormCase(op, shape, has_drop_path=drop_path)
    for op in ("residual_layer_norm", "residual_post_norm")
    for shape, drop_path in (
        ((3, 5, 96), True),
        ((2, 3, 3, 128), False),
        ((3, 2, 97), True),
        ((2, 3, 1), False),
        ((4, 3, 30), True),
        ((2, 3, 100), True),
        ((3, 768), False),
        ((2, 2, 1536), True),
    )
]


@pytest.mark.parametrize("case", in_every_pair(ROWS, NORM_PAIRS), ids=str)
def test_rows(library, case):
    check(library, case)


@pytest.mark.parametrize("case", in_every_pair(MERGING, PAIRS), ids=str)
def test_merging(library, case):
    check(library, case)


@pytest.mark.parametrize("case", in_every_pair(ORDERS, [(BF16, BF16), (F32, F32)]), ids=str)
def test_orders(library, case):
    check(library, case)


@pytest.mark.parametrize("case", in_every_pair(REPEATED, PAIRS), ids=str)
def test_repeated_neighbours(library, case):
    check(library, case)


@pytest.mark.parametrize("case", in_every_pair(EXPANDING, NORM_PAIRS), ids=str)
def test_expanding(library, case):
    check(library, case)


@pytest.mark.parametrize("case", in_every_pair(RESIDUAL, PAIRS), ids=str)
def test_residual(library, case):
    check(library, case)


@pytest.mark.parametrize("case", [c for c in ORDERS if len(c.shape) == 5 and c.order != "unfold"], ids=str)
def test_rows_of_the_checks_are_those_of_the_reference(case):
    x = case.inputs()["x"].double()
    width = case.rows(x).shape[-1]
    weight = torch.eye(width, dtype=torch.float64)
    expected = reference.patch_merging(x, None, None, weight, order=case.order)
    torch.testing.assert_close(reference.layer_norm(case.rows(x)), expected)


@pytest.mark.parametrize("case", [EXPANDING[0], EXPANDING[2], EXPANDING[3]], ids=str)
def test_parts_of_the_checks_are_those_of_the_reference(case):
    x = case.inputs()["x"].double()
    expected = reference.patch_expanding(x, None, None, None, factor=case.factor[5 - len(case.shape) :])
    torch.testing.assert_close(reference.layer_norm(case.rows(x)), expected)


# One small case of each op and layout, in vectors and in single elements.
KINDS = [
    plain(2, 5, 96),
    merging(1, 3, 6, 48),
    expanding(1, 3, 2, 4 * 64),
    NormCase("residual_layer_norm", (3, 4, 192), has_drop_path=True),
    NormCase("residual_post_norm", (3, 4, 192), has_drop_path=True),
]


def kind(case: NormCase) -> str:
    return case.op + "".join(f"-{f}" for f in case.factor)


@pytest.mark.parametrize("parameters", ["weight", "bias", "none"])
@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_without_some_parameters(library, case, parameters):
    check(library, replace(case, has_weight=parameters == "weight", has_bias=parameters == "bias"))


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_parameters_in_half_precision(library, case, dtype):
    check(library, replace(case, parameter_dtype=dtype))


# bfloat16 numbers near 1000 are 4 apart, so the branch that post norm normalises is float32. Most of the error comes
# from rounding the mean, once per row, so these cases have four times as many rows to get a stable estimate of it.
FAR_FROM_ZERO = [
    replace(case, shape=(4 * case.shape[0], *case.shape[1:]), pair=pair, offset=1000.0)
    for case in KINDS
    for pair in ((F32, F32), (F32, BF16))
    if case.op != "residual_post_norm" or pair[1] == F32
]


@pytest.mark.parametrize("case", FAR_FROM_ZERO, ids=str)
def test_rows_far_from_zero(library, case):
    """The mean is 1000 times the deviation, so a variance computed as E[x^2] - E[x]^2 would lose nearly all digits."""
    check(library, case)


@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_empty_batch(library, case):
    check(library, replace(case, shape=(0, *case.shape[1:])))


LONGEST = [
    NormCase("residual_layer_norm", (2, length), pair=pair, has_drop_path=True)
    for length in (8192, 8191)
    for pair in ((F32, F32), (BF16, BF16), (F32, BF16))
]


@pytest.mark.parametrize("case", LONGEST, ids=str)
def test_longest_rows(library, case):
    assert library.max_row == 8192
    check(library, case)


@pytest.mark.parametrize(
    "case",
    [
        *KINDS,
        plain(3, 97),
        replace(merging(1, 3, 5, 24, factor=(1, 2, 2)), pair=(BF16, BF16)),
        merging(1, 2, 3, 3, 8, factor=(2, 2, 2), order="monai_legacy"),
        replace(plain(3, 1536), pair=(BF16, BF16)),
        NormCase("residual_layer_norm", (3, 2304), pair=(F16, F16)),
    ],
    ids=str,
)
def test_same_bits_whatever_the_schedule(library, case):
    inputs = case.inputs()
    library.check_schedules(lambda: call(library, case, inputs))


@pytest.mark.parametrize("multiprocessors", [1, 3, 100])
@pytest.mark.parametrize("case", [merging(3, 6, 6, 8), plain(41, 24), plain(7, 768)], ids=str)
def test_any_number_of_multiprocessors(library, case, multiprocessors):
    """The grid ranges from one block that loops over all rows to more blocks than the rows need."""
    library.configure(multiprocessors=multiprocessors)
    check(library, case)


@pytest.mark.parametrize("case", [merging(3, 24, 24, 8), plain(600, 24)], ids=str)
def test_only_gradients_of_parameters_depend_on_the_number_of_multiprocessors(library, case):
    """Gradients of parameters are sums over blocks, whose number depends on the GPU (docs/numerics.md)."""
    inputs = case.inputs()
    results = []
    for multiprocessors in (1, 3, 100):
        library.configure(multiprocessors=multiprocessors)
        results.append(call(library, case, inputs))
    same = {name for name, x in results[0].items() if all(torch.equal(x, other[name]) for other in results[1:])}
    assert set(results[0]) - {"dweight", "dbias"} <= same
    assert not {"dweight", "dbias"} <= same


@pytest.mark.parametrize("case", KINDS, ids=kind)
def test_gradients_that_nobody_wants(library, case):
    inputs = case.inputs()
    wanted = call(library, case, inputs)
    without = call(library, case, {name: x for name, x in inputs.items() if name != "bias"})
    assert torch.equal(without["dweight"], wanted["dweight"])
    gradient = "dy" if case.op == "residual_post_norm" else "dx"
    assert torch.equal(without[gradient], wanted[gradient])


def test_what_has_no_kernel_is_refused(library):
    x = torch.zeros(1, 4, 4, 8)
    with pytest.raises(emulation.LaunchError, match="refused"):
        library.layer_norm_fwd(torch.zeros(1, 8193), None, None, [], 1e-5, F32)
    with pytest.raises(emulation.LaunchError, match="refused"):
        library.layer_norm_fwd(x.half(), None, None, [], 1e-5, BF16)
    with pytest.raises(emulation.LaunchError, match="refused"):
        library.patch_merging_norm_fwd(x, None, None, [1, 3, 3], list(range(8)), 1e-5, F32)
    with pytest.raises(emulation.LaunchError, match="refused"):
        library.patch_merging_norm_fwd(x, None, None, [1, 2, 2], [0, 1, 2, 4], 1e-5, F32)
