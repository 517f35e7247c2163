"""Tests the report that ``accelerate`` returns, and its method ``Report.check``.

``Report.check`` lists the ops that each replaced module called in one run, or the reason why it called none.
"""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from tests.support import published_forms as forms


class Stage(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(forms.SegmentationBlock(12, 3, shift_size=s) for s in (0, 2))
        self.mask_factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask_factor * forms.make_mask((8, 12), (4, 4), (2, 2)).to(x)
        for block in self.blocks:
            block.H, block.W = 8, 12
            x = block(x, mask)
        return x


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_check_lists_ops_and_backends(backend):
    model, x = Stage().eval(), torch.randn(2, 96, 12)
    report = swinkernels.accelerate(model, backend=backend)
    expected, state = model(x), torch.get_rng_state()
    ran = {entry.path: entry for entry in report.check(x).modules}
    assert ran["blocks.0"].calls["window_attention_qkvpacked", backend] == 1
    assert ran["blocks.1"].calls["window_attention_qkvpacked", backend] == 1
    assert ran["blocks.1.attn"].reason == "it was not called"  # the block computes the attention itself
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(x), expected)
    assert "2 of 4 replaced modules called ops" in str(report.check(x))


def test_check_says_why_a_module_fell_back():
    model, x = Stage().eval(), torch.randn(2, 96, 12)
    report = swinkernels.accelerate(model, backend="reference")
    model.mask_factor = 3.0
    model.blocks[0].attn.num_heads = 2
    model.blocks[0].attn.relative_position_bias_table = nn.Parameter(torch.zeros(49, 2))
    ran = {entry.path: entry for entry in report.check(x).modules}
    assert ran["blocks.0"].reason == "attn: num_heads was changed"
    assert not ran["blocks.0"].calls
    assert "mask" in str(ran["blocks.1"].reason)
    assert ran["blocks.1.attn"].calls == {("window_attention_qkvpacked", "reference"): 1}


def test_check_of_a_library():
    timm = pytest.importorskip("timm", reason="timm is not installed")
    options = {"img_size": 32, "window_size": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (1, 2)}
    model = timm.models.swin_transformer.SwinTransformer(**options, num_classes=2).eval()
    report = swinkernels.accelerate(model)
    ran = report.check(torch.randn(1, 3, 32, 32)).modules
    attention = [e for e in ran if any(op == "window_attention_qkvpacked" for op, _ in e.calls)]
    assert len(attention) == 2, report
    model.layers[0].blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    ran = report.check(torch.randn(1, 3, 32, 32)).modules
    (left,) = [e for e in ran if e.path == "layers.0.blocks.0"]
    assert "hook" in str(left.reason)


def test_check_needs_the_model():
    model = Stage()
    report = swinkernels.accelerate(model)
    again: Any = pickle.loads(pickle.dumps(report))
    assert again == report
    with pytest.raises(RuntimeError, match="accelerate again"):
        again.check(torch.randn(2, 96, 12))
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="accelerate again"):
        report.check(torch.randn(2, 96, 12))


def test_a_block_is_counted_once_and_reasons_are_grouped():
    model = nn.Sequential(Stage(), Stage())
    for block in model[0].blocks:
        block.attn.scale = torch.ones(())
    text = str(swinkernels.accelerate(model))
    assert "2 replaced (4 with those inside them), 2 left" in text
    assert text.count("attn.scale is a Tensor") == 1
    assert "0.blocks.0 and 1 more" in text


class SeparateLayers(nn.Module):
    """A window attention with separate q and kv layers, and without a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.window_size, self.num_heads = (4, 4), 3
        self.q, self.kv, self.proj = nn.Linear(12, 12), nn.Linear(12, 24), nn.Linear(12, 12)
        self.relative_position_bias_table = nn.Parameter(torch.zeros(49, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


def test_what_resembles_a_window_attention_is_named_with_what_it_lacks():
    attention = type("LocalWindowAttention", (SeparateLayers,), {})
    report = swinkernels.accelerate(nn.Sequential(*(attention() for _ in range(3))))
    assert [e.path for e in report.skipped] == ["0", "1", "2"]
    text = str(report)
    assert text.count("LocalWindowAttention") == 1
    assert "one nn.Linear named qkv (it has q, kv, proj)" in text
    assert "an argument mask" in text
    assert "docs/adapters.md" in text
    assert report.reason is None


def test_torchvision_volumes_are_claimed_where_they_run():
    models = pytest.importorskip("torchvision.models", reason="torchvision is not installed")
    model = models.video.swin3d_t(num_classes=2)
    report = swinkernels.accelerate(model)
    attention = {
        n for n, m in model.named_modules() if isinstance(m, models.video.swin_transformer.ShiftedWindowAttention3d)
    }
    assert {e.path for e in report.replaced if e.adapter == "torchvision Swin3D"} == attention
    assert attention and not report.skipped
