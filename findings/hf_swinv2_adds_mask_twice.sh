#!/usr/bin/env bash
# In the shifted windows of transformers' SwinV2, the mask of -100 acts as -200.
#
# Packages   transformers 5.24.0, torch 2.13.0
# Expected   The attention weights of a window are softmax(scores + bias + mask), as in the published model: a mask of
#            -5 makes a masked key e^5 times less likely than it is without a mask.
# Seen       It becomes e^10 times less likely: the mask is added twice. The mask of -100 that the layers build acts
#            as -200. This matters if a learned scale reaches its limit of 100, at which scores span 200.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "transformers==5.24.0"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from transformers import Swinv2Config
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

torch.manual_seed(0)
config = Swinv2Config(attn_implementation="eager")
attention = Swinv2SelfAttention(config, dim=32, num_heads=2, window_size=[2, 2]).eval()
windows = torch.randn(1, 4, 32)
mask = torch.zeros(1, 4, 4)
mask[:, :, 3] = -5.0
with torch.no_grad():
    plain = attention(windows, None, output_attentions=True)[1].double()
    masked = attention(windows, mask, output_attentions=True)[1].double()
factor = (masked[..., 3] / masked[..., 0]).log() - (plain[..., 3] / plain[..., 0]).log()
print("mask given: -5; log of the change of the odds, least and most:", float(factor.min()), float(factor.max()))
sys.exit(not bool(((factor + 10).abs() < 1e-3).all()))
PY
