"""Check the contestants of an op benchmark, then time them in turn: one row per contestant and direction.

The roofline time is the larger of bytes divided by the copy rate and flops divided by the rate of matrix products; both
rates are measured in the same run. On a GPU, replays of CUDA graphs are timed, with rotating inputs that exceed the L2
cache, and a device copy of the same number of bytes is timed in the same way.
"""

from __future__ import annotations

import contextlib
import functools
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.timing import Call, GraphTimer, Timing, ceiling, input_sets, time_on_cpu, until_steady
from swinkernels.demo.measure import peak_bytes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
ROUNDS = 3  # rounds on a GPU; in each, the contestants take turns
SECONDS, QUICK_SECONDS = 1.5, 0.3  # time per contestant and direction on a CPU
Op = Callable[..., Any]  # (**tensors) -> a tensor or a tuple of tensors
# (contestant, number of input sets) -> the calls to time in each direction; a direction may be missing.
MakeCalls = Callable[[str, int], dict[str, Call]]


@dataclass(frozen=True)
class Contest:
    """An op at one shape and dtype: the labels of its rows, the bytes to move, and the contestants' calls."""

    labels: Mapping[str, str]
    moved: Mapping[str, int]  # bytes per timed direction
    verify: Callable[[str], tuple[bool, float]]  # name -> (correct, worst RMS error in eps)
    make_calls: MakeCalls
    arithmetic: torch.dtype = torch.float32  # dtype of the matrix products
    flops: Mapping[str, int] = field(default_factory=dict)  # per direction, for ops with matrix products


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def compare(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], single: Mapping[str, Tensor], eps: float
) -> tuple[bool, float]:
    """Return whether the results ``got`` agree with ``exact``, and their worst RMS error in units of ``eps``.

    A result is wrong if its error exceeds 16 eps plus four times the error of the float32 reference (``single``). The
    bound allows for plain PyTorch code that rounds intermediates. Correct code stays far below it; a wrong index, mask
    or bias exceeds it by far.
    """
    errors = {key: _rms(got[key].double() - exact[key]) for key in got}
    tiny = torch.finfo(torch.float64).tiny  # avoids 0 / 0 if every value is zero
    worst = max(errors[key] / (eps * _rms(exact[key]) + tiny) for key in got)
    bounds = {key: 16 * eps * _rms(exact[key]) + 4 * _rms(single[key].double() - exact[key]) for key in got}
    return all(errors[key] <= bounds[key] for key in got), worst


class _OurCalls(TorchDispatchMode):
    """Records the calls of our ops, so that they can be repeated without autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "swinkernels":
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


CONSTANTS = ("drop_path_scale",)  # inputs that need no gradient


def leaves_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the inputs as leaf tensors; all but CONSTANTS require a gradient."""
    return {k: x.detach().clone().requires_grad_(k not in CONSTANTS) for k, x in inputs.items()}


def make_calls(
    op: Op, sets: Sequence[Mapping[str, Tensor]], gradients: Sequence[Sequence[Tensor]], *, bare_backward: bool
) -> dict[str, Call]:
    """Return the call to time for each direction.

    ``sets`` contains sets of inputs, and ``gradients`` the output gradients for each set. The backward pass is timed
    alone only if it is a single op of this package (``bare_backward``).
    """
    leaves = [leaves_of(inputs) for inputs in sets]

    def forward(i: int) -> Any:
        with torch.no_grad():
            return op(**leaves[i])

    def results(i: int) -> Sequence[Tensor]:
        out = op(**leaves[i])
        return (out,) if isinstance(out, Tensor) else out

    def differentiate(out: Sequence[Tensor], i: int) -> Any:
        wanted = [x for x in leaves[i].values() if x.requires_grad]
        return torch.autograd.grad(out, wanted, gradients[i])

    def both(i: int) -> Any:
        out = results(i)
        return out, differentiate(out, i)

    if not bare_backward:
        return {"fwd": forward, "fwd+bwd": both}
    prepared: list[Callable[[], Any]] = []

    def backward(i: int) -> Any:
        while len(prepared) <= i:  # on first use, so that it runs on the timer's stream
            out = results(len(prepared))
            with _OurCalls() as seen:
                differentiate(out, len(prepared))
            assert len(seen.calls) == 1, f"expected one backward op, saw {len(seen.calls)}"
            prepared.append(seen.calls[0])
        with torch.no_grad():
            return prepared[i]()

    return {"fwd": forward, "bwd": backward, "fwd+bwd": both}


def time_copy(total: int, timer: GraphTimer, device: torch.device) -> Timing:
    """Time a device copy that reads half of ``total`` bytes and writes the other half."""
    count = input_sets(total, device)
    sources = [torch.randint(256, (total // 2,), dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.empty_like(x) for x in sources]
    return timer(lambda i: targets[i].copy_(sources[i]), count)


def run(
    contest: Contest, device: torch.device, names: Iterable[str], *, seconds: float | None = None
) -> list[dict[str, Any]]:
    """Verify and time the contestants; return one row per contestant and direction.

    On a CPU, each contestant is timed for ``seconds`` per direction.
    """
    total = contest.moved
    count = input_sets(total["fwd"], device)
    timer = GraphTimer(device) if device.type == "cuda" else None
    copies = {d: time_copy(moved, timer, device) for d, moved in total.items()} if timer else {}
    limits = ceiling(device, contest.arithmetic)
    verdicts: dict[str, tuple[str, float | None]] = {}
    calls: dict[str, dict[str, Call]] = {}
    first: dict[tuple[str, str], float] = {}
    peaks: dict[tuple[str, str], int] = {}

    def fail(name: str) -> None:  # a failure (memory, graph capture) must not discard the other contestants' results
        traceback.print_exc()
        verdicts[name] = (record.RESULT_FAILED, None)
        calls.pop(name, None)

    torch.compiler.reset()  # do not reuse code compiled for another shape
    with torch._dynamo.config.patch(recompile_limit=64):  # all peers are compiled from the same functions
        for name in names:
            try:
                right, error = contest.verify(name)
                verdicts[name] = (record.RESULT_OK if right else record.RESULT_WRONG, error)
                made = contest.make_calls(name, count)
                calls[name] = {direction: call for direction, call in made.items() if direction in total}
                for direction, call in calls[name].items():
                    with torch.cuda.stream(timer.stream) if timer else contextlib.nullcontext():
                        first[name, direction] = first_call_s(call, device)
                    peaks[name, direction] = peak_bytes(functools.partial(call, 0), device)
            except Exception:
                fail(name)
        times: dict[tuple[str, str], Timing] = {}
        for direction in total:
            taken = {name: c[direction] for name, c in calls.items() if direction in c}
            if timer:
                found = until_steady(functools.partial(time_in_graphs, taken, count, timer, fail))
            else:
                found = time_on_cpu(taken, seconds=seconds or SECONDS)
            times |= {(name, direction): timing for name, timing in found.items()}
    rows = []
    for name, (verdict, error) in verdicts.items():
        for direction in total:
            if (name, direction) not in times and (verdict != record.RESULT_FAILED or direction == "bwd"):
                continue
            rows.append(
                record.row(
                    {"suite": "ops", **contest.labels, "backend": name, "direction": direction},
                    verdict,
                    error,
                    times.get((name, direction)) if verdict != record.RESULT_FAILED else None,
                    ceiling=limits,
                    moved=total[direction],
                    flops=contest.flops.get(direction),
                    copy=copies.get(direction),
                    peak=peaks.get((name, direction)),
                    first_call_s=first.get((name, direction)),
                )
            )
    return rows


def first_call_s(call: Call, device: torch.device) -> float:
    """Return the duration of the first call in seconds, including compilation."""
    start = time.perf_counter()
    call(0)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def time_in_graphs(
    calls: dict[str, Call], sets: int, timer: GraphTimer, fail: Callable[[str], None]
) -> dict[str, Timing]:
    """Time the calls in rounds of alternating order, with one CUDA graph at a time to save memory.

    A contestant that fails is removed from ``calls``, so that it is not measured again.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS):
        for name in list(samples)[:: -1 if turn % 2 else 1]:
            try:
                samples[name] += timer.samples(calls[name], sets, timer.replays // ROUNDS + 1)
            except Exception:
                del samples[name], calls[name]
                fail(name)
            torch.cuda.empty_cache()
    return {name: Timing.of(values) for name, values in samples.items()}


SHOWN = (
    "op",
    "shape",
    "dtype",
    "backend",
    "direction",
    "result",
    "error_eps",
    "median_us",
    "p20_us",
    "p80_us",
    "noisy",
)
SHOWN_ON_GPU = (*SHOWN, "percent_of_roofline", "percent_of_copy", "peak_mib")
SHOWN_ON_CPU = (*SHOWN, "percent_of_roofline", "peak_mib")


def show(rows: list[dict[str, Any]], device: torch.device) -> str:
    columns = SHOWN_ON_GPU if device.type == "cuda" else SHOWN_ON_CPU
    return record.table([{column: row[column] for column in columns} for row in rows])
