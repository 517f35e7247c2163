"""Defines the commands of ``python -m gpu``: check, bundle, variants, and work (one process of a check)."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.commit import commit
from gpu import ROOT, summary
from gpu.lines import Emitter
from gpu.plan import DEFAULT, EXTRA, Setting, steps
from gpu.runner import Run


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m gpu", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="run all checks that need a GPU, within a given time")
    check.add_argument("--out", type=Path, default=Path("results"), help="folder for gpu.jsonl and gpu.log")
    check.add_argument("--budget", type=float, help="time limit in seconds; default: 480, or 1800 for a rehearsal")
    check.add_argument("--steps", default=",".join(DEFAULT), help=f"names from {', '.join((*DEFAULT, *EXTRA))}")
    check.add_argument("--against", default="", help="another _ops library, to time as well")
    work = commands.add_parser("work", help="one process of a step")
    work.add_argument("step")
    work.add_argument("group")
    work.add_argument("--lines", type=int, help="file descriptor to write the lines to")
    work.add_argument("--skip", type=int, default=0, help="number of cases to skip at the start")
    for command in (check, work):
        command.add_argument("--rehearse", action="store_true", help="run without a GPU, in tiny sizes")
        command.add_argument("--whole", action="store_true", help="neither shorten steps nor limit their time")
    bundle = commands.add_parser("bundle", help="make a folder to copy to a machine with a GPU")
    bundle.add_argument("--out", type=Path, default=ROOT / "bundle")
    commands.add_parser("variants", help="build the CUDA variants that the step 'variants' times")
    return main


def check(options: argparse.Namespace) -> int:
    names = tuple(filter(None, options.steps.split(",")))
    if unknown := [name for name in names if name not in (*DEFAULT, *EXTRA)]:
        parser().error(f"--steps: there is no {', '.join(unknown)}: choose from {', '.join((*DEFAULT, *EXTRA))}")
    if options.against and not Path(options.against).is_file():
        parser().error(f"--against: {options.against} is not a file")
    setting = Setting(options.rehearse, options.whole, options.against and os.path.abspath(options.against))
    facts = {"commit": commit(), **({"rehearsed": True} if setting.rehearse else {})}
    budget = float("inf") if setting.whole else options.budget or (1800 if setting.rehearse else 480)
    run = Run(options.out, budget, [sys.executable, "-m", "gpu", "work", *setting.arguments()], facts)
    for step in steps(setting, names):
        run.run(step)
    text = summary.table(run.lines, run.spent)
    (options.out / "gpu.txt").write_text(text)
    print(text)
    return run.status


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "check":
        return check(options)
    if options.command == "work":
        from gpu import work

        setting = Setting(options.rehearse, options.whole)
        return work.run(options.step, options.group, Emitter(options.lines), setting, options.skip)
    from gpu import bundle, variants

    return variants.build() if options.command == "variants" else bundle.make(options.out)


if __name__ == "__main__":
    sys.exit(main())
