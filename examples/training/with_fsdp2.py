"""Train an accelerated Swin with FSDP2, activation checkpointing and compiled blocks.

torchrun --nproc-per-node 2 examples/training/with_fsdp2.py
"""

from __future__ import annotations

import itertools
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from colours import accelerated_swin, arguments, batches, conclude
from torch.distributed.fsdp import fully_shard

if __name__ == "__main__":
    args = arguments(__doc__)
    on_gpu = torch.cuda.is_available()
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if on_gpu else "cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = accelerated_swin().to(device)  # accelerated before sharding, which changes the classes of modules
    model.set_grad_checkpointing()
    for stage in model.layers:
        for block in stage.blocks:
            block.compile(backend=args.compile_backend)
            fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(batches(args.batch)))
    for images, labels in itertools.islice(epochs, args.steps):
        # Each process uses its own share of the batch.
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        loss = F.cross_entropy(model(images[mine].to(device)).float(), labels[mine].to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    conclude(losses)
    dist.destroy_process_group()
