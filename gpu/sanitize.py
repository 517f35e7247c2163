"""The calls of calls.py under compute-sanitizer: accesses out of bounds, hazards in shared memory, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable

import torch

from gpu import ROOT
from gpu.lines import SKIPPED, WRONG, Emitter
from gpu.plan import Setting

FOUND_SOMETHING = 86  # no exit status of Python's
DOZEN = 12


def find_sanitizer() -> str | None:
    """compute-sanitizer of the PATH or of the CUDA toolkit."""
    homes = [home for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    places = [os.path.join(home, folder) for home in homes for folder in ("bin", "compute-sanitizer")]
    return shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", os.defpath), *places]))


def cases(group: str, emit: Emitter, setting: Setting) -> Iterable[tuple[str, Callable[[], None]]]:
    """``group`` is a tool. A rehearsal has the calls alone: the emulator looks for the same faults itself."""
    every = [] if setting.whole else ["--most", str(DOZEN)]
    calls = [sys.executable, "-m", "gpu", "calls", "--device", setting.device, *every]

    def sanitize() -> None:
        sanitizer = find_sanitizer()
        if setting.rehearse:
            from gpu import calls as of_ops

            emit.line(value=of_ops.run(torch.device("cpu"), "cuda", DOZEN), unit="calls", detail="under the emulator")
            return
        if sanitizer is None:
            emit.line(result=SKIPPED, detail="compute-sanitizer was found neither on the PATH nor in CUDA_HOME")
            return
        # Without torch's cache an access beyond a tensor is one beyond its allocation.
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [sanitizer, "--tool", group, "--error-exitcode", str(FOUND_SOMETHING), *calls]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        print(done.stdout, done.stderr, sep="\n", flush=True)
        said = [
            line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========") and line.strip("= ")
        ]
        if done.returncode == FOUND_SOMETHING:
            emit.line(result=WRONG, detail=next((x for x in said if "rror" in x or "azard" in x), said[-1]))
        elif done.returncode != 0 and any("not supported" in x or "nsupported" in x for x in said):
            emit.line(result=SKIPPED, detail=said[-1])
        elif done.returncode != 0:
            raise RuntimeError(
                f"{group} ended with status {done.returncode}: {said[-1] if said else done.stderr[-200:]}"
            )
        else:
            emit.line(detail=said[-1] if said else "")

    yield f"{group} of the ops", sanitize
