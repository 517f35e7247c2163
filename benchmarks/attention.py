"""Times the attention core, map to map, against eager PyTorch, SDPA, FlexAttention and torch.compile.

Run as ``python -m benchmarks.attention``; ``--help`` lists the choices.

Every contestant is first compared with the float64 reference, on fewer images; benchmarks/contest.py says how it is
timed. The bytes that have to move: forward reads qkv and writes out; backward reads qkv and dout and writes dqkv.
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swinkernels
from benchmarks import contest, record, shapes
from benchmarks.contest import DTYPES, show
from benchmarks.peers import make_peer
from benchmarks.timing import Call
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase, check_window_attention, run_case

OURS = tuple(name for name in _backends.BACKENDS if name != "reference")
PEERS = ("eager", "sdpa", "eager-compiled", "sdpa-compiled", "flex-compiled")
TF32_EPS = 2.0**-10
Op = Callable[..., Tensor]  # (qkv, bias_table, logit_scale=None, pad_qkv=None) -> out


def contestants(device: torch.device, wanted: Sequence[str]) -> list[str]:
    """The names of ``wanted`` that can run on the device; ours may be missing in this installation."""
    on_cpu = device.type == "cpu"
    names = [n for n in OURS if (n == "cpu") == on_cpu and _backends.unavailable(n) is None]
    peers = [n for n in PEERS if not (on_cpu and n.startswith("flex"))]  # which has no backward pass there
    return [name for name in (*names, *peers) if not wanted or name in wanted]


def make_op(name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device) -> Op:
    if name in OURS:
        return lambda **maps: swinkernels.window_attention_qkvpacked(**maps, **case.arguments(), backend=name)
    kind, _, compiled = name.partition("-")
    peer = make_peer(case, dtype, device, kind)
    return torch.compile(peer, fullgraph=True, dynamic=False) if compiled else peer


def verify(
    name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, eps: float | None = None
) -> tuple[bool, float]:
    """Whether output and gradients are right on a few images, and the worst RMS error in eps of the dtype.

    Ours have to keep the budget of the tests.
    """
    case = shapes.with_batch(case, 2)
    op = make_op(name, case, dtype, device)
    inputs = case.inputs(dtype, device)
    got = run_case(op, inputs, {})
    exact, single = (
        run_case(reference.window_attention_qkvpacked, {k: v.to(wide) for k, v in inputs.items()}, case.arguments())
        for wide in (torch.float64, torch.float32)
    )
    right, worst = contest.compare(got, exact, single, eps or torch.finfo(dtype).eps)
    if name in OURS:
        try:
            op = functools.partial(swinkernels.window_attention_qkvpacked, backend=name)
            check_window_attention(op, case, dtype, device, eps=eps, rounds_unit_rows=name != "cpu")
        except AssertionError:
            return False, worst
        return True, worst
    return right, worst


def moved_bytes(case: WindowAttentionCase, dtype: torch.dtype) -> dict[str, int]:
    """The bytes that have to move, in units of the map (B, *S, C): 3 + 1 forward, 3 + 1 + 3 backward."""
    one = case.batch * case.num_heads * case.head_dim * dtype.itemsize
    for s in case.size:
        one *= s
    return {"fwd": 4 * one, "bwd": 7 * one, "fwd+bwd": 11 * one}


def benchmark(
    shape: str,
    case: WindowAttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str],
    *,
    tf32: bool = False,
) -> list[dict[str, Any]]:
    """One row per contestant and direction; with ``tf32``, of float32 with torch's switch for products on."""
    drawn: list[dict[str, Tensor]] = []

    def make_calls(name: str, count: int) -> dict[str, Call]:
        drawn.extend(case.inputs(dtype, device, seed) for seed in range(len(drawn), count))
        inputs = [{k: x for k, x in tensors.items() if k != "dout"} for tensors in drawn]
        douts = [(tensors["dout"],) for tensors in drawn]
        op = make_op(name, case, dtype, device)
        return contest.make_calls(op, inputs, douts, bare_backward=name in OURS)

    labels = {"shape": shape, "case": str(case), "dtype": "tf32" if tf32 else str(dtype).removeprefix("torch.")}
    moved, eps = moved_bytes(case, dtype), TF32_EPS if tf32 else None
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else before
    try:
        return contest.run(
            contest.Contest(labels, moved, lambda name: verify(name, case, dtype, device, eps), make_calls),
            device,
            names,
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


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
