"""Measure the host time of a window attention call: CPU time of the calling thread and of the process.

Run as ``python -m benchmarks.host_cost``; ``--help`` lists the options.

The map is tiny, so a kernel only runs for about a microsecond. On a GPU, the calling thread only launches the kernel,
which runs in parallel with the host. The backward pass runs in an autograd thread, so thread_us excludes it and
process_us includes it. On a CPU, everything runs in the calling thread, including the kernels. "op alone" is the op of
``torch.ops.swinkernels`` with prepared arguments, for comparison with the public function. In eager PyTorch the public
function reaches the same kernel by a shorter path, so the two times are close. Calls are timed in loops, because a
CPU-time clock is too coarse for a single call; the loops of the calls take turns.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swinkernels
from benchmarks import contest, record
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase, op_arguments

# Cases by name. Each map consists of a single window.
CASES = {
    "v1": WindowAttentionCase(1, (1, 1), 1, 8, 1),
    "v1, shifted, padded": WindowAttentionCase(1, (1, 2), 1, 8, (2, 2), (1, 1), has_pad_qkv=True),
    "v2": WindowAttentionCase(1, (1, 1), 1, 8, 1, has_logit_scale=True),
    "dense bias": WindowAttentionCase(1, (1, 1), 1, 8, 1, has_table=False, bias_types=0),
}
# Goals for case "v1" on CUDA, in microseconds of the calling thread's CPU time.
GOALS = {"forward": 12.0, "forward + backward": 45.0}
Call = Callable[[], Any]


def calls(case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, backend: str) -> dict[str, Call]:
    """Return the calls of a case by name: the public function without and with gradients, and the op alone."""
    inputs = case.inputs(dtype, device)
    dout, leaves = inputs.pop("dout"), {name: x.clone().requires_grad_() for name, x in inputs.items()}
    arguments = {**case.arguments(), "backend": backend}

    def attend(tensors: dict[str, Tensor]) -> Tensor:
        return swinkernels.window_attention_qkvpacked(**tensors, **arguments)

    def both() -> Any:
        return torch.autograd.grad(attend(leaves), list(leaves.values()), dout)

    suffix = "_triton" if backend == "triton" else ""
    op = getattr(torch.ops.swinkernels, f"window_attention_qkvpacked_fwd{suffix}").default
    tensors = [
        x.detach() if isinstance(x, Tensor) else x
        for x in op_arguments(case, "window_attention_qkvpacked", dtype, device)
    ]

    def bare() -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*tensors)

    return {
        "forward": lambda: attend(inputs),
        "forward, recorded": lambda: attend(leaves),
        "forward + backward": both,
        "forward, op alone": bare,
    }


def host_times(
    named: dict[str, Call], *, loop: int = 200, rounds: int = 40, synchronize: Call = lambda: None
) -> dict[str, tuple[float, float]]:
    """Return the median CPU times per call, in microseconds, of the calling thread and of the process."""
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in named}
    for call in named.values():
        for _ in range(20):
            call()
    collecting = gc.isenabled()
    gc.disable()  # garbage collection must not be timed
    try:
        for _ in range(rounds):
            for name, call in named.items():
                synchronize()
                thread, process = time.thread_time(), time.process_time()
                for _ in range(loop):
                    call()
                thread, process = time.thread_time() - thread, time.process_time() - process
                samples[name].append((thread * 1e6 / loop, process * 1e6 / loop))
    finally:
        if collecting:
            gc.enable()
    return {
        name: (statistics.median(t for t, _ in pairs), statistics.median(p for _, p in pairs))
        for name, pairs in samples.items()
    }


def benchmark(
    device: torch.device, dtype: torch.dtype, backend: str, names: list[str], **options: Any
) -> list[dict[str, Any]]:
    rows = []
    for name in names:
        case = CASES[name]
        if _cannot_run(case, dtype, device, backend):
            continue
        synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        for call, (thread, process) in host_times(
            calls(case, dtype, device, backend), synchronize=synchronize, **options
        ).items():
            goal = GOALS.get(call) if name == "v1" and device.type == "cuda" and backend == "cuda" else None
            rows.append(
                {
                    "backend": backend,
                    "case": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "call": call,
                    "thread_us": round(thread, 2),
                    "process_us": round(process, 2),
                    "goal_us": goal,
                    "met": None if goal is None else thread <= goal,
                }
            )
    return rows


def _cannot_run(case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, backend: str) -> bool:
    try:
        calls(case, dtype, device, backend)["forward"]()
    except NotImplementedError:
        return True
    return False


def backends(device: torch.device) -> list[str]:
    """Return the names of our backends that can run on ``device``."""
    names = [b for b in _backends.BACKENDS if b not in _backends.PLAIN and (b == "cpu") == (device.type == "cpu")]
    return [b for b in names if _backends.unavailable(b) is None]


def rows(device: torch.device, dtype: torch.dtype, backend: str) -> list[dict[str, Any]]:
    """Return host times as rows of the latency suite. On a CPU, one thread is used, because a map has one window."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        found = benchmark(device, dtype, backend, list(CASES))
    finally:
        torch.set_num_threads(threads)
    return [
        record.row(
            {
                "suite": "latency",
                "op": "host time of window_attention",
                "shape": row["case"],
                "case": str(CASES[row["case"]]),
                "dtype": row["dtype"],
                "backend": backend,
                "direction": row["call"],
            },
            record.RESULT_OK,
            None,
            host_us=row["thread_us"],
        )
        for row in found
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--backend", choices=[b for b in _backends.BACKENDS if b not in _backends.PLAIN], help="default: all"
    )
    parser.add_argument("--dtype", choices=contest.DTYPES, default="bfloat16")
    parser.add_argument("--case", choices=CASES, action="append", help="default: all")
    parser.add_argument("--out", type=Path, help="folder for host_cost.csv")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # enough for a single window
    wanted = [b for b in backends(device) if arguments.backend in (None, b)]
    rows = [
        row
        for b in wanted
        for row in benchmark(device, contest.DTYPES[arguments.dtype], b, arguments.case or list(CASES))
    ]
    print(record.table(rows))
    if arguments.out is not None:
        record.write_csv(arguments.out / "host_cost.csv", rows, device)


if __name__ == "__main__":
    main()
