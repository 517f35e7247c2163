"""Runs steps in time boxes, each group of a step in a process of its own, and appends every result at once.

It imports neither torch nor the package, so nothing that a kernel does can end it. A process that dies or is not heard
of for too long is one bad line about the case that it had begun, and is started again behind that case. When time runs
short, later steps are cut, not squeezed. In a step that takes turns, one process measures at a time, once all have got
ready.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import selectors
import signal
import subprocess
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from gpu import ROOT
from gpu.lines import BAD, CRASHED, CUT, FAILED, HUNG, OK, Line, dump

DEVICE_IS_LOST = 77  # exit status of a process whose next case needs a new one; its line is written
LOG_BYTES = 100_000  # of a process, its last ones
LEAST_SECONDS = 20  # that a step which takes what is left needs


@dataclass(frozen=True)
class Group:
    """What one process does."""

    name: str
    library: str = ""  # op library in place of the installation's; "built": that of the step "build"


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    groups: tuple[Group, ...]
    processes: int = 16
    patience: float = 30  # seconds in which a process has to be heard of
    takes_turns: bool = False
    takes_what_is_left: bool = False


class _Process:
    def __init__(self, command: Sequence[str], group: Group, skip: int, environment: Mapping[str, str]):
        out, write = os.pipe()
        os.set_blocking(out, False)
        self.group, self.skip, self.out = group, skip, out
        self.case, self.cases, self.said = "", skip, False
        self.waits, self.reached_end, self.rest = False, False, b""
        self.heard = time.monotonic()
        self.log: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [*command, "--lines", str(write), "--skip", str(skip)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)

    def messages(self) -> list[Line]:
        """What it said since the last time."""
        data = self.rest
        while True:
            try:
                more = os.read(self.out, 65536)
            except BlockingIOError:
                break
            if not more:
                self.reached_end = True
                break
            data += more
        *whole, self.rest = data.split(b"\n")
        if whole:
            self.heard = time.monotonic()
        return [json.loads(text) for text in whole]

    def grant(self) -> None:
        self.waits = False
        self.heard = time.monotonic()
        assert self.process.stdin is not None
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        """With all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def close(self) -> str:
        """Its log's end, once it has ended."""
        os.close(self.out)
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - LOG_BYTES))
        with self.log:
            return self.log.read().decode(errors="replace")


class Run:
    """The lines of a run in a file of its own, and beside it what the processes printed."""

    def __init__(self, out: Path, budget: float, command: Sequence[str], facts: Line):
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.log = out / "gpu.jsonl", out / "gpu.log"
        for path in (self.path, self.log):
            path.unlink(missing_ok=True)
        self.command, self.facts = list(command), facts
        self.ends = time.monotonic() + budget
        self.library = ""
        self.lines: list[Line] = []
        self.spent: dict[str, float] = {}

    def write(self, **fields: object) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = {**fields, **self.facts, "date": now}
        self.lines.append(line)
        with self.path.open("ab") as file:
            file.write(dump(line))

    def run(self, step: Step) -> None:
        left = self.ends - time.monotonic()
        if left < (LEAST_SECONDS if step.takes_what_is_left else step.seconds):
            detail = f"{left:.0f} s were left, it may take {step.seconds:.0f}"
            self.write(step=step.name, case="all of it", result=CUT, detail=detail)
            return
        seconds = left if step.takes_what_is_left else step.seconds
        print(f"{step.name}: {len(step.groups)} processes, at most {seconds:.0f} s", flush=True)
        started = time.monotonic()
        self._run(step, started + seconds)
        self.spent[step.name] = time.monotonic() - started

    def _run(self, step: Step, ends: float) -> None:
        to_start = deque((group, 0) for group in step.groups)
        running: list[_Process] = []
        holder: _Process | None = None
        with selectors.DefaultSelector() as selector:
            while to_start or running:
                while to_start and len(running) < step.processes and time.monotonic() < ends:
                    group, skip = to_start.popleft()
                    if group.library == "built" and not self.library:
                        self.write(
                            step=step.name,
                            group=group.name,
                            case=group.name,
                            result=FAILED,
                            detail="its library was not built",
                        )
                        continue
                    running.append(self._start(step, group, skip))
                    selector.register(running[-1].out, selectors.EVENT_READ, running[-1])
                for key, _ in selector.select(timeout=0.2):
                    process: _Process = key.data
                    for message in process.messages():
                        self._hear(step, process, message)
                    if process is holder and process.waits:
                        holder = None
                now = time.monotonic()
                if holder is None and (waiting := [p for p in running if p.waits]):
                    # Who is not ready by the middle of the step no longer keeps the others waiting.
                    if len(waiting) == len(running) or ends - now < step.seconds / 2:
                        holder = min(waiting, key=lambda p: p.heard)
                        holder.grant()
                for process in list(running):
                    silent = not process.waits and now - process.heard > step.patience
                    if not (process.reached_end or silent or now > ends):
                        continue
                    selector.unregister(process.out)
                    running.remove(process)
                    holder = None if process is holder else holder
                    if self._end(step, process, silent):
                        to_start.append((process.group, process.cases))
                if now > ends and not running:
                    for group, _ in to_start:
                        self.write(
                            step=step.name, group=group.name, case=group.name, result=CUT, detail="its step had no time"
                        )
                    break

    def _start(self, step: Step, group: Group, skip: int) -> _Process:
        environment = dict(os.environ)
        library = self.library if group.library == "built" else group.library
        if library:
            environment["SWINKERNELS_OPS"] = library
        return _Process([*self.command, step.name, group.name], group, skip, environment)

    def _hear(self, step: Step, process: _Process, message: Line) -> None:
        if "begin" in message:
            process.case, process.cases = message["begin"], process.cases + 1
        elif "turn" in message:
            process.waits = True
        elif "environment" in message:
            self.facts = {**self.facts, **message["environment"]}
        elif "library" in message:
            self.library = message["library"]
        else:
            process.said = True
            self.write(**{"step": step.name, "group": process.group.name, "case": process.case, **message})

    def _end(self, step: Step, process: _Process, silent: bool) -> bool:
        """A process that has ended, or has to; whether it is to be started again behind its last case."""
        if process.reached_end and not silent:
            try:
                status: int | None = process.process.wait(10)
            except subprocess.TimeoutExpired:  # its output is closed, and it does not go
                status = None
        else:
            status = None
        process.kill()  # what it left behind, too
        text = process.close()
        with self.log.open("a") as file:
            file.write(f"\n===== {step.name}: {process.group.name}\n{text}")
        where = {"step": step.name, "group": process.group.name, "case": process.case or process.group.name}
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]
        if status == 0:
            if not process.said and not process.skip:
                self.write(**where, result=FAILED, detail=f"it said nothing; its last words: {last}")
            return False
        if status is None and not silent:
            self.write(**where, result=CUT, detail="its step's time was up")
            return False
        if status is None:
            self.write(**where, result=HUNG, detail=f"not heard of for {step.patience:.0f} s; its last words: {last}")
        elif status != DEVICE_IS_LOST:
            self.write(**where, result=CRASHED, detail=f"exit status {status}; its last words: {last}")
        return process.cases > process.skip

    @property
    def status(self) -> int:
        """The exit status: 1 if anything is bad, or if nothing is confirmed."""
        results = {line["result"] for line in self.lines}
        return 1 if results & {*BAD} or OK not in results else 0
