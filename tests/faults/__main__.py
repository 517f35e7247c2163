"""Plants each fault in a copy of the tree, and runs the test that must detect it.

    python -m tests.faults [NAME...]

NAME is a fault or a prefix, such as ``cuda-``; by default, all faults are tried. First, every test runs without a
fault; unless all pass, no fault is tried and the exit status is 2. The checkout is never modified. The exit status is 1
if a fault was not detected, or does not apply to the current sources.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.faults import Fault, all_faults

ROOT = Path(__file__).resolve().parents[2]
# Sources that are compiled into the extension. The emulator compiles the CUDA kernels itself.
COMPILED = ("csrc/kernels/cpu/", "csrc/bindings/", "csrc/python/")
_MINUTES = 30  # per test run; a test that hangs has not detected the fault


class Copy:
    """A copy of the tree: the files that git tracks or would track, and the built extension."""

    def __init__(self, folder: Path):
        self.folder = folder
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT, check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        names = [name for name in listed.split("\0") if name and (ROOT / name).is_file()]
        for path in [*map(Path, names), *(so.relative_to(ROOT) for so in ROOT.glob("swinkernels/*.so"))]:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)

    def build(self) -> None:
        """Compile the extension in place, with the CPU kernels only."""
        environment = {**os.environ, "SWINKERNELS_BUILD": "cpu"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=self.folder, env=environment, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"the extension does not compile:\n{(done.stdout + done.stderr)[-4000:]}")

    def run(self, tests: list[str]) -> tuple[dict[str, int], str]:
        """Run ``tests``; return the number of tests with each outcome, and pytest's output."""
        # $CI makes Hypothesis draw the same examples every time. -O0 saves time, as few tests run each compiled kernel.
        environment = {**os.environ, "CI": "1", "SWINKERNELS_EMULATION_FLAGS": "-O0"}
        if all(test.startswith("tests/triton/") for test in tests):
            environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}  # no other tests run in this process
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-m", "not long"]
        command = [sys.executable, "-m", "pytest", *options, *tests]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=_MINUTES * 60
        )
        output = done.stdout + done.stderr
        summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""
        return {what: int(count) for count, what in re.findall(r"(\d+) (passed|failed|skipped|error)", summary)}, output

    @contextlib.contextmanager
    def with_fault(self, fault: Fault):
        path = self.folder / fault.file
        source = path.read_text()
        path.write_text(fault.apply_to(source))
        try:
            yield
        finally:
            path.write_text(source)


def find(copy: Copy, fault: Fault) -> str | None:
    """Run the test of ``fault`` in ``copy``; return the reason why it did not detect the fault, or None."""
    try:
        with copy.with_fault(fault):
            if fault.file.startswith(COMPILED):
                copy.build()
            counts, output = copy.run([fault.test])
    except (RuntimeError, subprocess.TimeoutExpired) as error:
        return str(error)
    if counts.get("failed") and "error" not in counts:
        return None
    reason = "the test passes with the fault" if counts.get("passed") else "the test was skipped or had an error"
    return f"{reason}: {fault.test}\n{output[-4000:]}"


def fails_without_faults(copy: Copy, faults: dict[str, Fault]) -> list[str]:
    """Run the tests of ``faults`` without a fault; return a list of problems, empty if all tests pass."""
    problems = []
    tests = sorted({fault.test for fault in faults.values()})
    for of_triton in (False, True):
        chosen = [test for test in tests if test.startswith("tests/triton/") == of_triton]
        if not chosen:
            continue
        counts, output = copy.run(chosen)
        if set(counts) != {"passed"}:
            problems.append(f"not all tests pass without a fault: {counts}\n{output[-6000:]}")
    return problems


def chosen_faults(names: list[str]) -> dict[str, Fault]:
    faults = all_faults()
    for name in names:
        if not any(other.startswith(name) for other in faults):
            sys.exit(f"no fault has the name or the prefix {name}; there are:\n" + "\n".join(faults))
    return {name: fault for name, fault in faults.items() if not names or name.startswith(tuple(names))}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="a fault, or the prefix of several")
    parser.add_argument("--list", action="store_true", help="name the faults and their tests, and run nothing")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    parser.add_argument(
        "--jobs",
        type=int,
        default=jobs,
        help="number of faults tried at a time (default: $MAX_JOBS, or the number of CPUs)",
    )
    arguments = parser.parse_args()
    faults = chosen_faults(arguments.names)
    if arguments.list:
        for name, fault in faults.items():
            print(f"{name}  {fault.test}")
        return
    started, missed = time.time(), {}
    for name, fault in faults.items():
        try:
            fault.apply_to((ROOT / fault.file).read_text())
        except (OSError, ValueError) as error:
            print(f"MISSED {name} (it does not apply to the sources)", flush=True)
            missed[name] = str(error)
    count = len(faults)
    faults = {name: fault for name, fault in faults.items() if name not in missed}
    with tempfile.TemporaryDirectory(prefix="swinkernels-faults-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for i in range(max(1, min(arguments.jobs, len(faults)))):
            copies.put(Copy(Path(folder) / str(i)))
        first = copies.get()
        if problems := fails_without_faults(first, faults):
            print(*problems, sep="\n")
            sys.exit(2)
        copies.put(first)
        print(f"{len({fault.test for fault in faults.values()})} tests pass without a fault", flush=True)

        def try_one(name: str) -> tuple[str, str | None, float]:
            copy, began = copies.get(), time.time()
            try:
                return name, find(copy, faults[name]), time.time() - began
            finally:
                copies.put(copy)

        # Faults in compiled sources come last, because they leave a faulty extension in their copy.
        order = sorted(faults, key=lambda name: faults[name].file.startswith(COMPILED))
        with concurrent.futures.ThreadPoolExecutor(copies.qsize()) as pool:
            for task in concurrent.futures.as_completed([pool.submit(try_one, name) for name in order]):
                name, problem, seconds = task.result()
                print(f"{'found ' if problem is None else 'MISSED'} {name} ({seconds:.0f} s)", flush=True)
                if problem is not None:
                    missed[name] = problem
    for name, problem in missed.items():
        print(f"\n{name}: {problem}")
    print(f"{count - len(missed)} of {count} faults found in {time.time() - started:.0f} s")
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
