"""Tests reference patch merging, expanding and embedding against the published modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinkernels import reference
from tests.support.side_by_side import assert_same, draw, randomised

C = 5
SIZES = [(4, 6), (5, 6), (4, 7), (3, 5), (1, 1)]
SIZES_3D = [(4, 2, 6), (3, 4, 5), (1, 3, 2), (2, 2, 3)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("library", "version"), [("timm", 1), ("timm", 2), ("torchvision", 1), ("torchvision", 2)])
def test_merging_timm_and_torchvision(library, version, size):
    name = {
        ("timm", 1): ("timm.models.swin_transformer", "PatchMerging"),
        ("timm", 2): ("timm.models.swin_transformer_v2", "PatchMerging"),
        ("torchvision", 1): ("torchvision.models.swin_transformer", "PatchMerging"),
        ("torchvision", 2): ("torchvision.models.swin_transformer", "PatchMergingV2"),
    }[library, version]
    module = pytest.importorskip(name[0], reason=f"{library} is not installed")
    merge = randomised(getattr(module, name[1])(C))
    x = draw(2, *size, C)
    assert_same(
        lambda: reference.patch_merging(
            x, merge.norm.weight, merge.norm.bias, merge.reduction.weight, norm="pre" if version == 1 else "post"
        ),
        lambda: merge(x),
        [x, *merge.parameters()],
    )


@pytest.mark.parametrize(
    ("name", "size", "order"),
    [
        *(("PatchMerging", size, "monai") for size in SIZES + SIZES_3D),
        *(("PatchMergingV2", size, "row_major" if len(size) == 3 else "swin") for size in SIZES[:2] + SIZES_3D),
    ],
)
def test_merging_monai(name, size, order):
    unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="monai is not installed")
    merge = randomised(getattr(unetr, name)(C, spatial_dims=len(size)))
    x = draw(2, *size, C)
    if order == "monai" and len(size) == 3:
        # The order changed in MONAI 1.5: determine the order of the installed version.
        probe = torch.arange(8.0).reshape(1, 2, 2, 2, 1)
        asked = unetr.PatchMerging(1, norm_layer=lambda n: nn.Identity(), spatial_dims=3)
        asked.reduction = nn.Identity()
        order = "monai_legacy" if asked(probe).flatten().unique().numel() < 8 else "monai"
    assert_same(
        lambda: reference.patch_merging(x, merge.norm.weight, merge.norm.bias, merge.reduction.weight, order=order),
        lambda: merge(x),
        [x, *merge.parameters()],
    )


def merged_order(order: str, rank: int, channels: int = 1) -> list[int]:
    """Return, for each merged channel, the row-major index of its input element.

    The inputs are 0, 1, 2, ... and the norm is monotonic, so the rank of each output is this index.
    """
    n = 2**rank * channels
    x = torch.arange(float(n), dtype=torch.float64).reshape(1, *(2,) * rank, channels)
    y = reference.patch_merging(x, None, None, torch.eye(n, dtype=torch.float64), order=order, eps=0.0).flatten()
    return y.argsort().argsort().tolist()


@pytest.mark.parametrize(
    ("order", "rank", "expected"),
    [
        ("swin", 2, [0, 2, 1, 3]),
        ("monai", 2, [0, 2, 1, 3]),
        ("monai_legacy", 2, [0, 2, 1, 3]),
        ("row_major", 2, [0, 1, 2, 3]),
        ("swin", 3, [0, 4, 2, 6, 1, 5, 3, 7]),
        ("row_major", 3, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("monai", 3, [0, 4, 2, 1, 6, 5, 3, 7]),
    ],
)
def test_order(order, rank, expected):
    """Each order lists the neighbours by their row-major index, 4 d + 2 h + w."""
    assert merged_order(order, rank) == expected


def test_monai_legacy_order():
    """Order "monai_legacy" merges the slices of MONAI up to 1.4: two neighbours occur twice and two never."""
    x, weight = draw(2, 3, 4, 5, C), draw(2 * C, 8 * C, seed=3)
    norm_weight, norm_bias = draw(8 * C, seed=4), draw(8 * C, seed=5)

    def literal():
        y = F.pad(x, (0, 0, 0, 1, 0, 0, 0, 1))
        x0 = y[:, 0::2, 0::2, 0::2, :]
        x1 = y[:, 1::2, 0::2, 0::2, :]
        x2 = y[:, 0::2, 1::2, 0::2, :]
        x3 = y[:, 0::2, 0::2, 1::2, :]
        x4 = y[:, 1::2, 0::2, 1::2, :]
        x7 = y[:, 1::2, 1::2, 1::2, :]
        y = torch.cat([x0, x1, x2, x3, x4, x2, x3, x7], -1)
        return F.layer_norm(y, (8 * C,), norm_weight, norm_bias) @ weight.T

    assert_same(
        lambda: reference.patch_merging(x, norm_weight, norm_bias, weight, order="monai_legacy"),
        literal,
        [x, weight, norm_weight, norm_bias],
    )


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("size", SIZES)
def test_merging_unfold(size, norm):
    """mmcv and mmpretrain use torch's Unfold, which puts the four values of each channel next to each other."""
    x, weight = draw(2, *size, C), draw(7, 4 * C, seed=3)
    width = 4 * C if norm == "pre" else 7
    norm_weight, norm_bias = draw(width, seed=4), draw(width, seed=5)

    def literal():
        y = F.pad(x.permute(0, 3, 1, 2), (0, size[1] % 2, 0, size[0] % 2))
        shape = [n // 2 for n in y.shape[2:]]
        y = F.unfold(y, kernel_size=2, stride=2).transpose(1, 2).reshape(2, *shape, 4 * C)
        if norm == "pre":
            return F.layer_norm(y, (width,), norm_weight, norm_bias) @ weight.T
        return F.layer_norm(y @ weight.T, (width,), norm_weight, norm_bias)

    assert_same(
        lambda: reference.patch_merging(x, norm_weight, norm_bias, weight, order="unfold", norm=norm),
        literal,
        [x, weight, norm_weight, norm_bias],
    )


@pytest.mark.parametrize("order", ["swin", "row_major", "unfold"])
def test_merging_frame_by_frame(order):
    """With a weight for 4C channels, a 3D map is merged frame by frame, as in Video-Swin and Aurora."""
    x, weight, norm_weight, norm_bias = draw(2, 3, 5, 4, C), draw(7, 4 * C, seed=3), draw(4 * C), draw(4 * C, seed=5)
    call = lambda y: reference.patch_merging(y, norm_weight, norm_bias, weight, order=order)  # noqa: E731
    assert_same(
        lambda: call(x),
        lambda: torch.stack([call(x[:, d]) for d in range(3)], dim=1),
        [x, weight, norm_weight, norm_bias],
    )


def test_padding_enters_the_statistics():
    """The token of a 1 x 1 map is normalised together with its three zero neighbours."""
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    y = reference.patch_merging(x, None, None, torch.eye(4, dtype=torch.float64), eps=0.0)
    expected = torch.tensor([3.0, -1.0, -1.0, -1.0], dtype=torch.float64) / 3**0.5
    torch.testing.assert_close(y.flatten(), expected)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_merging_gradcheck(norm):
    width = 8 if norm == "pre" else 3
    leaves = [draw(1, 3, 2, 2), draw(width, seed=2), draw(width, seed=3), draw(3, 8, seed=4)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    assert torch.autograd.gradcheck(lambda *a: reference.patch_merging(*a, norm=norm), leaves)


@pytest.mark.parametrize("batch", [0, 2])
@pytest.mark.parametrize(("factor", "out"), [(2, 6), (4, 12), ((2, 4), 6)])
def test_expanding_swin_unet(factor, out, batch):
    """PatchExpand and FinalPatchExpand_X4 are a Linear, 'b h w (p1 p2 c) -> b (h p1) (w p2) c', and a LayerNorm."""
    einops = pytest.importorskip("einops", reason="einops is not installed")
    p1, p2 = factor if isinstance(factor, tuple) else (factor, factor)
    x, weight = draw(batch, 3, 2, 12), draw(p1 * p2 * out, 12, seed=3)
    norm_weight, norm_bias = draw(out, seed=4), draw(out, seed=5)

    def literal():
        y = einops.rearrange(x @ weight.T, "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=p1, p2=p2, c=out)
        return F.layer_norm(y, (out,), norm_weight, norm_bias)

    ours = lambda: reference.patch_expanding(x, weight, norm_weight, norm_bias, factor=factor)  # noqa: E731
    if batch:
        assert_same(ours, literal, [x, weight, norm_weight, norm_bias])
    else:
        assert ours().shape == literal().shape


def test_expanding_3d():
    einops = pytest.importorskip("einops", reason="einops is not installed")
    x, weight, norm_weight, norm_bias = draw(2, 3, 2, 1, 4), draw(24, 4, seed=3), draw(3, seed=4), draw(3, seed=5)

    def literal():
        y = einops.rearrange(x @ weight.T, "b d h w (a p q c) -> b (d a) (h p) (w q) c", a=2, p=2, q=2)
        return F.layer_norm(y, (3,), norm_weight, norm_bias)

    assert_same(
        lambda: reference.patch_expanding(x, weight, norm_weight, norm_bias),
        literal,
        [x, weight, norm_weight, norm_bias],
    )
    frames = reference.patch_expanding(x, weight[:12], norm_weight, norm_bias, factor=(1, 2, 2))
    single = reference.patch_expanding(x[:, 1], weight[:12], norm_weight, norm_bias)
    torch.testing.assert_close(frames[:, 1], single, rtol=1e-12, atol=1e-12)


def test_expanding_undoes_merging():
    """Row-major merging with an identity weight, then expanding without a Linear, gives each token's layer norm."""
    x = draw(1, 4, 6, 8)
    merged = reference.patch_merging(x, None, None, torch.eye(32, dtype=torch.float64), order="row_major", norm="pre")
    back = reference.patch_expanding(merged, None, None, None)
    torch.testing.assert_close(back, reference.layer_norm(x), rtol=1e-4, atol=1e-4)  # eps acts twice


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(("size", "patch"), [((8, 12), 4), ((9, 5), 4), ((6, 6), 2)])
def test_embed_timm(size, patch, has_norm):
    layers = pytest.importorskip("timm.layers", reason="timm is not installed")
    embed = layers.PatchEmbed(
        None, patch, 3, 10, norm_layer=nn.LayerNorm if has_norm else None, output_fmt="NHWC", dynamic_img_pad=True
    )
    embed = randomised(embed)
    x = draw(2, 3, *size)
    norm = (embed.norm.weight, embed.norm.bias) if has_norm else ()
    assert_same(
        lambda: reference.patch_embed(x, embed.proj.weight, embed.proj.bias, *norm),
        lambda: embed(x),
        [x, *embed.parameters()],
    )


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize(
    ("size", "patch"), [((8, 6), (2, 2)), ((7, 6), (4, 4)), ((4, 6, 2), (2, 2, 2)), ((3, 5, 9), (2, 4, 4))]
)
def test_embed_monai(size, patch, has_norm):
    blocks = pytest.importorskip("monai.networks.blocks", reason="monai is not installed")
    embed = blocks.PatchEmbed(patch, 2, 6, norm_layer=nn.LayerNorm if has_norm else None, spatial_dims=len(size))
    embed = randomised(embed)
    x = draw(2, 2, *size)
    norm = (embed.norm.weight, embed.norm.bias) if has_norm else ()
    assert_same(
        lambda: reference.patch_embed(x, embed.proj.weight, embed.proj.bias, *norm),
        lambda: embed(x).movedim(1, -1),
        [x, *embed.parameters()],
    )


def test_empty_batch():
    x = draw(0, 5, 4, C).requires_grad_()
    out = reference.patch_merging(x, None, None, draw(7, 4 * C))
    assert out.shape == (0, 3, 2, 7)
    assert torch.autograd.grad(out.sum(), x)[0].shape == x.shape
    assert reference.patch_embed(draw(0, 3, 9, 8), draw(6, 3, 4, 4)).shape == (0, 3, 2, 6)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: reference.patch_merging(draw(4, 4, C), None, None, draw(7, 4 * C)), "x must be"),
        (lambda: reference.patch_merging(draw(1, 4, 4, C), None, None, draw(7, 8 * C)), "weight"),
        (lambda: reference.patch_merging(draw(1, 4, 4, C), None, None, draw(7, 4 * C), order="timm"), "order"),
        (lambda: reference.patch_merging(draw(1, 4, 4, C), None, None, draw(7, 4 * C), norm="both"), "norm"),
        (lambda: reference.patch_merging(draw(1, 4, 4, C), draw(7), None, draw(7, 4 * C)), "weight"),
        (lambda: reference.patch_expanding(draw(4, 4, C), None, None, None), "x must be"),
        (lambda: reference.patch_expanding(draw(1, 4, 4, C), None, None, None), "channels"),
        (lambda: reference.patch_expanding(draw(1, 4, 4, C), None, None, None, factor=0), "factor"),
        (lambda: reference.patch_embed(draw(1, 3, 8, 8), draw(6, 2, 4, 4)), "weight"),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call()
