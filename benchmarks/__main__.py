"""Time swinkernels and its alternatives on this machine: ``python -m benchmarks --help``."""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from benchmarks import (
        attention,
        compare,
        contest,
        cpu_instructions,
        host_cost,
        memory_bound,
        models,
        record,
        report,
        scaling,
        shapes,
        timing,
    )
except ModuleNotFoundError as e:
    if e.name not in ("matplotlib", "rich", "tabulate"):
        raise
    sys.exit(f"The benchmarks need matplotlib, rich and tabulate ({e}): pip install matplotlib rich tabulate")

Rows = list[dict[str, Any]]
HELP = {
    "ops": "each op against the reference, eager code, torch.compile, SDPA and FlexAttention",
    "blocks": "blocks of timm, torchvision and MONAI, before and after accelerate, eager and compiled",
    "models": "whole models in the same way, inference and training",
    "memory": "peak memory of the models, without times",
    "latency": "models at batch 1, also in CUDA graphs; host time of a call",
    "scaling": "cost over batch, map and window; window attention against global attention",
}
DTYPES = (*memory_bound.PAIRS, "tf32")
BASELINES = tuple(dict.fromkeys((*attention.CONTESTANTS, *models.CONTESTANTS, *scaling.LAYERS)))


class Task(NamedTuple):
    """One benchmark to run; its contestants are timed in turn."""

    suite: str
    label: str
    run: Callable[[], Rows]


def plan(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    for suite in HELP if options.command == "all" else (options.command,):
        yield from PLANS[suite](options, device)


def _chosen(options: argparse.Namespace, names: Sequence[str], quick: Sequence[str]) -> list[str]:
    return [n for n in names if fnmatch.fnmatch(n, options.filter) and (n in quick or not options.quick)]


def _batch(options: argparse.Namespace, device: torch.device, on_cpu: int) -> int | None:
    return options.batch or (on_cpu if device.type == "cpu" else None)


def _ops(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    batch = _batch(options, device, 1)
    names = attention.contestants(device, options.baseline)
    wanted = options.op or ("window_attention", *memory_bound.BENCHES)
    in_a_minute = options.quick and device.type == "cpu"
    if in_a_minute and not options.baseline:
        names = [name for name in names if name not in attention.COMPILED]
    if in_a_minute and not (options.op or options.baseline):
        wanted = ("window_attention",)  # the only op with a CPU kernel
    for shape in _chosen(options, list(shapes.ATTENTION), shapes.QUICK) if "window_attention" in wanted else ():
        case = shapes.with_batch(shapes.ATTENTION[shape], batch) if batch else shapes.ATTENTION[shape]
        for dtype in options.dtype:
            if names and dtype in (*contest.DTYPES, "tf32"):
                call = functools.partial(
                    attention.benchmark,
                    shape,
                    case,
                    contest.DTYPES.get(dtype, torch.float32),
                    device,
                    names,
                    tf32=dtype == "tf32",
                    seconds=contest.QUICK_SECONDS if options.quick else None,
                )
                yield Task("ops", f"window_attention {shape} {dtype}", call)
    for op in memory_bound.BENCHES:
        names = memory_bound.contestants(op, device, options.baseline)
        for shape in _chosen(options, list(memory_bound.cases(op)), ("swin_t.1",)) if op in wanted and names else ():
            of = memory_bound.cases(op)[shape]
            case_of_map = shapes.with_batch(of, batch) if batch else of
            for dtype in options.dtype:
                if dtype in memory_bound.PAIRS:
                    call = functools.partial(memory_bound.benchmark, op, shape, case_of_map, dtype, device, names)
                    yield Task("ops", f"{op} {shape} {dtype}", call)


def _of_models(
    suite: str,
    known: Sequence[str],
    quick: Sequence[str],
    options: argparse.Namespace,
    device: torch.device,
    *,
    batch: int | None,
    graphs: bool = False,
    timed: bool = True,
) -> Iterator[Task]:
    names = models.contestants(options.baseline, device, graphs)
    for library, of_library in models.not_installed(known).items():
        print(f"{suite}: {library} is not installed, which {', '.join(of_library)} need", file=sys.stderr)
        known = [name for name in known if name not in of_library]
    if device.type == "cpu" and options.filter not in shapes.LARGE_MODELS:
        known = [name for name in known if name not in shapes.LARGE_MODELS]
    if options.quick and device.type == "cpu" and not options.baseline:  # compiling a model for a CPU takes a minute
        names = [name for name in names if name in models.KINDS]
    for name in _chosen(options, known, quick) if names else ():
        for dtype in options.dtype:
            if dtype in contest.DTYPES:
                call = functools.partial(
                    models.benchmark, suite, name, contest.DTYPES[dtype], device, names, batch=batch, timed=timed
                )
                yield Task(suite, f"{name} {dtype}", call)


def _blocks(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    batch = _batch(options, device, 1)
    return _of_models("blocks", list(shapes.BLOCKS), shapes.QUICK_BLOCKS, options, device, batch=batch)


def _models(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    batch = _batch(options, device, 1)
    return _of_models("models", list(shapes.MODELS), shapes.QUICK_MODELS, options, device, batch=batch)


def _memory(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    batch = _batch(options, device, 1)
    return _of_models("memory", list(shapes.MODELS), shapes.QUICK_MODELS, options, device, batch=batch, timed=False)


def _latency(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    yield from _of_models("latency", list(shapes.MODELS), (shapes.MODEL_GOAL,), options, device, batch=1, graphs=True)
    dtype = next((d for d in options.dtype if d in contest.DTYPES), None)
    for backend in host_cost.backends(device) if dtype and fnmatch.fnmatch("host", options.filter) else ():
        if not options.baseline or backend in options.baseline:
            call = functools.partial(host_cost.rows, device, contest.DTYPES[dtype], backend)
            yield Task("latency", f"host time of a call, {backend}", call)


def _scaling(options: argparse.Namespace, device: torch.device) -> Iterator[Task]:
    dtype = next((d for d in options.dtype if d in contest.DTYPES), None)
    if dtype is None:
        return
    names = attention.contestants(device, options.baseline or (*attention.OURS, "eager", "sdpa"))
    largest = 8 * 56 * 56 if options.quick else 16 * 56 * 56 if device.type == "cpu" else None
    for sweep in _chosen(options, list(scaling.SWEEPS), list(scaling.SWEEPS)) if names else ():
        call = functools.partial(scaling.sweep, sweep, contest.DTYPES[dtype], device, names, largest=largest)
        yield Task("scaling", f"{sweep} {dtype}", call)
    kinds = [kind for kind in scaling.LAYERS if not options.baseline or kind in options.baseline]
    for side in shapes.COMPLEXITY_SIDES if kinds and fnmatch.fnmatch("complexity", options.filter) else ():
        call = functools.partial(scaling.complexity, side, contest.DTYPES[dtype], device, kinds)
        yield Task("scaling", f"complexity {side}x{side} {dtype}", call)


PLANS: dict[str, Callable[[argparse.Namespace, torch.device], Iterator[Task]]] = {
    "ops": _ops,
    "blocks": _blocks,
    "models": _models,
    "memory": _memory,
    "latency": _latency,
    "scaling": _scaling,
}


def run(tasks: Sequence[Task], device: torch.device, out: Path) -> dict[str, Rows]:
    """Run the tasks and write the suites' CSV files after each task, so that an aborted run loses at most one task."""
    rows: dict[str, Rows] = {}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    # The progress bar goes to the terminal even if the tables are redirected to a file.
    with Progress(
        *columns, console=console, speed_estimate_period=3600, redirect_stdout=sys.stdout.isatty()
    ) as progress:
        bar = progress.add_task("", total=len(tasks))
        for task in tasks:
            progress.update(bar, description=f"{task.suite}: {task.label}")
            found = task.run()
            if found:
                print(contest.show(found, device), flush=True)
                rows.setdefault(task.suite, []).extend(found)
                record.write_csv(out / f"{task.suite}.csv", rows[task.suite], device)
            progress.advance(bar)
    return rows


def why_no_kernel(wanted: Sequence[str], device: torch.device) -> str | None:
    """Return why no kernel of this package can run on ``device``.

    The result is None if a kernel can run, or if ``wanted`` names contestants but none that uses a kernel.
    """
    ours = (*attention.OURS, *models.OURS, "window")
    reasons = attention.kernels(device)
    if None in reasons.values() or (wanted and not set(wanted) & set(ours)):
        return None
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    others = " ".join(("reference", *attention.PEERS[:2]))
    return f"no kernel of swinkernels can run on {device} ({why}). To time only others, name them: --baseline {others}"


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True)
    for suite, text in {**HELP, "all": "all of these"}.items():
        command = commands.add_parser(suite, help=text, description=text)
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        command.add_argument("--dtype", choices=DTYPES, nargs="+", help="default: bfloat16 on a GPU, float32 on a CPU")
        command.add_argument("--filter", default="*", help="shapes, models or sweeps, by a pattern such as 'swin_t*'")
        command.add_argument("--op", nargs="+", choices=("window_attention", *memory_bound.BENCHES), help="ops only")
        command.add_argument("--baseline", nargs="+", choices=BASELINES, default=(), help="contestants; default: all")
        command.add_argument("--quick", action="store_true", help="fewer shapes, and no compilation on a CPU")
        command.add_argument("--batch", type=int, help="largest batch; 1 on a CPU unless given")
        command.add_argument("--threads", type=int, help="torch's threads on a CPU")
        command.add_argument(
            "--flush-denormal",
            action="store_true",
            help="one CPU thread that treats denormals as zero; masked scores give denormals, which slow plain code",
        )
        command.add_argument(
            "--cpu-time",
            action="store_true",
            help="on a busy CPU: CPU time of all threads instead of wall-clock time",
        )
        command.add_argument("--out", type=Path, help="folder for the CSV files; default: results/<date and time>")
    writing = commands.add_parser(
        "report", help="write docs/benchmarks.md, docs/gpu.md, charts and the README's numbers from the files of runs"
    )
    writing.add_argument(
        "--results", type=Path, default=report.RESULTS, help="folder with one folder of CSV files per run"
    )
    judging = commands.add_parser(
        "compare",
        help="list the times that changed from one CSV file to another; without files, the CPU kernels with more "
        "instructions than the baseline in benchmarks/results",
    )
    judging.add_argument("before", type=Path, nargs="?")
    judging.add_argument("after", type=Path, nargs="?")
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if options.command == "report":
        if not options.results.is_dir() or not report.read(options.results):
            parser().error(f"{options.results} has no folder with the CSV files of a run")
        for path in report.write(options.results):
            print(path)
        return 0
    if options.command == "compare" and options.before is None:
        return cpu_instructions.against_baseline()
    if options.command == "compare":
        if options.after is None:
            parser().error("compare takes two CSV files, or none")
        for path in (options.before, options.after):
            if not path.is_file():
                parser().error(f"{path} is not a file")
        return compare.main(options.before, options.after)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser().error("--device cuda: torch sees no CUDA GPU; see python -m swinkernels.info")
    if reason := why_no_kernel(options.baseline, device):
        parser().error(reason)
    if options.flush_denormal:  # torch stores this setting per thread
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
    elif options.threads:
        torch.set_num_threads(options.threads)
    if options.cpu_time:
        timing.CPU_CLOCK[:] = [time.process_time]
    options.dtype = options.dtype or ["bfloat16" if device.type == "cuda" else "float32"]
    tasks = list(plan(options, device))
    if not tasks:
        parser().error(f"{options.command}: nothing matches on {device}; see --filter, --baseline, --dtype and --op")
    now = datetime.datetime.now().strftime("%Y-%m-%dT%H-%M-%S")
    out = options.out or Path("results") / now
    taken = [path for suite in dict.fromkeys(t.suite for t in tasks) if (path := out / f"{suite}.csv").exists()]
    if taken:
        parser().error(f"{taken[0]} exists, and results are not overwritten: remove it or give another --out")
    rows = run(tasks, device, out)
    every = [row for found in rows.values() for row in found]
    if not every:
        print(f"{options.command}: none of {', '.join(options.baseline)} exists for this choice", file=sys.stderr)
        return 2
    noisy = sum(row["noisy"] is True for row in every)
    print(f"\n{len(every)} rows in {out}; commit {record.commit()}")
    print(f"tables and pictures: {report.write_run(out)}")
    if noisy:
        print(f"{noisy} of them are noisy: their 20th and 80th percentiles differ by over 10 % of the median")
    wrong = sorted({f"{r['backend']} at {r['shape']}" for r in every if r["result"] == record.RESULT_WRONG})
    failed = sorted({f"{r['backend']} at {r['shape']}" for r in every if r["result"] == record.RESULT_FAILED})
    for what, names in (("wrong results", wrong), ("failed", failed)):
        if names:
            print(f"{what}: {', '.join(names)}")
    ours = (*attention.OURS, *models.OURS)
    return 1 if any(name.split(" at ")[0] in ours for name in wrong + failed) else 0


if __name__ == "__main__":
    sys.exit(main())
