"""Runs the cases of one group of a step and emits their result lines: ``python -m gpu work STEP GROUP``."""

from __future__ import annotations

import importlib
import importlib.util
import os
import traceback

from gpu.lines import FAILED, Emitter
from gpu.plan import Setting
from gpu.runner import DEVICE_IS_LOST

# For each step, the function that yields its cases as (name, function that runs the case and emits its lines).
CASES = {
    "build": "machine.build",
    "info": "machine.info",
    "smoke": "smoke.cases",
    "fit": "fit.cases",
    "bits": "bits.cases",
    "time": "timing.cases",
    "variants": "timing.variants",
    "peers": "timing.peers",
    "ncu": "profile.cases",
    "sanitize": "sanitize.cases",
    "tests": "suite.cases",
    "models": "models.cases",
}


def run(step: str, group: str, emit: Emitter, setting: Setting, skip: int = 0) -> int:
    """Run the cases of ``group`` except the first ``skip``, and return the exit status."""
    if setting.rehearse:
        _rehearse(group)
    elif step not in ("build", "ncu", "sanitize"):
        import torch

        if not torch.cuda.is_available():
            emit.begin(group)
            emit.line(result=FAILED, detail="torch sees no CUDA GPU; --rehearse runs without one")
            return 0
    module, _, function = CASES[step].partition(".")
    cases = getattr(importlib.import_module(f"gpu.{module}"), function)
    if step == "tests":  # suite.py emits the names of the cases and skips the first ``skip`` tests itself
        cases(group, emit, setting, skip)
        return 0
    for name, case in list(cases(group, emit, setting))[skip:]:
        emit.begin(name)
        try:
            case()
        except Exception as error:
            traceback.print_exc()
            emit.line(result=FAILED, detail=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
            if device_is_lost():
                return DEVICE_IS_LOST
    return 0


def _rehearse(group: str) -> None:
    """Switch on Triton's interpreter for Triton groups, and emulated CUDA kernels if SWINKERNELS_OPS is set."""
    if "triton" in group:
        os.environ["TRITON_INTERPRET"] = "1"  # must be set before the package is imported
        if importlib.util.find_spec("triton") is not None:
            from tests.support import triton_interpreter

            triton_interpreter.make_faster()
    import torch

    torch.set_num_threads(1)
    if os.environ.get("SWINKERNELS_OPS"):
        from tests.emulation import bindings

        bindings.attach()


def device_is_lost() -> bool:
    """Return True if an error such as an illegal access has left this process without its GPU."""
    import torch

    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
