"""Tests `make gpu-check REHEARSE=1`, the GPU check with emulated and interpreted kernels.

Most of its time is spent on starting a process for each group of a step, so `make test` runs a few of the steps.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_page, memory_bound
from gpu import ROOT, fit, lines, plan, smoke
from gpu.plan import Setting
from swinkernels import _extension
from swinkernels.ops import _backends
from tests import emulation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(emulation.missing() is not None, reason=str(emulation.missing())),
    pytest.mark.skipif(_extension.build is None, reason=str(_extension.error)),
]


FEW = ("info", "bits", "fit")
few = pytest.mark.parametrize("run", [FEW], indirect=True, ids=["few"])
every = pytest.mark.parametrize("run", [pytest.param((), marks=pytest.mark.long)], indirect=True, ids=["every"])


@pytest.fixture(scope="module")
def run(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[subprocess.CompletedProcess, list[dict[str, Any]], Path]:
    """Rehearse the steps of the parameter, or all if it is empty."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-m", "gpu", "check", "--rehearse", "--out", str(out)]
    if request.param:
        command += ["--steps", ",".join(request.param)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done, gpu_page.read_lines(out / "gpu.jsonl"), out


@pytest.mark.parametrize("run", [FEW, pytest.param((), marks=pytest.mark.long)], indirect=True, ids=["few", "every"])
def test_nothing_is_bad_and_every_step_runs(run, request) -> None:
    done, found, out = run
    names = request.node.callspec.params["run"] or plan.DEFAULT
    bad = [line for line in found if line["result"] in lines.BAD]
    assert bad == [], (out / "gpu.log").read_text()[-5000:]
    assert done.returncode == 0
    results = Counter((line["step"], line["result"]) for line in found)
    for step in plan.steps(Setting(rehearse=True), names):
        assert results[step.name, "ok"] or step.name == "ncu", step.name
    assert not any(result == "cut" for _, result in results)
    assert {path.name for path in out.iterdir()} == {"gpu.jsonl", "gpu.log", "gpu.txt"}
    table = (out / "gpu.txt").read_text()
    assert table in done.stdout
    assert len(table.splitlines()) <= 40


@few
def test_every_line_says_where_it_is_from(run) -> None:
    _, found, _ = run
    first = next(i for i, line in enumerate(found) if line["step"] == "info")
    for line in found[first:]:
        assert all(line[key] for key in ("step", "case", "result", "device", "torch", "commit", "date"))
        assert line["rehearsed"]  # generated pages leave out rehearsals


@every
def test_every_cuda_kernel_is_right_in_every_arithmetic(run) -> None:
    """The calls go through the bindings, which otherwise only run on a GPU, and include norms and partition."""
    _, found, _ = run
    seen = {(x["op"], x["backend"], x["dtype"], x["direction"]) for x in found if x["step"] == "smoke"}
    wanted = {(op, backend, dtype) for op, backend, dtype in gpu_page.kernels() if backend == "cuda"}
    assert {(*kernel, d) for kernel in wanted for d in ("fwd", "bwd")} <= seen
    norms = {op for op, bench in memory_bound.BENCHES.items() if bench.bare_backward}
    assert norms <= {op for op, *_ in seen}
    of_cases = {x["case"] for x in found if x["step"] == "smoke" and x["group"] == "attention cuda bfloat16 0/1"}
    assert of_cases >= {*smoke.ATTENTION} - {f"swin_t.{i}" for i in (2, 3)}  # smoke.tiny makes them equal to swin_t.1
    of_triton = {(x["op"], x["direction"]) for x in found if x["step"] == "smoke" and x.get("backend") == "triton"}
    assert {("window_attention", "fwd"), ("window_attention", "bwd"), ("window_partition", "fwd")} <= of_triton


@few
def test_a_first_call_in_a_capture_and_replays_are_tried(run) -> None:
    _, found, _ = run
    of_cuda = {(x["op"], x["direction"]) for x in found if x["step"] == "bits" and x["backend"] == "cuda"}
    for op in ("window_attention", "window_partition", "layer_norm"):
        assert {d for o, d in of_cuda if o == op} >= {"first call in a capture", "side stream", "replay"}


@few
def test_hot_kernels_fit_gpus_with_less_shared_memory_or_are_refused(run) -> None:
    """Each launched kernel fits the GPU's shared memory, threads and registers; otherwise Triton runs the call."""
    _, found, _ = run
    of_fit = [x for x in found if x["step"] == "fit"]
    assert {x["arch"] for x in of_fit} == {*fit.ROOMS}
    assert {x["case"].rpartition(" ")[0] for x in of_fit} == {*fit.HOT}
    for line in of_fit:
        assert line["value"] >= 1 or line["detail"].startswith("refused, and run by triton: it takes windows of")
    assert all(line["value"] >= 1 for line in of_fit if line["arch"] in ("sm_80", "sm_90"))


@pytest.mark.parametrize(
    ("arch", "launch", "blocks"),
    [
        ("sm_80", (100 * 1024, 128, 0), 1),
        ("sm_86", (100 * 1024, 128, 0), 0),
        ("sm_90", (100 * 1024, 128, 0), 2),
        ("sm_86", (0, 512, 0), 3),
        ("sm_90", (0, 128, 168), 3),  # 65536 registers suffice for 12 warps of 168 * 32
        ("sm_90", (0, 512, 168), 0),
    ],
)
def test_blocks_of_a_multiprocessor(arch: str, launch: tuple[int, int, int], blocks: int) -> None:
    assert fit.ROOMS[arch].blocks(*launch) == blocks


def test_a_call_that_fits_nowhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"max_window_volume": 1024, "shared_bytes_of_longest": 160 * 1024, "max_window_volume_in_less": 256}
    monkeypatch.setitem(_backends.LIMITS, "cuda", limits)
    case = smoke.ATTENTION["window 7x7x7"]
    reasons = {arch: fit.refusal(case, room) for arch, room in fit.ROOMS.items()}
    assert reasons["sm_80"] is reasons["sm_90"] is None
    room = "it takes windows of at most 256 tokens on a GPU with 99 KB of shared memory per block, got 343"
    assert reasons["sm_86"] == reasons["sm_89"] == f"refused, and run by triton: {room}"
