"""What timm's shifted-window blocks have in common: their map, their mask, the op and the norms beside it.

timm rolls the map, pads it, cuts it into windows and undoes it all afterwards. Linear layers act on tokens one by one,
so QKV and the projection run on the map as it lies, and the op addresses the windows. A pad token is a zero row of the
QKV layer's input: its q, k and v are the bias of that layer.
"""

from __future__ import annotations

from typing import Any

from timm.layers import DropPath
from torch import Tensor

from swinkernels.adapters.adapter import Accelerated
from swinkernels.adapters.bypass import child
from swinkernels.adapters.masks import differs, frame_of, shift_mask
from swinkernels.adapters.norms import Residual
from swinkernels.ops import window_attention_qkvpacked

_MASK = "attn_mask"


def map_size(block: Any) -> tuple[int, int]:
    """The map that a block was made for."""
    attributes = block.__dict__
    return attributes["feat_size" if "feat_size" in attributes else "input_resolution"]  # v2-CR has the former


def block_shape(block: Any) -> tuple[int, ...]:
    return (*map_size(block), block.dim)


def qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


def mask_fits(block: Any, x: Tensor) -> bool:
    """Whether the block's stored mask, which is timm's for :func:`map_size`, is that of this map (B, H, W, C)."""
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True  # made from the map, or none
    size, window = map_size(block), block.window_size
    return x.shape[1:3] == size or frame_of(x.shape[1:3], window) == frame_of(size, window)


def has_own_mask(block: Any) -> bool:
    """Whether attn_mask holds other values than timm puts there, which the kernels would not read."""
    if getattr(block, "dynamic_mask", False):
        return False  # timm does not read it either
    expected = None
    if any(block.shift_size):
        expected = shift_mask(frame_of(map_size(block), block.window_size), block.window_size, block.shift_size)
    return differs(block._buffers.get(_MASK), expected)


def why_not_block(block: Any, method: str) -> str | None:
    """Why a block's attention, which is that method of it, has to be timm's own code for good, or None."""
    if not hasattr(block, method):
        return f"this version of timm has no {type(block).__name__}.{method}: it needs timm 0.9.16 or newer"
    if method in block.__dict__:
        return f"its {method} was replaced on the instance"
    return "attn_mask holds other values than timm's" if has_own_mask(block) else None


def shifted_windows(block: Any) -> dict[str, Any]:
    """The arguments of the op that say where the windows are."""
    return {
        "num_heads": child(block, "attn").num_heads,
        "window_size": block.window_size,
        "shift_size": block.shift_size,
        "pad_order": "roll_then_pad",
        "mask_value": -100.0,
    }


def attend(block: Any, qkv: Tensor, dropout_p: float, **arguments: Any) -> Tensor:
    """The attention half of a block from q, k and v on the map, (B, H, W, 3C), on."""
    attn = child(block, "attn")
    out = window_attention_qkvpacked(qkv, dropout_p=dropout_p, backend=block._swinkernels_backend, **arguments)
    return attn.proj_drop(attn.proj(out))


def dropout_p(block: Any) -> float:
    """The probability of attention dropout in training."""
    return getattr(child(child(block, "attn"), "attn_drop"), "p", 0.0)


class ShiftedWindowBlock(Accelerated):
    """Notices when a mask is put in the place of timm's.

    Geometry and parameters are read at every call, so ``set_input_size`` and anything else that changes them holds.
    Where an op cannot stand in for timm's code (a hook on an inner module, a layer that is not an nn.Linear, tracing
    by TorchScript or FX, a mask of the user's own), timm's code runs. Changing the values of ``attn_mask`` or
    ``relative_position_index`` in place goes unnoticed: assign a new tensor instead.
    """

    _swinkernels_own_mask = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = has_own_mask(self)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        super().register_buffer(name, tensor, persistent=persistent)
        if name == _MASK:
            self.__dict__["_swinkernels_own_mask"] = has_own_mask(self)


# The halves of a block with its norms behind its branches (v2 and v2-CR)
POST_NORM = tuple(Residual(f"norm{half}", f"drop_path{half}", DropPath, "timm's DropPath") for half in (1, 2))


def add_normed(block: Any, x: Tensor, y: Tensor, half: int) -> Tensor:
    """x + drop_path(norm(y)), with those of the first or the second half of a block."""
    fused = POST_NORM[half - 1].add_normed(block, x, y)
    if fused is not None:
        return fused
    return x + child(block, f"drop_path{half}")(child(block, f"norm{half}")(y))


def merging_shape(merging: Any) -> tuple[int, ...]:
    """It does not know its map. An even one: not every version of timm merges an odd one."""
    return 6, 10, merging.reduction.in_features // 4
