"""Tests that accelerated models trained by two processes have the same losses as the original model in one process."""

from __future__ import annotations

import copy
import json
import multiprocessing
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import swinkernels
from tests.adapters.test_conformance import images, on_ops, original

PROCESSES, STEPS = 2, 4
SHORT = {("torchvision", "ddp"), ("timm", "fsdp2")}  # the runs in `make test`; two processes import the libraries

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")


def is_block(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("SwinTransformerBlock", "SwinLayer"))


def wrap(model: nn.Module, how: str) -> nn.Module:
    if how == "ddp":
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    for module in [m for m in model.modules() if is_block(m)]:
        fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def train(model: nn.Module, library: str, rank: int = 0, world: int = 1) -> list[float]:
    """Train a model on this process's share of the images and return the loss of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(STEPS):
        loss = (model(images(library, 4)[rank::world]) - 0.5).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def process(rank: int, library: str, how: str, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.set_num_threads(1)
    model = on_ops(library).train()
    wrapped = wrap(model, how)
    if how == "fsdp2":
        blocks = [m for m in model.modules() if is_block(m)]
        assert len(blocks) == 4 and all(isinstance(m, FSDPModule) for m in blocks)
        if library != "swinkernels":
            # `restore` refuses sharded modules, because it would undo the sharding; `accelerate` skips them.
            kinds = [type(m) for m in model.modules()]
            with pytest.raises(RuntimeError, match=r"fully_shard, .*: restore the model before"):
                swinkernels.restore(model)
            report = swinkernels.accelerate(model)
            assert sum("derived from an accelerated class" in s.reason for s in report.skipped) == len(blocks)
            assert [type(m) for m in model.modules()] == kinds
    Path(folder, f"{rank}.json").write_text(json.dumps(train(wrapped, library, rank, PROCESSES)))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "how"),
    [
        pytest.param(library, how, id=f"{library}-{how}", marks=[] if (library, how) in SHORT else pytest.mark.long)
        for library in ("timm", "torchvision", "transformers", "swinkernels")
        for how in ("ddp", "fsdp2")
    ],
)
def test_losses_of_two_processes_are_those_of_one(library, how, tmp_path):
    plain = copy.deepcopy(original(library)).train()
    one = train(plain, library)
    # The processes are forked from a server that has imported this file once.
    multiprocessing.set_forkserver_preload([__name__])
    mp.start_processes(process, (library, how, str(tmp_path)), nprocs=PROCESSES, start_method="forkserver")
    two = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    assert one[-1] < 0.9 * one[0], one  # training works
    torch.testing.assert_close([sum(losses) / PROCESSES for losses in zip(*two, strict=True)], one, rtol=1e-4, atol=0)
