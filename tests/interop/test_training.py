"""The training tools' scripts in examples/training, a few steps each, and torch.func on a model."""

from __future__ import annotations

import copy
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from tests.interop.models import image, model

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "lightning": ["with_lightning.py"],
    "accelerate": ["with_accelerate.py"],
    "transformers": ["with_trainer.py"],
    "torch": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "with_fsdp2.py"],
}


def test_every_script_is_run() -> None:
    assert {command[-1] for command in SCRIPTS.values()} == {
        p.name for p in (ROOT / "examples" / "training").glob("with_*.py")
    }


@pytest.mark.long
@pytest.mark.parametrize("tool", SCRIPTS)
def test_training(tool: str, tmp_path: Path) -> None:
    for needed in (tool, "accelerate" if tool == "transformers" else tool):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    *launcher, script = SCRIPTS[tool]
    command = [
        *launcher,
        str(ROOT / "examples" / "training" / script),
        "--steps",
        "20",
        "--compile-backend",
        "aot_eager",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"swinkernels: \d+ replaced, 0 left", done.stdout)
    assert re.search(r"loss \S+ -> \S+ in 20 steps", done.stdout)


def test_gradients_per_sample() -> None:
    """torch.func's vmap over grad of an accelerated model."""

    def per_sample(module: nn.Module) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(module, parameters, (x[None],)).square().sum()

        parameters = {name: p.detach() for name, p in module.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, image((2, 3, 32, 32)))

    fast = copy.deepcopy(model("timm v1"))
    assert swinkernels.accelerate(fast).replaced
    want, got = per_sample(model("timm v1")), per_sample(fast)
    for name, gradients in want.items():
        torch.testing.assert_close(got[name], gradients, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
