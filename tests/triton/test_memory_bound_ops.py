"""Tests the Triton backend of partition, reverse and patch merging, on a GPU or in Triton's interpreter."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import swinkernels
from swinkernels import reference
from swinkernels.ops._library import three
from swinkernels.ops.patch_merging import merged_size
from swinkernels.reference._geometry import frame_size, source_index
from swinkernels.reference.patch_merging import ORDERS
from swinkernels.reference.patch_merging import neighbours as offsets_of
from swinkernels.testing import assert_within_budget
from swinkernels.triton import _launch
from swinkernels.triton import _patch_merging_kernels as merging_kernels
from swinkernels.triton import patch_merging as merging_launcher
from swinkernels.triton import window_partition as partition_launcher
from tests.support.triton_checks import DEVICE, ON_GPU, Checks

check = Checks(__name__)
ops = torch.ops.swinkernels
SWEEP = hypothesis.settings(max_examples=100 if ON_GPU else 12, deadline=None, derandomize=True, database=None)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# ---- partition and reverse -------------------------------------------------------------------------------------------

# size, window, shift; the ops accept any shift below the padded map's size.
PARTITIONS = {
    "whole": ((4, 6), (2, 3), (1, 1)),
    "no_shift": ((4, 6), (2, 3), (0, 0)),
    "window_7": ((14, 7), (7, 7), (3, 3)),
    "odd": ((5, 7), (4, 4), (2, 3)),
    "rectangular": ((9, 4), (2, 5), (1, 2)),
    "one_token": ((1, 1), (1, 1), (0, 0)),
    "one_token_in_a_window": ((1, 1), (3, 2), (2, 1)),
    "map_smaller_than_shift": ((2, 9), (7, 4), (5, 2)),
    "shift_beyond_the_window": ((9, 7), (3, 2), (8, 7)),
    "three_axes": ((2, 4, 6), (2, 2, 3), (1, 1, 2)),
    "three_axes_odd": ((3, 5, 4), (2, 4, 3), (1, 2, 0)),
    "windows_of_several_tiles": ((12, 9), (11, 9), (4, 3)),
}


def partition(x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], roll_then_pad: bool) -> Tensor:
    return ops.window_partition_triton(x, three(window, 1), three(shift, 0), roll_then_pad)


def reverse(
    windows: Tensor, size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], roll_then_pad: bool
) -> Tensor:
    return ops.window_reverse_triton(windows, size, three(window, 1), three(shift, 0), roll_then_pad)


def gathered(x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], roll_then_pad: bool) -> Tensor:
    """Return the windows of ``x``, gathered with the reference's index, which accepts any shift."""
    batch, *size, channels = x.shape
    order = "roll_then_pad" if roll_then_pad else "pad_then_roll"
    index = source_index(size, window, shift, pad_order=order, device=x.device)
    tokens = torch.cat([x.reshape(batch, -1, channels), x.new_zeros(batch, 1, channels)], dim=1)
    return tokens[:, index].reshape(-1, index.shape[1], channels)


def same_bytes(got: Tensor, expected: Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.view(torch.uint8), expected.contiguous().view(torch.uint8))


def check_partition(x: Tensor, window: tuple[int, ...], shift: tuple[int, ...], roll_then_pad: bool) -> None:
    windows = partition(x, window, shift, roll_then_pad)
    assert windows.is_contiguous()
    assert same_bytes(windows, gathered(x, window, shift, roll_then_pad))
    back = reverse(windows, tuple(x.shape[1:-1]), window, shift, roll_then_pad)
    assert back.is_contiguous()
    assert same_bytes(back, x)


@check(*PARTITIONS, dtypes=(torch.float32,))
def partition_and_reverse(name, dtype):
    size, window, shift = PARTITIONS[name]
    for roll_then_pad in (False, True):
        check_partition(draw(2, *size, 12), window, shift, roll_then_pad)


@check(
    1, 3, 8, 30, 96, 97,
    dtypes=(torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.float64, torch.complex128),
)  # fmt: skip
def partition_moves_bytes(channels, dtype):
    """Rows of any number of bytes are copied exactly, also NaN payloads and negative zeros."""
    size, window, shift = PARTITIONS["odd"]
    row = channels * dtype.itemsize
    values = torch.randint(0, 256, (2, *size, row), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = (values & 1 if dtype == torch.bool else values).to(DEVICE).view(dtype)
    check_partition(x, window, shift, False)


@check("no_shift", "three_axes_odd", "rectangular", dtypes=(torch.float32,))
def a_program_takes_several_windows(name, dtype):
    """A program may copy several windows, and not all programs need to copy the same number."""
    size, window, shift = PARTITIONS[name]
    programs = partition_launcher.PROGRAMS
    partition_launcher.PROGRAMS = 1
    try:
        check_partition(draw(3, *size, 4), window, shift, False)
    finally:
        partition_launcher.PROGRAMS = programs


@check("strided_batch", "channel_slice", "unaligned", "transposed", "expanded", dtypes=(torch.float16,))
def strided_maps_are_read_in_place(name, dtype):
    size, window, shift = PARTITIONS["odd"]
    wide = draw(4, *size, 48).to(dtype)
    x = {
        "strided_batch": wide[::2],
        "channel_slice": wide[..., 8:32],
        "unaligned": wide[..., 1:18],
        "transposed": wide.transpose(1, 2),
        "expanded": wide[:1].expand(3, -1, -1, -1),
    }[name]
    assert _launch.unit_stride(x) is x
    for roll_then_pad in (False, True):
        assert torch.equal(partition(x, window, shift, roll_then_pad), gathered(x, window, shift, roll_then_pad))


@check("channels_first", "one_channel", "strided_windows", dtypes=(torch.float32,))
def other_strides(name, dtype):
    size, window, shift = PARTITIONS["odd"]
    if name == "strided_windows":
        windows = gathered(draw(2, *size, 12), window, shift, False)
        wide = torch.cat([windows, windows], dim=2)[..., 5:14]
        expected = reverse(wide.contiguous(), size, window, shift, False)
        assert torch.equal(reverse(wide, size, window, shift, False), expected)
        transposed = windows.transpose(0, 1).contiguous().transpose(0, 1)
        assert torch.equal(
            reverse(transposed, size, window, shift, False), reverse(windows, size, window, shift, False)
        )
        return
    x = draw(2, 6 if name == "channels_first" else 1, *size).permute(0, 2, 3, 1)
    assert torch.equal(partition(x, window, shift, False), gathered(x, window, shift, False))


@check(dtypes=(None,))
def partition_of_random_geometry():
    @SWEEP
    @hypothesis.given(st.data())
    def sweep(data):
        rank = data.draw(st.integers(2, 3))
        size = data.draw(st.tuples(*[st.integers(1, 9 if rank == 2 else 5)] * rank))
        window = data.draw(st.tuples(*[st.integers(1, 5 if rank == 2 else 3)] * rank))
        shift = tuple(data.draw(st.integers(0, p - 1)) for p in frame_size(size, window))
        channels = data.draw(st.sampled_from([1, 2, 3, 8, 20]))
        dtype = data.draw(st.sampled_from([torch.int8, torch.float16, torch.float32]))
        x = torch.arange(2 * math.prod(size) * channels, device=DEVICE).to(dtype).reshape(2, *size, channels)
        check_partition(x, window, shift, data.draw(st.booleans()))

    sweep()


@check("odd", "three_axes_odd", dtypes=(torch.float32,))
def partition_and_reverse_are_each_others_derivative(name, dtype):
    """Results, first and second derivatives of the public functions equal the reference's."""
    size, window, shift = PARTITIONS[name]
    x = draw(1, *size, 4).requires_grad_()
    for order in ("pad_then_roll", "roll_then_pad"):
        got, expected = [], []
        for backend, results in (("triton", got), ("reference", expected)):
            windows = swinkernels.window_partition(x, window, shift, pad_order=order, backend=backend)
            dwindows = draw(*windows.shape, seed=1).requires_grad_()
            (dx,) = torch.autograd.grad(windows, x, dwindows, create_graph=True)
            (ddwindows,) = torch.autograd.grad(dx, dwindows, draw(*x.shape, seed=2))
            back = swinkernels.window_reverse(windows, window, size, shift, pad_order=order, backend=backend)
            (dback,) = torch.autograd.grad(back, x, draw(*x.shape, seed=3))
            results += [windows, dx, ddwindows, back, dback]
        for a, b in zip(got, expected, strict=True):
            assert torch.equal(a, b)


@check(dtypes=(torch.float32,))
def partition_of_an_empty_batch(dtype):
    windows = partition(draw(0, 5, 7, 3), (4, 4), (2, 2), False)
    assert windows.shape == (0, 16, 3)
    assert reverse(windows, (5, 7), (4, 4), (2, 2), False).shape == (0, 5, 7, 3)


@check(dtypes=(torch.float32,))
def opcheck_partition(dtype):
    window, shift = [1, 4, 4], [0, 2, 2]
    x = draw(2, 5, 7, 3).requires_grad_()
    torch.library.opcheck(ops.window_partition_triton.default, (x, window, shift, True))
    windows = draw(8, 16, 3).requires_grad_()
    torch.library.opcheck(ops.window_reverse_triton.default, (windows, [5, 7], window, shift, True))


# ---- the norm of patch merging ---------------------------------------------------------------------------------------


class Merging(NamedTuple):
    batch: int
    size: tuple[int, ...]
    channels: int
    order: str = "swin"
    merged_axes: int = 2

    @property
    def factor(self) -> list[int]:
        return three((2,) * self.merged_axes, 1)

    @property
    def neighbours(self) -> list[int]:
        places = list(itertools.product((0, 1), repeat=self.merged_axes))
        return [places.index(offset) for offset in offsets_of(self.order, self.merged_axes)]

    @property
    def length(self) -> int:
        return 2**self.merged_axes * self.channels


MERGINGS = {
    "even": Merging(2, (4, 6), 8),
    "odd": Merging(2, (5, 7), 30),
    "rectangular": Merging(1, (2, 9), 96, "row_major"),
    "one_token": Merging(2, (1, 1), 16),
    "one_channel": Merging(2, (8, 7), 1),
    "three_channels": Merging(2, (6, 6), 3),
    "prime_channels": Merging(1, (5, 4), 97),
    "frames_one_by_one": Merging(1, (3, 4, 5), 24),
    "three_axes": Merging(1, (4, 2, 6), 20, merged_axes=3),
    "three_axes_odd": Merging(1, (3, 5, 4), 12, "row_major", merged_axes=3),
    "monai": Merging(1, (3, 4, 5), 8, "monai", merged_axes=3),
    "monai_legacy": Merging(1, (4, 4, 2), 8, "monai_legacy", merged_axes=3),
    "monai_legacy_odd": Merging(1, (3, 5, 3), 30, "monai_legacy", merged_axes=3),
    "long_rows": Merging(1, (3, 2, 4), 768, merged_axes=3),
    "longest_rows": Merging(1, (2, 4), 2048),
}
PAIRS = {  # dtypes read and written
    "f32": (torch.float32, torch.float32),
    "f16": (torch.float16, torch.float16),
    "f32_f16": (torch.float32, torch.float16),
    "f16_f32": (torch.float16, torch.float32),
}
if ON_GPU:
    PAIRS |= {
        "bf16": (torch.bfloat16, torch.bfloat16),
        "f32_bf16": (torch.float32, torch.bfloat16),
        "bf16_f32": (torch.bfloat16, torch.float32),
    }


def merged(x: Tensor, case: Merging) -> Tensor:
    """Return the merged rows of ``x``: its neighbouring tokens, concatenated in the reference's order."""
    padding = [0, 0]
    for size, factor in zip(reversed(case.size), reversed(case.factor), strict=False):
        padding += [0, -size % factor]
    x = F.pad(x, padding)
    unmerged = [slice(None)] * (1 + len(case.size) - case.merged_axes)
    return torch.cat(
        [x[(*unmerged, *(slice(o, None, 2) for o in offset))] for offset in offsets_of(case.order, case.merged_axes)],
        dim=-1,
    )


def inputs(case: Merging, pair: str, seed: int = 0) -> dict[str, Tensor]:
    """Return random x and dz, rounded to the dtypes that the op reads and writes, and float32 parameters."""
    read, written = PAIRS[pair]
    shape = (case.batch, *merged_size(case.size, case.factor), case.length)
    return {
        "x": draw(case.batch, *case.size, case.channels, seed=seed).to(read),
        "weight": 1 + 0.5 * draw(case.length, seed=seed + 1),
        "bias": draw(case.length, seed=seed + 2),
        "dz": draw(*shape, seed=seed + 3).to(written),
    }


def run(case: Merging, given: dict[str, Tensor], eps: float = 1e-5, needs: tuple[bool, bool] = (True, True)):
    """Run the forward and backward ops in Triton; return z, mean, rstd, dx, dweight and dbias by name."""
    x, weight, bias, dz = (given.get(name) for name in ("x", "weight", "bias", "dz"))
    order = (case.factor, case.neighbours)
    z, mean, rstd = ops.patch_merging_norm_fwd_triton(x, weight, bias, *order, eps, dz.dtype)
    gradients = ops.patch_merging_norm_bwd_triton(dz, x, weight, mean, rstd, *order, *needs)
    return dict(zip(("z", "mean", "rstd", "dx", "dweight", "dbias"), (z, mean, rstd, *gradients), strict=True))


def exact(case: Merging, given: dict[str, Tensor], dtype: torch.dtype, eps: float = 1e-5):
    """Return the reference's results in ``dtype``, and the magnitudes of the terms that may cancel in them."""
    x = given["x"].to(dtype).requires_grad_()
    ones = torch.ones(case.length, dtype=dtype, device=x.device)
    weight = given["weight"].to(dtype) if "weight" in given else ones
    bias = given["bias"].to(dtype) if "bias" in given else 0 * ones
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    u, dz = merged(x, case), given["dz"].to(dtype)
    z = reference.layer_norm(u, weight, bias, eps=eps)
    dx, dweight, dbias = torch.autograd.grad(z, (x, weight, bias), dz, retain_graph=True)
    u = u.detach()
    mean = u.mean(-1)
    rstd = (u.var(-1, correction=0) + eps).rsqrt()
    results = {"z": z.detach(), "mean": mean, "rstd": rstd, "dx": dx, "dweight": dweight, "dbias": dbias}
    h, g = ((u - mean[..., None]) * rstd[..., None]).abs(), (dz * weight).abs().detach()
    du = rstd[..., None] * (g + g.mean(-1, keepdim=True) + h * (g * h).mean(-1, keepdim=True))
    rows = tuple(range(dz.dim() - 1))
    terms = {"mean": u.abs().mean(-1), "dx": du, "dweight": (dz.abs() * h).sum(rows), "dbias": dz.abs().sum(rows)}
    return results, terms


def check_merging(case: Merging, pair: str, given: dict[str, Tensor], eps: float = 1e-5) -> None:
    """Check the results; errors of float32 sums are judged relative to their terms, which may cancel."""
    got = run(case, given, eps)
    wide, terms = exact(case, given, torch.float64, eps)
    single, _ = exact(case, given, torch.float32, eps)
    for name, value in got.items():
        expected_dtype = {"z": PAIRS[pair][1], "dx": PAIRS[pair][0]}.get(name, torch.float32)
        assert value.dtype == expected_dtype and value.is_contiguous()
        term = terms.get(name) if value.dtype == torch.float32 else None
        assert_within_budget(value, wide[name], single[name], terms=term, name=f"{case} {pair} {name}")


@check(*itertools.product(MERGINGS, ("f32", "f16")), dtypes=(None,))
@check(*itertools.product(("odd", "three_axes_odd", "monai_legacy"), list(PAIRS)[2:]), dtypes=(None,))
def merging_norm(name, pair):
    check_merging(MERGINGS[name], pair, inputs(MERGINGS[name], pair))


@check("f32", "f16", dtypes=(None,))
def merging_norm_of_random_geometry(pair):
    @SWEEP
    @hypothesis.given(st.data())
    def sweep(data):
        rank = data.draw(st.integers(2, 3))
        size = data.draw(st.tuples(*[st.integers(1, 7 if rank == 2 else 4)] * rank))
        order = data.draw(st.sampled_from(ORDERS))
        case = Merging(2, size, data.draw(st.sampled_from([2, 3, 8, 20])), order, data.draw(st.integers(2, rank)))
        check_merging(case, pair, inputs(case, pair, seed=data.draw(st.integers(0, 99))))

    sweep()


@check("f32", "f16", dtypes=(None,))
def a_large_mean_leaves_the_variance(pair):
    """With mean 1000 and standard deviation 1, a variance computed from sums of squares would have no correct digit."""
    case = MERGINGS["even"]
    given = inputs(case, pair)
    given["x"] = (1000 + given["x"].float()).to(given["x"].dtype)
    check_merging(case, pair, given)


@check("even", "monai_legacy_odd", dtypes=(None,))
def a_program_takes_several_tiles(name):
    """Each of two programs processes several tiles, as in calls with many tokens."""
    case = MERGINGS[name]._replace(batch=3)
    tile = merging_launcher.tile
    merging_launcher._geometry.cache_clear()
    merging_launcher.tile = lambda *arguments: tile(*arguments)._replace(rows=4, programs=2)
    try:
        check_merging(case, "f32", inputs(case, "f32"))
    finally:
        merging_launcher.tile = tile
        merging_launcher._geometry.cache_clear()


@check(1, 128, 300, dtypes=(torch.float32,))
def shares_are_added(programs, dtype):
    """sum_shares adds fewer and more partial sums than it loads at a time, and more columns than a program owns."""
    shares, (dweight, dbias) = draw(2, programs, 40), draw(2, 40)
    merging_kernels.sum_shares[(2,)](*shares, dweight, dbias, programs, LENGTH=40, BLOCK=32)
    for name, got, terms in (("dweight", dweight, shares[0]), ("dbias", dbias, shares[1])):
        assert_within_budget(got, terms.double().sum(0), terms.sum(0), terms=terms.double().abs().sum(0), name=name)


@check("weight", "bias", "neither", "half", dtypes=(None,))
def parameters_of_the_norm(given_ones):
    case, pair = MERGINGS["odd"], "f32"
    given = inputs(case, pair)
    keep = {"weight": ("weight",), "bias": ("bias",), "neither": (), "half": ("weight", "bias")}[given_ones]
    given = {name: value for name, value in given.items() if name in ("x", "dz", *keep)}
    if given_ones == "half":  # parameters whose dtype is not the map's
        given |= {name: given[name].half() for name in keep}
    check_merging(case, pair, given)
    both = run(case, given)
    for needs in itertools.product((False, True), repeat=2):
        some = run(case, given, needs=needs)
        assert torch.equal(some["dx"], both["dx"])
        for name, needed in zip(("dweight", "dbias"), needs, strict=True):
            assert some[name].dtype == torch.float32
            assert torch.equal(some[name], both[name]) if needed else some[name].shape == (0,)


@check("even", "three_axes_odd", dtypes=(torch.float16,))
def merging_norm_of_strided_maps(name, dtype):
    """A slice of a wider map is read in place. Strides of maps and gradients do not change the results."""
    case = MERGINGS[name]
    given = inputs(case, "f16")
    expected = run(case, given)
    wide = torch.cat([given["x"], given["x"]], dim=-1)[..., case.channels // 2 :][..., : case.channels]
    assert _launch.unit_stride(wide) is wide
    got = run(case, {**given, "x": wide})
    contiguous = run(case, {**given, "x": wide.contiguous()})
    for key in expected:
        assert torch.equal(got[key], contiguous[key])
    channels_first = given["x"].movedim(-1, 1).contiguous().movedim(1, -1)
    row = given["dz"].flatten(0, -2)[0]
    dz = row.expand(given["dz"].shape)
    got, expected = run(case, {**given, "x": channels_first, "dz": dz}), run(case, {**given, "dz": dz.contiguous()})
    for key in expected:
        assert torch.equal(got[key], expected[key])


@check("odd", "monai_legacy_odd", dtypes=(torch.float32,))
def same_bits_twice(name, dtype):
    case = MERGINGS[name]
    given = inputs(case, "f32")
    before = {key: value.clone() for key, value in given.items()}
    first, second = run(case, given), run(case, given)
    for key in first:
        assert torch.equal(first[key], second[key]), key
    for key in given:
        assert torch.equal(given[key], before[key]), key  # inputs are not modified


@check("odd", dtypes=(torch.float32,))
def same_bits_for_any_number_of_multiprocessors(name, dtype):
    """Parameter gradients are also bit-identical, because the number of programs that share the rows is fixed."""
    case = MERGINGS[name]._replace(batch=30)
    given, counted = inputs(case, "f32"), merging_launcher.multiprocessors
    try:
        results = []
        for number in (1, 16, 132):
            merging_launcher.multiprocessors = lambda device, number=number: number
            results.append(run(case, given))
    finally:
        merging_launcher.multiprocessors = counted
    for key, value in results[0].items():
        assert all(torch.equal(value, other[key]) for other in results[1:]), key


@check(dtypes=(torch.float32,))
def merging_norm_of_an_empty_batch(dtype):
    case = MERGINGS["odd"]._replace(batch=0)
    got = run(case, inputs(case, "f32"))
    assert got["z"].shape == (0, 3, 4, case.length) and got["mean"].shape == (0, 3, 4)
    assert got["dx"].shape == (0, *case.size, case.channels)
    for name in ("dweight", "dbias"):
        assert got[name].shape == (case.length,) and not got[name].any()


@check(dtypes=(torch.float32,))
def a_neighbour_three_times_is_refused(dtype):
    case = MERGINGS["even"]
    given = inputs(case, "f32")
    z, mean, rstd = ops.patch_merging_norm_fwd_triton(
        given["x"], None, None, case.factor, [0, 0, 0, 1], 1e-5, torch.float32
    )
    arguments = (z, given["x"], None, mean, rstd, case.factor, [0, 0, 0, 1], True, True)
    with pytest.raises(ValueError, match=r"patch_merging_norm: .* a neighbour at most twice, got \(0, 0, 0, 1\)"):
        ops.patch_merging_norm_bwd_triton(*arguments)


@check("odd", "monai_legacy", dtypes=(torch.float32,))
def opcheck_merging_norm(name, dtype):
    case = MERGINGS[name]._replace(channels=4)
    given = inputs(case, "f32")
    leaves = [given[key].requires_grad_() for key in ("x", "weight", "bias")]
    order = (case.factor, case.neighbours)
    torch.library.opcheck(ops.patch_merging_norm_fwd_triton.default, (*leaves, *order, 1e-5, torch.float16))
    x, weight, bias = (leaf.detach() for leaf in leaves)
    _, mean, rstd = ops.patch_merging_norm_fwd_triton(x, weight, bias, *order, 1e-5, torch.float16)
    for needs in ((True, True), (False, False)):
        arguments = (given["dz"].half(), x, weight, mean, rstd, *order, *needs)
        torch.library.opcheck(ops.patch_merging_norm_bwd_triton.default, arguments)


@check(*itertools.product(("swin", "unfold", "monai_legacy"), ("pre", "post")), dtypes=(torch.float32,))
def the_public_function(order, norm, dtype):
    x, reduction = draw(1, 3, 5, 4, 6), draw(10, 48, seed=1) / 7
    width = 48 if norm == "pre" else 10
    leaves = [t.requires_grad_() for t in (x, draw(width, seed=2), draw(width, seed=3), reduction)]
    results = []
    for backend in ("triton", "reference"):
        y = swinkernels.patch_merging(*leaves, order=order, norm=norm, backend=backend)
        results.append([y, *torch.autograd.grad(y, leaves, draw(*y.shape, seed=4))])
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@check(dtypes=(torch.float16,))
def autocast_needs_no_cast(dtype):
    """Under autocast, the op reads the float32 residual stream and writes the Linear's half-precision input."""
    leaves = [t.requires_grad_() for t in (draw(1, 4, 5, 6), draw(24, seed=1), draw(24, seed=2), draw(9, 24, seed=3))]
    with torch.autocast(DEVICE, dtype):
        y = swinkernels.patch_merging(*leaves, backend="triton")
    assert y.dtype == dtype
    expected = reference.patch_merging(*leaves)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=2e-2)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    for got, exact_gradient in zip(
        gradients, torch.autograd.grad(expected, leaves, torch.ones_like(expected)), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact_gradient, rtol=0, atol=2e-2 * exact_gradient.abs().max().item())


@pytest.mark.parametrize("name", check.names())
def test_triton(name):
    check.run(name)


@pytest.mark.gpu
def test_merging_more_than_2_to_the_31_elements():
    """The last image gives the same results as in a batch of one, because offsets are 64 bits wide."""
    case = Merging(361, (249, 250), 96)
    x = torch.randint(-100, 100, (case.batch, *case.size, case.channels), dtype=torch.int8, device="cuda").bfloat16()
    assert x.numel() > 2**31
    order = (case.factor, case.neighbours)
    forward = ops.patch_merging_norm_fwd_triton(x, None, None, *order, 1e-5, torch.bfloat16)
    last = ops.patch_merging_norm_fwd_triton(x[-1:], None, None, *order, 1e-5, torch.bfloat16)
    for whole, part in zip(forward, last, strict=True):
        assert torch.equal(whole[-1:], part)
    z, mean, rstd = forward
    dx, _, _ = ops.patch_merging_norm_bwd_triton(z, x, None, mean, rstd, *order, False, False)
    z, x, mean, rstd = (t[-1:] for t in (z, x, mean, rstd))
    dx_last, _, _ = ops.patch_merging_norm_bwd_triton(z, x, None, mean, rstd, *order, False, False)
    assert torch.equal(dx[-1:], dx_last)
