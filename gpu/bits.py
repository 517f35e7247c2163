"""Checks that the same input gives the same bits when a call is repeated, on another stream, and in a CUDA graph."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

import swinkernels
from gpu.lines import FAILED, OK, WRONG, Emitter
from gpu.plan import Setting
from gpu.smoke import tiny
from swinkernels.testing import WindowAttentionCase

SWIN = WindowAttentionCase(32, (56, 56), 3, 32, 7, 3)
Results = list[Tensor]


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    *_, backend = group.split()
    case = tiny(SWIN) if setting.rehearse else SWIN
    dtype = torch.float16 if setting.rehearse else torch.bfloat16
    inputs = case.inputs(dtype, setting.device)
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "dout"}
    given = {**case.arguments(), "backend": backend}

    def attend() -> Results:
        out = swinkernels.window_attention_qkvpacked(**leaves, **given)
        return [out.detach(), *torch.autograd.grad(out, list(leaves.values()), inputs["dout"])]

    channels = inputs["qkv"].shape[-1]
    weight, bias = (torch.ones(channels, device=setting.device, dtype=dtype).requires_grad_() for _ in range(2))

    def norm() -> Results:
        out = swinkernels.layer_norm(leaves["qkv"], weight, bias, backend=backend)
        return [out.detach(), *torch.autograd.grad(out, [leaves["qkv"], weight, bias], torch.ones_like(out))]

    def partition() -> Results:
        return [swinkernels.window_partition(leaves["qkv"].detach(), 7, 3, backend=backend)]

    calls = {"window_attention": attend, "window_partition": partition}
    if backend == "cuda":
        calls["layer_norm"] = norm
    labels = {"backend": backend, "dtype": str(dtype).removeprefix("torch.")}
    check = functools.partial(_first if group.startswith("first") else _same, setting.device, backend)
    for op, call in calls.items():
        yield op, functools.partial(check, call, functools.partial(emit.line, op=op, **labels))


def capture(call: Callable[[], Results], device: str) -> tuple[Results, Callable[[], object]]:
    """Capture ``call`` in a CUDA graph; return its results and a function that replays the graph.

    On a CPU, make the call directly; the returned function repeats it and overwrites the results.
    """
    if device != "cuda":
        results = call()
        return results, lambda: [x.copy_(y) for x, y in zip(results, call(), strict=True)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return results, graph.replay


def aside(call: Callable[[], Results], device: str) -> Results:
    """Run a call on a side stream and return its results."""
    if device != "cuda":
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call()
    torch.cuda.current_stream().wait_stream(stream)
    return results


def _differences(expected: Results, got: Results) -> int:
    return sum(int((~x.eq(y)).sum()) for x, y in zip(expected, got, strict=True))  # NaN differs from itself


def _same(device: str, backend: str, call: Callable[[], Results], line: Callable[..., None]) -> None:
    expected = [x.clone() for x in call()]
    captured, replay = capture(call, device)
    again = {"second call": call, "third call": call, "side stream": lambda: aside(call, device)}

    def replayed() -> Results:
        for x in captured:
            x.fill_(0)
        replay()
        return captured

    for how, results in {**again, "replay": replayed, "second replay": replayed}.items():
        found = _differences(expected, results())
        line(direction=how, value=found, unit="differing", result=WRONG if found else OK)


def _first(device: str, backend: str, call: Callable[[], Results], line: Callable[..., None]) -> None:
    """Capture the first call of a process: it must work with CUDA kernels, and raise an error with Triton kernels."""
    asked = False
    try:
        captured, replay = capture(call, device)
    except RuntimeError as error:
        asked = "before" in str(error) and "captur" in str(error)
        if backend != "triton" or not asked:
            raise
    if asked:
        line(direction="first call in a capture", detail="the error says to call the op once before")
        return
    if backend == "triton" and device == "cuda":
        line(direction="first call in a capture", result=FAILED, detail="no error said to call the op once before")
        return
    replay()
    got = [x.clone() for x in captured]
    found = _differences(call(), got)
    line(direction="first call in a capture", value=found, unit="differing", result=WRONG if found else OK)
