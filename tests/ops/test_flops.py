"""Tests the FLOPs that torch's counter reports for the ops and for accelerated models."""

from __future__ import annotations

import copy
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import swinkernels
from swinkernels.ops import _backends
from swinkernels.ops._flops import FORMULAS
from tests.support.attention_cases import all_ops

needs_cpu = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason=str(_backends.unavailable("cpu")))


def count(call: Any, *inputs: Tensor) -> tuple[int, int]:
    """Return the FLOPs of ``call(*inputs)`` and of its backward pass."""
    with FlopCounterMode(display=False) as counter:
        out = call(*inputs)
        forward = counter.get_total_flops()
        out.sum().backward()
    return forward, counter.get_total_flops() - forward


def test_every_op_has_a_formula() -> None:
    assert set(FORMULAS) == all_ops()
    assert all(getattr(torch.ops.swinkernels, name) in flop_registry for name in FORMULAS)


def test_mlp_half_counts_both_products() -> None:
    x, fc1, fc2 = (torch.empty(shape, device="meta") for shape in ((2, 5, 96), (384, 96), (96, 384)))
    with FlopCounterMode(display=False) as counter:
        torch.ops.swinkernels.mlp_half_triton(x, None, None, None, fc1, None, fc2, None, 1e-5, False, False)
    assert counter.get_total_flops() == 2 * 10 * 96 * 384 * 2


def test_linear_layers_count_as_torchs() -> None:
    x, fc1, fc2 = (torch.empty(shape, device="meta") for shape in ((2, 5, 96), (384, 96), (64, 384)))
    counts = []
    for call in (
        lambda: torch.ops.swinkernels.fused_linear(x, fc1, None, None, None, None, "none", "", 0.0),
        lambda: F.gelu(F.linear(x, fc1)),
        lambda: torch.ops.swinkernels.fused_mlp(x, fc1, None, fc2, None, None, None, None, "none", "", 0.0, False),
        lambda: F.linear(F.gelu(F.linear(x, fc1)), fc2),
        lambda: torch.ops.swinkernels.fused_position_bias(x, fc1, None, fc2),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    assert counts[2] == counts[3] == counts[4] > counts[0]


def test_patches_count_as_their_linear_layers() -> None:
    merged, image = torch.empty(2, 5, 7, 6, device="meta"), torch.empty(2, 3, 8, 12, device="meta")
    weight, of_image = torch.empty(10, 24, device="meta"), torch.empty(10, 48, device="meta")
    rest = (None, None, None)
    for arguments, products in (
        ((merged, weight, *rest, [1, 2, 2], [0, 1, 2, 3], False, "", 0.0), 2 * 3 * 4 * 10 * 24),
        ((image, of_image, *rest, [1, 4, 4], [], True, "", 0.0), 2 * 2 * 3 * 10 * 48),
    ):
        with FlopCounterMode(display=False) as counter:
            torch.ops.swinkernels.fused_patch_linear(*arguments)
        assert counter.get_total_flops() == 2 * products


def test_attention_half_counts_as_its_parts() -> None:
    x, qkv, proj = (torch.randn(shape) for shape in ((2, 6, 7, 12), (72, 12), (12, 24)))
    counts = []
    for weights in ((qkv, None, None), qkv.chunk(3)):
        with FlopCounterMode(display=False) as counter:
            arguments = (*weights, None, proj, *(None,) * 7, "window_size=4,4", 0.3, -100.0, 2, True, "pre", 1e-5, True)
            torch.ops.swinkernels.fused_attention_half(x, *arguments)
        counts.append(counter.get_total_flops())
    with FlopCounterMode(display=False) as counter:
        out = swinkernels.window_attention_qkvpacked(F.linear(x, qkv), num_heads=2, window_size=4, backend="cpu")
        F.linear(out, proj)
    assert counts == [counter.get_total_flops()] * 2


def test_formulas_wait_for_the_counter() -> None:
    code = (
        "import sys, torch, swinkernels; assert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils.flop_counter import flop_registry\n"
        "assert torch.ops.swinkernels.window_attention_fwd in flop_registry"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@needs_cpu
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("size", [(8, 12), (7, 10), (4, 5, 9)])
def test_window_attention_counts_as_plain_code(packed: bool, size: tuple[int, ...]) -> None:
    """Padded windows count in full, for the ops and for plain PyTorch, also on meta tensors."""

    def attend(backend: str, device: str) -> tuple[int, int]:
        qkv = torch.zeros(2, *size, 3, 2, 6, device=device, requires_grad=True)
        table = torch.zeros(7 ** len(size), 2, device=device, requires_grad=True)
        given: dict[str, Any] = {"num_heads": 2, "window_size": 4, "shift_size": 1, "backend": backend}
        if packed:
            return count(lambda x, t: swinkernels.window_attention_qkvpacked(x, t, **given), qkv, table)
        return count(lambda x, t: swinkernels.window_attention(*x.unbind(-3), t, **given), qkv, table)

    frame, volume = 1, 4 ** len(size)
    for s in size:
        frame *= -(-s // 4) * 4
    product = 2 * (2 * frame) * volume * (2 * 6)
    assert attend("cpu", "cpu") == (2 * product, 4 * product)
    assert attend("reference", "cpu") == attend("torch", "meta") == attend("auto", "meta") == attend("cpu", "cpu")


def swin(img_size: int) -> nn.Module:
    model = timm.models.SwinTransformer(
        img_size=img_size, patch_size=2, num_classes=3, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4,
        drop_path_rate=0.0, always_partition=True,
    )  # fmt: skip
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # on a CPU, the counter ignores scaled_dot_product_attention
    return model


@needs_cpu
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.tool("`FlopCounterMode`", "torch")
def test_models_count_as_before_without_padding(device: str) -> None:
    model, x = swin(32).to(device), torch.zeros(2, 3, 32, 32, device=device)
    before = count(model, x)
    assert swinkernels.accelerate(model).replaced
    assert count(model, x) == before


@needs_cpu
def test_padded_models_count_less_by_the_linears_of_pad_tokens() -> None:
    """9 x 9 and 5 x 5 maps are padded to 12 x 12 and 8 x 8; when accelerated, qkv and proj skip the pad tokens."""
    model, x = swin(18), torch.zeros(1, 3, 18, 18)
    plain = count(copy.deepcopy(model), x)
    swinkernels.accelerate(model)
    pads = {8: 12 * 12 - 9 * 9, 16: 8 * 8 - 5 * 5}
    skipped = sum(2 * 2 * tokens * 4 * dim * dim for dim, tokens in pads.items())  # two blocks; qkv: 3C rows, proj: C
    got = count(model, x)
    assert (plain[0] - got[0], plain[1] - got[1]) == (skipped, 2 * skipped)
