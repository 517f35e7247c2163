"""Train LoRA adapters on an accelerated Swin with peft, and merge them into the weights.

pip install peft
python examples/training/with_peft.py
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from colours import accelerated_swin, arguments, batches, conclude
from peft import LoraConfig, get_peft_model

if __name__ == "__main__":
    args = arguments(__doc__)
    config = LoraConfig(r=8, target_modules=r".*attn\.(qkv|proj)", modules_to_save=["head.fc"])
    model = get_peft_model(accelerated_swin(), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(batches(args.batch)))
    for images, labels in itertools.islice(epochs, args.steps):
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    conclude(losses)
    images, labels = next(iter(batches(args.batch)))
    with torch.no_grad():
        adapted = model.eval()(images)
        merged = model.merge_and_unload()(images)
    print(f"merging changes outputs of up to {adapted.abs().max():.1e} by up to {(merged - adapted).abs().max():.1e}")
