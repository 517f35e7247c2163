"""Tests ``accelerate`` on timm's relative position ViT, with the backend that "auto" chooses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.models.vision_transformer_relpos import RelPosAttention, ResPostRelPosBlock, VisionTransformerRelPos

import swinkernels
from swinkernels.adapters import VerificationError
from swinkernels.adapters.libraries.timm import vit
from tests.support.parity import assert_as_good, assert_as_noisy, run, shaken

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "mlp": {"rel_pos_type": "mlp"},
    "swin mlp": {"rel_pos_type": "mlp_swin"},
    "bias": {"rel_pos_type": "bias"},
    "norms of q and k": {"qk_norm": True},
    "no qkv bias": {"qkv_bias": False},
    "post-norm": {"block_fn": ResPostRelPosBlock, "rel_pos_type": "bias", "init_values": 0.5},
}


def make_model(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"img_size": (24, 40), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 3}
    model = VisionTransformerRelPos(**{**defaults, "init_values": 0.7, "rel_pos_dim": 16, **options}).eval()
    for name, p in model.named_parameters():
        if name.endswith(("qkv.weight", "relative_position_bias_table", "mlp.fc2.weight")):
            p.data.normal_(std=0.4)
        if "rel_pos.mlp.fc2.bias" in name:
            # Softmax does not change if a constant is added to all scores: the bias's gradient is only rounding error.
            p.requires_grad_(False)
    return model.to(dtype)


def make_image(dtype: torch.dtype = torch.float64, size: tuple[int, int] = (24, 40)) -> torch.Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def accelerated(model: nn.Module, **kwargs: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, **kwargs)
    assert [e.module_class for e in report.replaced] == ["RelPosAttention"] * 2
    return fast


@pytest.fixture
def op_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make scaled_dot_product_attention raise an error if it is called."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)


@pytest.fixture
def timm_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("window_attention", "window_attention_qkvpacked"):
        monkeypatch.setattr(vit, name, refuse)


def refuse(*args, **kwargs):
    raise AssertionError("the wrong code ran")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_outputs_and_every_gradient(options, dtype, monkeypatch):
    model, x = make_model(dtype, **options), make_image(dtype)
    exact, plain = run(copy.deepcopy(model).double(), x.double()), run(model, x)
    moved, fast = shaken(model, x, dtype), accelerated(model)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    assert_as_good(run(fast, x), plain, exact, moved)


@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "explicit"])
def test_both_of_timms_attention_paths(fused):
    """timm's fused path ignores ``scale`` and uses the default scale of scaled_dot_product_attention."""
    model, x = make_model(), make_image()
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = fused, 0.37
    exact = run(model, x)
    assert_as_good(run(accelerated(model), x), exact, exact)


def test_training_draws_the_same_bias():
    model, x, results = make_model(drop_path_rate=0.3).train(), make_image(), []
    for m in (model, accelerated(model)):
        torch.manual_seed(7)
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])
    assert not torch.equal(model(x), model(x)), "dropout was not active"


def test_attention_dropout_runs_in_training_and_not_in_eval(op_only):
    attn = accelerated(make_model(attn_drop_rate=0.5, rel_pos_type="bias")).blocks[0].attn
    x = torch.randn(2, 15, 24, dtype=torch.float64)
    assert torch.equal(attn(x), attn(x))
    attn.train()
    assert not torch.equal(attn(x), attn(x))


def test_autocast_bfloat16_with_norms_of_q_and_k():
    model, x = make_model(torch.float32, qk_norm=True), make_image(torch.float32)
    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_as_noisy(run(accelerated(model), x), run(model, x), exact)


def test_set_input_size():
    model = make_model(rel_pos_type="bias")
    fast = accelerated(model)
    if not hasattr(model, "set_input_size"):
        pytest.skip("this version of timm has no VisionTransformerRelPos.set_input_size")
    for m in (model, fast):
        m.set_input_size(img_size=(40, 16))
    x = make_image(size=(40, 16))
    exact = run(model, x)
    assert_as_good(run(fast, x), exact, exact)


def test_verify_finds_a_wrong_call_and_names_the_module(monkeypatch):
    op = vit.window_attention_qkvpacked
    monkeypatch.setattr(
        vit, "window_attention_qkvpacked", lambda *a, bias_table, **k: op(*a, bias_table=bias_table.flip(0), **k)
    )
    with pytest.raises(VerificationError, match=r"blocks\.0\.attn: the output is off by"):
        swinkernels.accelerate(make_model(), verify=True)


LEFT_ALONE: dict[str, tuple[dict[str, Any], str]] = {
    "one bias for all blocks": ({"shared_rel_pos": True}, "it has no position bias of its own"),
    "class token": ({"rel_pos_type": "bias", "class_token": True}, "rel_pos has a row for a class token"),
    "large map": ({"img_size": (264, 256)}, "its windows have 1056 tokens, and the op accepts at most 1024"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_what_is_left_to_torchs_attention(name, timm_only):
    options, words = LEFT_ALONE[name]
    model = make_model(torch.float32, **options)
    report = swinkernels.accelerate(model)
    assert not report.replaced
    assert all(words in e.reason for e in report.skipped)
    assert len(report.skipped) == 2


def test_another_index_layer_or_number_of_tokens(timm_only):
    model = make_model(rel_pos_type="bias")
    first, second = (block.attn for block in model.blocks)
    first.rel_pos.relative_position_index = first.rel_pos.relative_position_index.flip(0)
    second.proj = nn.Sequential(second.proj)
    assert [e.reason for e in swinkernels.accelerate(model).skipped] == [
        "rel_pos numbers tokens in another order than timm",
        "attn.proj is a Sequential, not an nn.Linear",
    ]
    attn = accelerated(make_model()).blocks[0].attn
    with pytest.raises(RuntimeError, match="size"):  # timm's error
        attn(torch.randn(2, 14, 24, dtype=torch.float64))


@pytest.mark.parametrize("where", ["", "qkv", "q_norm", "attn_drop", "proj"])
def test_a_hook_inside_the_attention_fires_as_in_timm(where):
    attn, x, seen = make_model().blocks[0].attn, torch.randn(2, 15, 24, dtype=torch.float64), []
    attn.fused_attn = False
    assert type(attn) is RelPosAttention
    swinkernels.accelerate(fast := copy.deepcopy(attn))
    for a in (attn, fast):
        seen.append([])
        a.get_submodule(where).register_forward_hook(lambda _m, i, o, s=seen[-1]: s.append([t.shape for t in (*i, o)]))
        a(x)
    assert seen[0] == seen[1] != []
