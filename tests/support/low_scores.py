"""Cases that attention kernels easily get wrong: rows whose log-sum-exp is below -88, so that its exp is zero in
float32; windows whose number of tokens is 64 modulo 128; a float32 bias with 16-bit maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from swinkernels.testing import WindowAttentionCase


@dataclass(frozen=True)
class LowScores(WindowAttentionCase):
    """A case with low scores: a negative term is added to the dense bias, or to the bias table."""

    lowest: float = -150.0

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Tensor]:
        inputs = super().inputs(dtype, device, seed)
        name = "bias" if self.bias_types is not None else "bias_table"
        if name == "bias":  # a different term for each query, from 0 down to ``lowest``
            rows = torch.linspace(0.0, self.lowest, inputs[name].shape[-2], device=device)
            inputs[name] = inputs[name] + rows[:, None]
        else:
            inputs[name] = inputs[name] + self.lowest
        return inputs


CASES = {
    "n64, each row another": LowScores(1, (8, 8), 1, 8, 8, has_table=False, bias_types=0),
    "n64, all rows": LowScores(1, (8, 16), 1, 8, 8, 4, lowest=-120.0),
    "n192, each row another": LowScores(1, (8, 24), 1, 8, (8, 24), has_table=False, bias_types=0),
    "n192, padded": LowScores(1, (7, 22), 1, 8, (8, 24), has_pad_qkv=True, lowest=-95.0),
    "n16, cosine": LowScores(1, (8, 8), 2, 8, 4, 2, has_logit_scale=True, has_table=False, bias_types=0),
    "n64, masked by -1000": LowScores(
        1, (16, 16), 1, 8, 8, 4, has_table=False, bias_types=0, options={"mask_value": -1000.0}
    ),
}
