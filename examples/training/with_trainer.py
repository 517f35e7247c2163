"""Train an accelerated Swin from transformers with transformers' Trainer.

pip install transformers accelerate
python examples/training/with_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from colours import arguments, conclude, dataset
from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification, Trainer, TrainingArguments

import swinkernels


def collate(examples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*examples, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


if __name__ == "__main__":
    args = arguments(__doc__)
    torch.manual_seed(2)
    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[1, 2], window_size=4, num_labels=3
    )
    model = SwinForImageClassification(config)
    print(swinkernels.accelerate(model))
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=args.steps, per_device_train_batch_size=args.batch, learning_rate=2e-3, logging_steps=1,
            save_strategy="no", report_to="none", disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=dataset(), data_collator=collate)
        trainer.train()
    conclude([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
