"""Checks of the Triton backend that run on a GPU if there is one, and otherwise in Triton's CPU interpreter.

Triton decides whether to interpret a kernel when the kernel is defined. Without a GPU, the checks therefore run in a
child process with TRITON_INTERPRET=1. Each pytest-xdist worker has one child for all files, and sends it the names of
the checks that the worker runs. The interpreter computes bfloat16 wrongly and takes milliseconds per program, so
interpreted checks use float32 and float16 and small cases.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
ON_GPU = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_GPU else "cpu"
OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
if not ON_GPU and OLD_TRITON and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("the interpreter of Triton 3.6 fails under NumPy 2.4 and newer", allow_module_level=True)
if INTERPRETED:
    from tests.support import triton_interpreter

    triton_interpreter.make_faster()
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


class Checks:
    """The checks of a module, by name."""

    def __init__(self, module: str):
        self.module = module
        self.all: dict[str, Callable[[], None]] = {}
        self.long: set[str] = set()

    def __call__(
        self, *values: Any, dtypes: tuple[torch.dtype | None, ...] = DTYPES, in_turn: bool = False
    ) -> Callable[[Callable], Callable]:
        """Return a decorator that registers a function as one check for each value and dtype.

        A tuple is passed as several arguments, and None is not passed. With ``in_turn``, the interpreter runs each
        value with one dtype, which alternates from value to value; the other combinations are marked ``long``.
        """

        def register(function: Callable) -> Callable:
            for i, value in enumerate(values or (None,)):
                for j, dtype in enumerate(dtypes):
                    several = value if isinstance(value, tuple) else (value,)
                    arguments = [x for x in (*several, dtype) if x is not None]
                    name = "-".join([function.__name__, *(str(x).removeprefix("torch.") for x in arguments)])
                    self.all[name] = functools.partial(function, *arguments)
                    if in_turn and not ON_GPU and j != i % len(dtypes):
                        self.long.add(name)
            return function

        return register

    def names(self) -> list[Any]:
        """Return the names of all checks, for parametrize."""
        return [pytest.param(name, marks=pytest.mark.long if name in self.long else ()) for name in self.all]

    def run(self, name: str) -> None:
        """Run the check ``name`` in this process, or in the child process if it has to be interpreted."""
        if ON_GPU or INTERPRETED:
            self.all[name]()
        elif (failure := _Child.of_this_process().run(self.module, name)) is not None:
            pytest.fail(f"in Triton's interpreter:\n{failure}", pytrace=False)


class _Child:
    """A child process with Triton's interpreter, which runs the checks whose names it receives."""

    def __init__(self) -> None:
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the package under test
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    @classmethod
    @functools.cache
    def of_this_process(cls) -> _Child:
        return cls()

    def run(self, module: str, name: str) -> str | None:
        """Run the check ``name`` of ``module`` in the child process, and return its traceback, or None if it passed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps([module, name]) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer:
            return json.loads(answer)
        _Child.of_this_process.cache_clear()  # the next check starts a new process
        self.errors.seek(0)
        return f"the interpreting process ended with status {self.process.wait()}:\n{self.errors.read()[-5000:]}"


def main() -> None:
    """Run the checks that are named on stdin, and report each result on stdout (in the child process)."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a check's output must not be read as an answer
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # uninitialised memory is NaN, as in the parent process
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    for line in sys.stdin:
        module, name = json.loads(line)
        failure = None
        try:
            importlib.import_module(module).check.all[name]()
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps(failure), file=answers, flush=True)


if __name__ == "__main__":
    main()
