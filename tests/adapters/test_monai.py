"""Tests ``accelerate`` on MONAI's SwinUNETR, 2D and 3D: results, and the model's state and interface."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("monai", reason="MONAI is not installed")

from monai.networks.nets import swin_unetr
from monai.networks.nets.swin_unetr import (
    BasicLayer,
    PatchMerging,
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlock,
    SwinUNETR,
    WindowAttention,
    compute_mask,
)

import swinkernels
from swinkernels.adapters import VerificationError, norms
from swinkernels.adapters.adapter import Accelerated
from swinkernels.adapters.libraries import monai as adapter
from swinkernels.ops._backends import NOT_INSTALLED
from tests.support.parity import assert_as_good, assert_as_noisy, run, shaken
from tests.support.published import refuse

# Number of modules replaced: four stages, each with two blocks and one patch merging.
REPLACED = {"BasicLayer": 4, "SwinTransformerBlock": 8, "PatchMerging": 4}


def randomise(module: nn.Module) -> None:
    """Draw parameters far from their initial values, so that bias, mask, pad tokens and norms all matter."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("relative_position_bias_table"):
                p.normal_()
            elif name.endswith("qkv.weight"):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif name.endswith("qkv.bias"):
                p.normal_()
            elif "norm" in name:
                p.normal_(mean=float(name.endswith("weight")), std=0.2)


def make_encoder(axes: int = 3, window: int = 4, **options: Any) -> SwinTransformer:
    """Build SwinUNETR's encoder with 12 channels."""
    torch.manual_seed(0)
    options = {"depths": (2, 2, 2, 2), "num_heads": (3, 6, 12, 24), **options}
    model = SwinTransformer(
        1, 12, window_size=(window,) * axes, patch_size=(2,) * axes, spatial_dims=axes, **options
    ).eval()
    randomise(model)
    return model


def make_volume(axes: int = 3, batch: int = 2) -> Tensor:
    """Draw a volume; its maps have 9x7x6 tokens (padded), 5x4x3 (padded or clamped), 3x2x2 and 2x1x1 (clamped)."""
    return torch.randn(batch, 1, *(18, 14, 12)[:axes], generator=torch.Generator().manual_seed(1))


def accelerated(model: nn.Module, backend: str = "auto", **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend, **options)
    assert report.replaced
    assert not report.skipped
    return fast


def check_parity(model: nn.Module, x: Tensor, backend: str = "auto") -> None:
    exact = run(copy.deepcopy(model).double(), x.double())
    # The norms of the model's convolutions magnify rounding errors on small maps.
    assert_as_good(run(accelerated(model, backend), x), run(model, x), exact, shaken(model, x, x.dtype))


def with_drop_path(model: nn.Module, p: float = 0.5) -> nn.Module:
    for m in model.modules():
        if isinstance(m, SwinTransformerBlock):
            m.drop_path = adapter.DropPath(p)
    return model.train()


def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make MONAI's own attention and mask raise an error if they are called."""
    for owner in (swin_unetr, adapter):
        monkeypatch.setattr(owner, "compute_mask", None)
    refuse(monkeypatch, WindowAttention)


# Same results as the library


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("axes", [2, 3])
def test_outputs_and_every_gradient(axes, dtype):
    model = make_encoder(axes).to(dtype)
    check_parity(model, make_volume(axes).to(dtype))


@pytest.mark.parametrize(
    "options",
    [
        {"axes": 3, "qkv_bias": False},
        {"axes": 3, "downsample": "mergingv2"},
        {"axes": 2, "downsample": "mergingv2", "window": 3},
        {"axes": 3, "use_checkpoint": True},
        {"axes": 2, "patch_norm": True, "use_v2": True},
    ],
    ids=str,
)
def test_other_options(options):
    model = make_encoder(**options).double().train()
    check_parity(model, make_volume(options["axes"]).double())


def test_windows_of_seven_on_odd_maps():
    """Bias tables are indexed as in the full window, even on smaller maps."""
    model = make_encoder(2, window=7).double()
    x = torch.randn(1, 1, 30, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check_parity(model, x)
    torch.manual_seed(3)
    block = SwinTransformerBlock(12, 3, window_size=(7, 7, 7), shift_size=(3, 3, 3)).double().eval()
    randomise(block)
    fast = accelerated(block)
    for size in ((8, 9, 4), (9, 3, 8), (3, 5, 6), (2, 8, 7)):
        x = torch.randn(1, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mask = adapter._as_tensor(block, x, adapter.STANDARD_MASK)
        exact = run(block, x, mask)
        for given in (mask, adapter.STANDARD_MASK):
            assert_as_good(run(fast, x, given), exact, exact)


@pytest.mark.parametrize("axes", [2, 3])
def test_no_mask_is_made_and_the_ops_run(axes, monkeypatch):
    model, x = make_encoder(axes), make_volume(axes)
    fast, expected = accelerated(model), model(x)
    ops_only(monkeypatch)
    for got, e in zip(fast(x), expected, strict=True):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("axes", [2, 3])
def test_flash_attention_on_and_off(axes):
    model = make_encoder(axes, use_flash_attention=True)
    x, fast = make_volume(axes), accelerated(model)
    check_parity(model, x)
    with torch.no_grad():
        for got, e in zip(fast(x), model(x), strict=True):
            torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(64, 32, 32), (96, 64)], ids=str)
def test_swin_unetr(size):
    torch.manual_seed(0)
    model = SwinUNETR(in_channels=1, out_channels=2, feature_size=12, spatial_dims=len(size)).eval()
    randomise(model.swinViT)
    x = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, exact = model(x), copy.deepcopy(model).double()(x.double())
        report = swinkernels.accelerate(model)
        got = model(x)
        assert Counter(e.module_class for e in report.replaced) == REPLACED
        assert not torch.equal(got, expected)
        assert (got - exact).norm() <= 2 * (expected - exact).norm() + 1e-6 * exact.norm()
        swinkernels.restore(model)
        assert torch.equal(model(x), expected)


# Masks


@functools.cache
def shifted_block() -> SwinTransformerBlock:
    torch.manual_seed(0)
    block = SwinTransformerBlock(12, 3, window_size=(4, 3), shift_size=(2, 1)).double().eval()
    randomise(block)
    return block


def tokens(*size: int) -> Tensor:
    return torch.randn(2, *size, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_a_mask_of_ones_own_is_honoured():
    block, fast = shifted_block(), accelerated(shifted_block())
    x = tokens(9, 7)
    standard = compute_mask([12, 9], (4, 3), (2, 1), "cpu")
    other = torch.randn(standard.shape, generator=torch.Generator().manual_seed(2))
    for mask in (standard, other, standard.double(), 2 * standard, None, standard.clone().requires_grad_()):
        exact = run(block, x, mask)
        assert_as_good(run(fast, x, mask), exact, exact)
    changed = standard.clone()
    assert torch.equal(fast(x, standard), fast(x, changed))
    changed[0, 0, 1] = -50.0  # changes a mask that has been inspected
    assert not torch.equal(fast(x, changed), fast(x, standard))
    torch.testing.assert_close(fast(x, changed), block(x, changed), rtol=1e-10, atol=1e-12)


def test_the_standard_mask_is_recognised_and_looked_at_once(monkeypatch):
    fast, x = accelerated(shifted_block()), tokens(9, 7)
    mask = compute_mask([12, 9], (4, 3), (2, 1), "cpu")
    expected = fast(x, mask)
    ops_only(monkeypatch)
    assert torch.equal(fast(x, mask), expected)
    monkeypatch.setattr(torch, "equal", None)
    fast(x, mask)
    monkeypatch.undo()
    with torch.inference_mode():
        inference = compute_mask([12, 9], (4, 3), (2, 1), "cpu")
        torch.testing.assert_close(fast(x, inference), expected)


def test_a_stage_with_a_block_of_its_own_gets_its_mask():
    """A stage computes its mask if one of its blocks has a hook or runs MONAI's code, which reads the mask."""
    model = make_encoder(2).double()
    fast = accelerated(model)
    seen: list[Any] = []
    fast.layers1[0].blocks[1].attn.softmax.register_forward_hook(lambda *_: seen.append(0))
    fast.layers2[0].blocks[0].register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[1]))
    x = make_volume(2).double()
    exact = run(model, x)
    assert_as_good(run(fast, x), exact, exact)
    assert len(seen) == 2
    assert isinstance(seen[1], Tensor)
    report = swinkernels.accelerate(fast)
    assert [(e.path, e.reason) for e in report.skipped] == [
        ("layers1.0.blocks.1", "a hook is registered on attn.softmax")
    ]
    assert_as_good(run(fast, x), exact, exact)


# Training


def test_drop_path_draws_the_same_in_checkpoints():
    model = with_drop_path(make_encoder(2, use_checkpoint=True).double())
    x, results = make_volume(2, batch=4).double(), []
    for m in (model, accelerated(model), accelerated(model, "reference")):
        torch.manual_seed(7)
        results.append(run(m, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    assert_as_good(results[2], results[0], results[0])
    assert not torch.equal(results[0]["out.4"], model.eval()(x)[4]), "drop path was not active"


def test_attention_dropout():
    """Dropout is applied in training, except with scaled_dot_product_attention, which MONAI calls without dropout."""
    for flash in (False, True):
        model = make_encoder(2, attn_drop_rate=0.5, use_flash_attention=flash).train()
        fast, x = accelerated(model), make_volume(2)
        run(fast, x)
        assert not torch.equal(fast(x)[4], fast(x)[4])
        with torch.no_grad():
            assert torch.equal(fast(x)[4], fast(x)[4]) is flash
            assert torch.equal(model(x)[4], model(x)[4]) is flash
        check_parity(model.eval(), x)


# Norms, residual connections and patch merging on ops


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    seen: list[str] = []
    for name in ("layer_norm", "residual_layer_norm", "patch_merging"):
        op = getattr(norms, name)

        def watched(*args: Any, op: Any = op, name: str = name, **kwargs: Any) -> Any:
            seen.append(name)
            return op(*args, **kwargs)

        monkeypatch.setattr(norms, name, watched)
    return seen


@pytest.mark.parametrize("downsample", ["merging", "mergingv2"])
@pytest.mark.parametrize("axes", [2, 3])
def test_norms_and_merging_on_ops(axes, downsample, calls):
    model = make_encoder(axes, downsample=downsample).double()
    check_parity(model, make_volume(axes).double(), "reference")
    assert (calls.count("residual_layer_norm"), calls.count("patch_merging")) == (8, 4)


def test_norms_and_merging_of_volumes_on_kernels(calls, as_on_a_gpu):
    """The code path for a GPU runs on the CPU, with kernels in plain PyTorch."""
    model = make_encoder(3)
    check_parity(model, make_volume(3))
    assert (calls.count("residual_layer_norm"), calls.count("patch_merging")) == (8, 4)
    calls.clear()
    x = make_volume(3)
    exact = run(copy.deepcopy(model).double(), x.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fast, plain = run(accelerated(model), x), run(model, x)
    assert_as_noisy(fast, plain, exact)
    assert calls.count("layer_norm") == 8


class LegacyPatchMerging(PatchMerging):
    """Patch merging in the order of MONAI up to 1.4, in which two neighbours occur twice and two are missing."""

    def forward(self, x):
        if x.dim() == 4:
            return super().forward(x)
        picks = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in picks], -1)))


class BackwardsPatchMerging(PatchMerging):
    def forward(self, x):
        return super().forward(x.flip(1))


def test_the_order_of_neighbours_is_that_of_the_installed_version():
    state = torch.get_rng_state()
    orders = [adapter._order(kind, axes) for kind in (PatchMerging, PatchMergingV2) for axes in (2, 3)]
    assert orders == ["swin", "monai", "swin", "row_major"]
    assert adapter._order(LegacyPatchMerging, 3) == "monai_legacy"
    assert adapter._order(BackwardsPatchMerging, 3) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_an_order_that_no_op_has_is_left_to_monai(monkeypatch):
    monkeypatch.setattr(adapter, "_order", lambda kind, axes: None)
    report = swinkernels.accelerate(PatchMerging(12))
    assert "an unknown order" in report.skipped[0].reason


# Precision, compilers


def test_half_precision_model():
    model = make_encoder(3).bfloat16()
    x = make_volume(3).bfloat16()
    exact = copy.deepcopy(model).double()(x.double())
    for got, plain, e in zip(accelerated(model)(x), model(x), exact, strict=True):
        assert got.dtype == torch.bfloat16
        assert (got.double() - e).norm() <= 2 * (plain.double() - e).norm() + 2**-8 * e.norm()


def test_compile_fullgraph_of_volumes(monkeypatch):
    torch._dynamo.reset()
    model = make_encoder(3, depths=(2, 1, 1, 1)).double()
    x = make_volume(3).double()
    exact, fast = run(model, x), accelerated(model)
    ops_only(monkeypatch)
    got = run(torch.compile(fast, fullgraph=True, backend="aot_eager"), x)
    assert_as_good({k.removeprefix("_orig_mod."): v for k, v in got.items()}, exact, exact)


@pytest.mark.filterwarnings("ignore")  # warnings from the tracer about MONAI's code
def test_torchscript_tracing_traces_monais_code(monkeypatch):
    model = make_encoder(2, depths=(2, 1, 1, 1)).double()
    x, fast = make_volume(2).double(), accelerated(model)
    monkeypatch.setattr(adapter, "window_attention_qkvpacked", None)
    traced = torch.jit.trace(fast, x, check_trace=False, strict=False)
    for got, e in zip(traced(x), model(x), strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


# The model's state and interface


def test_hooks_on_blocks_and_stages_see_what_they_saw():
    model = make_encoder(2).double()
    x, fast = make_volume(2).double(), accelerated(model)
    seen: dict[nn.Module, list[Tensor]] = {model: [], fast: []}
    for m, tensors in seen.items():
        for path in ("layers1.0", "layers1.0.blocks.1", "layers1.0.blocks.0.norm2", "layers1.0.downsample"):
            m.get_submodule(path).register_forward_hook(lambda _m, _i, out, t=tensors: t.append(out))
        m(x)
    assert len(seen[fast]) == 4
    for got, e in zip(seen[fast], seen[model], strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


class OwnBlock(SwinTransformerBlock):
    pass


class OwnStage(BasicLayer):
    pass


def test_subclasses_are_left_alone_but_not_what_is_in_a_stage():
    model = make_encoder(2).double()
    model.layers1[0].__class__ = OwnStage
    model.layers2[0].blocks[0].__class__ = OwnBlock
    model.layers3[0].downsample.__class__ = LegacyPatchMerging
    model.layers4[0].blocks[1].forward_part1 = None
    x = make_volume(2).double()
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast)
    assert {e.path: e.reason for e in report.skipped} == {
        "layers1.0": "OwnStage is a subclass, which may compute something else",
        "layers2.0": "it contains a block of the class OwnBlock",
        "layers2.0.blocks.0": "OwnBlock is a subclass, which may compute something else",
        "layers3.0.downsample": "LegacyPatchMerging is a subclass, which may compute something else",
        "layers4.0.blocks.1": "its forward_part1 was replaced on the instance",
    }
    assert len(report.replaced) == 11
    for m in (model, fast):
        del m.layers4[0].blocks[1].forward_part1
    for got, e in zip(fast(x), model(x), strict=True):
        torch.testing.assert_close(got, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda attn: setattr(attn, "qkv", nn.Bilinear(1, 1, 1)), "attn.qkv is a Bilinear, not an nn.Linear"),
        (lambda attn: setattr(attn, "softmax", nn.LogSoftmax(-1)), "attn.softmax is a LogSoftmax"),
        (lambda attn: setattr(attn, "scale", torch.ones(1)), "attn.scale is a Tensor"),
        (lambda attn: setattr(attn, "window_size", (5, 4)), "not the table of attn.window_size"),
        (lambda attn: attn.relative_position_index.add_(1), "differs from MONAI's"),
        (lambda attn: setattr(attn, "__class__", type("OwnAttention", (WindowAttention,), {})), "OwnAttention"),
    ],
)
def test_what_is_not_known_is_left_alone(change, words):
    block = SwinTransformerBlock(12, 3, window_size=(4, 4), shift_size=(2, 2))
    change(block.attn)
    (entry,) = swinkernels.accelerate(block).skipped
    assert words in entry.reason
    assert type(block) is SwinTransformerBlock


# verify and the report


def test_verify_passes_on_volumes_and_leaves_no_trace():
    model = with_drop_path(make_encoder(3))
    before = [t.clone() for t in (*model.parameters(), torch.get_rng_state())]
    report = swinkernels.accelerate(model, verify=True)
    assert len(report.replaced) == sum(REPLACED.values())
    assert all(torch.equal(a, b) for a, b in zip((*model.parameters(), torch.get_rng_state()), before, strict=True))
    swinkernels.accelerate(model, backend="reference", verify=True)


@pytest.mark.parametrize("wrong", ["table_window", "mask_value", "pad_qkv"])
def test_verify_finds_a_wrong_kernel_and_names_the_module(wrong, monkeypatch):
    model = make_encoder(3)
    op = adapter.window_attention_qkvpacked
    values = {"table_window": (3, 4, 4), "mask_value": 0.0, "pad_qkv": None}

    def wrong_op(qkv, bias_table, **arguments):
        if wrong == "table_window":
            bias_table = bias_table[: 5 * 7 * 7]
        return op(qkv, bias_table, **{**arguments, wrong: values[wrong]})

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", wrong_op)
    with pytest.raises(VerificationError, match=r"layers1\.0: the output is off by"):
        swinkernels.accelerate(model, verify=True)
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_report():
    report = swinkernels.accelerate(make_encoder(2))
    assert Counter(e.module_class for e in report.replaced) == REPLACED
    block = next(e for e in report.replaced if e.module_class == "SwinTransformerBlock")
    assert block.backend == ("cpu" if NOT_INSTALLED["cpu"] is None else "torch")
    assert any(r.startswith("Residual and norm: torch. Not cpu") for r in block.remarks)
    assert "monai" in str(report)
