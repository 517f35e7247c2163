"""Tests attention modules, blocks and stages against timm's and Microsoft's: strict loading, same results."""

from __future__ import annotations

import collections
import copy
import functools
from typing import Any

import pytest
import timm
import torch
from timm.layers import DropPath as TimmDropPath
from timm.layers import RelPosBias
from timm.models.swin_transformer import SwinTransformerBlock as TimmBlock
from timm.models.swin_transformer import SwinTransformerStage as TimmStage
from timm.models.swin_transformer_v2 import SwinTransformerV2Block as TimmBlockV2
from timm.models.vision_transformer import Block as TimmViTBlock
from timm.models.vision_transformer_relpos import RelPosBlock as TimmRelPosBlock
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import swinkernels
from swinkernels import nn as sn
from swinkernels import window_attention_qkvpacked
from swinkernels.adapters.masks import window_index
from swinkernels.models import SwinTransformer
from swinkernels.ops._fused_linear import why_not_fused
from tests.support.fused_products import always_fused, fused_calls
from tests.support.parity import assert_as_good, assert_as_noisy, randomise, run, shaken
from tests.support.published_forms import ClassificationBlock, ClassificationBlockV2
from tests.support.saved_bytes import kept_bytes


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_map(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def check(
    ours: nn.Module, theirs: nn.Module, x: Tensor, *sizes: Any, renamed: tuple[tuple[str, str], ...] = ()
) -> None:
    """Load ``theirs`` into ``ours`` strictly; compare outputs and all gradients in float64 and in ``x.dtype``."""
    randomise(theirs)
    state = theirs.state_dict()
    for a, b in renamed:
        state = {key.replace(a, b): value for key, value in state.items()}
    ours.load_state_dict(state, strict=True)
    ours.eval(), theirs.eval()

    def result(module: nn.Module, x: Tensor, *args: Any) -> dict[str, Tensor]:
        out = run(module, x, *args)
        for a, b in renamed:
            out = {key.replace(a, b): value for key, value in out.items()}
        return out

    exact = result(copy.deepcopy(theirs).double(), x.double())
    assert_as_good(result(copy.deepcopy(ours).double(), x.double(), *sizes), exact, exact)
    moved = shaken(theirs, x, x.dtype)
    for a, b in renamed:
        moved = [{key.replace(a, b): value for key, value in m.items()} for m in moved]
    assert_as_good(result(ours, x, *sizes), result(theirs, x), exact, moved)


@pytest.mark.parametrize("size", [(8, 12), (9, 14), (4, 8), (3, 8)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_block_is_timms(version, shift, size):
    kind = (TimmBlock, TimmBlockV2)[version - 1]
    theirs = kind(16, size, 2, window_size=4, shift_size=shift)
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1]
    ours = block(16, size, 2, window_size=4, shift_size=shift, pad_order="roll_then_pad")
    assert (ours.window_size, ours.shift_size) == (tuple(theirs.window_size), tuple(theirs.shift_size))
    check(ours, theirs, make_map(2, *size, 16))


@pytest.mark.parametrize("size", [(8, 12), (4, 4)], ids=str)
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("version", [1, 2])
def test_block_is_microsofts(version, shift, size):
    """Like Microsoft's block, ours takes sequences and loads the buffers relative_position_index and attn_mask."""
    theirs = (ClassificationBlock, ClassificationBlockV2)[version - 1](16, size, 2, 4, shift)
    if version == 2:  # cpb_mlp has 512 hidden features in Microsoft's code
        theirs.attn.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, 2, bias=False))
    ours = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1](16, size, 2, 4, shift, mlp_ratio=2.0)
    x = make_map(2, size[0] * size[1], 16)
    check(ours, theirs, x, size)


def test_block_of_v2_without_a_bias_of_qkv_is_timms():
    options = {"window_size": 4, "shift_size": 2, "qkv_bias": False}
    theirs = TimmBlockV2(16, (9, 14), 2, **options)
    check(
        sn.SwinTransformerBlockV2(16, (9, 14), 2, pad_order="roll_then_pad", **options), theirs, make_map(2, 9, 14, 16)
    )


def test_attention_of_another_index_is_refused():
    ours = sn.WindowAttention(16, 4, 2)
    state = ours.state_dict()
    index = window_index((4, 4))
    ours.load_state_dict({**state, "relative_position_index": index}, strict=True)
    with pytest.raises(RuntimeError, match="differs from the index of Microsoft's code"):
        ours.load_state_dict({**state, "relative_position_index": index.T}, strict=True)


@pytest.mark.parametrize("depth", [1, 3])
def test_stage_is_timms(depth):
    theirs = TimmStage(8, 16, (9, 14), depth, downsample=True, num_heads=2, window_size=4)
    ours = sn.BasicLayer(
        16, (5, 7), depth, 2, 4, downsample=sn.PatchMerging, downsample_first=True, pad_order="roll_then_pad"
    )
    check(ours, theirs, make_map(2, 9, 14, 8))


def test_stages_of_v2_and_with_upsampling_run_in_both_forms():
    for layer, shape in (
        (sn.BasicLayerV2(16, (8, 8), 2, 2, 4, downsample=sn.PatchMergingV2), (2, 4, 4, 32)),
        (sn.BasicLayer(16, (8, 8), 2, 2, 4, upsample=sn.PatchExpand), (2, 16, 16, 8)),
    ):
        x = make_map(2, 8, 8, 16)
        out = layer(x)
        assert out.shape == shape
        torch.testing.assert_close(layer(x.flatten(1, 2), (8, 8)), out.flatten(1, 2))


def test_a_stage_hands_its_scale_to_its_blocks():
    assert [block.attn.scale for block in sn.BasicLayer(16, None, 2, 2, 4, qk_scale=0.7).blocks] == [0.7, 0.7]


def test_checkpointing_of_a_stage_changes_nothing():
    layer = sn.BasicLayer(16, (8, 8), 2, 2, 4).double()
    x = make_map(2, 8, 8, 16, dtype=torch.float64)
    expected = run(layer.train(), x)
    layer.use_checkpoint = True
    assert_as_good(run(layer, x), expected, expected)


def test_windows_of_three_axes_and_frame_by_frame():
    x = make_map(2, 3, 8, 8, 16, dtype=torch.float64)
    flat = sn.SwinTransformerBlock(16, None, 2, 4, 2).double()
    frames = torch.stack([flat(f) for f in x.unbind(1)], 1)
    torch.testing.assert_close(flat(x), frames)
    deep = sn.SwinTransformerBlock(16, None, 2, (1, 4, 4), (0, 2, 2)).double()
    randomise(flat)
    deep.load_state_dict(flat.state_dict(), strict=True)
    torch.testing.assert_close(deep(x), flat(x))


def test_small_maps_clip_like_a_slice_of_the_index():
    """As in MONAI and Video-Swin, a clipped window uses the first rows and columns of the full window's index."""
    attention = sn.WindowAttention(16, (4, 4), 2, small_maps="clip").double()
    randomise(attention)
    x = make_map(1, 2, 8, 16, dtype=torch.float64)
    of_full = window_index((4, 4))[:8, :8]  # the first 8 tokens of 16
    bias = attention.relative_position_bias_table[of_full].permute(2, 0, 1)
    out = window_attention_qkvpacked(attention.qkv(x), bias=bias, num_heads=2, window_size=(2, 4))
    torch.testing.assert_close(attention(x), attention.proj(out))
    padded = sn.WindowAttention(16, (4, 4), 2).double()
    padded.load_state_dict(attention.state_dict())
    assert not torch.allclose(attention(x), padded(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision(dtype):
    theirs = TimmBlock(16, (9, 14), 2, window_size=4, shift_size=2)
    ours = sn.SwinTransformerBlock(16, (9, 14), 2, 4, 2, pad_order="roll_then_pad")
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    low, x = copy.deepcopy(theirs).eval().to(dtype), make_map(2, 9, 14, 16, dtype=dtype)
    exact = run(copy.deepcopy(low).double(), x.double())
    assert_as_noisy(run(ours.eval().to(dtype), x), run(low, x), exact)


@pytest.mark.parametrize("version", [1, 2])
def test_drop_path_and_dropout_draw_as_timm(version):
    kind = (TimmBlock, TimmBlockV2)[version - 1]
    theirs = kind(16, (8, 8), 2, window_size=4, shift_size=2, drop_path=0.5).double().train()
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1]
    ours = block(16, (8, 8), 2, 4, 2, drop_path=0.5).double().train()
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = make_map(6, 8, 8, 16, dtype=torch.float64)
    assert ours._is_of_halves(x)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        results.append(module(x))
    torch.testing.assert_close(results[1], results[0])
    assert not torch.allclose(ours(x), results[0])


@pytest.mark.parametrize("version", [1, 2])
def test_a_training_step_of_a_tiny_model_keeps_at_most_three_fifths_of_timms(version):
    name, options = (
        ("swin_tiny_patch4_window7_224", {}),
        ("swinv2_tiny_window8_256", {"img_size": 256, "window_size": 8}),
    )[version - 1]
    ours, theirs = SwinTransformer(version=version, **options).train(), timm.create_model(name).train()
    x = torch.randn(1, 3, *theirs.patch_embed.img_size)
    kept, of_timm = (kept_bytes(functools.partial(m, x), m.parameters()) for m in (ours, theirs))
    assert kept <= 0.6 * of_timm


@pytest.mark.parametrize("version", [1, 2])
def test_what_is_hooked_or_replaced_inside_a_block_is_called(version):
    """Hooked and replaced submodules of a block are called instead of the fused halves; hooks do not change results."""
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1](16, (9, 14), 2, 4, 2).double()
    randomise(block)
    x = make_map(2, 9, 14, 16, dtype=torch.float64)
    assert block._is_of_halves(x)
    expected = run(block, x)
    for name in ("attn", "attn.qkv", "attn.proj", "attn.proj_drop", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "mlp.drop"):
        if name == "attn.qkv" and version == 2:
            continue  # q_bias and v_bias are parameters of attn, so attn.qkv itself is never called
        seen = []
        with block.get_submodule(name).register_forward_hook(lambda *_, seen=seen: seen.append(1)):
            assert_as_good(run(block, x), expected, expected)
        assert seen, name
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        assert_as_good(run(block, x), expected, expected)
    assert block.mlp.fc2 in seen
    nn.utils.parametrizations.weight_norm(block.mlp.fc1)
    assert not block._is_of_halves(x)
    torch.testing.assert_close(block(x), expected["out"])
    block.mlp.act = nn.ReLU()
    assert not torch.allclose(block(x), expected["out"])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("version", [1, 2])
def test_inference_on_a_cpu_fuses_the_products_of_halves(version, training):
    """Without gradients, qkv, proj, fc1 with GELU and fc2 are fused, also in training; drop path draws as in timm."""
    reason = why_not_fused(torch.float32)
    if reason is not None:
        pytest.skip(reason)
    kind = (TimmBlock, TimmBlockV2)[version - 1]
    theirs = kind(16, (9, 14), 2, window_size=4, shift_size=2, drop_path=0.5)
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1]
    ours = block(16, (9, 14), 2, 4, 2, drop_path=0.5, pad_order="roll_then_pad")
    randomise(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x, results = make_map(6, 9, 14, 16), []
    with torch.no_grad(), always_fused(), fused_calls() as called:
        for module in (theirs, ours):
            torch.manual_seed(3)
            results.append(module.train(training)(x))
    assert len(called) == 4
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("version", [1, 2])
def test_stochastic_depth_of_halves_in_a_checkpoint(version):
    """Recomputation under activation checkpointing draws the same random numbers as the first forward pass."""
    layer = (sn.BasicLayer, sn.BasicLayerV2)[version - 1](16, (8, 8), 2, 2, 4, drop_path=0.5).double().train()
    randomise(layer)
    results, x = [], make_map(6, 8, 8, 16, dtype=torch.float64)
    for layer.use_checkpoint in (False, True):
        torch.manual_seed(3)
        results.append(run(layer, x.clone()))
    assert layer.blocks[0]._is_of_halves(x)
    assert_as_good(results[1], results[0], results[0])


def test_drop_path_is_timms():
    y = make_map(20, 3, 16)
    for rate in (0.0, 0.25, 1.0):
        ours, theirs = sn.DropPath(rate), TimmDropPath(rate)
        for training in (True, False):
            torch.manual_seed(3)
            expected = theirs.train(training)(y)
            torch.manual_seed(3)
            assert torch.equal(ours.train(training)(y), expected)


@pytest.mark.parametrize("version", [1, 2])
def test_norms_and_residual_connections_on_ops(version):
    """A block with backend="reference" gives the results of backend="auto", also with stochastic depth."""
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1]
    make = functools.partial(block, 16, (9, 14), 2, 4, 2, drop_path=0.5)
    plain, on_ops = make().double().train(), make(backend="reference").double().train()
    randomise(plain)
    on_ops.load_state_dict(plain.state_dict())
    results = []
    for module in (plain, on_ops):
        torch.manual_seed(3)
        results.append(run(module, make_map(6, 9, 14, 16, dtype=torch.float64)))
    assert_as_good(results[1], results[0], results[0])


@pytest.mark.parametrize("version", [1, 2])
def test_autocast(version):
    block = (sn.SwinTransformerBlock, sn.SwinTransformerBlockV2)[version - 1]
    module, x = block(16, (9, 14), 2, 4, 2).eval(), make_map(2, 9, 14, 16)
    randomise(module)
    exact = run(copy.deepcopy(module).double(), x.double())
    with torch.autocast("cpu", torch.bfloat16):
        got = run(module, x)
    assert got["out"].dtype == torch.float32
    for name, e in exact.items():
        assert (got[name].double() - e).norm() <= 0.05 * e.norm(), name


@pytest.mark.parametrize("init_values", [None, 0.1])
def test_vit_block_is_timms(init_values):
    theirs = TimmViTBlock(16, 2, qkv_bias=True, init_values=init_values)
    ours = sn.Block(16, 2, qkv_bias=True, init_values=init_values)
    check(ours, theirs, make_map(2, 13, 16))


def test_vit_block_with_relative_positions_is_timms():
    bias = functools.partial(RelPosBias, window_size=(5, 6))
    theirs = TimmRelPosBlock(16, 2, qkv_bias=True, rel_pos_cls=bias)
    ours = sn.Block(16, 2, qkv_bias=True, window_size=(5, 6), rel_pos=True, eps=1e-5)
    check(ours, theirs, make_map(2, 30, 16), (5, 6))


def test_windowed_vit_attention_is_that_of_each_window():
    windowed = sn.Attention(16, 2, qkv_bias=True, window_size=4).double()
    whole = sn.Attention(16, 2, qkv_bias=True).double()
    whole.load_state_dict(windowed.state_dict(), strict=True)
    x = make_map(2, 8, 4, 16, dtype=torch.float64)
    expected = torch.cat([whole(x[:, :4]), whole(x[:, 4:])], 1)
    torch.testing.assert_close(windowed(x), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sn.WindowAttention(15, 4, 2), "dim must be a multiple of num_heads"),
        (lambda: sn.WindowAttention(16, (4,), 2), "two or three values"),
        (lambda: sn.WindowAttention(16, 4, 2, small_maps="crop"), "small_maps"),
        (lambda: sn.SwinTransformerBlock(16, (4, 4, 4), 2, 4), "input_resolution must have the 2 axes"),
        (lambda: sn.BasicLayer(16, None, 2, 2, drop_path=[0.1]), "one for each of the 2 blocks"),
        (lambda: sn.BasicLayer(16, None, 2, 2, downsample_first=True), "downsample_first needs"),
        (lambda: sn.Attention(15, 2), "Attention: dim must be a multiple of num_heads, got 15 and 2"),
        (lambda: sn.Attention(16, 2)(torch.zeros(2, 16)), r"must be \(B, \*S, C\) or \(B, L, C\) with C = dim = 16"),
        (lambda: sn.Attention(16, 2, rel_pos=True), "rel_pos=True needs window_size"),
        (lambda: sn.DropPath(1.5), "drop_prob must be in 0..1"),
        (lambda: sn.WindowAttention(16, 4, 2)(torch.zeros(2, 5, 16), (2, 3)), "must have the L = 6 tokens"),
        (lambda: sn.WindowAttention(16, 4, 2)(torch.zeros(2, 4, 4, 8)), "must have dim = 16 channels"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_attention_over_all_tokens_takes_a_tensor():
    with pytest.raises(TypeError, match="Attention: x must be a tensor, got list"):
        sn.Attention(16, 2)([1.0])


@pytest.mark.filterwarnings("ignore")  # torch's warning about tracing
def test_tracing_is_refused_in_words_that_help():
    for module in (sn.SwinTransformerBlock(16, None, 2, 4), sn.Attention(16, 2, window_size=4)):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record window attention\. Use torch\.export"):
            torch.jit.trace(module, make_map(1, 4, 4, 16))


@pytest.mark.parametrize("accelerated", [False, True], ids=["ours", "timm"])
def test_autocast_casts_each_weight_once_a_step(accelerated):
    """Under autocast, the forward and backward pass of a block together cast each weight exactly once."""
    block = TimmBlock(16, (8, 8), 2, window_size=4) if accelerated else sn.SwinTransformerBlock(16, (8, 8), 2, 4)
    if accelerated:
        swinkernels.accelerate(block)
    names = {p.data_ptr(): name for name, p in block.named_parameters() if p.dim() == 2 and "norm" not in name}
    casts = collections.Counter()

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            keywords = keywords or {}
            if function is torch.ops.aten._to_copy.default and keywords.get("dtype") == torch.bfloat16:
                casts[names.get(arguments[0].data_ptr())] += 1
            return function(*arguments, **keywords)

    with Count():
        with torch.autocast("cpu", torch.bfloat16):
            y = block.train()(make_map(2, 8, 8, 16))
        y.float().square().mean().backward()
    del casts[None]
    weights = {name for name in names.values() if "relative_position" not in name}
    assert len(weights) == 4 and casts == dict.fromkeys(weights, 1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (sn.WindowAttention(16, 4, 2, shift_size=1), "dim=16, window_size=(4, 4), num_heads=2, shift_size=(1, 1), pad"),
        (sn.SwinTransformerBlock(16, (8, 8), 2, 4), "dim=16, input_resolution=(8, 8), backend='auto'"),
        (sn.BasicLayerV2(16, None, 2, 2, 4), "dim=16, depth=2, use_checkpoint=False"),
        (sn.Attention(16, 2, window_size=4), "dim=16, num_heads=2, window_size=(4, 4), backend='auto'"),
        (sn.Block(16, 2), "dim=16, backend='auto'"),
        (sn.DropPath(0.25), "drop_prob=0.25"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, nn.Module) else "",
)
def test_repr(module, words):
    assert words in repr(module).partition("\n  (")[0]
