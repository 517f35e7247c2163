"""Tests ``accelerate`` on torchvision's Swin, v1 and v2: results, and the model's state and interface."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor, nn

pytest.importorskip("torchvision", reason="torchvision is not installed")

import torchvision
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.models import swin_transformer
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.swin_transformer import (
    PatchMerging,
    PatchMergingV2,
    ShiftedWindowAttention,
    ShiftedWindowAttentionV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinTransformerBlockV2,
)
from torchvision.ops import StochasticDepth

import swinkernels
from swinkernels.adapters import VerificationError, norms
from swinkernels.adapters.adapter import Accelerated
from swinkernels.adapters.libraries import torchvision as adapter
from tests.support.parity import assert_as_good, run, shaken

# Number of modules replaced in make_model's models: four blocks, their attention, and one patch merging.
REPLACED = {
    1: {"SwinTransformerBlock": 4, "ShiftedWindowAttention": 4, "PatchMerging": 1},
    2: {"SwinTransformerBlockV2": 4, "ShiftedWindowAttentionV2": 4, "PatchMergingV2": 1},
}
ATTENTION = {1: ShiftedWindowAttention, 2: ShiftedWindowAttentionV2}

# Window size and image size; a patch is 2x2 pixels.
GEOMETRIES = {
    "padded-9x13-5x7": ([4, 4], (18, 26)),
    "divisible-8x16-4x8": ([4, 4], (16, 32)),
    "smaller-than-the-window-3x13-2x7": ([4, 4], (6, 26)),
    "one-token-2x2-1x1": ([4, 4], (4, 4)),
    "non-square-window-10x12-5x6": ([3, 5], (20, 24)),
    "window-7-10x14-5x7": ([7, 7], (20, 28)),
}

versions = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])


def randomise(module: nn.Module) -> None:
    """Randomise parameters of ``module`` so that bias, mask, scale, padding, norms and v2's k bias affect results."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("relative_position_bias_table", "qkv.bias")):
                p.normal_()
            elif name.endswith("qkv.weight"):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif name.endswith("logit_scale"):
                p.add_(torch.randn_like(p))
            elif name.endswith("cpb_mlp.2.weight"):
                p.normal_(std=0.1)
            elif name.endswith(("norm1.weight", "norm2.weight", "norm.weight")):
                p.normal_(mean=1.0, std=0.2)


def make_model(version: int = 1, seed: int = 0, window: Any = (4, 4), **options: Any) -> Any:
    torch.manual_seed(seed)
    defaults = {"depths": [2, 2], "num_heads": [2, 4], "num_classes": 5, "stochastic_depth_prob": 0.0}
    of_version = {} if version == 1 else {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = SwinTransformer([2, 2], 16, window_size=list(window), **{**defaults, **of_version, **options}).eval()
    randomise(model)
    return model


def make_image(size: tuple[int, int] = (18, 26), batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_map(*size: int, batch: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, *(size or (9, 7)), 16, generator=torch.Generator().manual_seed(1)).to(dtype)


def make_block(version: int = 1, **options: Any) -> Any:
    """Build a shifted block in float64."""
    return make_model(version, **options).features[1][1].double()


def accelerated(model: nn.Module, backend: str = "auto", **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend, **options)
    assert report.replaced
    assert not report.skipped
    return fast


def check_parity(model: nn.Module, x: Tensor, backend: str = "auto") -> None:
    """Compare outputs and gradients of ``model`` and its accelerated copy on ``x`` with ``model`` in float64."""
    exact = run(copy.deepcopy(model).double(), x.double())
    moved = None if x.dtype == torch.float64 else shaken(model, x, x.dtype)
    assert_as_good(run(accelerated(model, backend), x), run(model, x), exact, moved)


def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torchvision's own attention raise an error if it is called."""
    monkeypatch.setattr(swin_transformer, "shifted_window_attention", None)


def own_code_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "window_attention_qkvpacked", None)


# Same results as the library


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_outputs_and_every_gradient(version, name, dtype, monkeypatch):
    window, size = GEOMETRIES[name]
    model = make_model(version, window=window).to(dtype)
    check_parity(model, make_image(size, dtype=dtype))
    fast = accelerated(model)
    ops_only(monkeypatch)
    assert torch.isfinite(fast(make_image(size, dtype=dtype))).all()


@versions
@pytest.mark.parametrize("options", [{"qkv_bias": False}, {"proj_bias": False}, {"shift_size": [2, 0]}], ids=str)
def test_attention_alone(version, options):
    """Attention works with options that no published model uses: no bias in a layer, or a shift on one axis."""
    torch.manual_seed(0)
    attn = ATTENTION[version](16, **{"window_size": [4, 3], "shift_size": [2, 1], "num_heads": 2, **options})
    attn = attn.double().eval()
    randomise(attn)
    fast = accelerated(attn)
    for size in ((9, 7), (4, 9), (9, 3), (2, 2), (8, 6)):
        exact = run(attn, make_map(*size))
        assert_as_good(run(fast, make_map(*size)), exact, exact)


def test_v2_takes_no_part_of_the_bias_for_k():
    attn = make_block(2).attn
    fast = accelerated(attn)
    expected = run(fast, make_map())
    assert not expected["qkv.bias"][16:32].any()
    assert expected["qkv.bias"][:16].any()
    with torch.no_grad():
        fast.qkv.bias[16:32] = torch.nan
    assert torch.equal(run(fast, make_map())["out"], expected["out"])


@versions
def test_channels_last_input(version):
    model = make_model(version).double().to(memory_format=torch.channels_last)
    check_parity(model, make_image(dtype=torch.float64).to(memory_format=torch.channels_last))


@versions
def test_empty_batch(version):
    """torchvision's attention does not support an empty batch; the accelerated one does."""
    attn = accelerated(make_block(version).attn)
    x = make_map(batch=0).requires_grad_()
    attn(x).sum().backward()
    assert x.grad.shape == x.shape


@pytest.mark.parametrize(("build", "size"), [("swin_t", 224), ("swin_v2_t", 256)])
def test_published_models(build, size):
    torch.manual_seed(0)
    model = getattr(torchvision.models, build)(weights=None, num_classes=10).eval()
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = model(x)
        assert len(swinkernels.accelerate(model).replaced) == 12 + 12 + 3
        fast = model(x)
        swinkernels.restore(model)
        assert torch.equal(model(x), plain)
    assert not torch.equal(fast, plain), "the op did not run"
    assert (fast - plain).abs().max() <= 1e-4 * plain.abs().max()


# Training


@versions
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.5, 1.0])
def test_stochastic_depth_draws_the_same(version, mode, p):
    model = make_model(version, stochastic_depth_prob=p).double().train()
    for m in model.modules():
        if isinstance(m, StochasticDepth):
            m.mode = mode
    x, results = make_image(batch=4, dtype=torch.float64), []
    for m in (model, accelerated(model), accelerated(model, "reference")):
        torch.manual_seed(7)
        results.append(run(m, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    assert_as_good(results[2], results[0], results[0])
    assert not torch.equal(results[0]["out"], model.eval()(x)), "stochastic depth was not active"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["row", "batch"])
@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_the_factor_of_stochastic_depth_is_torchvisions(p, mode, dtype):
    module, y = StochasticDepth(p, mode).train(), torch.ones(5, 3, 2, 4, dtype=dtype)
    torch.manual_seed(3)
    expected, state = module(y)[:, 0, 0, 0], torch.get_rng_state()
    torch.manual_seed(3)
    factor = adapter._stochastic_depth_scale(module, y, dtype)
    assert torch.equal(torch.get_rng_state(), state)
    assert factor is None if p == 0.0 else torch.equal(factor, expected)
    assert adapter._stochastic_depth_scale(module.eval(), y, dtype) is None


@versions
def test_attention_dropout_in_training_and_not_in_eval(version):
    model = make_model(version, attention_dropout=0.5)
    fast, x = accelerated(model).train(), make_image()
    torch.manual_seed(3)
    first = fast(x)
    torch.manual_seed(3)
    assert torch.equal(fast(x), first)
    assert not torch.equal(fast(x), first)
    run(fast, x)  # backward works
    check_parity(model, x)
    assert torch.equal(fast.eval()(x), fast(x))


@versions
def test_attention_dropout_has_torchvisions_mean_and_spread(version):
    """The output is linear in the attention weights, so its mean over dropout masks tends to that without dropout."""
    attn = make_block(version, attention_dropout=0.3).attn
    fast, x = accelerated(attn), make_map(5, 6, batch=1)
    with torch.no_grad():
        exact = attn(x)
        torch.manual_seed(0)
        draws = fast.train()(x.expand(400, -1, -1, -1))
        of_torchvision = attn.train()(x.expand(400, -1, -1, -1))
    spread = of_torchvision.std(0)
    assert (draws.mean(0) - exact).abs().max() < 6 * spread.max() / 400**0.5
    assert ((draws.std(0) / spread).log().abs() < 0.5).all()


@versions
def test_projection_dropout(version):
    model = make_model(version, dropout=0.5)
    fast, x = accelerated(model), make_image()
    check_parity(model, x)
    block = fast.features[1][0].attn.train()
    y = block(make_map(4, 4, dtype=torch.float32))
    assert 0.3 < (y == 0).double().mean() < 0.7


@versions
def test_gradient_checkpointing(version):
    """The recomputation of a checkpointed block draws the same random numbers as its forward pass."""
    block = make_block(version)
    block.stochastic_depth = StochasticDepth(0.5, "row")
    block.train()
    results = []
    for fast in (None, "auto", "reference"):
        m = block if fast is None else accelerated(block, fast)
        torch.manual_seed(7)
        x = make_map(batch=6).requires_grad_()
        out = m(x) if fast is None else checkpoint(m, x, use_reentrant=False)
        gradients = torch.autograd.grad(out.square().sum(), (x, *m.parameters()))
        results.append({"out": out.detach(), **{str(i): g for i, g in enumerate(gradients)}})
    assert_as_good(results[1], results[0], results[0])
    assert_as_good(results[2], results[0], results[0])


# Norms, residual connections and patch merging computed by ops


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("layer_norm", "residual_layer_norm", "residual_post_norm", "patch_merging"):
        op = getattr(norms, name)

        def watched(*args: Any, op: Any = op, name: str = name, **kwargs: Any) -> Any:
            seen.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(norms, name, watched)
    return seen


CALLS = {1: {"residual_layer_norm": 4, "patch_merging": 1}, 2: {"residual_post_norm": 8, "patch_merging": 1}}


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_norms_and_merging_on_ops(version, dtype, calls):
    check_parity(make_model(version).to(dtype), make_image(dtype=dtype), "reference")
    assert Counter(calls) == CALLS[version]


def test_autocast_leaves_what_others_see_its_dtype(calls):
    """A norm keeps the residual stream's dtype unless an unhooked Linear follows, which casts its input anyway."""
    for path in ("attn", "mlp", "mlp.0"):
        block, dtypes = make_block().float(), []
        for m in (block, accelerated(block, "reference")):
            m.get_submodule(path).register_forward_pre_hook(lambda _m, i, d=dtypes: d.append(i[0].dtype))
            with torch.autocast("cpu", dtype=torch.bfloat16):
                m(make_map(dtype=torch.float32))
        assert dtypes == [torch.float32] * 2, path


def test_merging_of_maps_without_a_batch():
    merging = make_model().features[2].double()
    fast, x = accelerated(merging, "reference"), make_map(5, 4)[0]
    torch.testing.assert_close(fast(x), merging(x), rtol=1e-10, atol=1e-12)


# torch.compile, FX, TorchScript


@versions
def test_compile_fullgraph_with_any_batch(version, monkeypatch):
    torch._dynamo.reset()
    model = make_model(version, depths=[2], num_heads=[2])
    fast, images = accelerated(model), [make_image(batch=batch) for batch in (2, 3, 5)]
    exact = [run(copy.deepcopy(model).double(), x.double()) for x in images]
    judges = [(run(model, x), e, shaken(model, x, x.dtype)) for x, e in zip(images, exact, strict=True)]
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, fullgraph=True, backend=graphs)
    ops_only(monkeypatch)
    for x, judge in zip(images, judges, strict=True):
        got = {name.removeprefix("_orig_mod."): value for name, value in run(compiled, x).items()}
        assert_as_good(got, *judge)
    assert graphs.frame_count == 2, "one graph for the first batch, one for any other"


@versions
def test_fx_traces_torchvisions_code(version, monkeypatch):
    model = make_model(version).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    nodes = ["features.1", "features.2", "features.3.1.attn"]
    plain = create_feature_extractor(model, nodes)
    own_code_only(monkeypatch)
    graph = create_feature_extractor(fast, nodes)
    assert [str(node) for node in graph.graph.nodes] == [str(node) for node in plain.graph.nodes]
    attention = [n for n in graph.graph.nodes if n.target is swin_transformer.shifted_window_attention]
    assert len(attention) == 4
    for name, value in graph(x).items():
        torch.testing.assert_close(value, plain(x)[name], rtol=1e-10, atol=1e-12)


@versions
def test_a_feature_extractor_keeps_the_ops_of_leaves(version, monkeypatch):
    model = make_model(version).double()
    x = make_image(dtype=torch.float64)
    expected = create_feature_extractor(model, ["features.1", "features.3"])(x)
    leaves = {"leaf_modules": [ShiftedWindowAttention]}
    graph = create_feature_extractor(accelerated(model), ["features.1", "features.3"], tracer_kwargs=leaves)
    ops_only(monkeypatch)
    for name, value in graph(x).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@versions
@pytest.mark.filterwarnings("ignore")  # torch.jit.trace warns about torchvision's code
def test_torchscript_tracing_traces_torchvisions_code(version, monkeypatch):
    model = make_model(version, depths=[2, 1]).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    own_code_only(monkeypatch)
    traced = torch.jit.trace(fast, x, check_trace=False)  # check_trace would run the op
    assert torch.equal(traced(x), torch.jit.trace(model, x, check_trace=False)(x))


@versions
@pytest.mark.filterwarnings("ignore")  # torch.jit.script is deprecated
def test_torchscript_scripting_says_what_to_do(version):
    model = accelerated(make_model(version, depths=[2, 1]))
    with pytest.raises(RuntimeError, match=r"swinkernels\.restore\(model\)"):
        torch.jit.script(model)
    swinkernels.restore(model)
    torch.testing.assert_close(torch.jit.script(model)(make_image()), model(make_image()))


# The model's state and interface


@versions
def test_hooks_see_what_they_saw(version):
    model = make_model(version).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    paths = ["features.1", "features.1.0", "features.1.1.attn", "features.1.1.norm2", "features.3.0.mlp.0"]
    paths += ["features.2", "features.1.1.stochastic_depth", *(["features.1.1.attn.cpb_mlp"] if version == 2 else [])]
    seen: dict[nn.Module, list[Tensor]] = {model: [], fast: []}
    for m, tensors in seen.items():
        for path in paths:
            m.get_submodule(path).register_forward_hook(lambda _m, _i, out, t=tensors: t.append(out))
        m(x)
    assert len(seen[fast]) == len(paths) + 1  # each block calls stochastic_depth twice
    for got, e in zip(seen[fast], seen[model], strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


@versions
@pytest.mark.parametrize("path", ["norm2", "stochastic_depth"])
def test_hooks_on_what_an_op_would_absorb_fire(version, path, calls):
    block = accelerated(make_block(version), "reference")
    seen: list[Tensor] = []
    block.get_submodule(path).register_forward_hook(lambda _m, _i, out: seen.append(out))
    block(make_map())
    assert len(seen) == (2 if path == "stochastic_depth" else 1)
    assert calls == ([] if version == 1 or path == "stochastic_depth" else ["residual_post_norm"])


def test_geometry_is_read_at_every_call():
    attn = make_block().attn
    fast = accelerated(attn)
    for m in (attn, fast):
        m.shift_size = [1, 3]
    torch.testing.assert_close(fast(make_map()), attn(make_map()), rtol=1e-10, atol=1e-12)


def test_a_parametrized_layer_takes_part(monkeypatch):
    """torchvision reads the weight of attn.qkv, parametrised or not, and does not call the module."""
    attn = make_block().attn
    parametrizations.weight_norm(attn.qkv)
    exact = run(attn, make_map())
    assert swinkernels.accelerate(attn).replaced
    ops_only(monkeypatch)
    assert_as_good(run(attn, make_map()), exact, exact)


# Modules that `accelerate` does not replace


class OwnAttention(ShiftedWindowAttention):
    pass


class OwnBlock(SwinTransformerBlock):
    pass


def test_subclasses_and_what_is_inside_them():
    model = make_model().double()
    model.features[1][0].attn.__class__ = OwnAttention
    model.features[1][1].__class__ = OwnBlock
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast)
    assert {e.path: e.reason for e in report.skipped} == {
        "features.1.0.attn": "OwnAttention is a subclass, which may compute something else",
        "features.1.1": "OwnBlock is a subclass, which may compute something else",
    }
    assert [e.path for e in report.replaced][:3] == ["features.1.0", "features.1.1.attn", "features.2"]
    x = make_image(dtype=torch.float64)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        (1, lambda attn: attn.relative_position_index.add_(-1), "differs from torchvision's"),
        (1, lambda attn: setattr(attn, "window_size", [4, 3]), "not the table of window_size"),
        (2, lambda attn: setattr(attn, "window_size", [4, 3]), "not the table of window_size"),
        (1, lambda attn: setattr(attn, "shift_size", [4, 2]), "shift_size is not smaller"),
        (2, lambda attn: setattr(attn, "get_relative_position_bias", lambda: 0), "get_relative_position_bias"),
    ],
)
def test_attention_that_is_not_known(version, change, words):
    attn = make_block(version).attn
    change(attn)
    (entry,) = swinkernels.accelerate(attn).skipped
    assert words in entry.reason
    assert type(attn) is ATTENTION[version]


@pytest.mark.parametrize("shift", [[4, 2], [5, 5]], ids=str)
def test_what_becomes_unknown_later_runs_torchvisions_code(shift, monkeypatch):
    attn = make_block().attn
    fast = accelerated(attn)
    for m in (attn, fast):
        m.shift_size = shift
    own_code_only(monkeypatch)
    assert torch.equal(fast(make_map(batch=1)), attn(make_map(batch=1)))


@pytest.mark.filterwarnings("ignore")  # torch.ao.quantization is deprecated
def test_a_quantised_model():
    model = torch.ao.quantization.quantize_dynamic(make_model(), {nn.Linear}, dtype=torch.qint8)
    report = swinkernels.accelerate(model)
    reasons = {e.module_class: e.reason for e in report.skipped}
    assert reasons.keys() == {"ShiftedWindowAttention", "PatchMerging"}
    assert "quantised" in reasons["ShiftedWindowAttention"]
    assert "not an nn.Linear" in reasons["PatchMerging"]


def test_norms_of_another_kind(calls):
    model = make_model(norm_layer=functools.partial(nn.RMSNorm, eps=1e-6)).double()
    report = swinkernels.accelerate(model, backend="reference")
    assert {e.module_class: e.reason.split(",")[0] for e in report.skipped} == {
        "SwinTransformerBlock": "norm2 is a torch.nn.modules.normalization.RMSNorm",
        "PatchMerging": "norm is a torch.nn.modules.normalization.RMSNorm",
    }
    assert Counter(e.module_class for e in report.replaced) == {"ShiftedWindowAttention": 4}
    exact = run(
        make_model(norm_layer=functools.partial(nn.RMSNorm, eps=1e-6)).double(), make_image(dtype=torch.float64)
    )
    assert_as_good(run(model, make_image(dtype=torch.float64)), exact, exact)
    assert not calls


def test_a_graph_and_a_compiled_model_are_left_alone():
    model = make_model()
    for closed, words in (
        (create_feature_extractor(model, ["features.2"], tracer_kwargs={"leaf_modules": [PatchMerging]}), "torch.fx"),
        (torch.compile(model, backend="eager"), "torch.compile"),
    ):
        report = swinkernels.accelerate(closed)
        assert not report.replaced
        assert words in report.skipped[0].reason


# verify and the report


@versions
@pytest.mark.parametrize("wrong", ["shift_size", "mask_value", "pad_qkv", "pad_order", "bias_table"])
def test_verify_finds_a_wrong_kernel_and_names_the_module(version, wrong, monkeypatch):
    model = make_model(version)
    op = adapter.window_attention_qkvpacked
    values = {"shift_size": (1, 1), "mask_value": 0.0, "pad_qkv": None, "pad_order": "roll_then_pad"}

    def wrong_op(qkv, **arguments):
        if wrong == "bias_table":
            arguments["bias_table"] = arguments["bias_table"].flip(0)
        elif any(arguments["shift_size"]):
            arguments[wrong] = values[wrong]
        return op(qkv, **arguments)

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", wrong_op)
    first = "features.1.0" if wrong == "bias_table" else "features.1.1"
    with pytest.raises(VerificationError, match=rf"{first}: the output is off by".replace(".", r"\.")):
        swinkernels.accelerate(model, verify=True)
    assert not any(isinstance(m, Accelerated) for m in model.modules())


@versions
def test_parameters_without_values(version):
    with torch.device("meta"):
        model = make_model(version)
        assert Counter(e.module_class for e in swinkernels.accelerate(model).replaced) == REPLACED[version]
        assert model(torch.empty(2, 3, 18, 26)).shape == (2, 5)


@versions
def test_report(version):
    from swinkernels.ops._backends import NOT_INSTALLED

    report = swinkernels.accelerate(make_model(version, attention_dropout=0.1))
    assert Counter(e.module_class for e in report.replaced) == REPLACED[version]
    attention = next(e for e in report.replaced if "Attention" in e.module_class)
    assert attention.backend == ("cpu" if NOT_INSTALLED["cpu"] is None else "torch")
    assert "Attention in training: torch. Not cpu: it does not implement dropout_p" in attention.remarks
    block = next(e for e in report.replaced if "Block" in e.module_class)
    assert block.backend == "torch"
    assert any(r.startswith("Residual and norm: torch. Not cpu") for r in block.remarks)


def test_a_norm_whose_shape_was_changed_raises_as_torchvision_does():
    model = accelerated(make_model())
    model.features[1][1].norm2.normalized_shape = (7,)
    with pytest.raises(RuntimeError, match="weight to be of same shape as normalized_shape"):
        model(make_image())
