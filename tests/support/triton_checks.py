"""Checks of the Triton backend that run on a GPU if there is one, and else in Triton's CPU interpreter.

Triton decides when a kernel is defined whether it is interpreted. So without a GPU a file of checks runs as a script in
a child process with TRITON_INTERPRET=1, once for all its checks, and each check is reported by name. The interpreter
computes bfloat16 wrongly and takes some 10 ms for a program, so there the dtypes are float32 and float16, and the cases
small.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
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
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)


class Checks:
    """The checks of a file, by name."""

    def __init__(self, file: str):
        self.file = file
        self.all: dict[str, Callable[[], None]] = {}

    def __call__(self, *values: Any, dtypes: tuple[torch.dtype | None, ...] = DTYPES) -> Callable[[Callable], Callable]:
        """Register a check, once for each value and each dtype: it is called with these, unless they are None.

        A value that is a tuple is several arguments.
        """

        def register(function: Callable) -> Callable:
            for value in values or (None,):
                for dtype in dtypes:
                    several = value if isinstance(value, tuple) else (value,)
                    arguments = [x for x in (*several, dtype) if x is not None]
                    name = "-".join([function.__name__, *(str(x).removeprefix("torch.") for x in arguments)])
                    self.all[name] = functools.partial(function, *arguments)
            return function

        return register

    def run(self, name: str) -> None:
        """Run a check here, or report what it did in the child process."""
        if ON_GPU or INTERPRETED:
            self.all[name]()
        elif (failure := self._failures_of_child[name]) is not None:
            pytest.fail(f"in Triton's interpreter:\n{failure}", pytrace=False)

    @functools.cached_property
    def _failures_of_child(self) -> dict[str, str | None]:
        """What went wrong with each check in a process whose Triton interprets; None for what passed."""
        environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # the package that is tested here
        child = subprocess.run(
            [sys.executable, self.file], check=False, env=environment, capture_output=True, text=True
        )
        failures = {}
        for line in child.stdout.splitlines():
            if line.startswith('{"check": '):
                report = json.loads(line)
                failures[report["check"]] = report["failure"]
        if len(failures) < len(self.all):
            died = (
                f"the interpreting process ended with status {child.returncode} before this check:\n"
                f"{child.stderr[-5000:]}"
            )
            failures = dict.fromkeys(self.all, died) | failures
        return failures

    def main(self) -> None:
        """What the child process does."""
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True, warn_only=True)  # fresh memory is NaN, as in the tests of this process
        for name, check in self.all.items():
            failure = None
            try:
                check()
            except Exception:
                failure = traceback.format_exc()
            print(json.dumps({"check": name, "failure": failure}), flush=True)
