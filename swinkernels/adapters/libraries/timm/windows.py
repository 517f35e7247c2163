"""Forms for timm's window attention without a shift: DaViT, TinyViT, GC ViT, Twins, NesT, Hiera and SAM 2's Hiera.

There is also a form for CoAtNet's attention over the whole map, which has a bias table.

Linear layers process each token separately, so QKV and the projection run on the whole map, and the op addresses the
windows. In NesT and Hiera the tokens are already grouped into windows. A pad token is a row of zeros, so its q, k and v
are the bias of the QKV layer. In TinyViT, where the padding precedes the norm, they are the result of norm and QKV for
a row of zeros.

Source: the modules davit, tiny_vit, gcvit, twins, nest, hiera, hieradet_sam2 and maxxvit of timm.models, timm 1.0.
"""

from __future__ import annotations

from typing import Any

from timm.models.davit import SpatialBlock
from timm.models.gcvit import GlobalContextVitBlock
from timm.models.hiera import MaskUnitAttention
from timm.models.maxxvit import Attention2d, AttentionCl
from timm.models.nest import Attention as NestAttention
from timm.models.tiny_vit import TinyVitBlock
from timm.models.twins import LocallyGroupedAttn
from torch import Tensor

from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.libraries.timm import maxvit

NO_BIAS = "it attends to the whole map without a bias, for which torch's own attention is as fast"


def _dropout_p(attn: Any) -> float:
    """Return the dropout probability of the attention weights in the current mode.

    timm's fused attention applies dropout if the attention module is in training mode, the unfused one if attn_drop is.
    """
    drop = attn.attn_drop
    is_on = attn.training if getattr(attn, "fused_attn", False) else drop.training
    return getattr(drop, "p", 0.0) if is_on else 0.0


def _sizes_of(window: Any, channels: int) -> tuple[tuple[int, ...], ...]:
    """Return three map sizes: one that needs padding, one that does not, and a single window."""
    height, width = window
    return (height + 1, 2 * width + 1, channels), (2 * height, width, channels), (height, width, channels)


# DaViT


def _davit(block: Any, attend: Any, x: Tensor) -> Any:
    if x.dim() != 4:
        return f"x has {x.dim()} axes"
    b, c, h, w = x.shape
    attn = block.attn
    shortcut = block.cpe1(x).flatten(2).transpose(1, 2)
    qkv = attn.qkv(block.norm1(shortcut)).view(b, h, w, 3 * c)
    scale = None if attn.fused_attn else attn.scale
    y = attend(qkv, num_heads=attn.num_heads, window_size=block.window_size, scale=scale, pad_qkv=attn.qkv.bias)
    x = shortcut + block.drop_path1(attn.proj(y).flatten(1, 2))
    x = block.cpe2(x.transpose(1, 2).view(b, c, h, w))
    if block.mlp is not None:
        x = x.flatten(2).transpose(1, 2)
        x = x + block.drop_path2(block.mlp(block.norm2(x)))
        x = x.transpose(1, 2).view(b, c, h, w)
    return x


def _channels_first(sizes: Any) -> Any:
    return lambda block: tuple((c, h, w) for h, w, c in sizes(block))


DAVIT = Form(
    name="timm DaViT",
    of=SpatialBlock,
    forward=_davit,
    sizes=_channels_first(lambda block: _sizes_of(block.window_size, block.dim)),
    absorbs=("attn",),
)


# TinyViT. The attention module includes the norm, and the bias depends on the distance between tokens, as in LeViT.


def _tiny_vit(block: Any, attend: Any, x: Tensor) -> Any:
    if x.dim() != 4:
        return f"x has {x.dim()} axes"
    attn, (b, h, w, c) = block.attn, x.shape
    if attn.val_dim != attn.key_dim:
        return "its values have another width than its keys"
    bias = attn.get_attention_biases(x.device)
    qkv = attn.qkv(attn.norm(x)).unflatten(-1, (attn.num_heads, 3, attn.key_dim))
    pad = None
    if h % block.window_size or w % block.window_size:
        pad = attn.qkv(attn.norm(x.new_zeros(1, c))).view(attn.num_heads, 3, -1).transpose(0, 1)
    scale = None if attn.fused_attn else attn.scale
    y = attend(
        *qkv.unbind(-2), num_heads=attn.num_heads, window_size=block.window_size, scale=scale, bias=bias, pad_qkv=pad
    )
    x = x + block.drop_path1(attn.proj(y))
    x = block.local_conv(x.permute(0, 3, 1, 2)).reshape(b, c, h * w).transpose(1, 2)
    x = x + block.drop_path2(block.mlp(x))
    return x.view(b, h, w, c)


TINY_VIT = Form(
    name="timm TinyViT",
    of=TinyVitBlock,
    forward=_tiny_vit,
    sizes=lambda block: _sizes_of((block.window_size,) * 2, block.dim),
    absorbs=("attn",),
)


# GC ViT


def _gcvit(block: Any, attend: Any, x: Tensor, q_global: Tensor | None = None) -> Any:
    attn, (height, width) = block.attn, block.window_size
    if x.dim() != 4 or x.shape[1] % height or x.shape[2] % width:
        return "the map does not consist of whole windows"
    b, h, w, _ = x.shape
    arguments = {
        "bias_table": attn.rel_pos.relative_position_bias_table,
        "num_heads": attn.num_heads,
        "window_size": block.window_size,
        "scale": attn.scale,
        "dropout_p": _dropout_p(attn),
    }
    if attn.use_global and q_global is not None:
        if q_global.shape[0] != b:
            return "q_global has another batch size"
        k, v = attn.qkv(x).unflatten(-1, (2, attn.num_heads, -1)).unbind(-3)
        # All windows have the same queries.
        q = q_global.reshape(b, 1, height, 1, width, attn.num_heads, -1)
        q = q.expand(-1, h // height, -1, w // width, -1, -1, -1).reshape(k.shape)
        y = attend(q, k, v, **arguments)
    elif attn.use_global:
        return "it is called without q_global"
    else:
        y = attend(attn.qkv(x), **arguments)
    return attn.proj_drop(attn.proj(y))


def _call_gcvit(block: Any, x: Tensor) -> Tensor:
    height, width = block.window_size
    q_global = None
    if block.attn.use_global:
        q_global = x[:, :height, :width].sin().roll(1, 1)
    return type(block)._window_attn(block, x, q_global)


GCVIT = Form(
    name="timm GC ViT",
    of=GlobalContextVitBlock,
    forward=_gcvit,
    sizes=lambda block: tuple(
        (m * block.window_size[0], n * block.window_size[1], block.attn.proj.in_features) for m, n in ((2, 3), (1, 1))
    ),
    method="_window_attn",
    call=_call_gcvit,
    absorbs=("attn",),
)


# Twins


def _twins(attn: Any, attend: Any, x: Tensor, size: Any) -> Any:
    if x.dim() != 3 or x.shape[1] != size[0] * size[1]:
        return f"{tuple(x.shape)} is not a map of {tuple(size)}"
    y = attend(
        attn.qkv(x.unflatten(1, tuple(size))),
        num_heads=attn.num_heads,
        window_size=attn.ws,
        scale=None if attn.fused_attn else attn.scale,
        pad_qkv=attn.qkv.bias,
        dropout_p=_dropout_p(attn),
    )
    return attn.proj_drop(attn.proj(y.flatten(1, 2)))


TWINS = Form(
    name="timm Twins",
    of=LocallyGroupedAttn,
    forward=_twins,
    sizes=lambda attn: _sizes_of((attn.ws,) * 2, attn.dim),
    call=lambda attn, x: type(attn).forward(attn, x.flatten(1, 2), tuple(x.shape[1:3])),
)


# NesT. The map is already partitioned into blocks; each block becomes a row of the op's map.


def _nest(attn: Any, attend: Any, x: Tensor) -> Any:
    if x.dim() != 4:
        return f"x has {x.dim()} axes"
    scale = None if attn.fused_attn else attn.scale
    window = (1, x.shape[2])
    if window[1] > 1024:
        return f"its blocks have {window[1]} tokens, and the op accepts at most 1024"
    y = attend(attn.qkv(x), num_heads=attn.num_heads, window_size=window, scale=scale, dropout_p=_dropout_p(attn))
    y = y.unflatten(-1, (attn.num_heads, -1)).transpose(-1, -2).flatten(-2)  # in NesT, the head index varies fastest
    return attn.proj_drop(attn.proj(y))


NEST = Form(
    name="timm NesT",
    of=NestAttention,
    forward=_nest,
    sizes=lambda attn: ((3, 12, attn.proj.in_features), (1, 49, attn.proj.in_features)),
)


# Hiera. The tokens are ordered by position in the mask unit, then by unit. Consecutive tokens thus belong to different
# units, and each unit becomes a column of the op's map.


def _hiera(attn: Any, attend: Any, x: Tensor) -> Any:
    if attn.q_stride > 1:
        return "it pools its queries"
    if not attn.use_mask_unit_attn:
        return NO_BIAS
    if x.dim() != 3 or x.shape[1] % attn.window_size:
        return "the tokens do not form whole mask units"
    scale = None if attn.fused_attn else attn.scale
    qkv = attn.qkv(x).unflatten(1, (attn.window_size, -1))
    y = attend(qkv, num_heads=attn.heads, window_size=(attn.window_size, 1), scale=scale)
    return attn.proj(y.flatten(1, 2))


HIERA = Form(
    name="timm Hiera",
    of=MaskUnitAttention,
    forward=_hiera,
    sizes=lambda attn: ((3 * attn.q_stride * max(attn.window_size, 1), attn.dim),),
)


# SAM 2's Hiera


def _hieradet(block: Any, attend: Any, x: Tensor) -> Any:
    attn = block.attn
    if block.q_stride is not None or attn.q_pool is not None or block.dim != block.dim_out:
        return "it pools its queries or changes the number of channels"
    if not block.is_windowed:
        return NO_BIAS
    if x.dim() != 4:
        return f"x has {x.dim()} axes"
    y = attend(
        attn.qkv(block.norm1(x)),
        num_heads=attn.num_heads,
        window_size=block.window_size,
        scale=None if attn.fused_attn else attn.scale,
        pad_qkv=attn.qkv.bias,
    )
    x = x + block.drop_path1(block.ls1(attn.proj(y)))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _hieradet_forms() -> tuple[Form, ...]:
    try:
        from timm.models.hieradet_sam2 import MultiScaleBlock
    except ImportError:  # before timm 1.0.9
        return ()
    return (
        Form(
            name="timm SAM 2 Hiera",
            of=MultiScaleBlock,
            forward=_hieradet,
            sizes=lambda block: _sizes_of([max(w, 4) for w in block.window_size], block.dim),
            absorbs=("attn",),
        ),
    )


# CoAtNet


def _coatnet(attn: Any, attend: Any, x: Tensor, shared_rel_pos: Tensor | None = None) -> Any:
    rel_pos = attn.rel_pos
    if rel_pos is None:
        return "it has no position bias of its own, and torch's attention is as fast"
    window = tuple(rel_pos.window_size)
    size = tuple(x.shape[2:] if isinstance(attn, Attention2d) else x.shape[1:-1])
    if size != window:
        return f"the map is {size}, and its position bias is for {window}"
    return maxvit.why_not_attention(attn, "attn", window) or maxvit.attend(attn, x, window, False, attend)


def _coatnet_sizes(attn: Any) -> tuple[tuple[int, ...], ...]:
    window = (4, 4) if attn.rel_pos is None else tuple(attn.rel_pos.window_size)
    if isinstance(attn, Attention2d):
        return ((attn.qkv.in_channels, *window),)
    return ((*window, attn.qkv.in_features),)


COATNET = Form(
    name="timm CoAtNet",
    of=lambda module: isinstance(module, (Attention2d, AttentionCl)),
    forward=_coatnet,
    sizes=_coatnet_sizes,
)

ADAPTERS = (DAVIT, TINY_VIT, GCVIT, TWINS, NEST, HIERA, COATNET, *_hieradet_forms())
