"""Tests the emulated CUDA kernels for decomposed relative positions (``axis_tables``) against the float64 reference."""

from __future__ import annotations

import functools
import math
import subprocess
import sys

import pytest
import torch

from swinkernels import reference
from swinkernels.testing import WindowAttentionCase, check_window_attention, run_case
from tests import emulation

pytestmark = pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing()))

Case = functools.partial(WindowAttentionCase, has_table=False, has_axis_tables=True)
DTYPES = [torch.bfloat16, torch.float16]
REGIONS = torch.arange(64, dtype=torch.int32).reshape(8, 8) * 7919 % 3
# Windows of 15 to 256 tokens: even and odd sides, one and several blocks of queries, every head_dim class.
CASES = {
    "SAM-B": Case(1, (14, 28), 1, 64, 14),
    "SAM-B, pads": Case(1, (10, 20), 1, 64, 14, has_pad_qkv=True),
    "SAM-B, zero pads": Case(1, (13, 14), 1, 64, 14),
    "three heads": Case(2, (9, 12), 3, 24, (9, 12)),
    "shifted": Case(1, (24, 24), 1, 32, 12, 5),
    "shifted, pads": Case(2, (9, 14), 2, 16, 4, 1, has_pad_qkv=True),
    "shifted, rolled first": Case(1, (13, 11), 1, 40, (10, 9), (3, 4), has_pad_qkv=True,
                                  options={"pad_order": "roll_then_pad"}),
    "of two sides": Case(1, (6, 10), 3, 8, (3, 5), (1, 2), options={"scale": 0.3}),
    "16 x 16": Case(1, (16, 16), 1, 64, 16),
    "16 x 5": Case(1, (16, 10), 1, 48, (16, 5), (0, 2)),
    "one row": Case(2, (1, 32), 2, 16, (1, 16)),
    "grid": Case(1, (18, 18), 1, 16, 9, options={"grid": True}),
    "masked out": Case(1, (8, 12), 2, 16, 4, 2, options={"mask_value": -math.inf}),
    "region map": Case(1, (8, 8), 2, 16, 4, 1, options={"region_map": REGIONS}),
    "periodic axis": Case(1, (8, 8), 2, 16, 4, 2, options={"periodic": (False, True)}),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients(library, name, dtype):
    """The terms of the gradient of a table with one row cancel to zero."""
    has_one_row = 1 in CASES[name].window_tuple
    check_window_attention(library.window_attention_qkvpacked, CASES[name], dtype, cancels=has_one_row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_lse(library, dtype):
    case = CASES["shifted, pads"]
    inputs = case.inputs(dtype)
    expected = run_case(library.window_attention_qkvpacked, inputs, case.arguments())["out"]
    tables = tuple(x for name, x in inputs.items() if name.startswith("axis_tables"))
    got = library.infer(inputs["qkv"], pad_qkv=inputs["pad_qkv"], axis_tables=tables, **case.arguments())
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["SAM-B, pads", "shifted, pads"])
def test_same_bits_whatever_the_schedule(library, name, dtype):
    inputs, arguments = CASES[name].inputs(dtype), CASES[name].arguments()
    library.check_schedules(lambda: run_case(library.window_attention_qkvpacked, inputs, arguments))


@pytest.mark.parametrize("multiprocessors", [1, 3, 200])
def test_any_number_of_multiprocessors(library, multiprocessors):
    library.configure(multiprocessors=multiprocessors)
    check_window_attention(library.window_attention_qkvpacked, Case(3, (9, 18), 2, 16, 9, 4), torch.bfloat16)


@pytest.mark.parametrize("window", [(7, 7), (8, 8), (4, 16), (14, 14)], ids=str)
def test_little_shared_memory(library, window):
    """With 49 to 64 tokens, blocks of four warps need more than 99 KB, so blocks have three warps, the minimum."""
    library.configure(shared_bytes=99 * 1024)
    case = Case(1, tuple(2 * w for w in window), 1, 16, window, 1)
    check_window_attention(library.window_attention_qkvpacked, case, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tables_of_more_digits_than_the_maps(library, dtype):
    """The products of queries and tables reach 100; a single rounding to bfloat16 would change them by up to 0.2.

    The gradient of q is left out: its terms cancel, because every row of dS sums to zero.
    """
    case = Case(1, (9, 12), 1, 32, (9, 12))
    inputs = case.inputs(dtype)
    for name in ("axis_tables.0", "axis_tables.1"):
        inputs[name] = 8 * inputs[name] + 12
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    _assert_near({**got, "dqkv": got["dqkv"][..., 32:]}, case, inputs, 1.0)


@pytest.mark.parametrize(("table", "query"), [(18, -14), (-16, 13)])
def test_tables_beyond_float16(library, table, query):
    """Tables scaled by 2 ** ``table`` are outside float16's range; queries scaled by 2 ** ``query`` compensate."""
    case = Case(1, (9, 12), 1, 16, (9, 12), options={"scale": 2.0 ** (-2 - query)})
    inputs = case.inputs(torch.float16)
    q, k, v = inputs["qkv"].chunk(3, -1)
    inputs["qkv"] = torch.cat([(q.float() * 2.0**query).half(), k, v], -1)
    for name in ("axis_tables.0", "axis_tables.1"):
        inputs[name] = inputs[name] * 2.0**table
    inputs["dout"] = inputs["dout"] * 2.0 ** min(0, 8 - table)  # the gradient of q is proportional to the tables
    _assert_near(run_case(library.window_attention_qkvpacked, inputs, case.arguments()), case, inputs, 1.0)


def test_dscores_beyond_float16(library):
    """dS and its sums over keys exceed 65504; small queries, keys and tables keep the gradients in range."""
    case = Case(2, (9, 12), 1, 16, (9, 12))
    inputs = case.inputs(torch.float16)
    factors = torch.tensor([2.0**-6, 2.0**-6, 2000.0]).repeat_interleave(16)
    inputs["qkv"] = (inputs["qkv"].float() * factors).half()
    inputs["dout"] = (inputs["dout"].float() * 2000).half()
    for name in ("axis_tables.0", "axis_tables.1"):
        inputs[name] = inputs[name] * 2**-6
    dprobs = inputs["dout"][0].flatten(0, 1).float() @ inputs["qkv"][0, ..., 32:].flatten(0, 1).float().T
    assert dprobs.abs().max() / 108 > 65504  # all probabilities are about 1 / 108
    got = run_case(library.window_attention_qkvpacked, inputs, case.arguments())
    _assert_near(got, case, inputs, 1.0)


def test_what_is_not_finite_stays_in_its_window(library):
    library.check_isolation(Case(2, (9, 18), 1, 24, 9))


@pytest.mark.parametrize(
    "case",
    [
        Case(1, (17, 4), 1, 16, (17, 4)),
        Case(1, (14, 14), 1, 80, 14),
        Case(1, (4, 4), 1, 12, 4),
        Case(1, (2, 3, 4), 1, 16, (2, 3, 4)),
        Case(1, (4, 4), 1, 16, 4, options={"dropout_p": 0.5}),
    ],
    ids=str,
)
def test_other_calls_are_refused(library, case):
    """Calls that the support check rejects are rejected by the launch functions, too."""
    with pytest.raises(RuntimeError):
        run_case(library.window_attention_qkvpacked, case.inputs(torch.bfloat16), case.arguments())


_IRREGULAR = """
import torch
import swinkernels
from tests.emulation import bindings

bindings.attach()
torch.manual_seed(0)
tables = torch.randn(17, 16), torch.randn(23, 16)
found = []
for cut in (lambda x: x[:, :9, :12], lambda x: x[:, :9, :12].contiguous()):
    torch.manual_seed(1)
    maps = [cut(torch.randn(2, 10, 13, 1, 16).bfloat16()).detach().requires_grad_() for _ in range(3)]
    out = swinkernels.window_attention(*maps, num_heads=1, window_size=(9, 12), axis_tables=tables, backend="cuda")
    found.append((out, *torch.autograd.grad(out.float().square().sum(), maps)))
assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
assert all(x.isfinite().all() for x in found[0])
"""


@pytest.mark.parametrize(
    ("room", "windows"),
    [(99, [(14, 14), (16, 12), (12, 16), (13, 15), (15, 13), (1, 1)]), (163, [(16, 16), (16, 15)])],
    ids=["99 KB", "163 KB"],
)
def test_the_backward_pass_fits_into_shared_memory(library, room, windows):
    """The support check admits ``windows`` on devices with ``room`` KB of shared memory per block, so the backward pass
    must fit.
    """
    library.configure(shared_bytes=room * 1024)
    for window in windows:
        tables = tuple(torch.empty(2 * w - 1, 64) for w in window)
        arguments = {"num_heads": 1, "window_size": window, "axis_tables": tables}
        qkv = torch.empty(1, *window, 3 * 64, dtype=torch.bfloat16)
        assert library.workspace_bytes(qkv, ["axis_tables"], **arguments) > 0, window


_ODD_ADDRESS = """
import torch
from swinkernels.testing import WindowAttentionCase, op_arguments
from tests.emulation import bindings

bindings.attach()
case = WindowAttentionCase(1, (9, 12), 1, 16, (9, 12), has_table=False, has_axis_tables=True)
qkv, bias_table, tables, *rest = op_arguments(case, "window_attention_qkvpacked", torch.bfloat16, torch.device("cpu"))
memory = torch.empty(tables.numel() + 1)
first = 1 if memory.data_ptr() % 8 == 0 else 0
odd = memory[first:][: tables.numel()].view_as(tables).copy_(tables)
assert odd.data_ptr() % 8 == 4
op = torch.ops.swinkernels.window_attention_qkvpacked_fwd.default
with torch._C._AutoDispatchBelowAutograd():
    expected, got = (op(qkv, bias_table, x, *rest) for x in (tables, odd))
assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [_IRREGULAR, _ODD_ADDRESS], ids=["gaps between rows of tokens", "odd address of tables"]
)
def test_the_bindings_copy_what_the_kernels_cannot_read(script):
    """The kernels need a constant stride between the tokens of a map, and tables aligned to 8 bytes."""
    from tests.emulation import bindings

    done = subprocess.run([sys.executable, "-c", script], env=bindings.environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _assert_near(got, case, inputs, most):
    """Check that relative RMS errors against float64 are at most ``most`` times the epsilon of the maps' dtype."""
    eps = torch.finfo(inputs["qkv"].dtype).eps
    wide = {name: x.double() for name, x in inputs.items()}
    for name, x in run_case(reference.window_attention_qkvpacked, wide, case.arguments()).items():
        x = x[..., -got[name].shape[-1] :]
        error = got[name].double() - x
        assert error.square().mean().sqrt() <= most * eps * x.square().mean().sqrt(), name
