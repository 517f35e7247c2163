"""Count the machine instructions that the window attention kernels execute, without a GPU.

``python -m benchmarks.instructions`` takes the hot instantiations from the build, or compiles them with nvcc if they
have changed since. It calls their launch functions, and runs the machine code of the launched kernels on the CPU
(``sass.py``), along the path that the kernel takes for the given arguments. The counts in ``instructions.csv`` are

* executed warp instructions, summed over the warps of a block and over the kernels of a call, per window and head;
* for an interior window, whose tokens all attend to each other and are all present. A short window (up to 64 tokens)
  lies in a shifted map, a longer one in a map that is not shifted;
* in the steady state: the difference between calls with more and with fewer images, divided by the difference in their
  numbers of windows. So prologues and other work done once per block do not count, whatever the form of the main loop.

Seam windows, padded windows and other arguments are separate cases. Counts of different nvcc versions are not
comparable.

The times are lower bounds for ``--windows`` windows times heads (default: the first stage of Swin-T at batch 128), at
the published clock. Each is derived from one unit of the device:

* ``issue_us``: one instruction per cycle and scheduler, if the instructions are spread evenly over the schedulers;
* ``scheduler_us``: the busiest scheduler, if the warps are assigned to the schedulers in rotation;
* ``mufu_us``: 16 transcendental functions per cycle and multiprocessor;
* ``matrix_us``: the peak rate of the matrix units;
* ``shared_us``: one pass over the 32 banks of shared memory per cycle and multiprocessor;
* ``bytes_us``: the bytes of the maps at the published bandwidth.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import csv
import ctypes
import dataclasses
import math
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import sass
from benchmarks.compiled import (
    ARCHITECTURES,
    Missing,
    architectures,
    compile_one,
    compiler,
    machine_code,
    sources,
    tool,
)
from benchmarks.compiled import run as run_tool

ROOT = Path(__file__).resolve().parent.parent
BASELINE = ROOT / "benchmarks" / "results" / "instructions.csv"
GROWTH = 0.02  # the fraction by which a count may exceed its baseline
_KEYS = ("arch", "kernel", "case")
_DTYPES = {"bf16": (2, "bfloat16"), "f16": (1, "half")}  # DType of csrc/params, name of the instantiation files
_SWIN_T_WINDOWS = 128 * 64 * 3


# --- The cases -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    kernel: str  # "fwd" or "bwd"
    window: tuple[int, ...]
    head_dim: int = 32
    dtype: str = "bf16"
    lse: bool = False  # forward only; the backward pass always reads it
    bias: str = "table"  # or "dense", "axes" (axis_tables, of a 2D window) or "none"
    cosine: bool = False  # v2
    separate: bool = False  # q, k and v in separate maps
    kind: str = "interior"  # or "seam", "padded"

    @property
    def name(self) -> str:
        side = self.window[0] if len(self.window) == 2 and len({*self.window}) == 1 else "x".join(map(str, self.window))
        words = [f"w{side}", f"d{self.head_dim}", self.dtype]
        words += ["lse"] if self.lse and self.kernel == "fwd" else []
        words += [self.bias] if self.bias != "table" else []
        words += ["v2"] if self.cosine else []
        words += ["separate"] if self.separate else []
        words += [self.kind] if self.kind != "interior" else []
        return " ".join(words)

    @property
    def tokens(self) -> int:
        return math.prod(self.window)

    @property
    def bytes_moved(self) -> int:
        """Return the number of bytes of the maps and of lse that are read and written per window and head."""
        rows = 4 if self.kernel == "fwd" else 7
        return self.tokens * (rows * self.head_dim * 2 + (4 if self.lse or self.kernel == "bwd" else 0))


def _cases() -> Iterator[Case]:
    short: dict[str, Any] = {"window": (7, 7)}
    for kernel in ("fwd", "bwd"):
        yield Case(kernel, **short)
        if kernel == "fwd":
            yield Case(kernel, **short, lse=True)
        yield Case(kernel, **short, kind="seam")
        yield Case(kernel, **short, kind="padded")
        yield Case(kernel, **short, bias="dense")
        yield Case(kernel, **short, bias="none")
        yield Case(kernel, **short, cosine=True)
        yield Case(kernel, **short, separate=True)
        for head_dim in (16, 24, 64):
            yield Case(kernel, **short, head_dim=head_dim)
        yield Case(kernel, (8, 8))
        yield Case(kernel, (12, 12))
        yield Case(kernel, (12, 12), bias="none")
        yield Case(kernel, (12, 12), bias="dense")
        yield Case(kernel, (12, 12), cosine=True)
        yield Case(kernel, (14, 14))
        yield Case(kernel, (14, 14), head_dim=64)
        yield Case(kernel, (14, 14), head_dim=64, bias="axes")  # SAM-B
        yield Case(kernel, (16, 16))
        yield Case(kernel, (7, 7, 7))
        yield Case(kernel, (8, 7, 7))
        yield Case(kernel, (24, 24))
        yield Case(kernel, (32, 32))


CASES = tuple(_cases())
HOT = tuple(c for c in CASES if c.name in ("w7 d32 bf16", "w7 d32 bf16 lse", "w8 d32 bf16"))


class Device(NamedTuple):
    """Published figures of one GPU of an architecture, and the limits of its multiprocessors."""

    name: str
    multiprocessors: int
    ghz: float
    gb_per_s: float
    matrix_fma: int  # 16-bit multiply-adds with float accumulation, per cycle and multiprocessor
    shared_bytes: int  # per multiprocessor; a block takes 1 KB more than it requests
    most_warps: int
    most_blocks: int


DEVICES = {
    "sm_80": Device("A100 SXM", 108, 1.41, 2039, 1024, 164 * 1024, 64, 32),
    "sm_90": Device("H100 SXM", 132, 1.755, 3350, 2048, 228 * 1024, 64, 32),
    "sm_100": Device("B200", 148, 1.85, 8000, 4096, 228 * 1024, 64, 32),
    "sm_120": Device("RTX 5090", 170, 2.407, 1792, 256, 100 * 1024, 48, 24),
}


def blocks_per_multiprocessor(device: Device, registers: int, shared_bytes: int, warps: int) -> int:
    """Return the number of resident blocks per multiprocessor.

    Registers are allocated to warps in units of 256, and each of the four schedulers owns a quarter of all registers.
    """
    of_warp = -(-registers * 32 // 256) * 256
    by_registers = 4 * (16384 // of_warp) // warps
    by_shared = device.shared_bytes // (-(-shared_bytes // 1024) * 1024 + 1024)
    return min(by_registers, by_shared, device.most_warps // warps, device.most_blocks)


# --- The build -------------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    program: sass.Program
    registers: int
    constant_base: int
    parameters: tuple[tuple[int, int], ...]  # offset and number of bytes of each parameter, in order


def _read_parameters(data: bytes) -> dict[str, tuple[int, tuple[tuple[int, int], ...]]]:
    """Map each kernel of a cubin to its parameters' start in the constant bank, and to their offsets and sizes."""
    (table,) = struct.unpack_from("<Q", data, 40)
    count, names = struct.unpack_from("<HH", data, 60)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]

    def name(section: tuple[int, ...]) -> str:
        start = sections[names][4] + section[0]
        return data[start : data.index(b"\0", start)].decode()

    found = {}
    for section in sections:
        text = name(section)
        if not text.startswith(".nv.info."):
            continue
        kernel = text.removeprefix(".nv.info.")
        at, end = section[4], section[4] + section[5]
        base, parameters = 0, {}
        while at < end:
            form, attribute, inline = struct.unpack_from("<BBH", data, at)
            at += 4
            if form != 4:  # the value is in the two bytes already read
                continue
            body = data[at : at + inline]
            at += inline
            if attribute == 0x17:  # KPARAM_INFO
                _, ordinal, offset, packed = struct.unpack("<IHHI", body)
                parameters[ordinal] = (offset, packed >> 18)
            elif attribute == 0x0A:  # PARAM_CBANK
                _, base, _ = struct.unpack("<IHH", body)
        found[kernel] = (base, tuple(parameters[i] for i in sorted(parameters)))
    return found


class Build:
    """The kernels of one direction and dtype for one architecture, compiled from a checkout's csrc/."""

    def __init__(self, source: Path, arch: str, direction: str, dtype: str):
        instantiation = re.compile(r"(fwd|bwd)_.*?(half|bfloat16|tf32|float)$")
        wanted = [
            path
            for path in sources(source, "window_attention/**/*.cu")
            if (match := instantiation.match(path.stem)) is None or match.groups() == (direction, _DTYPES[dtype][1])
        ]
        recorder = Path(__file__).with_name("launch_recorder.cpp")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(lambda path: compile_one(source, arch, path), [recorder, *wanted]))
        self.arch = arch
        self.kernels: dict[str, Kernel] = {}
        # The object and the parameters of each kernel. A kernel is disassembled at its first launch.
        self.found: dict[str, tuple[Path, int, tuple[tuple[int, int], ...]]] = {}
        for path in objects[1:]:
            for cubin in machine_code(path, arch):
                for name, (base, parameters) in _read_parameters(cubin).items():
                    self.found[name] = (path, base, parameters)
        # Launch functions defined in other instantiation files are never called, so any address will do. -Bsymbolic
        # keeps a CUDA runtime loaded by torch from replacing the recorder.
        with tempfile.TemporaryDirectory() as scratch:
            library = Path(scratch) / "recorder.so"
            link: list[str | Path] = ["g++", "-shared", "-Wl,-Bsymbolic", *objects, "-o", library]
            run_tool(link)
            undefined = [line.split()[-1] for line in run_tool(["nm", "-u", library]).splitlines()]
            run_tool(
                [*link, *(f"-Wl,--defsym={x}=0" for x in undefined if "swinkernels" in x or x.startswith("__cuda"))]
            )
            self.library = ctypes.CDLL(str(library))
        self.library.workspace_bytes.restype = ctypes.c_int64

    def kernel(self, name: str) -> Kernel:
        if name not in self.kernels:
            path, base, parameters = self.found[name]
            dump = [tool("cuobjdump"), "-arch", self.arch, path, "-fun", name]
            (code,) = sass.parse(run_tool([*dump, "-sass"])).values()
            (registers,) = re.findall(r"REG:(\d+)", run_tool([*dump, "-res-usage"]))
            self.kernels[name] = Kernel(sass.Program(code), int(registers), base, parameters)
        return self.kernels[name]


# --- The count -------------------------------------------------------------------------------------------------------


class _Call(ctypes.Structure):
    """Mirror of the struct ``Call`` in launch_recorder.cpp."""

    _fields_ = [
        ("batch", ctypes.c_int64),
        *((name, ctypes.c_int32 * 3) for name in ("size", "window", "shift")),
        *((name, ctypes.c_int32) for name in ("num_heads", "head_dim", "dtype")),
        *((name, ctypes.c_int32) for name in ("multiprocessors", "blocks_per_multiprocessor", "capability")),
        ("scale", ctypes.c_float),
        ("mask_value", ctypes.c_float),
        *(
            (name, ctypes.c_uint64)
            for name in ("qkv", "out", "lse", "bias_table", "bias", "logit_scale", "dout", "dqkv")
        ),
        *((name, ctypes.c_uint64) for name in ("dbias_table", "dbias", "dlogit_scale", "workspace")),
        *((name, ctypes.c_uint64) for name in ("axis_tables", "daxis_tables")),
        ("separate", ctypes.c_int32),
    ]


_REPORT = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.POINTER(ctypes.c_uint32),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)
# Where the constant bank holds the sizes of the block and the grid, by architecture.
_SIZES_AT = {"sm_80": (0x0, 0xC), "sm_90": (0x0, 0xC), "sm_100": (0x360, 0x370), "sm_120": (0x360, 0x370)}


class Counted(NamedTuple):
    """Execution counts of one kernel; the arrays have the shape (warps, instructions in its code)."""

    instructions: np.ndarray
    passes: np.ndarray
    shared_bytes: int


@dataclasses.dataclass
class Run:
    """The result of one call: counts by kernel name, and the arrays of its arguments by name."""

    counts: dict[str, Counted]
    arrays: dict[str, np.ndarray]


def run(
    build: Build,
    case: Case,
    batch: int,
    windows: int = 1,
    shift: Sequence[int] = (0, 0, 0),
    size: Sequence[int] | None = None,
    fill: dict[str, np.ndarray] | None = None,
) -> Run:
    """Run a call with one head on a simulated device with room for a single block; return its counts and its arrays.

    The map has ``windows`` windows along its second axis unless ``size`` is given. ``fill`` gives initial values of
    arrays by name; the other arrays are zero.
    """
    window = (*(1,) * (3 - len(case.window)), *case.window)
    size = tuple(size) if size else (window[0], window[1] * windows, window[2])
    call = _Call(batch=batch, num_heads=1, head_dim=case.head_dim, multiprocessors=1, blocks_per_multiprocessor=1)
    call.size[:], call.window[:], call.shift[:] = size, window, shift
    call.dtype, call.capability = _DTYPES[case.dtype][0], int(build.arch[3:])
    call.scale, call.mask_value, call.separate = case.head_dim**-0.5, -100.0, case.separate
    memory = sass.Memory()
    arrays: dict[str, np.ndarray] = {}

    def take(name: str, count: int, dtype: Any) -> None:
        arrays[name] = np.zeros(count, dtype)
        if fill and name in fill:
            arrays[name][:] = fill[name].reshape(-1)
        setattr(call, name, memory.take(arrays[name]))

    row = case.head_dim
    tokens = batch * math.prod(size)
    all_windows = batch * math.prod(-(-s // w) for s, w in zip(size, window, strict=True))
    entries = math.prod(2 * w - 1 for w in window)
    take("qkv", 3 * tokens * row, np.uint16)
    axis_entries = sum(2 * w - 1 for w in case.window) * row
    biases = {
        "table": ("bias_table", entries),
        "dense": ("bias", case.tokens**2),
        "axes": ("axis_tables", axis_entries),
    }
    if case.bias in biases:
        take(*biases[case.bias], np.float32)
    if case.cosine:
        take("logit_scale", 1, np.float32)
    if case.kernel == "fwd":
        take("out", tokens * row, np.uint16)
    if case.lse or case.kernel == "bwd":
        take("lse", all_windows * case.tokens, np.float32)
    if case.kernel == "bwd":
        take("dout", tokens * row, np.uint16)
        take("dqkv", 3 * tokens * row, np.uint16)
        if case.bias in biases:
            name, count = biases[case.bias]
            take(f"d{name}", count, np.float32)
        if case.cosine:
            take("dlogit_scale", 1, np.float32)
        take("workspace", max(16, build.library.workspace_bytes(ctypes.byref(call))), np.uint8)

    launches: list[tuple[str, sass.Launch, int]] = []

    def report(name: bytes, grid: Any, block: Any, shared: int, arguments: Any) -> None:
        kernel = build.kernel(name.decode())
        end = max(offset + length for offset, length in kernel.parameters)
        constants = np.zeros(kernel.constant_base + end + 256, np.uint8)
        for at, sizes in zip(_SIZES_AT[build.arch], (block, grid), strict=True):
            constants[at : at + 12].view(np.uint32)[:] = sizes[:3]
        if build.arch == "sm_80":  # the generic address of shared memory; later architectures use a special register
            constants[0x18:0x20].view(np.uint64)[:] = sass.SHARED_WINDOW << 32
        for number, (offset, length) in enumerate(kernel.parameters):
            at = kernel.constant_base + offset
            constants[at : at + length] = np.frombuffer(ctypes.string_at(arguments[number], length), np.uint8)
        launch = sass.Launch(tuple(grid[:3]), tuple(block[:3]), constants)
        launches.append((name.decode(), launch, shared))

    callback = _REPORT(report)
    record = build.library.record_forward if case.kernel == "fwd" else build.library.record_backward
    status = record(ctypes.byref(call), callback)
    if status != 0:
        raise RuntimeError(f"the launch of {case.kernel} {case.name} returned cudaError {status}")
    counts: dict[str, Counted] = {}
    for name, launch, shared in launches:
        for block in sass.run_launch(build.kernels[name].program, launch, memory):
            instructions = np.stack([w.counts for w in block.warps])
            passes = np.stack([w.passes for w in block.warps])
            if name in counts:
                instructions, passes = instructions + counts[name].instructions, passes + counts[name].passes
            counts[name] = Counted(instructions, passes, shared)
    return Run(counts, arrays)


def _less(a: dict[str, Counted], b: dict[str, Counted], scale: float) -> dict[str, Counted]:
    """Return (a - b) / scale for each kernel."""
    return {
        name: Counted(
            (x.instructions - b[name].instructions) / scale, (x.passes - b[name].passes) / scale, x.shared_bytes
        )
        for name, x in a.items()
    }


def per_window(build: Build, case: Case) -> dict[str, Counted]:
    """Return the counts of one window and head, in the steady state."""
    window = (*(1,) * (3 - len(case.window)), *case.window)
    few, more = (2, 4) if case.tokens <= 64 else (1, 2)

    def steady(**arguments: Any) -> dict[str, Counted]:
        counts = [run(build, case, batch, **arguments).counts for batch in (few, more)]
        return _less(counts[1], counts[0], more - few)

    if case.kind == "seam":
        return steady(shift=(0, window[1] // 2, window[2] // 2))
    if case.kind == "padded":
        return steady(size=(window[0], window[1] - 2, window[2] - 2))
    if case.tokens > 64:
        return steady()
    # Two windows along a shifted axis are an interior and a seam window; a single window is a seam window.
    shift = (0, window[1] // 2, 0)
    return _less(steady(windows=2, shift=shift), steady(windows=1, shift=shift), 1)


_CLASSES = {
    "matrix": "HMMA IMMA QGMMA HGMMA",
    "matrix_copies": "LDSM STSM MOVM",
    "async_copies": "LDGSTS UBLKCP UTMALDG UTMASTG",
    "shared": "LDS STS ATOMS",
    "global": "LDG STG LD ST RED ATOM ATOMG",
    "mufu": "MUFU",
    "float": "FFMA FMUL FADD FMNMX FMNMX3 FSETP FSEL FFMA2 FMUL2 FADD2 FCHK",
    "convert": "F2F F2FP F2I I2F I2FP",
    "exchange": "SHFL VOTE VOTEU REDUX CREDUX MATCH",
    "branch": "BRA EXIT CALL RET BRX JMP",
    "sync": "BAR WARPSYNC DEPBAR LDGDEPBAR BSSY BSYNC BREAK NOP CCTL SYNCS MEMBAR ARRIVES",
    "move": "MOV UMOV CS2R S2R S2UR R2UR R2P P2R LDC ULDC LDCU SEL USEL PLOP3 UPLOP3",
}
_CLASS_OF = {name: group for group, names in _CLASSES.items() for name in names.split()}
CLASSES = (*_CLASSES, "dummy_loads", "integer")


def instruction_class(instruction: sass.Instruction) -> str:
    if instruction.guard == "!PT":
        return "dummy_loads"  # inserted by ptxas before copies whose size is only known at run time
    return _CLASS_OF.get(instruction.base, "integer")


def _short_name(mangled: str) -> str:
    match = re.search(r"\d((?:window_attention|reduce)\w*?_kernel)", mangled)
    return match[1] if match else mangled


def measure(build: Build, case: Case, commit: str, windows: int = _SWIN_T_WINDOWS) -> dict[str, Any]:
    """Return the CSV row of a case; ``windows`` is the number of windows times heads for the derived times."""
    try:
        counted = per_window(build, case)
    except sass.Fault:
        if case.kernel == "bwd" or case.lse:
            raise
        counted = per_window(build, dataclasses.replace(case, lse=True))  # this kernel always writes lse
    counted = {name: c for name, c in counted.items() if c.instructions.any()}
    heaviest = max(counted, key=lambda name: float(counted[name].instructions.sum()))
    kernel, shared = build.kernels[heaviest], counted[heaviest].shared_bytes
    classes: Counter[str] = Counter()
    fma = 0.0
    for name, count in counted.items():
        for instruction, executed in zip(build.kernels[name].program.code, count.instructions.sum(0), strict=True):
            if executed:
                classes[instruction_class(instruction)] += executed
            if instruction.base == "HMMA" and executed:
                depth = {"16816": 16, "1688": 8, "1684": 4}[instruction.modifiers[0]]
                fma += executed * 16 * 8 * depth
    total = sum(float(c.instructions.sum()) for c in counted.values())
    per_warp = counted[heaviest].instructions.sum(1)
    device = DEVICES[build.arch]
    warps = len(per_warp)
    blocks = blocks_per_multiprocessor(device, kernel.registers, shared, warps)
    # Warps are assigned to the schedulers in rotation. Only the heaviest kernel's instructions are counted by warp;
    # the others are assumed to be spread evenly.
    schedulers = np.zeros(4)
    for resident in range(4):
        for warp, executed in enumerate(per_warp):
            schedulers[(resident * warps + warp) % 4] += executed / 4
    busiest = float(schedulers.max()) + (total - float(per_warp.sum())) / 4
    cycles = windows / device.multiprocessors / device.ghz * 1e-3  # microseconds if each window takes one cycle
    passes = sum(float(c.passes.sum()) for c in counted.values())
    return {
        "arch": build.arch,
        "kernel": case.kernel,
        "case": case.name,
        "per_window_head": round(total),
        "registers": kernel.registers,
        "shared_bytes": shared,
        "warps_per_sm": blocks * warps,
        "compiler": compiler(),
        "commit": commit,
        "blocks_per_sm": blocks,
        "per_warp": " ".join(f"{x:.0f}" for x in per_warp),
        "entry": " ".join(
            f"{_short_name(name)}:{c.instructions.sum():.0f}" if len(counted) > 1 else _short_name(name)
            for name, c in counted.items()
        ),
        **{name: round(classes[name]) for name in CLASSES},
        "shared_passes": round(passes),
        "issue_us": round(total / 4 * cycles, 1),
        "scheduler_us": round(busiest * cycles, 1),
        "mufu_us": round(classes["mufu"] * 32 / 16 * cycles, 1),
        "matrix_us": round(fma / device.matrix_fma * cycles, 1),
        "shared_us": round(passes * cycles, 1),
        "bytes_us": round(case.bytes_moved * windows / device.gb_per_s * 1e-3, 1),
    }


# --- Files and comparison --------------------------------------------------------------------------------------------


def commit_of(source: Path) -> str:
    """Return the last commit that changed csrc/, with "+" if csrc/ has been edited since; "unknown" without git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(source), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        last = git("log", "-1", "--format=%h", "--abbrev=12", "--", "csrc")
        return last + ("+" if git("status", "--porcelain", "-uno", "csrc") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


class NoBaseline(Exception):
    """The baseline has no row for any of the counts."""


def grown(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]], most: float = GROWTH) -> list[str]:
    """Return a line for each row whose count exceeds its baseline by more than the fraction ``most``.

    Raises NoBaseline if no row has a baseline.
    """
    before = {tuple(str(row[key]) for key in (*_KEYS, "compiler")): int(row["per_window_head"]) for row in baseline}
    found, compared = [], 0
    for row in rows:
        was = before.get(tuple(str(row[key]) for key in (*_KEYS, "compiler")))
        if was is None:
            continue
        compared += 1
        now = int(row["per_window_head"])
        if now > was * (1 + most):
            found.append(f"{row['arch']} {row['kernel']} {row['case']}: {was} instructions became {now}")
    if not compared:
        known = ", ".join(sorted({str(row["compiler"]) for row in baseline})) or "none"
        raise NoBaseline(
            f"no count of {rows[0]['compiler']} to compare with, only of {known}: "
            f"python -m benchmarks.instructions --update adds the counts of this compiler to {BASELINE.name}"
        )
    return found


def merged(rows: Sequence[dict[str, Any]], baseline: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return ``baseline`` and ``rows``, sorted; ``rows`` replace baseline rows with the same keys and compiler."""

    def key(row: dict[str, Any]) -> tuple[str, ...]:
        return tuple(str(row[k]) for k in (*_KEYS, "compiler"))

    together = {key(row): row for row in (*baseline, *rows)}
    order = {(c.kernel, c.name): i for i, c in enumerate(CASES)}
    return sorted(
        together.values(),
        key=lambda r: (str(r["compiler"]), int(str(r["arch"])[3:]), order.get((r["kernel"], r["case"]), len(order))),
    )


def count(
    source: Path, archs: Sequence[str], cases: Sequence[Case], windows: int = _SWIN_T_WINDOWS
) -> Iterator[dict[str, Any]]:
    commit = commit_of(source)
    for arch in archs:
        for direction, dtype in dict.fromkeys((case.kernel, case.dtype) for case in cases):
            build = Build(source, arch, direction, dtype)
            for case in cases:
                if (case.kernel, case.dtype) == (direction, dtype):
                    yield measure(build, case, commit, windows)


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m benchmarks.instructions", description=__doc__.partition("\n")[0])
    main.add_argument("--source", type=Path, default=ROOT, help="the checkout whose csrc/ is counted")
    main.add_argument("--against", type=Path, help="another checkout, counted in the same run for comparison")
    main.add_argument("--arch", nargs="+", choices=ARCHITECTURES, help="default: all that the compiler supports")
    main.add_argument("--kernel", nargs="+", choices=("fwd", "bwd"), default=("fwd", "bwd"))
    which = main.add_mutually_exclusive_group()
    which.add_argument("--case", nargs="+", help="cases by name, such as 'w7 d32 bf16'; default: the hot ones")
    which.add_argument(
        "--all", action="store_true", help="every case that --list prints, which takes minutes for each architecture"
    )
    main.add_argument("--list", action="store_true", help="print the names of the cases")
    main.add_argument(
        "--windows", type=int, default=_SWIN_T_WINDOWS, help="number of windows times heads, for the derived times"
    )
    main.add_argument("--out", type=Path, help="write the rows to this CSV file")
    main.add_argument(
        "--update", action="store_true", help=f"write the rows to the baseline, {BASELINE.relative_to(ROOT)}"
    )
    return main


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    cases = [c for c in CASES if c.kernel in options.kernel]
    if options.list:
        print("\n".join(f"{c.kernel}  {c.name}" for c in cases))
        return 0
    if options.case is not None:
        unknown = {*options.case} - {c.name for c in cases}
        if unknown:
            parser().error(f"--case {', '.join(sorted(unknown))}: not among the names that --list prints")
        cases = [c for c in cases if c.name in options.case]
    elif not options.all:
        cases = [c for c in cases if c in HOT]
    before: dict[tuple[str, ...], dict[str, Any]] = {}
    rows = []
    try:
        archs = options.arch or architectures()
        if options.against is not None:
            for row in count(options.against.resolve(), archs, cases, options.windows):
                before[tuple(row[key] for key in _KEYS)] = row
        for row in count(options.source.resolve(), archs, cases, options.windows):
            rows.append(row)
            if options.out is not None:
                write(options.out, rows)
            if options.update:
                write(BASELINE, merged([row], read(BASELINE) if BASELINE.exists() else []))
            was = before.get(tuple(row[key] for key in _KEYS))
            print(
                f"{row['arch']:6s} {row['kernel']} {row['case']:24s} {row['per_window_head']:8d} instructions"
                + (
                    f" ({row['per_window_head'] / was['per_window_head']:.3f} of {was['per_window_head']})"
                    if was
                    else ""
                )
                + f", warps {row['per_warp']}; {row['registers']} registers, {row['shared_bytes']} bytes,"
                f" {row['warps_per_sm']} warps per multiprocessor"
            )
            print(
                "       "
                + ", ".join(f"{name} {row[name]}" for name in CLASSES if row[name])
                + f"\n       {DEVICES[row['arch']].name}, us: issue {row['issue_us']}, busiest scheduler"
                f" {row['scheduler_us']}, mufu {row['mufu_us']}, matrix {row['matrix_us']},"
                f" shared {row['shared_us']} ({row['shared_passes']} passes), bytes {row['bytes_us']}",
                flush=True,
            )
    except Missing as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
