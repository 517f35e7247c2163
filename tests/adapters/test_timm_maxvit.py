"""Tests ``accelerate`` on the window and grid attention of timm's MaxViT, with the backend that "auto" chooses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.layers import RelPosBias, RelPosBiasTf
from timm.models.maxxvit import (
    MaxxVit,
    MaxxVitCfg,
    MaxxVitConvCfg,
    MaxxVitTransformerCfg,
    ParallelPartitionAttention,
    PartitionAttention2d,
    PartitionAttentionCl,
)

import swinkernels
from swinkernels.adapters import VerificationError, part
from swinkernels.adapters.libraries.timm import maxvit
from tests.support.parity import assert_as_good, assert_as_noisy, run, shaken
from tests.support.side_by_side import randomised

# Number of attention modules in each class of block.
CLASSES = {PartitionAttentionCl: 1, PartitionAttention2d: 1, ParallelPartitionAttention: 2}
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
DIM, WINDOW = 16, (3, 5)


def make_block(cls: Any, partition: str = "block", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    cfg = MaxxVitTransformerCfg(window_size=WINDOW, grid_size=WINDOW, dim_head=8, **options)
    torch.manual_seed(0)
    block = cls(DIM, cfg=cfg) if cls is ParallelPartitionAttention else cls(DIM, partition, cfg)
    block = randomised(block)
    for name, p in block.named_parameters():
        if name.endswith("mlp.fc2.bias") and "rel_pos" in name:
            # Softmax does not change if a constant is added to all scores: the bias's gradient is only rounding error.
            p.requires_grad_(False)
    return block.to(dtype)


def make_map(cls: Any, size: tuple[int, int] = (6, 15), dtype: torch.dtype = torch.float64) -> Tensor:
    shape = (2, DIM, *size) if cls is PartitionAttention2d else (2, *size, DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def accelerated(module: nn.Module, **kwargs: Any) -> Any:
    fast = copy.deepcopy(module)
    report = swinkernels.accelerate(fast, **kwargs)
    assert report.replaced
    assert not report.skipped
    return fast


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Record the arguments of every op call."""
    seen: list[dict[str, Any]] = []
    for name in ("window_attention", "window_attention_qkvpacked"):
        op = getattr(part, name)

        def watched(*args, op=op, name=name, **kwargs):
            seen.append({"op": name, **kwargs})
            return op(*args, **kwargs)

        monkeypatch.setattr(part, name, watched)
    return seen


# Same results as the library


@classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp", "none"])
@pytest.mark.parametrize("head_first", [True, False], ids=["head first", "qkv first"])
@pytest.mark.parametrize("partition", ["block", "grid"])
def test_outputs_and_every_gradient(cls, dtype, rel_pos_type, head_first, partition, calls):
    if cls is ParallelPartitionAttention and partition == "grid":
        return  # this class has both kinds of attention
    block = make_block(cls, partition, dtype, rel_pos_type=rel_pos_type, head_first=head_first)
    x = make_map(cls, dtype=dtype)
    exact = run(copy.deepcopy(block).double(), x.double())
    assert_as_good(run(accelerated(block), x), run(block, x), exact, shaken(block, x, dtype))
    assert len(calls) == CLASSES[cls]
    assert {c["op"] for c in calls} == {"window_attention" if head_first else "window_attention_qkvpacked"}
    assert [c["grid"] for c in calls] == ([False, True] if len(calls) == 2 else [partition == "grid"])


@classes
@pytest.mark.parametrize("size", [WINDOW, (9, 5), (12, 20)], ids=str)
def test_map_sizes(cls, size):
    block, x = make_block(cls, "grid"), make_map(cls, size)
    exact = run(block, x)
    assert_as_good(run(accelerated(block), x), exact, exact)


@classes
@pytest.mark.parametrize("fused", [True, False], ids=["sdpa", "explicit"])
def test_both_of_timms_attention_paths(cls, fused):
    """timm's fused path ignores ``scale`` and uses the default scale of scaled_dot_product_attention."""
    block, x = make_block(cls), make_map(cls)
    for name, _ in maxvit._attentions(block):
        attn = block.get_submodule(name)
        attn.fused_attn, attn.scale = fused, 0.37
    exact = run(block, x)
    assert_as_good(run(accelerated(block), x), exact, exact)


@classes
def test_memory_formats_and_layer_scale(cls):
    block, x = make_block(cls, init_values=0.3), make_map(cls)
    exact = run(block, x)
    assert_as_good(run(accelerated(block), x.transpose(1, 2).contiguous().transpose(1, 2)), exact, exact)
    assert_as_good(run(accelerated(block), x.to(memory_format=torch.channels_last)), exact, exact)


@classes
@pytest.mark.parametrize("rel_pos_type", ["bias", "bias_tf", "mlp"])
def test_set_partition_size(cls, rel_pos_type, calls):
    block = make_block(cls, rel_pos_type=rel_pos_type)
    fast = accelerated(block)
    for b in (block, fast):
        b.set_partition_size((2, 7))
    x = make_map(cls, (6, 14))
    exact = run(block, x)
    assert_as_good(run(fast, x), exact, exact)
    assert {c["window_size"] for c in calls} == {(2, 7)}


@classes
def test_a_map_that_windows_do_not_divide_is_refused_as_timm_does(cls):
    fast = accelerated(make_block(cls))
    with pytest.raises(AssertionError, match="divisible by"):
        fast(make_map(cls, (7, 15)))


# Training and low precision


@classes
def test_training_draws_the_same_bias(cls):
    """The Dropout of the position bias MLP draws the same random numbers as in timm's own code."""
    block, x, results = make_block(cls, rel_pos_type="mlp").train(), make_map(cls), []
    for b in (block, accelerated(block)):
        torch.manual_seed(7)
        results.append(run(b, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    assert not torch.equal(block(x), block(x)), "dropout was not active"


@classes
def test_attention_dropout_runs_in_training_and_not_in_eval(cls):
    block, x = accelerated(make_block(cls, attn_drop=0.5)), make_map(cls)
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))


@classes
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16(cls, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    block, x = make_block(cls, rel_pos_type="bias_tf", dtype=dtype), make_map(cls, dtype=dtype)
    exact = run(copy.deepcopy(block).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        assert_as_noisy(run(accelerated(block), x), run(block, x), exact)


# A whole model


@pytest.fixture(scope="module")
def model() -> Any:
    """Build a MaxViT for 64x64 images, with one block on a 16x16 map and one block on an 8x8 map."""
    torch.manual_seed(0)
    cfg = MaxxVitCfg(
        embed_dim=(16, 16),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=8,
        conv_cfg=MaxxVitConvCfg(),
        transformer_cfg=MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )
    return MaxxVit(cfg, img_size=64, num_classes=3).eval()


def test_a_whole_model(model, calls):
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    exact = run(copy.deepcopy(model).double(), x.double())
    fast = accelerated(model)
    assert_as_good(run(fast, x), run(model, x), exact, shaken(model, x, torch.float32))
    assert [c["grid"] for c in calls] == [False, True] * 2
    report = swinkernels.accelerate(fast)
    assert [e.module_class for e in report.replaced] == ["PartitionAttentionCl"] * 4
    assert report.replaced[0].path == "stages.0.blocks.0.attn_block"


def refuse(*args, **kwargs):
    raise AssertionError("the wrong code ran")


@classes
def test_tracing_traces_timms_code(cls, calls):
    block, x = make_block(cls), make_map(cls)
    traced = torch.jit.trace(accelerated(block), x, check_trace=False)
    assert not calls
    torch.testing.assert_close(traced(x), block(x), rtol=1e-10, atol=1e-12)


@classes
def test_copies_keys_twice_and_restore(cls, calls):
    block, x = make_block(cls), make_map(cls)
    fast = copy.deepcopy(block)
    assert swinkernels.accelerate(fast, backend="reference") == swinkernels.accelerate(fast, backend="reference")
    assert list(fast.state_dict()) == list(block.state_dict())
    expected = fast(x)
    for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        calls.clear()
        assert torch.equal(again(x), expected)
        assert {c["backend"] for c in calls} == {"reference"}
    swinkernels.restore(fast)
    assert [set(m.__dict__) for m in fast.modules()] == [set(m.__dict__) for m in block.modules()]
    assert torch.equal(fast(x), block(x))


@classes
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verify_passes(cls, dtype):
    for partition, rel_pos_type in (("block", "bias_tf"), ("grid", "mlp")):
        accelerated(make_block(cls, partition, dtype, rel_pos_type=rel_pos_type), verify=True)


@classes
def test_verify_finds_a_wrong_call(cls, monkeypatch):
    op = part.window_attention
    monkeypatch.setattr(part, "window_attention", lambda *a, grid, **k: op(*a, grid=not grid, **k))
    with pytest.raises(VerificationError, match="the model itself: the output is off by"):
        swinkernels.accelerate(make_block(cls), verify=True)


# Cases in which timm's own code has to run


@pytest.mark.parametrize("where", ["", "qkv", "rel_pos", "rel_pos.mlp", "attn_drop", "proj", "proj_drop"])
def test_a_hook_inside_the_attention_fires_as_in_timm(where):
    block, x, seen = make_block(PartitionAttentionCl, rel_pos_type="mlp"), make_map(PartitionAttentionCl), []
    block.attn.fused_attn = False
    for b in (block, accelerated(block)):
        seen.append([])
        module = b.get_submodule(f"attn.{where}".rstrip("."))
        module.register_forward_hook(lambda _m, i, o, s=seen[-1]: s.append([t.shape for t in (*i, o)]))
        torch.testing.assert_close(b(x), make_block(PartitionAttentionCl, rel_pos_type="mlp")(x))
    assert seen[0] == seen[1] != []


class OwnRelPos(RelPosBias):
    pass


class Attn(nn.Module):
    pass


def strided(attn: Any) -> None:
    attn.proj = nn.Conv2d(DIM, DIM, 3, padding=1)


REPLACEMENTS: dict[str, tuple[Any, Any, str]] = {
    "attention": (
        PartitionAttentionCl,
        lambda a: setattr(a, "__class__", Attn),
        "attn is a Attn, not timm's AttentionCl",
    ),
    "projection": (
        ParallelPartitionAttention,
        lambda a: setattr(a, "proj", nn.Identity()),
        "attn_grid.proj is a Identity, not an nn.Linear",
    ),
    "convolution": (PartitionAttention2d, strided, "attn.proj is not a 1x1 convolution"),
    "bias": (
        PartitionAttentionCl,
        lambda a: setattr(a, "rel_pos", OwnRelPos(WINDOW, 2)),
        "attn.rel_pos is a OwnRelPos, not one of timm's RelPosBias, RelPosBiasTf and RelPosMlp",
    ),
    "bias of another window": (
        PartitionAttentionCl,
        lambda a: setattr(a, "rel_pos", RelPosBias((5, 3), 2)),
        "attn.rel_pos is for windows of (5, 3) tokens, not (3, 5)",
    ),
    "class token": (
        PartitionAttentionCl,
        lambda a: setattr(a, "rel_pos", RelPosBias(WINDOW, 2, prefix_tokens=1)),
        "attn.rel_pos has a row for a class token",
    ),
    "bias of another shape": (
        PartitionAttentionCl,
        lambda a: setattr(a, "rel_pos", RelPosBias(WINDOW, 2)) or setattr(a.rel_pos, "bias_shape", (15, 15, 3)),
        "attn.rel_pos.bias_shape is (15, 15, 3), not (15, 15, 2)",
    ),
    "get_bias": (
        PartitionAttention2d,
        lambda a: setattr(a.rel_pos, "get_bias", lambda: 0),
        "attn.rel_pos.get_bias was replaced on the instance",
    ),
    "forward": (
        PartitionAttentionCl,
        lambda a: setattr(a, "forward", abs),
        "attn.forward was replaced on the instance",
    ),
    "index": (
        PartitionAttentionCl,
        lambda a: setattr(a.rel_pos, "relative_position_index", a.rel_pos.relative_position_index.flip(0)),
        "attn.rel_pos numbers tokens in another order than timm",
    ),
    "lookup": (
        PartitionAttentionCl,
        lambda a: (
            setattr(a, "rel_pos", RelPosBiasTf(WINDOW, 2)),
            setattr(a.rel_pos, "width_lookup", a.rel_pos.width_lookup.flip(2)),
        ),
        "attn.rel_pos numbers tokens in another order than timm",
    ),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_is_not_known_is_left_alone(name):
    cls, replace, words = REPLACEMENTS[name]
    block = make_block(cls)
    replace(block.get_submodule(maxvit._attentions(block)[-1][0]))
    (entry,) = swinkernels.accelerate(block).skipped
    assert words in entry.reason
    assert type(block) is cls


def test_a_method_of_the_block_that_was_replaced():
    block = make_block(PartitionAttentionCl)
    block._partition_attn = abs
    (entry,) = swinkernels.accelerate(block).skipped
    assert entry.reason == "its _partition_attn was replaced on the instance"


@classes
def test_what_is_replaced_afterwards_runs_timms_code(cls, calls):
    block, x = make_block(cls), make_map(cls)
    fast = accelerated(block)
    for b in (block, fast):
        attn = b.get_submodule(maxvit._attentions(b)[-1][0])
        torch.manual_seed(3)
        attn.rel_pos = OwnRelPos(WINDOW, 2).double()
    torch.testing.assert_close(fast(x), block(x), rtol=1e-10, atol=1e-12)
    assert not calls
