"""Every Triton kernel, dtype and kind of configuration compiles for sm_80 and sm_90 within the resources it may take.

No GPU is needed. The launch functions run on meta tensors with the kernels replaced by recorders, so what is compiled
is what a call would launch: the same argument types, flags, tiles, warps and stages.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
    pytest.skip("Triton's interpreter replaces the compiler (TRITON_INTERPRET is set)", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from swinkernels.triton import _window_attention_kernels as kernels  # noqa: E402
from swinkernels.triton import window_attention as launcher  # noqa: E402

KERNELS = ("fwd_whole", "bwd_whole", "fwd_tiled", "bwd_tiled_dq", "bwd_tiled_dkdv", "bwd_tiled_dbias", "fold_dbias")
TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32"}
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # what a block may have
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    name: str
    function: Any
    arguments: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands for a kernel: keeps what it was launched with."""

    def __init__(self, name: str, function: Any, launches: list[Launch]):
        self.name, self.function, self.launches = name, function, launches

    def __getitem__(self, grid):
        assert len(grid) == 1 and 0 < grid[0] < 2**31

        def launch(*args, **kwargs):
            options = {k: kwargs.pop(k) for k in ("num_warps", "num_stages") if k in kwargs}
            arguments = {**dict(zip(self.function.arg_names, args, strict=False)), **kwargs}
            self.launches.append(Launch(self.name, self.function, arguments, options))

        return launch


def record(
    monkeypatch, dtype, *, size, window, head_dim, shift=None, heads=3, batch=2, tf32=False, packed=True, bias=True,
    pad=False, region_map=False, roll_then_pad=False, grid=False,
) -> list[Launch]:  # fmt: skip
    """The launches of a forward and a backward call with these arguments."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        for name in KERNELS:
            patch.setattr(kernels, name, Recorder(name, getattr(kernels, name), launches))
        window = (1,) * (3 - len(window)) + tuple(window)
        shift = tuple(shift or [0] * 3)
        shift = (0,) * (3 - len(shift)) + shift
        frame = [-(-s // w) * w for s, w in zip((1,) * (3 - len(size)) + tuple(size), window, strict=True)]
        meta = {"device": "meta", "dtype": dtype}
        if packed:
            maps = (torch.empty(batch, *size, 3, heads, head_dim, **meta),)
        else:
            maps = tuple(torch.empty(batch, *size, heads, head_dim, **meta) for _ in range(3))
        rows = (2 * window[0] - 1) * (2 * window[1] - 1) * (2 * window[2] - 1)
        tables = (
            torch.empty(rows, heads, device="meta") if bias else None,
            torch.empty(3, heads, head_dim, **meta) if pad else None,
            torch.empty(frame, device="meta", dtype=torch.int32) if region_map else None,
        )
        geometry = (window, shift, window, (0, 0, 0), (False,) * 3, roll_then_pad, grid, head_dim**-0.5, -100.0, tf32)
        out, lse = launcher.forward(maps, *tables, *geometry)
        launcher.backward(torch.empty_like(out), maps, lse, *tables, *geometry, bias, pad)
    return launches


def _type_of(value: Any, path: tuple[int, ...], constants: dict, attributes: dict) -> Any:
    """As Triton specialises arguments that are not compile-time constants: aligned tensors, and elements of tuples."""
    if isinstance(value, tuple):
        return tuple(_type_of(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    in_tuple = len(path) > 1
    if isinstance(value, torch.Tensor) or (in_tuple and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    if in_tuple and value == 1:
        constants[path] = 1
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Compile one launch; registers, stack, local and shared memory of the cubin."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            signature[parameter.name] = _type_of(value, (i,), constants, attributes)
    source = ASTSource(launch.function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return {**{k: int(v) for k, v in found.items()}, "SHARED": compiled.metadata.shared}


# Configurations that between them reach every kernel, tile, flag and way of addressing.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "swin": {"size": (56, 56), "window": (7, 7), "shift": (3, 3), "head_dim": 32},
    "swin_384": {"size": (48, 48), "window": (12, 12), "shift": (6, 6), "head_dim": 32},
    "small": {"size": (8, 8), "window": (4, 4), "head_dim": 24, "bias": False, "packed": False, "grid": True},
    "padded": {"size": (30, 40), "window": (7, 7), "shift": (3, 3), "head_dim": 64, "pad": True, "roll_then_pad": True},
    "wide_3d": {"size": (4, 9, 9), "window": (2, 8, 8), "head_dim": 128, "pad": True, "region_map": True},
}
PRECISIONS = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "float16": (torch.float16, False),
    "bfloat16": (torch.bfloat16, False),
}
# What each precision is compiled for: bfloat16 for all; float16 differs from it in the instruction's type only.
COMPILED = {
    "float32": ("swin", "small", "swin_384"),
    "tf32": ("swin", "small", "padded"),
    "float16": ("swin", "swin_384"),
    "bfloat16": tuple(CONFIGURATIONS),
}
# ptxas gives up some bytes of stack to reach the next step of occupancy (128 or 168 registers a thread).
STACK_BYTES = 16
# Known exceptions. The backward pass of a whole window has bias and dbias in registers from window to window and is at
# the limit of 255: some values are stored and reloaded once a window. At head_dim 128 with padding and a region map at
# once, the backward passes of large windows are there too. Triton 3.6 needs more than 3.8.
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
STACK_BYTES_OF = {"bwd_whole": 384 if OLD_TRITON else 192}
STACK_BYTES_IN = {"wide_3d": 512}


@pytest.mark.parametrize("arch", SHARED_BYTES)
@pytest.mark.parametrize(
    ("precision", "configuration"), [(p, c) for p, configurations in COMPILED.items() for c in configurations]
)
def test_compiles_within_resources(monkeypatch, precision, configuration, arch):
    dtype, tf32 = PRECISIONS[precision]
    launches = record(monkeypatch, dtype, tf32=tf32, **CONFIGURATIONS[configuration])
    assert launches
    for launch in launches:
        used = resources(launch, arch)
        assert used["LOCAL"] == 0, (launch.name, used)
        limit = max(STACK_BYTES, STACK_BYTES_OF.get(launch.name, 0), STACK_BYTES_IN.get(configuration, 0))
        assert used["STACK"] <= limit, (launch.name, used)
        assert used["SHARED"] <= SHARED_BYTES[arch], (launch.name, used)


def test_every_kernel_is_compiled_for_every_precision(monkeypatch):
    for precision, configurations in COMPILED.items():
        dtype, tf32 = PRECISIONS[precision]
        names = {
            launch.name for c in configurations for launch in record(monkeypatch, dtype, tf32=tf32, **CONFIGURATIONS[c])
        }
        assert names == set(KERNELS), precision


def test_batch_size_does_not_recompile():
    """Numbers that vary with the batch are typed, not specialised on being 1 or a multiple of 16."""
    for name in KERNELS:
        for parameter in getattr(kernels, name).params:
            if parameter.name in ("batch_windows", "windows_per_program", "num_heads"):
                assert parameter.do_not_specialize, (name, parameter.name)
