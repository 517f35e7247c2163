"""Tests ``accelerate`` on timm's variant of Swin V2 (swin_transformer_v2_cr), with the backend that "auto" chooses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.models.swin_transformer_v2_cr import SwinTransformerV2Cr, SwinTransformerV2CrBlock

import swinkernels
from swinkernels.adapters import VerificationError, norms
from swinkernels.adapters.libraries.timm import _blocks
from tests.support.parity import assert_as_good, run
from tests.support.published import refuse as refuse_method
from tests.support.timm_swin import check_parity, make_image, replaceable

GEOMETRIES: dict[str, dict[str, Any]] = {
    "divisible": {"img_size": (32, 64), "window_size": 4},
    "padded-9x13-5x7": {"img_size": (36, 52), "window_size": 4},
    "non-square-window": {"img_size": (40, 48), "window_size": (3, 5)},
    "clamped-on-one-axis-3x8": {"img_size": (12, 32), "window_size": 4},
    "always-partition": {"img_size": (12, 36), "window_size": 4, "always_partition": True},
    "dynamic-mask": {"img_size": (36, 52), "window_size": 4, "dynamic_img_size": True},
    "extra-norms": {"img_size": (32, 32), "window_size": 4, "extra_norm_period": 1},
    "sequential": {"img_size": (32, 32), "window_size": 4, "sequential_attn": True},
}


def make_model(**options: Any) -> Any:
    """Build a small model and randomise its weights, because the residual branches of a new model return 0."""
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"img_size": (36, 52), "window_size": 4, "embed_dim": 16, "depths": (2, 2)}
    defaults |= {"num_heads": (2, 4), "num_classes": 5}
    model = SwinTransformerV2Cr(**{**defaults, **options}).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("qkv.weight"):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif name.endswith(("qkv.bias", "meta_mlp.fc1.bias")):
                p.normal_()
            elif name.endswith("meta_mlp.fc2.weight"):
                p.normal_(std=0.1)
            elif name.endswith("meta_mlp.fc2.bias"):
                # This bias is added to all scores, which softmax ignores: its gradient is only rounding error.
                p.normal_().requires_grad_(False)
            elif ".norm" in name and "stages." in name:
                p.normal_(mean=float(name.endswith("weight")), std=0.2)
    return model


def refuse(*args, **kwargs):
    raise AssertionError("the wrong code ran")


def accelerated(model: nn.Module, **kwargs) -> Any:
    fast = copy.deepcopy(model)
    assert len(swinkernels.accelerate(fast, **kwargs).replaced) == len(replaceable(model))
    return fast


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_outputs_and_every_gradient(options, dtype):
    model = make_model(**options).to(dtype)
    check_parity(model, make_image(model), magnifies=True)


def test_norms_and_merging_on_the_ops(monkeypatch):
    calls = []
    for name in ("residual_post_norm", "patch_merging"):
        op = getattr(norms, name)
        monkeypatch.setattr(norms, name, lambda *a, name=name, op=op, **k: calls.append(name) or op(*a, **k))
    model = make_model().double()
    check_parity(model, make_image(model), backend="reference")
    assert calls == ["residual_post_norm"] * 4 + ["patch_merging"] + ["residual_post_norm"] * 4


@pytest.mark.parametrize("size", [(36, 52), (20, 28), (8, 8)], ids=str)
def test_other_image_sizes(size):
    model = make_model(dynamic_img_size=True).double()
    check_parity(model, make_image(model, size=size))


@pytest.mark.parametrize("settings", [{"img_size": (64, 40)}, {"window_size": (5, 3)}, {"always_partition": True}])
def test_set_input_size_before_and_after(settings, monkeypatch):
    model = make_model().double()
    fast = accelerated(model)
    for m in (model, fast):
        m.set_input_size(**settings)
    exact = run(model, make_image(model))
    refuse_method(monkeypatch, SwinTransformerV2CrBlock, "_shifted_window_attn")
    assert_as_good(run(fast, make_image(model)), exact, exact)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_draws_the_same_bias_and_drop_path(checkpointing):
    """The Dropout of the position bias MLP and the drop path draw the same random numbers as in timm's own code."""
    model = make_model(drop_path_rate=0.3).double().train()
    fast = accelerated(model)
    fast.set_grad_checkpointing(checkpointing)
    x, results = make_image(model, batch=4), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    encode = fast.stages[0].blocks[0].attn._relative_positional_encodings
    assert not torch.equal(encode(), encode()), "dropout was not active"


def test_attention_dropout_runs_in_training_and_not_in_eval():
    model = accelerated(make_model(attn_drop_rate=0.5))
    x = make_image(model)
    assert torch.equal(model(x), model(x))
    model.train()
    for block in model.modules():
        if isinstance(block, SwinTransformerV2CrBlock):
            block.attn.meta_mlp.eval()
    assert not torch.equal(model(x), model(x))
    run(model, x)  # backward works


@pytest.mark.parametrize(
    "where", ["attn", "attn.qkv", "attn.meta_mlp", "attn.meta_mlp.act", "attn.proj", "attn.attn_drop"]
)
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_a_hook_inside_the_attention_fires_as_in_timm(where, kind):
    model = make_model(depths=(2,), num_heads=(2,)).double()
    x = make_image(model).requires_grad_()
    calls: list[list] = []
    for m in (accelerated(model), copy.deepcopy(model)):
        module = m.stages[0].blocks[1].get_submodule(where)
        calls.append([])
        getattr(module, kind)(lambda _m, i, o, c=calls[-1]: c.append([t.shape for t in (*i, *o) if t is not None]))
        m(x).sum().backward()
    assert calls[0] == calls[1] != []


def test_what_is_not_known_runs_timms_code(monkeypatch):
    model = make_model()
    blocks = [block for stage in model.stages for block in stage.blocks]
    blocks[0].attn.proj = nn.Sequential(blocks[0].attn.proj)
    blocks[1].attn_mask = torch.randn_like(blocks[1].attn_mask)
    blocks[2].attn = type("Own", (type(blocks[2].attn),), {})(32, 4, blocks[2].window_size)
    blocks[3]._shifted_window_attn = lambda x: x
    model.eval()
    x = make_image(model)
    expected = model(x)
    report = swinkernels.accelerate(model)
    attention = {e.path: e.remarks[0] for e in report.replaced if "Block" in e.module_class}
    assert attention == {
        "stages.0.blocks.0": "Attention: timm's own code; attn.proj is a Sequential, not an nn.Linear",
        "stages.1.blocks.0": "Attention: timm's own code; attn is a Own, not timm's WindowMultiHeadAttention",
    }
    assert [(e.path, e.reason) for e in report.skipped] == [
        ("stages.0.blocks.1", "attn_mask differs from timm's"),
        ("stages.1.blocks.1", "its _shifted_window_attn was replaced on the instance"),
    ]
    monkeypatch.setattr(_blocks, "window_attention_qkvpacked", refuse)
    assert torch.equal(model(x), expected)


def test_a_mask_put_in_place_afterwards():
    model = make_model().double()
    fast, x = accelerated(model), make_image(model)
    for m in (model, fast):
        torch.manual_seed(1)
        block = m.stages[0].blocks[1]
        block.register_buffer("attn_mask", torch.randn_like(block.attn_mask), persistent=False)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)


def test_verify_finds_a_wrong_call_and_names_the_module(monkeypatch):
    model = make_model()
    op = _blocks.window_attention_qkvpacked

    def transposed(qkv, *, bias, **arguments):
        return op(qkv, bias=bias.transpose(1, 2), **arguments)

    monkeypatch.setattr(_blocks, "window_attention_qkvpacked", transposed)
    with pytest.raises(VerificationError, match=r"stages\.0\.blocks\.0: the output is off by"):
        swinkernels.accelerate(model, verify=True)
