"""Counts the bytecode instructions of a call, which, unlike a time, do not depend on the machine."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


def instructions_of(function: Callable[[], Any]) -> int:
    """Call ``function`` and return the number of bytecode instructions that Python executes in this thread."""
    executed = 0

    def count(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal executed
        frame.f_trace_opcodes = True
        executed += event == "opcode"
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        function()
    finally:
        sys.settrace(before)
    return executed
