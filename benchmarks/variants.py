"""Builds and times variants of the kernels on this GPU: ``python -m benchmarks.variants`` (``make gpu-variants``).

One run settles the choices that only a measurement can: copies in flight and warps per multiprocessor of the CUDA
attention kernels (the SWINKERNELS_* macros of csrc/kernels/cuda/window_attention/traits.h), tiles, warps and stages of
the Triton ones (``tiles`` of swinkernels/triton/window_attention.py), and the macros of the memory-bound CUDA kernels
(``memory``). Each variant is checked before it is timed, in a process of its own. Writes variants.csv and ends with a
table of the percent of a device copy of the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import attention, memory_bound, record, shapes

ROOT = Path(__file__).resolve().parent.parent
PREFIX = "SWINKERNELS_"
# Macros, without their prefix; the first variant of each backend is what is shipped.
CUDA: dict[str, dict[str, int]] = {
    "shipped": {},
    "one stage": {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1},
    "fewer warps": {"FORWARD_WARPS": 12, "BACKWARD_WARPS": 8},
    "more warps": {"FORWARD_WARPS": 20, "BACKWARD_WARPS": 16},
    "one stage, more warps": {"FORWARD_STAGES": 1, "BACKWARD_STAGES": 1, "FORWARD_WARPS": 20, "BACKWARD_WARPS": 16},
}
MEMORY: dict[str, dict[str, int]] = {
    "shipped": {},
    "two vectors a thread; four blocks backward": {"COPY_VECTORS": 2, "NORM_BACKWARD_BLOCKS": 4},
    "eight vectors a thread; two blocks backward": {"COPY_VECTORS": 8, "NORM_BACKWARD_BLOCKS": 2},
    "blocks of 128 for copies; no prefetch": {
        "COPY_THREADS": 128,
        "NORM_FORWARD_PREFETCH": 0,
        "NORM_BACKWARD_PREFETCH": 0,
    },
}
MEMORY_OPS = ("window_partition", "window_reverse", "patch_merging_norm", "residual_layer_norm", "residual_post_norm")
# Attributes of the launcher module, and of Tiles for its kernels.
TRITON: dict[str, dict[str, Any]] = {
    "shipped": {},
    "one stage forward": {"fwd_whole": {"num_stages": 1}},
    "three stages forward, two backward": {"fwd_whole": {"num_stages": 3}, "bwd_whole": {"num_stages": 2}},
    "eight warps": {"fwd_whole": {"num_warps": 8}, "bwd_whole": {"num_warps": 8}},
    "a window a program forward": {"MAX_FORWARD_WINDOWS": 1},
    "longer programs": {"FORWARD_PROGRAMS": 1024, "MAX_FORWARD_WINDOWS": 32, "BACKWARD_PROGRAMS": 512},
    "shorter programs": {"FORWARD_PROGRAMS": 4096, "BACKWARD_PROGRAMS": 2048},
}
VARIANTS: dict[str, dict[str, Any]] = {"cuda": CUDA, "triton": TRITON, "memory": MEMORY}
DIRECTIONS = ("fwd", "bwd")
ROWS = "rows.json"


def build(name: str, macros: dict[str, int], folder: Path) -> Path:
    """Compiles a CUDA variant for the visible GPU beside the shipped build; the folder with its package."""
    base = folder / "".join(c if c.isalnum() else "-" for c in name)
    defines = [f"-D{PREFIX}{macro}={value}" for macro, value in macros.items()]
    flags = " ".join([os.environ.get("NVCC_APPEND_FLAGS", ""), *defines])
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={base}", f"--build-lib={base / 'lib'}"]
    environment = {**os.environ, "SWINKERNELS_BUILD": "cuda", "NVCC_APPEND_FLAGS": flags}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    return base / "lib"


def adjust(launcher: Any, changes: dict[str, Any]) -> None:
    """Applies a Triton variant to the launcher module."""
    tiles: Callable[..., Any] = launcher.tiles
    of_kernels = {name: change for name, change in changes.items() if isinstance(change, dict)}
    for name, value in changes.items():
        if name not in of_kernels:
            assert hasattr(launcher, name), name
            setattr(launcher, name, value)
    launcher.tiles = lambda kernel, *args: tiles(kernel, *args)._replace(**of_kernels.get(kernel, {}))


def run(backend: str, name: str, chosen: list[str], folder: Path) -> None:
    """In a process of its own: times one variant and writes its rows as JSON."""
    if backend == "triton":
        from swinkernels.triton import window_attention as launcher

        adjust(launcher, TRITON[name])
    device = torch.device("cuda")
    rows = []
    if backend == "memory":
        for op in MEMORY_OPS:
            for key, case in shapes.MAP_GOALS.items():
                rows += memory_bound.benchmark(op, key, case, "bfloat16", device, ["cuda"])
        rows = [{"variant": name, **row} for row in rows]
    for key in chosen if backend != "memory" else ():
        for row in attention.benchmark(key, shapes.ATTENTION[key], torch.bfloat16, device, [backend]):
            rows.append({"variant": name, "op": "window_attention", **row})
    (folder / ROWS).write_text(json.dumps(rows))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.variants", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=shapes.ATTENTION, default=[shapes.GOAL, "swin_t.3"])
    parser.add_argument("--backends", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder for variants.csv")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        sys.exit("benchmarks.variants: torch sees no CUDA GPU")
    rows: list[dict[str, Any]] = []
    failed = []
    for backend in options.backends:
        for name, changes in VARIANTS[backend].items():
            print(f"{backend}: {name}", flush=True)
            work = ROOT / "build" / "variants"
            work.mkdir(parents=True, exist_ok=True)
            try:
                library = ROOT if backend == "triton" else build(name, changes, work)
                code = (
                    f"import sys; sys.path[:0] = [{str(library)!r}, {str(ROOT)!r}]; from pathlib import Path; "
                    f"from benchmarks.variants import run; "
                    f"run({backend!r}, {name!r}, {options.shapes!r}, Path({str(work)!r}))"
                )
                subprocess.run([sys.executable, "-c", code], cwd=work, check=True)
                rows += json.loads((work / ROWS).read_text())
            except subprocess.CalledProcessError as error:  # the others shall be timed all the same
                failed.append(f"{backend} {name}: exit status {error.returncode}")
    if rows:
        record.write_csv(options.out / "variants.csv", rows, torch.device("cuda"))
        columns = ("variant", "op", "backend", "shape", "direction", "result", "median_us", "percent_of_copy")
        print(record.table([{c: row[c] for c in columns} for row in rows if row["direction"] in DIRECTIONS]))
    if failed:
        sys.exit("\n".join(["These variants failed:", *failed]))


if __name__ == "__main__":
    main()
