"""Tests what `make` installs, builds and prints, and which tests `make check` selects."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import changed

ROOT = Path(__file__).resolve().parents[2]
GPU = "GPU 0: Some GPU (UUID: GPU-1)"
NO_GPU = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return a folder with the Makefile, the files that it reads, and an nvidia-smi that reports no GPU."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    write_script(tmp_path / "tools" / "nvidia-smi", f"echo '{NO_GPU}'; exit 9")
    return tmp_path


def write_script(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def make(checkout: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "SWINKERNELS_")) and k != "VENV"}
    path = f"{checkout / 'tools'}{os.pathsep}{os.environ['PATH']}"
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=checkout, env={**clean, "PATH": path, **environ}, capture_output=True, text=True, check=False
    )


def kernels(checkout: Path, *arguments: str, **environ: str) -> str:
    """Return which kernels a dry run of make would build: the value of SWINKERNELS_BUILD for setup.py."""
    done = make(checkout, "--dry-run", *arguments, **environ)
    assert done.returncode == 0, done.stderr
    (found,) = re.findall(r"SWINKERNELS_BUILD=(\w+) \S+ setup.py", done.stdout)
    return found


def test_cuda_kernels_are_built_where_they_are_needed(checkout: Path) -> None:
    assert kernels(checkout, "demo") == "cpu"
    assert kernels(checkout, "test") == "auto"
    assert kernels(checkout, "build", "CUDA=1") == "auto"
    assert kernels(checkout, "build", SWINKERNELS_BUILD="none") == "none"
    write_script(checkout / "tools" / "nvidia-smi", f"echo '{GPU}'")
    assert kernels(checkout, "demo") == "auto"
    write_script(checkout / "tools" / "nvidia-smi", "exit 9")
    (checkout / "build" / "temp.linux" / "csrc" / "kernels" / "cuda").mkdir(parents=True)
    assert kernels(checkout, "build") == "auto"  # the earlier build has CUDA kernels, so they are built again


@pytest.mark.parametrize(
    ("target", "groups"),
    [
        ("demo", ["build", "demo"]),
        ("lint", ["lint"]),
        ("test", ["build", "demo", "dev"]),
        ("wheel", ["build", "demo", "wheel"]),
        ("test-all", ["build", "demo", "dev", "interop"]),
        ("format", ["lint"]),
    ],
)
def test_what_is_installed(checkout: Path, target: str, groups: list[str]) -> None:
    commands = make(checkout, "--dry-run", target).stdout
    assert re.findall(r"--group (\w+)", commands) == groups
    assert ("torch==" in commands) == (target not in ("lint", "format"))


def prepared(checkout: Path, python: str) -> None:
    """Create a virtual environment that make considers complete. Its interpreter is a script with body ``python``."""
    write_script(checkout / ".venv" / "bin" / "python", python)
    for line in make(checkout, "--dry-run", "build").stdout.splitlines():
        if stamp := re.search(r"touch (\.venv/\S+)", line):
            (checkout / stamp[1]).touch()


def test_a_phase_is_one_line(checkout: Path) -> None:
    prepared(checkout, "seq 1000")
    done = make(checkout, "build")
    assert done.returncode == 0
    line = r"compiling csrc/ in place \(CPU kernels; CUDA=1 adds the CUDA kernels\) \.\.\. \d+ s\n"
    assert re.fullmatch(line, done.stdout)
    assert (checkout / "build" / "compile.log").read_text().split() == [str(i + 1) for i in range(1000)]


def test_a_phase_that_fails_names_its_log_and_shows_the_errors(checkout: Path) -> None:
    prepared(checkout, "echo 'a.cpp:3: error: no such thing'; seq 1000; echo 'swinkernels: a reason'; exit 1")
    done = make(checkout, "build")
    assert done.returncode == 2
    assert "failed\na.cpp:3: error: no such thing\nswinkernels: a reason\n" in done.stdout
    assert done.stdout.endswith("The whole output: build/compile.log\n")
    assert len(done.stdout.splitlines()) < 12


TESTS = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("swinkernels/ops/window_attention.py", "tests/ops/test_window_attention.py"),
        ("swinkernels/adapters/libraries/monai.py", "tests/adapters/test_monai.py"),
        ("swinkernels/adapters/libraries/timm/maxvit.py", "tests/adapters/test_timm_maxvit.py"),
        ("swinkernels/info.py", "tests/repo/test_info.py"),
        ("swinkernels/_extension.py", "tests/repo/test_info.py"),
        ("csrc/kernels/cpu/simd.inl", "tests/cpu/test_window_attention.py"),
        ("benchmarks/models.py", "tests/benchmarks/test_models.py"),
        ("setup.py", "tests/repo/test_build.py"),
        ("tests/repo/test_info.py", "tests/repo/test_info.py"),
        ("tests/support/philox.py", "tests/cuda/test_window_attention_emulated.py"),
    ],
)
def test_the_tests_of_a_source(source: str, expected: str) -> None:
    found = changed.tests_of(source, TESTS)
    assert expected in found
    assert len(found) <= 4


def test_every_source_has_tests() -> None:
    """For every source, the test files with a matching name are selected, or else all those of its folder."""
    sources = [*(ROOT / "swinkernels").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    for path in sources:
        assert changed.tests_of(str(path.relative_to(ROOT)), TESTS), path
    assert changed.tests_of("LICENSE", TESTS) == []


def test_pre_commit_has_the_versions_of_the_constraints() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    hooks = re.findall(r"\[([\w-]+)==([\w.]+)\]", (ROOT / ".pre-commit-config.yaml").read_text())
    assert {name for name, _ in hooks} == {"ruff", "clang-format"}
    assert all(pinned[name] == version for name, version in hooks)
