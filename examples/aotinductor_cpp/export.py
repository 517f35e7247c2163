"""Export an accelerated Swin as an AOTInductor package, swin.pt2, which run.cpp runs without Python.

    python examples/aotinductor_cpp/export.py --out swin
    make -C examples/aotinductor_cpp OUT="$PWD/swin"
    swin/run swinkernels/_ops.abi3.so swin

The script also writes images and the original model's logits for them; run.cpp compares its results with these logits.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import timm
import torch
from torch.export import Dim

import swinkernels


def small_swin() -> torch.nn.Module:
    return timm.models.SwinTransformer(
        img_size=32, patch_size=2, num_classes=3, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument(
        "--model", default="swin_tiny_patch4_window7_224", help="a timm model, or small: a Swin of two stages"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = (small_swin() if args.model == "small" else timm.create_model(args.model)).eval()
    size = model.patch_embed.img_size
    images = torch.randn(4, 3, *size)
    with torch.no_grad():
        logits = model(images)
        print(swinkernels.accelerate(model))
        program = torch.export.export(model, (images,), dynamic_shapes=({0: Dim("batch", max=64)},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(args.out / "swin.pt2"))
    images.numpy().tofile(args.out / "images.f32")
    logits.numpy().tofile(args.out / "logits.f32")
    (args.out / "sizes.txt").write_text(f"{len(images)} {size[0]} {size[1]} {logits.shape[1]}\n")


if __name__ == "__main__":
    main()
