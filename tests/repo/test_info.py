"""Tests ``python -m swinkernels.info`` and the build information of the compiled extension."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from swinkernels import __version__, _extension, info
from swinkernels.ops import _backends

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(_extension.build is None, reason=str(_extension.error))

BUILT = {
    "version": "1.2.3",
    "compiler": "gcc 12.2.0",
    "torch_version": "2.11.0",
    "torch_cuda": "13.0",
    "cuda": True,
    "cuda_missing": None,
    "cuda_version": "13.0",
    "arch_list": ["8.0", "9.0+PTX"],
    "cuda_sources": ["a.cu", "b.cu"],
    "has_cpu_kernels": True,
    "cpu_instruction_sets": ["baseline", "avx2"],
    "window_attention_limits": {"max_window_volume": 256},
    "layer_norm_limits": {"max_row": 8192},
}


def test_printed_report_names_every_backend_and_reason() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "swinkernels.info"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.startswith(f"swinkernels {__version__}, Python ")
    assert torch.__version__ in result.stdout
    for backend in _backends.BACKENDS:
        reason = _backends.unavailable(backend)
        expected = "available" if reason is None else f"not available because {reason}"
        assert any(line.split(maxsplit=1) == [backend, expected] for line in result.stdout.splitlines()), backend


def test_json_is_what_collect_returns(capsys: pytest.CaptureFixture[str]) -> None:
    info.main(["--json"])
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_collect_reads_the_reasons_of_the_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {name: "not today" if name == "cuda" else None for name in _backends.BACKENDS}
    monkeypatch.setattr(_backends, "unavailable", reasons.get)
    assert info.collect()["backends"] == reasons


def test_fused_products_and_the_reasons_against_them(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {torch.float32: "not on this machine", torch.bfloat16: None, torch.float16: None}
    monkeypatch.setattr(info, "why_not_fused", reasons.get)
    got = info.collect()
    assert got["fused_products"] == {"float32": "not on this machine", "bfloat16": None, "float16": None}
    lines = info.describe(got).splitlines()
    assert "  float32    not on this machine" in lines
    assert "  bfloat16   fused if large enough" in lines


@needs_extension
def test_running_instruction_set_is_one_that_was_compiled() -> None:
    got = info.collect()
    assert got["cpu_instruction_set"] in got["build"]["cpu_instruction_sets"]
    assert f"{got['cpu_instruction_set']} runs here" in info.describe(got)


def test_description_of_a_whole_build() -> None:
    gpu = {"name": "Some GPU", "capability": "9.0", "multiprocessors": 132, "memory_gib": 79.2}
    text = info.describe({**info.collect(), "build": BUILT, "gpus": [gpu]})
    assert "GPU 0: Some GPU, compute capability 9.0, 132 multiprocessors, 79.2 GiB" in text
    assert "1.2.3, built by gcc 12.2.0 with torch 2.11.0, CPU instruction sets baseline, avx2" in text
    assert "nvcc 13.0, architectures 8.0 9.0+PTX, 2 sources; " in text
    assert "; window_attention: max_window_volume 256; layer_norm: max_row 8192" in text


def test_description_of_a_build_without_cuda_or_extension() -> None:
    without = {**BUILT, "cuda": False, "cuda_missing": "no toolkit was found"}
    assert "CUDA kernels: none: no toolkit was found" in info.describe({**info.collect(), "build": without})
    missing = info.describe({**info.collect(), "build": None, "extension_error": "it is not built"})
    assert "extension: not loaded: it is not built" in missing


def test_driver_is_none_without_a_working_nvidia_smi(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info._driver() is None
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    tool.chmod(0o755)
    assert info._driver() is None
    tool.write_text("#!/bin/sh\necho 580.95.05\necho 580.95.05\n")
    assert info._driver() == "580.95.05"


def test_sources_that_hide_an_installed_package_are_named(tmp_path: Path) -> None:
    """After `pip install .`, Python started in the checkout imports its sources, which lack the compiled extension."""
    checkout, site = tmp_path / "checkout", tmp_path / "site"
    shutil.copytree(ROOT / "swinkernels", checkout / "swinkernels", ignore=shutil.ignore_patterns("*.so", "*.pyd"))
    (site / "swinkernels").mkdir(parents=True)

    def extension_error() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "swinkernels.info", "--json"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout)
        assert found["backends"]["cpu"] == found["extension_error"]
        return found["extension_error"]

    assert extension_error().startswith("the compiled extension is not installed: reinstall")
    (site / "swinkernels" / "_ops.abi3.so").touch()
    error = extension_error()
    assert f"Python imports the source folder {checkout / 'swinkernels'}, which has none" in error
    assert f"hides the installed package {site / 'swinkernels'}, which has one" in error
    assert f"Start Python in a directory other than {checkout}, or" in error
    assert "pip install --no-build-isolation -e ." in error


@needs_extension
def test_an_extension_of_older_sources_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {name: value for name, value in _extension.build.items() if name != _extension._NEWEST_FACT}
    monkeypatch.setattr(_extension.json, "loads", lambda text: facts)
    monkeypatch.setattr(_extension, "build", _extension.build)
    monkeypatch.setattr(_extension, "error", None)
    _extension._load()
    assert _extension.build is None
    assert "older than the Python code" in _extension.error
    assert "build it again" in _extension.error


@needs_extension
def test_nothing_is_missing_without_the_python_module() -> None:
    """Ops, backends and build information do not need swinkernels._C, which other Python versions cannot import."""
    script = """
import json, sys
sys.modules["swinkernels._C"] = None  # importing it is an ImportError
import torch, swinkernels
from swinkernels import info
x = torch.randn(1, 4, 4, 24)
swinkernels.window_attention_qkvpacked(x, num_heads=2, window_size=2, backend="cpu")
print(json.dumps(info.collect()))
"""
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout) == info.collect()


@needs_extension
def test_the_module_and_the_op_say_the_same() -> None:
    module = pytest.importorskip("swinkernels._C", reason="swinkernels._C was built for another Python")
    assert module.build_info() == _extension.build


def test_another_library_can_be_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(_extension.OTHER_LIBRARY, str(tmp_path / "_ops.so"))
    assert _extension.find_library() == tmp_path / "_ops.so"
    monkeypatch.setattr(_extension, "build", None)
    monkeypatch.setattr(_extension, "error", None)
    _extension._load()
    assert "does not load" in _extension.error
    assert "_ops.so" in _extension.error


@needs_extension
def test_build_info_is_consistent() -> None:
    built = _extension.build
    assert built["version"] == __version__
    assert built["cpu_instruction_sets"][0] == "baseline"
    assert set(built) == set(BUILT)
    if built["cuda"]:
        assert built["cuda_missing"] is None
        assert built["cuda_version"].split(".")[0] == built["torch_cuda"].split(".")[0]
        assert built["arch_list"]
        assert all((ROOT / source).suffix == ".cu" for source in built["cuda_sources"])
        assert built["cuda_sources"]
        assert built["window_attention_limits"]["max_window_volume"] >= 256
        assert built["layer_norm_limits"]["max_row"] >= 8192
    else:
        assert built["cuda_missing"]
        assert built["arch_list"] == built["cuda_sources"] == []
        assert built["window_attention_limits"] is None
        assert built["layer_norm_limits"] is None
