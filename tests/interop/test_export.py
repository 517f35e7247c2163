"""Tests exported programs on disk, and ExecuTorch's converter."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import swinkernels
from tests.interop.models import image, model

LOAD = """
import sys, torch
program, x = (load(path) for load, path in zip((torch.export.load, torch.load), sys.argv[1:3]))
torch.save(program.module()(x), sys.argv[3])
assert "swinkernels" not in sys.modules
"""


def program() -> torch.export.ExportedProgram:
    fast = copy.deepcopy(model("timm v2"))
    swinkernels.accelerate(fast)
    return torch.export.export(fast, (image((2, 3, 32, 32)),))


def load_elsewhere(folder: Path, saved: torch.export.ExportedProgram) -> subprocess.CompletedProcess[str]:
    """Save a program to ``folder``, then load and run it in a process that does not import this package."""
    paths = [folder / name for name in ("program.pt2", "x.pt", "out.pt")]
    torch.export.save(saved, paths[0])
    torch.save(image((2, 3, 32, 32)), paths[1])
    command = [sys.executable, "-c", LOAD, *map(str, paths)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.long
@pytest.mark.tool("`torch.export.save`, `load`", "torch", "with `import swinkernels`, or decomposed")
def test_a_program_is_saved_and_loaded(tmp_path: Path) -> None:
    """Programs with this package's ops load only where the package is imported; decomposed programs load anywhere.

    Where the package is not imported, torch's error names the missing op.
    """
    x, exported = image((2, 3, 32, 32)), program()
    want = model("timm v2")(x)
    torch.export.save(exported, tmp_path / "here.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "here.pt2").module()(x), want, rtol=1e-4, atol=1e-4)

    failed = load_elsewhere(tmp_path, exported)
    assert failed.returncode == 1
    assert "failed to resolve torch.ops.swinkernels.window_attention_qkvpacked_fwd" in failed.stderr

    done = load_elsewhere(tmp_path, exported.run_decompositions(swinkernels.decompositions()))
    assert done.returncode == 0, done.stderr
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), want, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.tool("ExecuTorch", "executorch", "with `swinkernels.decompositions()`")
def test_executorch() -> None:
    exir = pytest.importorskip("executorch.exir", reason="ExecuTorch is not installed")
    edge = exir.to_edge(program().run_decompositions(swinkernels.decompositions()))
    assert len(edge.to_executorch().buffer) > 0
