"""Tests that a run survives failed processes, writes results as they arrive, and stays within its time limit."""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu_page
from gpu import lines, summary
from gpu.runner import Group, Run, Step

# A worker process that follows the runner's protocol. It has three cases, and the group's name selects the behaviour of
# the second case.
WORKER = """
import json, os, signal, subprocess, sys, time
step, group, _, descriptor, _, skip = sys.argv[1:]
def say(**message): os.write(int(descriptor), (json.dumps(message) + "\\n").encode())
if group == "silent": sys.exit(0)
if group == "build": say(library="/there")
for index, case in enumerate("abc"):
    if index < int(skip): continue
    say(begin=case)
    if step == "turns": say(turn="wanted"); sys.stdin.read(1); begun = time.monotonic(); time.sleep(0.05)
    if case == "b":
        print("about to", group, flush=True)
        if group == "crash": os.kill(os.getpid(), signal.SIGSEGV)
        if group == "hang": subprocess.run([sys.executable, "-c", "import time; time.sleep(60)"])
        if group == "lost": say(result="failed", detail="illegal access"); sys.exit(77)
        if group == "nan": say(result="wrong", value=float("nan")); continue
    say(result="ok", detail=os.environ.get("SWINKERNELS_OPS", ""), **({"at": begun} if step == "turns" else {}))
"""


@pytest.fixture
def start(tmp_path: Path):
    (tmp_path / "worker.py").write_text(WORKER)

    def make(budget: float = 60) -> Run:
        return Run(tmp_path / "out", budget, [sys.executable, str(tmp_path / "worker.py")], {"commit": "abc"})

    return make


def steps(*groups: str) -> Step:
    return Step("a step", 20, tuple(map(Group, groups)), patience=2)


FAULTS = {
    "crash": ("crashed", "exit status -11; its last output: about to crash"),
    "hang": ("hung", "silent for 2 s; its last output: about to hang"),
    "lost": ("failed", "illegal access"),
    "nan": ("wrong", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_bad_line(start, fault: str) -> None:
    """The other cases, groups and steps still run, and the exit status reports the fault."""
    run = start()
    run.run(steps(fault, "fine"))
    run.run(Step("the next", 20, (Group("fine"),)))
    found = [(line["step"], line["group"], line["case"], line["result"]) for line in run.lines]
    result, detail = FAULTS[fault]
    assert sorted(found) == sorted(
        [
            *(("a step", fault, case, result if case == "b" else "ok") for case in "abc"),
            *(("a step", "fine", case, "ok") for case in "abc"),
            *(("the next", "fine", case, "ok") for case in "abc"),
        ]
    )
    (bad,) = (line for line in run.lines if line["result"] in lines.BAD)
    assert bad.get("detail") == detail
    assert run.status == 1
    text = summary.table(run.lines, run.spent)
    assert f"1 {result}" in text
    assert f"{result}: a step b" in text
    written = gpu_page.read_lines(run.path)
    assert [line["case"] for line in written] == [line["case"] for line in run.lines]
    assert all(line["commit"] == "abc" and line["date"] for line in written)
    if fault == "nan":
        assert next(line for line in written if line["result"] == "wrong")["value"] is None


def test_a_run_without_a_fault_is_good(start) -> None:
    run = start()
    run.run(steps("fine"))
    assert run.status == 0
    assert start().status == 1  # nothing is confirmed


def test_a_process_that_says_nothing_has_failed(start) -> None:
    run = start()
    run.run(steps("silent"))
    assert [line["result"] for line in run.lines] == ["failed"]


def test_what_does_not_fit_is_cut_and_not_squeezed(start) -> None:
    run = start(budget=30)
    run.run(Step("long", 40, (Group("fine"),)))
    run.run(Step("short", 10, (Group("fine"),)))
    run.run(Step("the rest", 40, (Group("fine"),), takes_what_is_left=True))
    assert [(line["step"], line["result"]) for line in run.lines] == [
        ("long", "cut"),
        *[("short", "ok")] * 3,
        *[("the rest", "ok")] * 3,
    ]
    assert run.status == 0


def test_a_step_ends_with_its_time(start) -> None:
    run = start()
    begun = time.monotonic()
    run.run(Step("a step", 2, (Group("hang"), Group("fine")), processes=1, patience=60))
    assert time.monotonic() - begun < 30  # long before the hanging process would end
    assert {line["group"] for line in run.lines if line["result"] == "cut"} == {"hang", "fine"}


def test_turns_alternate_and_do_not_overlap(start) -> None:
    run = start()
    run.run(Step("turns", 20, (Group("one"), Group("two")), takes_turns=True))
    found = sorted((line for line in run.lines if "at" in line), key=lambda line: line["at"])
    assert [line["case"] for line in found] == ["a", "a", "b", "b", "c", "c"]
    assert all(x["group"] != y["group"] for x, y in zip(found[::2], found[1::2], strict=True))
    assert all(y["at"] - x["at"] > 0.045 for x, y in itertools.pairwise(found))


def test_a_library_that_was_built_is_handed_on(start) -> None:
    run = start()
    step = Step("a step", 20, (Group("fine", "built"),))
    run.run(step)
    assert [line["detail"] for line in run.lines] == ["its library was not built"]
    run.run(steps("build"))
    run.run(step)
    assert [line["detail"] for line in run.lines[-3:]] == ["/there"] * 3


def test_half_a_line_at_the_end_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "gpu.jsonl"
    path.write_text(json.dumps({"case": "a"}) + '\n{"case": "b')
    assert gpu_page.read_lines(path) == [{"case": "a"}]


def test_the_table_has_at_most_forty_lines() -> None:
    found = [
        {"step": "smoke", "op": f"op{i}", "backend": "cuda", "dtype": "float16", "case": "x", "result": "wrong",
         "value": 3.0, "unit": "eps", "detail": "dk: RMS error"}
        for i in range(50)
    ]  # fmt: skip
    found += [
        {"step": "time", "op": "window_attention", "shape": f"s{i}", "backend": "cuda", "dtype": "bfloat16", "us": 5.0,
         "direction": direction, "value": 80.0, "unit": "% of copy", "goal": 85.0, "result": "ok", "case": "x"}
        for i in range(50)
        for direction in ("fwd", "bwd")
    ]  # fmt: skip
    text = summary.table(found, {"smoke": 3.0})
    assert len(text.splitlines()) == summary.MOST_LINES
    assert "wrong: smoke op0 cuda float16 x: 3 eps dk: RMS error" in text
    assert "window_attention s0: cuda fwd 80 % (85), cuda bwd 80 % (85)" in text
