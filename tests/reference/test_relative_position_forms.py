"""Tests decomposed relative positions, key windows and tables of pairs in the reference against published modules."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from swinkernels import reference
from tests.support.side_by_side import assert_same, draw, randomised

DIM, HEADS = 12, 3


def between_linears(attn, x, **arguments):
    """Return the output of the published module ``attn``, with the reference between its qkv and proj."""
    qkv = F.linear(x, attn.qkv.weight, attn.qkv.bias)
    out = reference.window_attention_qkvpacked(
        qkv,
        num_heads=HEADS,
        pad_qkv=attn.qkv.bias,
        axis_tables=(attn.rel_pos_h, attn.rel_pos_w),
        **arguments,
    )
    return F.linear(out, attn.proj.weight, attn.proj.bias)


SIZES = [((8, 8), 4), ((9, 14), 4), ((6, 6), 0)]  # size, window; 0: global


@pytest.mark.parametrize(("size", "window"), SIZES)
@pytest.mark.parametrize(("kind", "tolerance"), [("eager", 1e-5), ("sdpa", 1e-10)])  # eager: float32 softmax
def test_transformers_sam(kind, tolerance, size, window):
    sam = pytest.importorskip("transformers.models.sam.modeling_sam", reason="transformers is not installed")
    config = sam.SamVisionConfig(hidden_size=DIM, num_attention_heads=HEADS, image_size=16 * size[0], patch_size=16)
    config._attn_implementation = kind
    layer = sam.SamVisionLayer(config, window)
    attn = layer.attn = randomised(layer.attn)
    x = draw(2, *size, DIM)

    def theirs():
        if window == 0:
            return attn(x)[0]
        windows, padded = layer.window_partition(x, window)
        return layer.window_unpartition(attn(windows)[0], window, padded, size)

    assert_same(
        lambda: between_linears(attn, x, window_size=window or size), theirs, [x, *attn.parameters()], tolerance
    )


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("size", "window"), SIZES)
def test_timm_sam(size, window, fused):
    sam = pytest.importorskip("timm.models.vision_transformer_sam", reason="timm is not installed")
    block = randomised(
        sam.Block(DIM, HEADS, qkv_bias=True, use_rel_pos=True, window_size=window, input_size=(window or size[0],) * 2)
    )
    attn = block.attn
    attn.fused_attn = fused
    x = draw(2, *size, DIM)

    def theirs():
        if window == 0:
            return attn(x)
        windows, padded = sam.window_partition(x, window)
        return sam.window_unpartition(attn(windows), window, size, padded)

    assert_same(lambda: between_linears(attn, x, window_size=window or size), theirs, [x, *attn.parameters()])


@pytest.mark.parametrize(("window", "key_window"), [((4, 4), (6, 6)), ((2, 4), (6, 4)), ((4, 2), (4, 2))])
@pytest.mark.parametrize("has_logit_scale", [False, True])
def test_keys_of_a_larger_window(window, key_window, has_logit_scale):
    """The reference equals HAT's overlapping cross-attention, which unfolds keys and values of a zero-padded map.

    HAT indexes its table by key minus query, and the index wraps around the ends of the table; flip and roll undo this.
    """
    size, head_dim = (8, 12), DIM // HEADS
    q, k, v = (draw(2, *size, HEADS, head_dim, seed=i) for i in range(3))
    rows = [w + m - 1 for w, m in zip(window, key_window, strict=True)]
    table = draw(math.prod(rows), HEADS, seed=4)
    logit_scale = draw(HEADS, seed=5) if has_logit_scale else None

    queries, keys = (
        torch.stack(torch.meshgrid(*map(torch.arange, w), indexing="ij")).flatten(1) for w in (window, key_window)
    )
    relative = keys[:, None, :] - queries[:, :, None]
    relative = relative + torch.tensor([w - m + 1 for w, m in zip(window, key_window, strict=True)])[:, None, None]
    index = relative[0] * rows[1] + relative[1]  # may be negative
    wraps = (key_window[0] - 2) * rows[1] + key_window[1] - 2  # the smallest index is -wraps

    def windows(x, w, padding):
        unfolded = F.unfold(x.flatten(3).permute(0, 3, 1, 2), w, stride=window, padding=padding)
        return unfolded.unflatten(1, (HEADS, head_dim, -1)).permute(0, 4, 1, 3, 2)

    def literal():
        padding = tuple((m - w) // 2 for w, m in zip(window, key_window, strict=True))
        q_, (k_, v_) = windows(q, window, 0), (windows(x, key_window, padding) for x in (k, v))
        if has_logit_scale:
            q_, k_ = F.normalize(q_, dim=-1, eps=1e-12), F.normalize(k_, dim=-1, eps=1e-12)
            scores = q_ @ k_.mT * logit_scale.clamp(max=math.log(100.0)).exp().reshape(-1, 1, 1)
        else:
            scores = q_ @ k_.mT * head_dim**-0.5
        scores = scores + table[index % len(table)].permute(2, 0, 1)
        out = (scores.softmax(-1) @ v_).permute(0, 2, 4, 3, 1).flatten(1, 3)  # (B, C * N, num_windows)
        return F.fold(out, size, window, stride=window).permute(0, 2, 3, 1)

    def ours():
        of_offsets = table.roll(wraps, 0).flip(0)
        return reference.window_attention(
            q, k, v, of_offsets, num_heads=HEADS, window_size=window, key_window=key_window, logit_scale=logit_scale
        )

    assert_same(ours, literal, [q, k, v, table, logit_scale])


@pytest.mark.parametrize("size", [(4, 6, 12), (3, 7, 13)])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 3)])
def test_pangu(size, shift):
    """The reference equals Pangu-Weather's earth-specific attention, as in its PyTorch ports.

    The map is padded on both sides. A window's level and latitude select a column of the table; its rows are indexed
    by pairs of coordinates on these axes. The ports build a region map that exceeds the map by the longitude's
    shift, and cut off its end. If the window is twice the shift on this axis, as here, the mask is the usual one.
    """
    window, heads, head_dim = (2, 3, 6), 2, 4
    frame = tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))
    before = tuple((p - s) // 2 for p, s in zip(frame, size, strict=True))
    counts = [p // w for p, w in zip(frame, window, strict=True)]
    qkv, pad = draw(2, *size, 3 * heads * head_dim), draw(3 * heads * head_dim, seed=3)
    types, n = counts[0] * counts[1], math.prod(window)
    table = draw(window[0] ** 2 * window[1] ** 2 * (2 * window[2] - 1), types, heads, seed=4)

    # The published index has query + window * key on the axes level and latitude, and query - key on the longitude.
    places = torch.stack(torch.meshgrid(*map(torch.arange, window), indexing="ij")).flatten(1)
    steps = torch.tensor([-window[0], -window[1], 1])[:, None]
    relative = places[:, :, None] - (places * steps)[:, None, :]
    relative[2] += window[2] - 1
    index = (relative[0] * window[1] ** 2 + relative[1]) * (2 * window[2] - 1) + relative[2]

    regions = torch.zeros(frame[0], frame[1], frame[2] + shift[2], dtype=torch.int32)
    for axis in range(3) if any(shift) else ():
        place = torch.arange(regions.shape[axis])
        of_axis = (place >= len(place) - window[axis]).int() + (place >= len(place) - shift[axis]).int()
        regions = 3 * regions + of_axis.reshape([-1 if i == axis else 1 for i in range(3)])
    regions = regions[:, :, : frame[2]]

    def cut(x):  # (B, *frame, C) -> (B, windows along the longitude, types, N, C)
        x = x.reshape(x.shape[0], counts[0], window[0], counts[1], window[1], counts[2], window[2], -1)
        return x.permute(0, 5, 1, 3, 2, 4, 6, 7).reshape(x.shape[0], counts[2], types, n, -1)

    def literal():
        sides = [
            amount for b, p, s in reversed(list(zip(before, frame, size, strict=True))) for amount in (b, p - s - b)
        ]
        x = F.pad(qkv - pad, [0, 0, *sides]) + pad  # the projected zeros
        x = cut(x.roll([-s for s in shift], (1, 2, 3)))
        q, k, v = x.unflatten(-1, (3, heads, head_dim)).permute(4, 0, 1, 2, 5, 3, 6)
        scores = q @ k.mT * head_dim**-0.5 + table[index].permute(2, 3, 0, 1)
        ids = cut(regions[None, ..., None])[0, :, :, :, 0]
        scores = scores + torch.where(ids[..., :, None] == ids[..., None, :], 0.0, -100.0).unsqueeze(-3)
        out = (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2)
        out = out.reshape(2, counts[2], counts[0], counts[1], *window, -1).permute(0, 2, 4, 3, 5, 1, 6, 7)
        out = out.reshape(2, *frame, -1).roll(shift, (1, 2, 3))
        return out[(slice(None), *(slice(b, b + s) for b, s in zip(before, size, strict=True)))]

    def ours():
        return reference.window_attention_qkvpacked(
            qkv,
            table,
            num_heads=heads,
            window_size=window,
            shift_size=shift,
            pad_qkv=pad,
            pad_before=before,
            table_pairs=(True, True, False),
        )

    assert_same(ours, literal, [qkv, table, pad])
