"""Tests that the Triton kernels of window attention compile for sm_80 and sm_90 within their resource limits.

Covers every kernel, dtype and kind of configuration; no GPU is needed.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from swinkernels.ops._arguments import make_window_spec
from swinkernels.triton.window_attention import (
    axis_tables,
    backward,
    backward_keys,
    backward_tables,
    forward,
    gradients,
    key_windows,
    mask,
    rows,
    scores,
    windows,
)
from swinkernels.triton.window_attention import launch as launcher
from tests.support.sweeps import in_turn
from tests.support.triton_compiler import (
    OLD_TRITON,
    SHARED_BYTES,
    JITFunction,
    Launch,
    check_source,
    kernels_of,
    recorded,
    resources,
)

MODULES = (forward, backward, backward_tables, backward_keys)


def record(
    dtype, *, size, window, head_dim, shift=None, heads=3, batch=2, tf32=False, packed=True, bias="table",
    cosine=False, dropout=False, pad=False, region_map=False, roll_then_pad=False, grid=False,
    key_window=None,
) -> list[Launch]:  # fmt: skip
    """Return the recorded launches of a forward and a backward call with the given arguments."""
    with recorded(*MODULES) as launches:
        of_axes = (sum(2 * w - 1 for w in window), head_dim)
        window = (1,) * (3 - len(window)) + tuple(window)
        shift = tuple(shift or [0] * 3)
        shift = (0,) * (3 - len(shift)) + shift
        frame = [-(-s // w) * w for s, w in zip((1,) * (3 - len(size)) + tuple(size), window, strict=True)]
        meta = {"device": "meta", "dtype": dtype}
        if packed:
            maps = (torch.empty(batch, *size, 3, heads, head_dim, **meta),)
        else:
            maps = tuple(torch.empty(batch, *size, heads, head_dim, **meta) for _ in range(3))
        keys = window if key_window is None else (1,) * (3 - len(key_window)) + tuple(key_window)
        rows = math.prod(w + m - 1 for w, m in zip(window, keys, strict=True))
        volume = math.prod(window)
        shapes = {"table": (rows, heads), "dense": (heads, volume, volume), "types": (2, heads, volume, volume)}
        shapes["axes"] = of_axes
        shapes["pangu"] = (window[0] ** 2 * window[1] ** 2 * (2 * window[2] - 1), 2, heads)
        tables = (
            torch.empty(shapes[bias], device="meta") if bias in ("table", "pangu") else None,
            torch.empty(shapes[bias], device="meta") if bias in ("dense", "types", "axes") else None,
            torch.empty(heads, device="meta") if cosine else None,
            torch.empty(3, heads, head_dim, **meta) if pad else None,
            torch.empty(frame, device="meta", dtype=torch.int32) if region_map else None,
            torch.empty(1, device="meta", dtype=torch.int64) if dropout else None,
        )
        spec = make_window_spec(
            "op",
            len(size),
            head_dim,
            window_size=window[-len(size) :],
            shift_size=shift[-len(size) :],
            pad_order="roll_then_pad" if roll_then_pad else "pad_then_roll",
            grid=grid,
            key_window=key_window,
            dropout_p=0.1 if dropout else 0.0,
            table_pairs=(True, True, False) if bias == "pangu" else False,
            tables={"bias_table": tables[0], "axis_tables": tables[1] if bias == "axes" else None},
        )
        wire = spec.wire(allow_tf32=tf32), *spec.numbers
        out, lse = launcher.forward(maps, *tables, *wire)
        wanted = sum(1 << i for i, table in enumerate(tables[:4]) if table is not None)
        launcher.backward(torch.empty_like(out), maps, lse, *tables, *wire, wanted)
    return launches


# Configurations that together cover every kernel, tile, flag and addressing mode.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "swin": {"size": (56, 56), "window": (7, 7), "shift": (3, 3), "head_dim": 32},
    "swin_384": {"size": (48, 48), "window": (12, 12), "shift": (6, 6), "head_dim": 32},
    "small": {"size": (8, 8), "window": (4, 4), "head_dim": 24, "bias": None, "packed": False, "grid": True},
    "padded": {"size": (30, 40), "window": (7, 7), "shift": (3, 3), "head_dim": 64, "pad": True, "roll_then_pad": True},
    "wide_3d": {"size": (4, 9, 9), "window": (2, 8, 8), "head_dim": 128, "pad": True, "region_map": True},
    "v2": {"size": (64, 64), "window": (8, 8), "shift": (4, 4), "head_dim": 32, "cosine": True},
    "v2_long": {"size": (48, 48), "window": (24, 24), "shift": (12, 12), "head_dim": 32, "cosine": True},
    "types": {"size": (8, 24, 24), "window": (2, 4, 8), "shift": (1, 2, 4), "head_dim": 32, "bias": "types"},
    "dropout": {"size": (56, 56), "window": (7, 7), "shift": (3, 3), "head_dim": 32, "dropout": True},
    "pangu": {"size": (8, 12, 24), "window": (2, 6, 12), "shift": (1, 3, 6), "head_dim": 32, "bias": "pangu"},
    "key_window": {"size": (8, 12), "window": (4, 4), "key_window": (6, 6), "head_dim": 16, "bias": None},
    "hat": {"size": (64, 64), "window": (16, 16), "key_window": (24, 24), "head_dim": 30, "pad": True},
    "axes_small": {"size": (12, 12), "window": (6, 6), "shift": (3, 3), "head_dim": 16, "bias": "axes"},
    "axes": {"size": (64, 64), "window": (14, 14), "head_dim": 64, "bias": "axes", "pad": True},
    "axes_wide": {"size": (64, 64), "window": (14, 14), "head_dim": 80, "bias": "axes"},
    "axes_global": {"size": (64, 64), "window": (64, 64), "head_dim": 64, "bias": "axes"},
    "axes_thin": {"size": (2, 254), "window": (2, 254), "head_dim": 64, "bias": "axes"},
    "dropout_long": {"size": (32, 32), "window": (16, 16), "head_dim": 32, "bias": "dense", "dropout": True},
}
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
# The configurations for each precision: for bfloat16, all sizes that models use; for the others, every kernel and every
# kind of score and bias.
COMPILED = {
    "float32": ("swin", "small", "swin_384", "v2", "axes_small", "key_window", "dropout_long"),
    "tf32": ("swin", "small", "padded", "v2", "axes_small", "key_window"),
    "float16": ("swin", "swin_384", "v2", "v2_long", "axes_small", "key_window", "dropout_long"),
    "bfloat16": tuple(name for name in CONFIGURATIONS if name not in ("axes_small", "key_window")),
}
KERNELS = {name: kernel for module in MODULES for name, kernel in kernels_of(module).items()}
WHAT = [f"{precision}-{name}" for precision, names in COMPILED.items() for name in names]
# Configurations that only ``make test-all`` compiles.
SELDOM = [f"bfloat16-{name}" for name in ("pangu", "axes_wide", "axes_global", "axes_thin")]
SELDOM += ["tf32-axes_small", *(f"{precision}-key_window" for precision in ("float32", "tf32", "float16"))]
# bfloat16 has the same configurations and kernels as float16.
SELDOM += [f"float16-{name}" for name in COMPILED["float16"] if name not in ("axes_small", "key_window")]
SELDOM += ["float32-small", "float32-swin_384", "tf32-swin", "tf32-small"]
# ptxas may spill this many bytes to the stack to reach the next step of occupancy (128 or 168 registers per thread).
STACK_BYTES = 16
# Some kernels reach the limit of 255 registers and spill more. The backward pass of a whole window keeps bias and dbias
# in registers for all windows, and spills some values once per window. With large windows, two more kernels spill:
# v2's kernel for dk and dv, which normalises q again in every tile; and the kernel for dq with axis_tables at head_dim
# 80, which also holds the gradients of both axes. "axes_thin" has as many columns as shared memory allows; no model
# has so many. Triton 3.6 spills more than 3.8.
STACK_BYTES_OF = {"bwd_whole": 384 if OLD_TRITON else 192}
STACK_BYTES_IN = {
    "v2_long": 208,
    "axes_wide": 208,
    "axes_global": 48,
    "axes_thin": 4096,
    **({"v2": 48, "axes": 32, "dropout_long": 32} if OLD_TRITON else {}),
}


@pytest.mark.parametrize(
    ("what", "arch"),
    in_turn([what for what in WHAT if what not in SELDOM], list(SHARED_BYTES))
    + [
        pytest.param(what, arch, id=f"{what}-{arch}", marks=pytest.mark.long)
        for what in SELDOM
        for arch in SHARED_BYTES
    ],
)
def test_compiles_within_resources(what, arch):
    precision, configuration = what.split("-")
    dtype, tf32 = PRECISIONS[precision]
    launches = record(dtype, tf32=tf32, **CONFIGURATIONS[configuration])
    assert launches
    for launch in launches:
        assert launch.options["enable_fp_fusion"]
        used = resources(launch, arch)
        assert used["LOCAL"] == 0, (launch.name, used)
        limit = max(STACK_BYTES, STACK_BYTES_OF.get(launch.name, 0), STACK_BYTES_IN.get(configuration, 0))
        assert used["STACK"] <= limit, (launch.name, used)
        assert used["SHARED"] <= SHARED_BYTES[arch], (launch.name, used)


def test_every_kernel_is_compiled_for_every_precision():
    for precision, configurations in COMPILED.items():
        dtype, tf32 = PRECISIONS[precision]
        names = {launch.name for c in configurations for launch in record(dtype, tf32=tf32, **CONFIGURATIONS[c])}
        assert names == set(KERNELS), precision


def test_batch_size_does_not_recompile():
    """Kernels are not specialised for batch-dependent arguments that are 1 or multiples of 16."""
    for name, kernel in KERNELS.items():
        for parameter in kernel.params:
            if parameter.name in ("batch_windows", "windows_per_program"):
                assert parameter.do_not_specialize, (name, parameter.name)


def test_calls_beyond_32_bits_and_dropout_without_a_seed_are_refused():
    """The launcher itself refuses both, without the checks of the public function."""
    x = torch.empty(2**20, 8, 8, 3, 1024, 2, device="meta")

    def forward(x: torch.Tensor, **options: Any) -> None:
        spec = make_window_spec("op", 2, 2, window_size=8, **options)
        launcher.forward((x,), *(None,) * 6, spec.wire(), *spec.numbers)

    with pytest.raises(ValueError, match=r"2\*\*31 tiles of 16 keys, got 1048576 windows of 64 keys and 1024 heads"):
        forward(x)
    with pytest.raises(ValueError, match=r"dropout_seed must be given with a dropout_p above 0, got None"):
        forward(x[:1], dropout_p=0.1)


JIT_FUNCTIONS = {
    name: f.fn
    for module in (*MODULES, axis_tables, gradients, key_windows, mask, rows, scores, windows)
    for name, f in vars(module).items()
    if isinstance(f, JITFunction)
}


@pytest.mark.parametrize("name", JIT_FUNCTIONS)
def test_the_source_compiles_before_triton_3_8(name):
    check_source(JIT_FUNCTIONS[name])
