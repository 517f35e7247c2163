"""Forms of published code that is copied under many class names. The forms recognise modules by their attributes.

The attention modules of mmdetection and mmsegmentation roll, pad and mask the map. The attention modules of SCUNet and
Swin-MAE roll and mask maps that consist of whole windows; SCUNet's mask value is -inf. FDAT's attention has a dense
bias. ResShift's blocks use channels-first maps. Segment Anything's blocks have decomposed relative positions. EsViT's
blocks return attention weights, which the stage discards. In HTSAT and laion-clap the stage returns the mean attention
weights of its blocks. Uformer has one layer for queries and another for keys and values, and in VRT the two frames of a
window also attend to each other. nnFormer's stages compute the mask, order the rows of the bias table differently, and
in the decoder compute the queries from a second input.

Source: mmdet.models.backbones.swin of mmdet 3.3, models/network_scunet.py of cszn/SCUNet, swin_unet.py of
Zian-Xu/Swin-MAE, fdat.py of stinkybread/fdat, models/swin_transformer.py of zsyOAOA/ResShift,
segment_anything.modeling.image_encoder of segment-anything 1.0, models/swin_transformer.py of microsoft/esvit,
model/htsat.py of RetroCirce/HTS-Audio-Transformer, laion_clap.clap_module.htsat of laion-clap 1.1, model.py of
ZhendongWang6/Uformer, nnFormer_tumor.py of 282857341/nnFormer, models/network_vrt.py of JingyunLiang/VRT.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import original_class
from swinkernels.adapters.copies.dynamic_class import parameters_of
from swinkernels.adapters.forms.decomposed import decomposed_attention, sizes_of, small_tables
from swinkernels.adapters.forms.deferred import deferred
from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.masks import MASKED, frame_of, is_stored_mask
from swinkernels.adapters.microsoft_attention import dropout_at_call, projected, qkv_of, resembles_attention
from swinkernels.adapters.part import op_on
from swinkernels.ops._library import autocast_dtype

_MOST_TOKENS = 1024


def _has(module: nn.Module | None, *names: str) -> bool:
    return module is not None and all(name in module._modules for name in names)


def _has_attributes(module: nn.Module | None, *names: str) -> bool:
    return all(hasattr(module, name) for name in names)


# Attention modules that roll and mask the map themselves


def _is_mmdet(module: nn.Module) -> bool:
    inner = module._modules.get("w_msa")
    taken = [p.name for p in parameters_of(type(module))] if inner is not None else []
    return "hw_shape" in taken and resembles_attention(inner) and hasattr(module, "shift_size")


def _mmdet(attn: Any, attend: Any, query: Tensor, hw_shape: Any) -> Any:
    inner, size = attn.w_msa, tuple(hw_shape)
    if query.dim() != 3 or query.shape[1] != math.prod(size):
        return f"{tuple(query.shape)} is not a map of {size}"
    y = attend(
        qkv_of(inner, query.unflatten(1, size), inner.qkv.bias),
        num_heads=inner.num_heads,
        window_size=attn.window_size,
        shift_size=attn.shift_size,
        bias_table=inner.relative_position_bias_table,
        scale=inner.scale,
        pad_qkv=inner.qkv.bias,
        dropout_p=dropout_at_call(inner),
    )
    return attn.drop(projected(inner, y).flatten(1, 2))


def _mmdet_sizes(attn: Any) -> tuple[tuple[int, ...], ...]:
    w, c = attn.window_size, attn.w_msa.qkv.in_features
    return (w + 1, 2 * w + 1, c), (2 * w, 3 * w, c), (w, max(w - 1, 1), c)


MMDET = Form(
    name="ShiftWindowMSA",
    of=_is_mmdet,
    forward=_mmdet,
    sizes=_mmdet_sizes,
    call=lambda attn, x: type(attn).forward(attn, x.flatten(1, 2), tuple(x.shape[1:3])),
    absorbs=("w_msa",),
)


def _scunet(attn: Any, attend: Any, x: Tensor) -> Any:
    window = attn.window_size
    if x.dim() != 4 or x.shape[1] % window or x.shape[2] % window:
        return "the map does not consist of whole windows"
    y = attend(
        attn.embedding_layer(x),
        num_heads=attn.n_heads,
        window_size=window,
        shift_size=0 if attn.type == "W" else window // 2,
        bias_table=attn.relative_position_params.flatten(1).t(),
        scale=attn.scale,
        mask_value=MASKED,
    )
    return attn.linear(y)


SCUNET = Form(
    name="SCUNet",
    of=lambda module: _has(module, "embedding_layer", "linear") and "relative_position_params" in module._parameters,
    forward=_scunet,
    sizes=lambda attn: tuple(
        (m * attn.window_size, n * attn.window_size, attn.embedding_layer.in_features) for m, n in ((2, 3), (1, 1))
    ),
)


def _is_swin_mae(module: nn.Module) -> bool:
    shifts = resembles_attention(module) and type(getattr(module, "shift_size", None)) is int
    return shifts and len(parameters_of(original_class(module))) == 1


def _swin_mae(attn: Any, attend: Any, x: Tensor) -> Any:
    window = attn.window_size
    if x.dim() != 4 or x.shape[1] != x.shape[2] or x.shape[1] % window:
        return "the map is not a square of whole windows"
    y = attend(
        attn.qkv(x),
        num_heads=attn.num_heads,
        window_size=window,
        shift_size=attn.shift_size,
        bias_table=attn.relative_position_bias_table,
        scale=attn.scale,
        dropout_p=dropout_at_call(attn),
    )
    return projected(attn, y)


SWIN_MAE = Form(
    name="Swin-MAE",
    of=_is_swin_mae,
    forward=_swin_mae,
    sizes=lambda attn: tuple((n * attn.window_size, n * attn.window_size, attn.qkv.in_features) for n in (2, 1)),
)


def _fdat(attn: Any, attend: Any, x: Tensor, height: int, width: int) -> Any:
    if x.dim() != 3 or x.shape[1] != height * width:
        return f"{tuple(x.shape)} is not a map of {height} x {width}"
    y = attend(
        attn.qkv(x.unflatten(1, (height, width))),
        num_heads=attn.nh,
        window_size=attn.ws,
        bias=attn.bias,
        scale=attn.scale,
        pad_qkv=attn.qkv.bias,
    )
    return attn.proj(y).flatten(1, 2)


FDAT = Form(
    name="FDAT",
    of=lambda module: (
        _has(module, "qkv", "proj") and "bias" in module._parameters and _has_attributes(module, "ws", "nh")
    ),
    forward=_fdat,
    sizes=lambda attn: tuple((m * attn.ws + 1, n * attn.ws, attn.qkv.in_features) for m, n in ((1, 2), (0, 1))),
    call=lambda attn, x: type(attn).forward(attn, x.flatten(1, 2), *x.shape[1:3]),
)


# Blocks and stages


def _is_segment_anything(module: nn.Module) -> bool:
    attn = module._modules.get("attn")
    named = _has(module, "norm1", "norm2", "attn", "mlp") and type(getattr(module, "window_size", None)) is int
    return named and _has(attn, "qkv", "proj") and _has_attributes(attn, "use_rel_pos", "num_heads")


def _segment_anything(block: Any, attend: Any, x: Tensor) -> Any:
    attn, drop_path = block.attn, block._modules.get("drop_path", _NOTHING)
    if getattr(block, "use_residual_block", False):
        return "it has a residual block of convolutions"
    # Copies that call torch's fused attention do not read attn.scale.
    reads_scale = "scale" in original_class(attn).forward.__code__.co_names
    scale = attn.scale if reads_scale else None
    y = decomposed_attention(attn, attend, block.norm1(x), block.window_size, attn.num_heads, attn.use_rel_pos, scale)
    if isinstance(y, str):
        return y
    x = x + drop_path(attn.proj(y))
    return x + drop_path(block.mlp(block.norm2(x)))


_NOTHING = nn.Identity()

SEGMENT_ANYTHING = Form(
    name="Segment Anything",
    of=_is_segment_anything,
    forward=_segment_anything,
    sizes=lambda block: sizes_of(block.window_size, block.attn, block.attn.use_rel_pos),
    absorbs=("attn",),
    small=lambda block: small_tables("attn", block.window_size, block.attn, block.attn.use_rel_pos),
)


def _qkv(block: Any, x: Tensor, size: Sequence[int]) -> Tensor:
    return block.attn.qkv(block.norm1(x).unflatten(1, tuple(size)))


def _arguments(block: Any) -> dict[str, Any]:
    """Return the op's arguments for a block in Microsoft's form, except dropout_p."""
    attn = block.attn
    return {
        "num_heads": attn.num_heads,
        "window_size": block.window_size,
        "shift_size": block.shift_size,
        "bias_table": attn.relative_position_bias_table,
        "scale": attn.scale,
        "pad_qkv": attn.qkv.bias,
    }


def _with_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path(block.mlp(block.norm2(x)))


def _blocks_of(stage: nn.Module) -> list[Any]:
    """Return the blocks of a stage if the attention of each is in Microsoft's form, else an empty list."""
    blocks: Any = stage._modules.get("blocks")
    found = list(blocks) if blocks and hasattr(stage, "downsample") else []
    return found if all(resembles_attention(b._modules.get("attn")) for b in found) else []


def _is_esvit(module: nn.Module) -> bool:
    return hasattr(type(module), "forward_with_attention") and bool(_blocks_of(module))


def _esvit(stage: Any, attend: Any, x: Tensor) -> Any:
    side = math.isqrt(x.shape[1])
    if x.dim() != 3 or side * side != x.shape[1]:
        return "the tokens do not form a square map"
    for block in stage.blocks:
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        kept = block.attn_mask_dict.items()
        if not all(is_stored_mask(mask, frame_of((n, n), window), window, shift) for n, mask in kept):
            return "attn_mask_dict differs from the standard mask for its window and shift"
    for block in stage.blocks:
        y = attend(_qkv(block, x, (side, side)), **_arguments(block), dropout_p=dropout_at_call(block.attn))
        x = _with_mlp(block, x + block.drop_path(projected(block.attn, y).flatten(1, 2)))
    return x if stage.downsample is None else stage.downsample(x)


def _esvit_sizes(stage: Any) -> tuple[tuple[int, ...], ...]:
    window, channels = stage.blocks[0].window_size, stage.blocks[0].attn.qkv.in_features
    return ((2 * window) ** 2, channels), ((window + 2 - window % 2) ** 2, channels)


ESVIT = Form(
    name="EsViT", of=_is_esvit, forward=_esvit, sizes=_esvit_sizes, absorbs=("blocks",),
)  # fmt: skip


def _is_htsat(module: nn.Module) -> bool:
    code = getattr(original_class(module).forward, "__code__", None)
    names = () if code is None else code.co_varnames
    blocks = _blocks_of(module) if "attn" in names else []
    return bool(blocks) and all(_has_attributes(b, "input_resolution", "attn_mask") for b in blocks)


def _why_not_htsat(stage: Any, x: Tensor, size: tuple[int, ...]) -> str | None:
    if getattr(stage, "use_checkpoint", False):
        return "it checkpoints its blocks"
    if x.dim() != 3 or x.shape[1] != math.prod(size):
        return f"{tuple(x.shape)} is not a map of size {size}"
    for block in stage.blocks:
        window, shift = (block.window_size,) * 2, (block.shift_size,) * 2
        if tuple(block.input_resolution) != size or any(n % block.window_size for n in size):
            return "its blocks expect a map of another size, or the map does not consist of whole windows"
        mask = block.attn_mask
        if not is_stored_mask(mask, size, window, shift) if any(shift) else mask is not None:
            return "attn_mask differs from the standard mask for its window and shift"
    return None


def _htsat(stage: Any, attend: Any, x: Tensor) -> Any:
    """Return the stage's output and its attention weights: the mean over all blocks or, in training, the last block's.

    No model reads the attention weights of all stages, so they are computed only when first read. With dropout they are
    computed immediately, because the op could not draw the same random numbers later.
    """
    blocks, size = list(stage.blocks), tuple(stage.blocks[0].input_resolution)
    reason = _why_not_htsat(stage, x, size)
    if reason is not None:
        return reason
    dtype = x.dtype if autocast_dtype(x) is None else torch.float32  # autocast runs softmax in float32

    drops = any(dropout_at_call(block.attn) > 0.0 for block in blocks)
    returned = slice(-1, None) if stage.training else slice(None)
    taken: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    weights = []
    for block in blocks:
        qkv, arguments = _qkv(block, x, size), _arguments(block)
        if drops:
            y, of_block = attend(qkv, **arguments, dropout_p=dropout_at_call(block.attn), return_attention=True)
            weights.append(of_block.flatten(0, 1).to(dtype))
        else:
            y = attend(qkv, **arguments)
            taken.append((qkv, arguments.pop("bias_table").clone(), {**arguments, "pad_qkv": None}))
        x = _with_mlp(block, x + block.drop_path(projected(block.attn, y).flatten(1, 2)))
    if stage.downsample is not None:
        x = stage.downsample(x)
    if drops:
        return x, torch.stack(weights[returned]).mean(0)
    taken = taken[returned]

    settings = [arguments for *_, arguments in taken]

    def compute(*read: Tensor) -> Tensor:
        op = op_on("torch")  # kernels do not return attention weights
        found = [
            op(qkv, bias_table=table, **arguments, return_attention=True)[1].flatten(0, 1).to(dtype)
            for qkv, table, arguments in zip(read[::2], read[1::2], settings, strict=True)
        ]
        return torch.stack(found).mean(0)

    read = [t for qkv, table, _ in taken for t in (qkv, table)]
    n, heads = blocks[0].window_size ** 2, blocks[0].attn.num_heads
    return x, deferred(compute, (x.shape[0] * math.prod(size) // n, heads, n, n), dtype, read)


def _call_htsat(stage: Any, x: Tensor) -> Tensor:
    return torch.cat([t.flatten() for t in type(stage).forward(stage, x)])


HTSAT = Form(
    name="HTSAT",
    of=_is_htsat,
    forward=_htsat,
    sizes=lambda stage: ((math.prod(stage.blocks[0].input_resolution), stage.blocks[0].attn.qkv.in_features),),
    call=_call_htsat,
    absorbs=("blocks",),
)


# A block with channels-first maps


def _is_resshift(module: nn.Module) -> bool:
    first = getattr(module._modules.get("mlp"), "fc1", None)
    named = _has(module, "norm1", "norm2", "attn", "mlp") and hasattr(module, "input_resolution")
    return named and isinstance(first, nn.Conv2d) and resembles_attention(module._modules["attn"])


def _resshift(block: Any, attend: Any, x: Tensor) -> Any:
    attn, window, shift = block.attn, block.window_size, block.shift_size
    if x.dim() != 4 or x.shape[2] % window or x.shape[3] % window:
        return "the map does not consist of whole windows"
    size = tuple(x.shape[2:])
    if block.input_resolution == size and not is_stored_mask(block.attn_mask, size, (window,) * 2, (shift,) * 2):
        return "attn_mask differs from the standard mask for its window and shift"
    y = attend(attn.qkv(block.norm1(x).permute(0, 2, 3, 1)), **_arguments(block), dropout_p=dropout_at_call(attn))
    return _with_mlp(block, x + block.drop_path(projected(attn, y).permute(0, 3, 1, 2)))


RESSHIFT = Form(
    name="ResShift",
    of=_is_resshift,
    forward=_resshift,
    sizes=lambda block: tuple(
        (block.attn.qkv.in_features, m * block.window_size, n * block.window_size) for m, n in ((2, 3), (2, 2))
    ),
    absorbs=("attn",),
)


# Attention modules whose input the block has partitioned into windows. Each window becomes a row of the op's map.


def _rows(x: Tensor, mask: Any) -> Any:
    """Return the number of windows in ``mask`` (1 for None), or the reason why the op rejects ``x`` or ``mask``."""
    n = x.shape[1]
    if x.dim() != 3 or n > _MOST_TOKENS:
        return f"x is {tuple(x.shape)}"
    if mask is None:
        return 1
    if mask.dim() != 3 or mask.shape[1] != n or mask.shape[2] != n or x.shape[0] % mask.shape[0]:
        return "the mask does not have the shape (windows, N, N)"
    return mask.shape[0]


def _dense(bias: Tensor | None, mask: Tensor | None, num_heads: int) -> Tensor | None:
    """Return the sum of a bias (num_heads, N, N) and a mask (windows, N, N), either of which may be None.

    If all elements of a mask row are -inf, the row of the sum is NaN, as a softmax of the row would be.
    """
    if mask is None:
        return bias
    nothing_left = mask.isneginf().all(-1, keepdim=True)
    mask = (mask.float() if mask.dtype == torch.float16 else mask).clamp(min=MASKED)
    mask = mask.masked_fill(nothing_left, math.nan)[:, None]
    return mask.expand(-1, num_heads, -1, -1) if bias is None else bias + mask


def _bias_of(attn: Any, n: int) -> Tensor:
    index = attn.relative_position_index[:n, :n].reshape(-1)
    return attn.relative_position_bias_table[index].reshape(n, n, -1).permute(2, 0, 1)


def _with_masks(call: Callable[[Tensor, Tensor | None], Tensor], x: Tensor) -> Tensor:
    """Return the concatenated outputs of ``call(windows, mask)`` with a mask and with None.

    ``x`` contains the windows as (images, windows, N, C).
    """
    n = x.shape[2]
    mask = torch.zeros(x.shape[1], n, n, dtype=x.dtype, device=x.device)
    mask[-1, : n // 2, n // 2 :] = mask[-1, n // 2 :, : n // 2] = -100.0
    windows = x.flatten(0, 1)
    return torch.cat([call(windows, m) for m in (mask, None)])


def _call_with_masks(attn: Any, x: Tensor) -> Tensor:
    return _with_masks(lambda windows, mask: type(attn).forward(attn, windows, mask=mask), x)


def _attend_windows(attn: Any, attend: Any, qkv: tuple[Tensor, ...], rows: int, mask: Tensor | None) -> Tensor:
    """Call the op on the windows (B * rows, N, num_heads, head_dim) in ``qkv``, as B maps of ``rows`` rows of N tokens.

    ``qkv`` is the tuple (q, k, v).
    """
    n = qkv[0].shape[1]
    return attend(
        *(t.reshape(-1, rows, n, *t.shape[-2:]) for t in qkv),
        num_heads=attn.num_heads,
        window_size=(1, n),
        scale=attn.scale,
        bias=_dense(_bias_of(attn, n), mask, attn.num_heads),
        dropout_p=dropout_at_call(attn),
    )


def _volume(window: Any) -> int:
    return math.prod(window) if isinstance(window, (tuple, list)) else int(window) ** 2


def _uformer(attn: Any, attend: Any, x: Tensor, attn_kv: Any = None, mask: Tensor | None = None) -> Any:
    if attn_kv is not None:
        return "it is called with attn_kv"
    rows = _rows(x, mask)
    if isinstance(rows, str):
        return rows
    n, layers = x.shape[1], attn.qkv
    if n != _volume(attn.win_size):
        return f"windows of {n} tokens do not match win_size"
    q = layers.to_q(x).unflatten(-1, (1, attn.num_heads, -1))
    k, v = layers.to_kv(x).unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
    y = _attend_windows(attn, attend, (q, k, v), rows, mask)
    return projected(attn, y.reshape(x.shape))


UFORMER = Form(
    name="Uformer",
    of=lambda module: _has(module, "qkv", "proj") and _has(module._modules["qkv"], "to_q", "to_kv"),
    forward=_uformer,
    sizes=lambda attn: ((3, _volume(attn.win_size), attn.dim),),
    call=_call_with_masks,
)


def _skip(attn: Any, attend: Any, skip: Tensor, x_up: Tensor, pos_embed: Any = None, mask: Tensor | None = None) -> Any:
    rows, n = _rows(skip, mask), skip.shape[1]
    if isinstance(rows, str):
        return rows
    if pos_embed is not None or x_up.shape != skip.shape or n != _volume(attn.window_size):
        return "it is called with pos_embed, or with windows that do not match window_size"
    k, v = attn.kv(skip).unflatten(-1, (2, attn.num_heads, -1)).unbind(2)
    if x_up.dtype != k.dtype and autocast_dtype(x_up) is None:
        return f"its queries are {x_up.dtype}, its keys {k.dtype}"
    q = x_up.to(k.dtype).unflatten(-1, (attn.num_heads, -1))
    y = _attend_windows(attn, attend, (q, k, v), rows, mask)
    return projected(attn, y.reshape(skip.shape))


def _is_skip(module: nn.Module) -> bool:
    own = _has(module, "kv", "proj") and "relative_position_bias_table" in module._parameters
    return own and "x_up" in inspect.signature(original_class(module).forward).parameters


def _call_skip(attn: Any, x: Tensor) -> Tensor:
    def call(skip: Tensor, mask: Tensor | None) -> Tensor:
        return type(attn).forward(attn, skip, skip.roll(1, 1).cos(), mask=mask)

    return _with_masks(call, x)


NNFORMER_SKIP = Form(
    name="nnFormer's skips",
    of=_is_skip,
    forward=_skip,
    sizes=lambda attn: ((3, _volume(attn.window_size), attn.kv.in_features),),
    call=_call_skip,
)


def _vrt(attn: Any, attend: Any, x: Tensor, mask: Tensor | None = None) -> Any:
    rows = _rows(x, mask)
    if isinstance(rows, str):
        return rows
    (_, n, c), heads = x.shape, attn.num_heads

    def attention(*maps: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
        length = maps[0].shape[1]
        maps = tuple(t.unflatten(0, (-1, rows)) for t in maps)
        y = attend(*maps, num_heads=heads, window_size=(1, length), scale=attn.scale, bias=_dense(bias, mask, heads))
        return y.reshape(-1, length, c)

    out = attention(attn.qkv_self(x), bias=_bias_of(attn, n), mask=mask)
    if attn.mut_attn:
        qkv = attn.qkv_mut(x + attn.position_bias.repeat(1, 2, 1)).unflatten(-1, (3, heads, -1))
        (q1, k1, v1), (q2, k2, v2) = (half.unbind(2) for half in qkv.chunk(2, dim=1))
        of_half = None if mask is None else mask[:, : n // 2, : n // 2]
        mutual = [attention(*maps, bias=None, mask=of_half) for maps in ((q2, k1, v1), (q1, k2, v2))]
        out = torch.cat([torch.cat(mutual, dim=1), out], dim=2)
    return attn.proj(out)


VRT = Form(
    name="VRT",
    of=lambda module: _has(module, "qkv_self", "proj") and "relative_position_bias_table" in module._parameters,
    forward=_vrt,
    sizes=lambda attn: ((3, _volume(attn.window_size), attn.qkv_self.in_features),),
    call=_call_with_masks,
)


# Stages that process volumes. The rows of their bias tables are not in row-major order of the offsets. The stages of
# nnFormer_acdc.py use different windows and no mask, so only their attention modules use the op.


def _is_nnformer(module: nn.Module, *names: str) -> bool:
    blocks: Any = module._modules.get("blocks")
    if not blocks or [p.name for p in parameters_of(original_class(module))] != [*names, "S", "H", "W"]:
        return False
    return all(
        _has(b, "norm1", "norm2", "attn", "mlp")
        and _has_attributes(b, "input_resolution", "shift_size")
        and type(getattr(b, "window_size", None)) is int
        and _has_attributes(b.attn, "relative_position_bias_table", "relative_position_index")
        for b in blocks
    )


def _row_major(table: Tensor, index: Tensor, window: Sequence[int]) -> Tensor:
    """Return the bias table with its rows in row-major order of the offsets, which the op expects.

    ``index`` (N, N) is the module's index into ``table``. It is read at one pair of tokens per offset.
    """
    query, key = [], []
    for axis, w in enumerate(window):
        offset = torch.arange(1 - w, w, device=index.device).reshape(
            [-1 if i == axis else 1 for i in range(len(window))]
        )
        query.append(offset.clamp(min=0))
        key.append((-offset).clamp(min=0))
    return table[index.reshape(*window, *window)[tuple(query + key)].flatten()]


def _nnformer_blocks(stage: Any, attend: Any, x: Tensor, size: tuple[int, ...], maps: Any = None) -> Any:
    """Return the output of the stage's blocks, or the reason why the stage must run its own code.

    Args:
        stage, attend: as in ``Form.forward``.
        x: the sequence (B, L, C) of a volume of ``size``.
        maps: two sequences or None. If given, the first block computes keys and values from the first sequence, and
            queries from the second.
    """
    for block in stage.blocks:
        if tuple(block.input_resolution) != size or x.shape[1] != math.prod(size):
            return f"{tuple(x.shape)} is not a map of size {size}"
        if block.shift_size and (block.window_size, block.shift_size) != (stage.window_size, stage.shift_size):
            return "its mask has other windows than its blocks"
        if block.window_size**3 > _MOST_TOKENS:
            return f"its windows have {block.window_size**3} tokens, and the op accepts at most {_MOST_TOKENS}"
    for block in stage.blocks:
        attn, window = block.attn, (block.window_size,) * 3
        given = {
            "num_heads": attn.num_heads,
            "window_size": window,
            "shift_size": block.shift_size,
            "bias_table": _row_major(attn.relative_position_bias_table, attn.relative_position_index, window),
            "scale": attn.scale,
            "dropout_p": dropout_at_call(attn),
        }
        if maps is None:
            y = attend(_qkv(block, x, size), pad_qkv=attn.qkv.bias, **given)
        else:
            skip, up = (block.norm1(t).unflatten(1, size) for t in maps)
            k, v = attn.kv(skip).unflatten(-1, (2, attn.num_heads, -1)).unbind(-3)
            pads = (
                None
                if attn.kv.bias is None
                else torch.cat([attn.kv.bias.new_zeros(k.shape[-2:].numel()), attn.kv.bias])
            )
            y, maps = attend(up.to(k.dtype).unflatten(-1, k.shape[-2:]), k, v, pad_qkv=pads, **given), None
        x = _with_mlp(block, x + block.drop_path(projected(attn, y).flatten(1, 3)))
    return x


def _nnformer_encoder(stage: Any, attend: Any, x: Tensor, *size: int) -> Any:
    x = _nnformer_blocks(stage, attend, x, size)
    if isinstance(x, str):
        return x
    if stage.downsample is None:
        return x, *size, x, *size
    return x, *size, stage.downsample(x, *size), *((n + 1) // 2 for n in size)


def _nnformer_decoder(stage: Any, attend: Any, x: Tensor, skip: Tensor, *size: int) -> Any:
    up, size = stage.Upsample(x, *size), tuple(2 * n for n in size)
    x = _nnformer_blocks(stage, attend, up + skip, size, (skip, up))
    return x if isinstance(x, str) else (x, *size)


def _call_nnformer(stage: Any, x: Tensor) -> Tensor:
    """Call ``stage`` on the volume ``x``, which may have any size.

    A decoder also receives a smaller volume, which is computed from every second token of ``x`` along each axis.
    """
    size = tuple(x.shape[1:4])
    for block in stage.blocks:
        block.input_resolution = size
    args: tuple[Any, ...] = x.flatten(1, 3), *size
    if "Upsample" in stage._modules:
        small = x[:, ::2, ::2, ::2].flatten(1, 3)
        args = torch.cat([small.cos(), small], -1), args[0], *(n // 2 for n in size)
    results = type(stage).forward(stage, *args)
    return torch.cat([t.flatten() for t in results if isinstance(t, Tensor)])


def _nnformer_sizes(stage: Any) -> tuple[tuple[int, ...], ...]:
    window, channels = stage.blocks[0].window_size, stage.blocks[0].attn.proj.in_features
    n = window + window % 2
    return (n, n, n, channels), (n + 2, n, 2 * n, channels)


NNFORMER_ENCODER = Form(
    name="nnFormer's encoder",
    of=lambda module: _is_nnformer(module, "x"),
    forward=_nnformer_encoder,
    sizes=_nnformer_sizes,
    call=_call_nnformer,
    absorbs=("blocks",),
)
NNFORMER_DECODER = dataclasses.replace(
    NNFORMER_ENCODER,
    name="nnFormer's decoder",
    of=lambda module: _is_nnformer(module, "x", "skip"),
    forward=_nnformer_decoder,
)

FORMS = [
    MMDET,
    SCUNET,
    SWIN_MAE,
    FDAT,
    SEGMENT_ANYTHING,
    ESVIT,
    HTSAT,
    RESSHIFT,
    UFORMER,
    NNFORMER_ENCODER,
    NNFORMER_DECODER,
    NNFORMER_SKIP,
    VRT,
]
