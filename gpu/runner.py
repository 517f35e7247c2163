"""Runs steps within time limits, each group of a step in its own process, and records each result as it arrives.

The runner imports neither torch nor the package, so no kernel can crash it. If a process dies or is silent for too
long, a line reports the failure of its current case, and a new process continues with the next case. When time runs
short, later steps are dropped instead of shortened. In a step that takes turns, once all processes are ready, they
measure one at a time.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import queue
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from gpu import ROOT
from gpu.lines import BAD, CRASHED, CUT, FAILED, HUNG, OK, Line, dump

DEVICE_IS_LOST = 77  # exit status of a process that has reported its case, but has lost its GPU
LOG_BYTES = 100_000  # the maximum kept from the end of a process's output
LEAST_SECONDS = 20  # the minimum for starting a step that takes the remaining time


@dataclass(frozen=True)
class Group:
    """The cases of a step that one process runs."""

    name: str
    library: str = ""  # op library to use instead of the installed one; "built" is the library from the step "build"


@dataclass(frozen=True)
class Step:
    name: str
    seconds: float
    groups: tuple[Group, ...]
    processes: int = 16
    patience: float = 30  # seconds of silence after which a process counts as hung
    takes_turns: bool = False
    takes_what_is_left: bool = False


class _Process:
    """The process of a group. A thread queues messages as (self, message), then (self, None) when the pipe closes."""

    def __init__(self, command: Sequence[str], group: Group, skip: int, library: str, messages: queue.Queue):
        out, write = os.pipe()
        self.group, self.skip, self.cases, self.case = group, skip, skip, ""
        self.has_lines = self.waits = self.has_ended = False
        self.heard = time.monotonic()
        self.log: IO[bytes] = TemporaryFile()  # noqa: SIM115 (closed with the process)
        self.process = subprocess.Popen(
            [*command, "--lines", str(write), "--skip", str(skip)],
            cwd=ROOT,
            env={**os.environ, **({"SWINKERNELS_OPS": library} if library else {})},
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            start_new_session=True,
        )
        os.close(write)
        threading.Thread(target=self._read, args=(out, messages), daemon=True).start()

    def _read(self, out: int, messages: queue.Queue) -> None:
        with os.fdopen(out) as lines:
            for text in lines:
                if text.endswith("\n"):  # an incomplete line means that the process died while writing it
                    messages.put((self, json.loads(text)))
        messages.put((self, None))

    def grant(self) -> None:
        self.waits, self.heard = False, time.monotonic()
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()

    def end(self) -> tuple[int | None, str]:
        """Kill the process and its children; return its exit status, None if killed, and the end of its output."""
        status = None
        if self.has_ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # a process may close the pipe without exiting
                status = self.process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - LOG_BYTES))
        with self.log:
            return status, self.log.read().decode(errors="replace")


class Run:
    """Runs steps, writing their lines to one file and the output of their processes to another."""

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

    def write(self, step: Step, group: str, case: str, result: str, **fields: object) -> None:
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = {"step": step.name, "group": group, "case": case, "result": result, **fields, **self.facts, "date": now}
        self.lines.append(line)
        with self.path.open("ab") as file:
            file.write(dump(line))

    def run(self, step: Step) -> None:
        started = time.monotonic()
        left = self.ends - started
        if left < (LEAST_SECONDS if step.takes_what_is_left else step.seconds):
            self.write(step, "", "all of it", CUT, detail=f"{left:.0f} s were left of the {step.seconds:.0f} needed")
            return
        seconds = left if step.takes_what_is_left else step.seconds
        print(f"{step.name}: {len(step.groups)} processes, at most {seconds:.0f} s", flush=True)
        self._run(step, started + seconds)
        self.spent[step.name] = time.monotonic() - started

    def _run(self, step: Step, ends: float) -> None:
        to_start = deque((group, 0) for group in step.groups)
        running: list[_Process] = []
        messages: queue.Queue[tuple[_Process, Line | None]] = queue.Queue()
        holder: _Process | None = None
        while to_start or running:
            while to_start and (time.monotonic() > ends or len(running) < step.processes):
                group, skip = to_start.popleft()
                library = self.library if group.library == "built" else group.library
                if time.monotonic() > ends:
                    self.write(step, group.name, group.name, CUT, detail="no time was left in its step")
                elif group.library and not library:
                    self.write(step, group.name, group.name, FAILED, detail="its library was not built")
                else:
                    command = [*self.command, step.name, group.name]
                    running.append(_Process(command, group, skip, library, messages))
            with contextlib.suppress(queue.Empty):
                process, message = messages.get(timeout=0.2)
                while True:
                    if process in running:
                        self._hear(step, process, message)
                    process, message = messages.get_nowait()
            now = time.monotonic()
            if holder is None or holder.waits or holder not in running:
                holder = None
                # After half of the step's time, processes that are ready no longer wait for the others.
                waiting = [p for p in running if p.waits]
                if waiting and (len(waiting) == len(running) or ends - now < step.seconds / 2):
                    holder = min(waiting, key=lambda p: p.heard)
                    holder.grant()
            for process in list(running):
                silent = not process.waits and now - process.heard > step.patience
                if process.has_ended or silent or now > ends:
                    running.remove(process)
                    if self._end(step, process, silent):
                        to_start.append((process.group, process.cases))

    def _hear(self, step: Step, process: _Process, message: Line | None) -> None:
        process.heard = time.monotonic()
        if message is None:
            process.has_ended = True
        elif "begin" in message:
            process.case, process.cases = message["begin"], process.cases + 1
        elif "turn" in message:
            process.waits = True
        elif "environment" in message:
            self.facts = {**self.facts, **message["environment"]}
        elif "library" in message:
            self.library = message["library"]
        else:
            process.has_lines = True
            self.write(step, process.group.name, **{"case": process.case, **message})

    def _end(self, step: Step, process: _Process, silent: bool) -> bool:
        """End a process and report its failure, if any. Return True if a new process should run the remaining cases."""
        status, text = process.end()
        with self.log.open("a") as file:
            file.write(f"\n===== {step.name}: {process.group.name}\n{text}")
        last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no output")[:300]
        result, detail = CRASHED, f"exit status {status}; its last output: {last}"
        if status == 0:
            result, detail = FAILED, f"the process reported nothing; its last output: {last}"
        elif status is None and silent:
            result, detail = HUNG, f"silent for {step.patience:.0f} s; its last output: {last}"
        elif status is None:
            result, detail = CUT, "the time of its step was up"
        if status != DEVICE_IS_LOST and not (status == 0 and (process.has_lines or process.skip)):
            self.write(step, process.group.name, process.case or process.group.name, result, detail=detail)
        return status != 0 and result != CUT and process.cases > process.skip

    @property
    def status(self) -> int:
        """Return the exit status: 1 if a line reports a failure or if no line is "ok", else 0."""
        results = {line["result"] for line in self.lines}
        return 1 if results & {*BAD} or OK not in results else 0
