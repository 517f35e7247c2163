"""Execute the machine code of a CUDA kernel on the CPU, and count the instructions.

The text that ``cuobjdump -sass`` prints is decoded once and executed warp by warp, with the registers and predicates of
each lane, the constant bank, and shared and global memory. So the counts are those of the path that the kernel takes
for the given arguments. Every issued warp instruction is counted, even if a predicate disables all its lanes; if lanes
have diverged, it is counted once per group. The passes of shared-memory accesses over the 32 banks are counted as well.
Time is not modelled.

The executor supports the instructions in the project's kernels. Any other instruction raises
:class:`UnknownInstruction` when it is executed. To support an instruction, write a function named after it and add the
function to ``_INSTRUCTIONS``.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

U32, U64, I32, I64, F32 = np.uint32, np.uint64, np.int32, np.int64, np.float32
LANES = 32
_PC_STEP = 16  # bytes of an instruction
_LOW = U64(0xFFFFFFFF)
SHARED_WINDOW = 0x7F00  # high word of a generic address in shared memory
_SHARED_BYTES = 256 * 1024

Array = np.ndarray
Value = Callable[["Warp"], Array]
Run = Callable[["Warp", "Array | None"], None]


class UnknownInstruction(Exception):
    """The executor does not support an instruction, or not with its modifiers and operands."""


class Fault(Exception):
    """The kernel accessed invalid memory, or its lanes cannot continue because they wait for each other."""


@dataclass
class Instruction:
    pc: int
    text: str
    guard: str  # "", or a predicate such as "!P0"
    name: str  # "IMAD.WIDE.U32"
    operands: list[str]

    @property
    def base(self) -> str:
        return self.name.partition(".")[0]

    @property
    def modifiers(self) -> list[str]:
        return self.name.split(".")[1:]


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Return the instructions of every kernel in the output of ``cuobjdump -sass`` for one architecture."""
    kernels: dict[str, list[Instruction]] = {}
    code: list[Instruction] = []
    for line in listing.splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            code = kernels.setdefault(match[1], [])
        elif match := re.match(
            r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P[0-9T]+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;", line
        ):
            text = f"{match[3]} {match[4]}".strip()
            operands = [x.strip() for x in match[4].split(",")] if match[4] else []
            code.append(Instruction(int(match[1], 16), text, match[2] or "", match[3], operands))
    return kernels


# --- State -----------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Group:
    """Lanes of a warp that execute the same instruction together."""

    pc: int
    lanes: Array
    waits: tuple[str, int] | None = None


class Warp:
    """The registers of a warp. Vector registers have one column per lane, uniform registers a single column."""

    def __init__(self, block: Block, index: int):
        self.block, self.index = block, index
        self.r = np.zeros((256, LANES), U32)
        self.p = np.zeros((8, LANES), bool)
        self.ur = np.zeros((256, 1), U32)
        self.up = np.zeros((8, 1), bool)
        self.p[7], self.up[7] = True, True
        threads = np.arange(LANES) + index * LANES
        self.thread = threads.astype(U32)
        self.alive = threads < block.threads
        self.groups = [Group(0, self.alive.copy())]
        self.barriers: dict[str, Array] = {}
        self.active, self.pc = self.alive, 0  # lanes and address of the instruction being executed
        self.counts = np.zeros(len(block.program.code), I64)
        self.passes = np.zeros(len(block.program.code), I64)


class Memory:
    """Global memory: byte arrays at artificial addresses. An access outside the arrays raises Fault."""

    def __init__(self) -> None:
        self.regions: list[tuple[int, int, Array]] = []
        self.next = 0x10_0000_0000

    def take(self, data: Array) -> int:
        """Assign an address to an array and return it. Kernels read and write the array in place."""
        assert data.flags.c_contiguous
        view = data.reshape(-1).view(np.uint8)
        address = self.next
        self.regions.append((address, address + view.size, view))
        self.next += -(-view.size // 0x1000) * 0x1000 + 0x1000
        return address

    def find(self, addresses: Array, size: int) -> tuple[Array, Array]:
        """Return the array that contains all of ``addresses``, and the offsets of the addresses in the array."""
        low, high = int(addresses.min()), int(addresses.max()) + size
        for start, end, data in self.regions:
            if start <= low and high <= end:
                return data, addresses.astype(I64) - start
        raise Fault(f"global memory at {low:#x} to {high:#x} belongs to no argument")

    def region(self, address: int) -> int:
        """Return the index of the last region that begins at or before an address."""
        return bisect.bisect_right(self.regions, address, key=lambda region: region[0]) - 1


class Block:
    """One thread block of a launch."""

    def __init__(self, program: Program, launch: Launch, memory: Memory, index: int):
        self.program, self.memory, self.launch = program, memory, launch
        self.index = index
        self.threads = launch.block[0] * launch.block[1] * launch.block[2]
        self.shared = np.zeros(_SHARED_BYTES, np.uint8)
        self.constants = launch.constants
        self.warps = [Warp(self, i) for i in range(-(-self.threads // LANES))]

    def run(self) -> None:
        while True:
            for warp in self.warps:
                _run_warp(self.program, warp)
            waiting = [g for w in self.warps for g in w.groups]
            if not waiting:
                return
            if any(g.waits is None or g.waits[0] != "BAR" for g in waiting):
                raise Fault(
                    f"lanes wait for others that never arrive: {[(hex(g.pc * _PC_STEP), g.waits) for g in waiting]}"
                )
            for group in waiting:
                group.waits = None


@dataclass
class Launch:
    """The configuration of a launch. ``constants`` is the constant bank: block and grid sizes, kernel parameters."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    constants: Array = field(repr=False)


class Program:
    """The decoded code of one kernel."""

    def __init__(self, code: Sequence[Instruction]):
        self.code = list(code)
        self.index = {instruction.pc: i for i, instruction in enumerate(self.code)}
        self.steps = [_Step(self, instruction, i) for i, instruction in enumerate(self.code)]


class _Step:
    __slots__ = ("control", "guard", "run", "uniform")

    def __init__(self, program: Program, instruction: Instruction, index: int):
        self.guard = predicate(instruction.guard) if instruction.guard else None
        self.uniform = instruction.guard.lstrip("!").startswith("U")
        self.control: Callable[[Warp, Group, Array], bool] | None = None
        self.run: Run | None = None
        if instruction.base in _CONTROL:
            self.control = _CONTROL[instruction.base](program, instruction, index)
            return

        # Decode on the first execution, because unreachable code may contain unsupported instructions.
        def decode(warp: Warp, mask: Array | None) -> None:
            self.run = _decode(instruction)
            self.run(warp, mask)

        self.run = decode


def _run_warp(program: Program, warp: Warp) -> None:
    """Run every group of lanes of a warp until it waits for other lanes or ends."""
    steps, counts = program.steps, warp.counts
    while True:
        group = next((g for g in warp.groups if g.waits is None), None)
        if group is None:
            return
        full = bool(group.lanes.all())
        while True:
            index = group.pc
            step = steps[index]
            counts[index] += 1
            warp.pc = index
            lanes = group.lanes
            mask: Array | None = None if full else lanes
            if step.guard is not None:
                on = step.guard(warp)
                if not on.all():
                    mask = lanes & on if not step.uniform or step.control else on
            if step.control is not None:
                if step.control(warp, group, lanes if mask is None else np.broadcast_to(mask, (LANES,))):
                    break
                full = bool(group.lanes.all())
            else:
                if mask is None or mask.any():  # addresses are undefined if the predicate disables all lanes
                    warp.active = lanes if mask is None else mask
                    assert step.run is not None
                    try:
                        step.run(warp, mask)
                    except Fault as error:
                        instruction = program.code[index]
                        raise Fault(f"{error}: {instruction.text} at {instruction.pc:#x}") from error
                group.pc += 1


# --- Control flow ----------------------------------------------------------------------------------------------------
# Each function returns True if the group stops because it waits, has ended or lets another group run first.


def _merge(warp: Warp, key: tuple[str, int], wanted: Array, pc: int) -> None:
    """Merge the groups that wait for ``key`` if they contain all live lanes in ``wanted``; continue at ``pc``."""
    waiting = [g for g in warp.groups if g.waits == key]
    together = np.logical_or.reduce([g.lanes for g in waiting]) if waiting else np.zeros(LANES, bool)
    if waiting and not (wanted & warp.alive & ~together).any():
        warp.groups = [g for g in warp.groups if g.waits != key]
        warp.groups.insert(0, Group(pc, together))


def _merge_all(program: Program, warp: Warp) -> None:
    """Merge groups that no longer have to wait because other lanes have ended or left their barrier."""
    for group in list(warp.groups):
        if group.waits is not None and group in warp.groups:
            kind, pc = group.waits
            if kind.startswith("B") and kind != "BAR":
                _merge(warp, group.waits, warp.barriers[kind], pc + 1)
            elif kind == "WARP":
                _merge(warp, group.waits, np.ones(LANES, bool), pc + 1)


def _bra(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    target = program.index[int(instruction.operands[-1], 16)]
    extra = [predicate(x) for x in instruction.operands[:-1] if re.fullmatch(r"!?U?P[0-9T]", x)]
    if instruction.modifiers and instruction.modifiers[0] in ("DIV", "CONV"):
        asked = value(instruction.operands[0])
        div = instruction.modifiers[0] == "DIV"

        def diverged(warp: Warp, group: Group, on: Array) -> bool:
            bits = int((group.lanes.astype(U64) << np.arange(LANES, dtype=U64)).sum())
            group.pc = target if (bits != int(asked(warp)[0])) == div else group.pc + 1
            return False

        return diverged

    unanimous = "U" in instruction.modifiers  # the branch is taken only if all lanes take it

    def run(warp: Warp, group: Group, on: Array) -> bool:
        taken = group.lanes & on
        for condition in extra:
            taken = taken & condition(warp)
        if not taken.any() or (unanimous and (group.lanes & ~taken).any()):
            group.pc += 1
            return False
        if not (group.lanes & ~taken).any():
            group.pc = target
            return False
        warp.groups.insert(warp.groups.index(group) + 1, Group(target, taken))
        group.lanes = group.lanes & ~taken
        group.pc += 1
        return False

    return run


def _exit(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    def run(warp: Warp, group: Group, on: Array) -> bool:
        warp.alive = warp.alive & ~(group.lanes & on)
        group.lanes = group.lanes & ~on
        if group.lanes.any():
            group.pc += 1
            return False
        warp.groups = [g for g in warp.groups if g is not group]
        _merge_all(program, warp)
        return True

    return run


def _bssy(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    name = instruction.operands[0]

    def run(warp: Warp, group: Group, on: Array) -> bool:
        warp.barriers[name] = group.lanes.copy()
        group.pc += 1
        return False

    return run


def _bsync(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    name = instruction.operands[0]

    def run(warp: Warp, group: Group, on: Array) -> bool:
        if not (warp.barriers[name] & warp.alive & ~group.lanes).any():
            group.pc += 1
            return False
        group.waits = (name, index)
        _merge(warp, group.waits, warp.barriers[name], index + 1)
        return True

    return run


def _break(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    name = instruction.operands[-1]

    def run(warp: Warp, group: Group, on: Array) -> bool:
        warp.barriers[name] = warp.barriers[name] & ~(group.lanes & on)
        group.pc += 1
        _merge_all(program, warp)
        return True  # a group that can now continue runs first

    return run


def _warpsync(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    def run(warp: Warp, group: Group, on: Array) -> bool:
        if not (warp.alive & ~group.lanes).any():
            group.pc += 1
            return False
        group.waits = ("WARP", index)
        _merge(warp, group.waits, np.ones(LANES, bool), index + 1)
        return True

    return run


def _bar(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    if instruction.modifiers[:1] != ["SYNC"] or instruction.operands != ["0x0"]:
        raise UnknownInstruction(f"{instruction.text}: barriers for part of a block are not modelled")

    def run(warp: Warp, group: Group, on: Array) -> bool:
        group.waits = ("BAR", index)
        group.pc += 1
        return True

    return run


def _ret(program: Program, instruction: Instruction, index: int) -> Callable[[Warp, Group, Array], bool]:
    where = value(instruction.operands[0].split()[0])

    def run(warp: Warp, group: Group, on: Array) -> bool:
        if not (group.lanes & on).any():
            group.pc += 1
            return False
        addresses = set(where(warp)[group.lanes & on].tolist())
        if len(addresses) != 1 or (group.lanes & ~on).any():
            raise Fault(f"{instruction.text}: lanes return to different places")
        group.pc = program.index[addresses.pop()]
        return False

    return run


_CONTROL: dict[str, Callable[[Program, Instruction, int], Callable[[Warp, Group, Array], bool]]] = {
    "BRA": _bra,
    "EXIT": _exit,
    "BSSY": _bssy,
    "BSYNC": _bsync,
    "BREAK": _break,
    "WARPSYNC": _warpsync,
    "BAR": _bar,
    "CALL": _bra,  # a separate instruction stores the return address
    "RET": _ret,
}


# --- Operands --------------------------------------------------------------------------------------------------------


def _register(text: str) -> tuple[str, int] | None:
    """Parse a register name as ("r" or "ur", number), or return None; the zero registers have number 255."""
    match = re.fullmatch(r"(U?)R(\d+|Z)", text)
    if match is None:
        return None
    return ("ur" if match[1] else "r"), 255 if match[2] == "Z" else int(match[2])


def predicate(text: str) -> Value:
    match = re.fullmatch(r"(!?)(U?)P(\d|T)", text)
    if match is None:
        raise UnknownInstruction(f"{text} is not a predicate")
    number = 7 if match[3] == "T" else int(match[3])
    uniform, negated = bool(match[2]), bool(match[1])
    if negated:
        return (lambda w: ~w.up[number]) if uniform else (lambda w: ~w.p[number])
    return (lambda w: w.up[number]) if uniform else (lambda w: w.p[number])


def _constant(text: str) -> Callable[[Warp, int], Array] | None:
    """Return a function that reads a constant operand such as c[0x0][R4+0x10], or None for another kind of operand."""
    match = re.fullmatch(r"c\[0x0\]\[(?:(U?R(?:\d+|Z))\+?)?(-?0x[0-9a-f]+)?\]", text)
    if match is None:
        return None
    offset = int(match[2] or "0", 16)
    base = value(match[1]) if match[1] else None

    def read(w: Warp, size: int) -> Array:
        at = np.array([offset]) if base is None else base(w).astype(I64) + offset
        return w.block.constants[at[:, None] + np.arange(size)]

    return read


def _split(text: str) -> tuple[str, bool, bool, bool, str]:
    """Split an operand, such as -|R4|.reuse or R5.H0_H0, into (body, negated, absolute, inverted, suffix)."""
    text = text.replace(".reuse", "")
    negated = text.startswith("-") and not re.fullmatch(r"-[0-9.INQ+].*", text)
    inverted = text.startswith("~")
    text = text[1:] if negated or inverted else text
    absolute = text.startswith("|")
    text = text.strip("|")
    body, _, suffix = text.partition(".") if re.match(r"U?R", text) else (text, "", "")
    return body, negated, absolute, inverted, suffix


def _bits(body: str) -> Value:
    register = _register(body)
    if register is not None:
        bank, number = register
        return (lambda w: w.ur[number]) if bank == "ur" else (lambda w: w.r[number])
    constant = _constant(body)
    if constant is not None:
        return lambda w: constant(w, 4).copy().view(U32)[:, 0]
    if body == "SRZ":
        return lambda w: w.ur[255]
    if re.fullmatch(r"-?0x[0-9a-f]+", body):
        fixed = np.array([int(body, 16) & 0xFFFFFFFF], U32)
        return lambda w: fixed
    raise UnknownInstruction(f"operand {body}")


def value(text: str) -> Value:
    """Return a function that reads a 32-bit integer operand."""
    body, negated, absolute, inverted, suffix = _split(text)
    get = _bits(body)
    if absolute or suffix not in ("", "H0_H0"):
        raise UnknownInstruction(f"integer operand {text}")
    if negated:
        return lambda w: U32(0) - get(w) if get(w).ndim == 0 else np.negative(get(w))
    if inverted:
        return lambda w: ~get(w)
    return get


def value64(text: str) -> Value:
    """Return a function that reads a 64-bit integer operand, such as a pair of registers."""
    body, negated, _, inverted, _ = _split(text)
    register = _register(body)
    constant = _constant(body)
    get: Value
    if register is not None:
        bank, number = register
        if number == 255:
            get = lambda w: np.zeros(1, U64)  # noqa: E731
        else:

            def get(w: Warp) -> Array:
                file = getattr(w, bank)
                return file[number].astype(U64) | (file[number + 1].astype(U64) << U64(32))

    elif constant is not None:
        get = lambda w: constant(w, 8).copy().view(U64)[:, 0]  # noqa: E731
    else:
        fixed = np.array([int(body, 16) & 0xFFFFFFFFFFFFFFFF], U64)
        get = lambda w: fixed  # noqa: E731
    if negated:
        return lambda w: np.negative(get(w))
    if inverted:
        return lambda w: ~get(w)
    return get


def real(text: str) -> Value:
    """Return a function that reads a float32 operand."""
    body, negated, absolute, _, suffix = _split(text)
    if re.fullmatch(r"[-+]?(\d.*|INF|QNAN)", body) and not body.startswith(("0x", "-0x")):
        number = np.array([float(body.replace("QNAN", "nan"))]).astype(F32)
        get: Value = lambda w: number  # noqa: E731
    else:
        bits = _bits(body)
        get = lambda w: bits(w).view(F32)  # noqa: E731
    if suffix:
        raise UnknownInstruction(f"float operand {text}")
    if absolute:
        inner = get
        get = lambda w: np.abs(inner(w))  # noqa: E731
    if negated:
        outer = get
        return lambda w: np.negative(outer(w))
    return get


def _put(w: Warp, bank: str, number: int, new: Array, mask: Array | None) -> None:
    if number == 255:
        return
    if bank == "ur":
        if mask is None or mask.any():
            w.ur[number] = new
    elif mask is None:
        w.r[number] = new
    else:
        np.copyto(w.r[number], new, where=mask)


def target(text: str, count: int = 1) -> Callable[[Warp, Array, Array | None], None]:
    """Return a function that writes a register, or ``count`` registers from an array with one row per register."""
    register = _register(text.replace(".reuse", ""))
    if register is None:
        raise UnknownInstruction(f"destination {text}")
    bank, number = register
    if count == 1:
        return lambda w, new, mask: _put(w, bank, number, new, mask)

    def write(w: Warp, new: Array, mask: Array | None) -> None:
        if number != 255:
            for i in range(count):
                _put(w, bank, number + i, new[i], mask)

    return write


def target64(text: str) -> Callable[[Warp, Array, Array | None], None]:
    write = target(text, 2)
    return lambda w, new, mask: write(w, np.stack([(new & _LOW).astype(U32), (new >> U64(32)).astype(U32)]), mask)


def target_predicate(text: str) -> Callable[[Warp, Array, Array | None], None]:
    match = re.fullmatch(r"(U?)P(\d|T)", text)
    if match is None:
        raise UnknownInstruction(f"destination {text}")
    if match[2] == "T":
        return lambda w, new, mask: None
    number, uniform = int(match[2]), bool(match[1])

    def write(w: Warp, new: Array, mask: Array | None) -> None:
        if uniform:
            if mask is None or mask.any():
                w.up[number] = new
        elif mask is None:
            w.p[number] = new
        else:
            np.copyto(w.p[number], new, where=mask)

    return write


def _is_predicate(text: str) -> bool:
    return re.fullmatch(r"!?U?P[0-9T]", text) is not None


def _leading(operands: Sequence[str], start: int) -> tuple[list[str], list[str]]:
    """Return the consecutive predicates that begin at operand ``start``, and all operands after them."""
    end = start
    while end < len(operands) and _is_predicate(operands[end]):
        end += 1
    return list(operands[start:end]), list(operands[end:])


# --- Integer instructions --------------------------------------------------------------------------------------------


def _term(text: str) -> Value:
    """Return a function that reads a 32-bit addend, widened to 64 bits so that bit 32 of a sum is the carry.

    A negated addend is 2**32 minus its value, which produces the correct carry.
    """
    body, negated, _, inverted, suffix = _split(text)
    if suffix:
        raise UnknownInstruction(f"integer operand {text}")
    get = _bits(body)
    if negated:
        return lambda w: U64(1 << 32) - get(w).astype(U64)
    if inverted:
        return lambda w: (~get(w)).astype(U64)
    return lambda w: get(w).astype(U64)


def iadd3(i: Instruction) -> Run:
    if "64" in i.modifiers:
        return iadd(i)
    carries, rest = _leading(i.operands, 1)
    write = target(i.operands[0])
    outs = [target_predicate(x) for x in carries]
    terms = [_term(x) for x in rest[:3]]
    ins = [predicate(x) for x in rest[3:]] if "X" in i.modifiers else []
    if not ins and {*carries} <= {"PT", "UPT"}:
        a, b, c = (value(x) for x in rest[:3])
        return lambda w, mask: write(w, a(w) + b(w) + c(w), mask)

    def run(w: Warp, mask: Array | None) -> None:
        total = terms[0](w) + terms[1](w) + terms[2](w)
        for x in ins:
            total = total + x(w)
        write(w, (total & _LOW).astype(U32), mask)
        for number, out in enumerate(outs):
            out(w, (total >> U64(32)) > U64(number), mask)

    return run


def iadd(i: Instruction) -> Run:
    _, rest = _leading(i.operands, 1)
    if "64" in i.modifiers:
        write64, terms64 = target64(i.operands[0]), [value64(x) for x in rest]
        return lambda w, mask: write64(w, sum((t(w) for t in terms64[1:]), terms64[0](w)), mask)
    write, terms = target(i.operands[0]), [value(x) for x in rest]
    return lambda w, mask: write(w, sum((t(w) for t in terms[1:]), terms[0](w)), mask)


def imad(i: Instruction) -> Run:
    carries, rest = _leading(i.operands, 1)
    signed = "U32" not in i.modifiers
    outs = [target_predicate(x) for x in carries]
    if "WIDE" in i.modifiers or "HI" in i.modifiers:
        a, b, c = value(rest[0]), value(rest[1]), value64(rest[2])
        ins = [predicate(x) for x in rest[3:]] if "X" in i.modifiers else []
        high = "HI" in i.modifiers
        write = target(i.operands[0]) if high else target64(i.operands[0])

        def run_wide(w: Warp, mask: Array | None) -> None:
            if signed:
                product = (a(w).view(I32).astype(I64) * b(w).view(I32).astype(I64)).view(U64)
            else:
                product = a(w).astype(U64) * b(w).astype(U64)
            total = product + c(w)
            carry = total < product
            for x in ins:
                total = total + x(w)
            write(w, (total >> U64(32)).astype(U32) if high else total, mask)
            for out in outs:
                out(w, carry, mask)

        return run_wide
    x, y, z = value(rest[0]), value(rest[1]), _term(rest[2])
    ins = [predicate(p) for p in rest[3:]] if "X" in i.modifiers else []
    write32 = target(i.operands[0])
    if not ins and not outs:
        addend = value(rest[2])
        return lambda w, mask: write32(w, x(w) * y(w) + addend(w), mask)

    def run(w: Warp, mask: Array | None) -> None:
        total = (x(w).astype(U64) * y(w).astype(U64) & _LOW) + z(w)
        for p in ins:
            total = total + p(w)
        write32(w, (total & _LOW).astype(U32), mask)
        for out in outs:
            out(w, (total >> U64(32)) > U64(0), mask)

    return run


def lea(i: Instruction) -> Run:
    carries, rest = _leading(i.operands, 1)
    write = target(i.operands[0])
    outs = [target_predicate(x) for x in carries]
    high, extended = "HI" in i.modifiers, "SX32" in i.modifiers
    a, b = value(rest[0]), _term(rest[1])
    top = value(rest[2]) if high and not extended else None
    tail = rest[3:] if top is not None else rest[2:]
    shift = U64(int(tail[0], 16)) if tail and not _is_predicate(tail[0]) else U64(0)
    ins = [predicate(x) for x in tail if _is_predicate(x)] if "X" in i.modifiers else []

    def run(w: Warp, mask: Array | None) -> None:
        wide = a(w).astype(U64)
        if extended:
            wide = a(w).view(I32).astype(I64).view(U64)
        elif top is not None:
            wide = wide | (top(w).astype(U64) << U64(32))
        shifted = wide << shift
        total = ((shifted >> U64(32)) if high else (shifted & _LOW)) + b(w)
        for x in ins:
            total = total + x(w)
        write(w, (total & _LOW).astype(U32), mask)
        for out in outs:
            out(w, (total >> U64(32)) > U64(0), mask)

    return run


def shf(i: Instruction) -> Run:
    low, amount, high = (value(x) for x in i.operands[1:4])
    write = target(i.operands[0])
    left, wide, upper = "L" in i.modifiers, "U64" in i.modifiers or "S64" in i.modifiers, "HI" in i.modifiers
    signed = "S32" in i.modifiers or "S64" in i.modifiers
    most, wrap = U64(63 if wide else 32), "W" in i.modifiers

    def run(w: Warp, mask: Array | None) -> None:
        both = low(w).astype(U64) | (high(w).astype(U64) << U64(32))
        by = amount(w).astype(U64)
        by = by & (most if wide else U64(31)) if wrap else np.minimum(by, most)
        if left:
            moved = both << by
        elif signed:
            moved = (both.view(I64) >> by.astype(I64)).view(U64)
        else:
            moved = both >> by
        write(w, ((moved >> U64(32)) if upper else (moved & _LOW)).astype(U32), mask)

    return run


def _lut(table: int, a: Array, b: Array, c: Array) -> Array:
    """Apply a bitwise function of three inputs: each bit of the result is bit 4a + 2b + c of the truth table."""
    total: Array | None = None
    for row in range(8):
        if table >> row & 1:
            term = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            total = term if total is None else total | term
    return a & ~a if total is None else total


_FAST_LUT: dict[int, Callable[[Array, Array, Array], Array]] = {
    0xC0: lambda a, b, c: a & b,
    0xFC: lambda a, b, c: a | b,
    0x3C: lambda a, b, c: a ^ b,
    0xFE: lambda a, b, c: a | b | c,
    0x80: lambda a, b, c: a & b & c,
    0x96: lambda a, b, c: a ^ b ^ c,
    0x33: lambda a, b, c: ~b,
    0xF8: lambda a, b, c: a | (b & c),
}


def lop3(i: Instruction) -> Run:
    flags = [target_predicate(i.operands[0])] if _is_predicate(i.operands[0]) else []
    rest = i.operands[len(flags) :]
    write = target(rest[0])
    a, b, c = (value(x) for x in rest[1:4])
    table = int(rest[4], 16)
    apply = _FAST_LUT.get(table) or (lambda x, y, z: _lut(table, x, y, z))
    combine = predicate(rest[5])
    both = "PAND" in i.modifiers

    def run(w: Warp, mask: Array | None) -> None:
        result = apply(a(w), b(w), c(w))
        write(w, result, mask)
        for out in flags:
            out(w, (result != 0) & combine(w) if both else (result != 0) | combine(w), mask)

    return run


def plop3(i: Instruction) -> Run:
    outs = [target_predicate(x) for x in i.operands[:2]]
    a, b, c = (predicate(x) for x in i.operands[2:5])
    tables = [int(x, 16) for x in i.operands[5:7]]

    def run(w: Warp, mask: Array | None) -> None:
        x, y, z = a(w), b(w), c(w)
        for out, table in zip(outs, tables, strict=True):
            out(w, _lut(table, x, y, z), mask)

    return run


_COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "EQ": np.equal,
    "NE": np.not_equal,
    "LT": np.less,
    "LE": np.less_equal,
    "GT": np.greater,
    "GE": np.greater_equal,
}
_JOIN: dict[str, Callable[[Array, Array], Array]] = {
    "AND": np.logical_and,
    "OR": np.logical_or,
    "XOR": np.logical_xor,
}


def isetp(i: Instruction) -> Run:
    compare, join = _COMPARE[i.modifiers[0]], next(_JOIN[m] for m in i.modifiers if m in _JOIN)
    wide = "S64" in i.modifiers or "U64" in i.modifiers
    signed = "U32" not in i.modifiers and "U64" not in i.modifiers
    get = value64 if wide else value
    first, second = target_predicate(i.operands[0]), target_predicate(i.operands[1])
    a, b, c = get(i.operands[2]), get(i.operands[3]), predicate(i.operands[4])
    lower = predicate(i.operands[5]) if "EX" in i.modifiers else None
    kind = i.modifiers[0]

    def run(w: Warp, mask: Array | None) -> None:
        x, y = a(w), b(w)
        if signed:
            x, y = (x.view(I64), y.view(I64)) if wide else (x.view(I32), y.view(I32))
        if lower is None:
            result = compare(x, y)
        elif kind == "NE":
            result = (x != y) | lower(w)
        elif kind == "EQ":
            result = (x == y) & lower(w)
        else:
            result = (np.less if kind[0] == "L" else np.greater)(x, y) | ((x == y) & lower(w))
        other = c(w)
        first(w, join(result, other), mask)
        second(w, join(~result, other), mask)

    return run


def sel(i: Instruction) -> Run:
    wide = "64" in i.modifiers
    write = target64(i.operands[0]) if wide else target(i.operands[0])
    get = value64 if wide else value
    a, b, p = get(i.operands[1]), get(i.operands[2]), predicate(i.operands[3])
    return lambda w, mask: write(w, np.where(p(w), a(w), b(w)), mask)


def _minimum(i: Instruction, add: bool, count: int) -> Run:
    write = target(i.operands[0])
    outs, rest = _leading(i.operands, 1)
    if {*outs} - {"PT", "UPT"}:
        raise UnknownInstruction(i.text)
    values, least = [value(x) for x in rest[:count]], predicate(rest[count])
    signed = "U32" not in i.modifiers

    def run(w: Warp, mask: Array | None) -> None:
        got = [x(w) for x in values]
        if add:
            got = [got[0] + got[1], got[2]]
        if signed:
            got = [x.view(I32) for x in got]
        low, high = got[0], got[0]
        for x in got[1:]:
            low, high = np.minimum(low, x), np.maximum(high, x)
        chosen = np.where(least(w), low, high)
        write(w, chosen.view(U32) if signed else chosen, mask)

    return run


def imnmx(i: Instruction) -> Run:
    return _minimum(i, False, 2)


def vimnmx3(i: Instruction) -> Run:
    return _minimum(i, False, 3)


def viaddmnmx(i: Instruction) -> Run:
    return _minimum(i, True, 3)


def iabs(i: Instruction) -> Run:
    write, a = target(i.operands[0]), value(i.operands[1])
    return lambda w, mask: write(w, np.abs(a(w).view(I32)).view(U32), mask)


def popc(i: Instruction) -> Run:
    write, a = target(i.operands[0]), value(i.operands[1])
    return lambda w, mask: write(w, np.array([int(x).bit_count() for x in a(w)], U32), mask)


def flo(i: Instruction) -> Run:
    """Find the index of the highest set bit, or count the zeros above it (.SH)."""
    write, a, leading = target(i.operands[0]), value(i.operands[-1]), "SH" in i.modifiers
    if "U32" not in i.modifiers:
        raise UnknownInstruction(i.text)

    def run(w: Warp, mask: Array | None) -> None:
        highest = np.array([int(x).bit_length() - 1 for x in a(w)], I64)
        write(w, np.where(highest < 0, 0xFFFFFFFF, 31 - highest if leading else highest).astype(U32), mask)

    return run


def brev(i: Instruction) -> Run:
    write, a = target(i.operands[0]), value(i.operands[1])
    return lambda w, mask: write(w, np.array([int(f"{x:032b}"[::-1], 2) for x in a(w)], U32), mask)


def prmt(i: Instruction) -> Run:
    """Select four of the eight bytes of two operands, or copies of their sign bits."""
    write = target(i.operands[0])
    a, selector, b = (value(x) for x in i.operands[1:4])
    if len(i.modifiers) > 0:
        raise UnknownInstruction(i.text)

    def run(w: Warp, mask: Array | None) -> None:
        both, chosen = a(w).astype(U64) | (b(w).astype(U64) << U64(32)), selector(w).astype(U64)
        result = np.zeros(np.broadcast_shapes(both.shape, chosen.shape), U64)
        for byte in range(4):
            nibble = (chosen >> U64(4 * byte)) & U64(15)
            got = (both >> (U64(8) * (nibble & U64(7)))) & U64(0xFF)
            got = np.where(nibble & U64(8), np.where(got & U64(0x80), U64(0xFF), U64(0)), got)
            result = result | (got << U64(8 * byte))
        write(w, result.astype(U32), mask)

    return run


def p2r(i: Instruction) -> Run:
    write, other, bits = target(i.operands[0]), value(i.operands[2]), int(i.operands[3], 16)

    def run(w: Warp, mask: Array | None) -> None:
        packed = sum((w.p[n].astype(U32) << U32(n) for n in range(7) if bits >> n & 1), np.zeros(LANES, U32))
        write(w, (other(w) & ~U32(bits)) | packed, mask)

    return run


def r2p(i: Instruction) -> Run:
    body, _, byte = i.operands[1].replace(".reuse", "").partition(".")
    source, bits, shift = value(body), int(i.operands[2], 16), U32(8 * int(byte[1:] or 0) if byte else 0)

    def run(w: Warp, mask: Array | None) -> None:
        got = source(w) >> shift
        for n in range(7):
            if bits >> n & 1:
                target_predicate(f"P{n}")(w, (got >> U32(n) & U32(1)) != 0, mask)

    return run


def mov(i: Instruction) -> Run:
    if "64" in i.modifiers:
        write64, get64 = target64(i.operands[0]), value64(i.operands[1])
        return lambda w, mask: write64(w, get64(w), mask)
    write, get = target(i.operands[0]), value(i.operands[1])
    return lambda w, mask: write(w, get(w), mask)


def r2ur(i: Instruction) -> Run:
    write, get = target(i.operands[0]), value(i.operands[-1])
    if len(i.operands) != 2:
        raise UnknownInstruction(i.text)

    def run(w: Warp, mask: Array | None) -> None:
        got = np.broadcast_to(get(w), (LANES,))
        lane = int(np.flatnonzero(w.active)[0]) if w.active.any() else 0
        write(w, got[lane : lane + 1], None)

    return run


def s2r(i: Instruction) -> Run:
    name = i.operands[1]
    width = 2 if i.base == "CS2R" and "32" not in i.modifiers else 1
    write = target(i.operands[0], width)

    def special(w: Warp) -> Array:
        launch, number = w.block.launch, w.block.index
        x, y, _ = launch.block
        if name.startswith("SR_TID."):
            of = {"X": w.thread % U32(x), "Y": w.thread // U32(x) % U32(y), "Z": w.thread // U32(x * y)}
            return of[name[-1]]
        if name.startswith("SR_CTAID."):
            columns, rows, _ = launch.grid
            at = {"X": number % columns, "Y": number // columns % rows, "Z": number // (columns * rows)}
            return np.array([at[name[-1]]], U32)
        fixed = {"SR_CgaCtaId": 0, "SR_SWINHI": SHARED_WINDOW, "SRZ": 0}
        if name in fixed:
            return np.array([fixed[name]], U32)
        if name == "SR_LANEID":
            return np.arange(LANES, dtype=U32)
        raise UnknownInstruction(f"{i.text}: special register")

    def run(w: Warp, mask: Array | None) -> None:
        got = special(w)
        write(w, got if width == 1 else np.stack([got, np.zeros_like(got)]), mask)

    return run


# --- Float instructions ----------------------------------------------------------------------------------------------


def _round(exact: Array, modifiers: Sequence[str]) -> Array:
    """Round float64 values to float32 in the direction given by the modifiers."""
    near = exact.astype(F32)
    if "RM" in modifiers or "RP" in modifiers or "RZ" in modifiers:
        back = near.astype(np.float64)
        down = "RM" in modifiers or ("RZ" in modifiers and bool(np.all(exact >= 0)))
        too_far = back > exact if down else back < exact
        near = np.where(too_far, np.nextafter(near, F32(-np.inf if down else np.inf)), near)
    if "SAT" in modifiers:
        near = np.clip(np.nan_to_num(near, nan=0.0), F32(0), F32(1))
    return near


def _float(i: Instruction, function: Callable[..., Array], count: int) -> Run:
    write, terms = target(i.operands[0]), [real(x) for x in i.operands[1 : 1 + count]]
    modifiers = [m for m in i.modifiers if m in ("RM", "RP", "RZ", "SAT")]
    exact = bool(modifiers) or function is _fma

    def run(w: Warp, mask: Array | None) -> None:
        got = [t(w) for t in terms]
        if exact:
            result = _round(function(*(x.astype(np.float64) for x in got)), modifiers)
        else:
            result = function(*got)
        write(w, result.view(U32), mask)

    return run


def _fma(a: Array, b: Array, c: Array) -> Array:
    return a * b + c


def fadd(i: Instruction) -> Run:
    return _float(i, np.add, 2)


def fmul(i: Instruction) -> Run:
    return _float(i, np.multiply, 2)


def ffma(i: Instruction) -> Run:
    return _float(i, _fma, 3)


def fmnmx(i: Instruction) -> Run:
    count = 3 if i.base.endswith("3") else 2
    write, terms = target(i.operands[0]), [real(x) for x in i.operands[1 : 1 + count]]
    least = predicate(i.operands[1 + count])

    def run(w: Warp, mask: Array | None) -> None:
        got = [t(w) for t in terms]
        low, high = got[0], got[0]
        for x in got[1:]:
            low, high = np.fmin(low, x), np.fmax(high, x)
        write(w, np.where(least(w), low, high).view(U32), mask)

    return run


def fsel(i: Instruction) -> Run:
    write, a, b, p = target(i.operands[0]), real(i.operands[1]), real(i.operands[2]), predicate(i.operands[3])
    return lambda w, mask: write(w, np.where(p(w), a(w), b(w)).view(U32), mask)


def fsetp(i: Instruction) -> Run:
    kind = i.modifiers[0]
    join = next(_JOIN[m] for m in i.modifiers if m in _JOIN)
    double = i.base == "DSETP"
    get: Callable[[str], Value]
    if double:
        get = lambda text: (lambda v: lambda w: v(w).view(np.float64))(value64(text))  # noqa: E731
    else:
        get = real
    first, second = target_predicate(i.operands[0]), target_predicate(i.operands[1])
    a, b, c = get(i.operands[2]), get(i.operands[3]), predicate(i.operands[4])

    def run(w: Warp, mask: Array | None) -> None:
        x, y, other = a(w), b(w), c(w)
        if kind == "NAN":
            result = np.isnan(x) | np.isnan(y)
        elif kind == "NUM":
            result = ~(np.isnan(x) | np.isnan(y))
        else:
            result = _COMPARE[kind[:2]](x, y)
            unordered = np.isnan(x) | np.isnan(y)
            result = result | unordered if kind.endswith("U") else result & ~unordered
        first(w, join(result, other), mask)
        second(w, join(~result, other), mask)

    return run


_MUFU: dict[str, Callable[[Array], Array]] = {
    "EX2": np.exp2,
    "RCP": lambda x: F32(1) / x,
    "RSQ": lambda x: F32(1) / np.sqrt(x),
    "SQRT": np.sqrt,
    "LG2": np.log2,
}


def mufu(i: Instruction) -> Run:
    if i.modifiers[0] not in _MUFU or len(i.modifiers) > 1:
        raise UnknownInstruction(i.text)
    write, a, function = target(i.operands[0]), real(i.operands[1]), _MUFU[i.modifiers[0]]
    return lambda w, mask: write(w, function(a(w)).astype(F32).view(U32), mask)


def i2f(i: Instruction) -> Run:
    write, a = target(i.operands[0]), value(i.operands[1])
    signed = not any(m.startswith("U") for m in i.modifiers)
    modifiers = i.modifiers

    def run(w: Warp, mask: Array | None) -> None:
        exact = a(w).view(I32).astype(np.float64) if signed else a(w).astype(np.float64)
        write(w, _round(exact, modifiers).view(U32), mask)

    return run


def f2i(i: Instruction) -> Run:
    write, a, signed = target(i.operands[0]), real(i.operands[1]), "U32" not in i.modifiers
    how = next(
        (f for m, f in (("TRUNC", np.trunc), ("FLOOR", np.floor), ("CEIL", np.ceil)) if m in i.modifiers), np.rint
    )
    low, high = (-(2**31), 2**31 - 1) if signed else (0, 2**32 - 1)

    def run(w: Warp, mask: Array | None) -> None:
        whole = np.clip(np.nan_to_num(how(a(w).astype(np.float64)), nan=0.0), low, high)
        write(w, whole.astype(I64).astype(U32), mask)

    return run


def _bfloat16(x: Array) -> Array:
    """Return the bits of float32 values rounded to bfloat16."""
    bits = x.view(U32)
    rounded = ((bits.astype(U64) + U64(0x7FFF) + ((bits >> U32(16)) & U32(1)).astype(U64)) >> U64(16)).astype(U32)
    return np.where(np.isnan(x), U32(0x7FFF), rounded & U32(0xFFFF)).astype(U32)


def f2fp(i: Instruction) -> Run:
    if "PACK_AB" not in i.modifiers:
        raise UnknownInstruction(i.text)
    write, high, low = target(i.operands[0]), real(i.operands[1]), real(i.operands[2])
    if "BF16" in i.modifiers:
        narrow = _bfloat16
    else:
        narrow = lambda x: x.astype(np.float16).view(np.uint16).astype(U32)  # noqa: E731
    return lambda w, mask: write(w, (narrow(high(w)) << U32(16)) | narrow(low(w)), mask)


def f2f(i: Instruction) -> Run:
    if i.modifiers[:2] == ["F64", "F32"]:
        write64, a = target64(i.operands[0]), real(i.operands[1])
        return lambda w, mask: write64(w, a(w).astype(np.float64).view(U64), mask)
    raise UnknownInstruction(i.text)


def hfma2(i: Instruction) -> Run:
    """Load two 16-bit constants by adding them to -RZ * RZ, as compilers do; other forms are not supported."""
    if [x.replace(".reuse", "") for x in i.operands[1:3]] != ["-RZ", "RZ"] or len(i.operands) != 5:
        raise UnknownInstruction(i.text)
    write = target(i.operands[0])
    high, low = (np.array([float(x)]).astype(np.float16).view(np.uint16).astype(U32) for x in i.operands[3:])
    if "BF16_V2" in i.modifiers:
        high, low = (_bfloat16(np.array([float(x)]).astype(F32)) for x in i.operands[3:])
    packed = (high << U32(16)) | low
    return lambda w, mask: write(w, packed, mask)


# --- Across lanes ----------------------------------------------------------------------------------------------------


def shfl(i: Instruction) -> Run:
    done, write = target_predicate(i.operands[0]), target(i.operands[1])
    a, b, c = (value(x) for x in i.operands[2:5])
    kind = i.modifiers[0]

    def run(w: Warp, mask: Array | None) -> None:
        lane, by, control = np.arange(LANES), b(w).astype(I64) & 31, c(w).astype(I64)
        segment = (control >> 8) & 31
        low = lane & segment
        high = low | (control & 31 & ~segment)
        if kind == "BFLY":
            source = lane ^ by
        elif kind == "IDX":
            source = low | (by & ~segment)
        elif kind == "UP":
            source = lane - by
        else:
            source = lane + by
        valid = source >= low if kind == "UP" else source <= high
        got = np.broadcast_to(a(w), (LANES,))[np.where(valid, source, lane)]
        write(w, got, mask)
        done(w, valid, mask)

    return run


def vote(i: Instruction) -> Run:
    """Execute VOTE.ANY P0, P1 (is P1 true in any lane?) or VOTE.ANY R4, PT, P1 (bit mask of the lanes with P1)."""
    ballot = None if _is_predicate(i.operands[0]) else target(i.operands[0])
    out = target_predicate(i.operands[0 if ballot is None else 1])
    asked, kind = predicate(i.operands[-1]), i.modifiers[0]
    uniform = i.base.startswith("VOTEU")

    def run(w: Warp, mask: Array | None) -> None:
        got = np.broadcast_to(asked(w), (LANES,))
        here = got[np.broadcast_to(w.active, (LANES,))]
        result = here.any() if kind == "ANY" else here.all() if kind == "ALL" else here.all() or not here.any()
        out(w, np.array([result]), None if uniform else mask)
        if ballot is not None:
            bits = int(((got & w.active).astype(U64) << np.arange(LANES, dtype=U64)).sum())
            ballot(w, np.array([bits], U32), None if uniform else mask)

    return run


def _halves(registers: Array, kind: str) -> Array:
    """Convert registers with two 16-bit elements, (n, 32), to floats (n, 32, 2), the low element first."""
    pair = np.stack([registers & U32(0xFFFF), registers >> U32(16)], -1)
    if kind == "BF16":
        return (pair << U32(16)).view(F32)
    return pair.astype(np.uint16).view(np.float16).astype(F32)


def hmma(i: Instruction) -> Run:
    """Compute D = A B + C for a warp, with fragments as in csrc/kernels/common/ptx.cuh."""
    depth = {"16816": 16, "1688": 8, "1684": 4}.get(i.modifiers[0])
    tf32 = "TF32" in i.modifiers
    kind = "BF16" if "BF16" in i.modifiers else "TF32" if tf32 else "F16"
    if depth is None or "F32" not in i.modifiers:
        raise UnknownInstruction(i.text)
    a_count, b_count = (depth // 2, depth // 4) if tf32 else (depth // 4, depth // 8)
    write = target(i.operands[0], 4)
    numbers = []
    for text in i.operands[1:4]:
        register = _register(text.replace(".reuse", ""))
        if register is None or register[0] != "r":
            raise UnknownInstruction(i.text)
        numbers.append(register[1])
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4

    def rows(w: Warp, number: int, count: int) -> Array:
        return np.zeros((count, LANES), U32) if number == 255 else w.r[number : number + count]

    def run(w: Warp, mask: Array | None) -> None:
        a_bits, b_bits = rows(w, numbers[0], a_count), rows(w, numbers[1], b_count)
        c = rows(w, numbers[2], 4).view(F32)
        if not (a_bits.any() and b_bits.any()):
            write(w, c.view(U32).copy(), mask)
            return
        a, b = np.zeros((16, depth), F32), np.zeros((depth, 8), F32)
        if tf32:
            for n in range(a_count):
                a[g + 8 * (n % 2), t + 4 * (n // 2)] = (a_bits[n] & ~U32(0x1FFF)).view(F32)
            for n in range(b_count):
                b[t + 4 * n, g] = (b_bits[n] & ~U32(0x1FFF)).view(F32)
        else:
            a_pairs, b_pairs = _halves(a_bits, kind), _halves(b_bits, kind)
            for n in range(a_count):
                for e in range(2):
                    a[g + 8 * (n % 2), 2 * t + e + 8 * (n // 2)] = a_pairs[n, :, e]
            for n in range(b_count):
                for e in range(2):
                    b[2 * t + e + 8 * n, g] = b_pairs[n, :, e]
        d = a @ b
        out = np.stack([d[g, 2 * t], d[g, 2 * t + 1], d[g + 8, 2 * t], d[g + 8, 2 * t + 1]]) + c
        write(w, out.astype(F32).view(U32), mask)

    return run


def _transposed(matrix: Array) -> Array:
    """Transpose an 8 x 8 matrix of 16-bit elements that is distributed over the lanes of a warp."""
    lane = np.arange(LANES)
    g, t = lane // 4, lane % 4
    full = np.zeros((8, 8), U32)
    full[g, 2 * t], full[g, 2 * t + 1] = matrix & U32(0xFFFF), matrix >> U32(16)
    return full[2 * t, g] | (full[2 * t + 1, g] << U32(16))


def movm(i: Instruction) -> Run:
    if i.modifiers != ["16", "MT88"]:
        raise UnknownInstruction(i.text)
    write, a = target(i.operands[0]), value(i.operands[1])
    return lambda w, mask: write(w, _transposed(a(w)), mask)


# --- Memory ----------------------------------------------------------------------------------------------------------

_TERM = re.compile(r"(U?R(?:\d+|Z))((?:\.\w+)*)|(-?0x[0-9a-f]+)")


def _scaled(get: Value, scale: np.uint64) -> Value:
    return lambda w: get(w).astype(U64) * scale


def _address(text: str, wide: bool) -> Value:
    """Return a function that evaluates [R2+UR4+0x10] or desc[UR60][R52.64+0x20] per lane, in 64 bits if ``wide``."""
    inside = text[text.rindex("[") + 1 : -1]
    terms: list[Value] = []
    offset = 0
    for match in _TERM.finditer(inside):
        body, suffixes, number = match.groups()
        if number:
            offset += int(number, 16)
        elif "64" in suffixes.split(".") or (wide and body.startswith("UR")):
            terms.append(value64(body))
        else:
            scale = next((int(s[1:]) for s in suffixes.split(".") if s.startswith("X")), 1)
            terms.append(_scaled(value(body), U64(scale)))
    fixed = np.array([offset & 0xFFFFFFFFFFFFFFFF], U64)

    def run(w: Warp) -> Array:
        total = fixed
        for term in terms:
            total = total + term(w)
        total = total if wide else total & _LOW
        return total if len(total) == LANES else np.repeat(total, LANES)

    return run


def _size(i: Instruction) -> tuple[int, bool]:
    """Return the number of bytes of an access, and whether they are sign-extended."""
    for name, size in (("128", 16), ("64", 8), ("U8", 1), ("S8", 1), ("U16", 2), ("S16", 2)):
        if name in i.modifiers:
            return size, name[0] == "S"
    return 4, False


_EVERY_LANE = np.arange(LANES)


def _lanes(w: Warp) -> Array:
    """Return the indices of the lanes that execute the current instruction."""
    if w.active.all():
        return _EVERY_LANE
    return np.flatnonzero(w.active) if len(w.active) == LANES else _EVERY_LANE[:0]


def _space(w: Warp, addresses: Array, size: int, is_shared: bool) -> tuple[Array, Array]:
    """Return the memory (a byte array) in which all the addresses lie, and their offsets in it."""
    if not is_shared and int(addresses[0]) >> 32 == SHARED_WINDOW:
        is_shared = True
    if (addresses % U64(size)).any():
        raise Fault(f"an access of {size} bytes at {int(addresses[0]):#x} is not aligned")
    if is_shared:
        offsets = (addresses & U64(0xFFFFFF)).astype(I64)
        if int(offsets.max()) + size > _SHARED_BYTES:
            raise Fault(f"an access to shared memory at {int(offsets.max()):#x}, beyond its {_SHARED_BYTES:#x} bytes")
        return w.block.shared, offsets
    return w.block.memory.find(addresses, size)


def _by_region(w: Warp, addresses: Array, is_shared: bool) -> list[slice | Array]:
    """Group the addresses by the region of memory that contains them."""
    if is_shared or int(addresses[0]) >> 32 == SHARED_WINDOW:
        return [slice(None)]
    regions = np.array([w.block.memory.region(int(a)) for a in addresses])
    return [regions == region for region in np.unique(regions)]


def _bank_passes(offsets: Array, size: int) -> int:
    """Count the passes of a shared-memory access; in each pass, every bank delivers one 4-byte word."""
    # Counts are cached. They do not change if all addresses are shifted by the same number of words.
    start = int(offsets.min()) // 4 * 4
    key = ((offsets - start).tobytes(), size)
    found = _passes_of.get(key)
    if found is None:
        found = _passes_of[key] = _count_passes(offsets, size)
    return found


_passes_of: dict[tuple[bytes, int], int] = {}


def _count_passes(offsets: Array, size: int) -> int:
    at_once = LANES if size <= 4 else LANES * 4 // size
    passes = 0
    for start in range(0, len(offsets), at_once):
        words = np.unique((offsets[start : start + at_once, None] + np.arange(0, size, 4)) // 4)
        passes += int(np.bincount(words % 32).max())
    return passes


def _note_passes(w: Warp, offsets: Array, size: int) -> None:
    if len(offsets):
        w.passes[w.pc] += _bank_passes(offsets, size)


def _load(i: Instruction, text: str, is_shared: bool) -> Run:
    size, signed = _size(i)
    count = max(1, size // 4)
    address, write = _address(text, not is_shared), target(i.operands[0], count)

    def run(w: Warp, mask: Array | None) -> None:
        lanes = _lanes(w)
        if not len(lanes):
            return
        data, offsets = _space(w, address(w)[lanes], size, is_shared)
        if data is w.block.shared:
            _note_passes(w, offsets, size)
        got = data[offsets[:, None] + np.arange(size)]
        if size < 4:
            whole = np.zeros((len(lanes), 4), np.uint8)
            whole[:, :size] = got
            if signed:
                whole[got[:, -1] >= 128, size:] = 255
            got = whole
        words = np.ascontiguousarray(got).view(U32)
        if len(lanes) == LANES:
            full = words.T
        else:
            full = np.zeros((count, LANES), U32)
            full[:, lanes] = words.T
        write(w, full if count > 1 else full[0], mask)

    return run


def _store(i: Instruction, text: str, source: str, is_shared: bool) -> Run:
    size, _ = _size(i)
    address = _address(text, not is_shared)
    register = _register(source.replace(".reuse", ""))
    if register is None:
        raise UnknownInstruction(i.text)
    bank, number = register
    count = max(1, size // 4)

    def run(w: Warp, mask: Array | None) -> None:
        lanes = _lanes(w)
        if not len(lanes):
            return
        file = w.r if bank == "r" else w.ur
        words = np.zeros((count, LANES), U32) if number == 255 else file[number : number + count]
        words = np.broadcast_to(words, (count, LANES))[:, lanes].T
        bytes_ = np.ascontiguousarray(words).view(np.uint8)[:, :size]
        addresses = address(w)[lanes]
        for chosen in _by_region(w, addresses, is_shared):  # lanes may write to the arrays of different arguments
            data, offsets = _space(w, addresses[chosen], size, is_shared)
            if data is w.block.shared:
                _note_passes(w, offsets, size)
            data[offsets[:, None] + np.arange(size)] = bytes_[chosen]

    return run


def lds(i: Instruction) -> Run:
    return _load(i, i.operands[1], True)


def sts(i: Instruction) -> Run:
    return _store(i, i.operands[0], i.operands[1], True)


def ldg(i: Instruction) -> Run:
    return _load(i, i.operands[1], False)


def stg(i: Instruction) -> Run:
    return _store(i, i.operands[0], i.operands[1], False)


def ldc(i: Instruction) -> Run:
    size, signed = _size(i)
    count = max(1, size // 4)
    write, read = target(i.operands[0], count), _constant(i.operands[1])
    if read is None:
        raise UnknownInstruction(i.text)

    def run(w: Warp, mask: Array | None) -> None:
        got = read(w, size)
        if size < 4:
            whole = np.zeros((len(got), 4), np.uint8)
            whole[:, :size] = got
            if signed:
                whole[got[:, -1] >= 128, size:] = 255
            got = whole
        words = np.ascontiguousarray(got).view(U32).T
        write(w, words if count > 1 else words[0], mask)

    return run


def ldgsts(i: Instruction) -> Run:
    """Copy from global to shared memory immediately; if the predicate is false, write zeros."""
    size, _ = _size(i)
    where, source = _address(i.operands[0], False), _address(i.operands[1], True)
    wanted = predicate(i.operands[2]) if len(i.operands) > 2 else predicate("PT")

    def run(w: Warp, mask: Array | None) -> None:
        lanes = _lanes(w)
        if not len(lanes):
            return
        shared, to = _space(w, where(w)[lanes], size, True)
        _note_passes(w, to, size)
        valid = np.broadcast_to(wanted(w), (LANES,))[lanes]
        shared[to[:, None] + np.arange(size)] = 0
        if valid.any():
            data, offsets = _space(w, source(w)[lanes][valid], size, False)
            shared[to[valid][:, None] + np.arange(size)] = data[offsets[:, None] + np.arange(size)]

    return run


def _matrix_rows(i: Instruction, text: str) -> tuple[int, bool, Value]:
    count = int(i.modifiers[-1]) if i.modifiers[-1] in "124" else 1
    if i.modifiers[0] != "16" or i.modifiers[1] not in ("M88", "MT88"):
        raise UnknownInstruction(i.text)
    return count, i.modifiers[1] == "MT88", _address(text, False)


def ldsm(i: Instruction) -> Run:
    count, transposed, address = _matrix_rows(i, i.operands[1])
    write = target(i.operands[0], count)

    def run(w: Warp, mask: Array | None) -> None:
        shared, rows = _space(w, address(w)[: 8 * count], 16, True)
        _note_passes(w, rows, 16)
        words = np.ascontiguousarray(shared[rows[:, None] + np.arange(16)]).view(U32)
        got = words.reshape(count, LANES)
        if transposed:
            got = np.stack([_transposed(x) for x in got])
        write(w, got if count > 1 else got[0], mask)

    return run


def stsm(i: Instruction) -> Run:
    count, transposed, address = _matrix_rows(i, i.operands[0])
    register = _register(i.operands[1].replace(".reuse", ""))
    if register is None or register[0] != "r":
        raise UnknownInstruction(i.text)
    number = register[1]

    def run(w: Warp, mask: Array | None) -> None:
        shared, rows = _space(w, address(w)[: 8 * count], 16, True)
        _note_passes(w, rows, 16)
        got = w.r[number : number + count]
        if transposed:
            got = np.stack([_transposed(x) for x in got])
        data = np.ascontiguousarray(got.reshape(8 * count, 4)).view(np.uint8)
        shared[rows[:, None] + np.arange(16)] = data

    return run


def nothing(i: Instruction) -> Run:
    return lambda w, mask: None


_INSTRUCTIONS: dict[str, Callable[[Instruction], Run]] = {
    "IADD3": iadd3,
    "IADD": iadd,
    "VIADD": iadd,
    "IMAD": imad,
    "LEA": lea,
    "SHF": shf,
    "LOP3": lop3,
    "PLOP3": plop3,
    "ISETP": isetp,
    "SEL": sel,
    "IMNMX": imnmx,
    "VIMNMX": imnmx,
    "VIMNMX3": vimnmx3,
    "VIADDMNMX": viaddmnmx,
    "IABS": iabs,
    "POPC": popc,
    "FLO": flo,
    "BREV": brev,
    "PRMT": prmt,
    "P2R": p2r,
    "R2P": r2p,
    "MOV": mov,
    "R2UR": r2ur,
    "S2R": s2r,
    "S2UR": s2r,
    "CS2R": s2r,
    "FADD": fadd,
    "FMUL": fmul,
    "FFMA": ffma,
    "FMNMX": fmnmx,
    "FMNMX3": fmnmx,
    "FSEL": fsel,
    "FSETP": fsetp,
    "DSETP": fsetp,
    "MUFU": mufu,
    "I2F": i2f,
    "I2FP": i2f,
    "F2I": f2i,
    "F2FP": f2fp,
    "F2F": f2f,
    "HFMA2": hfma2,
    "SHFL": shfl,
    "VOTE": vote,
    "VOTEU": vote,
    "HMMA": hmma,
    "MOVM": movm,
    "LDS": lds,
    "STS": sts,
    "LDG": ldg,
    "STG": stg,
    "LD": ldg,
    "ST": stg,
    "LDC": ldc,
    "LDCU": ldc,
    "LDGSTS": ldgsts,
    "LDSM": ldsm,
    "STSM": stsm,
    **dict.fromkeys(("NOP", "DEPBAR", "LDGDEPBAR", "YIELD", "CCTL", "MEMBAR", "ERRBAR", "BMOV", "CGAERRBAR"), nothing),
}


def _decode(i: Instruction) -> Run:
    # Instructions of the uniform datapath ("U...") run as vector instructions on registers with a single column.
    make = _INSTRUCTIONS.get(i.base) or (_INSTRUCTIONS.get(i.base[1:]) if i.base.startswith("U") else None)
    if make is None:
        raise UnknownInstruction(f"{i.text} at {i.pc:#x}: {__name__} has no function for {i.base}")
    try:
        return make(i)
    except (UnknownInstruction, KeyError, IndexError, ValueError, StopIteration) as error:
        raise UnknownInstruction(f"{i.text} at {i.pc:#x}: {__name__} does not support this form ({error})") from None


def run_launch(
    program: Program, launch: Launch, memory: Memory, blocks: Sequence[int] | None = None
) -> Iterator[Block]:
    """Run the given blocks of a launch (default: all) in order, and yield each block when it has ended."""
    total = launch.grid[0] * launch.grid[1] * launch.grid[2]
    with np.errstate(all="ignore"):
        for index in range(total) if blocks is None else blocks:
            block = Block(program, launch, memory, index)
            block.run()
            yield block
