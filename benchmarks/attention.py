"""Times the attention core, map to map, against eager PyTorch, SDPA and torch.compile.

Run as ``python -m benchmarks.attention``; ``--help`` lists the choices.

Every contestant is first compared with the float64 reference, on fewer images. On a GPU the times are those of CUDA
graph replays over rotating inputs larger than the L2 cache, beside a device copy of the same number of bytes timed in
the same way in the same run: forward reads qkv and writes out; backward reads qkv and dout and writes dqkv.
"""

from __future__ import annotations

import argparse
import fnmatch
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import swinkernels
from benchmarks import record, shapes
from benchmarks.peers import make_peer
from benchmarks.timing import Call, GraphTimer, Timing, input_sets, time_on_cpu
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase, check_window_attention, run_case

OURS = tuple(name for name in _backends.BACKENDS if name != "reference")
PEERS = ("eager", "sdpa", "eager-compiled", "sdpa-compiled")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIRECTIONS = ("fwd", "bwd", "fwd+bwd")
Op = Callable[..., Tensor]  # (qkv, bias_table, logit_scale=None, pad_qkv=None) -> out


def contestants(device: torch.device, wanted: Sequence[str]) -> list[str]:
    """The names of ``wanted`` that can run on the device; ours may be missing in this installation."""
    names = [n for n in OURS if (n == "cpu") == (device.type == "cpu") and _backends.unavailable(n) is None]
    return [name for name in (*names, *PEERS) if not wanted or name in wanted]


def make_op(name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device) -> Op:
    if name in OURS:
        return lambda **maps: swinkernels.window_attention_qkvpacked(**maps, **case.arguments(), backend=name)
    peer = make_peer(case, dtype, device, sdpa=name.startswith("sdpa"))
    return torch.compile(peer, fullgraph=True, dynamic=False) if name.endswith("compiled") else peer


def verify(name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device) -> tuple[bool, float]:
    """Whether output and gradients are right on a few images, and the worst RMS error in eps of the dtype.

    Ours have to keep the budget of the tests. A peer, which may round its scores, is wrong from 16 eps on, which no
    plain PyTorch code reaches and a wrong mask or bias exceeds by far.
    """
    case = shapes.with_batch(case, 2)
    op = make_op(name, case, dtype, device)
    inputs = case.inputs(dtype, device)
    got = run_case(op, inputs, {})
    exact, single = (
        run_case(reference.window_attention_qkvpacked, {k: v.to(wide) for k, v in inputs.items()}, case.arguments())
        for wide in (torch.float64, torch.float32)
    )

    def rms(x: Tensor) -> float:
        return x.double().square().mean().sqrt().item()

    eps = torch.finfo(dtype).eps
    errors = {key: rms(got[key].double() - exact[key]) for key in got}
    worst = max(errors[key] / (eps * rms(exact[key])) for key in got)
    if name in OURS:
        try:
            check_window_attention(swinkernels.window_attention_qkvpacked, case, dtype, device, backend=name)
        except AssertionError:
            return False, worst
        return True, worst
    bounds = {key: 16 * eps * rms(exact[key]) + 4 * rms(single[key].double() - exact[key]) for key in got}
    return all(errors[key] <= bounds[key] for key in got), worst


class _BackwardCalls(TorchDispatchMode):
    """Notes the calls of our backward ops, so that they can be made again without autograd around them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Callable[[], Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "swinkernels" and "_bwd" in func.__name__:
            self.calls.append(lambda: func(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def make_calls(name: str, op: Op, sets: Sequence[dict[str, Tensor]]) -> dict[str, Call]:
    """What is timed in each direction, given the number of an input set; backward alone, as the bare op, for ours."""
    leaves = [{k: x.detach().clone().requires_grad_() for k, x in inputs.items() if k != "dout"} for inputs in sets]

    def forward(i: int) -> Tensor:
        with torch.no_grad():
            return op(**leaves[i])

    def both(i: int) -> Any:
        out = op(**leaves[i])
        return out, torch.autograd.grad(out, list(leaves[i].values()), sets[i]["dout"])

    if name not in OURS:
        return {"fwd": forward, "fwd+bwd": both}
    prepared: list[Callable[[], Any]] = []

    def backward(i: int) -> Any:
        while len(prepared) <= i:  # at the first use, so on the stream of the timer
            with _BackwardCalls() as seen:
                both(len(prepared))
            assert len(seen.calls) == 1, f"{name}: expected one backward op, saw {len(seen.calls)}"
            prepared.append(seen.calls[0])
        with torch.no_grad():
            return prepared[i]()

    return {"fwd": forward, "bwd": backward, "fwd+bwd": both}


def moved_bytes(case: WindowAttentionCase, dtype: torch.dtype) -> dict[str, int]:
    """The bytes that have to move, in units of the map (B, *S, C): 3 + 1 forward, 3 + 1 + 3 backward."""
    one = case.batch * case.num_heads * case.head_dim * dtype.itemsize
    for s in case.size:
        one *= s
    return {"fwd": 4 * one, "bwd": 7 * one, "fwd+bwd": 11 * one}


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


def benchmark(
    shape: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, names: Iterable[str]
) -> list[dict[str, Any]]:
    """One row per contestant and direction."""
    total = moved_bytes(case, dtype)
    count = input_sets(total["fwd"], device)
    sets = [case.inputs(dtype, device, seed) for seed in range(count)]
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
            right, error = verify(name, case, dtype, device)
            verdicts[name] = ("ok" if right else "WRONG", error)
            mine = make_calls(name, make_op(name, case, dtype, device), sets)
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
            rows.append(
                {
                    "shape": shape,
                    "case": str(case),
                    "dtype": str(dtype).removeprefix("torch."),
                    "backend": name,
                    "direction": direction,
                    "result": verdict,
                    "error_eps": error,
                    "median_us": t.median_us if t else None,
                    "p20_us": t.p20_us if t else None,
                    "p80_us": t.p80_us if t else None,
                    "gb_per_s": total[direction] / t.median_us * 1e-3 if t else None,
                    "copy_us": copy.median_us if copy else None,
                    "percent_of_copy": 100 * copy.median_us / t.median_us if t and copy else None,
                    "peak_mib": peak / 2**20 if (peak := peaks.get(name)) is not None else None,
                }
            )
    return rows


SHOWN = ("shape", "dtype", "backend", "direction", "result", "error_eps", "median_us", "p20_us", "p80_us")
SHOWN_ON_GPU = (*SHOWN, "copy_us", "percent_of_copy", "peak_mib")


def show(rows: list[dict[str, Any]], device: torch.device) -> str:
    columns = SHOWN_ON_GPU if device.type == "cuda" else SHOWN
    return record.table([{column: row[column] for column in columns} for row in rows])


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attention", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--filter", default="*", help="shapes, by a pattern such as 'swin_t.*'")
    parser.add_argument("--backends", nargs="+", choices=(*OURS, *PEERS), default=(), help="default: all")
    parser.add_argument("--batch", type=int, help="largest batch; 2 on a CPU unless given")
    parser.add_argument("--threads", type=int, help="of torch on a CPU")
    parser.add_argument(
        "--flush-denormal",
        action="store_true",
        help="one CPU thread that takes denormal numbers for zero: exp of a masked score is one, and slows plain code",
    )
    parser.add_argument("--quick", action="store_true", help="a few shapes alone")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for attention.csv")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    if options.flush_denormal:  # the setting is that of a thread
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    elif options.threads:
        torch.set_num_threads(options.threads)
    names = contestants(device, options.backends)
    chosen = [
        key
        for key in shapes.ATTENTION
        if fnmatch.fnmatch(key, options.filter) and (key in shapes.QUICK or not options.quick)
    ]
    if not chosen:
        parser.error(f"no shape matches {options.filter!r}; there are {', '.join(shapes.ATTENTION)}")
    if not names:
        parser.error(f"none of {', '.join(options.backends)} can run on {device}; see python -m swinkernels.info")
    batch = options.batch or (2 if device.type == "cpu" else None)
    dtypes = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    rows: list[dict[str, Any]] = []
    for key in chosen:
        case = shapes.with_batch(shapes.ATTENTION[key], batch) if batch else shapes.ATTENTION[key]
        for dtype in dtypes:
            new = benchmark(key, case, DTYPES[dtype], device, names)
            print(show(new, device), flush=True)
            rows += new
            record.write_csv(options.out / "attention.csv", rows, device)
    print(f"\n{len(rows)} rows in {options.out / 'attention.csv'}; commit {record.commit()}")
    return rows


if __name__ == "__main__":
    main()
