"""Train an accelerated Swin with torchao's quantisation-aware training, then quantise its weights to int8.

pip install torchao
python examples/training/with_torchao.py

During training, the layers simulate int8 rounding and the blocks run timm's own code. With int8 weights, the blocks use
the op.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from colours import accelerated_swin, arguments, batches, conclude
from torchao.quantization import Int8DynamicActivationIntxWeightConfig, quantize_
from torchao.quantization.granularity import PerAxis
from torchao.quantization.qat import QATConfig

if __name__ == "__main__":
    args = arguments(__doc__)
    model = accelerated_swin()
    config = Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int8, weight_granularity=PerAxis(0))
    quantize_(model, QATConfig(config, step="prepare"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
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
        trained = F.cross_entropy(model.eval()(images), labels)
        quantize_(model, QATConfig(config, step="convert"))
        print(f"loss {trained:.3f}, with int8 weights {F.cross_entropy(model(images), labels):.3f}")
