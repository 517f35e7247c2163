"""Measures and writes docs/models.md: ``python -m tests.adapters.models_page``.

The page compares every family of ``tests/support/small_models.py`` before and after accelerate, on one CPU thread.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import importlib.metadata
import platform
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import swinkernels
from tests.support.parity import run
from tests.support.small_models import FAMILIES, make_input, make_model

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
LIBRARIES = ("timm", "torchvision", "transformers", "MONAI", "mmpretrain")
# For each family whose model is defined in the tests, the published code that the model follows.
FORMS_OF = {
    "copy": "microsoft/Swin-Transformer", "copy v2": "microsoft/Swin-Transformer",
    "copy for restoration": "JingyunLiang/SwinIR", "copy with attention alone": "XPixelGroup/HAT",
    "copy for segmentation": "SwinTransformer/Swin-Transformer-Semantic-Segmentation",
    "copy for video": "SwinTransformer/Video-Swin-Transformer",
    "mmdet": "mmdet 3.3.0", "SCUNet": "cszn/SCUNet", "ResShift": "zsyOAOA/ResShift",
    "TransMorph": "junyuchen245/TransMorph", "BiRefNet": "ZhengPeng7/BiRefNet", "Uformer": "ZhendongWang6/Uformer",
    "VRT": "JingyunLiang/VRT", "Swin-MAE": "Zian-Xu/Swin-MAE", "FDAT": "stinkybread/fdat",
    "Segment Anything": "segment-anything 1.0", "DeepSeek-OCR": "deepseek-ai/DeepSeek-OCR", "EsViT": "microsoft/esvit",
    "HTSAT": "RetroCirce/HTS-Audio-Transformer", "laion-clap": "laion-clap 1.1.7",
    "nnFormer": "282857341/nnFormer", "nnFormer's skips": "282857341/nnFormer",
    "Pangu-Weather": "nvidia-physicsnemo 2.2.2", "FengWu": "nvidia-physicsnemo 2.2.2",
    "Aurora": "microsoft-aurora 2.0.1",
}  # fmt: skip
HEADER = """# Models

This page compares a small model of every family that `accelerate` supports before and after `accelerate`.
`python -m tests.adapters.models_page` writes it; a test checks that the column "on the op" is still right.

- **On the op**: how many of the modules with window attention ran on a window attention op in a forward pass.
- **Error, float64**: the largest difference from the library's own code, over outputs and every gradient, each relative
  to its largest element.
- **Error, float32**: the largest difference between float32 and float64 results, after `accelerate` (and before it).
- **CPU time** and **memory** of a forward pass in float32, before → after: the median of {repeats} runs, alternately
  before and after, and the most bytes allocated at once in addition to the model. Such small models show the cost of
  calls, not of kernels: [Benchmarks](benchmarks.md) has models of real size.

In the column "source", "form of X" means a test module written with the names and conventions of X.

| family | source | on the op | error, float64 | error, float32 | CPU time, ms | memory, KiB |
|---|---|---|---|---|---|---|
"""


def source(family: str) -> str:
    library = next((name for name in LIBRARIES if family.startswith(name)), None)
    if library is None:
        return f"form of {FORMS_OF[family]}" if family in FORMS_OF else "form in the tests"
    return f"{library} {importlib.metadata.version(library.lower())}"


def counted(family: str) -> tuple[int, int, list[str]]:
    """Count the modules that ran on a window attention op and all modules with window attention.

    Returns both numbers and the reasons why they differ.
    """
    model = make_model(family)
    report = swinkernels.accelerate(model)
    check = report.check(make_input(family))
    on_op = sum(any("window_attention" in call for call in map(str, ran.calls)) for ran in check.modules)
    # A block that was not replaced counts only if no module inside it was replaced and checked.
    left = [s for s in report.skipped if not any(ran.path.startswith(f"{s.path}.") for ran in check.modules)]
    reasons = list(dict.fromkeys(skipped.reason.rpartition("would not run: ")[2] for skipped in left))
    return on_op, on_op + len(left), reasons


def on_the_op(family: str) -> str:
    on_op, of, reasons = counted(family)
    return "all" if on_op == of else f"{on_op} of {of}: {'; '.join(reasons)}"


def error(got: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """Return the largest error, relative to each tensor's largest element; tensors that cancel to zero are left out."""
    largest = max(t.abs().max().item() for t in exact.values())
    found = [0.0]
    for name, t in exact.items():
        size = t.abs().max().item()
        if size > 1e-6 * largest:
            found.append(((got[name].double() - t.double()).abs().max() / size).item())
    return max(found)


def most_bytes(model: nn.Module, x: Tensor) -> int:
    with torch.no_grad(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        model(x)
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def times(models: list[nn.Module], x: Tensor, repeats: int) -> list[float]:
    """Return each model's median CPU time of a forward pass, in milliseconds; the models are called in turn."""
    taken: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for _ in range(repeats + 3):
            for of, model in zip(taken, models, strict=True):
                start = time.thread_time()
                model(x)
                of.append(1e3 * (time.thread_time() - start))
    return [sorted(of[3:])[repeats // 2] for of in taken]


def row(family: str, repeats: int) -> str:
    x = make_input(family)
    plain = make_model(family)
    narrow, fast = copy.deepcopy(plain).float(), copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    fast_narrow = copy.deepcopy(narrow)
    swinkernels.accelerate(fast_narrow)
    exact = run(copy.deepcopy(plain), x)
    in_float64 = error(run(fast, x), exact)
    in_float32 = [error(run(copy.deepcopy(m), x.float()), exact) for m in (fast_narrow, narrow)]
    before, after = times([narrow, fast_narrow], x.float(), repeats)
    held = [most_bytes(m, x.float()) / 1024 for m in (narrow, fast_narrow)]
    cells: list[Any] = [
        family,
        source(family),
        on_the_op(family),
        f"{in_float64:.0e}",
        f"{in_float32[0]:.0e} ({in_float32[1]:.0e})",
        f"{before:.2f} → {after:.2f}",
        f"{held[0]:.0f} → {held[1]:.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure every family and write docs/models.md.")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("families", nargs="*", help="print only these families, and write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    rows = [row(family, options.repeats) for family in options.families or FAMILIES]
    if options.families:
        print("".join(rows))
        return
    machine = f"{platform.machine()}, one thread, torch {torch.__version__}, {datetime.date.today()}"
    PAGE.write_text(HEADER.format(repeats=options.repeats) + "".join(rows) + f"\nMeasured on {machine}.\n")


if __name__ == "__main__":
    main()
