"""Train an accelerated Swin with Hugging Face's accelerate, and average its weights with torch.

pip install accelerate
accelerate launch examples/training/with_accelerate.py
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from colours import accelerated_swin, arguments, batches, conclude
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

if __name__ == "__main__":
    args = arguments(__doc__)
    accelerator = Accelerator(gradient_accumulation_steps=2)
    model = accelerated_swin()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches(args.batch))
    losses = []
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    for images, labels in itertools.islice(epochs, args.steps):
        with accelerator.accumulate(model):
            loss = F.cross_entropy(model(images).float(), labels)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        average.update_parameters(accelerator.unwrap_model(model))
        losses.append(loss.item())
    conclude(losses)
    images, labels = next(iter(loader))
    with torch.no_grad():
        averaged = F.cross_entropy(average.eval().to(images.device)(images), labels)
    print(f"loss of the averaged weights {averaged:.3f}")
