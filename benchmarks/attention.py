"""Compare window attention, from the qkv map to the output map, with the reference and other implementations.

Every contestant is first compared with the float64 reference, on at most two images; see benchmarks/contest.py for the
timing.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

import swinkernels
from benchmarks import contest, formulas, shapes
from benchmarks.peers import is_installed, make_peer
from benchmarks.timing import Call
from swinkernels import reference
from swinkernels.ops import _backends
from swinkernels.testing import WindowAttentionCase, judge_window_attention, named_inputs, run_case

OURS = tuple(name for name in _backends.BACKENDS if name not in _backends.PLAIN)
PEERS = ("eager", "sdpa", "eager-compiled", "sdpa-compiled", "flex-compiled", "cuequivariance")
CONTESTANTS = (*OURS, "reference", *PEERS)
COMPILED = tuple(name for name in PEERS if name.endswith("-compiled"))
TF32_EPS = 2.0**-10
Op = Callable[..., Tensor]  # (qkv, bias_table=None, logit_scale=None, pad_qkv=None, axis_tables=None) -> out


def kernels(device: torch.device) -> dict[str, str | None]:
    """Map each of our backends for a device to the reason why it cannot run here, or to None if it can."""
    return {n: _backends.unavailable(n) for n in OURS if (n == "cpu") == (device.type == "cpu")}


def contestants(device: torch.device, wanted: Sequence[str]) -> list[str]:
    """Return the contestants in ``wanted`` (all if empty) that can run on ``device`` with this installation."""
    on_cpu = device.type == "cpu"
    names = [name for name, reason in kernels(device).items() if reason is None]
    # On a CPU, FlexAttention has no backward pass, and cuEquivariance has no kernel.
    peers = [n for n in PEERS if is_installed(n) and not (on_cpu and n.startswith(("flex", "cuequivariance")))]
    return [name for name in (*names, "reference", *peers) if not wanted or name in wanted]


def make_op(name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device) -> Op:
    if name in (*OURS, "reference"):
        return lambda **maps: swinkernels.window_attention_qkvpacked(**maps, **case.arguments(), backend=name)
    kind, _, compiled = name.partition("-")
    peer = make_peer(case, dtype, device, kind)
    return torch.compile(peer, fullgraph=True, dynamic=False) if compiled else peer


# The maximum number of scores in a check on a CPU: the backward pass of the float64 reference needs several tensors of
# this many elements, 1.2 GB each.
MOST_SCORES_ON_CPU = 150_000_000


def to_verify(case: WindowAttentionCase, device: torch.device) -> WindowAttentionCase:
    """Return the case with at most two images and, on a CPU, fewer windows if its scores exceed MOST_SCORES_ON_CPU."""
    case, window = shapes.with_batch(case, 2), case.window_tuple
    while device.type == "cpu" and formulas.core_flops(case)["fwd"] // (4 * case.head_dim) > MOST_SCORES_ON_CPU:
        windows = [s // w for s, w in zip(case.size, window, strict=True)]
        axis = windows.index(max(windows))
        if windows[axis] < 4:
            break  # a shift needs two windows
        size = list(case.size)
        size[axis] -= windows[axis] // 2 * window[axis]
        case = dataclasses.replace(case, size=tuple(size))
    return case


def verify(
    name: str, case: WindowAttentionCase, dtype: torch.dtype, device: torch.device, eps: float | None = None
) -> tuple[bool, float]:
    """Check the output and the gradients of a contestant on at most two images.

    Returns whether they are correct, and their worst RMS error in units of ``eps`` (default: that of ``dtype``). Our
    backends are correct if their errors are within the error budget of the tests; the other contestants are judged by
    :func:`contest.compare`.
    """
    case = to_verify(case, device)
    op = make_op(name, case, dtype, device)
    inputs = case.inputs(dtype, device)
    got = run_case(op, inputs, {})
    exact, single = (
        run_case(reference.window_attention_qkvpacked, {k: v.to(wide) for k, v in inputs.items()}, case.arguments())
        for wide in (torch.float64, torch.float32)
    )
    right, worst = contest.compare(got, exact, single, eps or torch.finfo(dtype).eps)
    if name in OURS:
        op = functools.partial(swinkernels.window_attention_qkvpacked, backend=name)
        _, judged = judge_window_attention(op, case, dtype, device, eps=eps, rounds_unit_rows=name != "cpu")
        right = all(found.failure is None for found in judged.values())
    return right, worst


def benchmark(
    shape: str,
    case: WindowAttentionCase,
    dtype: torch.dtype,
    device: torch.device,
    names: Iterable[str],
    *,
    tf32: bool = False,
    directions: Sequence[str] = contest.DIRECTIONS,
    seconds: float | None = None,
) -> list[dict[str, Any]]:
    """Return one row per contestant and direction; ``tf32`` turns torch's TF32 switch on for float32."""
    drawn: list[dict[str, Tensor]] = []

    def make_calls(name: str, count: int) -> dict[str, Call]:
        drawn.extend(case.inputs(dtype, device, seed) for seed in range(len(drawn), count))
        inputs = [{k: x for k, x in tensors.items() if k != "dout"} for tensors in drawn]
        douts = [(tensors["dout"],) for tensors in drawn]
        op = make_op(name, case, dtype, device)
        named = lambda **tensors: op(**named_inputs(tensors))  # noqa: E731
        return contest.make_calls(named, inputs, douts, bare_backward=name in OURS)

    labels = {
        "op": "window_attention",
        "shape": shape,
        "case": str(case),
        "dtype": "tf32" if tf32 else str(dtype).removeprefix("torch."),
    }
    eps = TF32_EPS if tf32 else None
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else before
    try:
        return contest.run(
            contest.Contest(
                labels,
                {d: moved for d, moved in formulas.core_bytes(case, dtype.itemsize).items() if d in directions},
                lambda name: verify(name, case, dtype, device, eps),
                make_calls,
                dtype,
                formulas.core_flops(case),
            ),
            device,
            names,
            seconds=seconds,
        )
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
