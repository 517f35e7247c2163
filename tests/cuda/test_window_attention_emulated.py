"""Tests the CUDA window attention kernels, run on the CPU by the emulator, against the float64 reference."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinkernels import reference
from swinkernels.testing import WindowAttentionCase as Case
from swinkernels.testing import cancelling_terms, check_window_attention, run_case
from tests import emulation
from tests.support.attention_cases import ends_that_may_meet
from tests.support.philox import kept_weights, philox

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

# The epsilon of a 10-bit mantissa, as torch.finfo defines it. Attention in float64 that only rounds the operands of
# matrix products to TF32 has RMS errors of 0.42 to 0.50 times this epsilon in the gradients of q, k and v.
TF32_EPS = 2.0**-10


def _round_to_tf32(x: Tensor) -> Tensor:
    return ((x.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


class _Tf32Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return torch.matmul(_round_to_tf32(a), _round_to_tf32(b))

    @staticmethod
    def backward(ctx, dc):
        (a, b), dc = map(_round_to_tf32, ctx.saved_tensors), _round_to_tf32(dc)
        return torch.matmul(dc, b.mT), torch.matmul(a.mT, dc)


def _matmul_in_tf32(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b``. Round float32 operands to TF32, as a GPU does if torch's TF32 switch is on."""
    return _Tf32Product.apply(a, b) if a.dtype == torch.float32 else torch.matmul(a, b)


def _check(
    library: emulation.WindowAttentionLibrary,
    case: Case,
    arithmetic: str,
    seed: int = 0,
    **arguments,
) -> dict[str, Tensor]:
    if arithmetic == "tf32":
        op = functools.partial(library.window_attention_qkvpacked, allow_tf32=True, **arguments)
        with pytest.MonkeyPatch.context() as patch:
            if case.has_logit_scale:
                # A factor of up to 100 multiplies the cosines and the rounding errors of their TF32 operands. The
                # budget depends on the float32 reference's error, so the reference also rounds its operands to TF32.
                patch.setattr(Tensor, "__matmul__", _matmul_in_tf32)
            return check_window_attention(op, case, torch.float32, eps=TF32_EPS, seed=seed, rounds_unit_rows=True)
    op = functools.partial(library.window_attention_qkvpacked, **arguments)
    return check_window_attention(op, case, getattr(torch, arithmetic), seed=seed, rounds_unit_rows=True)


def _regions(*frame: int) -> Tensor:
    return torch.randint(0, 3, frame, generator=torch.Generator().manual_seed(0), dtype=torch.int32)


ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}
MASKED_OUT = {"mask_value": -math.inf}
# Windows of 4 to 256 tokens, each with a different head_dim, size and padding, to cover tiles, loops and tails.
WINDOWS = [
    Case(2, (4, 6), 2, 8, 2, 1),
    Case(2, (7, 5), 1, 16, 3, 1, has_pad_qkv=True),
    Case(1, (8, 8), 2, 24, 4, 2),
    Case(1, (12, 9), 2, 32, 5, 2, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(2, (12, 14), 2, 32, 7, 3, has_pad_qkv=True),
    Case(1, (13, 14), 1, 40, 7, 3, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(3, (8, 16), 1, 64, 8, 4),
    Case(1, (12, 10), 1, 32, 10, 5, has_pad_qkv=True),
    Case(1, (12, 12), 2, 16, 12, 6),
    Case(1, (16, 9), 1, 32, 16, 7, has_pad_qkv=True),
]
# Every head_dim class.
HEAD_DIMS = [Case(1, (6, 9), 1, head_dim, 5, 2, has_pad_qkv=True) for head_dim in (48, 72, 96, 128)]
# Heads whose rows are not a multiple of 16 bytes in some dtype, or not even of 4.
ODD_HEAD_DIMS = [Case(2, (7, 8), 2, head_dim, 4, 1, has_pad_qkv=True) for head_dim in (1, 4, 5, 10, 12, 20, 30, 44, 67)]
ODD_HEAD_DIMS.append(Case(1, (9, 10), 1, 30, (9, 10), 3, has_pad_qkv=True))
ARITHMETICS = ["bfloat16", "float16", "float32", "tf32"]
COSINE = {"has_logit_scale": True}
DENSE = {"has_table": False, "bias_types": 0}
# v2 and dense biases, in short and long windows, combined with all other options.
FEATURES = {
    "v2": Case(2, (12, 14), 3, 32, 7, 3, has_pad_qkv=True, **COSINE),
    "v2, small window": Case(2, (7, 8), 2, 16, 4, 1, has_pad_qkv=True, **COSINE),
    "v2, window 8": Case(1, (8, 16), 2, 32, 8, 4, **COSINE),
    "v2, wide heads": Case(1, (6, 9), 1, 96, 5, 2, has_pad_qkv=True, **COSINE),
    "v2, odd heads, 3D": Case(1, (3, 6, 5), 2, 10, (2, 4, 4), (1, 2, 2), has_pad_qkv=True, **COSINE),
    "v2, no table": Case(1, (7, 8), 2, 16, 4, 1, has_table=False, has_pad_qkv=True, **COSINE),
    "v2, zero pads": Case(1, (7, 8), 2, 16, 4, 1, **COSINE),
    "v2, long window": Case(1, (12, 12), 2, 16, 12, 6, **COSINE),
    "v2, long window, pads": Case(1, (16, 9), 1, 32, 16, 7, has_pad_qkv=True, **COSINE),
    "v2, long window, wide heads": Case(1, (9, 8), 1, 72, 9, 4, has_pad_qkv=True, **COSINE),
    "dense": Case(2, (8, 8), 2, 16, 4, 1, **DENSE),
    "dense, window 7": Case(2, (13, 14), 2, 32, 7, 3, has_pad_qkv=True, options=ROLL_THEN_PAD, **DENSE),
    "dense, long window": Case(1, (9, 9), 2, 32, 9, 4, **DENSE),
    "dense, grid": Case(1, (8, 12), 2, 32, 4, 0, options={"grid": True}, **DENSE),
    "two types": Case(2, (8, 8), 2, 16, 4, 1, has_table=False, bias_types=2),
    "a type for each window, v2": Case(3, (8, 8), 2, 16, 4, 1, has_table=False, bias_types=4, **COSINE),
    "types, long window": Case(2, (18, 9), 2, 16, 9, 4, has_table=False, bias_types=2),
    "types, long window, pads, v2": Case(1, (17, 8), 1, 24, 9, 4, False, True, True, 2),
}
# Bias tables by window type, which the plain kernels for long windows do not support, in short and long windows.
TABLE_TYPES = {
    "short": Case(2, (8, 8), 2, 16, 4, 1, table_types=2),
    "short, v2, pads": Case(2, (13, 14), 3, 16, 7, 3, has_pad_qkv=True, table_types=2, **COSINE),
    "short, 3D": Case(2, (4, 6, 5), 2, 16, (2, 3, 3), (1, 1, 1), has_pad_qkv=True, table_types=2),
    "a type for each window": Case(3, (8, 8), 2, 20, 4, 1, table_types=4),
    "long": Case(2, (18, 9), 2, 24, 9, 4, table_types=2),
    "long, even rows, pads": Case(1, (19, 22), 1, 32, (10, 8), (5, 3), has_pad_qkv=True, table_types=2),
    "long, v2": Case(2, (17, 8), 1, 24, 9, 4, has_pad_qkv=True, table_types=2, **COSINE),
    "long, wide heads": Case(1, (18, 8), 2, 72, 9, 4, table_types=2),
}
# Bias tables indexed by pairs of coordinates.
PANGU = {"table_pairs": (True, True, False)}
TABLE_PAIRS = {
    "short": Case(2, (8, 8), 2, 16, 4, 1, options={"table_pairs": (True, False)}),
    "short, last axis": Case(2, (6, 8), 2, 32, (3, 4), (1, 2), options={"table_pairs": (False, True)}),
    "short, all axes, v2": Case(2, (13, 14), 2, 10, 7, 3, has_pad_qkv=True, options={"table_pairs": True}, **COSINE),
    "short, Pangu": Case(1, (4, 5, 8), 2, 24, (2, 3, 4), (1, 1, 2), has_pad_qkv=True, table_types=2, options=PANGU),
    "long, Pangu": Case(1, (4, 11, 12), 1, 32, (2, 6, 12), (1, 3, 6), has_pad_qkv=True, table_types=4, options=PANGU),
    "long, odd": Case(2, (10, 9), 2, 16, (10, 9), (5, 4), options={"table_pairs": (True, False)}),
    "long, strips": Case(1, (2, 9, 20), 1, 16, (2, 9, 20), 0, options=PANGU),
    "long, last axis": Case(
        1, (9, 16), 2, 32, (9, 8), (4, 3), has_pad_qkv=True, options={"table_pairs": (False, True)}
    ),
    "long, all axes, v2": Case(1, (9, 10), 2, 24, (9, 10), 3, table_types=1, options={"table_pairs": True}, **COSINE),
    "long, Pangu, wide heads": Case(1, (4, 6, 12), 1, 72, (2, 6, 12), (1, 3, 6), table_types=2, options=PANGU),
}
# Published windows of 343 tokens and more, with few heads.
LONG = {
    "MONAI": Case(1, (7, 8, 7), 1, 16, 7, 3, has_pad_qkv=True),
    "MONAI, head_dim 4, v2": Case(1, (7, 7, 7), 1, 4, 7, 0, **COSINE),
    "Video-Swin": Case(1, (8, 7, 7), 1, 32, (8, 7, 7), (4, 3, 3)),
    "window 24, v2": Case(1, (24, 24), 1, 32, 24, 12, **COSINE),
    "1024 tokens": Case(1, (32, 31), 1, 16, 32, 3, has_pad_qkv=True),
    "1024 tokens, dense": Case(1, (32, 32), 1, 16, 32, 0, **DENSE),
}
# All geometry options, each on a map on which it changes the result.
GEOMETRY = {
    "no table": Case(1, (7, 8), 2, 32, 4, 1, has_table=False, has_pad_qkv=True),
    "no table, long window": Case(1, (12, 24), 2, 32, 12, 6, has_table=False),
    "no table, long window, pads": Case(1, (13, 11), 1, 16, 12, 5, has_table=False, has_pad_qkv=True),
    "zero pads": Case(1, (7, 8), 2, 32, 4, 1),
    "no shift": Case(2, (8, 8), 2, 32, 4, 0),
    "window and shift of two sizes": Case(1, (9, 8), 2, 16, (3, 5), (1, 2), has_pad_qkv=True),
    "one row of windows": Case(3, (7, 21), 1, 32, 7, (0, 3)),
    "map smaller than the window": Case(2, (3, 2), 1, 16, 5, 4, has_pad_qkv=True),
    "map smaller than the shift, rolled first": Case(2, (3, 2), 1, 16, 5, 4, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "pads before": Case(1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (1, 1)}),
    "pads before, rolled first": Case(
        1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (2, 0), **ROLL_THEN_PAD}
    ),
    "periodic axis": Case(1, (8, 8), 2, 16, 4, 2, options={"periodic": (False, True)}),
    "region map": Case(1, (7, 8), 2, 16, 4, 1, has_pad_qkv=True, options={"region_map": _regions(8, 8)}),
    "grid": Case(2, (8, 12), 2, 32, 4, 0, options={"grid": True}),
    "grid with pads": Case(1, (7, 9), 1, 32, 5, 0, has_pad_qkv=True, options={"grid": True}),
    "grid with a region map": Case(1, (8, 8), 1, 16, 4, 0, options={"grid": True, "region_map": _regions(8, 8)}),
    "masked out": Case(2, (9, 13), 2, 16, (4, 5), (2, 1), has_pad_qkv=True, options=MASKED_OUT),
    "masked out, window 7": Case(1, (13, 14), 2, 32, 7, 3, has_pad_qkv=True, options={**MASKED_OUT, **ROLL_THEN_PAD}),
    "masked out, window 8": Case(1, (8, 16), 2, 32, 8, 4, options=MASKED_OUT),
    "masked out, long window": Case(1, (16, 9), 1, 32, 16, 7, has_pad_qkv=True, options=MASKED_OUT),
    "masked out, longer window": Case(1, (18, 20), 1, 16, (18, 20), (9, 5), has_pad_qkv=True, options=MASKED_OUT),
    "scale and mask value": Case(1, (8, 8), 2, 16, 4, 2, options={"scale": 0.5, "mask_value": -3.0}),
    "3D": Case(1, (4, 6, 5), 2, 16, (2, 3, 3), (1, 1, 1), has_pad_qkv=True),
    "3D, rolled first": Case(1, (3, 6, 5), 1, 32, (2, 4, 4), (1, 2, 2), has_pad_qkv=True, options=ROLL_THEN_PAD),
    "3D, window decoded in a larger one": Case(1, (2, 4, 4), 2, 16, (2, 4, 4), 0, options={"table_window": (8, 7, 7)}),
    "2D, long window, region map": Case(1, (9, 9), 1, 16, 9, 4, options={"region_map": _regions(9, 9)}),
    "long window decoded in a larger one": Case(1, (9, 10), 1, 16, (9, 10), 0, options={"table_window": (10, 12)}),
    "3D, long window": Case(1, (2, 8, 10), 1, 16, (2, 8, 8), (1, 4, 4), has_pad_qkv=True),
    "large bias table": Case(1, (6, 16, 2), 1, 16, (6, 16, 2), 0, options={"table_window": (10, 16, 10)}),
    # Most keys are identical pad tokens: if P were not normalised, the errors of its row sums would add up.
    "nearly all pads": Case(1, (16, 1), 1, 32, (7, 6), has_table=False, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "nearly all pads, long": Case(3, (1, 11), 3, 24, (9, 16), 0, has_pad_qkv=True, options={"scale": 0.1}),
    "many heads": Case(1, (4, 4), 24, 8, 4, 1),
    "many windows": Case(7, (6, 6), 1, 16, 2, 1),
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("case", WINDOWS, ids=str)
def test_windows(library, case, arithmetic):
    _check(library, case, arithmetic)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32", "tf32"])
@pytest.mark.parametrize("case", HEAD_DIMS, ids=str)
def test_head_dims(library, case, arithmetic):
    _check(library, case, arithmetic)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float32"])
@pytest.mark.parametrize("case", ODD_HEAD_DIMS, ids=str)
def test_any_head_dim(library, case, arithmetic):
    _check(library, case, arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", FEATURES)
def test_cosine_attention_and_dense_biases(library, name, arithmetic):
    _check(library, FEATURES[name], arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", TABLE_TYPES)
def test_bias_tables_by_window_type(library, name, arithmetic):
    _check(library, TABLE_TYPES[name], arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", TABLE_PAIRS)
def test_bias_tables_of_pairs(library, name, arithmetic):
    _check(library, TABLE_PAIRS[name], arithmetic)


@pytest.mark.parametrize("name", LONG)
def test_windows_of_up_to_1024_tokens(library, name):
    _check(library, LONG[name], "bfloat16" if name == "1024 tokens" else "float16")


def test_1024_tokens_in_float32(library):
    _check(library, LONG["1024 tokens"], "float32")


@pytest.mark.parametrize("arithmetic", ["float16", "float32"])  # each dtype has separate kernels
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry(library, name, arithmetic):
    _check(library, GEOMETRY[name], arithmetic)


@pytest.mark.parametrize("seed", range(3))
def test_exact_products_do_not_add_up_the_rounding_of_lse(library, seed):
    """Each row of dS sums to zero, and so does dbias_table, although P is recomputed from a rounded lse."""
    case = GEOMETRY["nearly all pads, long"]
    got = _check(library, case, "float32", seed=seed)["dbias_table"].double()
    terms = cancelling_terms(case, {k: x.double() for k, x in case.inputs(torch.float32, seed=seed).items()})
    # If P were not normalised, the error would be up to 8.6 of these units; it is at most 2.6.
    unit = 2.0**-27 * terms["dbias_table"].sum(0)
    assert (got.sum(0).abs() <= 3 * unit).all()


@st.composite
def _cases(draw: st.DrawFn, cosine: bool) -> Case:
    """Draw a case with at most 500 tokens, pad tokens included, and without cosine attention unless ``cosine``."""
    rank = draw(st.sampled_from([2, 2, 3]))
    window = tuple(draw(st.integers(1, 11 if rank == 2 else 5), label="window") for _ in range(rank))
    size, frame = [], list(window)
    for axis, w in enumerate(window):
        size.append(draw(st.integers(1, min(2 * w + 1, 500 // math.prod(frame) * w)), label="size"))
        frame[axis] = -(-size[axis] // w) * w
    shift = tuple(draw(st.integers(0, w - 1), label="shift") for w in window)
    options: dict = {"pad_order": draw(st.sampled_from(["pad_then_roll", "roll_then_pad"]))}
    if draw(st.booleans()):
        options["grid"], shift = True, (0,) * rank
    if draw(st.booleans()):
        options["pad_before"] = tuple(draw(st.integers(0, p - s)) for p, s in zip(frame, size, strict=True))
    regions = draw(st.sampled_from(["shift", "periodic", "map"]))
    if regions == "periodic":
        joined = ends_that_may_meet(size, window, shift, options["pad_order"])
        options["periodic"] = tuple(may and draw(st.booleans()) for may in joined)
    if regions == "map":
        options["region_map"] = _regions(*frame)
    if draw(st.booleans()):
        options["mask_value"] = -3.0
    cosine = cosine and draw(st.booleans())
    if not cosine and draw(st.booleans()):
        options["scale"] = 0.25
    bias = draw(st.sampled_from(["none", "table", "larger table", "dense", "types"]))
    if bias == "larger table":
        options["table_window"] = tuple(w + 2 for w in window)
    return Case(
        draw(st.integers(1, 3)),
        tuple(size),
        draw(st.integers(1, 3)),
        # With a small head_dim, the float32 reference may be exact, which leaves no error budget: with head_dim 1, all
        # unit rows are 1 or -1.
        draw(st.integers(4 if cosine else 1, 40)),
        window,
        shift,
        has_table="table" in bias,
        has_pad_qkv=draw(st.booleans()),
        has_logit_scale=cosine,
        bias_types={"dense": 0, "types": frame[0] // window[0]}.get(bias),
        options=options,
    )


@settings(max_examples=60, deadline=None)
@given(arithmetic=st.sampled_from(["bfloat16", "float16", "float32"]), data=st.data())
def test_any_case(arithmetic, data):
    built = emulation.window_attention_library()
    built.configure()
    op, dtype = built.window_attention_qkvpacked, getattr(torch, arithmetic)
    # If the cosines are multiplied by 100, one key of a row dominates. The row of dS, which sums to zero, then consists
    # of rounding errors, which are too small for float16.
    case = data.draw(_cases(cosine=dtype != torch.float16))
    eps = torch.finfo(dtype).eps * (2 if dtype != torch.float32 else 64 if case.has_logit_scale else 4)
    check_window_attention(op, case, dtype, eps=eps, cancels=True)


# Dropout

DROPOUT = {
    "short": Case(2, (8, 6), 2, 32, 4, 1, has_pad_qkv=True, options={"dropout_p": 0.3}),
    "window 7, v2": Case(1, (12, 14), 2, 32, 7, 3, has_pad_qkv=True, options={"dropout_p": 0.1}, **COSINE),
    "long": Case(2, (9, 8), 2, 16, 9, 4, has_pad_qkv=True, options={"dropout_p": 0.5}),
    "long, wide heads, types": Case(1, (18, 8), 1, 72, 9, 4, False, True, False, 2, {"dropout_p": 0.25}),
    "hardly any kept": Case(1, (8, 8), 2, 16, 8, 4, options={"dropout_p": 0.99999}),
    "all": Case(1, (8, 8), 2, 16, 4, 1, options={"dropout_p": 1.0}),
}


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("name", DROPOUT)
def test_dropout(library, name, arithmetic, monkeypatch):
    """The kernels and the reference agree if the reference drops the same attention weights."""
    case, seed = DROPOUT[name], -(2**62) + 12345
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    shape = (case.batch, windows, case.num_heads, math.prod(case.window_tuple))
    kept = kept_weights(seed, case.options["dropout_p"], *shape)
    monkeypatch.setattr(Tensor, "bernoulli_", lambda self, p, generator=None: self.copy_(kept))
    _check(library, case, arithmetic, dropout_seed=seed)


def test_dropout_rate_and_seeds():
    p, shape = 0.3, (2, 4, 3, 49)
    a, b = (kept_weights(seed, p, *shape) for seed in (1, 2))
    for kept in (a, b):
        assert abs(kept.double().mean() - (1 - p)) < 4 * math.sqrt(p * (1 - p) / kept.numel())
        rows, columns = kept.double().mean((0, 1, 2, 4)), kept.double().mean((0, 1, 2, 3))
        assert ((rows - 0.7).abs() < 0.1).all() and ((columns - 0.7).abs() < 0.1).all()
    agreement = (a == b).double().mean()
    assert abs(agreement - (p * p + (1 - p) ** 2)) < 0.01  # the value for independent masks


def test_philox_is_that_of_the_paper():
    """The output equals the known answers in Random123, the Philox authors' library (kat_vectors, philox4x32 10)."""
    answers = {
        (0x00000000,) * 6: (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
        (0xFFFFFFFF,) * 6: (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    }
    for (k0, k1, *counter), expected in answers.items():
        got = philox(k0 | k1 << 32, np.array(counter, dtype=np.uint32))
        assert tuple(map(int, got)) == expected


# Extremes


def test_dscores_beyond_float16(library):
    """dP = dout v^T may be far above 65504 although every gradient fits float16."""
    for case in (
        Case(2, (14, 7), 2, 32, 7, 3, has_pad_qkv=True),
        Case(2, (14, 7), 2, 32, 7, 3, has_pad_qkv=True, **COSINE),
        Case(1, (9, 16), 1, 16, 9, 4),
        Case(1, (9, 8), 1, 96, 9, 4),
    ):
        inputs = case.inputs(torch.float16)
        qkv = inputs["qkv"].unflatten(-1, (3, -1))
        # Only every third row of the map has a large dout, so blocks of rows need different scaling.
        qkv[..., 2, :] *= 500
        inputs["dout"][:, ::3] *= 500
        if not case.has_logit_scale:
            qkv[..., :2, :] *= 2.0**-8
        else:
            qkv[..., :2, :] *= 2.0**9
        got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
        wide = {name: x.double() for name, x in inputs.items()}
        exact = run_case(reference.window_attention_qkvpacked, wide, case.arguments())
        for name, x in exact.items():
            in_range = x.abs() <= torch.finfo(got[name].dtype).max
            assert got[name][in_range].isfinite().all(), name
            error = (got[name].double() - x)[in_range]
            assert error.square().mean().sqrt() <= 1e-3 * x[in_range].square().mean().sqrt(), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_window(library, dtype):
    """Infinities in one window do not reach others: unused rows of a tile are zeroed for each window, or never read."""
    for head_dim in (10, 16, 24, 30, 32):
        case = Case(4, (7, 14), 1, head_dim, 7, 0, has_table=False)
        inputs = case.inputs(dtype)
        expected = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
        inputs["qkv"][0, :, :7] = math.inf
        library.configure(multiprocessors=1)
        got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
        library.configure()
        for name in ("out", "dqkv"):
            assert got[name][0, :, :7].isnan().any()
            assert torch.equal(got[name][0, :, 7:], expected[name][0, :, 7:]), (name, head_dim)
            assert torch.equal(got[name][1:], expected[name][1:]), (name, head_dim)


@pytest.mark.parametrize("size", [(7, 7), (9, 9)], ids=["short", "long"])
def test_rows_of_length_zero(library, size):
    """v2 divides rows of zeros by 1e-12; their gradients are of the order of 1e12."""
    case = Case(1, size, 2, 16, size, 0, **COSINE)
    inputs = case.inputs(torch.float32)
    inputs["qkv"].unflatten(-1, (3, 2, 16))[0, 0, 1, :2, 0] = 0.0
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    exact = run_case(reference.window_attention_qkvpacked, {k: x.double() for k, x in inputs.items()}, case.arguments())
    zero = inputs["qkv"].unflatten(-1, (3, 2, 16)) == 0
    assert zero.sum() == 32
    for rows in (zero, ~zero):
        x, y = (r["dqkv"].unflatten(-1, (3, 2, 16))[rows].double() for r in (got, exact))
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4 * y.abs().max().item())
    torch.testing.assert_close(got["out"].double(), exact["out"], rtol=1e-4, atol=1e-4)


def test_clamped_logit_scale_has_no_gradient(library):
    """torch.clamp uses ln 100 in double precision, which is below the nearest float32 number."""
    case = Case(1, (8, 8), 3, 16, 4, 1, **COSINE)
    inputs = case.inputs(torch.float32)
    above = torch.tensor(math.log(100.0))
    inputs["logit_scale"] = torch.stack([above, above.nextafter(torch.tensor(0.0)), above + 1]).reshape(3, 1, 1)
    got, plain = (
        run_case(op, inputs, case.arguments())["dlogit_scale"].flatten()
        for op in (library.window_attention_qkvpacked, reference.window_attention_qkvpacked)
    )
    assert plain[0] == plain[2] == 0 != plain[1]
    assert got[0] == got[2] == 0
    torch.testing.assert_close(got[1], plain[1], rtol=0.02, atol=1e-4)


ANY_SCHEDULE = [
    *(WINDOWS[i] for i in (1, 4, 6, 7)),
    FEATURES["v2"],
    FEATURES["v2, long window, pads"],
    FEATURES["types, long window"],
    TABLE_TYPES["long, even rows, pads"],
    TABLE_PAIRS["long, Pangu"],
    ODD_HEAD_DIMS[2],
]


@pytest.mark.parametrize("arithmetic", ["bfloat16", "tf32", "float32"])
@pytest.mark.parametrize("case", ANY_SCHEDULE, ids=str)
def test_same_bits_whatever_the_schedule(library, case, arithmetic):
    dtype = torch.bfloat16 if arithmetic == "bfloat16" else torch.float32
    inputs = case.inputs(dtype)
    arguments = {**case.arguments(), "allow_tf32": arithmetic == "tf32"}
    library.check_schedules(lambda: run_case(library.window_attention_qkvpacked, inputs, arguments), seeds=(1, 2, 3))


@pytest.mark.parametrize("multiprocessors", [1, 3, 7, 200])
def test_any_number_of_multiprocessors(library, multiprocessors):
    """The grid ranges from one block that loops over all windows to more blocks than the windows need."""
    library.configure(multiprocessors=multiprocessors)
    for case in (
        Case(3, (8, 6), 2, 32, 4, 1, has_pad_qkv=True),
        Case(1, (12, 10), 1, 32, 9, 4, has_pad_qkv=True),
        FEATURES["a type for each window, v2"],
        FEATURES["types, long window"],
        TABLE_TYPES["a type for each window"],
        TABLE_TYPES["long"],
        TABLE_TYPES["long, wide heads"],
    ):
        _check(library, case, "bfloat16")


def test_rows_of_a_larger_tensor(library):
    """Gaps after heads, rows and images have no effect. (With head_dim 16, the runs would use different kernels.)"""
    case = Case(2, (7, 6), 2, 8, 4, 1, has_pad_qkv=True)
    inputs = case.inputs(torch.float16)
    dense = library.run(**inputs, **case.arguments())
    strided = library.run(**inputs, **case.arguments(), spread=True)
    for name in dense:
        assert torch.equal(dense[name], strided[name]), name


# Short windows in 16 bits: every head_dim, every number of tiles, seams on either axis, pads, grids, and biases.
SHORT16 = {
    "seams": Case(2, (14, 21), 3, 32, 7, 3),
    "seam of y": Case(1, (14, 14), 2, 32, 7, (3, 0)),
    "seam of x": Case(1, (14, 14), 2, 32, 7, (0, 2)),
    "seam of one window": Case(2, (7, 7), 1, 32, 7, 2),
    "periodic axis": Case(1, (14, 14), 1, 32, 7, 3, options={"periodic": (True, False)}),
    "window 8": Case(1, (16, 8), 2, 32, 8, 3),
    "window 4": Case(2, (8, 12), 2, 32, 4, 1),
    "6 x 6: an idle warp": Case(2, (12, 6), 2, 32, 6, 1),
    "one token": Case(2, (7, 8), 2, 32, 1, 0),
    "head_dim 16": Case(1, (14, 14), 2, 16, 7, 3),
    "head_dim 16, window 8, pads": Case(1, (15, 9), 2, 16, 8, 3, has_pad_qkv=True),
    "head_dim 16, window 4, pads": Case(2, (7, 6), 2, 16, 4, 1, has_pad_qkv=True),
    "head_dim 24": Case(1, (14, 14), 2, 24, 7, 3),
    "head_dim 24, window 8": Case(1, (16, 8), 2, 24, 8, 4),
    "head_dim 24, window 4, zero pads": Case(2, (7, 6), 2, 24, 4, 1),
    "head_dim 64, pads": Case(1, (13, 14), 1, 64, 7, 3, has_pad_qkv=True),
    "head_dim 64, window 8": Case(1, (16, 8), 1, 64, 8, 4),
    "head_dim 64, window 5": Case(1, (5, 10), 2, 64, 5, 2),
    "pads before, rolled first": Case(
        1, (12, 12), 2, 32, 7, 3, has_pad_qkv=True, options={"pad_before": (1, 2), **ROLL_THEN_PAD}
    ),
    "map smaller than the window": Case(2, (3, 2), 1, 32, (7, 6), 4, has_pad_qkv=True, options=ROLL_THEN_PAD),
    "grid": Case(1, (14, 21), 2, 32, 7, 0, options={"grid": True}),
    "grid with pads": Case(1, (13, 16), 1, 32, 7, 0, has_pad_qkv=True, options={"grid": True}),
    "dense": Case(1, (14, 14), 2, 32, 7, 3, **DENSE),
    "no bias": Case(1, (14, 14), 2, 32, 7, 3, has_table=False),
    "window decoded in a larger one": Case(1, (14, 12), 2, 32, (7, 6), 3, options={"table_window": (7, 8)}),
}


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SHORT16)
def test_short_windows_in_16_bits(library, name, arithmetic):
    _check(library, SHORT16[name], arithmetic)


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["seams", "head_dim 16, window 8, pads", "head_dim 64, window 8"])
def test_short_windows_have_the_same_bits_whatever_the_schedule(library, name, arithmetic):
    case = SHORT16[name]
    inputs = case.inputs(getattr(torch, arithmetic))
    library.check_schedules(
        lambda: run_case(library.window_attention_qkvpacked, inputs, case.arguments()),
        seeds=(1, 2, 3),
        multiprocessors=1,  # blocks reuse their tiles
    )


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["seams", "head_dim 16", "head_dim 24", "head_dim 64, pads", "dense"])
def test_separate_maps_give_the_same_bits(library, name, arithmetic):
    case = SHORT16[name]
    inputs = case.inputs(getattr(torch, arithmetic))
    packed = library.run(**inputs, **case.arguments())
    separate = library.run(**inputs, **case.arguments(), separate=True)
    for key in packed:
        assert torch.equal(packed[key], separate[key]), key


@pytest.mark.parametrize("arithmetic", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("case", [*(SHORT16[n] for n in ("seams", "head_dim 16", "window 8")), *WINDOWS[5:8]], ids=str)
def test_inference_without_lse_has_the_bits_of_training(library, case, arithmetic):
    inputs = case.inputs(getattr(torch, arithmetic))
    trained = library.run(**inputs, **case.arguments())["out"]
    del inputs["dout"]
    assert torch.equal(library.infer(**inputs, **case.arguments()), trained)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [-300.0, -200.0, -60.0, 60.0, 200.0, "rows"], ids=str)
def test_scores_far_from_zero(library, shift, dtype):
    """A constant added to a row of scores changes nothing; in bfloat16, the row maximum is computed only if needed."""
    case = SHORT16["dense"]
    inputs = case.inputs(dtype)
    offset = torch.linspace(-250, 250, 49)[:, None] if shift == "rows" else shift
    far = {**inputs, "bias": inputs["bias"] + offset}
    got = run_case(library.window_attention_qkvpacked, far, case.arguments())
    exact = run_case(
        reference.window_attention_qkvpacked, {name: x.double() for name, x in far.items()}, case.arguments()
    )
    for name, x in exact.items():
        assert got[name].isfinite().all(), name
        error = (got[name].double() - x).square().mean().sqrt() / x.square().mean().sqrt()
        assert error <= 0.75 * torch.finfo(dtype).eps, (name, error / torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_200(library, dtype):
    """The first image has scores of +-200, from large q and k; the second has ordinary scores."""
    case = SHORT16["seams"]
    inputs = case.inputs(dtype)
    inputs["qkv"].unflatten(-1, (3, -1))[:1, :, :, :2] *= 200**0.5
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    exact = run_case(
        reference.window_attention_qkvpacked, {name: x.double() for name, x in inputs.items()}, case.arguments()
    )
    for name, x in exact.items():
        assert got[name].isfinite().all(), name
        error = (got[name].double() - x).square().mean().sqrt() / x.square().mean().sqrt()
        assert error <= 4 * torch.finfo(dtype).eps, (name, error / torch.finfo(dtype).eps)


def _window_tokens(size, window, shift, item):
    """Return the indices of the tokens of window ``item``, for a ``size`` that is a multiple of ``window``."""
    columns = size[1] // window[1]
    first = item // columns * window[0] + shift[0], item % columns * window[1] + shift[1]
    y, x = ((first[axis] + torch.arange(window[axis])) % size[axis] for axis in range(2))
    return (y[:, None] * size[1] + x).flatten()


@pytest.mark.parametrize("item", [0, 9299, 70_000, 65_000_000, 9300 * 9300 - 1])
def test_token_numbers_beyond_32_bits_of_sign(library, item):
    """On a map of 65100 x 65100 tokens (86 million windows), token indices need 32 bits, and byte offsets need more."""
    size, window, shift = (65100, 65100), (7, 7), (3, 2)
    got = library.find_tokens(size, window, shift, item)
    assert torch.equal(got, _window_tokens(size, window, shift, item))


def test_what_32_bits_do_not_number_goes_to_the_general_kernel(library):
    assert library.find_tokens((65534, 65534), (7, 7), (0, 0)) is not None
    assert library.find_tokens((65534, 65534), (7, 7), (0, 0), batch=2) is None
    assert library.find_tokens((65541, 65541), (7, 7), (0, 0)) is None


def test_lse(library):
    """lse is the natural log-sum-exp of the scores, with axes in the order (batch, window, head, query)."""
    case = Case(2, (4, 8), 2, 16, 4, 0)
    inputs = case.inputs(torch.float16)
    lse = library.run(**inputs, **case.arguments())["lse"]
    q, k, _ = inputs["qkv"].double().reshape(2, 4, 2, 4, 3, 2, 16).permute(4, 0, 2, 5, 1, 3, 6).flatten(4, 5)
    token = torch.arange(16)
    offset = (token // 4)[:, None] - (token // 4) + 3, (token % 4)[:, None] - token % 4 + 3
    bias = inputs["bias_table"].double()[offset[0] * 7 + offset[1]].permute(2, 0, 1)
    expected = torch.logsumexp(q @ k.mT / math.sqrt(16) + bias, -1)
    # The kernels compute lse from the sum of the rounded probabilities, by which they also divide the output.
    torch.testing.assert_close(lse.double(), expected, rtol=0, atol=torch.finfo(torch.float16).eps / 2)


def test_empty_batch(library):
    results = _check(library, Case(0, (8, 8), 2, 16, 4, 1), "float16")
    assert results["out"].shape == (0, 8, 8, 32)
    assert results["dbias_table"].eq(0).all()


def test_gradients_that_nobody_wants(library):
    case = Case(1, (7, 8), 2, 16, 4, 1, has_pad_qkv=True)
    inputs = case.inputs(torch.float16)
    wanted = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    qkv = inputs["qkv"].clone().requires_grad_()
    out = library.window_attention_qkvpacked(qkv, inputs["bias_table"], pad_qkv=inputs["pad_qkv"], **case.arguments())
    (dqkv,) = torch.autograd.grad(out, qkv, inputs["dout"])
    assert torch.equal(dqkv, wanted["dqkv"])


@pytest.mark.parametrize(
    "case",
    [Case(1, (33, 32), 1, 16, (33, 32), 0), Case(1, (4, 4), 1, 136, 4, 0)],
    ids=["window volume", "head_dim"],
)
def test_what_has_no_kernel_is_refused(library, case):
    case_inputs = case.inputs(torch.float16)
    case_inputs.pop("dout")
    with pytest.raises((emulation.LaunchError, ValueError)):
        library.window_attention_qkvpacked(**case_inputs, **case.arguments())


@pytest.mark.long
def test_more_than_65535_windows(library: emulation.WindowAttentionLibrary) -> None:
    """With one token per window, out is v and dv is about dout, so a window visited twice or never is detected."""
    images, size = 3, (148, 149)
    generator = torch.Generator().manual_seed(0)
    qkv, dout = (torch.randn(images, *size, c, generator=generator).bfloat16() for c in (96, 32))
    assert images * math.prod(size) > 65535
    library.configure(multiprocessors=1)
    got = library.run(qkv, dout, torch.zeros(1, 1), num_heads=1, window_size=1)
    q, k, v = qkv.chunk(3, dim=-1)
    dq, dk, dv = got["dqkv"].reshape(qkv.shape).chunk(3, dim=-1)
    assert torch.equal(got["out"].reshape(v.shape), v)
    # If P were exactly 1, dv would equal dout and other gradients would be zero. P is recomputed from a rounded lse.
    torch.testing.assert_close(dv, dout, rtol=torch.finfo(torch.bfloat16).eps, atol=0)
    most = torch.finfo(torch.bfloat16).eps * (dout.double() * v.double()).sum(-1).abs().max()
    for name, x, factor in (("dq", dq, k), ("dk", dk, q)):
        assert x.abs().max() <= most * factor.abs().max() * 32**-0.5, name
    assert got["dbias_table"].abs().max() <= most * images * math.prod(size), "dbias_table"
    lse = (q.double() * k.double()).sum(-1) * 32**-0.5
    torch.testing.assert_close(got["lse"].flatten().double(), lse.flatten(), rtol=1e-4, atol=2**-8)
