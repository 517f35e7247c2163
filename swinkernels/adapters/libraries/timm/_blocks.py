"""Code shared by the adapters of timm's shifted-window blocks: map, mask, attention op, norms and MLP.

timm rolls the map, pads it, partitions it into windows and later undoes all of this. Linear layers process each token
separately, so QKV and the projection run on the map in image order, and the op addresses the windows. A pad token is a
row of zeros in the QKV layer's input, so its q, k and v are the bias of the QKV layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from timm.layers import DropPath, Mlp
from timm.layers.activations import GELU, GELUTanh
from torch import Tensor

from swinkernels.adapters import linear_layers, microsoft_attention
from swinkernels.adapters.adapter import Accelerated, original_class
from swinkernels.adapters.bypass import child, replaced_method, watch, why_not_window_attention
from swinkernels.adapters.checks import settled
from swinkernels.adapters.halves import Halves, add_normed_attention, attention_branch
from swinkernels.adapters.masks import frame_of, is_stored_mask, is_window_index
from swinkernels.adapters.norms import Residual
from swinkernels.ops import window_attention_qkvpacked
from swinkernels.ops._arguments import why_beyond_limits

watch(DropPath, Mlp)
linear_layers.know_gelu(GELU, lambda act: "none")
linear_layers.know_gelu(GELUTanh, lambda act: "tanh")
MLP = linear_layers.Mlp(
    (("mlp", Mlp, ("fc1", "act", "drop1", "norm", "fc2", "drop2")),), drop="drop_path2", drop_kind=DropPath
)


def map_size(block: Any) -> tuple[int, int]:
    """Return the size of the map for which ``block`` was created."""
    attributes = block.__dict__
    return attributes["feat_size" if "feat_size" in attributes else "input_resolution"]  # v2-CR has feat_size


def block_shape(block: Any) -> tuple[int, ...]:
    return (*map_size(block), block.dim)


def qkv_weight(block: Any) -> Tensor:
    return block.attn.qkv.weight


def mask_fits(block: Any, x: Tensor) -> bool:
    """Return True if the block's stored mask fits the map ``x`` (B, H, W, C), or if the block uses no stored mask."""
    return settled(block, _mask_fits, x.shape[1:3])


def _mask_fits(block: Any, size: Sequence[int]) -> bool:
    if getattr(block, "dynamic_mask", False) or not any(block.shift_size):
        return True  # timm computes the mask from the map, or the block has no mask
    of_mask, window = map_size(block), block.window_size
    return size == of_mask or frame_of(size, window) == frame_of(of_mask, window)


def why_not_stored(block: Any, buffers: tuple[Tensor | None, Tensor | None]) -> str | None:
    """Return a message that names the buffer of :func:`stored` that differs from timm's, or None if none does."""
    index, mask = buffers
    window, shift = block.window_size, block.shift_size
    has_index = "relative_position_index" in child(block, "attn")._buffers  # v2-CR has none
    if has_index and not is_window_index(index, window):
        return "attn.relative_position_index differs from timm's"
    if not getattr(block, "dynamic_mask", False):  # with dynamic_mask, timm does not read the stored mask
        height, width = map_size(block)
        frame = -(-height // window[0]) * window[0], -(-width // window[1]) * window[1]
        if not (is_stored_mask(mask, frame, window, shift) if any(shift) else mask is None):
            return "attn_mask differs from timm's"
    return None


def stored(block: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the block's relative_position_index and attn_mask, each None if there is no such buffer."""
    return child(block, "attn")._buffers.get("relative_position_index"), block._buffers.get("attn_mask")


def why_not_attention(block: Any, kind: type, takes_lora: bool = False) -> str | None:
    """Check the conditions shared by all timm block classes.

    Return the reason why timm's own code has to run attention, or None.

    ``kind`` is the expected class of the attention module; ``takes_lora`` is as in
    :func:`~swinkernels.adapters.bypass.why_not_window_attention`.
    """
    reason = replaced_method(block, original_class(block))
    if reason is not None:
        return reason
    attn = child(block, "attn")
    if type(attn) is not kind:
        return f"attn is a {type(attn).__name__}, not timm's {kind.__name__}"
    height, width = block.window_size
    if getattr(block, "window_area", height * width) != height * width:
        return "window_area is not the product of window_size"
    if tuple(getattr(attn, "window_size", (height, width))) != (height, width):
        return "attn.window_size is not window_size"
    reason = why_not_window_attention(attn, takes_lora=takes_lora) or why_beyond_limits(0, block.window_size)
    return reason or why_not_stored(block, stored(block))


def why_not_block(block: Any, method: str) -> str | None:
    """Return the reason why the block's attention method, named ``method``, must always run timm's code, or None."""
    if not hasattr(block, method):
        return f"this version of timm has no {type(block).__name__}.{method}: it needs timm 0.9.16 or newer"
    return replaced_method(block, original_class(block)) or why_not_stored(block, stored(block))


def shifted_windows(block: Any) -> dict[str, Any]:
    """Return the op's arguments for heads, windows and mask."""
    return {
        "num_heads": child(block, "attn").num_heads,
        "window_size": block.window_size,
        "shift_size": block.shift_size,
        "pad_order": "roll_then_pad",
        "mask_value": -100.0,
    }


def attended(block: Any, qkv: Tensor, dropout_p: float, **arguments: Any) -> Tensor:
    """Return the op's output for ``qkv``, which contains q, k and v of the map, (B, H, W, 3C)."""
    return window_attention_qkvpacked(qkv, dropout_p=dropout_p, backend=block._swinkernels_backend, **arguments)


def projected(block: Any, out: Tensor) -> Tensor:
    return microsoft_attention.projected(child(block, "attn"), out)


def add_projected(block: Any, x: Tensor, out: Tensor) -> Tensor | None:
    """Return x + drop_path1(projected(out)), computed in one pass, or None if that is not possible."""
    drop_path = "drop_path1", child(block, "drop_path1"), DropPath
    return microsoft_attention.add_projected(child(block, "attn"), out, x, drop_path)


def attend(block: Any, qkv: Tensor, dropout_p: float, **arguments: Any) -> Tensor:
    """Return the output of the block's attention, including the projection, for ``qkv`` (B, H, W, 3C)."""
    return projected(block, attended(block, qkv, dropout_p, **arguments))


def dropout_p(block: Any) -> float:
    """Return the probability of attention dropout in training."""
    return getattr(child(child(block, "attn"), "attn_drop"), "p", 0.0)


class ShiftedWindowBlock(Accelerated):
    """Base class of the accelerated timm blocks. They store a mask and, except in v2-CR, an index into the bias table.

    Geometry, parameters and stored tensors are read or compared at every call, so changes such as ``set_input_size``
    take effect. timm's code runs if an op cannot replace it: with a hook on an inner module, a layer that is not an
    nn.Linear, a replaced method or a changed mask or index, and while TorchScript or FX traces the code.
    """

    def _swinkernels_stored(self) -> tuple[Tensor | None, ...]:
        return stored(self)

    def _swinkernels_look(self) -> None:
        why_not_stored(self, stored(self))


# The norm and the drop path of each half. In v2 and v2-CR the norms follow the branches.
RESIDUALS = tuple(Residual(f"norm{half}", f"drop_path{half}", DropPath, "timm's DropPath") for half in (1, 2))
# The MLP half of v2 and v2-CR.
MLP_HALF = Halves(RESIDUALS[1], MLP, "post")


def add_normed(block: Any, x: Tensor, y: Tensor, half: int) -> Tensor:
    """Return x + drop_path(norm(y)), with the norm and the drop path of ``half`` (1 or 2)."""
    fused = RESIDUALS[half - 1].add_normed(block, x, y)
    if fused is not None:
        return fused
    return x + child(block, f"drop_path{half}")(child(block, f"norm{half}")(y))


def add_attention_half(
    block: Any, x: Tensor, why_not: Callable[[Any], str | None], arguments: Callable[[Any], dict[str, Any]]
) -> Tensor | None:
    """Return x + drop_path1(norm1(attention(x))), the first half of a v2 or v2-CR block, or None if it is not one op.

    ``why_not`` returns the reason why attention_half cannot replace the block's attention, or None, and ``arguments``
    the op's arguments for pad tokens, scores, heads and windows.
    """
    if x.dim() != 4 or not mask_fits(block, x):
        return None

    def branch() -> Tensor | None:
        p = dropout_p(block) if child(block, "attn").attn_drop.training else 0.0
        given = {**arguments(block), "dropout_p": p}
        return attention_branch(
            block, x, microsoft_attention.attention_layers, block._swinkernels_backend, given, True, "post"
        )

    return add_normed_attention(block, x, RESIDUALS[0], why_not, branch)


def add_mlp_half(block: Any, s: Tensor) -> Tensor:
    """Return s + drop_path2(norm2(MLP(s))), the second half of a v2 or v2-CR block."""
    out = MLP_HALF.run(block, s)
    return add_normed(block, s, MLP.branch(block, s), 2) if out is None else out


def merging_shape(merging: Any) -> tuple[int, ...]:
    """Return an even map size: ``merging`` stores no size, and some versions of timm reject odd ones."""
    return 6, 10, merging.reduction.in_features // 4
