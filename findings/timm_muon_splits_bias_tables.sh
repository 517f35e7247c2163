#!/usr/bin/env bash
# timm's Muon treats some relative position tables of a Swin as matrices and leaves the others to Adam.
#
# Packages   timm 1.0.31, torchvision 0.29.1, torch 2.14.1
# Expected   One rule applies to the twelve tables of a Swin-T, which are lists of biases by offset and by head: the
#            model names all of them in no_weight_decay().
# Seen       The two tables of the first stage, with three heads, are updated by Adam; the ten others, with 6 to 24
#            heads, are orthogonalised by Muon, which takes every matrix with at least four rows and columns.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import timm
import torch
from timm.optim import create_optimizer_v2

torch.manual_seed(0)
model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=10)
optimizer = create_optimizer_v2(model, opt="muon", lr=1e-3, weight_decay=0.05)
for parameter in model.parameters():
    parameter.grad = torch.randn_like(parameter)
optimizer.step()
rules = {}
for name, parameter in model.named_parameters():
    if name.endswith("relative_position_bias_table"):
        rule = "Muon" if "momentum_buffer" in optimizer.state[parameter] else "Adam"
        rules.setdefault((tuple(parameter.shape), rule), []).append(name)
for (shape, rule), names in rules.items():
    print(f"{len(names)} tables of shape {shape}: {rule}")
kinds = {key: len(names) for key, names in rules.items()}
expected = {((169, 3), "Adam"): 2, ((169, 6), "Muon"): 2, ((169, 12), "Muon"): 6, ((169, 24), "Muon"): 2}
sys.exit(kinds != expected)
PY
