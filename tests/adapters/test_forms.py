"""Tests ``accelerate`` on forms other than Microsoft's block: results equal the library's, also after edits."""

from __future__ import annotations

import copy
import functools
import math
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import swinkernels
from swinkernels.adapters import Form
from swinkernels.adapters.adapter import Accelerated
from swinkernels.adapters.forms import form as forms
from swinkernels.adapters.forms.described import Described, match
from swinkernels.adapters.forms.published import UFORMER
from tests.adapters import trial_cost
from tests.support import other_forms
from tests.support.parity import assert_as_good, randomise, run, shaken
from tests.support.small_models import FAMILIES, FORMS, make_input, make_model
from tests.support.sweeps import long_but

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' warnings

# Tolerances for the families that always compute in float32.
ROUNDED = {"transformers GOT-OCR2": 1e-5}

# Calls of the op in one replaced module, for the families with more than one.
CALLS = {"VRT": 3, "EsViT": 2, "HTSAT": 3, "laion-clap": 2, "nnFormer": 2}

families = pytest.mark.parametrize("family", FORMS)


def model_of(family: str) -> nn.Module:
    for library in ("timm", "torchvision", "transformers"):
        if family.startswith(library):
            pytest.importorskip(library)
    return make_model(family)


def accelerated(model: nn.Module, **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, **options)
    assert report.replaced
    return fast


def described(model: nn.Module) -> list[Described]:
    return [m for m in model.modules() if isinstance(m, Described)]


@families
def test_outputs_every_gradient_and_a_true_report(family, attention_calls):
    model, x = model_of(family), make_input(family)
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast)
    replaced, left = FORMS[family]
    on_op = described(fast)
    assert len(on_op) == replaced
    assert all(word in skipped.reason for word, skipped in zip(left, report.skipped, strict=True))
    moved = shaken(
        model, x, torch.float32 if family in ROUNDED else torch.float64
    )  # runs first, because TinyViT in eval mode caches a tensor that its earlier copies lack
    exact = run(model, x)
    attention_calls.clear()
    got = run(fast, x)
    assert len(attention_calls) == replaced * CALLS.get(family, 1)
    assert_as_good(got, exact, exact, moved)
    check = report.check(x)
    paths = {path for path, m in fast.named_modules() if isinstance(m, Described)}
    assert {ran.path for ran in check.modules if ran.calls} >= paths


@families
def test_float32_is_as_good_as_the_own_code(family):
    model, x = model_of(family).float(), make_input(family).float()
    exact = run(copy.deepcopy(model).double(), x.double())
    moved, got = shaken(model, x, torch.float32), run(accelerated(model), x)
    assert_as_good(got, run(model, x), exact, moved)


@families
def test_training_draws_the_same_and_checks_itself(family):
    """Training with drop path and batch norms gives the library's results; ``accelerate`` with verify=True passes."""
    model, x = model_of(family).train(), make_input(family)
    for m in model.modules():
        for name in ("drop_prob", "p"):
            if isinstance(getattr(m, name, None), float) and not isinstance(m, nn.Dropout):
                setattr(m, name, 0.5)
    fast = accelerated(model, verify=family not in ROUNDED)
    assert len(described(fast)) == FORMS[family][0]
    results = []
    for m in (model, fast):
        torch.manual_seed(7)
        results.append({**run(m, x), "next": torch.rand(1).double(), **{n: b.clone() for n, b in m.named_buffers()}})
    largest = max(t.abs().max().item() for t in results[0].values())
    for name, expected in results[0].items():
        torch.testing.assert_close(
            results[1][name], expected, rtol=1e-8, atol=ROUNDED.get(family, 1e-10) * largest, msg=name
        )


@families
def test_state_copies_pickles_and_restore(family, attention_calls):
    model, x = model_of(family), make_input(family)
    with torch.no_grad():
        expected = model(x)
        fast = accelerated(model)
        assert list(fast.state_dict()) == list(model.state_dict())
        classes = [type(m) for m in fast.modules()]
        for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast)), fast):
            assert [type(m) for m in again.modules()] == classes
            attention_calls.clear()
            torch.testing.assert_close(
                again(x), expected, rtol=ROUNDED.get(family, 1e-9), atol=ROUNDED.get(family, 1e-11)
            )
            assert attention_calls
            swinkernels.restore(again)
            assert not any(isinstance(m, Accelerated) for m in again.modules())
            assert torch.equal(again(x), expected)


def _absorbed(module: Described) -> nn.Module:
    roots = [module.get_submodule(root) for root in module._swinkernels_form.absorbs]
    return next(m for root in roots for m in root.modules() if type(m) in (nn.Linear, nn.Conv2d))


@families
@pytest.mark.parametrize("edit", ["hook", "forward", "class"])
def test_an_edited_layer_has_the_own_code_run(family, edit, monkeypatch, attention_calls):
    """Each edit changes the result, and changes the accelerated model's result in the same way."""
    model, x = model_of(family), make_input(family)
    fast = accelerated(model)
    before = model(x)

    def enlarged(layer: nn.Module, x: Tensor) -> Tensor:
        kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
        return 1.5 * kind.forward(layer, x)

    paths = [path for path, m in fast.named_modules() if m is _absorbed(described(fast)[0])]
    for of in (model, fast):
        layer = of.get_submodule(paths[0])
        if edit == "hook":
            layer.register_forward_hook(lambda module, args, out: 1.5 * out)
        elif edit == "forward":
            layer.forward = functools.partial(enlarged, layer)
        else:
            layer.__class__ = type("Enlarged", (type(layer),), {"forward": enlarged})
    attention_calls.clear()
    got, expected = fast(x), model(x)
    assert len(attention_calls) < FORMS[family][0] * CALLS.get(family, 1) or family == "torchvision Swin3D"
    assert torch.equal(got, expected) or torch.allclose(got, expected, rtol=1e-9, atol=ROUNDED.get(family, 1e-11))
    if family != "torchvision Swin3D":  # its own code reads the weights and calls no layer
        assert not torch.allclose(expected, before, rtol=1e-6, atol=1e-9)


def test_dropout_of_weights_draws_and_is_never_forgotten():
    attn = other_forms.UformerAttention(12, (4, 4), 3)
    attn.attn_drop.p = 0.4
    assert "Uformer" in str(swinkernels.accelerate(attn))
    x = torch.randn(6, 16, 12)
    with torch.no_grad():
        attn.eval()
        kept = attn(x)
        attn.train()
        drawn = torch.stack([attn(x) for _ in range(400)])
        assert not torch.equal(drawn[0], drawn[1])
        # Without the factor 1 / (1 - p), the mean would be off by 0.4 * (kept - bias).
        bias = attn.proj.bias
        assert (drawn.mean(0) - kept).norm() < 0.1 * (kept - bias).norm()

    def forgets(attn: Any, attend: Any, x: Tensor, attn_kv: Any = None, mask: Any = None) -> Any:
        return UFORMER.forward(attn, lambda *maps, dropout_p, **given: attend(*maps, **given), x, attn_kv, mask)

    wrong = Form("forgets", other_forms.UformerAttention, forgets, UFORMER.sizes, call=UFORMER.call)
    swinkernels.adapters.register("tests.support.other_forms", wrong)
    try:
        report = swinkernels.accelerate(nn.Sequential(other_forms.UformerAttention(12, (4, 4), 3)))
        assert not report.replaced
        assert "another output with Dropout.p of 1" in report.skipped[0].reason
    finally:
        del swinkernels.adapters.adapter._ADAPTERS["tests.support.other_forms"]
        del forms._KNOWN["forgets"]


def test_a_wrong_description_is_refused_with_what_differs():
    def wrong(attn: Any, attend: Any, x: Tensor) -> Tensor:
        return attn.linear(attend(attn.embedding_layer(x), num_heads=attn.n_heads, window_size=attn.window_size))

    form = Form("wrong", other_forms.WMSA, wrong, lambda attn: ((8, 12, 12),))
    swinkernels.adapters.register("tests.support.other_forms", form)
    try:
        attn = other_forms.WMSA(12, 4, 4, "W")
        report = swinkernels.accelerate(attn)
        assert type(attn) is other_forms.WMSA
        assert "gave another output" in report.skipped[0].reason
    finally:
        del swinkernels.adapters.adapter._ADAPTERS["tests.support.other_forms"]
        del forms._KNOWN["wrong"]


def test_masks_of_minus_infinity_keep_rows_finite():
    attn = other_forms.UformerAttention(12, (4, 4), 3).double()
    mask = other_forms.make_mask((8, 8), (4, 4), (2, 2), -torch.inf).nan_to_num(nan=0.0, neginf=-torch.inf).double()
    x = torch.randn(8, 16, 12, dtype=torch.float64)
    expected = attn(x, mask=mask)
    swinkernels.accelerate(attn)
    torch.testing.assert_close(attn(x, mask=mask), expected, rtol=1e-10, atol=1e-12)


def test_weights_that_a_stage_hands_on_are_those_of_its_own_code(attention_calls):
    stage, x = model_of("EsViT"), make_input("EsViT")
    fast = accelerated(stage)
    expected, weights = stage.forward_with_attention(x)
    attention_calls.clear()
    got, found = fast.forward_with_attention(x)
    assert not attention_calls
    assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(found, weights, strict=True))
    torch.testing.assert_close(fast(x), expected, rtol=1e-10, atol=1e-12)
    assert len(attention_calls) == 2  # the op also runs after the module's own code has filled the dict of masks


@pytest.mark.parametrize("family", ["EsViT", "Pangu-Weather"])
def test_another_mask_has_the_own_code_run(family, attention_calls):
    model, x = model_of(family), make_input(family)
    fast = accelerated(model)
    before = model(x)
    for m in (model, fast):
        m(x)
        if family == "EsViT":
            m.blocks[1].attn_mask_dict[7] = torch.zeros(4, 16, 16)
        else:
            m[1].attn_mask = torch.zeros_like(m[1].attn_mask)
    attention_calls.clear()
    torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-12)
    assert len(attention_calls) == (0 if family == "EsViT" else 1)
    assert family == "EsViT" or not torch.allclose(model(x), before)


def test_compiled_code_notices_an_assigned_mask():
    torch.compiler.reset()
    model, x = model_of("Pangu-Weather"), make_input("Pangu-Weather")
    fast = accelerated(model)
    compiled = torch.compile(fast, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)
        for m in (model, fast):
            m[1].attn_mask = torch.zeros_like(m[1].attn_mask)
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("warped", "step"), [(True, 0), (False, 1)])
def test_auroras_roll_out_and_date_line(warped, step):
    model, x = model_of("Aurora"), make_input("Aurora")
    fast = accelerated(model)
    arguments = x[:, 0, :5], (3, 7, 10), step, warped
    for a, b in zip(model.blocks, fast.blocks, strict=True):
        torch.testing.assert_close(b(x, *arguments), a(x, *arguments), rtol=1e-10, atol=1e-12)


def test_auroras_pad_tokens_come_from_the_layer_that_makes_the_others(monkeypatch):
    """Masked pad tokens affect the output only if scores are large, which they are not in a trial."""
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda linear, x: forward(linear, x) * 3)
    model, x = model_of("Aurora"), make_input("Aurora")
    fast = accelerated(model)
    arguments = x[:, 0, :5], (3, 7, 10), 1
    x = model.blocks[0](x, *arguments)
    torch.testing.assert_close(fast.blocks[1](x, *arguments), model.blocks[1](x, *arguments), rtol=1e-10, atol=1e-10)


def test_calls_outside_of_the_form_run_the_own_code(attention_calls):
    attn = other_forms.UformerAttention(12, (4, 4), 3)
    x, others = torch.randn(2, 16, 12), torch.randn(2, 16, 12)
    expected = attn(x, others)
    swinkernels.accelerate(attn)
    attention_calls.clear()
    assert torch.equal(attn(x, others), expected)
    assert not attention_calls
    assert attn.train()(x).shape == x.shape
    assert attention_calls


def test_a_pickle_whose_form_is_not_registered_says_so():
    with pytest.raises(RuntimeError, match="form 'unheard-of', which is not registered here"):
        forms.named("unheard-of")


COMPILED = [
    "timm DaViT",
    "timm TinyViT",
    "VRT",
    "Segment Anything",
    "EsViT",
    "HTSAT",
    "nnFormer",
    "Pangu-Weather",
    "Aurora",
]


@pytest.mark.parametrize("family", long_but(COMPILED, "VRT", "Segment Anything", "HTSAT", "Pangu-Weather"))
def test_compile_fullgraph(family):
    torch.compiler.reset()
    model, x = model_of(family), make_input(family)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(accelerated(model), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("family", ["SCUNet", "timm SAM ViT", "Uformer", "copy"])
def test_second_derivatives_behind_a_kernel(family, attention_calls):
    """The gradients of a gradient penalty are correct in float32, where a kernel runs."""
    model, x = model_of(family), make_input(family)
    found = []
    for m in (model, accelerated(copy.deepcopy(model).float())):
        leaf = x.to(next(m.parameters()).dtype, copy=True).requires_grad_()
        attention_calls.clear()
        (first,) = torch.autograd.grad(m(leaf).square().sum(), leaf, create_graph=True)
        first.square().sum().backward()
        gradients = {name: p.grad for name, p in m.named_parameters() if p.grad is not None}
        found.append({"the input": leaf.grad, **gradients})
    assert attention_calls
    assert found[0].keys() == found[1].keys()
    largest = max(g.abs().max().item() for g in found[0].values())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name].double(), expected, rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_every_form_has_a_family():
    assert set(FORMS) <= set(FAMILIES)
    names = {m._swinkernels_form.name for family in FORMS for m in described(accelerated(model_of(family)))}
    assert names >= set(forms._KNOWN) - {"toylib"}


# Calls and modules for which the library's own code runs


class Louder(nn.Module):
    """A mixin that adds a keyword argument to the forward of a class."""

    def forward(self, x: Tensor, gain: float | None = None) -> Tensor:
        y = super().forward(x)
        return y if gain is None else gain * y


class LouderWMSA(Louder, other_forms.WMSA):
    pass


def test_an_argument_that_the_form_does_not_have(attention_calls):
    attn = LouderWMSA(12, 4, 4, "W").double()
    fast, x = accelerated(attn), torch.randn(1, 8, 12, 12, dtype=torch.float64)
    attention_calls.clear()
    torch.testing.assert_close(fast(x), attn(x), rtol=1e-10, atol=1e-12)
    assert attention_calls
    attention_calls.clear()
    assert torch.equal(fast(x, gain=2.0), attn(x, gain=2.0))
    assert not attention_calls


class OtherwiseOnLargeMaps(other_forms.WMSA):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if x.shape[1] * x.shape[2] < 1500 else 0.5 * y


def test_more_tokens_than_a_number_in_the_code_are_tried():
    attn = OtherwiseOnLargeMaps(12, 4, 4, "W")
    report = swinkernels.accelerate(attn)
    assert not report.replaced
    assert "gave another output" in report.skipped[0].reason


@pytest.mark.parametrize("window", [14, 0])
def test_a_wrong_gradient_of_a_wide_layer_is_found(window):
    """A trial compares gradients on maps smaller than SAM-B's 64 x 64 tokens, which have 2 x 10^8 scores per image."""
    sam = pytest.importorskip("transformers.models.sam.modeling_sam")
    from transformers import SamVisionConfig

    from swinkernels.adapters.libraries.transformers.sam import ADAPTERS

    (right,) = ADAPTERS

    def forward(layer: Any, attend: Any, x: Tensor) -> Any:
        return right.forward(layer, lambda qkv, **given: attend(qkv, **given).detach(), x)

    config = SamVisionConfig(num_hidden_layers=1)
    config._attn_implementation = "sdpa"
    wrong = Form("detached", sam.SamVisionLayer, forward, right.sizes, absorbs=right.absorbs, small=right.small)
    layer = sam.SamVisionLayer(config, window)
    assert "gave another gradient" in str(match(layer, [wrong])[1])
    adapter, reason = match(layer, [right])
    assert adapter is not None, reason
    del forms._KNOWN["detached"]


@pytest.mark.long
@pytest.mark.parametrize("model", ["torchvision Swin3D-T", "SAM-B"])
def test_trials_of_wide_modules_cost_little(model):
    cost = trial_cost.measure(model)
    assert cost["on ops"]
    assert cost["seconds"] <= trial_cost.MOST_SECONDS
    assert cost["gib"] <= trial_cost.MOST_GIB


def test_a_subclass_from_elsewhere_is_left_alone():
    twins = pytest.importorskip("timm.models.twins")
    derived = type("Derived", (twins.LocallyGroupedAttn,), {})
    report = swinkernels.accelerate(derived(16, 2, ws=4))
    assert not report.replaced
    assert "Derived is a subclass of LocallyGroupedAttn" in report.skipped[0].reason


def test_a_hook_of_all_modules_is_no_verdict():
    attn = other_forms.WMSA(20, 4, 4, "W")
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "global module hook" in swinkernels.accelerate(attn).skipped[0].reason
    finally:
        handle.remove()
    assert swinkernels.accelerate(attn).replaced


def test_timm_sams_drop_path_drops_windows(attention_calls):
    """One call of the op computes all windows of a map, and drop path drops individual windows, as in timm's code."""
    vit = pytest.importorskip("timm.models.vision_transformer_sam")
    torch.manual_seed(0)
    block = vit.Block(12, 3, window_size=4, use_rel_pos=True, drop_path=0.5).double().train()
    randomise(block)
    fast, x = accelerated(block), torch.randn(2, 7, 9, 12, dtype=torch.float64)
    results = []
    for module in (block, fast):
        attention_calls.clear()
        torch.manual_seed(7)
        results.append(run(module, x))
    assert attention_calls
    assert_as_good(results[1], results[0], results[0])
    torch.manual_seed(8)
    assert not torch.equal(fast(x), results[1]["out"])


@pytest.mark.parametrize("fused", [False, True])
def test_sams_scale_counts_where_its_code_reads_it(fused):
    sam = pytest.importorskip("timm.models.vision_transformer_sam")
    torch.manual_seed(0)
    block = sam.Block(16, 2, window_size=4, use_rel_pos=True).eval()
    block.attn.fused_attn = fused
    fast, x = accelerated(block), torch.randn(1, 9, 8, 16)
    block.attn.scale = fast.attn.scale = 3.0
    torch.testing.assert_close(fast(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_forward_that_was_bound_and_is_replaced_later():
    davit = pytest.importorskip("timm.models.davit")
    block = davit.SpatialBlock(16, 2, window_size=4).eval()
    block.attn.forward = block.attn.forward  # as weight offloading does
    swinkernels.accelerate(block)
    x = torch.randn(1, 16, 8, 8)
    before = block(x)
    block.attn.forward = lambda x: 0 * x
    assert not torch.equal(block(x), before)


@pytest.mark.parametrize("change", ["forward", "qkv"])
def test_changes_before_a_compilation_count(change):
    davit = pytest.importorskip("timm.models.davit")
    torch.manual_seed(0)
    block = davit.SpatialBlock(16, 2, window_size=4).eval()
    fast, x = accelerated(block), torch.randn(1, 16, 8, 8)
    for each in (block, fast):
        if change == "forward":
            each.attn.forward = lambda x: 0 * x
        else:
            each.attn.qkv = nn.Sequential(nn.Linear(16, 48), nn.Tanh()).requires_grad_(False)
            torch.manual_seed(1)
            each.attn.qkv[0].reset_parameters()
    torch._dynamo.reset()
    compiled = torch.compile(fast, backend="eager")
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("made_by", ["timm TinyViT", "copy"])
def test_a_saved_model_runs_in_another_process(made_by, tmp_path):
    model, x = model_of(made_by).eval(), make_input(made_by)
    fast = accelerated(model)
    torch.save((fast, x, model(x)), tmp_path / "model.pt")
    code = (
        "import sys, torch, swinkernels\n"
        "model, x, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)\n"
        "accelerated = [m for m in model.modules() if hasattr(m, '_swinkernels_changed')]\n"
        "assert accelerated and not any(m._swinkernels_changed() for m in accelerated)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


def test_a_mask_without_a_shift_has_the_own_code_run():
    model, x = model_of("Pangu-Weather"), make_input("Pangu-Weather")
    fast = accelerated(model)
    for m in (model, fast):
        block = next(b for b in m.modules() if hasattr(b, "roll") and not b.roll)
        windows, n = block.attn.type_of_windows, math.prod(block.window_size)
        block.attn_mask = torch.randn(2, windows, n, n, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    torch.testing.assert_close(fast(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("before", ["inference", "export"])
def test_aurora_keeps_no_tensor_of_a_call_in_another_mode(before):
    model, x = model_of("Aurora"), make_input("Aurora")
    fast = accelerated(model)
    if before == "export":
        torch.export.export(fast, (x,))
    else:
        with torch.inference_mode():
            fast(x)
    exact, got = run(model, x), run(fast, x)
    assert_as_good(got, exact, exact)


@pytest.mark.parametrize(
    "family", ["mmdet", "Uformer", "Swin-MAE", "nnFormer", "nnFormer's skips", "VRT", "Pangu-Weather"]
)
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.long)], ids=["eager", "compiled"])
def test_a_softmax_over_another_axis_has_the_own_code_run(family, compiles):
    model, x = model_of(family), make_input(family)
    fast = accelerated(model)
    for m in (model, fast):
        for softmax in (s for s in m.modules() if type(s) is nn.Softmax):
            softmax.dim = -2
    torch.compiler.reset()
    called = torch.compile(fast, backend="eager") if compiles else fast
    torch.testing.assert_close(called(x), model(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["nnFormer", "nnFormer's skips"])
def test_nnformer_under_autocast(family):
    model, x = model_of(family).float(), make_input(family).float()
    fast = accelerated(model)
    with torch.autocast("cpu", torch.bfloat16):
        got, plain = fast(x), model(x)
    assert got.dtype == plain.dtype
    torch.testing.assert_close(got, plain, rtol=0.05, atol=0.05)


def test_masks_in_float16():
    attn = other_forms.UformerAttention(12, (4, 4), 3)
    randomise(attn)
    fast = accelerated(attn.half())
    x, mask = torch.randn(4, 16, 12).half(), torch.zeros(2, 16, 16).half()
    mask[1, :8, 8:] = -100.0
    torch.testing.assert_close(fast(x, mask=mask), attn(x, mask=mask), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)  # a kernel runs in float32
@pytest.mark.parametrize("family", ["Uformer", "nnFormer's skips", "VRT"])
def test_a_row_whose_mask_is_minus_infinity_everywhere_is_nan_as_in_the_own_code(family, dtype):
    """Only the output of the masked row and the gradients that depend on it are NaN."""
    model = model_of(family).to(dtype)
    attn = model[0].attention_of_windows
    fast = accelerated(attn)
    n = attn.relative_position_index.shape[0]
    mask = torch.zeros(2, n, n, dtype=dtype)
    mask[1, : n // 2, n // 2 :] = -torch.inf
    mask[1, 3] = -torch.inf
    x = torch.randn(4, n, 12, dtype=dtype)
    others = (x.cos(),) if family == "nnFormer's skips" else ()
    results = []
    for m in (attn, fast):
        leaf = x.clone().requires_grad_()
        out = m(leaf, *others, mask=mask)
        results.append((out, *torch.autograd.grad(out.sum(), leaf)))
    for got, expected in zip(results[1], results[0], strict=True):
        assert expected.isnan().any()
        assert not expected.isnan().all()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("kind", ["tensor", "parameter", "buffer"])
@pytest.mark.parametrize("family", ["SCUNet", "FDAT", "laion-clap"])
def test_a_scale_that_becomes_a_tensor_has_the_own_code_run(family, kind, attention_calls):
    model, x = model_of(family), make_input(family)
    fast, results = accelerated(model), []
    scale = torch.tensor(0.4, dtype=torch.float64)
    for m in (model, fast):
        for attn in (a for a in m.modules() if hasattr(a, "scale")):
            if kind == "buffer":
                del attn.scale
                attn.register_buffer("scale", scale.clone())
            else:
                attn.__dict__.pop("scale", None)
                attn.scale = nn.Parameter(scale.clone()) if kind == "parameter" else scale.clone()
        attention_calls.clear()
        results.append(run(m, x))
        assert not attention_calls
    assert_as_good(results[1], results[0], results[0])


def test_a_scale_that_is_a_tensor_before_is_a_reason():
    attn = other_forms.WMSA(12, 4, 4, "W")
    attn.scale = torch.tensor(0.4)
    report = swinkernels.accelerate(attn)
    assert "scale is a Tensor, not a number" in report.skipped[0].reason


def test_a_table_that_the_own_code_broadcasts(attention_calls):
    attn, x = model_of("FDAT").blocks[0], make_input("FDAT")
    fast, results = accelerated(attn), []
    bias = torch.randn(1, 16, 16, dtype=torch.float64)
    for m in (attn, fast):
        m.bias = nn.Parameter(bias.clone())
        attention_calls.clear()
        results.append(run(m, x, 7, 9))
        assert not attention_calls
    assert_as_good(results[1], results[0], results[0])
    assert "bias has another shape than before" in str(described(fast)[0]._swinkernels_why_own_code())
