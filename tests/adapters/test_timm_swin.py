"""Tests ``accelerate`` and ``restore`` on timm's Swin, with the backend that "auto" chooses."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

pytest.importorskip("timm", reason="timm is not installed")

from timm.models.swin_transformer import SwinTransformer, SwinTransformerBlock, WindowAttention

import swinkernels
from swinkernels.adapters import VerificationError
from swinkernels.adapters import verify as verification
from swinkernels.adapters.libraries.timm import _blocks as adapter
from swinkernels.adapters.libraries.timm.swin import AcceleratedSwinTransformerBlock as Accelerated
from swinkernels.adapters.masks import is_stored_mask, shift_mask
from tests.support.published import refuse
from tests.support.sweeps import long_but
from tests.support.timm_swin import CONFIGURATIONS, assert_as_good, check_parity, make_image, make_model, run


def fast_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make timm's own attention raise an error, so that a passing test proves that the op ran."""
    refuse(monkeypatch, SwinTransformerBlock, "_attn")


def timm_path_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args, **kwargs):
        raise AssertionError("the op ran")

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", refuse)


# Same results as the library


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", CONFIGURATIONS.values(), ids=CONFIGURATIONS.keys())
def test_outputs_and_every_gradient(options, dtype):
    model = make_model(**options).to(dtype)
    check_parity(model, make_image(model))


@pytest.mark.parametrize("size", [(36, 52), (20, 28), (44, 24), (8, 8)], ids=str)
def test_dynamic_image_size(size):
    """The window size stays the same, even on smaller maps; the mask is computed for the size of the map."""
    model = make_model(dynamic_img_size=True).double()
    check_parity(model, make_image(model, size=size))


def test_strict_img_size_off():
    model = make_model(strict_img_size=False).double()
    check_parity(model, make_image(model, size=(24, 40)))


@pytest.mark.parametrize("settings", [{"img_size": (64, 40)}, {"window_size": (5, 3)}, {"always_partition": True}])
def test_set_input_size_before_and_after(settings, monkeypatch):
    model = make_model().double()
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast)
    fast.set_input_size(**settings)
    model.set_input_size(**settings)
    exact = run(model, make_image(model))
    fast_path_only(monkeypatch)
    assert_as_good(run(fast, make_image(model)), exact, exact)


def test_set_input_size_keeps_a_frozen_table_frozen():
    model = make_model()
    model.requires_grad_(False)
    swinkernels.accelerate(model)
    model.set_input_size(img_size=(64, 64), window_size=5)
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(make_image(model)).requires_grad


@pytest.mark.parametrize("fused", [False, True], ids=["explicit", "sdpa"])
def test_both_of_timms_attention_paths(fused):
    """timm's fused path ignores ``scale`` and uses the default scale of scaled_dot_product_attention."""
    model = make_model().double()
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.fused_attn = fused
            module.scale = 0.37
    check_parity(model, make_image(model))


def test_channels_last_input():
    model = make_model().double()
    check_parity(model.to(memory_format=torch.channels_last), make_image(model).to(memory_format=torch.channels_last))


@pytest.mark.parametrize("frozen", ["qkv.weight", "qkv.bias", "relative_position_bias_table"])
def test_one_frozen_parameter_leaves_the_other_gradients_as_they_were(frozen):
    model = make_model()
    for name, p in model.named_parameters():
        p.requires_grad_(frozen not in name)
    check_parity(model, make_image(model))


def test_empty_batch():
    """timm's block does not support an empty batch; the accelerated ``_attn`` does."""
    block = make_model().layers[0].blocks[1]
    swinkernels.accelerate(block)
    x = torch.zeros(0, *block.input_resolution, 16, requires_grad=True)
    block._attn(x).sum().backward()
    assert x.grad.shape == x.shape
    assert not block.attn.qkv.weight.grad.any()


def test_swin_tiny_at_224():
    import timm

    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", pretrained=False, num_classes=10).eval()
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(x)
        assert len(swinkernels.accelerate(model).replaced) == 1 + 12 + 3
        fast = model(x)
        swinkernels.restore(model)
        assert torch.equal(model(x), plain)
    assert (fast - plain).abs().max() <= 1e-5 * plain.abs().max()


# Training


def test_gradient_checkpointing():
    model = make_model(drop_path_rate=0.3).double().train()
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast)
    fast.set_grad_checkpointing()
    x, results = make_image(model), []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])


def test_attention_dropout_runs_in_training_and_not_in_eval():
    model = make_model(attn_drop_rate=0.5)
    swinkernels.accelerate(model)
    x = make_image(model)
    model.train()
    torch.manual_seed(3)
    first = model(x)
    torch.manual_seed(3)
    again = model(x)
    assert torch.equal(first, again)
    assert not torch.equal(first, model(x))
    run(model, x)  # backward works
    model.eval()
    assert torch.equal(model(x), model(x))
    check_parity(make_model(attn_drop_rate=0.5), x)


def test_attention_dropout_has_timms_mean():
    """_attn is linear in the attention weights, so its mean over dropout masks tends to the result without dropout."""
    block = make_model(attn_drop_rate=0.3).double().layers[0].blocks[1]
    swinkernels.accelerate(block)
    x = torch.randn(1, *block.input_resolution, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = block._attn(x)
        block.train()
        torch.manual_seed(0)
        mean = block._attn(x.expand(600, -1, -1, -1)).mean(0, keepdim=True)
        spread = block._attn(x.expand(50, -1, -1, -1)).std(0).max()
    assert spread > 0.1
    assert (mean - exact).abs().max() < 6 * spread / 600**0.5


@pytest.mark.parametrize("training", [False, True])
def test_projection_dropout(training):
    model = make_model(proj_drop_rate=0.5).train(training)
    swinkernels.accelerate(model)
    x = make_image(model)
    assert torch.equal(model(x), model(x)) is not training


def test_a_training_step_moves_the_parameters_as_timms_does():
    model = make_model(drop_path_rate=0.2).double().train()
    fast = copy.deepcopy(model)
    swinkernels.accelerate(fast)
    x = make_image(model)
    for m in (model, fast):
        optimizer = torch.optim.AdamW(m.parameters(), lr=1e-2)
        torch.manual_seed(5)
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(m(x), torch.tensor([1, 3])).backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# torch.compile, export, tracing


@pytest.mark.parametrize("name", long_but(["divisible", "no-qkv-bias", "dynamic-mask"], "dynamic-mask"))
def test_compile_fullgraph(name, monkeypatch):
    torch._dynamo.reset()
    model = make_model(**CONFIGURATIONS[name]).double()
    x = make_image(model)
    exact = run(model, x)
    swinkernels.accelerate(model)
    fast_path_only(monkeypatch)
    got = run(torch.compile(model, fullgraph=True, backend="aot_eager"), x)
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, exact, exact)


def test_compile_follows_set_input_size_and_restore():
    torch._dynamo.reset()
    model = make_model(depths=(2,), num_heads=(2,)).double()
    swinkernels.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for img_size in ((36, 52), (44, 28)):
            model.set_input_size(img_size=img_size)
            x = make_image(model)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)
        swinkernels.restore(model)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)


def _double(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


CHANGES = {
    "class of qkv": lambda block: setattr(block.attn, "qkv", LowRank(block.attn.qkv)),
    "class of the activation": lambda block: setattr(block.mlp, "act", nn.ReLU()),
    "forward of fc1": lambda block: _double(block.mlp.fc1),
    "forward of norm2": lambda block: _double(block.norm2),
    "eps": lambda block: setattr(block.norm1, "eps", 0.5),
    "dropout": lambda block: setattr(block.mlp.drop1.train(), "p", 1.0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_compiled_code_notices_a_changed_inner_module(change):
    torch._dynamo.reset()
    plain = make_model(depths=(2,), num_heads=(2,)).double().eval().layers[0].blocks[1]
    fast = copy.deepcopy(plain)
    swinkernels.accelerate(fast)
    compiled = torch.compile(fast, fullgraph=True, backend="eager")
    x = torch.randn(2, *plain.input_resolution, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        before = compiled(x)
        torch.testing.assert_close(before, plain(x))
        for block in (plain, fast):
            torch.manual_seed(0)
            CHANGES[change](block)
        exact = plain(x)
        assert not torch.allclose(exact, before)
        torch.testing.assert_close(compiled(x), exact)


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    model = make_model(depths=(2,), num_heads=(2,)).layers[0].blocks[1]
    x = torch.randn(2, *model.input_resolution, 16, generator=torch.Generator().manual_seed(1))
    plain, exact = run(model, x), run(copy.deepcopy(model).double(), x.double())
    swinkernels.accelerate(model)
    got = run(torch.compile(model, fullgraph=True), x)
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, plain, exact)


def test_compiled_training_step_with_autocast():
    torch._dynamo.reset()
    model = make_model(depths=(2,), num_heads=(2,), drop_path_rate=0.2).train()
    swinkernels.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled(make_image(model)).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_torchscript_tracing_traces_timms_code(monkeypatch):
    model = make_model().double()
    swinkernels.accelerate(model)
    x = make_image(model)
    expected = model(x)
    timm_path_only(monkeypatch)
    traced = torch.jit.trace(model, x, check_trace=False)  # check_trace would run the op
    torch.testing.assert_close(traced(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.tool("`torch.jit.script`", "torch", works=False)
def test_torchscript_scripting_says_what_to_do(record_property):
    model = make_model()
    swinkernels.accelerate(model)
    with pytest.raises(RuntimeError, match=r"swinkernels\.restore\(model\)") as refused:
        torch.jit.script(model)
    record_property("words", str(refused.value).splitlines()[0])
    swinkernels.restore(model)
    x = make_image(model)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def test_fx_tracing_traces_timms_code():
    block = make_model().double().layers[0].blocks[1]
    swinkernels.accelerate(block)
    x = torch.randn(2, *block.input_resolution, 16, dtype=torch.float64)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, (nn.Linear, nn.LayerNorm, WindowAttention))

    from timm.models import swin_transformer

    tracer = Tracer(autowrap_functions=(swin_transformer.window_reverse,))
    graph = torch.fx.GraphModule(block, tracer.trace(block))
    assert any(node.target == "attn" for node in graph.graph.nodes)
    torch.testing.assert_close(graph(x), block(x), rtol=1e-10, atol=1e-12)


# The model's state and interface


def test_keys_parameters_and_types_stay():
    model = make_model()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    buffers = [name for name, _ in model.named_buffers()]
    swinkernels.accelerate(model, backend="reference")
    assert list(model.state_dict()) == keys
    assert [name for name, _ in model.named_buffers()] == buffers
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(isinstance(b, SwinTransformerBlock) for stage in model.layers for b in stage.blocks)
    make_model(seed=1).load_state_dict(model.state_dict(), strict=True)
    assert model.no_weight_decay() == make_model().no_weight_decay()


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_keep_the_acceleration_and_its_backend(how, monkeypatch):
    model = make_model().double()
    swinkernels.accelerate(model, backend="reference")
    x = make_image(model)
    expected = model(x)
    if how == "deepcopy":
        again = copy.deepcopy(model)
    elif how == "pickle":
        again = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
    seen = []
    op = adapter.window_attention_qkvpacked
    monkeypatch.setattr(adapter, "window_attention_qkvpacked", lambda *a, **k: seen.append(k["backend"]) or op(*a, **k))
    assert torch.equal(again(x), expected)
    assert seen == ["reference"] * 4


def test_restore_undoes_everything():
    model = make_model()
    never = copy.deepcopy(model)
    attributes = [set(m.__dict__) for m in model.layers.modules()]
    swinkernels.accelerate(model, backend="reference")
    for m in (model, never):
        m.set_input_size(img_size=(44, 44))
    swinkernels.restore(model)
    assert all(type(b) is SwinTransformerBlock for stage in model.layers for b in stage.blocks)
    assert [set(m.__dict__) for m in model.layers.modules()] == attributes
    assert torch.equal(model(make_image(model)), never(make_image(model)))
    swinkernels.restore(model)  # nothing is left to restore


def test_twice_is_once():
    model = make_model()
    first = swinkernels.accelerate(model)
    second = swinkernels.accelerate(model)
    assert first == second
    swinkernels.accelerate(model, backend="reference")
    assert all(b._swinkernels_backend == "reference" for stage in model.layers for b in stage.blocks)
    swinkernels.restore(model)
    assert all(type(b) is SwinTransformerBlock for stage in model.layers for b in stage.blocks)


def test_hooks_on_blocks_and_stages_see_what_they_saw():
    model = make_model().double()
    x = make_image(model)
    seen: list[Tensor] = []
    for module in (model.layers[0].blocks[1], model.layers[1], model.layers[0].blocks[0].norm1):
        module.register_forward_hook(lambda _m, _i, out: seen.append(out.detach()))
    model(x)
    swinkernels.accelerate(model)
    model(x)
    assert len(seen) == 6
    for plain, fast in zip(seen[:3], seen[3:], strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-10, atol=1e-12)


def test_features_only():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        features_only=True,
        img_size=56,
        embed_dim=24,
        depths=(2, 2, 2, 2),
        out_indices=(0, 2),
    )
    model = model.double().eval()
    x = torch.randn(1, 3, 56, 56, dtype=torch.float64)
    plain = model(x)
    assert len(swinkernels.accelerate(model).replaced) >= 6
    for fast, expected in zip(model(x), plain, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-12)


def test_forward_intermediates():
    model = make_model().double()
    x = make_image(model)
    plain = model.forward_intermediates(x, intermediates_only=True)
    swinkernels.accelerate(model)
    for fast, expected in zip(model.forward_intermediates(x, intermediates_only=True), plain, strict=True):
        torch.testing.assert_close(fast, expected, rtol=1e-10, atol=1e-12)


def test_a_block_alone_and_a_shared_block():
    block = make_model().double().layers[0].blocks[1]
    report = swinkernels.accelerate(block)
    assert [entry.path for entry in report.replaced] == [""]
    assert "(the model itself)" in str(report)
    shared = nn.ModuleList([block, block])
    assert len(swinkernels.accelerate(shared).replaced) == 1


# Cases in which timm's own code has to run


@pytest.mark.parametrize("where", ["attn", "attn.softmax", "attn.attn_drop", "attn.qkv", "attn.proj"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_a_hook_inside_the_attention_fires(where, kind):
    model = make_model().double()
    swinkernels.accelerate(model)
    block = model.layers[0].blocks[1]
    calls: list[nn.Module] = []
    handle = getattr(block.get_submodule(where), kind)(lambda m, *_: calls.append(m))
    x = make_image(model).requires_grad_()
    model(x).sum().backward()
    assert calls == [block.get_submodule(where)]
    report = swinkernels.accelerate(copy.deepcopy(model))
    assert [entry.path for entry in report.skipped] == ["layers.0.blocks.1"]
    assert f"hook is registered on {where}" in report.skipped[0].reason
    handle.remove()
    calls.clear()
    model(x)
    assert not calls
    assert type(block) is Accelerated


class LowRank(nn.Linear):
    """An nn.Linear with a low-rank update, like the layers that LoRA inserts."""

    def __init__(self, linear: nn.Linear):
        super().__init__(linear.in_features, linear.out_features, dtype=linear.weight.dtype)
        self.load_state_dict(linear.state_dict())
        self.down = nn.Parameter(torch.randn(2, linear.in_features, dtype=linear.weight.dtype))

    def forward(self, x):
        return super().forward(x) + (x @ self.down.T).repeat_interleave(self.out_features // 2, -1)


@pytest.mark.parametrize("layer", ["qkv", "proj"])
def test_other_layers_than_linear_run_timms_code(layer):
    model = make_model().double()
    swinkernels.accelerate(model)
    attn = model.layers[0].blocks[1].attn
    setattr(attn, layer, LowRank(getattr(attn, layer)))
    x = make_image(model)
    got = run(model, x)
    report = swinkernels.accelerate(model)
    assert len(report.replaced) == 1 + 3 + 1
    assert [(e.path, e.reason) for e in report.skipped] == [
        ("layers.0.blocks.1", f"attn.{layer} is a LowRank, not an nn.Linear")
    ]
    assert type(model.layers[0].blocks[1]) is SwinTransformerBlock  # a skipped block has timm's class again
    swinkernels.restore(model)
    exact = run(model, x)
    assert_as_good(got, exact, exact)


def test_dynamically_quantised_layers_are_left_alone():
    model = torch.ao.quantization.quantize_dynamic(make_model(), {nn.Linear}, dtype=torch.qint8)
    report = swinkernels.accelerate(model)
    assert [entry.module_class for entry in report.replaced] == ["PatchEmbed"]
    assert len(report.skipped) == 4 + 1
    assert all("not an nn.Linear" in entry.reason for entry in report.skipped)


def test_pruned_and_parametrized_layers_are_left_alone():
    model = make_model().double()
    prune.l1_unstructured(model.layers[0].blocks[0].attn.qkv, "weight", amount=0.5)
    parametrizations.weight_norm(model.layers[0].blocks[1].attn.qkv)
    x = make_image(model)
    expected = model(x)
    report = swinkernels.accelerate(model)
    assert [entry.path for entry in report.skipped] == ["layers.0.blocks.0", "layers.0.blocks.1"]
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["assigned", "registered"])
def test_an_attention_mask_of_the_users_own(when, how):
    model, block = (m := make_model().double()), m.layers[0].blocks[1]
    fast = copy.deepcopy(model)
    mask = torch.randn_like(block.attn_mask)
    x = make_image(model)

    def put(block: nn.Module) -> None:
        if how == "assigned":
            block.attn_mask = mask
        else:
            block.register_buffer("attn_mask", mask, persistent=False)

    put(block)
    if when == "before":
        put(fast.layers[0].blocks[1])
    report = swinkernels.accelerate(fast)
    if when == "after":
        put(fast.layers[0].blocks[1])
    else:
        assert [entry.path for entry in report.skipped] == ["layers.0.blocks.1"]
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)
    # timm's set_input_size rebuilds the mask, so accelerate can replace the block again.
    for m in (model, fast):
        m.set_input_size(img_size=(44, 44))
    x = make_image(model)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)
    assert len(swinkernels.accelerate(fast).replaced) == 1 + 4 + 1


def test_a_map_of_another_size_takes_timms_mask(monkeypatch):
    """A block whose stored mask does not fit the map runs timm's own code."""
    block = make_model(img_size=(32, 64)).double().layers[0].blocks[1]  # an 8x16 map: 2x4 windows
    x = torch.randn(2, 16, 8, 16, dtype=torch.float64)
    expected = block(x)
    swinkernels.accelerate(block)
    timm_path_only(monkeypatch)
    assert torch.equal(block(x), expected)


def test_another_position_index_is_left_alone():
    model = make_model()
    attn = model.layers[0].blocks[0].attn
    attn.relative_position_index = attn.relative_position_index.flip(0)
    report = swinkernels.accelerate(model)
    assert [entry.path for entry in report.skipped] == ["layers.0.blocks.0"]
    assert "relative_position_index" in report.skipped[0].reason


def test_a_replaced_attention_method_or_module_is_left_alone():
    model = make_model()
    blocks = [block for stage in model.layers for block in stage.blocks]
    blocks[0]._attn = lambda x: x
    blocks[1].attn.forward = lambda x, mask=None: x
    blocks[2].attn = nn.MultiheadAttention(32, 4)
    blocks[3].attn.softmax = nn.LogSoftmax(dim=-1)
    report = swinkernels.accelerate(model)
    assert [entry.module_class for entry in report.replaced] == ["PatchEmbed", "PatchMerging"]
    for entry, word in zip(report.skipped, ("_attn", "forward", "MultiheadAttention", "LogSoftmax"), strict=True):
        assert word in entry.reason


class Subclass(SwinTransformerBlock):
    pass


def test_subclasses_and_compiled_modules_are_left_alone():
    model = make_model()
    model.layers[0].blocks[0].__class__ = Subclass
    model.layers[1] = torch.compile(model.layers[1], backend="eager")
    report = swinkernels.accelerate(model)
    assert [entry.path for entry in report.replaced] == ["patch_embed", "layers.0.blocks.1"]
    assert [(entry.path, entry.module_class) for entry in report.skipped] == [
        ("layers.0.blocks.0", "Subclass"),
        ("layers.1", "OptimizedModule"),
    ]
    assert "subclass" in report.skipped[0].reason
    assert "torch.compile" in report.skipped[1].reason
    compiled = make_model()
    compiled.compile(backend="eager")
    assert "torch.compile" in swinkernels.accelerate(compiled).skipped[0].reason
    scripted = torch.jit.script(make_model())
    assert "TorchScript" in swinkernels.accelerate(scripted).skipped[0].reason


# verify, the report, and wrong arguments


def state(model: nn.Module) -> list[Tensor]:
    return [t.clone() for t in (*model.parameters(), *model.buffers(), torch.get_rng_state())]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_verify_passes_and_leaves_no_trace(dtype):
    model = make_model(attn_drop_rate=0.1, drop_path_rate=0.1).to(dtype).train()
    model(make_image(model)).sum().backward()
    grads = [p.grad.clone() for p in model.parameters()]
    before = state(model)
    report = swinkernels.accelerate(model, verify=True)
    assert len(report.replaced) == 1 + 4 + 1
    assert model.layers[0].blocks[0].training
    assert all(torch.equal(a, b) for a, b in zip(state(model), before, strict=True))
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))


def test_verify_works_in_inference_mode_and_with_frozen_parameters():
    model = make_model().requires_grad_(False)
    with torch.inference_mode():
        swinkernels.accelerate(model, verify=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_verify_finds_a_wrong_kernel_and_names_the_module(wrong, monkeypatch):
    model = make_model()
    op = adapter.window_attention_qkvpacked

    def wrong_op(qkv, **arguments):
        if arguments["shift_size"] == (0, 0):
            return op(qkv, **arguments)
        if wrong == "nan":
            return op(qkv, **arguments) * float("nan")
        if wrong == "output":
            return op(qkv, **{**arguments, "scale": 1.01 * arguments["scale"]})
        return op(qkv, **{**arguments, "pad_qkv": arguments["pad_qkv"].detach()})

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", wrong_op)
    what = "gradient of attn.qkv.bias" if wrong == "gradient" else "output"
    with pytest.raises(VerificationError, match=rf"layers\.0\.blocks\.1: the {what} is off by"):
        swinkernels.accelerate(model, verify=True)
    assert all(type(b) is SwinTransformerBlock for stage in model.layers for b in stage.blocks)


@pytest.mark.parametrize(("error", "passes"), [(1e-7, True), (1e-3, False)])
def test_a_gradient_that_is_zero_is_judged_by_the_size_of_others(error, passes):
    """Softmax ignores a constant added to all scores, so the gradient of such a constant is rounding error."""
    exact = torch.full((32,), 1e-17, dtype=torch.float64)
    got, plain = torch.full((32,), error), torch.zeros(32)
    if passes:
        verification._check("block", "the gradient of bias", got, plain, exact, exact, largest=3.0)
    else:
        with pytest.raises(VerificationError, match=r"block: the gradient of bias is off by 0\.001"):
            verification._check("block", "the gradient of bias", got, plain, exact, exact, largest=3.0)


def test_verify_on_meta_says_that_there_are_no_values():
    model = make_model().to("meta")
    assert len(swinkernels.accelerate(model).replaced) == 1 + 4 + 1
    with pytest.raises(ValueError, match="meta"):
        swinkernels.accelerate(model, verify=True)


def test_the_default_device_of_the_process_does_not_matter():
    """The default device has no effect on ``accelerate``, even if it is "meta", where tensors hold no values."""
    model = make_model()
    with torch.device("meta"):
        assert len(swinkernels.accelerate(model, verify=True).replaced) == 1 + 4 + 1


def test_report_lists_and_prints():
    model = make_model(attn_drop_rate=0.1).double()
    model.layers[1].blocks[0].attn.qkv = LowRank(model.layers[1].blocks[0].attn.qkv)
    report = swinkernels.accelerate(model)
    assert [(e.path, e.module_class, e.adapter, e.backend) for e in report.replaced] == [
        ("patch_embed", "PatchEmbed", "timm", "torch"),
        ("layers.0.blocks.0", "SwinTransformerBlock", "timm", "torch"),
        ("layers.0.blocks.1", "SwinTransformerBlock", "timm", "torch"),
        ("layers.1.downsample", "PatchMerging", "timm", "torch"),
        ("layers.1.blocks.1", "SwinTransformerBlock", "timm", "torch"),
    ]
    attention, residual = report.replaced[1].remarks
    assert attention.startswith("Attention: torch. Not cpu: ")
    assert "float64" in attention
    assert residual.startswith("Residual and norm: torch. Not cpu: it does not implement residual_layer_norm")
    (merging,) = report.replaced[3].remarks
    assert merging.startswith("Patch merging: torch. Not cpu: it does not implement patch_merging")
    text = str(report)
    assert text.startswith("swinkernels: 5 replaced, 1 left as they were")
    rows = [line for line in text.splitlines() if line.startswith(("patch_", "layers."))]
    rows = rows[: len(report.replaced)]
    assert len({line.index("timm") for line in rows}) == 1, "columns are aligned"
    assert "attn.qkv is a LowRank" in text
    assert "[1] " in text


def test_report_says_what_auto_takes_for_the_dtype():
    from swinkernels.ops._backends import NOT_INSTALLED

    entry = swinkernels.accelerate(make_model(attn_drop_rate=0.1)).replaced[1]
    if NOT_INSTALLED["cpu"] is None:
        assert entry.backend == "cpu"
        assert "Attention in training: torch. Not cpu: it does not implement dropout_p" in entry.remarks
    else:
        assert entry.backend == "torch"
        assert NOT_INSTALLED["cpu"] in entry.remarks[0]


def test_a_backend_that_cannot_run_is_told_in_the_report_and_refused_at_the_call():
    model = make_model()
    report = swinkernels.accelerate(model, backend="cuda")
    assert report.replaced[1].backend == "cuda"
    assert "cuda cannot run it" in report.replaced[1].remarks[0]
    with pytest.raises(NotImplementedError, match="backend='cuda' cannot run this call"):
        model(make_image(model))


def test_nothing_to_replace_is_no_error():
    report = swinkernels.accelerate(nn.Linear(2, 2))
    assert report.replaced == []
    assert report.skipped == []
    assert "Linear" in report.reason
    assert report.reason in str(report)


@pytest.mark.parametrize("function", [swinkernels.accelerate, swinkernels.restore])
@pytest.mark.parametrize("model", [None, "swin", SwinTransformer])
def test_other_things_than_modules(function, model):
    with pytest.raises(TypeError, match=rf"model must be a torch\.nn\.Module, got {type(model).__name__}"):
        function(model)


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*, got 'gpu'"):
        swinkernels.accelerate(nn.Linear(2, 2), backend="gpu")


def test_the_package_imports_without_timm():
    import subprocess
    import sys

    code = "import sys, torch, swinkernels; assert 'timm' not in sys.modules; swinkernels.accelerate(torch.nn.ReLU())"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_another_packages_linear_is_named_with_its_module():
    model = make_model()
    attn = model.layers[0].blocks[1].attn
    attn.qkv = type("Linear", (nn.Linear,), {"__module__": "elsewhere.layers"})(32, 96)
    report = swinkernels.accelerate(model)
    reasons = {entry.path: entry.reason for entry in report.skipped}
    assert "attn.qkv is a elsewhere.layers.Linear, not an nn.Linear" in reasons["layers.0.blocks.1"]


def test_a_stored_mask_is_compared_in_code_with_dynamic_sizes():
    """Dynamo treats the integer attributes of a module as dynamic if FSDP2 has sharded the module."""
    torch.compiler.reset()

    def marked(mask, n):
        return mask + 1 if is_stored_mask(mask, (n, n), (4, 4), (2, 2)) else mask

    compiled = torch.compile(marked, backend="eager", fullgraph=True, dynamic=True)
    for n in (8, 12):
        mask = shift_mask((n, n), (4, 4), (2, 2))
        assert torch.equal(compiled(mask, n), mask + 1)
