#!/usr/bin/env bash
# transformers' Swin in eval mode gives a different result for an image after it has processed a smaller one.
#
# Packages   transformers 5.24.0, torch 2.13.0
# Expected   A forward pass under no_grad in eval mode leaves the model unchanged, so images of several sizes may follow
#            each other in any order.
# Seen       A 32x32 image between two runs of a 64x64 image changes the second result by more than a tenth of its
#            range: the layers overwrite their own shift_size when the map is as small as the window, and never restore
#            it. After a 16x16 image, which raises an error, the 64x64 image raises an error too, because window_size
#            has been overwritten as well.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import SwinConfig, SwinModel

torch.manual_seed(0)

config = SwinConfig(image_size=64, patch_size=4, embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=4)
model = SwinModel(config).eval()
for parameter in model.parameters():
    if parameter.ndim == 2:
        torch.nn.init.normal_(parameter, std=0.15)
large, small, smaller = (torch.randn(1, 3, size, size) for size in (64, 32, 16))


def geometry():
    return [(layer.window_size, layer.shift_size) for stage in model.encoder.layers for layer in stage.blocks]


def raises(image):
    try:
        model(image)
    except RuntimeError as error:
        print("  RuntimeError:", error)
        return True
    return False


with torch.no_grad():
    first = model(large).last_hidden_state
    again = model(large).last_hidden_state
    print("window and shift before:", geometry())
    model(small)
    print("after a 32x32 image:    ", geometry())
    second = model(large).last_hidden_state
    change = float((second - first).abs().max() / first.abs().max())
    print(f"64x64 image, largest change: {change:.2f} of the largest value")
    print("16x16 image:")
    error = raises(smaller)
    print("64x64 image again:")
    error_stays = raises(large)
sys.exit(not (torch.equal(first, again) and change > 0.1 and error and error_stays))
PY
