"""Draws the demo's two pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import quantiles
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a server has no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor

COLOURS = {"timm": "#8a8f98", "swinkernels": "#1f6feb"}


def _first_component(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean token of a map (H, W, C), and the first principal component of its tokens."""
    tokens = x.flatten(0, 1)
    mean = tokens.mean(0)
    direction = torch.linalg.svd(tokens - mean, full_matrices=False).Vh[0]
    return mean, direction if direction.sum() > 0 else -direction  # fixes the sign


def save_stages(path: Path, photo: np.ndarray, plain: dict[str, Tensor], fast: dict[str, Tensor], title: str) -> None:
    """Draw the photograph and, for every stage, both outputs on the same colour scale, and their difference.

    Outputs are projected onto the first principal component of timm's output. The difference is shown as its root mean
    square over the channels.
    """
    names = [name for name in plain if name.startswith("stage")]
    fig = plt.figure(figsize=(4.2 + 2.9 * len(names), 7.6), layout="constrained")
    fig.suptitle(title, fontsize=13)
    panels: Any = fig.subfigures(1, 2, width_ratios=(4.2, 2.9 * len(names)))
    left, right = panels
    axis = left.subplots()
    axis.imshow(photo)
    axis.set_title(f"photograph, {photo.shape[1]} x {photo.shape[0]} pixels", fontsize=10)
    axis.axis("off")

    axes = right.subplots(3, len(names), squeeze=False)
    for column, name in enumerate(names):
        x, y = plain[name][0], fast[name][0]  # the outputs (H, W, C) for the first image
        mean, direction = _first_component(x)
        maps = [((t - mean) @ direction).numpy() for t in (x, y)]
        low, high = min(m.min() for m in maps), max(m.max() for m in maps)
        for row, values in enumerate(maps):
            image = axes[row, column].imshow(values, vmin=low, vmax=high, cmap="viridis", interpolation="nearest")
        _colourbar(right, image, axes[:2, column], "first principal component")
        difference = (y - x).square().mean(-1).sqrt().numpy()
        size = x.square().mean().sqrt().item()
        top = max(difference.max(), 1e-7 * size)  # positive even if the outputs are equal
        image = axes[2, column].imshow(difference, vmin=0, vmax=top, cmap="magma", interpolation="nearest")
        _colourbar(right, image, axes[2:, column], "RMS over channels")
        axes[0, column].set_title(f"{name}\n{x.shape[0]} x {x.shape[1]} tokens, {x.shape[2]} channels", fontsize=10)
        relative = difference.max() / size
        axes[2, column].set_title(
            f"largest: {relative:.1e} of the output" if relative else "equal bit for bit", fontsize=9
        )
    for row, label in enumerate(("timm", "swinkernels", "difference")):
        axes[row, 0].set_ylabel(label, fontsize=11)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _colourbar(fig: Any, image: Any, axes: np.ndarray, label: str) -> None:
    bar = fig.colorbar(image, ax=axes, shrink=0.9, pad=0.03, aspect=30 if len(axes) > 1 else 13)
    bar.set_label(label, fontsize=8)
    bar.formatter.set_powerlimits((-2, 3))
    bar.ax.tick_params(labelsize=7)
    bar.ax.yaxis.get_offset_text().set_fontsize(7)


def save_times(path: Path, samples: dict[str, dict[str, dict[str, list[float]]]], title: str) -> None:
    """Draw the median times by stage, in one panel per mode, with interquartile ranges and speed-ups."""
    fig, axes = plt.subplots(1, len(samples), figsize=(6.4 * len(samples), 4.6), layout="constrained", squeeze=False)
    fig.suptitle(title, fontsize=13)
    for axis, (mode, by_model) in zip(axes.flat, samples.items(), strict=True):
        parts = list(next(iter(by_model.values())))
        tops = np.zeros(len(parts))
        medians = {}
        for i, (name, times) in enumerate(by_model.items()):
            quartiles = np.array([_quartiles(times[part]) for part in parts])  # (parts, 3)
            low, medians[name], high = quartiles.T
            x = np.arange(len(parts)) + 0.4 * (i - 0.5)
            spread = np.stack((medians[name] - low, high - medians[name]))
            axis.bar(x, medians[name], 0.38, color=COLOURS[name], label=name, yerr=spread, capsize=3)
            tops = np.maximum(tops, high)
        for position, top in enumerate(tops):
            ratio = medians["timm"][position] / medians["swinkernels"][position]
            axis.annotate(f"{ratio:.2f}x", (position, top), (0, 4), textcoords="offset points", ha="center", fontsize=9)
        axis.set_xticks(range(len(parts)), [_part_label(part) for part in parts])
        axis.set_ylabel("milliseconds (median, bars: quartiles)")
        axis.set_ylim(0, 1.15 * tops.max())
        axis.set_title(f"{mode}; above each pair: speed-up (timm / swinkernels)", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="upper left")
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _part_label(part: str) -> str:
    if part == "total":
        return "whole step"
    return f"{part}\nforward"


def _quartiles(samples: list[float]) -> tuple[float, ...]:
    return tuple(quantiles(samples, n=4, method="inclusive")) if len(samples) > 1 else (samples[0],) * 3
