"""Runs the scripts in examples/training for a few steps, and tests torchao, compile caches and torch.func."""

from __future__ import annotations

import copy
import importlib.util
import json
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
from tests.support.op_calls import op_calls

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {
    "lightning": ["with_lightning.py"],
    "accelerate": ["with_accelerate.py"],
    "peft": ["with_peft.py"],
    "torchao": ["with_torchao.py"],
    "transformers": ["with_trainer.py"],
    "torch": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "with_fsdp2.py"],
}


def test_every_script_is_run() -> None:
    assert {command[-1] for command in SCRIPTS.values()} == {
        p.name for p in (ROOT / "examples" / "training").glob("with_*.py")
    }


TOOLS = {
    "lightning": ("Lightning", "lightning", "`examples/training/with_lightning.py`"),
    "accelerate": ("Hugging Face's `accelerate`", "accelerate", "`examples/training/with_accelerate.py`, also EMA"),
    "peft": ("peft: training", "peft", "`examples/training/with_peft.py`"),
    "torchao": ("torchao: quantisation-aware training", "torchao", "`examples/training/with_torchao.py`"),
    "transformers": ("transformers' `Trainer`", "transformers", "`examples/training/with_trainer.py`"),
    "torch": (
        "FSDP2, activation checkpointing, `torch.compile`", "torch",
        "accelerate first; `examples/training/with_fsdp2.py`",
    ),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("tool", [pytest.param(tool, marks=pytest.mark.tool(*TOOLS[tool])) for tool in SCRIPTS])
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


@pytest.mark.tool("torchao: int8 weights", "torchao", "the op runs")
@pytest.mark.parametrize("first", ["torchao", "accelerate"])
def test_int8_weights_keep_the_op(first: str) -> None:
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    plain, x = copy.deepcopy(model("timm v1")), image((2, 3, 32, 32))
    fast = copy.deepcopy(plain)
    steps = [lambda m: quantization.quantize_(m, quantization.Int8WeightOnlyConfig()), swinkernels.accelerate]
    for change in steps if first == "torchao" else steps[::-1]:
        change(fast)
    steps[0](plain)
    with torch.no_grad(), op_calls() as calls:
        got, want = fast(x), plain(x)
    assert calls == {"window_attention_qkvpacked_fwd": 4}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.tool("torchao: quantisation-aware training", "torchao", "`examples/training/with_torchao.py`")
def test_quantisation_aware_training() -> None:
    """An accelerated model matches the plain one: gradients with fake quantisation, and output with int8 weights."""
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    from torchao.quantization.granularity import PerAxis
    from torchao.quantization.qat import QATConfig

    options = {"weight_dtype": torch.int8, "weight_granularity": PerAxis(0)}
    config = quantization.Int8DynamicActivationIntxWeightConfig(**options)
    results, x = [], image((2, 3, 32, 32))
    for accelerated in (False, True):
        trained = copy.deepcopy(model("timm v1"))
        if accelerated:
            swinkernels.accelerate(trained)
        quantization.quantize_(trained, QATConfig(config, step="prepare"))
        trained(x).square().sum().backward()
        gradients = {name: p.grad for name, p in trained.named_parameters()}
        quantization.quantize_(trained, QATConfig(config, step="convert"))
        with torch.no_grad(), op_calls() as calls:
            out = trained(x)
        assert calls == ({"window_attention_qkvpacked_fwd": 4} if accelerated else {})
        results.append((gradients, out))
    (want, expected), (got, out) = results
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")
    # A rounding difference can change a quantised activation by one step of its token's int8 scale.
    assert (out - expected).abs().max() <= 0.05 * expected.abs().max()


COMPILED_STEP = """
import json, torch, swinkernels
from torch._dynamo.utils import counters
from tests.interop.models import image, model
fast = model("timm v1").train()
swinkernels.accelerate(fast)
torch.compile(fast, fullgraph=True)(image((2, 3, 32, 32))).square().sum().backward()
print(json.dumps({name: counters[name] for name in ("aot_autograd", "inductor")}))
"""


@pytest.mark.long
@pytest.mark.tool("`torch.compile`, caches", "torch", "a second process finds forward and backward")
def test_a_second_process_finds_what_the_first_compiled(tmp_path: Path) -> None:
    """A second process loads the compiled forward and backward graphs from the caches of AOTAutograd and Inductor."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    counters = []
    for _ in range(2):
        command = [sys.executable, "-c", COMPILED_STEP]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        counters.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = counters
    assert first["aot_autograd"]["autograd_cache_miss"] == 1
    assert "autograd_cache_miss" not in second["aot_autograd"] and "fxgraph_cache_miss" not in second["inductor"]
    assert second["aot_autograd"]["autograd_cache_hit"] == 1
    assert second["inductor"]["fxgraph_cache_hit"] == 2


@pytest.mark.tool("`torch.func`: `vmap`, `grad`, `jacrev`", "torch")
def test_gradients_per_sample() -> None:
    """``vmap(grad(loss))`` gives the same per-sample gradients for the original and the accelerated model."""

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
