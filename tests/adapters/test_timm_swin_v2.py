"""Tests ``accelerate`` on the cosine attention of timm's Swin V2, with the backend that "auto" chooses."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

pytest.importorskip("timm", reason="timm is not installed")

from timm.models.swin_transformer_v2 import SwinTransformerV2Block

import swinkernels
from swinkernels.adapters import VerificationError
from swinkernels.adapters.libraries.timm import _blocks
from tests.support.parity import assert_as_good, assert_as_noisy, run
from tests.support.published import refuse as refuse_method
from tests.support.timm_swin import CONFIGURATIONS, check_parity, make_image, make_model, replaceable

GEOMETRIES = {name: options for name, options in CONFIGURATIONS.items() if "head_dim" not in options}


@pytest.fixture
def op_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm's own attention raise an error, so that a passing test proves that the op ran."""
    refuse_method(monkeypatch, SwinTransformerV2Block, "_attn")


@pytest.fixture
def timm_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_blocks, "window_attention_qkvpacked", refuse)


def refuse(*args, **kwargs):
    raise AssertionError("the wrong code ran")


def accelerated(model: nn.Module, **kwargs) -> nn.Module:
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast, **kwargs)
    return fast


# Same results as the library


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", GEOMETRIES.values(), ids=GEOMETRIES.keys())
def test_outputs_and_every_gradient(options, dtype):
    model = make_model(2, **options).to(dtype)
    check_parity(model, make_image(model), magnifies=True)


@pytest.mark.parametrize(
    "options",
    [{"pretrained_window_sizes": (6, 3)}, {"window_size": (1, 4)}, {"img_size": (4, 24)}],
    ids=["pretrained window", "window of one row", "map of one row"],
)
def test_other_tables(options):
    model = make_model(2, **options).double()
    check_parity(model, make_image(model))


@pytest.mark.parametrize("size", [(36, 52), (20, 28), (8, 8)], ids=str)
@pytest.mark.parametrize("option", ["dynamic_img_size", "strict_img_size"])
def test_other_image_sizes(size, option, op_only):
    model = make_model(2, **{option: option == "dynamic_img_size"}).double()
    fast, x = accelerated(model), make_image(model, size=size)
    got = run(fast, x)
    with pytest.MonkeyPatch.context() as own:
        own.setattr(SwinTransformerV2Block, "_attn", ORIGINAL_ATTN)
        exact = run(model, x)
    assert_as_good(got, exact, exact)


ORIGINAL_ATTN = SwinTransformerV2Block._attn


@pytest.mark.parametrize("settings", [{"img_size": (64, 40)}, {"window_size": (5, 3)}, {"always_partition": True}])
def test_set_input_size_before_and_after(settings, monkeypatch):
    model = make_model(2).double()
    fast = accelerated(model)
    for m in (model, fast):
        m.set_input_size(**settings)
    exact = run(model, make_image(model))
    refuse_method(monkeypatch, SwinTransformerV2Block, "_attn")
    assert_as_good(run(fast, make_image(model)), exact, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_separate_qkv_bias(dtype):
    """timm adds the bias to a product already rounded to bfloat16; the accelerated model does the same."""
    model = make_model(2)
    for block in replaceable(model):
        if isinstance(block, SwinTransformerV2Block):
            block.attn.qkv_bias_separate = True
    model, x = model.to(dtype), make_image(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    got, plain = run(accelerated(model), x.to(dtype)), run(model, x.to(dtype))
    (assert_as_good if dtype == torch.float64 else assert_as_noisy)(got, plain, exact)


def test_scores_at_the_limit_of_logit_scale():
    model = make_model(2)
    for name, p in model.named_parameters():
        if name.endswith("logit_scale"):
            p.data.copy_(torch.linspace(4.5, 4.7, p.numel()).view_as(p))  # the limit is ln 100 = 4.605
    check_parity(model.double(), make_image(model).double(), magnifies=True)
    assert len(swinkernels.accelerate(model.float(), verify=True).replaced) == len(replaceable(model))


def test_one_frozen_parameter_leaves_the_other_gradients_as_they_were():
    for frozen in ("q_bias", "cpb_mlp.0", "logit_scale"):
        model = make_model(2, depths=(2,), num_heads=(2,)).double()
        for name, p in model.named_parameters():
            p.requires_grad_(frozen not in name)
        check_parity(model, make_image(model))


# Training


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_with_drop_path(checkpointing):
    model = make_model(2, drop_path_rate=0.4).double().train()
    fast = accelerated(model)
    fast.set_grad_checkpointing(checkpointing)
    x, results = make_image(model, batch=4), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])
    assert not torch.equal(results[0]["out"], model.eval()(x)), "drop path was not active"


def test_attention_dropout_runs_in_training_and_not_in_eval():
    model = make_model(2, attn_drop_rate=0.5)
    fast, x = accelerated(model).train(), make_image(model)
    torch.manual_seed(3)
    first = fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(fast(x), first)
    run(fast, x)  # backward works
    check_parity(model, x, magnifies=True)


def test_projection_dropout():
    model = accelerated(make_model(2, proj_drop_rate=0.5))
    x = make_image(model)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


# Low precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_model(dtype):
    # This size needs no padding. For pad tokens in float16, timm's code divides 0 by 0.
    model = make_model(2, img_size=(32, 64)).to(dtype)
    fast, x = accelerated(model), make_image(model)
    exact = run(copy.deepcopy(model).double(), x.double())
    assert_as_noisy(run(fast, x), run(model, x), exact)


# torch.compile and tracing


def test_compile_fullgraph_without_compiling_again_for_every_batch(op_only):
    torch._dynamo.reset()
    block = accelerated(make_model(2).double().layers[0].blocks[1])
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(block, fullgraph=True, backend=graphs)
    for batch in (2, 3, 4):
        x = torch.randn(batch, 9, 13, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        exact = run(block, x)
        got = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, x).items()}
        assert_as_good(got, exact, exact)
    assert graphs.frame_count == 2, "one graph for the first batch, one for any other"


def test_compile_a_whole_model(op_only):
    torch._dynamo.reset()
    model = accelerated(make_model(2, depths=(2, 1)).double())
    x = make_image(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)


# The model's state and interface


def test_report():
    entry = swinkernels.accelerate(make_model(2, attn_drop_rate=0.1).double()).replaced[1]
    assert (entry.path, entry.module_class, entry.backend) == (
        "layers.0.blocks.0",
        "SwinTransformerV2Block",
        "torch",
    )
    assert entry.remarks[0].startswith("Attention: torch. Not cpu: ")
    model = make_model(2).to("meta")
    assert len(swinkernels.accelerate(model).replaced) == 1 + 4 + 1


@pytest.mark.parametrize("wrong", ["mask_value", "pad_qkv", "logit_scale", "bias_table"])
def test_verify_finds_a_wrong_call_and_names_the_module(wrong, monkeypatch):
    model, op = make_model(2), _blocks.window_attention_qkvpacked

    def wrong_op(qkv, **arguments):
        if any(arguments["shift_size"]):
            value = arguments[wrong]
            arguments[wrong] = -5.0 if wrong == "mask_value" else value * 1.01
        return op(qkv, **arguments)

    monkeypatch.setattr(_blocks, "window_attention_qkvpacked", wrong_op)
    with pytest.raises(VerificationError, match=r"layers\.0\.blocks\.1: the output is off by"):
        swinkernels.accelerate(model, verify=True)
    assert all(type(b) is SwinTransformerV2Block for stage in model.layers for b in stage.blocks)


# Cases in which timm's own code has to run


HOOKED = ("attn", "attn.qkv", "attn.cpb_mlp", "attn.cpb_mlp.2", "attn.softmax", "attn.attn_drop", "attn.proj")


@pytest.mark.parametrize("kind", ["register_forward_hook", "register_full_backward_hook"])
def test_hooks_inside_the_attention_fire_as_in_timm(kind):
    """With qkv_bias=True, timm reads the weight of attn.qkv and does not call the module."""
    for qkv_bias in (True, False):
        model = make_model(2, depths=(2,), num_heads=(2,), qkv_bias=qkv_bias).double()
        x = make_image(model).requires_grad_()
        for where in HOOKED:
            calls: dict[bool, list] = {False: [], True: []}
            outs = []
            for fast in (False, True):
                m = accelerated(model) if fast else copy.deepcopy(model)
                module = m.layers[0].blocks[1].get_submodule(where)
                getattr(module, kind)(
                    lambda _m, i, o, c=calls[fast]: c.append([t.shape for t in (*i, *o) if t is not None])
                )
                outs.append(m(x))
                outs[-1].sum().backward()
            assert calls[True] == calls[False]
            assert calls[True] or (where == "attn.qkv" and qkv_bias)
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-10, atol=1e-12)


def test_a_hook_leaves_the_attention_to_timm_and_says_so(timm_only):
    model = make_model(2)
    for block in (*model.layers[0].blocks, *model.layers[1].blocks):
        block.attn.softmax.register_forward_hook(lambda *_: None)
    report = swinkernels.accelerate(model)
    assert report.replaced[1].remarks[0] == "Attention: timm's own code; a hook is registered on attn.softmax"
    model(make_image(model))


class LowRank(nn.Linear):
    pass


REPLACEMENTS = {
    "another projection": ("proj", lambda attn: LowRank(16, 16), "attn.proj is a LowRank, not an nn.Linear"),
    "another softmax": ("softmax", lambda attn: nn.Softmin(-1), "attn.softmax is a Softmin, not an nn.Softmax"),
    "a qkv with a bias": (
        "qkv",
        lambda attn: nn.Linear(16, 48),
        "attn.qkv has a bias in addition to q_bias and v_bias",
    ),
    "another table": (
        "relative_coords_table",
        lambda attn: torch.randn(1, 49, 1, 2),
        "attn.relative_coords_table is not the table of window_size",
    ),
}


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_what_is_not_known_runs_timms_code(name, timm_only):
    where, make, words = REPLACEMENTS[name]
    model = make_model(2, depths=(1,), num_heads=(2,))
    block = model.layers[0].blocks[0]
    torch.manual_seed(0)
    setattr(block.attn, where, make(block.attn))
    model.double()
    x = make_image(model)
    expected = model(x)
    _, entry = swinkernels.accelerate(model).replaced  # after the patch embedding
    assert entry.remarks[0] == f"Attention: timm's own code; {words}"
    assert torch.equal(model(x), expected)


def test_another_position_index_or_attention_method_is_left_alone():
    model = make_model(2)
    first, second = model.layers[0].blocks
    first.attn.relative_position_index = first.attn.relative_position_index.flip(0)
    second._attn = lambda x: x
    report = swinkernels.accelerate(model)
    assert [(e.path, e.reason) for e in report.skipped] == [
        ("layers.0.blocks.0", "attn.relative_position_index differs from timm's"),
        ("layers.0.blocks.1", "its _attn was replaced on the instance"),
    ]


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_attention_mask_of_the_users_own(when):
    model = make_model(2).double()
    fast = copy.deepcopy(model)
    mask = torch.randn_like(model.layers[0].blocks[1].attn_mask)
    x = make_image(model)
    for m in (model, fast):
        if m is fast and when == "after":
            swinkernels.accelerate(fast)
        m.layers[0].blocks[1].attn_mask = mask
    if when == "before":
        (entry,) = swinkernels.accelerate(fast).skipped
        assert (entry.path, entry.reason) == ("layers.0.blocks.1", "attn_mask differs from timm's")
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)


def test_a_map_of_another_size_takes_timms_mask(timm_only):
    block = make_model(2, img_size=(32, 64)).double().layers[0].blocks[1]  # an 8x16 map: 2x4 windows
    x: Tensor = torch.randn(2, 16, 8, 16, dtype=torch.float64)
    expected = block(x)
    swinkernels.accelerate(block)
    assert torch.equal(block(x), expected)
