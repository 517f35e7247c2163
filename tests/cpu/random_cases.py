"""Runs random calls to the CPU kernels, and checks each against the error budget.

    python -m tests.cpu.random_cases --cases 100000

A seed and an index determine a call: the case, the dtype, the form of the op, the memory layout of every tensor and the
requested gradients. If a call exceeds the budget, the command that repeats this call alone is printed.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import random
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import swinkernels
from swinkernels.testing import Judged, judge_window_attention, run_case
from swinkernels.testing import WindowAttentionCase as Case
from tests.support.attention_cases import draw_case, elements, with_enough_images

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (*range(1, 41), 8, 16, 24, 32, 32, 48, 64, 96, 127, 128)
PACKED, PACKED_HEADS, SEPARATE = FORMS = ("(B, *S, 3C)", "(B, *S, 3, heads, head_dim)", "q, k, v")
# Kind -> maximum side of a window, maximum excess of a map's side over two windows, maximum number of scores or of
# elements.
KINDS = {"short": (6, 3, 20_000), "one token": (1, 6, 20_000), "long": (20, 3, 60_000)}
LONG = 64  # windows with more tokens are long: they have several blocks of queries
MIN_ROWS = 32  # with fewer rows of head_dim elements, float32 rounding errors of scores do not average out
AXIS_TABLES = tuple(f"axis_tables.{axis}" for axis in range(3))
WIDE = ("bias_table", "bias", "logit_scale", *AXIS_TABLES)  # may have any floating dtype; converted to float32
TABLES = (*WIDE, "pad_qkv", "region_map")


@dataclass(frozen=True)
class Layout:
    """The memory layout of a tensor. The memory around and between its elements is filled with NaN."""

    offset: int
    order: tuple[int, ...]  # the axes, outermost first
    gaps: tuple[int, ...]  # gaps after each axis, in elements

    @classmethod
    def draw(cls, rng: random.Random, dim: int) -> Layout:
        order, gaps = tuple(range(dim)), (0,) * dim
        if rng.random() < 0.7:
            moved = dim if rng.random() < 0.05 else dim - 1  # the last axis mostly stays contiguous
            order = (*rng.sample(range(moved), moved), *range(moved, dim))
            gaps = tuple(rng.choice((0, 0, 1, 3)) for _ in order)
        return cls(rng.choice((0, 1, 2, 3, 5)), order, gaps)

    def place(self, x: Tensor) -> Tensor:
        """Return a copy of ``x`` with this layout, in memory that ends with the last element of the copy."""
        if x.numel() == 0:
            return x.clone()
        strides, stride = [0] * x.dim(), 1
        for axis in reversed(self.order):
            strides[axis] = stride
            stride = stride * x.shape[axis] + self.gaps[axis]
        last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
        around = math.nan if x.is_floating_point() else 77
        memory = torch.full((self.offset + last + 1,), around, dtype=x.dtype)
        return memory.as_strided(x.shape, strides, self.offset).copy_(x)


class _Placed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, layout: Layout) -> Tensor:
        return layout.place(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


@dataclass(frozen=True)
class Call:
    """A call of window_attention_qkvpacked or, for the form with separate q, k and v, of window_attention."""

    case: Case
    dtype: torch.dtype
    form: str
    layouts: tuple[Layout, ...]  # layouts of qkv, or of q, k and v
    of_gradient: Layout  # layout of the output's gradient
    of_tables: dict[str, Layout]  # layouts of the tables; if empty, they are contiguous
    are_wide: bool  # the tables in WIDE are float64
    constant: tuple[str, ...]  # tables without a gradient
    seed: int  # seed of the inputs

    def __str__(self) -> str:
        constant = f", constant {', '.join(self.constant)}" if self.constant else ""
        return f"{self.case} {self.dtype} {self.form}{constant}"

    def __call__(self, qkv: Tensor, **arguments: Any) -> Tensor:
        if self.form != PACKED:
            qkv = qkv.unflatten(-1, (3, self.case.num_heads, -1))
        maps = qkv.unbind(-3) if self.form == SEPARATE else (qkv,)
        maps = [_Placed.apply(x, layout) for x, layout in zip(maps, self.layouts, strict=True)]
        for axis, table in enumerate(arguments.pop("axis_tables", ())):
            arguments[f"axis_tables.{axis}"] = table
        for name in set(arguments).intersection(WIDE) if self.are_wide else ():
            arguments[name] = arguments[name].double()
        for name, layout in self.of_tables.items():
            arguments[name] = _Placed.apply(arguments[name], layout)
        axis_tables = tuple(arguments.pop(name) for name in AXIS_TABLES if name in arguments)
        arguments["axis_tables"] = axis_tables or None
        op = swinkernels.window_attention if self.form == SEPARATE else swinkernels.window_attention_qkvpacked
        out = op(*maps, **arguments, backend="cpu")
        out.register_hook(self.of_gradient.place)
        return out

    def check(self) -> dict[str, Judged]:
        """Compare the results with the reference; return the errors, or raise AssertionError if one is too large."""
        _, judged = judge_window_attention(
            self, self.case, self.dtype, seed=self.seed, constant=self.constant, sums_in_float32=True
        )
        for found in judged.values():
            assert found.failure is None, found.failure
        return judged

    def run(self) -> dict[str, Judged]:
        """Run both passes without a comparison, for a sanitizer."""
        run_case(self, self.case.inputs(self.dtype, seed=self.seed), self.case.arguments(), self.constant)
        return {}


def _scores(case: Case) -> int:
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    return case.batch * windows * case.num_heads * math.prod(case.window_tuple) * math.prod(case.key_window_tuple)


def _draw_case(rng: random.Random) -> Case:
    kind = rng.choices(list(KINDS), (90, 5, 5))[0]
    longest, beyond, most = KINDS[kind]
    while True:
        case = draw_case(rng, longest=longest, beyond=beyond, head_dims=HEAD_DIMS, small_cosine=True)
        case, tokens = with_enough_images(case, MIN_ROWS), math.prod(case.window_tuple)
        if max(_scores(case), elements(case)) <= most and (kind != "long" or LONG < tokens <= 1024):
            break
    if rng.random() < 0.1:
        case.options["mask_value"] = rng.choice((0.0, -1e4, -1e9, torch.finfo(torch.float32).min))
    if "region_map" in case.options:
        case.options["region_map"] = case.options["region_map"].to(rng.choice((torch.int32, torch.int16, torch.int8)))
    return dataclasses.replace(case, batch=0) if rng.random() < 0.01 else case


def draw_call(seed: int, number: int) -> Call:
    """Draw the call with seed ``seed`` and index ``number``."""
    rng = random.Random(f"{seed} {number}")
    case = _draw_case(rng)
    rank = len(case.size)
    form = rng.choice(FORMS)
    dim = {PACKED: rank + 2, PACKED_HEADS: rank + 4, SEPARATE: rank + 3}[form]
    dims = {name: x.dim() for name, x in {**case.inputs(torch.float32), **case.options}.items() if name in TABLES}
    moves_tables, has_constant = rng.random() < 0.2, rng.random() < 0.3
    return Call(
        case=case,
        dtype=rng.choice(DTYPES),
        form=form,
        layouts=tuple(Layout.draw(rng, dim) for _ in range(3 if form == SEPARATE else 1)),
        of_gradient=Layout.draw(rng, rank + 2),
        of_tables={name: Layout.draw(rng, dims[name]) for name in dims} if moves_tables else {},
        are_wide=rng.random() < 0.1,
        constant=tuple(name for name in dims if name != "region_map" and has_constant and rng.random() < 0.5),
        seed=rng.randrange(2**31),
    )


@dataclass
class Worst:
    """The largest errors of one result in one dtype, each with the index of its call."""

    results: int = 0
    rms_eps: float = 0.0
    rms_eps_of: int = -1
    of_limit: float = 0.0
    of_limit_of: int = -1

    def add(self, other: Worst) -> None:
        self.results += other.results
        if other.rms_eps > self.rms_eps:
            self.rms_eps, self.rms_eps_of = other.rms_eps, other.rms_eps_of
        if other.of_limit > self.of_limit:
            self.of_limit, self.of_limit_of = other.of_limit, other.of_limit_of


def check(seed: int, numbers: Iterable[int], *, compare: bool = True) -> tuple[list[str], dict[tuple[str, str], Worst]]:
    """Run the calls with indices ``numbers``; return the commands that repeat failed calls, and the worst errors.

    The worst errors are given by dtype and name of the result.
    """
    failures, worst = [], {}
    for number in numbers:
        call = draw_call(seed, number)
        try:
            errors = call.check() if compare else call.run()
        except Exception as error:
            reason = " ".join(str(error).split()).replace(str(call.case), "").strip()
            failures.append(
                f"python -m tests.cpu.random_cases --seed {seed} --only {number}  # {call}: "
                f"{type(error).__name__}: {reason}"
            )
            print(failures[-1], flush=True)
            continue
        for name, error in errors.items():
            found = Worst(1, error.rms_eps, number, error.of_limit, number)
            worst.setdefault((str(call.dtype).removeprefix("torch."), name), Worst()).add(found)
    return failures, worst


def write_record(
    path: Path, seed: int, first: int, calls: int, failed: int, worst: dict[tuple[str, str], Worst]
) -> None:
    """Write the worst errors of ``calls`` calls from index ``first`` on, merged with the errors of earlier calls."""
    from benchmarks import record  # slow to import under a sanitizer, and not needed there

    kinds = {field.name: type(field.default) for field in dataclasses.fields(Worst)}
    if path.exists():
        for row in record.read_csv(path):
            end = int(row["first"]) + int(row["calls"])
            if int(row["calls_seed"]) != seed or end != first:
                sys.exit(
                    f"{path} has calls {row['first']} to {end - 1} of seed {row['calls_seed']}: "
                    "continue after them, or remove the file"
                )
            found = Worst(**{name: kind(row[name]) for name, kind in kinds.items()})
            worst.setdefault((row["dtype"], row["result"]), Worst()).add(found)
        first, calls, failed = int(row["first"]), calls + int(row["calls"]), failed + int(row["failed"])
    facts = {
        "calls_seed": seed,
        "first": first,
        "calls": calls,
        "failed": failed,
        "instruction_set": torch.ops.swinkernels.cpu_instruction_set(),
    }
    rows = [{"dtype": dtype, "result": name, **vars(worst[dtype, name]), **facts} for dtype, name in sorted(worst)]
    record.write_csv(path, rows, "cpu")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.cpu.random_cases", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="index of the first call")
    parser.add_argument("--only", type=int, help="index of the only call to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compare", action="store_true", help="only run the kernels, for a sanitizer")
    parser.add_argument("--record", type=Path, help="a CSV file to which to add the worst errors")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN
    start = time.process_time()
    numbers = range(options.first, options.first + options.cases) if options.only is None else [options.only]
    failures, worst = check(options.seed, numbers, compare=not options.no_compare)
    seconds = time.process_time() - start
    if options.record is not None:
        write_record(options.record, options.seed, options.first, len(numbers), len(failures), worst)
    for (dtype, name), found in sorted(worst.items()):
        print(f"{dtype:8} {name:12} {found.rms_eps:.2f} eps, {found.of_limit:.0%} of its limit", end="")
        print(f" (calls {found.rms_eps_of}, {found.of_limit_of})")
    print(f"{len(numbers)} calls in {seconds:.0f} s of CPU time, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
