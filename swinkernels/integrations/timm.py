"""timm's Swin Transformer (v1): the attention half of a block as QKV in image order, one op, and the projection.

timm rolls the map, pads it, cuts it into windows and undoes it all afterwards. Linear layers act on tokens one by one,
so QKV and the projection run on the map as it lies, and the op addresses the windows. A pad token, a zero row that
timm inserts after norm1, has the bias of the QKV layer as its q, k and v.

Source: timm.models.swin_transformer.SwinTransformerBlock, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from torch import Tensor, nn

from swinkernels.integrations._adapter import Adapter
from swinkernels.ops import window_attention_qkvpacked

_MASK = "attn_mask"


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def _reason_to_fall_back(block: SwinTransformerBlock) -> str | None:
    """Why this block's attention has to be timm's own code at present.

    Every forward pass asks, so what is looked up is taken from the module's dictionaries: __getattr__ is slow.
    """
    attn = block._modules["attn"]
    if type(attn) is not WindowAttention:
        return f"attn is a {type(attn).__name__}, not timm's WindowAttention"
    if "forward" in attn.__dict__:
        return "attn.forward was replaced on the instance"
    # A hook would see other shapes (on qkv, proj, proj_drop: the map instead of windows) or no call (on the others).
    if _has_hooks(attn):
        return "a hook is registered on attn"
    modules = attn._modules
    for name, module in modules.items():
        if module is not None and _has_hooks(module):
            return f"a hook is registered on attn.{name}"
    # Any other layer may mix tokens, and what it makes of a pad token is not known.
    if type(modules["qkv"]) is not nn.Linear:
        return f"attn.qkv is a {type(modules['qkv']).__name__}, not an nn.Linear"
    if type(modules["proj"]) is not nn.Linear:
        return f"attn.proj is a {type(modules['proj']).__name__}, not an nn.Linear"
    if type(modules["softmax"]) is not nn.Softmax:
        return f"attn.softmax is a {type(modules['softmax']).__name__}, not an nn.Softmax"
    if type(modules["attn_drop"]) not in (nn.Dropout, nn.Identity):
        return f"attn.attn_drop is a {type(modules['attn_drop']).__name__}, not an nn.Dropout"
    if not isinstance(attn.scale, float):
        return f"attn.scale is a {type(attn.scale).__name__}, not a float"
    height, width = block.window_size
    if attn.relative_position_bias_table.shape[0] != (2 * height - 1) * (2 * width - 1):
        return "attn.relative_position_bias_table is not the table of window_size"
    return None


def _resolution(block: SwinTransformerBlock) -> tuple[int, int]:
    return cast("tuple[int, int]", block.input_resolution)  # timm's annotation allows an int, its code does not


def _frame(size: tuple[int, int], window: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]


def _mask_fits(block: SwinTransformerBlock, height: int, width: int) -> bool:
    """Whether the block's stored mask, which is for input_resolution, is that of this map."""
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True  # made from the map, or none
    window = block.window_size
    return _frame((height, width), window) == _frame(_resolution(block), window)


def _differs(x: Tensor | None, expected: Tensor | None) -> bool:
    if x is None or expected is None:
        return x is not expected
    if x.shape != expected.shape:
        return True
    return not x.is_meta and not torch.equal(x.to("cpu", expected.dtype), expected)  # meta tensors have no values


def _standard_mask(block: SwinTransformerBlock) -> Tensor | None:
    """The mask that timm computes for input_resolution, (num_windows, N, N), or None for a block without shift."""
    if not any(block.shift_size):
        return None
    window = block.window_size
    frame = _frame(_resolution(block), window)
    regions = []
    for p, w, s in zip(frame, window, block.shift_size, strict=True):
        g = torch.arange(p, device="cpu")
        regions.append((g >= p - w).long() + (g >= p - s).long() if s > 0 else torch.zeros_like(g))
    region = 3 * regions[0][:, None] + regions[1]
    region = region.reshape(frame[0] // window[0], window[0], frame[1] // window[1], window[1]).transpose(1, 2)
    region = region.reshape(-1, window[0] * window[1])
    return -100.0 * (region[:, :, None] != region[:, None, :])


def _has_own_mask(block: SwinTransformerBlock) -> bool:
    """Whether attn_mask holds other values than timm puts there, which the kernels would not read."""
    if getattr(block, "dynamic_mask", False):
        return False  # timm does not read it either
    return _differs(block._buffers.get(_MASK), _standard_mask(block))


def _window_index(block: SwinTransformerBlock) -> Tensor:
    """relative_position_index by the formula that the kernels compute: (query - key) + window - 1, row-major."""
    height, width = block.window_size
    token = torch.arange(height * width, device="cpu")
    offset = [c[:, None] - c[None, :] for c in (token // width, token % width)]
    return (offset[0] + height - 1) * (2 * width - 1) + offset[1] + width - 1


class AcceleratedSwinTransformerBlock(SwinTransformerBlock):
    """timm's block with its attention half on a window attention op.

    Geometry and parameters are read at every call, so ``set_input_size`` and anything else that changes them holds.
    Where the op cannot stand in for timm's code (a hook on an inner module, a layer that is not an nn.Linear, tracing
    by TorchScript or FX, a mask of the user's own), the block runs timm's code. Changing the values of ``attn_mask`` or
    ``relative_position_index`` in place goes unnoticed: assign a new tensor instead.
    """

    _swinkernels_backend = "auto"
    _swinkernels_own_mask = False

    def _attn(self, x: Tensor) -> Tensor:
        if (
            not isinstance(x, Tensor)  # a proxy of torch.fx
            or torch.jit.is_tracing()
            or self._swinkernels_own_mask
            or _reason_to_fall_back(self) is not None
            or not _mask_fits(self, x.shape[1], x.shape[2])
        ):
            return super()._attn(x)
        attn = self.attn
        out = window_attention_qkvpacked(
            attn.qkv(x),
            **_attention_arguments(self),
            dropout_p=_dropout_p(self) if _dropout_is_on(self) else 0.0,
            backend=self._swinkernels_backend,
        )
        return attn.proj_drop(attn.proj(out))

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = _has_own_mask(self)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent=persistent)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = _has_own_mask(self)

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile a block that swinkernels.accelerate has replaced: call "
            "swinkernels.restore(model) before scripting it, or use torch.jit.trace, torch.export or torch.compile"
        )


def _attention_arguments(block: SwinTransformerBlock) -> dict[str, Any]:
    attn = block.attn
    return {
        "bias_table": attn.relative_position_bias_table,
        "num_heads": attn.num_heads,
        "window_size": block.window_size,
        "shift_size": block.shift_size,
        # scaled_dot_product_attention, which timm calls if fused_attn is set, has its own scale.
        "scale": None if getattr(attn, "fused_attn", False) else attn.scale,
        "pad_qkv": attn.qkv.bias,
        "pad_order": "roll_then_pad",
        "mask_value": -100.0,
    }


def _dropout_p(block: SwinTransformerBlock) -> float:
    return getattr(block.attn.attn_drop, "p", 0.0)


def _dropout_is_on(block: SwinTransformerBlock) -> bool:
    attn = block.attn
    return attn.training if getattr(attn, "fused_attn", False) else attn.attn_drop.training


def _reason_to_skip(block: SwinTransformerBlock) -> str | None:
    if not hasattr(block, "_attn"):
        return "this version of timm has no SwinTransformerBlock._attn: it needs timm 0.9.16 or newer"
    if "_attn" in block.__dict__:
        return "its _attn was replaced on the instance"
    if _has_own_mask(block):
        return "attn_mask holds other values than timm's"
    reason = _reason_to_fall_back(block)
    if reason is not None:
        return reason
    if _differs(block.attn._buffers["relative_position_index"], _window_index(block)):
        return "attn.relative_position_index holds other values than timm's"
    return None


ADAPTER = Adapter(
    name="timm",
    original=SwinTransformerBlock,
    accelerated=AcceleratedSwinTransformerBlock,
    reason_to_skip=_reason_to_skip,
    attention_arguments=_attention_arguments,
    dropout_p=_dropout_p,
    map_size=_resolution,
    qkv_weight=lambda block: block.attn.qkv.weight,
    attention=lambda block, x: block._attn(x),
)
