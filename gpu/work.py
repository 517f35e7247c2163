"""One process of a step, ``python -m gpu work STEP GROUP``: it says what it finds by the descriptor it is given."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable

from gpu.lines import FAILED, SKIPPED, Emitter
from gpu.plan import Setting
from gpu.runner import DEVICE_IS_LOST

Case = tuple[str, Callable[[], None]]  # its name, and what finds out about it and tells


class Skip(Exception):
    """Why a case cannot be run here."""


def run(step: str, group: str, emit: Emitter, setting: Setting, skip: int = 0) -> int:
    """Do a group's cases but for the first ones; the exit status."""
    if setting.rehearse:
        _rehearse(group)
    elif step not in ("build", "ncu", "sanitize"):
        import torch

        if not torch.cuda.is_available():
            emit.begin(group)
            emit.line(result=FAILED, detail="torch sees no CUDA GPU; --rehearse runs without one")
            return 0
    for index, (name, case) in enumerate(_cases(step, group, emit, setting, skip)):
        if index < skip and step != "tests":  # pytest leaves out the first ones itself
            continue
        if step != "tests":
            emit.begin(name)
        try:
            case()
        except Skip as reason:
            emit.line(result=SKIPPED, detail=str(reason))
        except Exception as error:
            traceback.print_exc()
            emit.line(result=FAILED, detail=f"{type(error).__name__}: {error}".partition("\n")[0][:300])
            if device_is_lost():
                return DEVICE_IS_LOST
    return 0


def _cases(step: str, group: str, emit: Emitter, setting: Setting, skip: int) -> Iterable[Case]:
    from gpu import bits, fit, machine, models, profile, sanitize, smoke, suite, timing

    if step == "tests":
        return suite.cases(group, emit, setting, skip)
    of_step = {
        "build": machine.build,
        "info": machine.info,
        "smoke": smoke.cases,
        "fit": fit.cases,
        "bits": bits.cases,
        "time": timing.cases,
        "variants": timing.variants,
        "peers": timing.peers,
        "ncu": profile.cases,
        "sanitize": sanitize.cases,
        "models": models.cases,
    }
    return of_step[step](group, emit, setting)


def _rehearse(group: str) -> None:
    """Backend "cuda" by emulated kernels, if their library is loaded; Triton's by its interpreter."""
    if "triton" in group:
        os.environ["TRITON_INTERPRET"] = "1"  # read when the package is imported
    import torch

    torch.set_num_threads(1)
    if os.environ.get("SWINKERNELS_OPS"):
        from tests.emulation import bindings

        bindings.attach()


def device_is_lost() -> bool:
    """Whether an illegal access or the like has left this process without its GPU."""
    import torch

    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
