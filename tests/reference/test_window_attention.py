"""Tests reference window attention against the published modules, and against literal roll / pad / mask code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swinkernels import reference
from swinkernels.reference.window_attention import relative_position_index
from swinkernels.testing import WindowAttentionCase, check_window_attention
from tests.support.side_by_side import assert_same, draw, randomised

DIM, HEADS = 12, 3


def between_linears(attn, x, qkv_bias, bias_table, **arguments):
    """Return the output of the published module ``attn``, with the reference between its qkv and proj."""
    qkv = F.linear(x, attn.qkv.weight, qkv_bias)
    out = reference.window_attention_qkvpacked(qkv, bias_table, num_heads=HEADS, pad_qkv=qkv_bias, **arguments)
    return F.linear(out, attn.proj.weight, attn.proj.bias)


TIMM_CASES = [  # size, window, shift, always_partition
    ((8, 8), 4, 0, False),
    ((8, 12), 4, 2, False),
    ((9, 14), 4, 2, False),
    ((9, 14), 4, 0, False),
    ((10, 7), (5, 3), (2, 1), False),
    ((7, 7), 7, 3, False),  # one window: the block drops the shift
    ((3, 8), 4, 2, False),  # the window shrinks to (3, 4)
    ((3, 5), 4, 2, True),  # one padded window per axis, still shifted
    ((2, 5), 7, 3, True),  # a shift longer than the map
]


@pytest.mark.parametrize(("size", "window", "shift", "always"), TIMM_CASES)
def test_timm_v1(size, window, shift, always):
    swin = pytest.importorskip("timm.models.swin_transformer", reason="timm is not installed")
    block = randomised(
        swin.SwinTransformerBlock(DIM, size, HEADS, window_size=window, shift_size=shift, always_partition=always)
    )
    x = draw(2, *size, DIM)
    attn = block.attn
    assert_same(
        lambda: between_linears(
            attn,
            x,
            attn.qkv.bias,
            attn.relative_position_bias_table,
            window_size=block.window_size,
            shift_size=block.shift_size,
            pad_order="roll_then_pad",
        ),
        lambda: block._attn(x),
        [x, *attn.parameters()],
    )


@pytest.mark.parametrize(("size", "window", "shift", "always"), TIMM_CASES)
def test_timm_v2(size, window, shift, always):
    swin = pytest.importorskip("timm.models.swin_transformer_v2", reason="timm is not installed")
    block = swin.SwinTransformerV2Block(DIM, size, HEADS, window, shift, always_partition=always)
    block = randomised(block)
    attn = block.attn
    with torch.no_grad():  # below, just below and above the clamp
        attn.logit_scale.copy_(torch.tensor([2.0, math.log(100.0) - 1e-3, 5.0]).reshape(HEADS, 1, 1))
    x = draw(2, *size, DIM)

    def ours():
        return between_linears(
            attn,
            x,
            torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]),
            16 * torch.sigmoid(attn.cpb_mlp(attn.relative_coords_table).view(-1, HEADS)),
            logit_scale=attn.logit_scale,
            window_size=block.window_size,
            shift_size=block.shift_size,
            pad_order="roll_then_pad",
        )

    assert_same(ours, lambda: block._attn(x), [x, *attn.parameters()], tolerance=1e-9)


@pytest.mark.parametrize(("size", "window", "shift"), [((8, 12), 4, 2), ((9, 6), 4, 2)])
def test_timm_v2_cr(size, window, shift):
    swin = pytest.importorskip("timm.models.swin_transformer_v2_cr", reason="timm is not installed")
    block = randomised(swin.SwinTransformerV2CrBlock(DIM, HEADS, size, (window, window), (shift, shift)))
    attn = block.attn
    x = draw(2, *size, DIM)
    assert_same(
        lambda: between_linears(
            attn,
            x,
            attn.qkv.bias,
            None,
            bias=attn._relative_positional_encodings()[0],
            logit_scale=attn.logit_scale,
            window_size=block.window_size,
            shift_size=block.shift_size,
            pad_order="roll_then_pad",
        ),
        lambda: block._shifted_window_attn(x),
        [x, *attn.parameters()],
        tolerance=1e-9,
    )


@pytest.mark.parametrize("version", ["ShiftedWindowAttention", "ShiftedWindowAttentionV2"])
@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 8), (4, 4), (0, 0)),
        ((8, 12), (4, 4), (2, 2)),
        ((9, 14), (4, 4), (2, 2)),
        ((9, 7), (5, 3), (2, 1)),
        ((6, 6), (7, 7), (3, 3)),  # one padded window: no shift
        ((6, 15), (7, 7), (3, 3)),  # no shift on one axis
    ],
)
def test_torchvision(version, size, window, shift):
    swin = pytest.importorskip("torchvision.models.swin_transformer", reason="torchvision is not installed")
    module = randomised(getattr(swin, version)(DIM, list(window), list(shift), HEADS))
    x = draw(2, *size, DIM)
    frame = [math.ceil(s / w) * w for s, w in zip(size, window, strict=True)]
    effective = tuple(0 if w >= p else s for w, s, p in zip(window, shift, frame, strict=True))
    is_v2 = version.endswith("V2")

    def ours():
        bias, extra = module.qkv.bias, {}
        table = None if is_v2 else module.relative_position_bias_table
        if is_v2:
            bias = torch.cat([bias[:DIM], torch.zeros_like(bias[:DIM]), bias[2 * DIM :]])
            table = 16 * torch.sigmoid(module.cpb_mlp(module.relative_coords_table).view(-1, HEADS))
            extra = {"logit_scale": module.logit_scale}
        return between_linears(module, x, bias, table, window_size=window, shift_size=effective, **extra)

    assert_same(ours, lambda: module(x), [x, *module.parameters()], tolerance=1e-9)


@pytest.mark.parametrize(
    ("size", "window", "shift"),
    [
        ((8, 12), (4, 4), (0, 0)),
        ((9, 14), (4, 4), (2, 2)),
        ((6, 9), (7, 7), (3, 3)),  # clamped to (6, 7): the table is still for (7, 7)
        ((4, 4, 8), (2, 2, 4), (1, 1, 2)),
        ((5, 7, 6), (2, 4, 3), (1, 2, 1)),
        ((3, 5, 4), (3, 3, 3), (1, 1, 1)),  # one window along depth
        ((2, 2, 2), (3, 3, 3), (1, 1, 1)),  # clamped on every axis
        ((3, 2, 7), (2, 3, 3), (1, 1, 1)),  # clamped on the middle axis
    ],
)
def test_monai(size, window, shift):
    unetr = pytest.importorskip("monai.networks.nets.swin_unetr", reason="monai is not installed")
    block = randomised(unetr.SwinTransformerBlock(DIM, HEADS, window, shift))
    x = draw(2, *size, DIM)
    used, used_shift = unetr.get_window_size(size, window, shift)
    frame = [math.ceil(s / w) * w for s, w in zip(size, used, strict=True)]
    mask = unetr.compute_mask(frame, used, used_shift, x.device)
    assert_same(
        lambda: between_linears(
            block.attn,
            F.layer_norm(x, (DIM,), block.norm1.weight, block.norm1.bias),
            block.attn.qkv.bias,
            block.attn.relative_position_bias_table,
            window_size=used,
            shift_size=used_shift,
            table_window=window,
        ),
        lambda: block.forward_part1(x, mask),
        [x, *block.norm1.parameters(), *block.attn.parameters()],
    )


def test_monai_clamped_index_is_not_geometric():
    """A clamped window needs table_window: MONAI's sliced index differs from the geometric one for most token pairs."""
    full, clamped = (7, 7, 7), (6, 6, 6)
    sliced = relative_position_index(full)[: 6**3, : 6**3]
    assert torch.equal(relative_position_index(clamped, full), sliced)
    t = torch.cartesian_prod(*(torch.arange(6),) * 3)
    offset = t[:, None] - t[None, :] + 6
    geometric = (offset[..., 0] * 13 + offset[..., 1]) * 13 + offset[..., 2]
    assert (sliced != geometric).double().mean() > 0.9


@pytest.mark.parametrize("partition", ["grid", "block"])
@pytest.mark.parametrize(("size", "window"), [((4, 8), (2, 2)), ((6, 6), (3, 2)), ((3, 4), (3, 4))])
def test_timm_maxvit(partition, size, window):
    maxxvit = pytest.importorskip("timm.models.maxxvit", reason="timm is not installed")
    cfg = maxxvit.MaxxVitTransformerCfg(
        dim_head=DIM // HEADS, head_first=False, rel_pos_type="bias", window_size=window, grid_size=window
    )
    block = randomised(maxxvit.PartitionAttentionCl(DIM, partition, cfg))
    x = draw(2, *size, DIM)
    assert_same(
        lambda: between_linears(
            block.attn,
            x,
            block.attn.qkv.bias,
            block.attn.rel_pos.relative_position_bias_table,
            window_size=window,
            grid=partition == "grid",
        ),
        lambda: block._partition_attn(x),
        [x, *block.attn.parameters()],
    )


# --- a literal formulation: roll, pad and cut tensors, build the mask image by slices as in the published code


def cut(x: Tensor, window: tuple[int, ...]) -> Tensor:
    """Cut the padded map ``x`` (B, *P, C) into windows (B, num_windows, N, C)."""
    rank = len(window)
    shape = [n for p, w in zip(x.shape[1:-1], window, strict=True) for n in (p // w, w)]
    x = x.reshape(x.shape[0], *shape, x.shape[-1])
    x = x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), 2 * rank + 1)
    return x.reshape(x.shape[0], -1, math.prod(window), x.shape[-1])


def uncut(windows: Tensor, window: tuple[int, ...], frame: tuple[int, ...]) -> Tensor:
    rank = len(window)
    x = windows.reshape(windows.shape[0], *(p // w for p, w in zip(frame, window, strict=True)), *window, -1)
    order = [a for i in range(rank) for a in (1 + i, 1 + rank + i)]
    return x.permute(0, *order, 2 * rank + 1).reshape(windows.shape[0], *frame, -1)


def pad_map(x: Tensor, pad: Tensor, before: tuple[int, ...], frame: tuple[int, ...]) -> Tensor:
    """Place ``x`` (B, *S, C) at offset ``before`` in a map of size ``frame`` that is filled with the token ``pad``."""
    out = pad.expand(x.shape[0], *frame, x.shape[-1]).clone()
    out[(slice(None), *(slice(b, b + s) for b, s in zip(before, x.shape[1:-1], strict=True)))] = x
    return out


def slice_regions(frame, window, shift, periodic=None) -> Tensor:
    """Return the map of region ids, assigned to slices as in the published code; a periodic axis has one region."""
    regions = torch.zeros(frame, dtype=torch.long)
    per_axis = [
        [slice(0, p)] if s == 0 or wraps else [slice(0, p - w), slice(p - w, p - s), slice(p - s, p)]
        for p, w, s, wraps in zip(frame, window, shift, periodic or (False,) * len(frame), strict=True)
    ]
    for number, slices in enumerate(itertools.product(*per_axis)):
        regions[slices] = number
    return regions


def literal_bias(table: Tensor, window: tuple[int, ...], table_window: tuple[int, ...]) -> Tensor:
    """Return the bias (heads, N, N) from ``table``, with an index computed one entry at a time."""
    n = math.prod(window)

    def decode(t):
        coordinates = []
        for w in reversed(table_window):
            coordinates.insert(0, t % w)
            t //= w
        return coordinates

    index = torch.empty(n, n, dtype=torch.long)
    for i, j in itertools.product(range(n), repeat=2):
        row = 0
        for a, b, w in zip(decode(i), decode(j), table_window, strict=True):
            row = row * (2 * w - 1) + (a - b + w - 1)
        index[i, j] = row
    return table[index].permute(2, 0, 1)


def literal_attention(
    qkv, num_heads, window, shift, *, pad, pad_order, before, regions, bias, mask_value=-100.0, scale=None
):
    """Return the output (B, *S, C) for ``qkv`` (B, *S, 3C), ``regions`` (*frame) or None, ``bias`` (heads, N, N)."""
    size = tuple(qkv.shape[1:-1])
    axes = tuple(range(1, 1 + len(size)))
    frame = tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))
    roll = lambda x, sign: torch.roll(x, [sign * s for s in shift], axes)  # noqa: E731
    if pad_order == "pad_then_roll":
        x = roll(pad_map(qkv, pad, before, frame), -1)
    else:
        x = pad_map(roll(qkv, -1), pad, before, frame)
    x = cut(x, window)  # (B, windows, N, 3C)
    q, k, v = x.unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    scores = torch.einsum("bwhid,bwhjd->bwhij", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale) + bias
    if regions is not None:
        ids = cut(regions[None, ..., None], window)[0, :, :, 0]
        scores = scores + torch.where(ids[:, :, None] == ids[:, None, :], 0.0, mask_value)[:, None]
    out = torch.einsum("bwhij,bwhjd->bwihd", torch.softmax(scores, -1), v).flatten(-2)
    x = uncut(out, window, frame)
    inside = (slice(None), *(slice(b, b + s) for b, s in zip(before, size, strict=True)))
    return roll(x, 1)[inside] if pad_order == "pad_then_roll" else roll(x[inside], 1)


def frame_of(size, window):
    return tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))


def compare_with_literal_code(
    size, window, shift, pad_order, before, periodic, own_regions, *, table_window=None, heads=2, head_dim=4, **options
):
    """Assert that the reference and the literal code agree in the output and the gradients of qkv, table and pad."""
    frame = frame_of(size, window)
    table_window = table_window or window
    if own_regions:
        regions = torch.randint(0, 3, frame, generator=torch.Generator().manual_seed(sum(frame)))
    else:
        regions = slice_regions(frame, window, shift, periodic)
    qkv, pad = draw(2, *size, 3 * heads * head_dim), draw(3 * heads * head_dim, seed=4)
    table = draw(math.prod(2 * w - 1 for w in table_window), heads, seed=5)
    assert_same(
        lambda: reference.window_attention_qkvpacked(
            qkv,
            table,
            num_heads=heads,
            window_size=window,
            shift_size=shift,
            table_window=table_window,
            pad_qkv=pad,
            pad_order=pad_order,
            pad_before=before,
            periodic=False if own_regions else periodic,
            region_map=regions if own_regions else None,
            **options,
        ),
        lambda: literal_attention(
            qkv,
            heads,
            window,
            shift,
            pad=pad,
            pad_order=pad_order,
            before=before,
            regions=regions,
            bias=literal_bias(table, window, table_window),
            **options,
        ),
        [qkv, table, pad],
    )


@pytest.mark.parametrize("pad_order", ["pad_then_roll", "roll_then_pad"])
@pytest.mark.parametrize("share", [0, 1, 2], ids=["after", "around", "before"])
@pytest.mark.parametrize("regions", ["shift", "periodic", "own"])
@pytest.mark.parametrize(
    ("size", "window", "shift"), [((6, 9), (4, 4), (1, 2)), ((2, 5, 4), (2, 3, 3), (1, 2, 1)), ((2, 6), (4, 2), (3, 0))]
)
def test_padding_and_regions_against_literal_code(size, window, shift, pad_order, share, regions):
    before = tuple((p - s) * share // 2 for p, s in zip(frame_of(size, window), size, strict=True))
    periodic = (*(False,) * (len(size) - 1), regions == "periodic")
    compare_with_literal_code(size, window, shift, pad_order, before, periodic, regions == "own")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_against_literal_code(data):
    rank = data.draw(st.sampled_from([2, 2, 3]))
    size = data.draw(st.tuples(*[st.integers(1, 9 if rank == 2 else 5)] * rank))
    window = data.draw(st.tuples(*[st.integers(1, 4 if rank == 2 else 3)] * rank))
    before = tuple(data.draw(st.integers(0, p - s)) for p, s in zip(frame_of(size, window), size, strict=True))
    compare_with_literal_code(
        size,
        window,
        tuple(data.draw(st.integers(0, w - 1)) for w in window),
        data.draw(st.sampled_from(["pad_then_roll", "roll_then_pad"])),
        before,
        data.draw(st.tuples(*[st.booleans()] * rank)),
        data.draw(st.booleans()),
        table_window=tuple(w + data.draw(st.integers(0, 2)) for w in window),
        heads=data.draw(st.integers(1, 3)),
        head_dim=data.draw(st.sampled_from([1, 4, 5])),
        mask_value=data.draw(st.sampled_from([-100.0, -2.0, -math.inf])),
        scale=data.draw(st.sampled_from([None, 0.7])),
    )


@pytest.mark.parametrize("size", [(2, 6, 12), (3, 7, 13), (4, 10, 10), (1, 3, 6)])
@pytest.mark.parametrize("shift", [(0, 0, 0), (1, 1, 3)])
def test_aurora(size, shift):
    """Aurora rolls the map, then pads both sides; its regions ignore the seam in width, and pads are one region."""
    window = (2, 3, 6)
    frame = tuple(math.ceil(s / w) * w for s, w in zip(size, window, strict=True))
    before = tuple((p - s) // 2 for p, s in zip(frame, size, strict=True))
    regions = None
    if any(shift):
        groups = torch.zeros(size, dtype=torch.long)
        number = 1
        for d in (slice(0, -window[0]), slice(-window[0], -shift[0]), slice(-shift[0], None)):
            for h in (slice(0, -window[1]), slice(-window[1], -shift[1]), slice(-shift[1], None)):
                for w in (slice(0, -window[2]), slice(-window[2], None)):  # longitude: the last two slices are merged
                    groups[d, h, w] = number
                    number += 1
        regions = torch.zeros(frame, dtype=torch.long)  # 0: pad tokens
        regions[tuple(slice(b, b + s) for b, s in zip(before, size, strict=True))] = groups
    qkv, pad = draw(2, *size, 3 * DIM), draw(3 * DIM, seed=4)
    assert_same(
        lambda: reference.window_attention_qkvpacked(
            qkv,
            num_heads=HEADS,
            window_size=window,
            shift_size=shift,
            pad_qkv=pad,
            pad_order="roll_then_pad",
            pad_before=before,
            region_map=regions,
        ),
        lambda: literal_attention(
            qkv, HEADS, window, shift, pad=pad, pad_order="roll_then_pad", before=before, regions=regions, bias=0.0
        ),
        [qkv, pad],
    )


def test_periodic_width_is_the_merged_seam():
    """Without padding, a region map without the seam in width is equivalent to periodic=True along the width."""
    size, window, shift = (4, 6, 12), (2, 3, 6), (1, 1, 3)
    qkv = draw(2, *size, 3 * DIM)
    call = lambda **kw: reference.window_attention_qkvpacked(  # noqa: E731
        qkv, num_heads=HEADS, window_size=window, shift_size=shift, **kw
    )
    regions = slice_regions(size, window, shift, (False, False, True))
    periodic = call(periodic=(False, False, True))
    assert torch.equal(periodic, call(region_map=regions))
    assert not torch.allclose(periodic, call())
    # On a periodic axis, rolling the map by whole windows rolls the output.
    rolled = reference.window_attention_qkvpacked(
        qkv.roll(window[2], 3), num_heads=HEADS, window_size=window, shift_size=shift, periodic=(False, False, True)
    )
    torch.testing.assert_close(rolled, periodic.roll(window[2], 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("types", [1, 2, 6])
def test_bias_of_window_types(types):
    """The bias has shape (types, heads, N, N); window w of an image has type w // (windows / types)."""
    size, window = (4, 6, 8), (2, 2, 4)  # 2 x 3 x 2 windows
    n, windows = math.prod(window), 12
    qkv, bias = draw(2, *size, 3 * DIM), draw(types, HEADS, n, n, seed=3)

    def literal():
        x = cut(qkv, window)
        out = torch.zeros(2, windows, n, DIM, dtype=torch.float64)
        results = []
        for b, w in itertools.product(range(2), range(windows)):
            q, k, v = x[b, w].reshape(n, 3, HEADS, DIM // HEADS).permute(1, 2, 0, 3)
            scores = q @ k.mT / (DIM // HEADS) ** 0.5 + bias[w // (windows // types)]
            results.append((scores.softmax(-1) @ v).transpose(0, 1).reshape(n, DIM))
        out = torch.stack(results).reshape(2, windows, n, DIM)
        return uncut(out, window, size)

    assert_same(
        lambda: reference.window_attention_qkvpacked(qkv, num_heads=HEADS, window_size=window, bias=bias),
        literal,
        [qkv, bias],
    )


def test_separate_and_packed_agree():
    qkv = draw(2, 5, 6, 3, HEADS, 4)
    q, k, v = (x.clone() for x in qkv.unbind(-3))
    assert_same(
        lambda: reference.window_attention(*qkv.unbind(-3), num_heads=HEADS, window_size=4, shift_size=2),
        lambda: reference.window_attention_qkvpacked(qkv.flatten(-3), num_heads=HEADS, window_size=4, shift_size=2),
        [qkv],
    )
    again = reference.window_attention(q, k, v, num_heads=HEADS, window_size=4, shift_size=2)
    assert torch.equal(again, reference.window_attention_qkvpacked(qkv, num_heads=HEADS, window_size=4, shift_size=2))


def test_log_sum_exp_and_attention():
    """lse is the log-sum-exp of the final scores, so exp(score - lse) equals the attention weights."""
    qkv, table = draw(1, 4, 4, 3 * 4), draw(9, 1, seed=2)
    arguments = {"num_heads": 1, "window_size": 2, "shift_size": 1, "mask_value": -3.0, "scale": 0.3}
    out, attention, lse = reference.window_attention_qkvpacked(
        qkv, table, return_attention=True, return_lse=True, **arguments
    )
    assert lse.shape == (1, 4, 1, 4)
    x = cut(qkv.roll((-1, -1), (1, 2)), (2, 2))
    q, k, v = x.chunk(3, -1)
    ids = cut(slice_regions((4, 4), (2, 2), (1, 1))[None, ..., None], (2, 2))[0, :, :, 0]
    scores = q @ k.mT * 0.3 + literal_bias(table, (2, 2), (2, 2))[0] - 3.0 * (ids[:, :, None] != ids[:, None, :])
    torch.testing.assert_close(lse[:, :, 0], scores.logsumexp(-1))
    torch.testing.assert_close(attention[:, :, 0], (scores - lse[:, :, 0, :, None]).exp())
    torch.testing.assert_close(out, uncut(attention[:, :, 0] @ v, (2, 2), (4, 4)).roll((1, 1), (1, 2)))
    assert torch.equal(out, reference.window_attention_qkvpacked(qkv, table, **arguments))


# --- dropout


def dropout(qkv, p, seed=0, **kwargs):
    g = torch.Generator().manual_seed(seed)
    return reference.window_attention_qkvpacked(
        qkv, num_heads=2, window_size=4, shift_size=2, dropout_p=p, generator=g, **kwargs
    )


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_keeps_a_share_and_rescales_it(p):
    qkv = draw(4, 8, 16, 3 * 8)
    _, kept = dropout(qkv, p, return_attention=True)
    _, full = dropout(qkv, 0.0, return_attention=True)
    share = (kept == 0).double().mean().item()
    assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / kept.numel())
    torch.testing.assert_close(kept[kept != 0], (full / (1 - p))[kept != 0], rtol=1e-12, atol=0)
    # Attention weights are dropped independently, so rows have different patterns.
    rows = (kept == 0).flatten(0, -2)
    assert len(torch.unique(rows, dim=0)) > 0.5 * min(len(rows), 500) * (1 - max(p, 1 - p))


def test_dropout_follows_the_generator():
    qkv = draw(2, 8, 8, 3 * 8)
    assert torch.equal(dropout(qkv, 0.3, seed=1), dropout(qkv, 0.3, seed=1))
    assert not torch.equal(dropout(qkv, 0.3, seed=1), dropout(qkv, 0.3, seed=2))
    torch.manual_seed(5)
    first = reference.window_attention_qkvpacked(qkv, num_heads=2, window_size=4, dropout_p=0.3)
    torch.manual_seed(5)
    assert torch.equal(first, reference.window_attention_qkvpacked(qkv, num_heads=2, window_size=4, dropout_p=0.3))


def test_dropout_of_nothing_and_of_everything():
    qkv = draw(2, 8, 8, 3 * 8).requires_grad_()
    plain = reference.window_attention_qkvpacked(qkv, num_heads=2, window_size=4, shift_size=2)
    assert torch.equal(dropout(qkv, 0.0), plain)
    nothing = dropout(qkv, 1.0)
    assert torch.equal(nothing, torch.zeros_like(nothing))
    (grad,) = torch.autograd.grad(nothing.sum(), qkv)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_dropout_gradient_uses_the_same_draw():
    qkv = draw(1, 2, 2, 3 * 4).requires_grad_()
    call = lambda x: reference.window_attention_qkvpacked(  # noqa: E731
        x, num_heads=1, window_size=2, dropout_p=0.5, generator=torch.Generator().manual_seed(3)
    )
    assert (
        0
        < (
            reference.window_attention_qkvpacked(
                qkv,
                num_heads=1,
                window_size=2,
                dropout_p=0.5,
                generator=torch.Generator().manual_seed(3),
                return_attention=True,
            )[1]
            == 0
        ).sum()
        < 16
    )
    assert torch.autograd.gradcheck(call, qkv)


# --- gradients by finite differences


def test_gradcheck_v1():
    leaves = [
        x.requires_grad_() for x in (draw(1, 2, 1, 12), draw(9, 1, seed=2), draw(12, seed=3), draw(1, 4, 4, seed=4))
    ]
    call = lambda *a: reference.window_attention_qkvpacked(  # noqa: E731
        a[0], a[1], num_heads=1, window_size=2, shift_size=1, pad_qkv=a[2], bias=a[3], mask_value=-1.0
    )
    assert torch.autograd.gradcheck(call, leaves)


def test_second_derivative():
    qkv, table = draw(1, 2, 1, 6).requires_grad_(), draw(9, 1, seed=2).requires_grad_()
    call = lambda *a: reference.window_attention_qkvpacked(*a, num_heads=1, window_size=2)  # noqa: E731
    assert torch.autograd.gradgradcheck(call, (qkv, table))


def test_gradcheck_v2():
    qkv, table = draw(1, 2, 2, 12).requires_grad_(), draw(9, 1, seed=2).requires_grad_()
    logit_scale = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)
    call = lambda *a: reference.window_attention_qkvpacked(  # noqa: E731
        a[0], a[1], num_heads=1, window_size=2, shift_size=1, logit_scale=a[2], mask_value=-1.0
    )
    assert torch.autograd.gradcheck(call, (qkv, table, logit_scale))
    (grad,) = torch.autograd.grad(call(qkv, table, logit_scale).square().sum(), logit_scale)
    assert grad.abs() > 1e-6


def test_logit_scale_is_clamped():
    qkv = draw(1, 2, 2, 24)
    qkv[..., :16] = 1 + 0.1 * qkv[..., :16]  # nearly parallel q and k: otherwise the softmax saturates

    def run(values):
        logit_scale = torch.tensor(values, dtype=torch.float64, requires_grad=True)
        out = reference.window_attention_qkvpacked(qkv, num_heads=2, window_size=2, logit_scale=logit_scale)
        return out, torch.autograd.grad(out.square().sum(), logit_scale)[0]

    below, grad_below = run([math.log(100.0) - 1e-12, 2.0])
    above, grad_above = run([7.0, 2.0])
    torch.testing.assert_close(below, above, rtol=0, atol=1e-9)
    assert grad_above[0] == 0
    assert grad_below[0].abs() > 1e-6
    assert grad_above[1] == grad_below[1] != 0


def test_vectors_of_length_zero_have_cosine_zero():
    qkv = draw(1, 2, 2, 3, 1, 4)
    qkv[:, 0, 0, :2] = 0
    _, attention = reference.window_attention_qkvpacked(
        qkv, num_heads=1, window_size=2, logit_scale=torch.tensor([2.0]), return_attention=True
    )
    torch.testing.assert_close(attention[0, 0, 0, 0], torch.full((4,), 0.25, dtype=torch.float64))


# --- dtypes, layouts, edges


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keeps_the_error_budget(dtype):
    """The reference, which is also a backend, stays within the kernels' error budget."""
    case = WindowAttentionCase(2, (9, 14), 2, 16, 7, 3, has_pad_qkv=True)
    check_window_attention(reference.window_attention_qkvpacked, case, dtype)


@pytest.mark.parametrize("cosine", [False, True])
def test_autocast_does_not_round_inside(cosine):
    qkv, logit_scale = draw(2, 5, 6, 24).float(), torch.tensor([3.0, 4.0]) if cosine else None
    call = lambda: reference.window_attention_qkvpacked(  # noqa: E731
        qkv, num_heads=2, window_size=4, shift_size=2, logit_scale=logit_scale
    )
    plain = call()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(), plain)


def test_empty_batch():
    qkv, table = draw(0, 5, 6, 24).requires_grad_(), draw(49, 2).requires_grad_()
    out = reference.window_attention_qkvpacked(qkv, table, num_heads=2, window_size=4, shift_size=2)
    assert out.shape == (0, 5, 6, 8)
    dqkv, dtable = torch.autograd.grad(out.sum(), (qkv, table))
    assert dqkv.shape == qkv.shape
    assert torch.equal(dtable, torch.zeros_like(table))


def test_any_strides():
    qkv = draw(2, 24, 6, 5).permute(0, 3, 2, 1)
    assert not qkv.is_contiguous()
    arguments = {"num_heads": 2, "window_size": 4, "shift_size": 2}
    assert torch.equal(
        reference.window_attention_qkvpacked(qkv, **arguments),
        reference.window_attention_qkvpacked(qkv.contiguous(), **arguments),
    )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"window_size": 0}, "window_size"),
        ({"window_size": 2, "shift_size": 2}, "shift_size"),
        ({"window_size": (2, 2, 2)}, "window_size"),
        ({"window_size": 4, "pad_order": "roll"}, "pad_order"),
        ({"window_size": 3, "pad_before": 3}, "pad_before"),
        ({"window_size": 2, "shift_size": 1, "grid": True}, "shift_size"),
    ],
)
def test_refuses_a_geometry_without_meaning(arguments, match):
    with pytest.raises(ValueError, match=match):
        reference.window_attention_qkvpacked(draw(1, 4, 4, 6), num_heads=1, **arguments)


def test_refuses_another_number_of_heads():
    q = draw(1, 4, 4, 3, 2)
    with pytest.raises(ValueError, match=r"q has 3 heads \(shape \(1, 4, 4, 3, 2\)\), but num_heads=2"):
        reference.window_attention(q, q, q, num_heads=2, window_size=2)


def test_sizes_on_the_meta_device():
    """The reference runs on meta tensors, although their device has no autocast to disable."""
    table = torch.zeros(49, 2, device="meta")
    out = reference.window_attention_qkvpacked(
        torch.zeros(2, 5, 6, 24, device="meta"), table, num_heads=2, window_size=4, shift_size=2
    )
    assert (out.shape, out.device.type) == ((2, 5, 6, 8), "meta")
