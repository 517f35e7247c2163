"""Every op once in every regime of its CUDA kernels, tiny, forward and backward: what a sanitizer is to look at.

``python -m gpu calls --device cpu`` makes the calls without a GPU, by the backends that there are.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import swinkernels
from gpu.smoke import separate
from swinkernels.testing import WindowAttentionCase, run_case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Case = WindowAttentionCase
ROLL_THEN_PAD = {"pad_order": "roll_then_pad"}
# By what kernels choose tiles and loops: the tokens of a window (short, middle, long), head_dim, and what is added.
ATTENTION = [
    Case(1, (4, 6), 2, 8, 2, 1),
    Case(2, (10, 8), 3, 32, 7, 3, has_pad_qkv=True),
    Case(1, (8, 8), 2, 16, 8, 4, options=ROLL_THEN_PAD),
    Case(1, (12, 10), 1, 32, 12, 6, has_pad_qkv=True, options=ROLL_THEN_PAD),
    Case(1, (16, 16), 1, 32, 16, 8),
    Case(1, (20, 20), 1, 32, 20, 3),
    Case(1, (25, 24), 1, 16, (25, 24)),
    *(Case(1, (5, 7), 1, head_dim, 4, 2, has_pad_qkv=True) for head_dim in (4, 10, 20, 30, 48, 64, 96, 128)),
    *(Case(1, (9, 7), 2, 32, w, 1, has_pad_qkv=True, has_logit_scale=True) for w in (4, 7)),
    Case(1, (16, 16), 1, 32, 16, 8, has_logit_scale=True),
    Case(1, (7, 14), 2, 32, 7, 3, has_table=False, bias_types=0),
    Case(1, (8, 8), 2, 16, 4, 2, has_table=False, bias_types=2),
    Case(1, (12, 12), 1, 16, 12, 0, has_table=False, has_logit_scale=True, bias_types=0),
    Case(1, (6, 7), 2, 16, 4, 2, has_pad_qkv=True, options={"pad_before": (1, 1)}),
    Case(1, (8, 8), 2, 16, 4, 2, options={"periodic": (False, True)}),
    Case(1, (7, 8), 2, 16, 4, 1, options={"region_map": torch.arange(64, dtype=torch.int32).reshape(8, 8) % 3}),
    Case(1, (8, 12), 2, 16, 4, 0, options={"grid": True}),
    Case(1, (6, 5), 1, 16, (3, 5), options={"table_window": (7, 7)}),
    Case(1, (4, 6, 5), 1, 16, (2, 3, 4), (1, 1, 2), has_pad_qkv=True),
    Case(1, (8, 8), 2, 32, 4, 2, options={"dropout_p": 0.2}),
    Case(1, (16, 16), 1, 32, 16, 8, options={"dropout_p": 0.2}),
    Case(0, (8, 8), 2, 32, 4, 2, has_pad_qkv=True),
]


def attention(case: Case, dtype: torch.dtype, device: torch.device, backend: str, packed: bool) -> dict[str, Tensor]:
    op = functools.partial(swinkernels.window_attention_qkvpacked if packed else separate, backend=backend)
    return run_case(op, case.inputs(dtype, device), case.arguments(device))


def differentiate(op: Callable[..., Any], dtype: torch.dtype, device: torch.device, *shapes: Any) -> dict[str, Tensor]:
    """Outputs and gradients of an op of floating-point tensors of these shapes."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    out = op(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    grads = torch.autograd.grad(outs, leaves, [torch.ones_like(x) for x in outs])
    return {str(i): x.detach() for i, x in enumerate([*outs, *grads])}


def memory_ops(backend: str) -> Iterator[tuple[str, Callable[..., Any], list[tuple[int, ...]]]]:
    """Name, op and shapes of its tensors."""
    ops = swinkernels.ops
    for channels, order in itertools.product((1, 3, 8, 40), ("pad_then_roll", "roll_then_pad")):
        given = {"window_size": (4, 3), "shift_size": (2, 1), "pad_order": order, "backend": backend}
        yield (
            f"window_partition {channels} {order}",
            functools.partial(ops.window_partition, **given),
            [(2, 5, 7, channels)],
        )
        yield (
            f"window_reverse {channels} {order}",
            functools.partial(ops.window_reverse, size=(5, 7), **given),
            [(2 * 2 * 3, 12, channels)],
        )
    for channels in (3, 32, 96, 200, 768, 1536):
        yield (
            f"layer_norm {channels}",
            functools.partial(ops.layer_norm, backend=backend),
            [(5, channels)] + [(channels,)] * 2,
        )
        for name in ("residual_layer_norm", "residual_post_norm"):
            yield f"{name} {channels}", functools.partial(getattr(ops, name), backend=backend), [
                (2, 3, channels), (2, 3, channels), (channels,), (channels,),
            ]  # fmt: skip
    for channels, norm in itertools.product((3, 32, 96), ("pre", "post")):
        wide = (4 if norm == "pre" else 2) * channels
        yield f"patch_merging {channels} {norm}", functools.partial(ops.patch_merging, norm=norm, backend=backend), [
            (2, 5, 6, channels), (wide,), (wide,), (2 * channels, 4 * channels),
        ]  # fmt: skip


def run(device: torch.device, backend: str, most: int | None = None) -> int:
    """Make all calls, or so many that are spread over them; how many the backend had."""
    calls: list[tuple[str, Callable[[], dict[str, Tensor]]]] = []
    for dtype in DTYPES:
        for case, packed in itertools.product(ATTENTION, (True, False)):
            name = f"{'window_attention_qkvpacked' if packed else 'window_attention'} {case} {dtype}"
            calls.append((name, functools.partial(attention, case, dtype, device, backend, packed)))
        for name, op, shapes in memory_ops(backend):
            calls.append((f"{name} {dtype}", functools.partial(differentiate, op, dtype, device, *shapes)))
    made = 0
    for name, call in calls[:: max(1, len(calls) // most) if most else 1][:most]:
        try:
            results = call()
        except NotImplementedError:
            continue
        made += 1
        if not all(x.isfinite().all() for x in results.values()):
            raise SystemExit(f"gpu calls: {name}: a result is not finite")
    if made == 0:
        raise SystemExit(f"gpu calls: the backend {backend} ran nothing: see python -m swinkernels.info")
    return made
