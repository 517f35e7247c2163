"""Measures the CPU time and memory of ``accelerate`` for models with copied blocks or known forms, which need trials.

    python -m tests.adapters.trial_cost [MODEL...] [--against CHECKOUT]

Each model is accelerated in its own process. The figures are the CPU time of all threads in ``accelerate`` and the
growth of the peak resident memory. ``--against`` names another checkout, whose extension must be built. Each model is
measured with this checkout's ``accelerate``, and then with the other's.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

ROOT = Path(__file__).resolve().parents[2]
MOST_SECONDS, MOST_GIB = 3.0, 0.5


def _stages(make_block: Callable[..., nn.Module], width: int, heads: int, depths: tuple[int, ...]) -> nn.Module:
    blocks: list[nn.Module] = []
    for stage, depth in enumerate(depths):
        dim = width << stage
        for i in range(depth):
            block: Any = make_block(dim, heads << stage, i % 2)
            block.mlp.fc1, block.mlp.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
            blocks.append(block)
    return nn.Sequential(*blocks)


def _detection(width: int, heads: int, window: int, depths: tuple[int, ...]) -> nn.Module:
    from tests.support.published_forms import SegmentationBlock

    return _stages(
        lambda dim, n, odd: SegmentationBlock(dim, n, window, odd * (window // 2), drop_path=0.1), width, heads, depths
    )


def _video() -> nn.Module:
    from tests.support.published_forms import VideoBlock

    window, shift = (8, 7, 7), (4, 3, 3)
    return _stages(
        lambda dim, n, odd: VideoBlock(dim, n, window, shift if odd else (0, 0, 0), drop_path=0.1),
        96, 3, (2, 2, 6, 2),
    )  # fmt: skip


def _swin3d() -> nn.Module:
    from torchvision.models.video import swin3d_t

    return swin3d_t()


def _sam_b() -> nn.Module:
    """Build three layers of SAM-B: two with windows of 14 x 14 tokens, one with global attention."""
    from transformers import SamVisionConfig
    from transformers.models.sam.modeling_sam import SamVisionLayer

    config = SamVisionConfig()
    config._attn_implementation = "sdpa"
    return nn.Sequential(*(SamVisionLayer(config, window) for window in (14, 14, 0)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "detection Swin-T": lambda: _detection(96, 3, 7, (2, 2, 6, 2)),
    "detection Swin-L": lambda: _detection(192, 6, 12, (2, 2, 18, 2)),
    "video Swin-T": _video,
    "torchvision Swin3D-T": _swin3d,
    "SAM-B": _sam_b,
}


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure_here(name: str) -> dict[str, Any]:
    import torch

    import swinkernels

    torch.set_num_threads(1)
    model = MODELS[name]()
    before, start = _peak_gib(), time.process_time()
    report = swinkernels.accelerate(model)
    seconds = time.process_time() - start
    return {
        "model": name,
        "seconds": round(seconds, 2),
        "gib": round(_peak_gib() - before, 2),
        "on ops": bool(report.replaced) and not report.skipped,
    }


def measure(name: str, checkout: Path = ROOT) -> dict[str, Any]:
    """Measure the model ``name`` in a new process, with the package of ``checkout``."""
    # swinkernels is imported from ``checkout``, and the models always from this checkout.
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1]); import swinkernels; sys.path.insert(0, sys.argv[2]);"
        "from tests.adapters import trial_cost; print(json.dumps(trial_cost.measure_here(sys.argv[3])))"
    )
    command = [sys.executable, "-c", code, str(checkout), str(ROOT), name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(command, cwd=checkout, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(out.splitlines()[-1])
    return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.adapters.trial_cost", description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--against", type=Path, metavar="CHECKOUT")
    options = parser.parse_args(arguments)
    too_much = False
    for name in options.models:
        ours = measure(name)
        line = f"{name}: {ours['seconds']:.2f} s, {ours['gib']:.2f} GiB"
        if options.against is not None:
            theirs = measure(name, options.against.resolve())
            times = theirs["seconds"] / ours["seconds"]
            line += f"; {options.against}: {theirs['seconds']:.2f} s, {theirs['gib']:.2f} GiB ({times:.0f} times)"
        too_much |= ours["seconds"] > MOST_SECONDS or ours["gib"] > MOST_GIB or not ours["on ops"]
        print(line, flush=True)
    print(f"at most {MOST_SECONDS:g} s and {MOST_GIB:g} GiB are allowed: {'missed' if too_much else 'met'}")
    return 1 if too_much else 0


if __name__ == "__main__":
    sys.exit(main())
