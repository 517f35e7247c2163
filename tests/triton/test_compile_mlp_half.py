"""Tests that the Triton kernel of the MLP half compiles within its register and shared memory limits."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from swinkernels.ops import _backends
from swinkernels.triton import _mlp_half_kernels as kernels
from swinkernels.triton import mlp_half
from tests.support.sweeps import in_turn
from tests.support.triton_compiler import (
    OLD_TRITON,
    SHARED_BYTES,
    JITFunction,
    Launch,
    check_source,
    compile_launch,
    kernels_of,
    recorded,
    resources,
)

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "swin": {"channels": 96},
    "swin_branch": {"channels": 96, "branch": True},
    "swin_stage_2": {"channels": 192},
    "swin_stage_2_branch": {"channels": 192, "branch": True, "dtype": F16},
    "swin_v2": {"channels": 96, "post": True, "dtype": F16},
    "swin_v2_stage_2": {"channels": 192, "post": True},
    "autocast": {"channels": 96, "read": F32, "branch": True},
    "autocast_stage_2": {"channels": 192, "read": F32, "branch": True},
    "autocast_v2": {"channels": 192, "read": F32, "post": True, "dtype": F16},
    "bare_tanh": {"channels": 96, "bare": True, "tanh": True},
}
# On sm_80, a few registers are spilled before the loop and reloaded after it, so that with 96 channels two programs fit
# on a multiprocessor.
STACK_BYTES = {80: 32, 90: 0}


def record(
    channels: int, dtype: torch.dtype = BF16, read: torch.dtype | None = None, branch: bool = False,
    post: bool = False, tanh: bool = False, bare: bool = False, rows: int = 3000,
) -> Launch:  # fmt: skip
    """Return the recorded launch of one mlp_half call."""

    def empty(*shape: int, of: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    hidden, read = 4 * channels, read or dtype
    x, norm = empty(rows, channels, of=read), None if bare else empty(channels, of=read)
    biases = (None, None) if bare else (empty(hidden), empty(channels))
    with recorded(kernels) as launches:
        mlp_half.forward(
            x, empty(rows, channels) if branch else None, norm, norm, empty(hidden, channels), biases[0],
            empty(channels, hidden), biases[1], 1e-5, post, tanh,
        )  # fmt: skip
    (launch,) = launches
    return launch


@pytest.mark.parametrize(("configuration", "arch"), in_turn(CONFIGURATIONS, list(SHARED_BYTES)))
def test_compiles_within_resources(configuration, arch):
    launch = record(**CONFIGURATIONS[configuration])
    used = resources(launch, arch)
    assert used["LOCAL"] == 0, used
    assert OLD_TRITON or used["STACK"] <= STACK_BYTES[arch], used
    programs = 2 if CONFIGURATIONS[configuration]["channels"] == 96 else 1  # on a multiprocessor
    assert programs * (used["SHARED"] + 1024) <= SHARED_BYTES[arch], used
    assert programs * used["REG"] * 32 * mlp_half.WARPS <= 2**16, used


@pytest.mark.parametrize(("arch", "channels"), [(90, 96), (80, 192)])
def test_products_and_weights_of_a_loop(arch, channels):
    """All products run on the matrix units, and the left operand of fc2 does not pass through shared memory."""
    ir = compile_launch(record(channels), arch).asm["ttgir"]
    (loop,) = re.findall(r"scf\.for .*?\n    }", ir, re.DOTALL)
    products = re.findall(r"ttng\.warp_group_dot |tt\.dot ", loop)
    assert len(products) == 4
    assert "local_store" not in loop


def test_every_kernel_is_compiled():
    assert {record(**c).name for c in CONFIGURATIONS.values()} == {*kernels_of(kernels)} - {"gelu"}


def test_the_checks_of_the_op_know_the_tiles():
    assert _backends.MLP_HALF_CHUNK == mlp_half.CHUNK
    for channels in _backends.MLP_HALF_CHANNELS:
        record(channels)
    assert all(c["channels"] in _backends.MLP_HALF_CHANNELS for c in CONFIGURATIONS.values())


def test_batch_size_does_not_recompile():
    (rows,) = (p for p in kernels.fwd.params if p.name == "rows")
    assert rows.do_not_specialize


def test_what_32_bits_do_not_count_is_refused():
    with pytest.raises(ValueError, match=r"mlp_half: .* fewer than 2\*\*31 tokens .*, got 2147483648 tokens"):
        record(96, rows=2**31)
    weight = torch.empty(2**24, 192, device="meta", dtype=F16)
    with pytest.raises(ValueError, match=r"mlp_half: .* weights of fewer than 2\*\*31 .*, got .* 3221225472"):
        mlp_half.forward(
            torch.empty(2, 192, device="meta"), None, None, None, weight, None, weight.T, None, 1e-5, False, False
        )


@pytest.mark.parametrize("name", [n for n, f in vars(kernels).items() if isinstance(f, JITFunction)])
def test_the_source_compiles_before_triton_3_8(name):
    check_source(getattr(kernels, name).fn)
