"""Tests ``accelerate`` on mmpretrain's Swin v1 and v2, and accelerated backbones that a config selects by type."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # warnings from mmcv-lite and mmengine
    from mmcv.cnn.bricks.drop import DropPath
    from mmcv.cnn.bricks.transformer import PatchMerging as MMCVPatchMerging
    from mmengine.config import Config
    from mmengine.registry import MODELS as ROOT
    from mmengine.utils import import_modules_from_strings
    from mmpretrain.models import SwinTransformer, SwinTransformerV2
    from mmpretrain.models.backbones.swin_transformer import SwinBlock
    from mmpretrain.models.utils import attention
    from mmpretrain.models.utils.attention import ShiftWindowMSA, WindowMSA, WindowMSAV2
    from mmpretrain.models.utils.embed import PatchMerging
    from mmpretrain.registry import MODELS

import swinkernels
from swinkernels.adapters import VerificationError, norms
from swinkernels.adapters.adapter import Accelerated
from swinkernels.adapters.libraries import mmpretrain as adapter
from tests.support.parity import assert_as_good, randomise, run, shaken
from tests.support.published import refuse

pytestmark = pytest.mark.filterwarnings("ignore")  # warnings from mmengine, and about mmpretrain's checkpointing

# Number of modules replaced in make_model's models: four blocks, their attention, and one patch merging.
REPLACED = {
    1: {"SwinBlock": 4, "ShiftWindowMSA": 4, "PatchMerging": 1},
    2: {"SwinBlockV2": 4, "ShiftWindowMSA": 4, "PatchMerging": 1},
}

versions = pytest.mark.parametrize("version", [1, 2], ids=["v1", "v2"])


def config(version: int = 1, **options: Any) -> dict[str, Any]:
    """Return the config of a backbone that has maps of 9x13 and 5x7 tokens for images of :func:`make_image`."""
    arch = {"embed_dims": 16, "depths": [2, 2], "num_heads": [2, 4]}
    of_version: dict[str, Any] = {}
    if version == 2:
        arch["extra_norm_every_n_blocks"] = 2
        of_version["pretrained_window_sizes"] = [0, 6]
    options = {"window_size": 4, "patch_size": 2, "out_indices": (0, 1), "drop_path_rate": 0.0, **options}
    return {"arch": arch, **of_version, **options}


def make_model(version: int = 1, seed: int = 0, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = (SwinTransformer if version == 1 else SwinTransformerV2)(**config(version, **options))
    model.eval()
    randomise(model)
    return model


def make_image(size: tuple[int, int] = (18, 26), batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1)).to(dtype)


def accelerated(model: nn.Module, backend: str = "auto", **options: Any) -> Any:
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast, backend=backend, **options)
    assert report.replaced
    assert not report.skipped
    return fast


def check_parity(model: nn.Module, x: Tensor, backend: str = "auto") -> None:
    """Compare the model with its accelerated copy; the reference is the model in float64."""
    exact = run(copy.deepcopy(model).double(), x.double())
    assert_as_good(run(accelerated(model, backend), x), run(model, x), exact, shaken(model, x, x.dtype))


def assert_same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-12)


def ops_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make mmpretrain's own attention raise an error if it is called."""
    for owner in (WindowMSA, WindowMSAV2):
        refuse(monkeypatch, owner)


# Same results as the library


@versions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((18, 26), {}),  # 9x13, 5x7
        ((16, 32), {}),  # maps of 8x16 and 4x8: no shift on either axis in the second stage
        ((16, 32), {"pad_small_map": True}),  # maps of 8x16 and 4x8: shifted on both axes
        ((6, 26), {"pad_small_map": True}),  # 3x13, 2x7
        ((20, 28), {"window_size": 5}),  # 10x14, 5x7
    ],
    ids=str,
)
def test_outputs_and_every_gradient(version, size, options, dtype, monkeypatch):
    model = make_model(version, **options).to(dtype)
    x = make_image(size, dtype=dtype)
    check_parity(model, x)
    fast = accelerated(model)
    ops_only(monkeypatch)
    fast(x)


@versions
def test_other_options(version):
    cfgs: dict[str, Any] = {"qkv_bias": False}
    if version == 1:
        cfgs["qk_scale"] = 0.3
    model = make_model(version, stage_cfgs={"block_cfgs": {"attn_cfgs": cfgs}}, use_abs_pos_embed=True, with_cp=True)
    check_parity(model.double(), make_image(dtype=torch.float64))


@versions
def test_what_mmpretrain_refuses_is_refused(version):
    """mmpretrain pads maps that are smaller than the window only if a flag is set."""
    block = accelerated(make_model(version)).stages[0].blocks[1]
    for tokens, hw_shape, words in ((3 * 9, (3, 9), "pad_small_map"), (35, (6, 6), "match the input")):
        with pytest.raises(AssertionError, match=words):
            block(torch.randn(1, tokens, 16), hw_shape)


@versions
def test_frozen_stages(version):
    """mmpretrain freezes the stages again on every call of train()."""
    model = make_model(version, frozen_stages=0).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    results = []
    for m in (model, fast):
        assert m.train() is None
        results.append(run(m, x))
    assert_as_good(results[1], results[0], results[0])
    assert not any("stages.0.blocks" in name for name in results[1])


# Training


@versions
def test_drop_path_draws_the_same_in_checkpoints(version):
    model = make_model(version, drop_path_rate=0.5, with_cp=True).double()
    model.train()
    x, results = make_image(batch=4, dtype=torch.float64), []
    for m in (model, accelerated(model), accelerated(model, "reference")):
        torch.manual_seed(7)
        results.append(run(m, x))
        results[-1]["next random number"] = torch.rand(1).double()
    assert_as_good(results[1], results[0], results[0])
    assert_as_good(results[2], results[0], results[0])
    model.eval()
    assert not torch.equal(results[0]["out.1"], model(x)[1]), "drop path was not active"


@versions
def test_attention_dropout_has_mmpretrains_mean_and_spread(version):
    """The output is linear in the attention weights, so its mean over dropout masks tends to that without dropout."""
    cfgs = {"block_cfgs": {"attn_cfgs": {"attn_drop": 0.3}}}
    attn = make_model(version, stage_cfgs=cfgs).double().stages[0].blocks[1].attn
    fast = accelerated(attn)
    x = torch.randn(1, 30, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = attn(x, (5, 6))
        assert_same(fast(x, (5, 6)), exact)
        torch.manual_seed(0)
        draws = fast.train()(x.expand(400, -1, -1), (5, 6))
        of_mmpretrain = attn.train()(x.expand(400, -1, -1), (5, 6))
    spread = of_mmpretrain.std(0)
    assert (draws.mean(0) - exact).abs().max() < 6 * spread.max() / 400**0.5
    assert ((draws.std(0) / spread).log().abs() < 0.5).all()


def test_dropout_of_its_own_kind_follows_the_inner_module():
    """Attention dropout follows the mode of its own module, which freezing can set to eval mode individually."""
    attn = make_model(stage_cfgs={"block_cfgs": {"attn_cfgs": {"attn_drop": 0.5}}}).stages[0].blocks[1].attn
    fast, x = accelerated(attn).train(), torch.randn(1, 30, 16)
    assert not torch.equal(fast(x, (5, 6)), fast(x, (5, 6)))
    fast.w_msa.attn_drop.eval()
    assert torch.equal(fast(x, (5, 6)), fast(x, (5, 6)))


# Norms, residual connections and patch merging on ops


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


@pytest.mark.parametrize("path", ["attn", "ffn", "ffn.layers.0", "ffn.layers.0.0"])
def test_autocast_leaves_what_others_see_its_dtype(path):
    """A norm keeps the residual stream's dtype unless an unhooked Linear follows, which casts its input anyway."""
    block, dtypes = make_model().stages[0].blocks[1], []
    x = torch.randn(2, 30, 16, generator=torch.Generator().manual_seed(1))
    for m in (block, accelerated(block, "reference")):
        m.get_submodule(path).register_forward_pre_hook(lambda _m, i: dtypes.append(i[0].dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            m(x, (5, 6))
    assert dtypes == [torch.float32] * 2


@pytest.mark.parametrize("kind", [MMCVPatchMerging, PatchMerging])
def test_patch_merging_in_the_order_of_unfold(kind, calls):
    of_version = {"use_post_norm": True} if kind is PatchMerging else {}
    for padding in ("corner", "same"):
        torch.manual_seed(0)
        merging = kind(6, 10, padding=padding, **of_version).double()
        randomise(merging)
        fast = accelerated(merging, "reference")
        for size in ((4, 6), (5, 7), (1, 2)):
            x = torch.randn(2, size[0] * size[1], 6, dtype=torch.float64)
            (got, got_size), (expected, expected_size) = fast(x, size), merging(x, size)
            assert tuple(got_size) == tuple(expected_size)
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    assert len(calls) == 6
    with pytest.raises(AssertionError, match="wrong size"):
        fast(x, (3, 3))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (MMCVPatchMerging, {"kernel_size": 3}, "blocks of 2x2"),
        (MMCVPatchMerging, {"kernel_size": 2, "stride": 1}, "blocks of 2x2"),
        (MMCVPatchMerging, {"padding": 0}, "adaptive_padding"),
        (MMCVPatchMerging, {"norm_cfg": None}, "no norm"),
        (MMCVPatchMerging, {"bias": True}, "reduction has a bias"),
        (PatchMerging, {"use_post_norm": False}, "use_post_norm"),
    ],
)
def test_other_patch_merging_is_left_alone(kind, options, words):
    (entry,) = swinkernels.accelerate(kind(6, 10, **options)).skipped
    assert words in entry.reason


# Precision and compilers


def test_torchscript_tracing_traces_mmpretrains_code(monkeypatch):
    model = make_model(stage_cfgs={"depth": 1}).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    monkeypatch.setattr(adapter, "window_attention_qkvpacked", None)
    assert_same(torch.jit.trace(fast, x, check_trace=False, strict=False)(x), model(x))


# The model's state and interface


@versions
def test_loading_in_both_directions(version):
    """mmpretrain's v2 deletes its buffers from the state that it loads, so a strict load would fail."""
    model, other = make_model(version).double(), make_model(version, seed=1).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    for to, source in ((fast, other), (model, fast)):
        assert not torch.equal(to(x)[0], other(x)[0])
        incompatible = to.load_state_dict(source.state_dict(), strict=version == 1)
        assert not incompatible.unexpected_keys
        assert all(key.endswith(("relative_position_index", "coords_table")) for key in incompatible.missing_keys)
        assert_same(to(x), other(x))


@versions
def test_hooks_see_what_they_saw(version):
    model = make_model(version).double()
    fast, x = accelerated(model), make_image(dtype=torch.float64)
    paths = ["stages.0.blocks.0", "stages.0.blocks.1.attn", "stages.0.blocks.1.norm2", "stages.1.blocks.0.ffn"]
    paths += ["stages.0.blocks.1.attn.drop", f"stages.{version - 1}.downsample"]
    seen: dict[nn.Module, list[Any]] = {model: [], fast: []}
    for m, outs in seen.items():
        for path in paths:
            m.get_submodule(path).register_forward_hook(
                lambda _m, _i, out, o=outs: o.append(out if isinstance(out, Tensor) else out[0])
            )
        m(x)
    assert len(seen[fast]) == len(paths)
    assert_same(tuple(seen[fast]), tuple(seen[model]))


@versions
@pytest.mark.parametrize("path", ["", ".softmax", ".proj", ".attn_drop"])
def test_hooks_inside_the_attention_fire(version, path):
    model = make_model(version).double()
    fast, x, seen = accelerated(model), make_image(dtype=torch.float64), []
    where = f"stages.0.blocks.1.attn.w_msa{path}"
    fast.get_submodule(where).register_forward_hook(lambda _m, _i, out: seen.append(out.shape))
    assert_same(fast(x), model(x))
    assert len(seen) == 1
    (entry,) = swinkernels.accelerate(fast).skipped
    assert (entry.path, entry.reason) == ("stages.0.blocks.1.attn", f"a hook is registered on w_msa{path}")


# Modules that `accelerate` does not replace


class OwnAttention(ShiftWindowMSA):
    pass


class OwnWindowMSA(WindowMSA):
    pass


def test_subclasses_and_what_is_inside_them():
    model = make_model().double()
    model.stages[0].blocks[0].attn.__class__ = OwnAttention
    model.stages[0].blocks[1].attn.w_msa.__class__ = OwnWindowMSA
    fast = copy.deepcopy(model)
    report = swinkernels.accelerate(fast)
    assert {e.path: e.reason for e in report.skipped} == {
        "stages.0.blocks.0.attn": "OwnAttention is a subclass, which may compute something else",
        "stages.0.blocks.1.attn": "w_msa is a OwnWindowMSA, not mmpretrain's WindowMSA or WindowMSAV2",
    }
    assert len(report.replaced) == 7
    x = make_image(dtype=torch.float64)
    assert_same(fast(x), model(x))


@pytest.mark.parametrize(
    ("version", "change", "words"),
    [
        (1, lambda attn: attn.w_msa.relative_position_index.add_(-1), "differs from mmpretrain's"),
        (2, lambda attn: attn.w_msa.relative_position_index.add_(-1), "differs from mmpretrain's"),
        (1, lambda attn: setattr(attn, "window_size", 5), "window_size is not the window_size of w_msa"),
        (1, lambda attn: setattr(attn.w_msa, "scale", torch.ones(1)), "w_msa.scale is a Tensor"),
        (1, lambda attn: setattr(attn.w_msa, "relative_position_bias_table", nn.Parameter(torch.ones(9, 2))), "table"),
        (2, lambda attn: setattr(attn.w_msa, "relative_coords_table", torch.ones(1, 3, 3, 2)), "table"),
        (2, lambda attn: setattr(attn.w_msa, "proj", nn.Identity()), "w_msa.proj is a Identity"),
    ],
)
def test_attention_that_is_not_known(version, change, words):
    attn = make_model(version).stages[0].blocks[1].attn
    change(attn)
    (entry,) = swinkernels.accelerate(attn).skipped
    assert words in entry.reason
    assert type(attn) is ShiftWindowMSA


def test_norms_of_another_kind():
    model = make_model().double()
    model.stages[0].blocks[1].norm2 = nn.RMSNorm(16, dtype=torch.float64)
    fast, x = copy.deepcopy(model), make_image(dtype=torch.float64)
    (entry,) = swinkernels.accelerate(fast, backend="reference").skipped
    assert entry.path == "stages.0.blocks.1"
    assert entry.reason.startswith("norm2 is a torch.nn.modules.normalization.RMSNorm")
    assert type(fast.stages[0].blocks[1]) is SwinBlock
    exact = run(model, x)
    assert_as_good(run(fast, x), exact, exact)


# verify and the report


@versions
@pytest.mark.parametrize("wrong", ["shift_size", "mask_value", "pad_qkv", "pad_order", "bias_table"])
def test_verify_finds_a_wrong_kernel_and_names_the_module(version, wrong, monkeypatch):
    model = make_model(version)
    op = adapter.window_attention_qkvpacked
    values = {"shift_size": 1, "mask_value": 0.0, "pad_qkv": None, "pad_order": "roll_then_pad"}

    def wrong_op(qkv, **arguments):
        if wrong == "bias_table":
            arguments["bias_table"] = arguments["bias_table"].flip(0)
        elif arguments["shift_size"]:
            arguments[wrong] = values[wrong]
        return op(qkv, **arguments)

    monkeypatch.setattr(adapter, "window_attention_qkvpacked", wrong_op)
    first = r"stages\.0\.blocks\.0" if wrong == "bias_table" else r"stages\.0\.blocks\.1"
    with pytest.raises(VerificationError, match=rf"{first}: the output is off by"):
        swinkernels.accelerate(model, verify=True)
    assert not any(isinstance(m, Accelerated) for m in model.modules())


def test_report():
    from swinkernels.ops._backends import NOT_INSTALLED

    report = swinkernels.accelerate(make_model(stage_cfgs={"block_cfgs": {"attn_cfgs": {"attn_drop": 0.1}}}))
    attention = next(e for e in report.replaced if e.module_class == "ShiftWindowMSA")
    assert attention.backend == ("cpu" if NOT_INSTALLED["cpu"] is None else "torch")
    assert "Attention in training: torch. Not cpu: it does not implement dropout_p" in attention.remarks
    block = next(e for e in report.replaced if e.module_class == "SwinBlock")
    assert block.backend == "torch"


# Configs


NAMES = {1: "SwinTransformer", 2: "SwinTransformerV2"}


@versions
def test_a_config_changes_only_the_type(version):
    import_modules_from_strings(imports=["swinkernels.integrations.mmpretrain"])
    options = config(version, drop_path_rate=0.1)
    torch.manual_seed(0)
    plain = MODELS.build({"type": NAMES[version], **options})
    torch.manual_seed(0)
    fast = MODELS.build({"type": f"SwinKernels{NAMES[version]}", **options})
    assert type(fast) is type(plain)
    kinds = Counter(type(m).__name__ for m in fast.modules() if isinstance(m, Accelerated))
    assert sum(kinds.values()) == sum(REPLACED[version].values())
    assert list(fast.state_dict()) == list(plain.state_dict())
    for m in (plain, fast):
        torch.manual_seed(2)
        m.init_weights()
        m.eval()
    x = make_image()
    for got, e in zip(fast(x), plain(x), strict=True):
        torch.testing.assert_close(got, e, rtol=1e-4, atol=1e-4)


def test_a_classifier_by_its_config():
    """A config in mmpretrain's style builds the classifier from mmpretrain's registry and mmengine's root registry."""
    text = f"""
custom_imports = dict(imports=["swinkernels.integrations.mmpretrain"], allow_failed_imports=False)
model = dict(
    type="ImageClassifier",
    backbone=dict(type="SwinKernelsSwinTransformer", backend="reference", **{config(out_indices=(1,))!r}),
    neck=dict(type="GlobalAveragePooling"),
    head=dict(type="LinearClsHead", num_classes=3, in_channels=32),
)
"""
    model = Config.fromstring(text, ".py").model
    classifier = MODELS.build(model)
    assert {m._swinkernels_backend for m in classifier.modules() if isinstance(m, Accelerated)} == {"reference"}
    classifier.eval()
    assert classifier(make_image()).shape == (2, 3)
    again = ROOT.build({**model, "type": "mmpretrain.ImageClassifier"})
    again.load_state_dict(classifier.state_dict(), strict=True)
    swinkernels.restore(again)
    model.backbone.pop("backend")
    model.backbone.type = "SwinTransformer"
    MODELS.build(model).load_state_dict(classifier.state_dict(), strict=True)


def test_old_checkpoints_still_load():
    """Old checkpoints name the last norm differently, and mmpretrain translates the name only for its own class."""
    model = make_model(out_indices=(1,))
    state = model.state_dict()
    for name in ("weight", "bias"):
        state[f"norm.{name}"] = state.pop(f"norm1.{name}")
    state["stages.0.blocks.1.attn.attn_mask"] = torch.ones(1)
    del state._metadata
    fast = MODELS.build({"type": "SwinKernelsSwinTransformer", **config(out_indices=(1,))})
    fast.eval()
    fast.load_state_dict(state, strict=True)
    torch.testing.assert_close(fast(make_image())[0], model(make_image())[0], rtol=1e-4, atol=1e-4)


def test_what_a_backbone_does_not_know_is_refused():
    import_modules_from_strings(imports=["swinkernels.integrations.mmpretrain"])
    with pytest.raises(TypeError, match="windows"):
        MODELS.build({"type": "SwinKernelsSwinTransformer", "windows": 3})
    with pytest.raises(ValueError, match="backend must be 'auto' or one of"):
        MODELS.build({"type": "SwinKernelsSwinTransformerV2", "backend": "gpu", **config(2)})


def test_a_drop_path_is_drawn_by_mmcv():
    """Accelerated attention ends with mmcv's drop path, as the library's own attention does."""
    attn = accelerated(make_model(drop_path_rate=0.5)).stages[1].blocks[1].attn.train()
    assert type(attn.drop) is DropPath
    assert attn.drop.drop_prob == 0.5
    y = attn(torch.randn(64, 30, 32), (5, 6))
    dropped = (y == 0).flatten(1).all(1)
    assert 10 < dropped.sum() < 54
    assert attention.ShiftWindowMSA in type(attn).__mro__
