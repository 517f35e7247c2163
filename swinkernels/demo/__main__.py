"""Run a timm Swin with seeded weights on a photograph, before and after swinkernels.accelerate."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import swinkernels
from swinkernels.adapters import Replaced
from swinkernels.ops._backends import BACKENDS

try:
    import timm
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from skimage import data as photographs

    from swinkernels.demo import figures, measure
except ImportError as e:
    sys.exit(f"The demo needs timm, scikit-image, matplotlib and rich ({e}): pip install 'swinkernels[demo]'")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MODES = (measure.INFERENCE, measure.TRAINING)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m swinkernels.demo", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=DTYPES, help="autocast's dtype; default: bfloat16 on a GPU, else float32")
    parser.add_argument("--batch", type=int, help="images; default: 64 on a GPU, else 1")
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224", help="a timm Swin, v1 or v2")
    parser.add_argument("--image-size", type=int, default=224, help="pixels per side")
    parser.add_argument("--backend", choices=("auto", *BACKENDS), default="auto", help="backend for accelerate")
    parser.add_argument("--repeats", type=int, help="timed steps of each kind; default: 30 on a GPU, else 5")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_output"), help="folder for the pictures and results.json"
    )
    args = parser.parse_args(argv)
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as e:  # for a missing device, torch raises one or the other
        parser.error(f"--device {args.device} cannot be used: {e}")
    on_gpu = args.device.type == "cuda"
    args.dtype = DTYPES[args.dtype or ("bfloat16" if on_gpu else "float32")]
    args.batch = args.batch if args.batch is not None else 64 if on_gpu else 1
    args.repeats = args.repeats if args.repeats is not None else 30 if on_gpu else 5
    if args.batch < 1 or args.repeats < 1:
        parser.error("--batch and --repeats must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    started = time.perf_counter()
    console = Console()
    args.out.mkdir(parents=True, exist_ok=True)

    # Published weights would have to be downloaded. Seeded weights suffice to compare results and times.
    torch.manual_seed(0)
    plain = timm.create_model(args.model, pretrained=False, img_size=args.image_size).to(args.device)
    fast = copy.deepcopy(plain)
    report = swinkernels.accelerate(fast, backend=args.backend)
    if not report.replaced:
        console.print(str(report), markup=False, highlight=False)
        return 1
    if not measure.has_stages(plain):
        console.print(
            f"The pictures show the stages of a Swin v1 or v2, but {args.model} has no stages that the demo can find. "
            "swinkernels.accelerate supports it nevertheless.",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return 1

    photo = torch.from_numpy(photographs.astronaut())  # ships with scikit-image
    config = timm.data.resolve_model_data_config(plain)
    x = measure.photo_batch(photo, args.batch, args.image_size, config["mean"], config["std"]).to(args.device)

    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else _cpu_name()
    setting = f"{args.model}, {args.batch} x {args.image_size} x {args.image_size}, {_short(args.dtype)}, {name}"
    console.rule(f"swinkernels {swinkernels.__version__}", align="left")
    console.print(f"{setting}; torch {torch.__version__}, timm {timm.__version__}, seeded weights", highlight=False)
    console.print()
    console.print(str(report), markup=False, highlight=False, soft_wrap=True)
    console.print()

    models = {"timm": plain, "swinkernels": fast}
    turns = len(models) * (args.repeats + 1)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        comparing = progress.add_task("outputs", total=3)
        results = {}
        for key, model in models.items():
            results[key] = measure.outputs(model, x, args.dtype)
            progress.advance(comparing)
        exact = measure.outputs(copy.deepcopy(plain).double(), x.double(), torch.float64)
        progress.advance(comparing)
        samples: dict[str, dict[str, dict[str, list[float]]]] = {}
        memory: dict[str, dict[str, int]] = {}
        for mode in MODES:
            timing = progress.add_task(f"time, {mode}", total=turns)
            samples[mode] = measure.times(models, x, args.dtype, mode, args.repeats, partial(progress.advance, timing))
        weighing = progress.add_task("memory", total=len(MODES) * len(models))
        for mode in MODES:
            memory[mode] = {}
            for key, model in models.items():
                memory[mode][key] = measure.peak_memory(model, x, args.dtype, mode)
                progress.advance(weighing)

    agreement = _agreement(results, exact, args.dtype)
    _print_agreement(console, agreement, args.dtype)
    _print_times(console, samples)
    _print_memory(console, memory, measure.memory_method(args.device))

    pixels = photo.numpy()
    backends = {"timm's own code" if e.backend == e.adapter else e.backend for e in report.replaced}
    title = f"{setting}; swinkernels on {', '.join(sorted(backends))}"
    figures.save_stages(args.out / "stages.png", pixels, results["timm"], results["swinkernels"], title)
    figures.save_times(args.out / "times.png", samples, title)
    median_ms = {
        mode: {key: {part: median(t) for part, t in parts.items()} for key, parts in by_model.items()}
        for mode, by_model in samples.items()
    }
    summary = {
        "setting": setting,
        "versions": {"swinkernels": swinkernels.__version__, "torch": torch.__version__, "timm": timm.__version__},
        "backends": {entry.path: entry.backend for entry in report.replaced},
        "agreement": agreement,
        "median_ms": median_ms,
        "peak_memory_bytes": memory,
        "peak_memory_method": measure.memory_method(args.device),
    }
    (args.out / "results.json").write_text(json.dumps(summary, indent=2) + "\n")
    pictures = ", ".join(str(args.out / file) for file in ("stages.png", "times.png"))
    conclusion = [
        _conclusion(agreement, median_ms),
        *_backends_by_class(report.replaced),
        f"pictures: {pictures}; every figure: {args.out / 'results.json'}",
        f"The demo took {time.perf_counter() - started:.0f} s.",
    ]
    console.print("\n".join(conclusion), markup=False, highlight=False, soft_wrap=True)
    return 0 if agreement["within_budget"] else 1


def _conclusion(agreement: dict[str, Any], median_ms: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a sentence that compares the logits and times of swinkernels and timm."""
    speeds = []
    for mode, by_model in median_ms.items():
        ratio = by_model["timm"]["total"] / by_model["swinkernels"]["total"]
        comparison = "faster" if ratio >= 1 else "slower"
        speeds.append(f"{max(ratio, 1 / ratio):.2f}x {comparison} in {mode.removesuffix(' step')}")
    same = "same logits to" if agreement["within_budget"] else "DIFFERENT logits, by"
    return f"swinkernels against timm: {same} {agreement['largest_logit_difference']:.1g}; {', '.join(speeds)}."


def _backends_by_class(replaced: Sequence[Replaced]) -> list[str]:
    """Return lines that count replaced modules by class, backend of the main part, and parts on other backends."""
    found: dict[tuple[str, ...], int] = {}
    for entry in replaced:
        backend = f"{entry.adapter}'s own code" if entry.backend == entry.adapter else f"backend {entry.backend}"
        # A remark begins with "<part>: <backend>. " if faster backends cannot run the part.
        parts = [remark.partition(". ")[0] for remark in entry.remarks if entry.backend != entry.adapter]
        others = [part for part in parts if part.partition(": ")[2] != entry.backend]
        key = (entry.module_class, backend, *others)
        found[key] = found.get(key, 0) + 1
    return [f"{count} {name}: {'; '.join(runs)}" for (name, *runs), count in found.items()]


def _agreement(results: dict, exact: dict, dtype: torch.dtype) -> dict[str, float | bool]:
    """Return the largest logit, the largest logit differences, and whether the error of swinkernels is within budget.

    The budget is twice the error of timm plus 4 eps times the largest logit.
    """
    plain, fast, truth = results["timm"]["logits"], results["swinkernels"]["logits"], exact["logits"]
    largest = truth.abs().max().item()
    timm_error, our_error = ((logits - truth).abs().max().item() for logits in (plain, fast))
    return {
        "largest_logit": largest,
        "largest_logit_difference": (fast - plain).abs().max().item(),
        "timm_error_against_float64": timm_error,
        "swinkernels_error_against_float64": our_error,
        "within_budget": our_error <= 2 * timm_error + 4 * torch.finfo(dtype).eps * largest,
    }


def _print_agreement(console: Console, agreement: dict, dtype: torch.dtype) -> None:
    table = Table(title="Logits", title_justify="left")
    table.add_column("largest absolute value of")
    table.add_column(_short(dtype), justify="right")
    for label, key in (
        ("the logits", "largest_logit"),
        ("swinkernels - timm", "largest_logit_difference"),
        ("timm - timm in float64", "timm_error_against_float64"),
        ("swinkernels - timm in float64", "swinkernels_error_against_float64"),
    ):
        table.add_row(label, f"{agreement[key]:.3g}")
    console.print(table)
    verdict = "within" if agreement["within_budget"] else "NOT within"
    console.print(f"swinkernels is {verdict} twice timm's own error.\n", highlight=False)


def _print_times(console: Console, samples: dict) -> None:
    for mode, by_model in samples.items():
        table = Table(title=f"Time of one {mode}, ms: median (fastest - slowest)", title_justify="left")
        table.add_column("part")
        for name in by_model:
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("speed-up", justify="right")
        for part in by_model["timm"]:
            both = [by_model[name][part] for name in by_model]
            cells = [f"{_ms(median(t))} ({_ms(min(t))} - {_ms(max(t))})" for t in both]
            is_total = part == "total"
            label = "all" if is_total else f"{part}, forward"
            table.add_row(label, *cells, f"{median(both[0]) / median(both[1]):.2f}x", style="bold" if is_total else "")
        console.print(table)
    console.print()


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _print_memory(console: Console, memory: dict, method: str) -> None:
    table = Table(title="Peak memory of one step", title_justify="left")
    table.add_column("step")
    for name in ("timm", "swinkernels"):
        table.add_column(f"{name}, MiB", justify="right")
    table.add_column("of timm's", justify="right")
    for mode, peak in memory.items():
        cells = [f"{peak[name] / 2**20:.1f}" for name in ("timm", "swinkernels")]
        table.add_row(mode, *cells, f"{peak['swinkernels'] / peak['timm']:.0%}")
    console.print(table)
    console.print(f"Measured as {method}.\n", highlight=False)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_name() -> str:
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' if threads > 1 else ''}"


if __name__ == "__main__":
    sys.exit(main())
