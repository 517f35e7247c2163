"""The steps of a run, in the order of what a run that is cut off should have settled."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from gpu import ROOT
from gpu.runner import Group, Step

ARITHMETICS = ("float32", "tf32", "float16", "bfloat16")
TRITON_SHARES = 3  # of the cases of a dtype: Triton compiles each for seconds
TEST_PROCESSES = 14
VARIANTS = ROOT / "build" / "variants"  # a folder each, with a package in it
DEFAULT = ("info", "smoke", "bits", "time", "ncu", "sanitize", "tests", "models")
# Of Swin-T: what is timed of inference and of the training step. A CPU compiles for minutes.
INFERENCE = ("eager-compiled", "accelerate", "accelerate-compiled")
TRAINING = ("eager-compiled", "accelerate-compiled", "eager-graphs", "accelerate-graphs")
REHEARSED = ("eager", "accelerate")
EXTRA = ("peers", "variants")  # by name only: they take longer than a GPU is usually there


@dataclass(frozen=True)
class Setting:
    rehearse: bool = False
    whole: bool = False  # steps are not cut down to what a quarter of an hour allows, nor bounded in time
    against: str = ""  # an op library to time beside the installation's

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"

    def arguments(self) -> list[str]:
        flags = {"--rehearse": self.rehearse, "--whole": self.whole}
        return [flag for flag, is_set in flags.items() if is_set]


def _smoke(setting: Setting) -> tuple[Group, ...]:
    library = "built" if setting.rehearse else ""
    shares = 1 if setting.rehearse else TRITON_SHARES
    # Of Triton's interpreter bfloat16 is wrong, and it does not round to TF32; float32 is slow in it.
    of_triton = ("float16",) if setting.rehearse else ARITHMETICS
    return (
        *(Group(f"attention cuda {arithmetic} 0/1", library) for arithmetic in ARITHMETICS),
        Group("memory cuda", library),
        *(Group(f"attention triton {a} {i}/{shares}") for a in of_triton for i in range(shares)),
        Group("memory triton"),
    )


def _time(setting: Setting) -> tuple[Group, ...]:
    return (Group("shipped"), *([Group("against", setting.against)] if setting.against else []))


def _variants() -> tuple[Group, ...]:
    """Those of Triton, and the libraries that variants.py has built."""
    built = (Group(path.parent.parent.name, str(path)) for path in sorted(VARIANTS.glob("*/swinkernels/_ops*.so")))
    from gpu.variants import TRITON

    return (*(Group(f"triton {name}") for name, changes in TRITON.items() if changes), *built)


def _models(setting: Setting) -> tuple[Group, ...]:
    """What gpu/models.py takes apart: suite, model, mode and contestant."""
    contests = [("models", "swin_t", INFERENCE, ("inference",)), ("models", "swin_t", TRAINING, ("training",))]
    if setting.rehearse:
        contests = [("models", "swin_t", REHEARSED, ("inference",))]
    elif setting.whole:
        from benchmarks.goals import MODEL_CONTESTS

        contests += MODEL_CONTESTS
    groups = (
        Group(f"{suite} {model} {mode} {name}")
        for suite, model, names, modes in contests
        for mode in modes
        for name in names
    )
    return tuple(dict.fromkeys(groups))


def steps(setting: Setting, names: tuple[str, ...] = DEFAULT) -> list[Step]:
    """The steps of these names, after the build where there are sources to build and no bundle."""
    library = "built" if setting.rehearse else ""
    emulated = (Group("cuda", library), Group("triton"))
    tests = 2 if setting.rehearse else TEST_PROCESSES
    every = [
        Step("build", 150, (Group("build"),), patience=150),
        Step("info", 20, (Group("info"),), patience=15),
        Step("smoke", 40, _smoke(setting)),
        Step("fit", 60, (Group("fit", library),)),
        Step("bits", 20, (*emulated, Group("first cuda", library), Group("first triton")), patience=15),
        Step("time", 60, _time(setting), patience=50, takes_turns=True),
        Step("ncu", 60, (Group("fwd"), Group("bwd")), processes=1, patience=60),
        Step("sanitize", 60, (Group("memcheck", library), Group("racecheck", library)), patience=60),
        Step("tests", 110, tuple(Group(f"{i}/{tests}") for i in range(tests)), patience=60),
        Step(
            "models",
            130,
            _models(setting),
            processes=8,
            patience=600,
            takes_turns=True,
            takes_what_is_left=True,
        ),
        Step("peers", 900, (Group("ops"), Group("memory-bound ops")), processes=1, patience=300),
        Step("variants", 600, (Group("shipped"), *_variants()), patience=200, takes_turns=True),
    ]
    if setting.whole:
        tools = ("memcheck", "racecheck", "synccheck")
        groups = {"sanitize": tuple(Group(tool, library) for tool in tools)}
        every = [
            replace(s, seconds=3600, patience=1200, takes_what_is_left=False, groups=groups.get(s.name, s.groups))
            for s in every
        ]
    if setting.rehearse:  # how long it takes says nothing; on two cores many processes would crowd each other out
        every = [
            replace(s, patience=600, processes=len(s.groups) if s.takes_turns else 2, takes_what_is_left=True)
            for s in every
        ]
    build = ("build",) if (ROOT / "setup.py").exists() and not os.environ.get("SWINKERNELS_OPS") else ()
    fit = ("fit",) if setting.rehearse else ()  # what no GPU has to say
    return [step for name in (*build, *names, *fit) for step in every if step.name == name]
