#!/usr/bin/env bash
# oneDNN's fused Linear in torch reads a strided bias as if it were contiguous, and returns wrong numbers.
#
# Packages   torch 2.14.1
# Expected   torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "none") equals F.linear(x, weight, bias).
# Seen       With a bias that is a column of a matrix, it returns x @ weight.T plus the first elements in memory, in
#            float32 and in bfloat16, without an error or a warning. The form with a residual does the same.
#            torch.compile passes only a copy of such a bias to the op, so nn.Linear is not affected; code that calls
#            the op directly is.
set -euo pipefail
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
python3 -m venv "$tmp/venv"
"$tmp/venv/bin/pip" install --quiet "torch==2.14.1" "numpy==2.4.6"
cd "$tmp"
"$tmp/venv/bin/python" - <<'PY'
import sys

import torch
import torch.nn.functional as F

torch.manual_seed(0)
fused = torch.ops.mkldnn._linear_pointwise
seen = []
for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.2)):
    x, weight, residual = (torch.randn(*shape).to(dtype) for shape in ((32, 64), (64, 64), (32, 64)))
    bias = torch.randn(64, 2).to(dtype)[:, 0]
    neighbours = bias.as_strided((64,), (1,))
    for name, plus, y in (
        ("unary", 0.0, fused.default(x, weight, bias, "none", [], "none")),
        ("binary", residual.float(), fused.binary(x, residual, weight, bias, "add")),
    ):
        expected, read = (F.linear(x.float(), weight.float(), b.float()) + plus for b in (bias, neighbours))
        as_expected, as_read = (float((y.float() - e).abs().max()) for e in (expected, read))
        print(f"{name}, {dtype}: differs by {as_expected:.3g} from F.linear, by {as_read:.3g} from the contiguous bias")
        seen.append(as_expected > 1.0 and as_read < tolerance)
sys.exit(not all(seen))
PY
