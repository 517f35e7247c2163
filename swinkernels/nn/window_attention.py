"""Modules for the shifted-window attention of Swin v1 and v2 on feature maps."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.nn._features import as_given, as_map, check_module, forgive, refuse_tracing
from swinkernels.nn._inner import all_modules_have_hooks, is_bare
from swinkernels.ops._arguments import PAD_ORDERS, Ints, check_choice, check_ints, check_window
from swinkernels.ops._fused_linear import joins
from swinkernels.ops._library import autocast_dtype
from swinkernels.ops._position_bias import fits_op, position_bias
from swinkernels.ops.attention_half import attention_half
from swinkernels.ops.window_attention import window_attention_qkvpacked
from swinkernels.reference.window_attention import relative_position_index

SMALL_MAPS = ("pad", "clip")


def window_per_axis(op: str, window_size: Any) -> tuple[int, ...]:
    """Return ``window_size`` with one value per axis. An int gives two equal values."""
    rank = len(window_size) if isinstance(window_size, Sequence) else 2
    if rank not in (2, 3):
        raise ValueError(f"{op}: window_size must be an int or have two or three values, got {window_size!r}")
    return check_window(op, window_size, 0, rank)[0]


class _WindowAttention(nn.Module):
    _BUFFERS: ClassVar[tuple[str, ...]]  # names of buffers that checkpoints of the published modules contain
    qkv: nn.Linear
    proj: nn.Linear
    proj_drop: nn.Dropout

    def __init__(
        self, dim: int, window_size: Ints, num_heads: int, attn_dim: int, attn_drop: float, **options: Any
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_module(op, dim=dim, num_heads=num_heads, spatial_dims=2, eps=0.0, backend=options["backend"])
        check_choice(op, "pad_order", options["pad_order"], PAD_ORDERS)
        if attn_dim % num_heads != 0:
            raise ValueError(f"{op}: dim must be a multiple of num_heads, got {dim} and {num_heads}")
        self.dim = dim
        self.num_heads = num_heads
        self.window_size = window_per_axis(op, window_size)
        _, self.shift_size = check_window(op, self.window_size, options["shift_size"], len(self.window_size))
        self.pad_order: str = options["pad_order"]
        self.backend: str = options["backend"]
        self.attn_drop = nn.Dropout(attn_drop)

    def _qkv_bias(self) -> Tensor | None:
        """Return the bias of qkv, which equals q, k and v of a pad token, or None if there is no bias."""
        return self.qkv.bias

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return q, k and v of a map, and those of a pad token (None for zeros)."""
        return self.qkv(x), self._qkv_bias()

    def _scores(self) -> dict[str, Any]:
        """Return the op's arguments that define the scores."""
        raise NotImplementedError

    def _window(self, size: Sequence[int], full: tuple[int, ...]) -> tuple[int, ...]:
        """Return the window for a map of the given ``size``; ``full`` is the window before clipping."""
        return full

    def _arguments(self, axes: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of the op for a map of size ``axes``, except the map and ``pad_qkv``."""
        full = (1,) * (len(axes) - len(self.window_size)) + self.window_size  # frame by frame
        window = self._window(axes, full)
        shift = (0,) * (len(axes) - len(self.shift_size)) + self.shift_size
        drop: Any = self._modules["attn_drop"]
        return {
            "num_heads": self.num_heads,
            "window_size": window,
            # An axis with only one window needs no shift.
            "shift_size": tuple(0 if n <= w else s for n, w, s in zip(axes, window, shift, strict=True)),
            "table_window": None if window == full else full,
            "pad_order": self.pad_order,
            "dropout_p": drop.p if drop.training else 0.0,
            "backend": self.backend,
            **self._scores(),
        }

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        refuse_tracing(type(self).__name__)
        x = as_map(type(self).__name__, x, size, self.dim, len(self.window_size))
        qkv, pad_qkv = self._qkv(x)
        out = window_attention_qkvpacked(qkv, pad_qkv=pad_qkv, **self._arguments(x.shape[1:-1]))
        return as_given(self.proj_drop(self.proj(out)), size)

    def is_half(self) -> bool:
        """Return True if ``attention_half`` can replace the modules: no hooks and no active dropout.

        With attention dropout, the random numbers would differ: the modules draw them before those of stochastic depth,
        but the factors of stochastic depth must be drawn before ``attention_half`` is called.
        """
        modules: Any = self._modules  # bypasses __getattr__, which is slow
        attn_drop, proj_drop = modules["attn_drop"], modules["proj_drop"]
        return (
            is_bare(modules["qkv"], nn.Linear)
            and is_bare(modules["proj"], nn.Linear)
            and is_bare(proj_drop, nn.Dropout)
            and not (proj_drop.training and proj_drop.p > 0.0)
            and not (attn_drop.training and attn_drop.p > 0.0)
        )

    def run_half(self, x: Tensor, layer_norm: nn.LayerNorm, **options: Any) -> Tensor:
        """Run a block's attention half with ``attention_half``, given the block's norm and further ``options``."""
        refuse_tracing(type(self).__name__)
        modules: Any = self._modules
        proj, arguments = modules["proj"], self._arguments(x.shape[1:-1])
        return attention_half(
            x, layer_norm.weight, layer_norm.bias, modules["qkv"].weight, self._qkv_bias(), proj.weight, proj.bias,
            eps=layer_norm.eps, **arguments, **options,
        )  # fmt: skip

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        forgive(unexpected_keys, prefix, self._BUFFERS)
        index = state_dict.get(f"{prefix}relative_position_index")
        if index is None or index.is_meta:
            return
        expected = relative_position_index(self.window_size, device="cpu")
        if not torch.equal(index.reshape(-1).to("cpu", torch.long), expected.reshape(-1)):
            error_msgs.append(
                f"{prefix}relative_position_index differs from the index of Microsoft's code for window_size "
                f"{self.window_size}, which this module uses: the bias table would be read in another order"
            )

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, window_size={self.window_size}, num_heads={self.num_heads}, "
            f"shift_size={self.shift_size}, pad_order={self.pad_order!r}, backend={self.backend!r}"
        )


class WindowAttention(_WindowAttention):
    r"""Multi-head attention inside the shifted windows of a feature map, with a relative position bias (Swin v1).

    .. math:: y = W_{proj} \cdot attention(W_{qkv} \cdot x + b_{qkv}) + b_{proj}

    The Linear layers run on the map in image order, and :func:`swinkernels.window_attention_qkvpacked` addresses the
    windows. A map that is not a multiple of the window is padded with zeros that are attended to, so q, k and v of a
    pad token are the bias of ``qkv``.

    Args:
        dim: channels C of a token.
        window_size: tokens per axis: an int for square windows in 2D, else a value per axis, (H, W) or (D, H, W).
            A window of two axes divides a 3D map frame by frame.
        num_heads: number of heads.
        qkv_bias: True for a bias of ``qkv``.
        qk_scale: factor of the scores, head_dim ** -0.5 by default.
        attn_drop, proj_drop: dropout probabilities of the attention weights and of the result.
        head_dim: channels of a head, dim / num_heads by default.
        shift_size: tokens by which the windows are shifted, an int or one per axis, 0..window - 1. An axis that one
            window covers is not shifted.
        small_maps: on axes where the map is smaller than the window, "pad" pads the map, and "clip" shrinks the window
            to the map; its token t then uses the bias of token t of the full window, as in MONAI and Video-Swin.
        pad_order: "pad_then_roll" (Microsoft, torchvision, transformers, MONAI, mmpretrain) or "roll_then_pad" (timm).
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference".
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), S = (H, W) or (D, H, W), of any size, or a sequence (B, L, C) with ``size`` = S. The result has
        the shape of x and, under autocast, the autocast dtype.

    Parameters: ``qkv.weight`` (3 * A, C), ``qkv.bias`` (3 * A), ``proj.weight`` (C, A), ``proj.bias`` (C),
    ``relative_position_bias_table`` (prod(2 * window - 1), num_heads), A = num_heads * head_dim. A checkpoint may also
    have Microsoft's ``relative_position_index``, which is checked but not stored.

    Source: Swin Transformer (Liu et al., 2021), section 3.2; ``WindowAttention`` of Microsoft's Swin-Transformer and
    timm, ``WindowAttention3D`` of Video-Swin.
    """

    _BUFFERS = ("relative_position_index",)

    def __init__(
        self,
        dim: int,
        window_size: Ints,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        *,
        head_dim: int | None = None,
        shift_size: Ints = 0,
        small_maps: str = "pad",
        pad_order: str = "pad_then_roll",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        attn_dim = dim if head_dim is None else head_dim * num_heads
        options = {"shift_size": shift_size, "pad_order": pad_order, "backend": backend}
        super().__init__(dim, window_size, num_heads, attn_dim, attn_drop, **options)
        check_choice(type(self).__name__, "small_maps", small_maps, SMALL_MAPS)
        self.small_maps = small_maps
        self.scale = (attn_dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        rows = math.prod(2 * w - 1 for w in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(rows, num_heads, **factory))
        self.qkv = nn.Linear(dim, 3 * attn_dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(attn_dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise the bias table. The linear layers have their own reset_parameters."""
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def _window(self, size: Sequence[int], full: tuple[int, ...]) -> tuple[int, ...]:
        return full if self.small_maps == "pad" else tuple(min(w, n) for w, n in zip(full, size, strict=True))

    def _scores(self) -> dict[str, Any]:
        return {"bias_table": self.relative_position_bias_table, "scale": self.scale}


def _fill_coords_table(attn: WindowAttentionV2, _incompatible_keys: Any) -> None:
    """Recompute the table after loading, because ``assign=True`` can change the dtype and device of the MLP."""
    attn.fill_coords_table()


class WindowAttentionV2(_WindowAttention):
    r"""Cosine attention inside the shifted windows of a feature map, with a continuous position bias (Swin v2).

    .. math::
        score_{ij} = e^{\min(logit\_scale, \ln 100)} \cos(q_i, k_j) + 16 \, \sigma(MLP(\Delta_{ij}))

    where Delta is the logarithmically spaced offset between tokens i and j. The MLP runs once for each offset in a
    window. It runs in its own dtype even under autocast, because half precision would cost more accuracy in the bias
    than in the rest of the block.

    Args:
        dim, window_size, num_heads, attn_drop, proj_drop, shift_size, pad_order, backend, device, dtype: as for
            :class:`WindowAttention`.
        qkv_bias: True for biases of q and v; k has no bias.
        pretrained_window_size: the window with which the MLP was trained, an int or one per axis, or 0 for
            ``window_size``.

    Shape: as for :class:`WindowAttention`.

    Parameters: ``logit_scale`` (num_heads, 1, 1), ``cpb_mlp.0.weight`` (512, axes), ``cpb_mlp.0.bias`` (512),
    ``cpb_mlp.2.weight`` (num_heads, 512), ``qkv.weight`` (3C, C), ``q_bias``, ``v_bias`` (C), ``proj.weight`` (C, C),
    ``proj.bias`` (C). A checkpoint may also have Microsoft's ``relative_position_index`` and ``relative_coords_table``,
    which are checked but not stored.

    Source: Swin Transformer V2 (Liu et al., 2022), section 3; ``WindowAttention`` of Microsoft's
    swin_transformer_v2.py and timm's.
    """

    _BUFFERS = ("relative_position_index", "relative_coords_table")
    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Ints,
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: Ints = 0,
        *,
        shift_size: Ints = 0,
        pad_order: str = "pad_then_roll",
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options = {"shift_size": shift_size, "pad_order": pad_order, "backend": backend}
        super().__init__(dim, window_size, num_heads, dim, attn_drop, **options)
        rank = len(self.window_size)
        self.pretrained_window_size = check_ints(
            type(self).__name__, "pretrained_window_size", pretrained_window_size, rank, at_least=0
        )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.logit_scale = nn.Parameter(torch.empty(num_heads, 1, 1, **factory))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(rank, 512, **factory), nn.ReLU(), nn.Linear(512, num_heads, bias=False, **factory)
        )
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **factory)
        self.q_bias = nn.Parameter(torch.empty(dim, **factory)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.empty(dim, **factory)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        offsets = torch.empty(math.prod(2 * w - 1 for w in self.window_size), rank, **factory)
        self.register_buffer("relative_coords_table", offsets, persistent=False)
        self.register_load_state_dict_post_hook(_fill_coords_table)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise ``logit_scale``, the biases and the offsets. The linear layers have their own reset_parameters."""
        nn.init.constant_(self.logit_scale, math.log(10))
        for bias in (self.q_bias, self.v_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        self.fill_coords_table()

    def _coords_table(self) -> Tensor:
        """Return the logarithmically spaced offsets in the window, (prod(2 * window - 1), axes), in float32."""
        axes = []
        for window, trained in zip(self.window_size, self.pretrained_window_size, strict=True):
            widest = max((trained or window) - 1, 1)  # the only offset in a window of 1 is 0
            axes.append(torch.arange(1.0 - window, window, device="cpu", dtype=torch.float64) / widest * 8)
        offsets = torch.cartesian_prod(*axes)
        return (offsets.sign() * torch.log2(offsets.abs() + 1) / 3).float()

    def fill_coords_table(self) -> None:
        """Compute the buffer of offsets, with the device and the dtype of the MLP's first layer."""
        weight: Any = self.cpb_mlp[0].weight
        table = self.relative_coords_table
        if (table.device, table.dtype) != (weight.device, weight.dtype):
            table = self.relative_coords_table = torch.empty(table.shape, dtype=weight.dtype, device=weight.device)
        if not table.is_meta:
            with torch.no_grad():
                table.copy_(self._coords_table())

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> WindowAttentionV2:
        """Apply ``fn``, for example to move the module, and recompute the offsets, which ``to_empty`` would lose."""
        super()._apply(fn, recurse)
        self.fill_coords_table()
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        table = state_dict.get(f"{prefix}relative_coords_table")
        if table is None or table.is_meta:
            return
        expected = self._coords_table()
        given = table.detach().to("cpu", torch.float64).reshape(-1)
        # The published code computes the table in float32 and stores it in the model's dtype.
        near = 4 * max(torch.finfo(table.dtype).eps, 2.0**-20) * expected.abs().max()
        if given.numel() != expected.numel() or not (given - expected.reshape(-1)).abs().max() <= near:
            error_msgs.append(
                f"{prefix}relative_coords_table does not belong to window_size {self.window_size} and "
                f"pretrained_window_size {self.pretrained_window_size}: the checkpoint was made with another value of "
                "at least one. Build the model with the checkpoint's pretrained_window_size, or drop the key to use "
                "the model's"
            )

    def _qkv_bias(self) -> Tensor | None:
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))

    def _qkv(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        bias = self._qkv_bias()
        return self.qkv(x) if bias is None else F.linear(x, self.qkv.weight, bias), bias

    def _scores(self) -> dict[str, Any]:
        offsets = self.relative_coords_table
        in_own_dtype = autocast_dtype(offsets) is not None
        with torch.autocast(offsets.device.type, enabled=False) if in_own_dtype else contextlib.nullcontext():
            table = self._fused_table(offsets)
            if table is None:
                table = 16 * torch.sigmoid(self.cpb_mlp(offsets))
        return {"bias_table": table, "logit_scale": self.logit_scale}

    def _fused_table(self, offsets: Tensor) -> Tensor | None:
        """Return the bias table, computed by one op, or None if the modules have to be called."""
        mlp: Any = self._modules["cpb_mlp"]
        kinds = (nn.Linear, nn.ReLU, nn.Linear)
        if self.backend not in ("auto", "cpu") or not joins(offsets) or all_modules_have_hooks():
            return None
        if not (is_bare(mlp, nn.Sequential) and len(mlp) == len(kinds)):
            return None
        if not all(map(is_bare, mlp, kinds)):
            return None
        fc1, _, fc2 = mlp
        given = offsets, (fc1.weight, fc1.bias), (fc2.weight, fc2.bias)
        return position_bias(*given) if fits_op(*given) else None
