#!/usr/bin/env bash
# torch's linear ignores a bias that is passed by name if the weight is quantised to int8.
#
# Packages   torchao 0.18.0, torch 2.13.0
# Expected   linear(x, weight, bias) and linear(x, weight, bias=bias) are the same call, quantised or not. SwinV2 uses
#            the second form: the keys have no bias, so q_bias, zeros and v_bias are concatenated at each call.
# Seen       With an int8 weight, a bias passed by name is silently dropped. With the weight passed by name as well, as
#            in timm's SwinV2, the call raises IndexError: tuple index out of range.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.13.0" "numpy==2.4.6" "torchao==0.18.0"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from torch.nn.functional import linear
from torchao.quantization import Int8WeightOnlyConfig, quantize_

torch.manual_seed(0)
qkv = torch.nn.Linear(32, 96, bias=False)
q_bias, v_bias = torch.full((32,), 3.0), torch.full((32,), 5.0)
bias = torch.cat((q_bias, torch.zeros(32), v_bias))
tokens = torch.randn(4, 16, 32)
with torch.no_grad():
    exact = linear(tokens, qkv.weight, bias)
    quantize_(qkv, Int8WeightOnlyConfig())
    by_position = float((linear(tokens, qkv.weight, bias) - exact).abs().max())
    by_name = linear(tokens, qkv.weight, bias=bias)
    lost = float((by_name + bias - exact).abs().max())
    print(f"error with the bias by position: {by_position:.3f}")
    print(f"error with the bias by name:     {float((by_name - exact).abs().max()):.3f}")
    print(f"the same, bias added by hand:    {lost:.3f}")
    try:
        linear(tokens, weight=qkv.weight, bias=bias)
        message = "works"
    except IndexError as error:
        message = f"IndexError: {error}"
print("weight by name, too:", message)
sys.exit(not (by_position < 0.1 and lost < 0.1 and message.startswith("IndexError")))
PY
