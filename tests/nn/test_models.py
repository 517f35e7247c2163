"""Tests swinkernels.models against timm's models with the same weights, and Swin-Unet against plain PyTorch."""

from __future__ import annotations

import copy
import re

import pytest
import timm
import torch
from torch import Tensor, nn

from swinkernels.models import SwinTransformer, SwinUnet
from tests.nn.test_blocks import make_map
from tests.support.parity import assert_as_good, randomise, run

SMALL = {"embed_dim": 16, "depths": (2, 2, 1), "num_heads": (1, 2, 4), "window_size": 4}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def of_timm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return timm's ``state`` with Microsoft's keys: merging belongs to the previous stage, ``head.fc`` is ``head``."""

    def renamed(key: str) -> str:
        key = re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        return key.replace("head.fc.", "head.")

    return {renamed(key): value for key, value in state.items()}


def pair(version: int, size: tuple[int, int], **options) -> tuple[nn.Module, nn.Module]:
    kind = timm.models.SwinTransformer if version == 1 else timm.models.SwinTransformerV2
    theirs = kind(img_size=size, num_classes=5, patch_size=2, drop_path_rate=0.0, **SMALL)
    ours = SwinTransformer(
        size, 2, 3, 5, **SMALL, drop_path_rate=0.0, version=version, pad_order="roll_then_pad", **options
    )
    randomise(theirs)
    return ours.double().eval(), theirs.double().eval()


@pytest.mark.parametrize("size", [(32, 32), (36, 28)], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_classifier_is_timms(version, size):
    ours, theirs = pair(version, size)
    ours.load_state_dict(of_timm(theirs.state_dict()), strict=True)
    expected = of_timm(run(theirs, make_map(2, 3, *size, dtype=torch.float64)))
    assert_as_good(run(ours, make_map(2, 3, *size, dtype=torch.float64)), expected, expected)


def test_feature_maps_are_those_of_the_stages():
    ours, theirs = pair(1, (32, 32), out_indices=(0, 2))
    state = {k: v for k, v in of_timm(theirs.state_dict()).items() if not k.startswith(("norm", "head"))}
    missing, unexpected = ours.load_state_dict(state, strict=False)
    assert sorted(missing) == ["norm0.bias", "norm0.weight", "norm2.bias", "norm2.weight"] and not unexpected
    x = make_map(2, 3, 32, 32, dtype=torch.float64)
    of_stages = theirs.forward_intermediates(x, indices=[0, 2], intermediates_only=True)
    got = ours(x)
    assert [tuple(m.shape) for m in got] == [(2, 16, 16, 16), (2, 64, 4, 4)]
    for m, e in zip(got, of_stages, strict=True):
        normed = nn.functional.layer_norm(e.permute(0, 2, 3, 1), m.shape[1:2]).permute(0, 3, 1, 2)
        torch.testing.assert_close(m, normed)


def test_feature_maps_leave_no_parameter_without_a_gradient():
    model = SwinTransformer(32, 2, drop_path_rate=0.0, out_indices=(1,), **SMALL)
    model(make_map(1, 3, 32, 32))[0].sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("version", [1, 2])
def test_any_size_and_training_with_checkpoints(version):
    model = SwinTransformer(None, 2, num_classes=3, version=version, **SMALL).double()
    torch.manual_seed(0)
    expected = run(model.train(), make_map(2, 3, 34, 46, dtype=torch.float64))
    saved = copy.deepcopy(model)
    for layer in saved.layers:
        layer.use_checkpoint = True
    torch.manual_seed(0)
    assert_as_good(run(saved, make_map(2, 3, 34, 46, dtype=torch.float64)), expected, expected)


def plain_unet(model: SwinUnet, x: Tensor) -> Tensor:
    """Compute the output of the three-stage ``model`` for ``x``, with sequences between its modules as in Swin-Unet."""
    x = model.patch_embed.proj(x)
    height, width = x.shape[2:]
    x = model.patch_embed.norm(x.flatten(2).transpose(1, 2))
    skips = []
    for i, layer in enumerate(model.layers):
        skips.append(x)
        size = height >> i, width >> i
        x = layer(x, size)
    x = model.norm(x)
    x = model.layers_up[0](x, (height >> 2, width >> 2))
    x = model.concat_back_dim[1](torch.cat([x, skips[1]], -1))
    x = model.layers_up[1](x, (height >> 1, width >> 1))
    x = model.concat_back_dim[2](torch.cat([x, skips[0]], -1))
    x = model.norm_up(model.layers_up[2](x, (height, width)))
    b, _, c = x.shape
    wide = model.up.expand(x).view(b, height, width, 4, 4, c).permute(0, 1, 3, 2, 4, 5)
    wide = model.up.norm(wide.reshape(b, 4 * height, 4 * width, c))
    return model.output(wide.permute(0, 3, 1, 2))


def test_swin_unet():
    options = {**SMALL, "depths": (1, 2, 1)}
    model = SwinUnet((64, 48), num_classes=4, drop_path_rate=0.0, **options).double().eval()
    randomise(model)
    x = make_map(2, 3, 64, 48, dtype=torch.float64)
    out = model(x)
    assert out.shape == (2, 4, 64, 48)
    torch.testing.assert_close(out, plain_unet(model, x))
    roots = {key.split(".")[0] for key in model.state_dict()}
    assert roots == {"patch_embed", "layers", "norm", "layers_up", "concat_back_dim", "norm_up", "up", "output"}
    assert all("grad" not in name or g.isfinite().all() for name, g in run(model, x).items())
    assert {"layers_up.0.expand.weight", "layers_up.1.upsample.norm.weight", "up.expand.weight"} <= set(
        model.state_dict()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SwinTransformer(depths=(2, 2)), "num_heads must have one value for each of the 2 depths"),
        (lambda: SwinTransformer(out_indices=(4,)), "out_indices must be stages"),
        (lambda: SwinTransformer(version=3), "version"),
        (lambda: SwinUnet(None, **SMALL)(torch.zeros(1, 3, 40, 64)), "multiples of 16"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
