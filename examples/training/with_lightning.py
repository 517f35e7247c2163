"""Train an accelerated Swin with Lightning.

pip install lightning
python examples/training/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
import torch.nn.functional as F
from colours import accelerated_swin, arguments, batches, conclude
from torch import Tensor


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = accelerated_swin()
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self.model(images).float(), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


if __name__ == "__main__":
    args = arguments(__doc__)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_steps=args.steps, max_epochs=-1, precision="bf16-mixed", gradient_clip_val=1.0, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(classifier, batches(args.batch))
    conclude(classifier.losses)
