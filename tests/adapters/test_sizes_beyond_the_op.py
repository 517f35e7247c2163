"""Tests heads and windows beyond window_attention's limits: the library's own code runs, and the report says why."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import swinkernels
from swinkernels.ops import _fused_linear
from tests.support.places import PLACES, beyond_limits

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LARGE = beyond_limits()


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", LARGE)
def test_accelerate_does_not_raise(name, backend):
    place, words = LARGE[name]
    plain = place.model()
    fast = copy.deepcopy(plain)
    report = swinkernels.accelerate(fast, backend=backend)
    told = [e.reason for e in report.skipped] + [r for e in report.replaced for r in e.remarks]
    assert any(words in text for text in told), str(report)
    torch.testing.assert_close(place.run(fast), place.run(plain), **CLOSE)


def test_a_window_that_set_input_size_makes_too_large():
    if "timm swin" not in PLACES:
        pytest.skip("timm is not installed")
    fast = PLACES["timm swin"].model()
    swinkernels.accelerate(fast)
    plain = copy.deepcopy(fast)
    swinkernels.restore(plain)
    for block in (plain, fast):
        block.set_input_size((40, 40), (36, 36))
    x = torch.randn(1, 40, 40, 16, dtype=torch.float64)
    torch.testing.assert_close(fast(x), plain(x), **CLOSE)


def test_windows_of_monai_that_a_map_makes_smaller(monkeypatch):
    """window_attention does not support windows of 12x12x12 tokens; MONAI clips them to 512 tokens on an 8x8x8 map."""
    pytest.importorskip("monai", reason="MONAI is not installed")
    from monai.networks.nets.swin_unetr import BasicLayer

    torch.manual_seed(0)
    plain = BasicLayer(12, 2, 3, (12, 12, 12), [0.0, 0.0]).eval()
    nn.init.normal_(plain.blocks[1].attn.relative_position_bias_table)
    fast = copy.deepcopy(plain)
    report = swinkernels.accelerate(fast)
    assert not report.skipped
    assert any("have 1728 tokens" in remark for entry in report.replaced for remark in entry.remarks)
    calls: list[Any] = []
    module = importlib.import_module("swinkernels.ops.window_attention")  # swinkernels.ops has the function
    attend = module._attend
    monkeypatch.setattr(module, "_attend", lambda *a, **k: calls.append(0) or attend(*a, **k))
    monkeypatch.setattr(_fused_linear, "_has_kernels", lambda: False)  # they do not call `_attend`
    x = torch.randn(1, 12, 8, 8, 8)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    x = torch.randn(1, 12, 13, 12, 12)
    torch.testing.assert_close(fast(x), plain(x), rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
