"""Segment a synthetic volume with SwinUNETR, with and without accelerate, and compare outputs and times.

    python examples/swin_unetr_volume.py --size 96

The script needs MONAI. The volume contains ellipsoids in noise, and the model is first trained for a few steps to
segment them.
"""

from __future__ import annotations

import argparse
import time

import torch
import torch.nn.functional as F
from monai.networks.nets import SwinUNETR
from rich.progress import track
from torch import Tensor

import swinkernels


def make_volume(size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return a noisy image of ellipsoids, (1, 1, D, H, W), and its labels, (1, D, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, size)] * 3, indexing="ij"))
    label = torch.zeros(size, size, size, dtype=torch.bool)
    for _ in range(4):
        centre = torch.rand(3, 1, 1, 1, generator=generator) * 1.2 - 0.6
        radii = torch.rand(3, 1, 1, 1, generator=generator) * 0.25 + 0.15
        label |= ((grid - centre) / radii).square().sum(0) < 1
    image = label.float() + 0.5 * torch.randn(label.shape, generator=generator)
    return image[None, None], label[None].long()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64, help="voxels per axis: 64 or a larger multiple of 32")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=3).to(device)
    swinkernels.accelerate(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in track(range(args.steps), description="training, accelerated"):
        x, y = (t.to(device) for t in make_volume(args.size, seed=1 + step))
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    x, y = (t.to(device) for t in make_volume(args.size, seed=0))
    outs, times = {}, {}
    with torch.inference_mode():
        for name, change in (("accelerated", swinkernels.accelerate), ("MONAI's own", swinkernels.restore)):
            change(model)
            model(x)
            start = time.perf_counter()
            outs[name] = model(x)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[name] = time.perf_counter() - start
            print(f"{name}: {1e3 * times[name]:.0f} ms")
    got, expected = outs.values()
    apart = ((got - expected).abs().max() / expected.abs().max()).item()
    mask = got.argmax(1)
    print(f"Largest difference {apart:.1e} of the largest output.")
    print(f"Voxels in the right class: {(mask == y).float().mean().item():.1%}")
    if not apart < 1e-3:
        raise SystemExit("The outputs differ by more than rounding: please report it.")


if __name__ == "__main__":
    main()
