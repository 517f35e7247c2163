"""Defines the lines of a run: their results, their JSON form, and the emitter with which a process sends them.

A line is one result. Its fields are step, case, op, backend, dtype, direction, value, unit, ``result`` and, if the
result is not "ok", ``detail``. The runner adds device, driver, torch, triton, commit and date. Lines with times also
have ``us``, ``copy_us`` and ``goal``.
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
    """Encode a line as JSON. NaN and infinity, which JSON does not have, become null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain).encode() + b"\n"


class Emitter:
    """Sends the lines of a process to the runner over ``descriptor``, or prints them if it is None."""

    def __init__(self, descriptor: int | None = None):
        self._descriptor = descriptor

    def tell(self, **message: Any) -> None:
        """Send a message to the runner, which uses an ``environment`` or ``library`` in it from then on."""
        os.write(1 if self._descriptor is None else self._descriptor, dump(message))

    def begin(self, case: str) -> None:
        """Report the start of a case. If the process dies or hangs, the runner reports the failure for this case."""
        self.tell(begin=case)

    def line(self, **fields: Any) -> None:
        self.tell(**{"result": OK, **fields})

    def turn(self) -> None:
        """Wait until no other process of the step is measuring. The turn lasts until the next call of ``turn``."""
        self.tell(turn="wanted")
        if self._descriptor is not None:
            os.read(0, 1)
