"""What the benchmarks of all ops share: contestants are checked, then timed beside a device copy, one row a direction.

On a GPU the times are those of CUDA graph replays over rotating inputs larger than the L2 cache, and the copy moves the
same number of bytes, timed in the same way in the same run.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import record
from benchmarks.timing import Call, GraphTimer, Timing, input_sets, time_on_cpu

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
Op = Callable[..., Any]  # (**tensors) -> a tensor or several
# The calls to time in each direction, given the number of input sets; a direction may be missing.
MakeCalls = Callable[[str, int], dict[str, Call]]


@dataclass(frozen=True)
class Contest:
    """One op at one shape and dtype: what names its rows, the bytes that have to move, and what contestants do."""

    labels: Mapping[str, str]
    moved: Mapping[str, int]  # per direction
    verify: Callable[[str], tuple[bool, float]]  # whether a contestant is right, and its worst RMS error in eps
    make_calls: MakeCalls


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def compare(
    got: Mapping[str, Tensor], exact: Mapping[str, Tensor], single: Mapping[str, Tensor], eps: float
) -> tuple[bool, float]:
    """Whether plain PyTorch code, which may round in between, is right; and its worst RMS error in ``eps``.

    It is wrong from 16 eps on, which no such code reaches and a wrong index, mask or bias exceeds by far. The error of
    the reference in float32 (``single``) is granted on top.
    """
    errors = {key: _rms(got[key].double() - exact[key]) for key in got}
    tiny = torch.finfo(torch.float64).tiny  # of what is zero throughout
    worst = max(errors[key] / (eps * _rms(exact[key]) + tiny) for key in got)
    bounds = {key: 16 * eps * _rms(exact[key]) + 4 * _rms(single[key].double() - exact[key]) for key in got}
    return all(errors[key] <= bounds[key] for key in got), worst


class _OurCalls(TorchDispatchMode):
    """Notes the calls of our ops, so that they can be made again without autograd around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "swinkernels":
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


CONSTANTS = ("drop_path_scale",)  # inputs without a gradient


def leaves_of(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the inputs that autograd starts from."""
    return {k: x.detach().clone().requires_grad_(k not in CONSTANTS) for k, x in inputs.items()}


def make_calls(
    op: Op, sets: Sequence[Mapping[str, Tensor]], gradients: Sequence[Sequence[Tensor]], *, bare_backward: bool
) -> dict[str, Call]:
    """The calls of each direction: ``sets`` are inputs, ``gradients`` those of the results.

    Backward alone can be timed where it is one op of ours; else it is in "fwd+bwd" only.
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
        while len(prepared) <= i:  # at the first use, so on the stream of the timer
            out = results(len(prepared))
            with _OurCalls() as seen:
                differentiate(out, len(prepared))
            assert len(seen.calls) == 1, f"expected one backward op, saw {len(seen.calls)}"
            prepared.append(seen.calls[0])
        with torch.no_grad():
            return prepared[i]()

    return {"fwd": forward, "bwd": backward, "fwd+bwd": both}


def time_copy(total: int, timer: GraphTimer, device: torch.device) -> Timing:
    """A device copy that reads half of ``total`` bytes and writes the other half."""
    count = input_sets(total, device)
    sources = [torch.randint(256, (total // 2,), dtype=torch.uint8, device=device) for _ in range(count)]
    targets = [torch.empty_like(x) for x in sources]
    return timer(lambda i: targets[i].copy_(sources[i]), count)


def peak_bytes(call: Call, device: torch.device) -> int | None:
    """Memory that one call takes on top of what is allocated, or None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call(0)
    torch.cuda.synchronize(device)
    del result
    return torch.cuda.max_memory_allocated(device) - before


def run(contest: Contest, device: torch.device, names: Iterable[str]) -> list[dict[str, Any]]:
    """One row per contestant and direction. A wrong result has a time, but is never a percentage of the copy."""
    total = contest.moved
    count = input_sets(total["fwd"], device)
    timer = GraphTimer(device) if device.type == "cuda" else None
    copies = {d: time_copy(total[d], timer, device) for d in DIRECTIONS} if timer else {}
    verdicts: dict[str, tuple[str, float | None]] = {}
    calls: dict[str, dict[str, Call]] = {}
    times: dict[str, dict[str, Timing]] = {d: {} for d in DIRECTIONS}
    peaks: dict[str, int | None] = {}
    for name in names:
        if timer or not calls:  # no shape meets the guards, or the recompile limit, of another
            torch.compiler.reset()
        try:
            right, error = contest.verify(name)
            verdicts[name] = ("ok" if right else "WRONG", error)
            mine = contest.make_calls(name, count)
            if timer:
                for direction, call in mine.items():
                    times[direction][name] = timer(call, count)
                peaks[name] = peak_bytes(mine["fwd+bwd"], device)
                del mine, call
                torch.cuda.empty_cache()
            else:
                calls[name] = mine
        except Exception:  # one that cannot run here (memory, graph capture) shall not cost the others' results
            traceback.print_exc()
            verdicts[name] = ("FAILED", None)
    if not timer:
        for direction in DIRECTIONS:
            times[direction] = time_on_cpu({n: c[direction] for n, c in calls.items() if direction in c})
    rows = []
    for name, (verdict, error) in verdicts.items():
        for direction in DIRECTIONS:
            t = times[direction].get(name)
            if t is None and (verdict != "FAILED" or direction == "bwd"):
                continue
            copy = copies.get(direction)
            counts = t is not None and verdict == "ok"
            rows.append(
                {
                    **contest.labels,
                    "backend": name,
                    "direction": direction,
                    "result": verdict,
                    "error_eps": error,
                    "median_us": t.median_us if t else None,
                    "p20_us": t.p20_us if t else None,
                    "p80_us": t.p80_us if t else None,
                    "gb_per_s": total[direction] / t.median_us * 1e-3 if t and counts else None,
                    "copy_us": copy.median_us if copy else None,
                    "percent_of_copy": 100 * copy.median_us / t.median_us if t and copy and counts else None,
                    "peak_mib": peak / 2**20 if (peak := peaks.get(name)) is not None else None,
                }
            )
    return rows


# "case" and GB/s are in the CSV only.
SHOWN = ("op", "shape", "dtype", "backend", "direction", "result", "error_eps", "median_us", "p20_us", "p80_us")
SHOWN_ON_GPU = (*SHOWN, "copy_us", "percent_of_copy", "peak_mib")


def show(rows: list[dict[str, Any]], device: torch.device) -> str:
    columns = SHOWN_ON_GPU if device.type == "cuda" else SHOWN
    return record.table([{column: row[column] for column in columns if column in row} for row in rows])
