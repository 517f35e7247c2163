"""Tests the steps of a run: missing tools, the plan, and the parsing of the profiler's output."""

from __future__ import annotations

import dataclasses
import json
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx.experimental import _config

import swinkernels
from gpu import __main__ as command
from gpu import bits, bundle, fit, plan, profile, sanitize, smoke
from gpu.lines import Emitter
from gpu.plan import Setting
from swinkernels import reference, testing
from swinkernels import triton as triton_ops
from swinkernels.ops import _backends
from tests import emulation


class Told(Emitter):
    """An Emitter that records the result lines passed to it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[dict[str, Any]] = []

    def tell(self, **message: Any) -> None:
        if "result" in message:
            self.lines.append(message)


def run(cases: Callable, group: str, setting: Setting) -> list[dict[str, Any]]:
    told = Told()
    for _, case in cases(group, told, setting):
        case()
    return told.lines


# The plan


def test_the_steps_fit_the_time_and_come_in_order() -> None:
    steps = [step for step in plan.steps(Setting()) if step.name != "build"]
    assert [step.name for step in steps] == list(plan.DEFAULT)
    bounded = [step for step in steps if not step.takes_what_is_left]
    assert sum(step.seconds for step in bounded) + 90 <= 480  # time is left for the last step
    assert all(step.patience <= step.seconds or step.takes_what_is_left for step in steps)
    groups = [group.name for step in steps if step.name == "smoke" for group in step.groups]
    for backend in ("cuda", "triton"):
        assert {g.split()[2] for g in groups if g.startswith(f"attention {backend}")} == {*plan.ARITHMETICS}
        assert f"memory {backend}" in groups
    assert [s.name for s in plan.steps(Setting(), ("time", "smoke")) if s.name != "build"] == ["time", "smoke"]


def test_another_library_is_timed_in_turns() -> None:
    (step,) = (s for s in plan.steps(Setting(against="/there/_ops.abi3.so"), ("time",)) if s.name == "time")
    assert [(group.name, group.library) for group in step.groups] == [
        ("shipped", ""),
        ("against", "/there/_ops.abi3.so"),
    ]
    assert step.takes_turns


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "smoke,dance"], "there is no dance"), (["--against", "/nowhere.so"], "/nowhere.so is not a file")],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["check", *arguments])
    assert message in capsys.readouterr().err


# The device of the reference


@pytest.mark.parametrize("name", smoke.ATTENTION)
def test_the_reference_mixes_no_devices(name: str) -> None:
    """The reference runs on the meta device, which, like a GPU, refuses operations with CPU tensors."""
    case = smoke.tiny(smoke.ATTENTION[name])
    options = {key: value for key, value in case.options.items() if key != "dropout_p"}  # no draws on meta
    case = dataclasses.replace(case, options=options)
    inputs = {
        key: torch.empty(x.shape, dtype=torch.float64, device="meta") for key, x in case.inputs(torch.float32).items()
    }
    with _config.patch(meta_nonzero_assume_all_nonzero=True):
        results = testing.run_case(reference.window_attention_qkvpacked, inputs, case.arguments("meta"))
        terms = testing.cancelling_terms(case, inputs)
    assert {x.device.type for x in (*results.values(), *terms.values())} == {"meta"}


# The sanitizer


def fake_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str) -> Path:
    """Put a fake compute-sanitizer on the PATH, and return the path of the file to which it writes its calls."""
    log, program = folder / "calls", folder / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "call = [sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']]\n"
        f"open({str(log)!r}, 'a').write(json.dumps(call))\nprint({words!r})\nsys.exit({status})\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return log


@pytest.mark.parametrize(
    ("status", "words", "result"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", "ok"),
        (sanitize.FOUND_SOMETHING, "========= Invalid __global__ read of size 16 bytes\n========= 1 error", "wrong"),
        (1, "========= Error: Device not supported", "skipped"),
    ],
)
def test_a_tool_runs_the_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, words: str, result: str
) -> None:
    log = fake_sanitizer(tmp_path, monkeypatch, status, words)
    (line,) = run(sanitize.cases, "racecheck", Setting())
    assert line["result"] == result
    arguments, no_cache = json.loads(log.read_text())
    assert no_cache == "1"  # otherwise torch's memory pool hides out-of-bounds accesses
    assert arguments[:2] == ["--tool", "racecheck"]
    assert arguments[-1] == f"from gpu import sanitize; sanitize.run('cuda', 'cuda', {sanitize.DOZEN})"
    log.unlink()
    run(sanitize.cases, "racecheck", Setting(whole=True))
    assert json.loads(log.read_text())[0][-1].endswith("'cuda', None)")


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (sanitize, profile):
        monkeypatch.setattr(module.shutil, "which", lambda *_, **__: None)
        (line,) = run(module.cases, "memcheck", Setting())
        assert line["result"] == "skipped"
        assert "was found neither on the PATH nor" in line["detail"]


def test_the_calls_have_every_op() -> None:
    assert sanitize.run("cpu", "auto", 24) == 24
    names = {name for name, _, _ in sanitize.memory_bound_calls()} | {
        "window_attention_qkvpacked",
        "window_attention",
        "patch_expanding",  # uses the kernels of layer_norm
    }
    import swinkernels.ops

    # decompositions returns a table, and the halves are composed of other ops.
    assert names == {*swinkernels.ops.__all__} - {"decompositions", "attention_half", "mlp_half"}


def test_a_result_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "attention", lambda *_: {"out": torch.tensor([1.0, float("nan")])})
    with pytest.raises(SystemExit, match=r"window_attention_qkvpacked b1-4x6.*not finite"):
        sanitize.run("cpu", "auto")


def test_a_backend_that_runs_nothing_is_an_error() -> None:
    with pytest.raises(SystemExit, match="the backend triton ran none of the calls"):
        sanitize.run("cpu", "triton", 12)


# The profiler

REPORT = """==PROF== Connected to process 12
"ID","Process ID","Kernel Name","gpu__time_duration.sum","smsp__issue_active.avg.pct_of_peak_sustained_active","other"
"","","","us","%","byte"
"0","12","window_attention_fwd_short_kernel","1,140.5","43.25","7"
"""


def test_a_profile_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert profile.parse(REPORT) == {
        "gpu__time_duration.sum": (1140.5, "us"),
        "smsp__issue_active.avg.pct_of_peak_sustained_active": (43.25, "%"),
    }
    (tmp_path / "ncu").write_text(f"#!{sys.executable}\nprint({REPORT!r})\n")
    (tmp_path / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = run(profile.cases, "fwd", Setting())
    assert [(line["metric"], line["value"]) for line in found] == [
        ("gpu__time_duration.sum", 1140.5),
        ("smsp__issue_active.avg.pct_of_peak_sustained_active", 43.25),
    ]
    (tmp_path / "ncu").write_text(f"#!{sys.executable}\nprint('==ERROR== ERR_NVGPUCTRPERM - no permission')\nexit(1)\n")
    (line,) = run(profile.cases, "fwd", Setting())
    assert (line["result"], line["detail"]) == ("skipped", "ERROR== ERR_NVGPUCTRPERM - no permission")


# CUDA graphs


def test_triton_asks_to_be_called_before_a_capture() -> None:
    """``compiles`` does not compile a kernel, but calls the hook that Triton calls before compiling."""
    knobs = pytest.importorskip("triton.knobs")

    def compiles(x: int) -> int:
        if knobs.runtime.jit_cache_hook is not None:
            knobs.runtime.jit_cache_hook(key="key", repr="", fn=None, compile={}, is_manual_warmup=False)
        return x

    with pytest.raises(
        RuntimeError, match=r"^some_op: Triton has no compiled kernel .* call the op once .* before capturing"
    ):
        triton_ops.launch_captured("some_op", compiles, 3)
    assert knobs.runtime.jit_cache_hook is None
    assert triton_ops.launch_captured("some_op", lambda x: x, 3) == 3  # compiled before


def test_a_first_call_in_a_capture_is_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[dict[str, Any]] = []

    def asks(*_: Any) -> None:
        raise RuntimeError("call it once before capturing")

    monkeypatch.setattr(bits, "capture", asks)
    bits._first("cuda", "triton", lambda: [torch.zeros(1)], lambda **fields: told.append(fields))
    assert "result" not in told[0]
    with pytest.raises(RuntimeError):  # a CUDA kernel has nothing to compile
        bits._first("cuda", "cuda", lambda: [torch.zeros(1)], lambda **fields: told.append(fields))
    monkeypatch.setattr(bits, "capture", lambda call, device: (call(), lambda: None))
    bits._first("cuda", "triton", lambda: [torch.zeros(1)], lambda **fields: told.append(fields))
    assert told[-1]["result"] == "failed"


def test_other_bits_are_counted() -> None:
    told: list[dict[str, Any]] = []
    drawn = iter(torch.arange(20.0))
    bits._same("cpu", "cuda", lambda: [next(drawn).repeat(3)], lambda **fields: told.append(fields))
    assert {line["result"] for line in told} == {"wrong"}
    assert {line["value"] for line in told} == {3}


# Room for blocks


def test_each_architecture_is_asked_for_its_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each architecture runs the kernel that fits its shared memory; if no block of a kernel fits, that is an error."""

    class Emulated:
        def __init__(self, path: Path) -> None:
            self.room, self.waiting = 0, 0

        def configure(self, shared_bytes: int) -> None:
            self.room, self.waiting = shared_bytes, 3

        def launches(self) -> list[emulation.Launch]:
            self.waiting -= 1
            if self.waiting == 2:
                return []  # the first call discards the launches of earlier ops
            name, smem_bytes = ("plain_long", 120 * 1024) if self.room > 120 * 1024 else ("long", 80 * 1024)
            direction = "fwd" if self.waiting == 1 else "bwd"
            return [emulation.Launch(f"_Z9window_attention_{direction}_{name}_kernelIfE", smem_bytes, 256)]

    plain = swinkernels.window_attention_qkvpacked
    monkeypatch.setenv("SWINKERNELS_OPS", "/there")
    monkeypatch.setattr(fit.emulation, "Library", Emulated)
    monkeypatch.setattr(swinkernels, "window_attention_qkvpacked", lambda *a, backend, **given: plain(*a, **given))
    limits = {"max_window_volume": 1024, "shared_bytes_of_longest": 160 * 1024, "max_window_volume_in_less": 256}
    monkeypatch.setitem(_backends.LIMITS, "cuda", limits)
    backward = "_Z9window_attention_bwd_plain_long_kernelIfE"
    monkeypatch.setattr(fit, "_registers", lambda: {("sm_90", backward): 255, ("sm_80", backward): 257})
    told = Told()
    fit._fit("swin_t.1", torch.float32, told)
    found = {(line["arch"], line["direction"]): line for line in told.lines}
    assert len(found) == len(told.lines) == 8
    assert [found[arch, "fwd"]["value"] for arch in fit.ROOMS] == [1, 1, 1, 1]
    for arch in ("sm_86", "sm_89"):
        assert found[arch, "fwd"]["kernel"] == "window_attention_fwd_long_kernel"
        assert found[arch, "fwd"]["detail"].endswith("; in place of window_attention_fwd_plain_long_kernel")
    assert "in place of" not in found["sm_80", "fwd"]["detail"]
    assert (found["sm_90", "bwd"]["value"], found["sm_90", "bwd"]["result"]) == (1, "ok")
    assert (found["sm_80", "bwd"]["value"], found["sm_80", "bwd"]["result"]) == (0, "wrong")
    told.lines.clear()
    fit._fit("window 7x7x7", torch.float32, told)
    refused = [line for line in told.lines if line["arch"] == "sm_86"]
    room = "it takes windows of at most 256 tokens on a GPU with 99 KB of shared memory per block, got 343"
    assert {(x["value"], x["detail"]) for x in refused} == {(0, f"refused, and run by triton: {room}")}


# The bundle


def test_a_bundle_has_what_a_bare_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bundle has a COMMIT file and pure Python packages from pip, but no module compiled for one Python version."""
    if not list((bundle.ROOT / "swinkernels").glob("_ops*.so")):
        pytest.skip("the extension is not built")
    (tmp_path / "wheel").mkdir()
    with zipfile.ZipFile(tmp_path / "wheel" / "carried_here-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_here.py", "")
        wheel.writestr(
            "carried_here-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: carried-here\nVersion: 1.0\n"
        )
        wheel.writestr("carried_here-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("carried_here-1.0.dist-info/RECORD", "")
    monkeypatch.setattr(bundle, "PIP", (*bundle.PIP, "--no-index", f"--find-links={tmp_path / 'wheel'}"))
    monkeypatch.setattr(bundle, "CARRIED", ("carried-here",))
    assert bundle.make(tmp_path / "bundle") == 0
    assert "not carried: monai: pip found no pure Python release" in capsys.readouterr().out
    files = {str(path.relative_to(tmp_path / "bundle")) for path in (tmp_path / "bundle").rglob("*") if path.is_file()}
    assert {"COMMIT", "Makefile", "gpu/__main__.py", "tests/conftest.py", "benchmarks/record.py"} <= files
    assert "setup.py" not in files  # there is nothing to build
    assert any(name.startswith("swinkernels/_ops") for name in files)
    assert [name for name in files if name.endswith(".so") and not name.endswith(".abi3.so")] == []
    assert "carried/carried_here.py" in files
    monkeypatch.setattr(bundle, "MOST_MIB", 0)
    assert bundle.make(tmp_path / "bundle") == 1
