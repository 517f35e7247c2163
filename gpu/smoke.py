"""Compares each kernel, in each dtype and TF32, forward and backward, with the float64 reference on the same device."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

import swinkernels
from benchmarks import memory_bound
from benchmarks.attention import TF32_EPS
from benchmarks.shapes import MapCase
from gpu.lines import OK, WRONG, Emitter
from gpu.plan import Setting
from swinkernels.ops import _backends
from swinkernels.testing import Judged, WindowAttentionCase, judge_window_attention
from tests.support.philox import kept_by_triton, kept_weights

Case = WindowAttentionCase
PADDED = Case(2, (10, 17), 3, 32, 7, 3, has_pad_qkv=True)
ATTENTION: dict[str, Case] = {
    **{f"swin_t.{i + 1}": Case(2, (56 >> i, 56 >> i), 3 << i, 32, 7, 3 if i < 3 else 0) for i in range(4)},
    "padded, then rolled": PADDED,
    "rolled, then padded": dataclasses.replace(PADDED, options={"pad_order": "roll_then_pad"}),
    "v2": Case(2, (16, 16), 3, 32, 8, 4, has_logit_scale=True),
    "window 8": Case(2, (32, 32), 3, 32, 8, 4),
    "window 12": Case(2, (24, 24), 4, 32, 12, 6),
    "window 16": Case(2, (32, 32), 3, 32, 16, 8),
    "window 7x7x7": Case(1, (14, 14, 14), 3, 16, 7, 3),
    "head_dim 16": Case(2, (28, 28), 6, 16, 7, 3),
    "head_dim 30": Case(2, (32, 32), 6, 30, 8, 4),
    "separate q, k, v": Case(2, (28, 28), 6, 32, 7, 3),
    "dropout": Case(2, (28, 28), 6, 32, 7, 3, options={"dropout_p": 0.2}),
}
MAPS = {
    "whole windows": MapCase(2, (28, 28), 96),
    "padded": MapCase(2, (13, 9), 96),
    "3D": MapCase(1, (7, 9, 8), 48),
}
# Each entry is a single dtype, or the two dtypes that an op combines under autocast.
PAIRS = ("float32", "float16", "bfloat16", "float32-bfloat16")
SEED = 3
MOST_INTERPRETED = 150  # tokens of a window; with more, Triton's interpreter takes seconds


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    kind, backend, *rest = group.split()
    if kind == "memory":
        yield from _memory_cases(backend, emit, setting)
        return
    arithmetic, share = rest
    first, count = map(int, share.split("/"))
    interprets = setting.rehearse and backend == "triton"
    seen = []
    for name in list(ATTENTION)[first::count]:
        case = tiny(ATTENTION[name]) if setting.rehearse else ATTENTION[name]
        if interprets and math.prod(case.window_tuple) > MOST_INTERPRETED:
            continue
        if case in seen and not name.startswith("separate"):
            continue  # the stages of a model shrink to the same tiny case
        seen.append(case)
        yield name, functools.partial(_attention, name, case, backend, arithmetic, emit, setting)


def tiny(case: Case) -> Case:
    """Return a copy of a case with one image, one head, at most two windows and the same padding."""
    window = case.window_tuple
    windows = [min(-(-s // w), 2 if i == 0 else 1) for i, (s, w) in enumerate(zip(case.size, window, strict=True))]
    size = tuple(n * w - -s % w for n, w, s in zip(windows, window, case.size, strict=True))
    shift = tuple(min(case.shift_size, w // 2) if n > 1 else 0 for n, w in zip(windows, window, strict=True))
    return dataclasses.replace(case, batch=1, size=size, num_heads=1, shift_size=shift)


def separate(qkv: Tensor, *args: Any, num_heads: int, **given: Any) -> Tensor:
    """Call ``window_attention`` with the q, k and v of a packed map."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(-3)
    return swinkernels.window_attention(q, k.contiguous(), v, *args, num_heads=num_heads, **given)


def _attention(name: str, case: Case, backend: str, arithmetic: str, emit: Emitter, setting: Setting) -> None:
    is_tf32 = arithmetic == "tf32"
    dtype = torch.float32 if is_tf32 else getattr(torch, arithmetic)
    form = separate if name.startswith("separate") else swinkernels.window_attention_qkvpacked
    op = functools.partial(form, backend=backend)
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32" if is_tf32 else "ieee"
    try:
        with dropout_of_the_kernels(case, backend, setting.device) as generator:
            _, judged = judge_window_attention(
                functools.partial(op, generator=generator) if generator is not None else op,
                case,
                dtype,
                setting.device,
                eps=TF32_EPS if is_tf32 else None,
                rounds_unit_rows=True,
            )
    finally:
        matmul.fp32_precision = before
    tell(emit, judged, op="window_attention", backend=backend, dtype=arithmetic)


@contextlib.contextmanager
def dropout_of_the_kernels(case: Case, backend: str, device: str) -> Iterator[torch.Generator | None]:
    """Make the reference drop the same attention weights as the kernels, and yield the generator for the op.

    Without dropout in ``case``, do nothing and yield None.
    """
    if "dropout_p" not in case.options:
        yield None
        return
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=device, generator=torch.Generator(device).manual_seed(SEED))
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    tokens = math.prod(case.window_tuple)
    drawn = seed.item(), case.options["dropout_p"], case.batch, windows, case.num_heads, tokens
    kept = kept_by_triton(*drawn, tokens) if backend == "triton" else kept_weights(*drawn)
    before = Tensor.bernoulli_
    Tensor.bernoulli_ = lambda self, p, generator=None: self.copy_(kept)  # type: ignore[assignment, method-assign]
    try:
        yield torch.Generator(device).manual_seed(SEED)
    finally:
        Tensor.bernoulli_ = before  # type: ignore[method-assign]


def tell(emit: Emitter, judged: dict[str, Judged], **labels: str) -> None:
    """Emit a line for the outputs and one for the gradients, with the worst error in eps and the first failure."""
    for direction in ("fwd", "bwd"):
        found = [x for name, x in judged.items() if (direction == "fwd") == name.startswith("out")]
        failure = next((x.failure for x in found if x.failure), None)
        worst = max((x.rms_eps for x in found), key=lambda e: math.inf if math.isnan(e) else e)
        result = {"result": WRONG, "detail": failure} if failure else {"result": OK}
        emit.line(**labels, direction=direction, value=worst, unit="eps", **result)


def _memory_cases(backend: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    device = torch.device(setting.device)
    interprets = setting.rehearse and backend == "triton"
    for op, bench in memory_bound.BENCHES.items():
        if not bench.bare_backward or backend not in _backends.IMPLEMENTED[bench.implemented]:
            continue
        for shape, whole in MAPS.items():
            if op == "patch_expanding" and len(whole.size) == 3:
                continue
            if setting.rehearse:
                whole = dataclasses.replace(whole, batch=1, size=whole.size[1:] if len(whole.size) == 3 else (4, 5))
                whole = dataclasses.replace(whole, channels=32, window=3, shift=1)
            for pair in PAIRS[:2] if interprets else PAIRS:
                yield f"{op} {shape} {pair}", functools.partial(_memory, op, backend, whole, pair, device, emit)


def _memory(op: str, backend: str, case: MapCase, pair: str, device: torch.device, emit: Emitter) -> None:
    _, _, judged = memory_bound.judge(op, backend, case, memory_bound.PAIRS[pair], device)
    tell(emit, judged, op=op, backend=backend, dtype=pair)
