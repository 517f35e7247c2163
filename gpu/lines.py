"""The lines of a run: what one says, who writes it, and how it is read again.

A line is a result: step, case, op, backend, dtype, direction, value and unit, ``result`` and, where it is not "ok",
``detail``. The run adds device, driver, torch, triton, commit and date. Some have more: ``us`` and ``copy_us`` of a
time, ``goal`` of what was to be reached.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

OK, SKIPPED, CUT = "ok", "skipped", "cut"
WRONG, FAILED, CRASHED, HUNG = BAD = ("wrong", "failed", "crashed", "hung")
Line = dict[str, Any]


def dump(line: Line) -> bytes:
    """JSON has no NaN: it is null there."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain).encode() + b"\n"


class Emitter:
    """Tells the run from a process of its own what it begins and finds; prints it where there is no run."""

    def __init__(self, descriptor: int | None = None):
        self._descriptor = descriptor

    def _write(self, message: Line) -> None:
        if self._descriptor is None:
            print(dump(message).decode(), end="", flush=True)
        else:
            os.write(self._descriptor, dump(message))

    def begin(self, case: str) -> None:
        """What is named here is blamed if nothing more is heard."""
        self._write({"begin": case})

    def line(self, **fields: Any) -> None:
        self._write({"result": OK, **fields})

    def environment(self, facts: Line) -> None:
        """What every further line of the run is to end with."""
        self._write({"environment": facts})

    def library(self, path: Path) -> None:
        """The op library that was built for the processes that follow."""
        self._write({"library": str(path)})

    def turn(self) -> None:
        """Wait until no other process of the step is at work; the turn lasts until the next one, or the end."""
        self._write({"turn": "wanted"})
        if self._descriptor is not None:
            os.read(0, 1)


def read(paths: Iterable[Path]) -> list[Line]:
    """The lines of some runs; the last one of a run that was cut off may be half."""
    found = []
    for path in paths:
        for text in path.read_text().splitlines():
            try:
                found.append(json.loads(text))
            except json.JSONDecodeError:
                continue
    return found
