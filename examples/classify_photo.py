"""Classify a photo with a timm Swin-T before and after accelerate.

    python examples/classify_photo.py --pretrained photo.jpg

``--pretrained`` downloads weights. Without it, the weights are random and the classes meaningless, but the logits of
the two models still agree.
"""

from __future__ import annotations

import argparse

import timm
import torch
from PIL import Image
from skimage.data import astronaut
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import swinkernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photo", nargs="?", help="an image file; default: a photo of an astronaut")
    parser.add_argument("--model", default="swin_tiny_patch4_window7_224")
    parser.add_argument("--pretrained", action="store_true")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = timm.create_model(args.model, pretrained=args.pretrained).eval().to(device)
    photo = Image.fromarray(astronaut()) if args.photo is None else Image.open(args.photo).convert("RGB")
    x = create_transform(**resolve_model_data_config(model), is_training=False)(photo)[None].to(device)
    with torch.inference_mode():
        expected = model(x)
        print(swinkernels.accelerate(model))
        got = model(x)
    names = ImageNetInfo()
    for p, label in zip(*(t[0].tolist() for t in got.softmax(-1).topk(5)), strict=True):
        print(f"{p:6.1%}  {names.index_to_description(label)}")
    apart = ((got - expected).abs().max() / expected.abs().max()).item()
    print(f"The logits differ from timm's by at most {apart:.1e} of the largest logit.")
    if not apart < 1e-4:
        raise SystemExit("The logits differ by more than rounding errors: please report this.")


if __name__ == "__main__":
    main()
