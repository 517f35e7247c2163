"""How many blocks of the hot kernels GPUs with less shared memory hold at once, by what the emulated launches ask for.

A GPU that holds none must be refused by the backend's reasons, and another backend take the call.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

import swinkernels
from gpu.lines import WRONG, Emitter
from gpu.plan import Setting
from gpu.smoke import ATTENTION, tiny
from swinkernels.ops import _backends

HOT = ("swin_t.1", "window 8", "window 12", "window 16", "window 7x7x7")
RESERVED_BYTES = 1024  # of every block's shared memory, by CUDA


class Room(NamedTuple):
    """Of a multiprocessor, after the CUDA programming guide's table of compute capabilities."""

    shared_bytes: int
    block_bytes: int  # the most that one block may have
    threads: int

    def blocks(self, smem_bytes: int, threads: int) -> int:
        if smem_bytes > self.block_bytes:
            return 0
        return min(self.shared_bytes // (smem_bytes + RESERVED_BYTES), self.threads // threads)


ROOMS = {
    "sm_80": Room(164 * 1024, 163 * 1024, 2048),
    "sm_86": Room(100 * 1024, 99 * 1024, 1536),
    "sm_89": Room(100 * 1024, 99 * 1024, 1536),
    "sm_90": Room(228 * 1024, 227 * 1024, 2048),
}


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    for name in HOT:
        for dtype in (torch.bfloat16, torch.float32):
            label = str(dtype).removeprefix("torch.")
            yield f"{name} {label}", functools.partial(_fit, name, dtype, label, emit)


def _fit(name: str, dtype: torch.dtype, label: str, emit: Emitter) -> None:
    case = tiny(ATTENTION[name])
    library = ctypes.CDLL(os.environ["SWINKERNELS_OPS"])
    smem_bytes, threads = ctypes.c_size_t(), ctypes.c_int()
    largest = functools.partial(library.emulation_largest_launch, ctypes.byref(smem_bytes), ctypes.byref(threads))
    inputs = case.inputs(dtype)
    leaves = {key: x.requires_grad_() for key, x in inputs.items() if key != "dout"}
    largest()
    out = swinkernels.window_attention_qkvpacked(**leaves, **case.arguments(), backend="cuda")
    for direction in ("fwd", "bwd"):
        if direction == "bwd":
            torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
        largest()
        tokens = torch.Size(case.window_tuple).numel()
        takes = f"{smem_bytes.value} bytes of shared memory and {threads.value} threads a block"
        labels = {"op": "window_attention", "backend": "cuda", "dtype": label, "direction": direction}
        for arch, room in ROOMS.items():
            blocks = room.blocks(smem_bytes.value, threads.value)
            detail = {"detail": takes}
            if blocks == 0 and tokens > longest_window(room):
                detail = {"detail": f"{takes}: refused, and taken by Triton"}
            elif blocks == 0 and tokens > 64 and dtype == torch.bfloat16:
                # Its launch asks the device for the room (launch_plain_long_*); the emulator has that of sm_90.
                detail = {"detail": f"{takes}: left to the general kernel of long windows"}
            elif blocks == 0:
                detail = {"result": WRONG, "detail": f"{takes}: no block fits, and nothing refuses it"}
            emit.line(**labels, arch=arch, value=blocks, unit="blocks", **detail)


def longest_window(room: Room) -> int:
    """The most tokens that the CUDA backend takes on a GPU with this room."""
    limits = _backends.LIMITS["cuda"]
    has_room = room.block_bytes >= limits["shared_bytes_of_longest"]
    return limits["max_window_volume" if has_room else "max_window_volume_in_less"]
