"""Draw the charts of a run: speed-ups, roofline, models, memory, scaling and complexity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a server has no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter, StrMethodFormatter

from benchmarks import attention, formulas, models, scaling, shapes
from benchmarks.record import RESULT_OK

Row = dict[str, Any]
COLOURS = {
    **dict.fromkeys(("cuda", "cpu", "accelerate-compiled", "window"), "#1f6feb"),
    **dict.fromkeys(("triton", "accelerate"), "#79b0ff"),
    "accelerate-graphs": "#0a3d91",
    "reference": "#d9d9d9",
    "eager": "#8a8f98",
    "sdpa": "#e08a3c",
    "fused": "#e08a3c",
    "eager-compiled": "#4d525a",
    "sdpa-compiled": "#a85a14",
    "fused-compiled": "#a85a14",
    "flex-compiled": "#7a4fbf",
    "cuequivariance": "#3c9a5f",
    "eager-graphs": "#24272b",
    "fused-graphs": "#6b3808",
    "global": "#8a8f98",
    "openvino": "#3c9a5f",
    "onnxruntime": "#a3c95a",
}


def _right(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in rows if row["suite"] == suite and row["result"] == RESULT_OK and row["median_us"]]


def _save(fig: Any, path: Path) -> None:
    fig.savefig(path, dpi=100, metadata={"Software": None})  # the same rows always give the same file
    plt.close(fig)


def _bars(axis: Any, groups: dict[str, dict[str, float]], names: Sequence[str]) -> None:
    """Draw one group of horizontal bars per key of ``groups``; a name has the same position in every group."""
    shown = [name for name in names if any(name in values for values in groups.values())]
    height = 0.8 / max(len(shown), 1)
    for i, name in enumerate(shown):
        y = [k + (i - (len(shown) - 1) / 2) * height for k, values in enumerate(groups.values()) if name in values]
        x = [values[name] for values in groups.values() if name in values]
        bars = axis.barh(y, x, height, color=COLOURS[name], label=name)
        axis.bar_label(bars, fmt="%.3g", fontsize=6.5, padding=2)
    axis.set_yticks(range(len(groups)), groups, fontsize=8)
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)


def _legend(fig: Any, axes: Iterable[Any]) -> None:
    """Draw one legend for all axes, below the axes."""
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    fig.legend(entries.values(), entries, fontsize=8, loc="outside lower center", ncols=len(entries))


def _device(rows: Sequence[Row]) -> str:
    return str(rows[0]["device"])


def speedup(rows: Sequence[Row], path: Path) -> None:
    """Draw each peer's time for window attention as a multiple of our time, in one panel per direction."""
    found = [row for row in _right(rows, "ops") if row["op"] == "window_attention"]
    directions = ("fwd", "fwd+bwd")
    shapes_found = list(dict.fromkeys((row["shape"], row["dtype"]) for row in found))
    names = ("reference", *attention.PEERS)
    fig, axes = plt.subplots(1, 2, figsize=(12, 1.6 + 0.75 * len(shapes_found)), layout="constrained", sharey=True)
    for axis, direction in zip(axes, directions, strict=True):
        groups: dict[str, dict[str, float]] = {}
        for shape, dtype in shapes_found:
            times = {
                row["backend"]: row["median_us"]
                for row in found
                if (row["shape"], row["dtype"], row["direction"]) == (shape, dtype, direction)
            }
            mine = min((times[name] for name in attention.OURS if name in times), default=None)
            if mine is not None:
                groups[f"{shape}\n{dtype}"] = {name: times[name] / mine for name in names if name in times}
        _bars(axis, groups, names)
        axis.axvline(1, color="#1f6feb", linewidth=1.5)
        axis.set_title({"fwd": "forward", "fwd+bwd": "forward and backward"}[direction], fontsize=10)
        axis.set_xlabel("their time / ours (line: ours)")
    _legend(fig, axes)
    fig.suptitle(f"Window attention without its linear layers, {_device(found)}", fontsize=11)
    _save(fig, path)


def best_ratios(rows: Sequence[Row], direction: str) -> dict[tuple[str, str], float]:
    """Return, for each (shape, dtype), the time of the fastest other implementation divided by our fastest time.

    All times are for window attention in ``direction``.
    """
    found: dict[tuple[str, str], dict[str, float]] = {}
    for row in _right(rows, "ops"):
        if (row["op"], row["direction"]) == ("window_attention", direction):
            found.setdefault((row["shape"], row["dtype"]), {})[row["backend"]] = row["median_us"]
    ratios = {}
    for key, times in found.items():
        ours = [time for name, time in times.items() if name in attention.OURS]
        theirs = [time for name, time in times.items() if name not in attention.OURS]
        if ours and theirs:
            ratios[key] = min(theirs) / min(ours)
    return ratios


def summary(rows: Sequence[Row], path: Path) -> None:
    """Draw :func:`best_ratios` with two bars per shape: forward, and forward and backward together.

    Each dtype has its own axes.
    """
    bars = {"forward": ("fwd", "#1f6feb"), "forward and backward": ("fwd+bwd", "#79b0ff")}
    ratios = {label: best_ratios(rows, direction) for label, (direction, _) in bars.items()}
    keys = list(dict.fromkeys(key for found in ratios.values() for key in found))
    dtypes = list(dict.fromkeys(dtype for _, dtype in keys))
    fig, axes = plt.subplots(
        len(dtypes), 1, figsize=(10, 0.8 + 2.6 * len(dtypes)), layout="constrained", sharey=True, squeeze=False
    )
    for axis, dtype in zip(axes[:, 0], dtypes, strict=True):
        shapes = [shape for shape, of in keys if of == dtype]
        _ratio_bars(
            shapes,
            {label: {s: r for (s, of), r in found.items() if of == dtype} for label, found in ratios.items()},
            [colour for _, colour in bars.values()],
            axis,
        )
        axis.set_ylabel(f"times as fast, {dtype}", fontsize=9)
    axes[0, 0].legend(fontsize=8.5, frameon=False, ncols=len(bars), loc="lower left", bbox_to_anchor=(0, 1))
    fig.suptitle(f"Window attention against the fastest other implementation: {_device(rows)}", fontsize=10.5)
    _save(fig, path)


def _ratio_bars(
    shapes: Sequence[str], ratios: Mapping[str, Mapping[str, float]], colours: Sequence[str], axis: Any
) -> None:
    """Draw one group of bars per shape, with one bar for each of ``ratios``, which map shapes to heights."""
    width = 0.8 / len(ratios)
    for i, ((label, found), colour) in enumerate(zip(ratios.items(), colours, strict=True)):
        x = [k + (i - (len(ratios) - 1) / 2) * width for k, shape in enumerate(shapes) if shape in found]
        drawn = axis.bar(x, [found[s] for s in shapes if s in found], width, color=colour, label=label)
        axis.bar_label(drawn, fmt="%.1f", fontsize=7, padding=1)
    axis.axhline(1, color="black", linewidth=1)
    axis.set_xticks(range(len(shapes)), shapes, fontsize=8.5, rotation=25, ha="right", rotation_mode="anchor")
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.spines[["top", "right"]].set_visible(False)


def roofline(rows: Sequence[Row], path: Path) -> None:
    """Draw window attention under its roofline (left), and every op's percentage of the roofline (right)."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5.2), layout="constrained")
    _attention_roofline([row for row in _right(rows, "ops") if row["gflop"] and row["moved_mb"]], left)
    ours = [row for row in _right(rows, "ops") if row["backend"] in attention.OURS]
    _percents(ours or _right(rows, "ops"), right)
    right.set_title(f"{'kernels of this package' if ours else 'others'}; a point for each shape and dtype", fontsize=10)
    fig.suptitle(f"Against the roofline, {_device(_right(rows, 'ops'))}", fontsize=11)
    _save(fig, path)


def _attention_roofline(found: Sequence[Row], axis: Any) -> None:
    intensity = [row["gflop"] * 1e3 / row["moved_mb"] for row in found]
    x = np.geomspace(min(intensity) / 3, max(intensity) * 10, 100)
    for dtype in dict.fromkeys(row["dtype"] for row in found):
        top = next(row for row in found if row["dtype"] == dtype)
        copy, matrix = float(top["ceiling_gb_per_s"]), float(top["ceiling_gflop_per_s"])
        axis.plot(x, np.minimum(x * copy, matrix), color="black", linewidth=1)
        axis.annotate(f"matrix product, {dtype}", (x[-1], matrix), ha="right", va="bottom", fontsize=7)
        axis.annotate("copy", (x[0], x[0] * copy), ha="left", va="bottom", fontsize=7)
    markers = {"fwd": "o", "bwd": "v", "fwd+bwd": "s"}
    for name in dict.fromkeys(row["backend"] for row in found):
        for direction, marker in markers.items():
            points = [
                (i, row["gflop"] * 1e6 / row["median_us"])
                for i, row in zip(intensity, found, strict=True)
                if (row["backend"], row["direction"]) == (name, direction)
            ]
            if points:
                label = name if direction == "fwd" else None
                axis.scatter(*zip(*points, strict=True), s=22, marker=marker, color=COLOURS[name], label=label)
    _log_log(axis)
    axis.set_xlabel("flops per byte that has to move")
    axis.set_ylabel("GFLOP/s of the matrix products")
    axis.set_title("window attention; o forward, v backward, square both", fontsize=10)
    axis.legend(fontsize=8)


def _percents(found: Sequence[Row], axis: Any) -> None:
    """Draw the percentages of the roofline: one line per op and direction, one point per shape, dtype and backend."""
    lines = list(dict.fromkeys((row["op"], row["direction"]) for row in found))
    for name in dict.fromkeys(row["backend"] for row in found):
        points = [
            (row["percent_of_roofline"], lines.index((row["op"], row["direction"])))
            for row in found
            if row["backend"] == name
        ]
        axis.scatter(*zip(*points, strict=True), s=18, color=COLOURS[name], alpha=0.7, label=name)
    axis.set_yticks(range(len(lines)), [f"{op}, {direction}" for op, direction in lines], fontsize=8)
    axis.set_ylim(len(lines) - 0.5, -0.5)
    axis.axvline(100, color="black", linewidth=1)
    axis.set_xlim(left=0)
    axis.set_xlabel("time at the roofline / time, %")
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _log_log(axis: Any) -> None:
    """Make both axes logarithmic, with plain numbers as labels."""
    for scale, of_axis in ((axis.set_xscale, axis.xaxis), (axis.set_yscale, axis.yaxis)):
        scale("log")
        of_axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        of_axis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    axis.tick_params(which="both", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _of_models(rows: Sequence[Row], value: str, scale: float, title: str, unit: str, path: Path) -> None:
    found = [
        r for r in rows if r["suite"] in ("models", "memory") and r["result"] == RESULT_OK and r[value] is not None
    ]
    modes = list(dict.fromkeys(row["direction"] for row in found))
    names = list(dict.fromkeys((row["shape"], row["case"], row["dtype"]) for row in found))
    fig, axes = plt.subplots(
        1, len(modes), figsize=(6 * len(modes), 1.6 + 0.85 * len(names)), layout="constrained", squeeze=False
    )
    for axis, mode in zip(axes.flat, modes, strict=True):
        groups = {
            f"{shape}\n{dtype}, batch {case.split('-')[1][1:]}": {
                row["backend"]: row[value] * scale
                for row in found
                if (row["shape"], row["case"], row["dtype"], row["direction"]) == (shape, case, dtype, mode)
            }
            for shape, case, dtype in names
        }
        _bars(axis, groups, models.CONTESTANTS)
        axis.set_title(mode, fontsize=10)
        axis.set_xlabel(unit)
    _legend(fig, axes.flat)
    fig.suptitle(f"{title}, {_device(found)}", fontsize=11)
    _save(fig, path)


def model_times(rows: Sequence[Row], path: Path) -> None:
    _of_models(rows, "median_us", 1e-3, "One step", "ms", path)


def memory(rows: Sequence[Row], path: Path) -> None:
    _of_models(rows, "peak_mib", 1.0, "Peak memory of one step", "MiB", path)


def scalings(rows: Sequence[Row], path: Path) -> None:
    """Plot time against images, tokens and flops, with the slope of each series and a line of slope 1 to compare."""
    fig, axes = plt.subplots(1, len(scaling.SWEEPS), figsize=(13, 4.2), layout="constrained")
    for axis, (sweep, (_, _, what)) in zip(axes, scaling.SWEEPS.items(), strict=True):
        found = scaling.series(rows, sweep)
        for name, (x, y) in found.items():
            label = f"{name}, slope {scaling.slope(x, y):.2f}" if len(x) > 1 else name
            axis.plot(x, y, "o-", color=COLOURS[name], label=label, markersize=4)
        if found:
            x, y = next(iter(found.values()))
            axis.plot(x, [y[-1] * v / x[-1] for v in x], ":", color="black", linewidth=1, label="slope 1")
        _log_log(axis)
        axis.set_xlabel(what)
        axis.set_ylabel("us")
        axis.set_title(f"cost over {sweep}", fontsize=10)
        if found:
            axis.legend(fontsize=7)
    fig.suptitle(f"Window attention, forward, {_device(_right(rows, 'scaling'))}", fontsize=11)
    _save(fig, path)


def complexity(rows: Sequence[Row], path: Path) -> None:
    """Plot the time of whole layers against the number of tokens, and the paper's formulas scaled to the last point."""
    c, w = shapes.COMPLEXITY_CHANNELS, shapes.COMPLEXITY_WINDOW
    omega: dict[str, Callable[[int], int]] = {
        "global": lambda side: formulas.msa_multiply_adds(side, side, c),
        "window": lambda side: formulas.window_msa_multiply_adds(side, side, c, w),
    }
    fig, axis = plt.subplots(figsize=(7, 4.8), layout="constrained")
    for kind, (sides, times) in scaling.layers(rows).items():
        tokens = [side**2 for side in sides]
        axis.plot(tokens, times, "o", color=COLOURS[kind], label=f"{kind} attention, measured")
        formula = [omega[kind](side) for side in sides]
        fitted = [times[-1] * f / formula[-1] for f in formula]
        axis.plot(tokens, fitted, "--", color=COLOURS[kind], label=f"its formula, scaled to {tokens[-1]} tokens")
    _log_log(axis)
    axis.set_xlabel("tokens of the map")
    axis.set_ylabel("us, forward")
    axis.set_title(
        f"Attention with its projections, {c} channels, window {w}\n{_device(_right(rows, 'scaling'))}", fontsize=10
    )
    axis.legend(fontsize=8)
    _save(fig, path)


TITLES = {
    "summary": "window attention: how many times as fast as the fastest other implementation, by shape",
    "speedup": "other implementations' time over ours, by shape",
    "roofline": "achieved flops over flops per byte under the measured ceilings, and percent of the roofline by op",
    "models": "time of a step by model",
    "memory": "peak memory of a step by model",
    "scaling": "time over images, tokens and flops",
    "complexity": "time of global and window attention over tokens, with their formulas",
}
DRAW: dict[str, Callable[[Sequence[Row], Path], None]] = {
    "summary": summary,
    "speedup": speedup,
    "roofline": roofline,
    "models": model_times,
    "memory": memory,
    "scaling": scalings,
    "complexity": complexity,
}


def _of_attention(rows: Sequence[Row]) -> set[str]:
    """Return the contestants that have a correct result for window attention."""
    return {row["backend"] for row in _right(rows, "ops") if row["op"] == "window_attention"}


# Functions that return True if a run has the rows that a chart needs.
DRAWABLE: dict[str, Callable[[Sequence[Row]], bool]] = {
    "summary": lambda rows: bool(best_ratios(rows, "fwd")),
    "speedup": lambda rows: not _of_attention(rows).isdisjoint(attention.OURS),
    "roofline": lambda rows: bool(_of_attention(rows)),
    "models": lambda rows: bool(_right(rows, "models")),
    "memory": lambda rows: any(r["suite"] in ("models", "memory") and r["peak_mib"] for r in rows),
    "scaling": lambda rows: any(r["op"] == "window_attention" for r in _right(rows, "scaling")),
    "complexity": lambda rows: bool(scaling.layers(rows)),
}
