"""Tests that the smoke step detects a planted fault, reports it in one line, and keeps all other results."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gpu import lines
from gpu.runner import Group, Run, Step

# A worker process with a faulty attention op in place of a faulty kernel: the op misbehaves in the cases named after a
# fault. The tests cover the whole step: its processes, cases, reference, budget and lines.
PLANTED = """
import os, sys, time
import torch, swinkernels
from gpu import __main__ as command, smoke
from swinkernels.testing import WindowAttentionCase

FAULTS = ("none", "wrong scale in dk", "NaN in out", "crash", "hang", "none again")
# Each case has a map of a different size, by which the faulty op recognises it.
smoke.ATTENTION = {name: WindowAttentionCase(1, (4, 4 * (i + 1)), 1, 8, 4, 2) for i, name in enumerate(FAULTS)}
smoke.tiny = lambda case: case
real = swinkernels.window_attention_qkvpacked


class Faulty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, fault):
        ctx.fault = fault
        return qkv.clone()

    @staticmethod
    def backward(ctx, dqkv):
        dq, dk, dv = dqkv.chunk(3, dim=-1)
        return torch.cat([dq, dk * (1.01 if ctx.fault == "wrong scale in dk" else 1), dv], dim=-1), None


def planted(qkv, *args, **given):
    fault = FAULTS[qkv.shape[2] // 4 - 1]
    if fault == "crash": os.abort()
    if fault == "hang": time.sleep(600)
    out = real(Faulty.apply(qkv, fault), *args, **given)
    return out + float("nan") if fault == "NaN in out" else out


swinkernels.window_attention_qkvpacked = planted
sys.exit(command.main(["work", "--rehearse", *sys.argv[1:]]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("planted")
    (folder / "worker.py").write_text(f"import sys\nsys.path.insert(0, {str(Path.cwd())!r})\n{PLANTED}")
    run = Run(folder / "out", 500, [sys.executable, str(folder / "worker.py")], {"commit": "abc"})
    run.run(Step("smoke", 300, (Group("attention reference float32 0/1"),), patience=25))
    run.run(Step("info", 200, (Group("info"),), patience=100))
    return run


@pytest.mark.parametrize(
    ("case", "result", "detail"),
    [
        ("wrong scale in dk", "wrong", "dqkv: RMS error"),
        ("NaN in out", "wrong", "out: RMS error nan"),
        ("crash", "crashed", "exit status -6"),
        ("hang", "hung", "silent for 25 s"),
    ],
)
def test_a_planted_fault_is_one_bad_line(run: Run, case: str, result: str, detail: str) -> None:
    (bad,) = (line for line in run.lines if line["case"] == case and line["result"] in lines.BAD)
    assert bad["result"] == result
    assert detail in bad["detail"]
    if case == "wrong scale in dk":  # dk is off by one percent
        assert bad["direction"] == "bwd"
        assert bad["value"] > 100


def test_everything_else_is_run_and_the_status_says_that_something_is_bad(run: Run) -> None:
    right = [
        (line["case"], line["direction"]) for line in run.lines if line["step"] == "smoke" and line["result"] == "ok"
    ]
    assert right == [
        *[("none", d) for d in ("fwd", "bwd")],
        ("wrong scale in dk", "fwd"),
        ("NaN in out", "bwd"),  # the gradients are right
        *[("none again", d) for d in ("fwd", "bwd")],
    ]
    assert [line["result"] for line in run.lines if line["step"] == "info"] == ["ok"]
    assert run.status == 1
