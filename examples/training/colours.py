"""Defines a task that a small Swin learns in seconds: find the brightest colour channel of a noisy image."""

from __future__ import annotations

import argparse

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import swinkernels


def arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--compile-backend", default="inductor", help="backend of torch.compile, if used")
    return parser.parse_args()


def dataset(count: int = 256) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    images = torch.randn(count, 3, 32, 32, generator=generator)
    images[torch.arange(count), labels] += 0.5
    return TensorDataset(images, labels)


def batches(batch: int) -> DataLoader:
    return DataLoader(dataset(), batch, shuffle=True, generator=torch.Generator().manual_seed(1), drop_last=True)


def accelerated_swin() -> nn.Module:
    """Return a small accelerated timm Swin. A model must be accelerated before another tool wraps it."""
    torch.manual_seed(2)
    model = timm.models.SwinTransformer(
        img_size=32, patch_size=2, num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4,
        drop_path_rate=0.1,
    )  # fmt: skip
    print(swinkernels.accelerate(model))
    return model


def conclude(losses: list[float]) -> None:
    """Print the loss at the start and at the end, and fail if it did not fall."""
    tenth = max(1, len(losses) // 10)
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    print(f"loss {first:.3f} -> {last:.3f} in {len(losses)} steps")
    if not last < first:
        raise SystemExit("the loss did not fall")
