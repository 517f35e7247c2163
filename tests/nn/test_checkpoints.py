"""Tests that load_pretrained loads checkpoints of each library into the models of this package."""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import timm
import torch
from timm.layers import resize_rel_pos_bias_table
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn
from torchvision.models import swin_transformer as torchvision_swin

from swinkernels.models import SwinTransformer, SwinUnet, load_pretrained
from swinkernels.nn import BasicLayer, PatchEmbed, PatchMerging
from tests.support.parity import randomise

SWIN = {"embed_dim": 8, "depths": (2, 1), "num_heads": (1, 2), "window_size": 4}
ARCH = {"embed_dims": 8, "depths": [2, 1], "num_heads": [1, 2]}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def timm_model(version: int, **options: Any) -> nn.Module:
    kind = timm.models.SwinTransformer if version == 1 else timm.models.SwinTransformerV2
    return kind(**{"img_size": 32, "patch_size": 2, "num_classes": 3, **SWIN, **options})


def torchvision_model(version: int) -> nn.Module:
    kinds = torchvision_swin.SwinTransformerBlockV2, torchvision_swin.PatchMergingV2
    options = {} if version == 1 else {"block": kinds[0], "downsample_layer": kinds[1]}
    return torchvision_swin.SwinTransformer([2, 2], 8, [2, 1], [1, 2], [4, 4], num_classes=3, **options)


def transformers_model(version: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
    config, kind = (
        (transformers.SwinConfig, transformers.SwinForImageClassification),
        (transformers.Swinv2Config, transformers.Swinv2ForImageClassification),
    )[version - 1]
    model = kind(config(image_size=32, patch_size=2, num_labels=3, **SWIN))

    class Logits(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x).logits

        def state_dict(self, *args: Any, **kwargs: Any) -> Any:
            return model.state_dict()

    logits = Logits()
    logits.inner = model
    return logits


def mmpretrain_model(version: int) -> nn.Module:
    pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")
    from mmpretrain.models import SwinTransformer as V1
    from mmpretrain.models import SwinTransformerV2 as V2

    options = {"img_size": 32, "patch_size": 2, "window_size": 4, "out_indices": (1,)}
    if version == 1:
        backbone = V1(ARCH, **options)
    else:
        backbone = V2({**ARCH, "extra_norm_every_n_blocks": 0}, **{**options, "window_size": [4, 4]})

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = backbone
            self.head = nn.ModuleDict({"fc": nn.Linear(16, 3)})

        def forward(self, x: Tensor) -> Tensor:
            return self.head["fc"](self.backbone(x)[-1].mean((2, 3)))

    return Classifier()


LIBRARIES = {
    "timm": timm_model,
    "torchvision": torchvision_model,
    "transformers": transformers_model,
    "mmpretrain": mmpretrain_model,
}


def ours(version: int = 1, **options: Any) -> SwinTransformer:
    return SwinTransformer(**{"img_size": 32, "patch_size": 2, "num_classes": 3, **SWIN, "version": version, **options})


def scrambled(model: nn.Module) -> nn.Module:
    """Randomise all parameters of ``model``, so that one loaded into the wrong place changes the results.

    Return ``model`` in float64 and eval mode.
    """
    randomise(model)
    for p in model.parameters():
        if p.dim() == 1:
            nn.init.normal_(p, mean=0.5, std=0.3)
    return model.double().eval()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("source", LIBRARIES)
@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
def test_same_logits(source, version, named):
    theirs = scrambled(LIBRARIES[source](version))
    model = ours(version).double().eval()
    loaded = load_pretrained(model, theirs.state_dict(), source if named else "auto")
    assert loaded.source == source and not loaded.kept and not loaded.resized
    assert sorted(loaded.loaded) == sorted(model.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(model(x), theirs(x), rtol=1e-6, atol=1e-6)  # torchvision's offsets are float32


def microsoft_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        re.sub(r"layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key).replace(
            ".fc.", "."
        ): v
        for key, v in state.items()
    }


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"model": s}, lambda s: {"state_dict": s, "epoch": 3}])
@pytest.mark.parametrize("prefix", ["", "module.", "module.encoder."])
def test_wrapped_and_prefixed(wrap, prefix):
    theirs = scrambled(timm_model(1))
    state = microsoft_names(theirs.state_dict())
    assert load_pretrained(ours(), wrap({prefix + k: v for k, v in state.items()})).source == "microsoft"


def test_backbone_of_a_detector():
    theirs = scrambled(timm_model(1))
    state = {f"backbone.{k}": v for k, v in microsoft_names(theirs.state_dict()).items() if not k.startswith("head")}
    state |= {
        "neck.conv.weight": torch.zeros(3),
        "backbone.norm0.weight": torch.ones(8),
        "backbone.norm0.bias": torch.ones(8),
    }
    model = ours(out_indices=(0, 1))
    loaded = load_pretrained(model, state)
    assert loaded.left == {
        "neck.conv.weight": "it is outside the backbone, whose keys begin with 'backbone.'",
        "norm.weight": "the model has no norm there",
        "norm.bias": "the model has no norm there",
    }
    assert loaded.kept == ["norm1.weight", "norm1.bias"]
    assert torch.equal(model.norm0.bias, torch.ones(8))


def test_features_only_of_timm():
    theirs = scrambled(timm.create_model("swin_tiny_patch4_window7_224", features_only=True, img_size=32, **SWIN))
    model = ours(patch_size=4, out_indices=(0, 1)).double()
    loaded = load_pretrained(model, theirs.state_dict())
    assert loaded.source == "timm" and loaded.kept == [f"norm{i}.{n}" for i in (0, 1) for n in ("weight", "bias")]
    assert torch.equal(model.layers[0].downsample.reduction.weight, theirs.layers_1.downsample.reduction.weight)


def test_monai_in_stages_of_ones_own():
    swin_unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="MONAI is not installed")
    theirs = scrambled(
        swin_unetr.SwinTransformer(
            1, 12, (2, 2, 2), (2, 2, 2), depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 4), spatial_dims=3
        )
    )

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = PatchEmbed(2, 1, 12, norm=False, spatial_dims=3)
            options = {"window_size": (2, 2, 2), "small_maps": "clip"}
            merging = functools.partial(PatchMerging, spatial_dims=3, order="monai")
            self.layers = nn.ModuleList(
                BasicLayer(12 << i, None, depth, heads, downsample=merging if i < 3 else None, **options)
                for i, (depth, heads) in enumerate(((2, 1), (1, 2), (1, 4), (1, 4)))
            )

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x)
            for layer in self.layers:
                x = layer(x)
            return x

    model = Encoder().double().eval()
    loaded = load_pretrained(model, {f"module.{k}": v for k, v in theirs.state_dict().items()})
    assert loaded.source == "monai" and not loaded.kept
    assert set(loaded.left.values()) == {"the model does not merge after its last stage"}
    x = torch.randn(1, 1, 16, 16, 16, dtype=torch.float64)
    expected = theirs.layers4[0].blocks[0]  # before its merging
    seen: list[Tensor] = []
    expected.register_forward_hook(lambda module, args, out: seen.append(out))
    theirs(x)
    torch.testing.assert_close(model(x), seen[0])


def test_swin_unet_gets_the_encoder_twice():
    model = SwinUnet(64, num_classes=2, **{**SWIN, "depths": (2, 2), "window_size": 4})
    state = microsoft_names(scrambled(timm_model(1, img_size=64, patch_size=4, depths=(2, 2))).state_dict())
    loaded = load_pretrained(model, state)
    up, down = model.layers_up[1].blocks, model.layers[0].blocks
    assert torch.equal(up[1].attn.qkv.weight, down[1].attn.qkv.weight)
    assert "head.weight" in loaded.left and "output.weight" in loaded.kept


# --- other windows


WINDOWS = pytest.mark.parametrize("window", [(3, 3), (6, 6), (12, 12), (3, 6)], ids=str)


def loaded_with_window(source: str, window: tuple[int, int]) -> tuple[dict[str, Tensor], SwinTransformer, Any]:
    theirs = scrambled(timm_model(1)).float()
    state = theirs.state_dict() if source == "timm" else microsoft_names(theirs.state_dict())
    model = ours(window_size=window, img_size=None)
    return state, model, load_pretrained(model, state)


TABLE = "layers.0.blocks.1.attn.relative_position_bias_table"


@WINDOWS
def test_table_resized_as_timm_does(window):
    state, model, loaded = loaded_with_window("timm", window)
    got = model.get_parameter(TABLE)
    expected = resize_rel_pos_bias_table(state[TABLE], window, tuple(got.shape))
    torch.testing.assert_close(got.detach(), expected, rtol=1e-4, atol=1e-5)
    assert loaded.resized[TABLE] == "linear between geometric offsets, as in timm"


@WINDOWS
def test_table_resized_as_microsoft_does(window):
    state, model, loaded = loaded_with_window("microsoft", window)
    sides = [2 * w - 1 for w in window]
    expected = nn.functional.interpolate(state[TABLE].T.reshape(1, 1, 7, 7), sides, mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.get_parameter(TABLE).detach(), expected.reshape(1, -1).T)
    assert loaded.resized[TABLE] == "bicubic, as in Microsoft's code"


@WINDOWS
def test_table_resized_as_mmpretrain_does(window):
    interpolate = pytest.importorskip("scipy.interpolate")
    theirs = scrambled(mmpretrain_model(1)).float()
    model = ours(window_size=window, img_size=None)
    loaded = load_pretrained(model, theirs.state_dict())
    # SciPy removed interp2d, which mmpretrain calls; RectBivariateSpline replaces it on regular grids.
    places = []
    for w in window:
        low, high = 1.01, 1.5
        while high - low > 1e-6:
            ratio = (low + high) / 2
            low, high = (low, ratio) if (1 - ratio**3) / (1 - ratio) > w - 1 else (ratio, high)
        distances = [sum(ratio**j for j in range(i)) for i in (1, 2, 3)]
        places.append([-d for d in reversed(distances)] + [0, *distances])
    table = theirs.state_dict()["backbone.stages.0.blocks.1.attn.w_msa.relative_position_bias_table"]
    spline = interpolate.RectBivariateSpline(*places, table.reshape(7, 7).numpy())
    expected = torch.tensor(spline(*(range(1 - w, w) for w in window))).float().reshape(-1, 1)
    torch.testing.assert_close(model.get_parameter(TABLE).detach(), expected, rtol=1e-3, atol=1e-3)
    assert loaded.resized[TABLE] == "cubic between geometric offsets, as in mmpretrain"


def test_source_without_a_rule_says_so():
    model = ours(window_size=6, img_size=None)
    loaded = load_pretrained(model, scrambled(torchvision_model(1)).state_dict())
    assert loaded.resized[TABLE] == "bicubic, as in Microsoft's code; torchvision has no rule for resizing"
    assert "3 bias tables resized, such as layers.0.blocks.0.attn" in str(loaded)


def test_window_of_v2_has_to_be_named():
    state = scrambled(torchvision_model(2)).state_dict()
    with pytest.raises(
        ValueError, match=r"the checkpoint has offsets of a window \(4, 4\); the model has window \(6, 6\)"
    ):
        load_pretrained(ours(2, window_size=6, img_size=None), state)
    model = ours(2, window_size=6, img_size=None, pretrained_window_sizes=(4, 4))
    assert not load_pretrained(model, state).kept


# --- checkpoints that do not fit


def test_head_for_other_classes_is_left():
    model = ours(num_classes=7)
    before = model.head.weight.clone()
    loaded = load_pretrained(model, scrambled(timm_model(1)).state_dict())
    assert loaded.left["head.weight"] == "the head has 3 classes; the model's head has 7"
    assert torch.equal(model.head.weight, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 2)}, r"layers\.1\.blocks\.1\.norm1\.weight: not in the checkpoint"),
        ({"embed_dim": 16}, r"patch_embed\.proj\.weight: shape \(8, 3, 2, 2\), in the model \(16, 3, 2, 2\)"),
        ({"depths": (1, 1)}, r"layers\.0\.blocks\.1\.attn\.qkv\.weight: the model has no such parameter"),
        ({"num_heads": (2, 2)}, r"relative_position_bias_table: shape \(49, 1\), in the model \(49, 2\)"),
        ({"version": 2}, r"attn\.relative_position_bias_table: the model has no such parameter"),
    ],
)
def test_misfits_are_named_and_nothing_is_loaded(options, message):
    model = ours(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, scrambled(timm_model(1)).state_dict())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_an_index_of_another_order_is_a_misfit_and_nothing_is_loaded():
    state = scrambled(torchvision_model(1)).state_dict()
    state["features.1.0.attn.relative_position_index"] = state["features.1.0.attn.relative_position_index"].flip(0)
    model = ours()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"layers\.0\.blocks\.0\.attn\.relative_position_index: differs from the index of Microsoft's"
    ):
        load_pretrained(model, state)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_absolute_position_embedding_is_a_misfit():
    state = timm_model(1).state_dict() | {"absolute_pos_embed": torch.zeros(1, 256, 8)}
    with pytest.raises(ValueError, match="absolute_pos_embed: the model has no such parameter"):
        load_pretrained(ours(), state)


@pytest.mark.parametrize(
    ("checkpoint", "source", "error", "message"),
    [
        ({"conv.weight": torch.zeros(1)}, "auto", ValueError, "this is not a Swin checkpoint of any known source"),
        ({"conv.weight": torch.zeros(1)}, "monai", ValueError, "this is not a Swin checkpoint of monai"),
        ({}, "auto", TypeError, "must be a state dict"),
        ({"conv.weight": torch.zeros(1)}, "keras", ValueError, "source must be 'auto' or one of"),
    ],
)
def test_errors(checkpoint, source, error, message):
    with pytest.raises(error, match=message):
        load_pretrained(ours(), checkpoint, source)


# --- groups of parameters


@pytest.mark.parametrize(("version", "without_decay"), [(1, 120), (2, 168)])
def test_weight_decay_as_in_timm_and_microsoft(version, without_decay):
    options = {"embed_dim": 12, "depths": (2, 2, 6, 2), "num_heads": (1, 2, 4, 8), "num_classes": 3}
    model = ours(version, **options)
    groups = param_groups_weight_decay(model, no_weight_decay_list=model.no_weight_decay())
    assert [len(g["params"]) for g in groups if g["weight_decay"] == 0.0] == [without_decay]
    words = model.no_weight_decay_keywords()
    by_microsoft = [n for n, p in model.named_parameters() if p.dim() == 1 or any(w in n for w in words)]
    assert len(by_microsoft) == without_decay


@pytest.mark.parametrize("version", [1, 2])
def test_layer_decay_as_in_timm(version):
    options = {"depths": (2, 2, 3), "num_heads": (1, 2, 4)}
    model, theirs = ours(version, **options), timm_model(version, **options)

    def scales(model: nn.Module) -> dict[str, float]:
        names = {p: n for n, p in model.named_parameters()}
        groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.5)
        return {names[p]: g["lr_scale"] for g in groups for p in g["params"]}

    expected = microsoft_names(scales(theirs))
    assert scales(model) == expected
    assert len(set(expected.values())) > 8
