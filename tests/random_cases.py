"""Random calls of the CPU kernels, each held to the error budget: ``python -m tests.cpu.random_cases --cases 100000``.

A call is drawn from a seed and its number: the case, the dtype, the form of the op, how every map lies in memory, and
which gradients are wanted. A call outside the budget prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import collections
import math
import random
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import swinkernels
from attention_cases import MIN_ELEMENTS, draw_case, elements
from swinkernels.testing import Error, check_window_attention, run_case
from swinkernels.testing import WindowAttentionCase as Case

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEAD_DIMS = (*range(1, 41), 7, 8, 16, 24, 32, 32, 48, 64, 96, 127, 128)
FORMS = ("(B, *S, 3C)", "(B, *S, 3, heads, head_dim)", "q, k, v")
# Of results of fewer rows of a head, the rounding of single scores shows in float32.
MIN_ROWS = 32
MAX_SCORES = 60_000


@dataclass(frozen=True)
class Layout:
    """Where a tensor lies in memory that holds NaN around and between its rows."""

    offset: int
    order: tuple[int, ...]  # the axes, slowest first
    gaps: tuple[int, ...]  # elements that follow all of an axis

    @classmethod
    def draw(cls, rng: random.Random, dim: int) -> Layout:
        order = list(range(dim))
        gaps = [0] * dim
        if rng.random() < 0.7:  # else dense; rows nearly always lie in one piece
            head = order[:-1] if rng.random() < 0.95 else order
            head[:] = rng.sample(head, len(head))
            order = [*head, *order[len(head) :]]
            gaps = [rng.choice((0, 0, 1, 3)) for _ in order]
        return cls(rng.choice((0, 1, 2, 3, 5)), tuple(order), tuple(gaps))

    def place(self, x: Tensor) -> Tensor:
        """A copy of x; its memory ends with its last element."""
        strides, stride = [0] * x.dim(), 1
        for axis in reversed(self.order):
            strides[axis] = stride
            stride = stride * x.shape[axis] + self.gaps[axis]
        last = sum((n - 1) * s for n, s in zip(x.shape, strides, strict=True))
        if x.numel() == 0:
            return x.clone()
        memory = torch.full((self.offset + last + 1,), math.nan, dtype=x.dtype)
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
    """One call of the op in one of its forms."""

    case: Case
    dtype: torch.dtype
    form: str
    layouts: tuple[Layout, ...]  # of qkv or of q, k and v; the last is that of the gradient of the output
    constant: tuple[str, ...]  # the tables whose gradient is not wanted
    seed: int  # of the inputs

    def __str__(self) -> str:
        constant = f", constant: {', '.join(self.constant)}" if self.constant else ""
        return f"{self.case} {self.dtype} {self.form}{constant}"

    def __call__(self, qkv: Tensor, bias_table: Tensor | None = None, **arguments: Any) -> Tensor:
        *layouts, of_gradient = self.layouts
        if self.form != FORMS[0]:
            qkv = qkv.unflatten(-1, (3, self.case.num_heads, -1))
        maps = qkv.unbind(-3) if self.form == FORMS[2] else (qkv,)
        maps = [_Placed.apply(x, layout) for x, layout in zip(maps, layouts, strict=True)]
        op = swinkernels.window_attention if len(maps) == 3 else swinkernels.window_attention_qkvpacked
        out = op(*maps, bias_table, **arguments, backend="cpu")
        if out.requires_grad:
            out.register_hook(of_gradient.place)
        return out

    def check(self) -> dict[str, Error]:
        """The errors of the results; raises AssertionError if one is outside the budget."""
        errors: dict[str, Error] = {}
        check_window_attention(self, self.case, self.dtype, seed=self.seed, constant=self.constant, errors=errors)
        return errors

    def run(self) -> None:
        """Both passes alone, for a sanitizer to watch."""
        run_case(self, self.case.inputs(self.dtype, seed=self.seed), self.case.arguments(), self.constant)


def _scores(case: Case) -> int:
    windows = math.prod(-(-s // w) for s, w in zip(case.size, case.window_tuple, strict=True))
    return case.batch * windows * case.num_heads * math.prod(case.window_tuple) ** 2


def draw_call(seed: int, number: int) -> Call:
    """Call ``number`` of those that a seed stands for."""
    rng = random.Random(f"{seed} {number}")
    kind = rng.choices(("short", "one token", "long"), (90, 5, 5))[0]
    while True:
        longest, beyond = {"short": (6, 3), "one token": (1, 6), "long": (20, 3)}[kind]
        case = draw_case(rng, longest=longest, beyond=beyond, head_dims=HEAD_DIMS, small_cosine=True)
        dtype = rng.choice(DTYPES)
        # More images, until there is enough to average over.
        rows = math.prod(case.size) * case.num_heads
        batch = max(case.batch, -(-MIN_ELEMENTS // (rows * case.head_dim)), -(-MIN_ROWS // rows))
        case = Case(**{**vars(case), "batch": 0 if rng.random() < 0.01 else batch})
        long_enough = kind != "long" or math.prod(case.window_tuple) > 64
        if long_enough and _scores(case) <= MAX_SCORES and elements(case) <= MAX_SCORES:
            break
    form = rng.choice(FORMS)
    dims = {FORMS[0]: 2, FORMS[1]: 4, FORMS[2]: 3}[form] + len(case.size)
    maps = 3 if form == FORMS[2] else 1
    layouts = [Layout.draw(rng, dims) for _ in range(maps)] + [Layout.draw(rng, 2 + len(case.size))]
    tables = {"bias_table": case.has_table, "bias": case.bias_types is not None}
    tables |= {"logit_scale": case.has_logit_scale, "pad_qkv": case.has_pad_qkv}
    present = [name for name, is_present in tables.items() if is_present]
    constant = [name for name in present if rng.random() < 0.5] if rng.random() < 0.3 else []
    return Call(case, dtype, form, tuple(layouts), tuple(constant), rng.randrange(2**31))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--run", action="store_true")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills fresh memory with NaN
    numbers = range(options.first, options.first + options.cases) if options.only is None else [options.only]
    failed = 0
    worst: dict[Any, tuple] = collections.defaultdict(lambda: (0, 0, 0, 0))
    start = time.process_time()
    for number in numbers:
        call = draw_call(options.seed, number)
        try:
            if options.run:
                call.run()
            else:
                for name, error in call.check().items():
                    key = str(call.dtype), name
                    a, b, c, d = worst[key]
                    if error.rms_eps > a: a, b = error.rms_eps, number
                    if error.of_limit > c: c, d = error.of_limit, number
                    worst[key] = a, b, c, d
        except Exception as error:
            failed += 1
            print(f"--seed {options.seed} --only {number}  # {type(error).__name__} {call}: {error}", flush=True)
    print(f"{len(numbers)} {failed} failed, {(time.process_time() - start) / len(numbers) * 1e3:.2f} ms each")
    for key, value in sorted(worst.items()): print(*key, *value)
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
