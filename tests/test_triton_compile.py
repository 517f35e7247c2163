"""Every Triton kernel, dtype and kind of configuration compiles for sm_80 and sm_90, without spills, within shared memory.

No GPU is needed. The launch functions run on meta tensors with the kernels replaced by recorders, so what is compiled is
what a call would launch: the same argument types, flags, tiles, warps and stages.
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
            arguments = {**dict(zip(self.function.arg_names, args)), **kwargs}  # noqa: B905: keywords follow
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


def _type_of(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return TYPES[value.dtype]
    if isinstance(value, tuple):
        return tuple(_type_of(v) for v in value)
    return "fp32" if isinstance(value, float) else "i32"


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Compile one launch; registers, stack, local and shared memory of the cubin."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = _type_of(value)
            if isinstance(value, torch.Tensor):  # torch's allocations are aligned
                attributes[(i,)] = [["tt.divisibility", 16]]
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
