#!/usr/bin/env bash
# Running a SwinV2 of mlx-image once changes its weights.
#
# Packages   mlx-image 0.1.7, mlx 0.32.4 (CPU)
# Expected   A forward pass in eval mode does not change the parameters.
# Seen       The middle third of every qkv.bias is zero after one call. The code is meant to drop the keys' bias from a
#            copy, but it assigns into a slice of the parameter itself.
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

model = swin.SwinTransformer(**options, block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2)
model.eval()
attentions = [module for module in model.modules() if isinstance(module, swin.ShiftedWindowAttentionV2)]
for attention in attentions:
    attention.qkv.bias = mx.ones_like(attention.qkv.bias)


def sums():
    values = [value for name, value in tree_flatten(model.parameters()) if name.endswith("qkv.bias")]
    return [[third.sum().item() for third in mx.split(value, 3)] for value in values]


before = sums()
mx.eval(model(mx.random.normal((1, 64, 64, 3))))
after = sums()
print("sums of the thirds of each qkv.bias, before:", before)
print("after one forward pass:                     ", after)
sys.exit(not (all(k > 0 for _, k, _ in before) and after == [[q, 0.0, v] for q, _, v in before]))
PY
