"""Train a small timm Swin on scikit-learn's handwritten digits, with and without accelerate, from the same seed.

    python examples/train_digits.py                    # float32: the two loss curves coincide
    python examples/train_digits.py --dtype bfloat16   # autocast: the two accuracies are nearly the same
    torchrun --nproc-per-node 2 examples/train_digits.py

The script prints both accuracies and the largest difference between the losses, and plots the loss curves. It fails if
the losses differ by more than 1e-4 in float32, or if the accuracies differ by more than 0.03.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from pathlib import Path

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import swinkernels

LOSS_TOLERANCE, ACCURACY_SPREAD = 1e-4, 0.03


def load(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the images, (B, 1, 8, 8), and labels for training, and the same for testing."""
    digits = load_digits()
    order = torch.randperm(len(digits.images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(digits.images).float()[order, None].to(device) / 8 - 1
    y = torch.from_numpy(digits.target).long()[order].to(device)
    return x[:1437], y[:1437], x[1437:], y[1437:]


def make_model(device: torch.device) -> nn.Module:
    """Return a Swin with two stages, of 4x4 and 2x2 tokens, and windows of 2x2 tokens."""
    torch.manual_seed(0)
    return timm.models.SwinTransformer(
        img_size=8, patch_size=2, in_chans=1, num_classes=10, embed_dim=32, depths=(2, 2), num_heads=(2, 4),
        window_size=2, drop_path_rate=0.0, weight_init="jax",
    ).to(device)  # fmt: skip


def train(model: nn.Module, name: str, args: argparse.Namespace, device: torch.device) -> tuple[list[float], float]:
    """Train a model; return the loss of each step, averaged over the processes, and the accuracy on the test images."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x, y, x_test, y_test = load(device)
    trained = DistributedDataParallel(model) if world > 1 else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=args.lr)
    generator = torch.Generator().manual_seed(1)
    low = torch.autocast(device.type, torch.bfloat16) if args.dtype == "bfloat16" else contextlib.nullcontext()
    losses = []
    trained.train()
    for _ in track(range(args.steps), description=f"{name:<12}", disable=rank > 0):
        batch = torch.randint(len(x), (args.batch_size,), generator=generator)[rank::world].to(device)
        with low:
            loss = F.cross_entropy(trained(x[batch]).float(), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if world > 1:
            dist.all_reduce(mean)
        losses.append(mean.item() / world)
    model.eval()
    with torch.no_grad(), low:
        accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
    return losses, accuracy


def draw(curves: dict[str, list[float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for (name, losses), style in zip(curves.items(), ("-", "--"), strict=True):
        axes.plot(range(1, len(losses) + 1), losses, style, label=name, linewidth=2)
    axes.set(xlabel="step", ylabel="training loss", title="A small Swin on handwritten digits")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="images per step over all processes")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--out", type=Path, default=Path("train_digits.png"), help="the picture")
    args = parser.parse_args()
    on_gpu = torch.cuda.is_available()
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        dist.init_process_group("nccl" if on_gpu else "gloo")
    if on_gpu:
        torch.cuda.set_device(device)

    original = make_model(device)
    accelerated = make_model(device)
    report = swinkernels.accelerate(accelerated)
    curves, accuracies = {}, {}
    for name, model in (("original", original), ("accelerated", accelerated)):
        curves[name], accuracies[name] = train(model, name, args, device)
    apart = max(abs(a - b) for a, b in zip(*curves.values(), strict=True))
    if local == 0:
        draw(curves, args.out)
        print(f"{len(report.replaced)} modules replaced. Losses differ by at most {apart:.2g} in {args.steps} steps.")
        print(*(f"The last loss of the {name} model: {losses[-1]:.6g}" for name, losses in curves.items()), sep="\n")
        print(*(f"Accuracy of the {name} model: {accuracy:.3f}" for name, accuracy in accuracies.items()), sep="\n")
        print(f"Wrote {args.out}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if args.dtype == "float32" and not apart <= LOSS_TOLERANCE:
        raise SystemExit(f"The losses differ by up to {apart:.2g}, more than {LOSS_TOLERANCE}.")
    if abs(accuracies["original"] - accuracies["accelerated"]) > ACCURACY_SPREAD:
        raise SystemExit(f"The accuracies differ by more than {ACCURACY_SPREAD}.")


if __name__ == "__main__":
    main()
