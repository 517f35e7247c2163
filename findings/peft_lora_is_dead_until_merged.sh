#!/usr/bin/env bash
# LoRA on torchvision's Swin has no effect and gets no gradients, yet merging it changes the model.
#
# Packages   peft 0.21.2, torchvision 0.29.1, torch 2.14.1
# Expected   An adapter on qkv and proj changes the output and gets gradients; merging it does not change the output.
# Seen       The outputs with and without the adapter are bit-identical, no LoRA weight has a gradient, and
#            merge_and_unload() changes the output. torchvision's attention passes the weights of the two layers to a
#            function and never calls the layers; peft gives it the weights without the adapter, and does not warn.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.14.1" "torchvision==0.29.1" "peft==0.21.2"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torchvision.models.swin_transformer import SwinTransformer

torch.manual_seed(0)
model = SwinTransformer([4, 4], 32, [2, 2], [2, 4], [4, 4], num_classes=10)
config = LoraConfig(r=4, target_modules=["qkv", "proj"], modules_to_save=["head"], init_lora_weights=False)
model = get_peft_model(model, config).eval()
image = torch.randn(1, 3, 64, 64)
model(image).square().sum().backward()
lora = {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
trained = [name for name, parameter in lora.items() if parameter.grad is not None and parameter.grad.any()]
with torch.no_grad():
    on = model(image)
    with model.disable_adapter():
        off = model(image)
    merged = model.merge_and_unload().eval()(image)
effect, change = float((on - off).abs().max()), float((merged - on).abs().max() / on.abs().max())
print(f"LoRA weights with a gradient: {len(trained)} of {len(lora)}")
print(f"largest effect of the adapter: {effect}")
print(f"largest change by merging: {change:.3f} of the largest output")
sys.exit(not (len(lora) == 16 and not trained and effect == 0 and change > 0.01))
PY
