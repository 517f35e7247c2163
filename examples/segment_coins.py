"""Segment a photo of coins with a small head on the feature maps of an accelerated Swin.

    python examples/segment_coins.py

A timm Swin returns feature maps at two scales (``features_only=True``), and the head turns them into a mask. The Swin
and the head are trained on random crops of the left half of the photo and tested on the right half. The labels are
computed by thresholding the photo.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from rich.progress import track
from skimage.data import coins
from skimage.filters import threshold_otsu
from skimage.morphology import closing, disk
from torch import Tensor, nn

import swinkernels


class Segmenter(nn.Module):
    """A Swin, and a head that turns its feature maps, at 1/2 and 1/4 of the image's size, into logits of full size."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model(
            "swin_tiny_patch4_window7_224", features_only=True, in_chans=1, img_size=96, patch_size=2, embed_dim=24,
            depths=(2, 2), num_heads=(2, 4), window_size=6, out_indices=(0, 1), strict_img_size=False,
        )  # fmt: skip
        self.heads = nn.ModuleList(nn.Conv2d(c, 16, 1) for c in self.backbone.feature_info.channels())
        self.out = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [head(f.permute(0, 3, 1, 2)) for head, f in zip(self.heads, self.backbone(x), strict=True)]
        maps = [F.interpolate(f, size=x.shape[2:], mode="bilinear", align_corners=False) for f in maps]
        return self.out(F.gelu(maps[0] + maps[1]))


def overlap(mask: Tensor, label: Tensor) -> float:
    """Return the intersection over union of two masks."""
    return ((mask & label).sum() / (mask | label).sum()).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("segment_coins.png"), help="the picture")
    args = parser.parse_args()

    photo = coins()[:302]  # an even number of rows, because patches have 2x2 pixels
    label = torch.from_numpy(closing(photo > threshold_otsu(photo), disk(3)))
    image = torch.from_numpy(photo).float()[None, None] / 128 - 1
    half = photo.shape[1] // 2

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Segmenter().to(device)
    print(swinkernels.accelerate(model, verify=True))
    image, label = image.to(device), label.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in track(range(args.steps), description="training"):
        tops = torch.randint(photo.shape[0] - 96, (4,)).tolist()
        lefts = torch.randint(half - 96, (4,)).tolist()
        x = torch.cat([image[..., t : t + 96, s : s + 96] for t, s in zip(tops, lefts, strict=True)])
        y = torch.stack([label[t : t + 96, s : s + 96] for t, s in zip(tops, lefts, strict=True)])
        loss = F.binary_cross_entropy_with_logits(model(x)[:, 0], y.float())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.inference_mode():
        mask = model(image[..., half:])[0, 0] > 0  # larger than the crops in training
    print(f"Intersection over union on the half that was not seen: {overlap(mask, label[:, half:]):.3f}")

    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(9, 4.5), layout="constrained")
    shown = {"photo": photo[:, half:], "label by threshold": label[:, half:].cpu(), "mask of the model": mask.cpu()}
    for ax, (title, picture) in zip(axes, shown.items(), strict=True):
        ax.imshow(picture, cmap="gray")
        ax.set_title(title)
        ax.axis("off")
    figure.savefig(args.out, dpi=110)
    print(f"Wrote {args.out}")


if __name__ == "__main__":
    main()
