"""Count the instructions of the CPU kernels, from the object files of the last build.

``python -m benchmarks.cpu_instructions`` prints the counts; ``python -m benchmarks compare`` compares them with
``results/cpu_instructions.csv``. Unlike times, counts are the same in every run, even on a busy machine.

avx2    the instructions that one call executes on one thread, counted by valgrind's callgrind; ``cpu_kernels.cpp``
        makes the calls.
avx512, avx512_bf16, amx
        the number of innermost loops in each function's machine code and their lengths, in instructions. Nothing is
        executed, because valgrind supports neither AVX-512 nor AMX, and not every machine has them.

Counts of different compilers are not comparable.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import compare

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
BASELINE = ROOT / "benchmarks" / "results" / "cpu_instructions.csv"
ARCHS = ("avx2", "avx512", "avx512_bf16", "amx")
KEYS = ("arch", "kernel", "case", "compiler")
OBJECTS = ROOT / "build" / f"temp.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "csrc/kernels/cpu"
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2}  # DType of csrc/params
BIASES = {"none": 0, "table": 1, "dense": 2}
PASSES = ("forward", "backward", "linear", "half")


class Missing(Exception):
    """A tool is missing, the object files are missing or outdated, or the machine is not x86_64.

    The message names the remedy if there is one.
    """


@dataclasses.dataclass(frozen=True)
class Case:
    """The arguments of window attention on a small map."""

    KERNEL: ClassVar[str] = "window_attention"
    name: str
    size: tuple[int, int, int]
    window: tuple[int, int, int]
    shift: tuple[int, int, int] = (0, 0, 0)
    heads: int = 3
    head_dim: int = 32
    bias: str = "table"
    cosine: bool = False  # v2
    batch: int = 1
    has_all_dtypes: bool = False  # else float32 only
    has_half: bool = False  # also count a block's whole attention half

    def numbers(self, direction: str, dtype: str) -> str:
        """Return the fields of the struct ``Call`` in cpu_kernels.cpp as numbers separated by commas."""
        flags = (BIASES[self.bias], int(self.cosine))
        first = (PASSES.index(direction), DTYPES[dtype], self.batch)
        return ",".join(map(str, (*first, *self.size, *self.window, *self.shift, self.heads, self.head_dim, *flags)))


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """The arguments of a Linear layer or, with hidden channels, of an MLP, in float32 with a residual connection."""

    KERNEL: ClassVar[str] = "linear"
    name: str
    rows: int
    in_features: int
    out_features: int
    hidden: int = 0
    activation: str = "none"

    def numbers(self, direction: str, dtype: str) -> str:
        """Return the fields of the struct ``LinearCall`` in cpu_kernels.cpp as numbers separated by commas."""
        activation = ("none", "gelu", "tanh").index(self.activation)
        return ",".join(
            map(str, (PASSES.index("linear"), self.rows, self.in_features, self.hidden, self.out_features, activation))
        )


CASES = [
    Case("swin 7x7", (1, 14, 14), (1, 7, 7)),
    Case("swin 7x7 shifted", (1, 14, 14), (1, 7, 7), (0, 3, 3), has_all_dtypes=True, has_half=True),
    Case("swin 7x7 padded", (1, 13, 9), (1, 7, 7), has_half=True),
    Case("swin 7x7 dense bias", (1, 14, 14), (1, 7, 7), bias="dense"),
    Case("swin_v2 8x8 shifted", (1, 16, 16), (1, 8, 8), (0, 4, 4), cosine=True, has_half=True),
    Case("swin_v2 16x16", (1, 16, 16), (1, 16, 16), heads=1, cosine=True),
    Case("swin 12x12", (1, 12, 12), (1, 12, 12), heads=1),
    Case("monai 7x7x7 of 16", (7, 7, 7), (7, 7, 7), heads=1, head_dim=16),
    Case("4x4 of 64", (1, 8, 8), (1, 4, 4), head_dim=64),
    Case("odd 5x3 of 10", (1, 10, 6), (1, 5, 3), (0, 2, 1), head_dim=10),
    Case("1x1", (1, 8, 8), (1, 1, 1), bias="none"),
]
LINEAR_CASES = [
    LinearCase("qkv of 49", 49, 96, 288),
    LinearCase("fc1 of 49", 49, 192, 768, activation="gelu"),
    LinearCase("fc2 of 200", 200, 384, 96),
    LinearCase("odd", 37, 75, 101, activation="tanh"),
    LinearCase("mlp of 150", 150, 96, 96, hidden=384, activation="gelu"),
    LinearCase("mlp of 49", 49, 64, 64, hidden=256, activation="tanh"),
]


def _output(*command: str | Path, **options: Any) -> str:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}")
    return result.stdout


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        package = {"objdump": "binutils", "readelf": "binutils"}.get(name, name)
        raise Missing(f"{name} was not found: apt-get install {package}")
    return path


def objects() -> list[Path]:
    """List the object files of the CPU kernels; raise Missing if there are none or if they are outdated."""
    found = sorted(OBJECTS.glob("*.o"))
    sources = [*(CSRC / "kernels/cpu").iterdir(), *(CSRC / "params").iterdir()]
    if not found:
        raise Missing(f"{OBJECTS.relative_to(ROOT)} has no object files of the CPU kernels: run make build")
    if min(path.stat().st_mtime for path in found) < max(path.stat().st_mtime for path in sources):
        raise Missing(f"{OBJECTS.relative_to(ROOT)} has object files that are older than their sources: run make build")
    return found


def compiler(path: Path) -> str:
    """Return the compiler named in the .comment section of an object file, and the machine's architecture."""
    comments = re.findall(r"\[ *[0-9a-f]+\]\s+(.+)", _output(_tool("readelf"), "-p", ".comment", path))
    return f"{'; '.join(sorted({*comments}))}, {os.uname().machine}"


def short_name(function: str) -> str:
    """Strip namespaces, arguments and compiler suffixes from a demangled function name."""
    name = re.sub(r" \[clone .*|'\d+$|\(anonymous namespace\)::", "", function)
    depth = 0
    for i, character in enumerate(name):  # arguments start at the first parenthesis outside angle brackets
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            name = name[:i]
            break
    name = re.sub(r"^(auto|void|int|long|bool|float) ", "", name)
    return re.sub(r"(\w+::)+", "", name)


# --- avx2: callgrind -------------------------------------------------------------------------------------------------


def own_costs(dump: str) -> Counter[str]:
    """Return each function's own instruction count in callgrind's output, by short name; callees are excluded."""
    names: dict[str, str] = {}
    costs: Counter[str] = Counter()
    function, skips = "", False
    for line in dump.splitlines():
        if line.startswith("fn="):
            number, _, name = line[3:].partition(" ")
            function = names.setdefault(number, name)
        elif line.startswith("cfn="):
            number, _, name = line[4:].partition(" ")
            names.setdefault(number, name)
        elif line.startswith("calls="):
            skips = True  # the next line is the cost of the called function
        elif re.match(r"[+\-*\d]", line):
            if not skips:
                costs[short_name(function)] += int(line.split()[1])
            skips = False
    return costs


def count_avx2(of: Sequence[Path], calls: Sequence[tuple[str, Case | LinearCase, str]]) -> Iterator[Counter[str]]:
    """Yield the instruction counts by function, for each (direction, case, dtype) of ``calls``."""
    valgrind = _tool("valgrind")
    with tempfile.TemporaryDirectory(prefix="swinkernels-") as folder:
        driver = Path(folder) / "driver"
        source = ROOT / "benchmarks" / "cpu_kernels.cpp"
        _output(os.environ.get("CXX", "c++"), "-O1", "-std=c++17", f"-I{CSRC}", source, *of, "-o", driver)
        dump = Path(folder) / "counts"
        numbers = [case.numbers(direction, dtype) for direction, case, dtype in calls]
        watch = ("--zero-before=measured_begin", "--dump-before=measured_end", f"--callgrind-out-file={dump}")
        environment = {**os.environ, "SWINKERNELS_CPU_ISA": "avx2", "LD_BIND_NOW": "1"}
        _output(valgrind, "--tool=callgrind", *watch, driver, *numbers, env=environment)
        for i in range(len(calls)):
            yield own_costs(Path(f"{dump}.{i + 1}").read_text())


# --- avx512: disassembly ---------------------------------------------------------------------------------------------


def innermost_loops(instructions: Sequence[tuple[int, str]]) -> list[int]:
    """Return the instruction count of each innermost loop of a function.

    ``instructions`` are the function's instructions, as (address, text) pairs.
    """
    addresses = [address for address, _ in instructions]
    ends: dict[int, int] = {}  # end of each loop, by the address of its first instruction
    for address, text in instructions:
        jump = re.match(r"j\w+\s+([0-9a-f]+)\b", text)
        if jump is not None and addresses[0] <= int(jump[1], 16) <= address:
            head = int(jump[1], 16)
            ends[head] = max(ends.get(head, 0), address)
    return [
        sum(head <= address <= end for address in addresses)
        for head, end in sorted(ends.items())
        if not any(other != head and head <= other and last <= end for other, last in ends.items())
    ]


def count_loops(path: Path) -> dict[str, list[int]]:
    """Return, for each function of an object file, the instruction counts of its innermost loops, longest first."""
    loops: dict[str, list[int]] = {}
    function, instructions = "", []
    listing = _output(_tool("objdump"), "--disassemble", "--demangle", "--no-show-raw-insn", path)
    for line in (*listing.splitlines(), "0 <>:"):
        start = re.match(r"[0-9a-f]+ <(.*)>:$", line)
        if start is not None:
            if instructions:
                loops.setdefault(short_name(function), []).extend(innermost_loops(instructions))
            function, instructions = start[1], []
            continue
        instruction = re.match(r"\s*([0-9a-f]+):\s+(.+)", line)
        if instruction is not None:
            instructions.append((int(instruction[1], 16), instruction[2]))
    return {name: sorted(sizes, reverse=True) for name, sizes in sorted(loops.items()) if sizes}


# --- Rows ------------------------------------------------------------------------------------------------------------


def _row(arch: str, kernel: str, case: str, costs: Counter[str], of: str) -> dict[str, Any]:
    total = costs.total()
    parts = [f"{name}: {cost}" for name, cost in costs.most_common() if cost > 0.01 * total]
    return {
        "arch": arch,
        "kernel": kernel,
        "case": case,
        "instructions": total,
        "of_functions": "; ".join(parts) if len(costs) > 1 else "",
        "compiler": of,
    }


def count(arch: str) -> list[dict[str, Any]]:
    """Return the rows for ``arch``: one per call ("avx2"), or the numbers and lengths of innermost loops."""
    if os.uname().machine != "x86_64":
        raise Missing(f"{arch} kernels exist only for x86_64, and this machine is {os.uname().machine}")
    found = objects()
    of = compiler(OBJECTS / f"{arch}.o")
    if arch != "avx2":
        return [
            _row(arch, name, case, Counter({name: number}), of)
            for name, sizes in count_loops(OBJECTS / f"{arch}.o").items()
            for case, number in {
                "number of innermost loops": len(sizes),
                **{f"innermost loop {i} of {len(sizes)}, longest first": n for i, n in enumerate(sizes, 1)},
            }.items()
        ]
    calls: list[tuple[str, Case | LinearCase, str]] = [
        (direction, case, dtype)
        for case in CASES
        for direction in ("forward", "backward")
        for dtype in (DTYPES if case.has_all_dtypes else ("float32",))
    ]
    calls += [("half", case, "float32") for case in CASES if case.has_half]
    calls += [("forward", case, "float32") for case in LINEAR_CASES]
    return [
        _row(arch, f"{case.KERNEL} {direction}", f"{case.name} {dtype}", costs, of)
        for (direction, case, dtype), costs in zip(calls, count_avx2(found, calls), strict=True)
    ]


def against_baseline(archs: Sequence[str] = ARCHS) -> int:
    """Print the counts that grew; return 1 if any grew, else 2 if a comparison was impossible, else 0."""
    status = 0
    for arch in archs:
        try:
            rows = count(arch)
            lines = compare.grown(rows, compare.read_baseline(BASELINE), KEYS)
        except (Missing, compare.NoBaselineError) as error:
            print(f"{arch} kernels were not compared: {error}", file=sys.stderr)
            status = status or 2
            continue
        print("\n".join(lines) or f"{arch} kernels: none of {len(rows)} counts grew by over {compare.GROWTH:.0%}")
        status = 1 if lines else status
    return status


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu_instructions", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--update", action="store_true", help=f"write the counts into {BASELINE.relative_to(ROOT)}")
    options = parser.parse_args(arguments)
    try:
        rows = [row for arch in ARCHS for row in count(arch)]
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        print(
            f"{row['arch']:12}{row['instructions']:10}  {row['kernel']}, {row['case']}  {row['of_functions']}".rstrip()
        )
    if options.update:
        compare.write_baseline(BASELINE, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
