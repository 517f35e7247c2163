"""Defines the steps of a run, the most important first, because a run may be cut off."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from gpu import ROOT
from gpu.runner import Group, Step

ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
TRITON_SHARES = 3  # processes that share the cases of a dtype, because Triton takes seconds to compile a case
TEST_PROCESSES = 14
VARIANTS = ROOT / "build" / "variants"  # one folder with a package for each variant
DEFAULT = ("info", "smoke", "bits", "time", "ncu", "sanitize", "tests", "models")
EXTRA = ("peers", "variants", "fit")  # run only if named; the first two may take longer than the GPU is available
# Contestants of Swin-T in inference, in the training step and in a rehearsal. A rehearsal leaves out compiled
# contestants, because compiling takes minutes on a CPU.
INFERENCE = ("eager-compiled", "accelerate", "accelerate-compiled")
TRAINING = ("eager-compiled", "accelerate-compiled", "eager-graphs", "accelerate-graphs")
REHEARSED = ("eager", "accelerate")


@dataclass(frozen=True)
class Setting:
    rehearse: bool = False
    whole: bool = False  # steps are neither shortened nor limited in time
    against: str = ""  # an op library to time against the installed one

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def arguments(self) -> list[str]:
        flags = {"--rehearse": self.rehearse, "--whole": self.whole}
        return [flag for flag, is_set in flags.items() if is_set]


def _smoke(setting: Setting, library: str) -> tuple[Group, ...]:
    # Triton's interpreter computes bfloat16 wrongly, does not round to TF32, and is slow in float32.
    of_triton, shares = (("float16",), 1) if setting.rehearse else (ARITHMETICS, TRITON_SHARES)
    return (
        *(Group(f"attention cuda {arithmetic} 0/1", library) for arithmetic in ARITHMETICS),
        Group("memory cuda", library),
        *(Group(f"attention triton {a} {i}/{shares}") for a in of_triton for i in range(shares)),
        Group("memory triton"),
    )


def _variants() -> tuple[Group, ...]:
    """Return a group for each Triton variant and for each library that variants.py has built."""
    from gpu.variants import TRITON

    built = (Group(path.parent.parent.name, str(path)) for path in sorted(VARIANTS.glob("*/swinkernels/_ops*.so")))
    return (Group("shipped"), *(Group(f"triton {name}") for name in TRITON), *built)


def _models(setting: Setting) -> tuple[Group, ...]:
    """Return groups whose names gpu/models.py parses: suite, model, mode and contestant."""
    contests = [("models", "swin_t", INFERENCE, ("inference",)), ("models", "swin_t", TRAINING, ("training",))]
    if setting.rehearse:
        contests = [("models", "swin_t", REHEARSED, ("inference",))]
    elif setting.whole:
        from benchmarks.goals import MODEL_CONTESTS

        contests += MODEL_CONTESTS
    names = (
        f"{suite} {model} {mode} {name}" for suite, model, who, modes in contests for mode in modes for name in who
    )
    return tuple(map(Group, dict.fromkeys(names)))


def steps(setting: Setting, names: tuple[str, ...] = DEFAULT) -> list[Step]:
    """Return the named steps.

    In a checkout, the step "build" comes first, unless SWINKERNELS_OPS names a library. A rehearsal of the default
    steps ends with the step "fit".
    """
    library = "built" if setting.rehearse else ""
    against = (Group("against", setting.against),) if setting.against else ()
    tools = ("memcheck", "racecheck", *(["synccheck"] if setting.whole else []))
    shards = 2 if setting.rehearse else TEST_PROCESSES
    of_bits = (Group("cuda", library), Group("triton"), Group("first cuda", library), Group("first triton"))
    every = [
        Step("build", 150, (Group("build"),), patience=150),
        Step("info", 20, (Group("info"),), patience=15),
        Step("smoke", 40, _smoke(setting, library)),
        Step("fit", 60, (Group("fit", library),)),
        Step("bits", 20, of_bits, patience=15),
        Step("time", 60, (Group("shipped"), *against), patience=50, takes_turns=True),
        Step("ncu", 60, (Group("fwd"), Group("bwd")), processes=1, patience=60),
        Step("sanitize", 60, tuple(Group(tool, library) for tool in tools), patience=60),
        Step("tests", 110, tuple(Group(f"{i}/{shards}") for i in range(shards)), patience=60),
        Step("models", 130, _models(setting), 8, patience=600, takes_turns=True, takes_what_is_left=True),
        Step("peers", 900, (Group("ops"), Group("memory-bound ops")), processes=1, patience=300),
        Step("variants", 600, _variants(), patience=200, takes_turns=True),
    ]
    if setting.whole:
        every = [replace(s, seconds=3600, patience=1200, takes_what_is_left=False) for s in every]
    if setting.rehearse:  # times have no meaning in a rehearsal, and many processes would block each other on two cores
        every = [
            replace(s, patience=600, processes=len(s.groups) if s.takes_turns else 2, takes_what_is_left=True)
            for s in every
        ]
    build = ("build",) if (ROOT / "setup.py").exists() and not os.environ.get("SWINKERNELS_OPS") else ()
    fit = ("fit",) if setting.rehearse and names == DEFAULT else ()  # needs the emulator
    return [step for name in (*build, *names, *fit) for step in every if step.name == name]
