#!/usr/bin/env bash
# spandrel loads a SwinIR with 7x7 windows as if its img_range were 255.
#
# Packages   spandrel 0.4.2, torchvision 0.29.1, torch 2.14.1
# Expected   A model that is built, saved and loaded again from its state_dict gives the same image. Settings that a
#            state_dict does not contain, such as img_range, have the constructor's default, here 1.
# Seen       With windows of 8, the two images are bit-identical. With windows of 7, and nothing else changed, the
#            loaded model has img_range 255, and its output is off by more than half of its range, without a warning.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.14.1" "torchvision==0.29.1" "spandrel==0.4.2"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from spandrel import ModelLoader
from spandrel.architectures.SwinIR import SwinIR

seen = []
for window in (8, 7):
    torch.manual_seed(0)
    model = SwinIR(
        img_size=5 * window, window_size=window, embed_dim=24, depths=[2], num_heads=[2], mlp_ratio=2.0,
        upsampler="pixelshuffledirect", upscale=2,
    ).eval()
    loaded = ModelLoader().load_from_state_dict(model.state_dict()).model.eval()
    image = torch.rand(1, 3, 5 * window, 5 * window)
    with torch.no_grad():
        exact, got = model(image), loaded(image)
    error = float((got - exact).abs().max() / exact.abs().max())
    print(f"window {window}: img_range {model.img_range} loaded as {loaded.img_range}, largest error {error:.2f}")
    seen.append((model.img_range, loaded.img_range, error))
sys.exit(not (seen[0] == (1.0, 1.0, 0.0) and seen[1][:2] == (1.0, 255.0) and seen[1][2] > 0.3))
PY
