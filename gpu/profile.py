"""Profiles one forward and one backward launch of window attention with ncu, at the shape of Swin-T's first stage."""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable

from gpu import ROOT
from gpu.lines import Emitter
from gpu.plan import Setting

SECTIONS = (
    "LaunchStats", "Occupancy", "SpeedOfLight", "SchedulerStats", "WarpStateStats", "MemoryWorkloadAnalysis",
    "MemoryWorkloadAnalysis_Tables",
)  # fmt: skip
# The metrics to keep from a report; their names depend on the profiler's version.
WANTED = re.compile(
    r"issue_active\.avg\.pct|issue_stalled_\w+_per_warp_active|issue_stalled_\w+\.ratio|warps_active\.avg\.pct|"
    r"launch__(occupancy_limit|registers_per|shared_mem|waves|grid_size|block_size)|"
    r"(lts__t|dram__|l1tex__|sm__)\w*throughput\.avg\.pct|gpu__time_duration\.sum|bank_conflicts"
)
CALL = """
import torch
from benchmarks import shapes
from swinkernels import window_attention_qkvpacked
case = shapes.ATTENTION[shapes.GOAL]
inputs = case.inputs(torch.bfloat16, "cuda")
leaves = {name: x.requires_grad_() for name, x in inputs.items() if name != "dout"}
out = window_attention_qkvpacked(**leaves, **case.arguments(), backend="cuda")
torch.autograd.grad(out, list(leaves.values()), inputs["dout"])
torch.cuda.synchronize()
"""


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    def profile() -> None:
        profiler = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
        if profiler is None:
            emit.line(result="skipped", detail="ncu was found neither on the PATH nor in /usr/local/cuda/bin")
            return
        command = [profiler, "--csv", "--page", "raw", "--launch-count", "1"]
        command += ["--kernel-name", f"regex:window_attention_{group}", *(f"--section={name}" for name in SECTIONS)]
        done = subprocess.run([*command, sys.executable, "-c", CALL], cwd=ROOT, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="\n", flush=True)
        found = parse(done.stdout)
        if not found:
            said = [line for line in (done.stdout + done.stderr).splitlines() if "==" in line or "rror" in line]
            reason = said[-1].strip("= ") if said else f"ncu ended with status {done.returncode} and no output"
            emit.line(result="skipped", detail=reason)
        for metric, (value, unit) in found.items():
            emit.line(op="window_attention", backend="cuda", dtype="bfloat16", direction=group, metric=metric,
                      value=value, unit=unit)  # fmt: skip

    yield f"counters {group}", profile


def parse(text: str) -> dict[str, tuple[float, str]]:
    """Return the WANTED metrics in ncu's CSV output, name -> (value, unit). The rows are names, units and launches."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return {}
    names, units, *launches = csv.reader(io.StringIO("\n".join(lines[start:])))
    found = {}
    for name, unit, value in zip(names, units, launches[0] if launches else (), strict=False):
        if WANTED.search(name):
            try:
                found[name] = (float(value.replace(",", "")), unit)
            except ValueError:
                continue
    return found
