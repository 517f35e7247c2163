"""Tests the README's installation, run verbatim in a new environment. This takes minutes and needs network access."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.long


class Environment:
    """A new virtual environment with torch, and a copy of the sources without build results."""

    def __init__(self, folder: Path) -> None:
        self.elsewhere = folder
        self.checkout = folder / "checkout"
        left_out = shutil.ignore_patterns(".git", ".venv*", "build", "*.so", "*.egg-info", "__pycache__", "results")
        shutil.copytree(ROOT, self.checkout, ignore=left_out)
        subprocess.run([sys.executable, "-m", "venv", folder / "env"], check=True)
        self.run(f"pip install torch=={torch.__version__.partition('+')[0]}", folder)

    def run(self, commands: str, folder: Path, kernels: str = "cpu") -> str:
        """Run the shell ``commands`` in ``folder`` with SWINKERNELS_BUILD=``kernels``, and return their output."""
        path = f"{self.elsewhere / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        # One architecture only: compiling all CUDA kernels for two would take ten minutes.
        settings = {"SWINKERNELS_BUILD": kernels, "TORCH_CUDA_ARCH_LIST": "9.0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        environ = {**clean, "PATH": path, **settings}
        done = subprocess.run(
            ["bash", "-e", "-c", commands], cwd=folder, env=environ, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def extension_error(self, folder: Path) -> str | None:
        found = json.loads(self.run("python -m swinkernels.info --json", folder))
        assert found["backends"]["cpu"] == found["extension_error"]
        return found["extension_error"]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("install"))


@pytest.mark.parametrize(
    "kernels",
    [
        "cpu",
        # "hot": the CUDA kernels of window attention in bfloat16, in addition to the CPU kernels
        pytest.param("hot", marks=pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")),
    ],
)
def test_install_block_of_the_readme(environment: Environment, kernels: str) -> None:
    block = re.search(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert block is not None
    printed = environment.run(block[1], environment.checkout, kernels)
    assert re.search(r"^  cpu +available$", printed, re.MULTILINE)
    assert re.search(r"^CUDA kernels: (.+)$", printed, re.MULTILINE)[1].startswith("none") == (kernels == "cpu")
    for folder in (environment.checkout, environment.elsewhere):
        assert environment.extension_error(folder) is None


def test_an_installation_that_the_checkout_hides(environment: Environment) -> None:
    """Installed without -e, the package works everywhere except in the checkout, where an error gives the reason."""
    environment.run("pip uninstall --yes swinkernels", environment.elsewhere)
    for library in environment.checkout.rglob("*.so"):
        library.unlink()
    environment.run("pip install pybind11 ninja", environment.elsewhere)
    environment.run("pip install --no-build-isolation .", environment.checkout)
    assert environment.extension_error(environment.elsewhere) is None
    error = environment.extension_error(environment.checkout)
    assert error is not None
    assert f"imports the source folder {environment.checkout / 'swinkernels'}, which has none and hides" in error
    assert str(environment.elsewhere / "env") in error
