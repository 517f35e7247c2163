"""Forms of weather models. The forms recognise modules by their attributes.

Pangu-Weather's blocks have a separate bias table for each position of a window in height and latitude, and pad the map
on both sides. The maps are volumes or, in FengWu, planes. Aurora's blocks have no bias, and their map may wrap around
the globe.

Source: physicsnemo.nn.module.transformer_layers of nvidia-physicsnemo 2.2, which follows lizhuoq/WeatherLearn;
aurora.model.swin3d of microsoft-aurora 2.0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.adapters.forms.form import Form
from swinkernels.adapters.masks import frame_of, holds, shift_mask
from swinkernels.adapters.microsoft_attention import dropout_at_call, projected

_MOST_TOKENS = 1024


def _pads(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Return, per axis, the number of pad tokens before the map: half of all pad tokens on the axis, rounded down."""
    return tuple(-s % w // 2 for s, w in zip(size, window, strict=True))


# Pangu-Weather


def _is_pangu(module: nn.Module) -> bool:
    attn = module._modules.get("attn")
    return attn is not None and "earth_position_bias_table" in attn._parameters and hasattr(module, "input_resolution")


def _longitude_first(*geometry: int, device: torch.device | str) -> Tensor:
    """Return the standard mask, with the axes (windows along the longitude, windows along the other axes, N, N).

    Args:
        geometry: the sizes of the frame, the window and the shift, in this order, with one number per axis each.
        device: the mask's device.
    """
    axes = len(geometry) // 3
    frame, window, shift = geometry[:axes], geometry[axes : 2 * axes], geometry[2 * axes :]
    mask = shift_mask(frame, window, shift, device=device)
    return mask.unflatten(0, (-1, frame[-1] // window[-1])).transpose(0, 1)


def _pangu(block: Any, attend: Any, x: Tensor) -> Any:
    attn, size, window = block.attn, tuple(block.input_resolution), tuple(block.window_size)
    shift = tuple(block.shift_size) if block.roll else (0,) * len(window)
    if x.dim() != 3 or x.shape[1] != math.prod(size):
        return f"{tuple(x.shape)} is not a map of {size}"
    if math.prod(window) > _MOST_TOKENS:
        return f"its windows have {math.prod(window)} tokens, and the op accepts at most {_MOST_TOKENS}"
    mask = block.attn_mask
    if block.roll and not holds(mask, (_longitude_first, *frame_of(size, window), *window, *shift)):
        return "attn_mask differs from the standard mask for its window and shift"
    if not block.roll and mask is not None:
        return "it has an attn_mask without a shift"
    y = attend(
        attn.qkv(block.norm1(x).unflatten(1, size)),
        num_heads=attn.num_heads,
        window_size=window,
        shift_size=shift,
        bias_table=attn.earth_position_bias_table,
        table_pairs=(*(True for _ in window[:-1]), False),
        scale=attn.scale,
        pad_qkv=attn.qkv.bias,
        pad_before=_pads(size, window),
        dropout_p=dropout_at_call(attn),
    )
    x = x + block.drop_path(projected(attn, y).flatten(1, -2))
    return x + block.drop_path(block.mlp(block.norm2(x)))


PANGU = Form(
    name="Pangu-Weather",
    of=_is_pangu,
    forward=_pangu,
    sizes=lambda block: ((math.prod(block.input_resolution), block.attn.qkv.in_features),),
    absorbs=("attn", "pad"),
)


# Aurora


def _is_aurora(module: nn.Module) -> bool:
    attn = module._modules.get("attn")
    named = all(name in module._modules for name in ("norm1", "norm2", "attn", "mlp")) and hasattr(module, "shift_size")
    return named and all(hasattr(attn, name) for name in ("qkv", "proj", "lora_qkv", "lora_proj"))


def _regions(
    size: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], wraps: bool, device: torch.device
) -> Tensor:
    """Return the region of each token of the shifted and padded map, as an integer.

    If ``wraps`` is True, the map wraps at the date line, and the regions on both sides of it count as one. All pad
    tokens form another region.
    """
    region = torch.zeros((), dtype=torch.int32, device=device)
    for axis, (n, w, s) in enumerate(zip(size, window, shift, strict=True)):
        at = torch.arange(n, device=device)
        of_axis = (at >= n - w).int() + (at >= n - s).int() if s else torch.zeros_like(at).int()
        if wraps and axis == len(size) - 1:
            of_axis = of_axis.clamp(max=1)
        region = 3 * region[..., None] + of_axis
    behind = [-n % w - b for n, w, b in zip(size, window, _pads(size, window), strict=True)]
    around = itertools.chain(*zip(reversed(_pads(size, window)), reversed(behind), strict=True))
    return nn.functional.pad(region, tuple(around), value=27)


def _aurora(block: Any, attend: Any, x: Tensor, c: Tensor, res: Any, rollout_step: int, warped: bool = True) -> Any:
    attn, size = block.attn, tuple(res)
    if x.dim() != 3 or x.shape[1] != math.prod(size):
        return f"{tuple(x.shape)} is not a map of {size}"
    if attn.use_fp16_safe_attention:
        return "it computes attention with use_fp16_safe_attention"
    fits = [n > w for n, w in zip(size, block.window_size, strict=True)]
    window = tuple(w if fit else n for n, w, fit in zip(size, block.window_size, fits, strict=True))
    shift = tuple(s if fit else 0 for s, fit in zip(block.shift_size, fits, strict=True))
    if math.prod(window) > _MOST_TOKENS:
        return f"its windows have {math.prod(window)} tokens, and the op accepts at most {_MOST_TOKENS}"
    x_map = x.unflatten(1, size)
    pad_qkv = None
    if any(n % w for n, w in zip(size, window, strict=True)):
        # q, k and v of pad tokens are computed by the layers, because a trial would not detect wrong values: the mask
        # hides them unless scores are large.
        zero = x.new_zeros(1, x.shape[-1])
        pad_qkv = (attn.qkv(zero) + attn.lora_qkv(zero, rollout_step))[0]
    y = attend(
        attn.qkv(x_map) + attn.lora_qkv(x_map, rollout_step),
        num_heads=attn.num_heads,
        window_size=window,
        shift_size=shift,
        pad_qkv=pad_qkv,
        pad_order="roll_then_pad",
        pad_before=_pads(size, window),
        region_map=_regions(size, window, shift, bool(warped), x.device) if any(shift) else None,
        dropout_p=attn.attn_drop if attn.training else 0.0,
    )
    y = attn.proj_drop(attn.proj(y) + attn.lora_proj(y, rollout_step)).flatten(1, -2)
    x = x + block.drop_path(block.norm1(y, c))
    return x + block.drop_path(block.norm2(block.mlp(x), c))


def _call_aurora(block: Any, x: Tensor) -> Tensor:
    """Call the block on a map that wraps at the date line and on one that does not; concatenate the outputs."""
    size = tuple(x.shape[1:4])
    c = x.flatten(1)[:, : block.norm1.ln_modulation[1].in_features]
    forward = type(block).forward
    return torch.cat([forward(block, x.flatten(1, 3), c, size, 0, warped) for warped in (True, False)])


def _aurora_sizes(block: Any) -> tuple[tuple[int, ...], ...]:
    (d, h, w), channels = block.window_size, block.attn.qkv.in_features
    return (d + 1, h + 1, w + 2, channels), (2 * d, h, 2 * w, channels), (d, 2 * h, w + 1, channels)


AURORA = Form(
    name="Aurora", of=_is_aurora, forward=_aurora, sizes=_aurora_sizes, call=_call_aurora, absorbs=("attn",),
)  # fmt: skip

FORMS = [PANGU, AURORA]
