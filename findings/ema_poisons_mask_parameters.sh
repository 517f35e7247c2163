#!/usr/bin/env bash
# After averaging the weights of an unchanged Swin, the averaged model returns NaN for every image.
#
# Packages   swin-transformer-pytorch 0.4.1, torch 2.13.0
# Expected   torch.optim.swa_utils.AveragedModel, updated twice with an unchanged model, equals that model.
# Seen       From the second update on, every output of the averaged model is NaN, for the plain and the exponential
#            average. The package keeps its shift masks as nn.Parameter (requires_grad=False) with -inf in them; the
#            averaging computes the difference of two equal values, and -inf - -inf is NaN.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "swin-transformer-pytorch==0.4.1" "einops==0.8.2"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from swin_transformer_pytorch import SwinTransformer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

torch.manual_seed(0)
model = SwinTransformer(
    hidden_dim=32, layers=(2, 2, 2, 2), heads=(1, 2, 4, 8), num_classes=10, head_dim=32, window_size=4,
    downscaling_factors=(4, 2, 2, 1),
).eval()
image = torch.randn(1, 3, 64, 64)
seen = []
for name, options in (("plain", {}), ("exponential", {"multi_avg_fn": get_ema_multi_avg_fn(0.99)})):
    average = AveragedModel(model, **options).eval()
    for update in (1, 2):
        average.update_parameters(model)
        with torch.no_grad():
            nan = bool(average(image).isnan().all())
        bad = sorted({n.rsplit(".", 1)[1] for n, p in average.module.named_parameters() if p.isnan().any()})
        print(f"{name} average, update {update}: output all NaN: {nan}; parameters with NaN: {bad}")
        seen.append((nan, bad))
masks = ["left_right_mask", "upper_lower_mask"]
sys.exit(seen != [(False, []), (True, masks)] * 2)
PY
