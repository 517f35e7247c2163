"""Counts the blocks of the hot CUDA kernels that fit on a multiprocessor of each architecture, from emulated launches.

The emulator limits a block's shared memory to the architecture's limit, so the launch functions choose the same kernels
as on such a GPU. Register counts are read from the build. The backend must reject a call whose kernel does not fit, so
that Triton runs it.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch

import swinkernels
from benchmarks.compiled import missing
from gpu.lines import WRONG, Emitter
from gpu.plan import Setting
from gpu.smoke import ATTENTION, tiny
from swinkernels import _extension
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase
from tests import emulation
from tests.cuda.test_resources import resource_usage

HOT = ("swin_t.1", "window 8", "window 12", "window 16", "window 7x7x7")
RESERVED_BYTES = 1024  # reserved by CUDA in every block's shared memory
REGISTERS, WARP_REGISTERS = 65536, 256  # registers per multiprocessor; granularity of their allocation to a warp


class Room(NamedTuple):
    """A multiprocessor's resources, from the CUDA programming guide's table of compute capabilities."""

    shared_bytes: int
    block_bytes: int  # the limit for one block
    threads: int
    code: str  # the architecture in the default build whose machine code this GPU runs

    def blocks(self, smem_bytes: int, threads: int, registers: int) -> int:
        if smem_bytes > self.block_bytes:
            return 0
        of_warp = -(-32 * registers // WARP_REGISTERS) * WARP_REGISTERS
        by_registers = REGISTERS // of_warp // -(-threads // 32) if registers else self.threads
        return min(self.shared_bytes // (smem_bytes + RESERVED_BYTES), self.threads // threads, by_registers)


ROOMS = {
    "sm_80": Room(164 * 1024, 163 * 1024, 2048, "sm_80"),
    "sm_86": Room(100 * 1024, 99 * 1024, 1536, "sm_80"),
    "sm_89": Room(100 * 1024, 99 * 1024, 1536, "sm_80"),
    "sm_90": Room(228 * 1024, 227 * 1024, 2048, "sm_90"),
}


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    for name in HOT:
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{name} {str(dtype).removeprefix('torch.')}", functools.partial(_fit, name, dtype, emit)


@functools.cache
def _registers() -> dict[tuple[str, str], int]:
    """Return the registers per thread of each (architecture, kernel), or {} if CUDA kernels or cuobjdump are absent."""
    built = _extension._library(Path(_extension.__file__).parent)
    if built is None or missing("cuobjdump") or b".nv_fatbin" not in built.read_bytes():
        return {}
    return {(k.arch, k.kernel): k.registers for k in resource_usage(built)}


def refusal(case: WindowAttentionCase, room: Room) -> str | None:
    """Return the reason why "cuda" rejects ``case`` on a GPU with the resources ``room``, and the backend that runs it.

    Return None if "cuda" runs it.
    """
    volume, device, before = math.prod(case.window_tuple), torch.device("cuda"), _backends._shared_bytes
    _backends._shared_bytes = lambda device: room.block_bytes
    try:
        reasons = {b: _backends.window_volume_reasons(b, volume, device) for b in _backends.PREFERENCE["cuda"]}
    finally:
        _backends._shared_bytes = before
    if not reasons["cuda"]:
        return None
    taker = next((b for b, found in reasons.items() if not found), "torch")
    return f"refused, and run by {taker}: {reasons['cuda'][0]}"


def _fit(name: str, dtype: torch.dtype, emit: Emitter) -> None:
    case = tiny(ATTENTION[name])
    inputs = case.inputs(dtype)
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if key != "dout"}
    library = emulation.Library(Path(os.environ[_extension.OTHER_LIBRARY]))

    @functools.cache
    def launches(block_bytes: int) -> dict[str, list[emulation.Launch]]:
        library.configure(shared_bytes=block_bytes)
        library.launches()
        out = swinkernels.window_attention_qkvpacked(**leaves, **case.arguments(), backend="cuda")
        fwd = library.launches()
        torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
        return {"fwd": fwd, "bwd": [x for x in library.launches() if "window_attention" in x.kernel]}

    labels = {"op": "window_attention", "backend": "cuda", "dtype": str(dtype).removeprefix("torch."), "unit": "blocks"}
    for arch, room in ROOMS.items():
        if reason := refusal(case, room):
            for direction in ("fwd", "bwd"):
                emit.line(**labels, direction=direction, arch=arch, value=0, detail=reason)
            continue
        for direction, found in launches(room.block_bytes).items():
            shipped = [_short(x) for x in launches(ROOMS["sm_90"].block_bytes)[direction]]
            for launch in found:
                registers = _registers().get((room.code, launch.kernel), 0)
                blocks = room.blocks(launch.smem_bytes, launch.threads, registers)
                detail = f"{launch.smem_bytes} bytes of shared memory and {launch.threads} threads a block"
                detail += f", {registers} registers a thread" if registers else ", registers unknown: no CUDA build"
                if _short(launch) not in shipped:
                    detail += f"; in place of {' and '.join(shipped)}"
                result = {} if blocks else {"result": WRONG}
                emit.line(
                    **labels,
                    direction=direction,
                    arch=arch,
                    kernel=_short(launch),
                    value=blocks,
                    detail=detail,
                    **result,
                )


def _short(launch: emulation.Launch) -> str:
    """Return the unmangled name of a launch's kernel."""
    match = re.search(r"window_attention_\w+?_kernel", launch.kernel)
    return match[0] if match else launch.kernel
