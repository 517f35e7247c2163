"""Measure how the cost grows with images, tokens and windows, and compare window attention with global attention.

The sweeps time the forward pass of the attention core. Window and global attention are compared as whole layers with
their projections, which the formulas of the Swin paper include.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import attention, contest, formulas, record, shapes
from benchmarks.timing import Call
from swinkernels import reference
from swinkernels.ops.window_attention import window_attention_qkvpacked
from swinkernels.testing import WindowAttentionCase

# For each sweep: its cases, a function from a case to its x coordinate, and the label of the x axis.
SWEEPS: dict[str, tuple[Mapping[str, WindowAttentionCase], Callable[[WindowAttentionCase], float], str]] = {
    "batch": (shapes.BATCH_SWEEP, lambda case: case.batch, "images"),
    "map": (shapes.MAP_SWEEP, lambda case: math.prod(case.size), "tokens of a map"),
    "window": (shapes.WINDOW_SWEEP, lambda case: formulas.core_flops(case)["fwd"], "flops of the core"),
}
LAYERS = ("window", "global")


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the least-squares slope of log y against log x; it is 1 if y is proportional to x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def sweep(
    name: str, dtype: torch.dtype, device: torch.device, names: Iterable[str], *, largest: int | None = None
) -> list[dict[str, Any]]:
    """Return the rows of one forward sweep, over the cases with at most ``largest`` tokens in all images."""
    rows = []
    for shape, case in SWEEPS[name][0].items():
        if largest is None or case.batch * math.prod(case.size) <= largest:
            found = attention.benchmark(shape, case, dtype, device, names, directions=("fwd",))
            rows += [{**row, "suite": "scaling"} for row in found]
    return rows


def series(rows: Iterable[Mapping[str, Any]], name: str) -> dict[str, tuple[list[float], list[float]]]:
    """Return the x coordinates and the times in us of a sweep's correct results, by contestant."""
    cases, abscissa, _ = SWEEPS[name]
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        if row["suite"] == "scaling" and row["shape"] in cases and row["result"] == record.RESULT_OK:
            x, y = found.setdefault(row["backend"], ([], []))
            x.append(abscissa(cases[row["shape"]]))
            y.append(row["median_us"])
    return found


def layers(rows: Iterable[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return the sides of the maps and the times in us of the layers' correct results, by contestant."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    for row in rows:
        if row["op"] == "attention layer" and row["result"] == record.RESULT_OK:
            sides, times = found.setdefault(row["backend"], ([], []))
            sides.append(int(row["shape"].rpartition("x")[2]))
            times.append(row["median_us"])
    return found


def layer(kind: str, side: int) -> Callable[..., Tensor]:
    """Return an attention layer for side x side tokens: a function (x, qkv_weight, proj_weight, bias_table) -> out."""
    heads, channels, window = shapes.COMPLEXITY_HEADS, shapes.COMPLEXITY_CHANNELS, shapes.COMPLEXITY_WINDOW

    def windowed(x: Tensor, qkv_weight: Tensor, proj_weight: Tensor, bias_table: Tensor) -> Tensor:
        attend = reference.window_attention_qkvpacked if x.dtype == torch.float64 else window_attention_qkvpacked
        qkv = F.linear(x, qkv_weight)
        return F.linear(attend(qkv, bias_table, num_heads=heads, window_size=window), proj_weight)

    def whole(x: Tensor, qkv_weight: Tensor, proj_weight: Tensor, bias_table: Tensor) -> Tensor:
        b = x.shape[0]
        qkv = F.linear(x, qkv_weight).view(b, side * side, 3, heads, channels // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if x.dtype == torch.float64:
            out = ((q @ k.transpose(-2, -1)) * (channels // heads) ** -0.5).softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v)
        return F.linear(out.transpose(1, 2).reshape(b, side, side, channels), proj_weight)

    return {"window": windowed, "global": whole}[kind]


def complexity(
    side: int, dtype: torch.dtype, device: torch.device, names: Iterable[str] = LAYERS
) -> list[dict[str, Any]]:
    """Compare window and global attention on one map: check both against float64, then time them in turn."""
    channels, heads, window = shapes.COMPLEXITY_CHANNELS, shapes.COMPLEXITY_HEADS, shapes.COMPLEXITY_WINDOW
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0, keep: bool = False) -> Tensor:
        x = torch.randn(*shape, generator=generator) * scale
        return x.to(device, torch.float32 if keep else dtype)

    inputs = {
        "x": draw(1, side, side, channels),
        "qkv_weight": draw(3 * channels, channels, scale=channels**-0.5),
        "proj_weight": draw(channels, channels, scale=channels**-0.5),
        "bias_table": draw((2 * window - 1) ** 2, heads, keep=True),
    }

    def verify(kind: str) -> tuple[bool, float]:
        op = layer(kind, side)
        with torch.no_grad():
            got = {"out": op(**inputs)}
            exact = {"out": op(**{k: x.double() for k, x in inputs.items()})}
        return contest.compare(got, exact, exact, torch.finfo(dtype).eps)

    def make_calls(kind: str, count: int) -> dict[str, Call]:
        sets = [{k: x.clone() for k, x in inputs.items()} for _ in range(count)]
        op = layer(kind, side)

        def forward(i: int) -> Tensor:
            with torch.no_grad():
                return op(**sets[i])

        return {"fwd": forward}

    moved = 2 * side * side * channels * dtype.itemsize
    labels = {
        "suite": "scaling",
        "op": "attention layer",
        "shape": f"complexity {side}x{side}",
        "case": f"b1-{side}x{side}-c{channels}-w{window}",
        "dtype": str(dtype).removeprefix("torch."),
    }
    both = contest.Contest(labels, {"fwd": moved}, verify, make_calls, dtype)
    return contest.run(both, device, names)
