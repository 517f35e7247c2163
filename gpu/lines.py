"""The lines of a run: their results, their JSON form, and the emitter through which a worker writes them.

A line is one result: step, case, op, backend, dtype, direction, value, unit, ``result`` and, if that is not "ok",
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
    """Encode a line. NaN and infinity, which JSON lacks, become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain).encode() + b"\n"


class Emitter:
    """Sends a worker's lines to the run over a file descriptor, or prints them if there is none."""

    def __init__(self, descriptor: int | None = None):
        self._descriptor = descriptor

    def tell(self, **message: Any) -> None:
        """Send a message. Its fields ``environment`` and ``library`` apply to the rest of the run."""
        os.write(1 if self._descriptor is None else self._descriptor, dump(message))

    def begin(self, case: str) -> None:
        """Name the case that begins; if the process dies or hangs, the fault is reported for this case."""
        self.tell(begin=case)

    def line(self, **fields: Any) -> None:
        self.tell(**{"result": OK, **fields})

    def turn(self) -> None:
        """Wait until no other process of the step measures. The turn lasts until this process calls ``turn`` again."""
        self.tell(turn="wanted")
        if self._descriptor is not None:
            os.read(0, 1)
