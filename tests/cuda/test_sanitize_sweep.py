"""`make sanitize` without a GPU: the calls run, and what is missing or found is said."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.cuda import sanitize_sweep


def test_the_sweep_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """A fast look: the calls of one dtype; every op that the package offers is among them."""
    sanitize_sweep.main(["--sweep", "--device", "cpu"])
    total, rest = capsys.readouterr().out.split(" calls on cpu, backend auto: ")
    assert rest.startswith(f"{total} ran, 0 ")
    names = {name.split()[0] for name, _, _ in sanitize_sweep.memory_ops("auto")} | {
        "window_attention_qkvpacked",
        "window_attention",
        "patch_expanding",  # of which the kernels are those of layer_norm
    }
    import swinkernels.ops

    assert names >= set(swinkernels.ops.__all__)


def test_a_result_that_is_not_finite_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize_sweep, "attention", lambda *_: {"out": torch.tensor([1.0, float("nan")])})
    with pytest.raises(SystemExit, match=r"window_attention_qkvpacked b1-4x6.*not finite"):
        sanitize_sweep.main(["--sweep", "--device", "cpu"])


def test_a_backend_that_runs_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="the backend triton ran nothing"):
        sanitize_sweep.main(["--sweep", "--device", "cpu", "--backend", "triton"])


def fake_sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, finds: str) -> Path:
    """A compute-sanitizer that writes down how it was called, and finds something with one tool."""
    log = folder / "calls"
    program = folder / "compute-sanitizer"
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "call = [sys.argv[1:], os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING']]\n"
        f"open({str(log)!r}, 'a').write(json.dumps(call) + '\\n')\n"
        f"sys.exit(86 if {finds!r} in sys.argv else 0)\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    return log


def test_each_tool_runs_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = fake_sanitizer(tmp_path, monkeypatch, finds="racecheck")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit, match="racecheck did not end well"):
        sanitize_sweep.main([])
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert [call[0][call[0].index("--tool") + 1] for call in calls] == ["memcheck", "racecheck", "synccheck"]
    for arguments, no_cache in calls:
        assert no_cache == "1"  # else torch's own pool hides what lies beyond a tensor
        assert "--error-exitcode" in arguments
        assert arguments[-5:] == ["--sweep", "--device", "cuda", "--backend", "cuda"]
    sanitize_sweep.main(["--tools", "memcheck"])


def test_what_is_missing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sanitizer(tmp_path, monkeypatch, finds="nothing")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees no CUDA GPU"):
        sanitize_sweep.main([])
    (tmp_path / "compute-sanitizer").unlink()
    monkeypatch.setattr(sanitize_sweep.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit, match="compute-sanitizer was not found"):
        sanitize_sweep.main([])
