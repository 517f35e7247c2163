"""The lines of a run: their results, their JSON, and the emitter that a worker process writes them with.

A line is one result: step, case, op, backend, dtype, direction, value, unit, ``result`` and, where it is not "ok",
``detail``. The run adds device, driver, torch, triton, commit and date. Times have ``us``, ``copy_us`` and ``goal``.
"""

from __future__ import annotations

import json
import math
import os
from typing import Any

OK, SKIPPED, CUT = "ok", "skipped", "cut"
WRONG, FAILED, CRASHED, HUNG = BAD = ("wrong", "failed", "crashed", "hung")
Line = dict[str, Any]


def dump(line: Line) -> bytes:
    """JSON has no NaN: it is null there."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain).encode() + b"\n"


class Emitter:
    """Reports from a worker to the run, over a file descriptor; without one, prints."""

    def __init__(self, descriptor: int | None = None):
        self._descriptor = descriptor

    def tell(self, **message: Any) -> None:
        """Send a message that is no line: ``environment`` and ``library`` set up what follows in the run."""
        os.write(1 if self._descriptor is None else self._descriptor, dump(message))

    def begin(self, case: str) -> None:
        """Name the case that is blamed if the process is not heard of again."""
        self.tell(begin=case)

    def line(self, **fields: Any) -> None:
        self.tell(**{"result": OK, **fields})

    def turn(self) -> None:
        """Wait until no other process of the step measures; the turn lasts until the next one, or the end."""
        self.tell(turn="wanted")
        if self._descriptor is not None:
            os.read(0, 1)
