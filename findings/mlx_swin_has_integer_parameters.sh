#!/usr/bin/env bash
# A Swin of mlx-image cannot be trained, because its index into the bias table counts as a parameter.
#
# Packages   mlx-image 0.1.7, mlx 0.32.4 (CPU)
# Expected   nn.value_and_grad(model, loss) gives a gradient for every parameter, so that the model can be trained.
# Seen       ValueError: the gradient of a gather with respect to its indices does not exist. mlx treats every array
#            attribute of a module as a parameter, so relative_position_index is an int64 trainable parameter, and each
#            block counts N^2 parameters too many for windows of N tokens. With the index frozen, training works.
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
images = mx.random.normal((1, 64, 64, 3))
integer = [name for name, value in tree_flatten(model.trainable_parameters()) if value.dtype == mx.int64]
print("trainable parameters in int64:", integer)


def loss(model):
    return model(images).square().sum()


try:
    mx.eval(nn.value_and_grad(model, loss)(model))
    message = ""
except ValueError as error:
    message = str(error)
print("value_and_grad:", message or "works")
model.apply_to_modules(lambda _, module: module.freeze(recurse=False, keys="relative_position_index", strict=False))
value, gradients = nn.value_and_grad(model, loss)(model)
mx.eval(value, gradients)
print("with the indices frozen: loss", value.item())
sys.exit(not (len(integer) == 4 and "indices" in message))
PY
