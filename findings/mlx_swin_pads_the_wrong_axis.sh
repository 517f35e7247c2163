#!/usr/bin/env bash
# A Swin of mlx-image accepts sizes that need padding only if height and width need the same padding.
#
# Packages   mlx-image 0.1.7, mlx 0.32.4 (CPU)
# Expected   Padding fills each axis up to whole windows, so that 72x72 and 64x72 images both work.
# Seen       72x72 works; 64x72 and 72x64 raise ValueError in a reshape. The padding of the height is applied to the
#            width and vice versa, which shows only if the two differ.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "mlx[cpu]==0.32.4" "mlx-image==0.1.7"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlxim.model.swin_transformer import swin_transformer as swin

mx.random.seed(0)
options = dict(patch_size=[4, 4], embed_dim=32, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=10)

model = swin.SwinTransformer(**options)
model.eval()
seen = {}
for size in ((64, 64), (72, 72), (64, 72), (72, 64)):
    try:
        mx.eval(model(mx.random.normal((1, *size, 3))))
        seen[size] = "works"
    except ValueError as error:
        seen[size] = "raises"
        print(size, "ValueError:", error)
    print(size, seen[size])
sys.exit(list(seen.values()) != ["works", "works", "raises", "raises"])
PY
