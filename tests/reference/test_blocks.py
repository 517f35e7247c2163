"""Tests the reference norms and block halves against torch and whole published blocks."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from swinkernels import reference
from tests.support.side_by_side import assert_same, draw, randomised

DIM, HEADS = 12, 3


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_layer_norm(affine, eps):
    x, weight, bias = draw(2, 3, DIM), draw(DIM, seed=2) if affine else None, draw(DIM, seed=3) if affine else None
    assert_same(
        lambda: reference.layer_norm(x, weight, bias, eps=eps),
        lambda: F.layer_norm(x, (DIM,), weight, bias, eps),
        [x, weight, bias],
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_rounds_once(dtype):
    x = (3 + draw(64, DIM)).to(dtype)
    exact = F.layer_norm(x.double(), (DIM,))
    assert torch.equal(reference.layer_norm(x), exact.float().to(dtype)) or (
        (reference.layer_norm(x).double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    )


DROP = torch.tensor([0.0, 1.25, 1.25], dtype=torch.float64)


@pytest.mark.parametrize("scale", [None, DROP])
def test_residual_layer_norm(scale):
    x, y, weight, bias = draw(3, 4, DIM), draw(3, 4, DIM, seed=2), draw(DIM, seed=3), draw(DIM, seed=4)
    d = 1.0 if scale is None else scale[:, None, None]
    ours = lambda: reference.residual_layer_norm(x, y, weight, bias, drop_path_scale=scale)  # noqa: E731
    assert_same(lambda: ours()[0], lambda: x + d * y, [x, y])
    norm = lambda t: F.layer_norm(t, (DIM,), weight, bias)  # noqa: E731
    assert_same(lambda: torch.cat(ours()), lambda: torch.cat([x + d * y, norm(x + d * y)]), [x, y, weight, bias])
    assert_same(
        lambda: reference.residual_post_norm(x, y, weight, bias, drop_path_scale=scale),
        lambda: x + d * norm(y),
        [x, y, weight, bias],
    )


class FixedDropPath(nn.Module):
    """A DropPath with the fixed per-sample factors DROP."""

    def forward(self, x):
        return x * DROP.reshape(-1, *(1,) * (x.dim() - 1))


@pytest.mark.parametrize(("size", "shift"), [((8, 8), 0), ((7, 10), 2)])
def test_timm_v1_block(size, shift):
    swin = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    block = randomised(swin.SwinTransformerBlock(DIM, size, HEADS, window_size=4, shift_size=shift))
    block.drop_path1 = block.drop_path2 = FixedDropPath()
    x = draw(3, *size, DIM)

    def ours():
        y = reference.attention_half(
            x,
            block.norm1.weight,
            block.norm1.bias,
            block.attn.qkv.weight,
            block.attn.qkv.bias,
            block.attn.proj.weight,
            block.attn.proj.bias,
            block.attn.relative_position_bias_table,
            num_heads=HEADS,
            window_size=block.window_size,
            shift_size=block.shift_size,
            pad_order="roll_then_pad",
            drop_path_scale=DROP,
        )
        return mlp(block, y, "pre", block.mlp.fc1, block.mlp.fc2, DROP)

    assert_same(ours, lambda: block(x), [x, *block.parameters()])


@pytest.mark.parametrize(("size", "shift"), [((8, 8), 0), ((7, 10), 2)])
def test_timm_v2_block(size, shift):
    swin = pytest.importorskip("timm.models.swin_transformer_v2", reason="timm is not installed")
    block = randomised(swin.SwinTransformerV2Block(DIM, size, HEADS, 4, shift))
    block.drop_path1 = block.drop_path2 = FixedDropPath()
    attn = block.attn
    x = draw(3, *size, DIM)

    def ours():
        y = reference.attention_half(
            x,
            block.norm1.weight,
            block.norm1.bias,
            attn.qkv.weight,
            torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]),
            attn.proj.weight,
            attn.proj.bias,
            16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, HEADS)),
            num_heads=HEADS,
            window_size=block.window_size,
            shift_size=block.shift_size,
            logit_scale=attn.logit_scale,
            norm="post",
            pad_order="roll_then_pad",
            drop_path_scale=DROP,
        )
        return mlp(block, y, "post", block.mlp.fc1, block.mlp.fc2, DROP)

    assert_same(ours, lambda: block(x), [x, *block.parameters()], tolerance=1e-9)


@pytest.mark.parametrize("version", [1, 2])
def test_torchvision_block(version):
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    size, window, shift = (7, 10), (4, 4), (2, 2)
    cls = swin.SwinTransformerBlock if version == 1 else swin.SwinTransformerBlockV2
    block = randomised(cls(DIM, HEADS, list(window), list(shift)))
    attn = block.attn
    x = draw(2, *size, DIM)

    def ours():
        bias, extra = attn.qkv.bias, {}
        if version == 1:
            table = attn.relative_position_bias_table
        else:
            bias = torch.cat([bias[:DIM], torch.zeros_like(bias[:DIM]), bias[2 * DIM :]])
            table = 16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, HEADS))
            extra = {"logit_scale": attn.logit_scale, "norm": "post"}
        y = reference.attention_half(
            x,
            block.norm1.weight,
            block.norm1.bias,
            attn.qkv.weight,
            bias,
            attn.proj.weight,
            attn.proj.bias,
            table,
            num_heads=HEADS,
            window_size=window,
            shift_size=shift,
            **extra,
        )
        return mlp(block, y, "pre" if version == 1 else "post", block.mlp[0], block.mlp[3], None)

    assert_same(ours, lambda: block(x), [x, *block.parameters()], tolerance=1e-9)


def mlp(block, x, norm, fc1, fc2, drop_path_scale, **options):
    return reference.mlp_half(
        x,
        block.norm2.weight,
        block.norm2.bias,
        fc1.weight,
        fc1.bias,
        fc2.weight,
        fc2.bias,
        norm=norm,
        drop_path_scale=drop_path_scale,
        **options,
    )


@pytest.mark.parametrize(("size", "window"), [((5, 7), (4, 4)), ((3, 5, 4), (2, 3, 3))])
def test_monai_block(size, window):
    unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="monai is not installed")
    shift = tuple(w // 2 for w in window)
    block = randomised(unetr.SwinTransformerBlock(DIM, HEADS, window, shift))
    used, used_shift = unetr.get_window_size(size, window, shift)
    frame = [math.ceil(s / w) * w for s, w in zip(size, used, strict=True)]
    mask = unetr.compute_mask(frame, used, used_shift, torch.device("cpu"))
    x = draw(2, *size, DIM)

    def ours():
        y = reference.attention_half(
            x,
            block.norm1.weight,
            block.norm1.bias,
            block.attn.qkv.weight,
            block.attn.qkv.bias,
            block.attn.proj.weight,
            block.attn.proj.bias,
            block.attn.relative_position_bias_table,
            num_heads=HEADS,
            window_size=used,
            shift_size=used_shift,
            table_window=window,
        )
        return mlp(block, y, "pre", block.mlp.linear1, block.mlp.linear2, None)

    assert_same(ours, lambda: block(x, mask), [x, *block.parameters()])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_mlp_half_without_residual(norm, approximate):
    x, w1, b1, w2 = draw(2, 3, 4), draw(9, 4, seed=2), draw(9, seed=3), draw(4, 9, seed=4)

    def literal():
        y = F.layer_norm(x, (4,)) if norm == "pre" else x
        y = F.linear(F.gelu(F.linear(y, w1, b1), approximate=approximate), w2)
        return F.layer_norm(y, (4,)) if norm == "post" else y

    assert_same(
        lambda: reference.mlp_half(x, None, None, w1, b1, w2, None, norm=norm, approximate=approximate, residual=False),
        literal,
        [x, w1, b1, w2],
    )


def test_pad_tokens_are_zero_after_the_norm():
    """A pad token's q, k and v are the bias of the qkv projection; the norm's bias is not applied to it."""
    x, bias = torch.zeros(1, 1, 1, 2, dtype=torch.float64), torch.tensor([0.0, 0.0, 0.0, 0.0, 5.0, 7.0])
    out = reference.attention_half(
        x,
        None,
        torch.tensor([1.0, 2.0]),
        torch.cat([torch.zeros(4, 2), torch.eye(2)]).double(),
        bias.double(),
        torch.eye(2).double(),
        None,
        num_heads=1,
        window_size=2,
    )
    # One real token with v = (1 + 5, 2 + 7) and three pad tokens with v = (5, 7), all with the same weight.
    torch.testing.assert_close(out.flatten(), torch.tensor([5.25, 7.5], dtype=torch.float64))


def test_autocast_does_not_round_inside():
    x, weight = draw(2, 4, 4, 8).float(), draw(24, 8, seed=2).float()

    def call():
        return reference.attention_half(x, None, None, weight, None, weight[:8], None, num_heads=2, window_size=4)

    plain = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), plain)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda x, w: reference.layer_norm(x, w[0, :3]), "weight"),
        (lambda x, w: reference.residual_layer_norm(x, x[:1]), "shape"),
        (lambda x, w: reference.residual_layer_norm(x, x, drop_path_scale=w[0]), "drop_path_scale"),
        (lambda x, w: reference.mlp_half(x, None, None, w, None, w, None, norm="none"), "norm"),
        (lambda x, w: reference.mlp_half(x, None, None, w, None, w, None, approximate="erf"), "approximate"),
        (
            lambda x, w: reference.attention_half(
                x, None, None, w, None, w, None, num_heads=1, window_size=2, pad_qkv=w[0]
            ),
            "pad_qkv",
        ),
    ],
)
def test_refuses(call, match):
    with pytest.raises(ValueError, match=match):
        call(draw(2, 4, 4, 4), draw(4, 4))
