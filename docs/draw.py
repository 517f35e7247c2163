"""Draws the pictures of docs/concepts.md with the functions of swinkernels/reference: ``python docs/draw.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # a server has no display

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.patches import Rectangle

from swinkernels.reference._geometry import frame_size, shift_region, source_index

IMAGES = Path(__file__).parent / "images"
WINDOW_COLOURS = ("#8ecae6", "#ffb703", "#90be6d", "#f28482")
REGION_COLOURS = ("#f8f9fa", "#f1e3b4", "#d9b650", "#94d2bd", "#f4a259", "#cf6a32", "#bb7ea8", "#e5989b", "#8d99d6")
PAD_COLOUR = "#d0d0d0"


def in_frame(windows: torch.Tensor, frame: tuple[int, int], window: int) -> np.ndarray:
    """Rearrange the tokens of ``windows``, (num_windows, N), into the frame from which the windows were cut."""
    rows, columns = (p // window for p in frame)
    return windows.reshape(rows, columns, window, window).permute(0, 2, 1, 3).reshape(frame).numpy()


def cells(axis: Any, colours: list[list[str]], texts: list[list[str]], window: int | None) -> None:
    """Draw a map as coloured cells with labels; if ``window`` is not None, also draw the borders of the windows."""
    height, width = len(colours), len(colours[0])
    for y in range(height):
        for x in range(width):
            axis.add_patch(Rectangle((x, y), 1, 1, facecolor=colours[y][x], edgecolor="white", linewidth=0.8))
            axis.text(x + 0.5, y + 0.5, texts[y][x], ha="center", va="center", fontsize=7)
    if window is not None:
        for y in range(0, height, window):
            for x in range(0, width, window):
                axis.add_patch(Rectangle((x, y), window, window, fill=False, edgecolor="black", linewidth=1.8))
    axis.set_xlim(-0.1, width + 0.1)
    axis.set_ylim(height + 0.1, -0.1)
    axis.set_aspect("equal")
    axis.axis("off")


def shift_picture(path: Path) -> None:
    """Draw the map, the frame and the masks of its windows, for 8 x 8 tokens, window 4 and shift 2."""
    size, window, shift = (8, 8), 4, 2
    source = source_index(size, (window,) * 2, (shift,) * 2)
    region = shift_region(size, (window,) * 2, (shift,) * 2, periodic=(False, False))
    of_token = torch.empty(64, dtype=torch.long)
    for i, tokens in enumerate(source):
        of_token[tokens] = i
    fig = plt.figure(figsize=(11, 4.1), layout="constrained")
    left, middle, right = fig.subfigures(1, 3, width_ratios=(1, 1, 1))
    axis = left.subplots()
    windows = of_token.reshape(size).tolist()
    numbers = [[str(8 * y + x) for x in range(8)] for y in range(8)]
    cells(axis, [[WINDOW_COLOURS[w] for w in row] for row in windows], numbers, None)
    axis.set_title("the map in memory:\na colour for each shifted window", fontsize=10)
    axis = middle.subplots()
    tokens, regions = (in_frame(t, size, window) for t in (source, region))
    colours = [[REGION_COLOURS[r] for r in row] for row in regions]
    cells(axis, colours, [[str(t) for t in row] for row in tokens], window)
    axis.set_title("the frame, rolled by -2: windows,\na colour for each shift region", fontsize=10)
    axes = right.subplots(2, 2)
    for i, axis in enumerate(axes.flat):
        masked = (region[i][:, None] != region[i][None, :]).numpy()
        axis.imshow(masked, cmap="Greys", vmin=0, vmax=1)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(f"window {i}", fontsize=8)
    right.suptitle("the masks, 16 x 16:\nblack adds -100 to a score", fontsize=10)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def padding_picture(path: Path) -> None:
    """Draw the frames of a map of 5 x 6 tokens in both orders of padding and rolling, for window 4 and shift 2."""
    size, window, shift = (5, 6), 4, 2
    frame = frame_size(size, (window,) * 2)
    fig, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    numbers = [[str(6 * y + x) for x in range(6)] for y in range(5)]
    cells(axes[0], [["#f8f9fa"] * 6] * 5, numbers, None)
    axes[0].set_title("the map: 5 x 6 tokens", fontsize=10)
    region = in_frame(shift_region(size, (window,) * 2, (shift,) * 2, periodic=(False, False)), frame, window)
    for axis, order in zip(axes[1:], ("pad_then_roll", "roll_then_pad"), strict=True):
        tokens = in_frame(source_index(size, (window,) * 2, (shift,) * 2, pad_order=order), frame, window)
        is_pad = tokens == size[0] * size[1]
        colours = [
            [PAD_COLOUR if pad else REGION_COLOURS[r] for pad, r in zip(*rows, strict=True)]
            for rows in zip(is_pad, region, strict=True)
        ]
        texts = [
            ["pad" if pad else str(t) for pad, t in zip(*rows, strict=True)]
            for rows in zip(is_pad, tokens, strict=True)
        ]
        cells(axis, colours, texts, window)
        axis.set_title(f'pad_order="{order}"', fontsize=10)
    fig.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(fig)


def main() -> None:
    IMAGES.mkdir(exist_ok=True)
    shift_picture(IMAGES / "shift.png")
    padding_picture(IMAGES / "padding.png")


if __name__ == "__main__":
    main()
