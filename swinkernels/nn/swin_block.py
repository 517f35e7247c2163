"""The blocks of Swin v1 and v2, and the stages built from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from swinkernels.nn._features import as_given, as_map, check_module, forgive
from swinkernels.nn._inner import all_modules_have_hooks, is_bare
from swinkernels.nn.drop_path import DropPath
from swinkernels.nn.mlp import Mlp
from swinkernels.nn.window_attention import WindowAttention, WindowAttentionV2, window_per_axis
from swinkernels.ops._arguments import Ints, check_count, check_size
from swinkernels.ops._backends import backend_beside
from swinkernels.ops._fused_linear import fuses
from swinkernels.ops._library import linear_dtype
from swinkernels.ops.fallback import add
from swinkernels.ops.layer_norm import layer_norm
from swinkernels.ops.residual_layer_norm import residual_layer_norm, residual_post_norm


def clipped(window: Sequence[int], resolution: Sequence[int] | None) -> tuple[int, ...]:
    """Return ``window``, clipped on each axis to the map's size ``resolution`` unless that is None."""
    if resolution is None:
        return tuple(window)
    return tuple(min(w, n) for w, n in zip(window, resolution, strict=True))


class _Block(nn.Module):
    _ATTENTION: ClassVar[Any]
    # The names of the inner modules, in the order in which they are called.
    _CALLED: ClassVar[tuple[str, ...]] = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int] | None,
        num_heads: int,
        window_size: Ints,
        shift_size: Ints,
        mlp_ratio: float,
        drop: float,
        drop_path: float,
        act_layer: Callable[[], nn.Module],
        eps: float,
        backend: str,
        factory: dict[str, Any],
        **attention: Any,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_module(op, dim=dim, num_heads=num_heads, spatial_dims=2, eps=eps, backend=backend)
        window = window_per_axis(op, window_size)
        resolution = None if input_resolution is None else check_size(op, input_resolution)
        if resolution is not None and len(resolution) != len(window):
            raise ValueError(
                f"{op}: input_resolution must have the {len(window)} axes of window_size {window}, got {resolution}"
            )
        self.dim = dim
        self.input_resolution = resolution
        self.backend = backend
        shift = tuple(shift_size) if isinstance(shift_size, Sequence) else (shift_size,) * len(window)
        if resolution is not None:  # no shift on an axis with one window: the shift could exceed the clipped window
            shift = tuple(0 if n <= w else s for n, w, s in zip(resolution, window, shift, strict=True))
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = self._ATTENTION(
            dim,
            clipped(window, resolution),
            num_heads,
            shift_size=shift,
            proj_drop=drop,
            backend=backend,
            **attention,
            **factory,
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), act_layer=act_layer, drop=drop, **factory)
        self.drop_path2 = DropPath(drop_path)

    @property
    def window_size(self) -> tuple[int, ...]:
        return self.attn.window_size

    @property
    def shift_size(self) -> tuple[int, ...]:
        return self.attn.shift_size

    def _is_of_halves(self, x: Tensor) -> bool:
        """Return True if attention_half and mlp_half can replace the modules and are worthwhile.

        The halves save fewer tensors for the backward pass and fuse matrix products on a CPU, but take more host time.
        If there is no backward pass and no product to fuse, the modules are called.
        """
        modules: Any = self._modules  # bypasses __getattr__, which is slow
        attn, mlp = modules["attn"], modules["mlp"]
        return (
            (torch.is_grad_enabled() or fuses(x))
            and not all_modules_have_hooks()
            and is_bare(attn, self._ATTENTION)
            and is_bare(mlp, Mlp)
            and attn.is_half()
            and mlp.is_half()
        )

    def _run(self, x: Tensor, backend: str) -> Tensor:
        """Run the block on the map ``x``, with the norms on ``backend``."""
        raise NotImplementedError

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        x = as_map(type(self).__name__, x, size, self.dim, len(self.window_size))
        return as_given(self._run(x, backend_beside("residual_layer_norm", self.backend)), size)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing_keys, unexpected_keys, error_msgs)
        forgive(unexpected_keys, prefix, ("attn_mask",))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, input_resolution={self.input_resolution}, backend={self.backend!r}"


class SwinTransformerBlock(_Block):
    r"""Shifted-window attention and an MLP, each with a preceding norm and a residual connection (Swin v1).

    .. math::
        s = x + attention(LayerNorm(x)), \quad y = s + MLP(LayerNorm(s))

    One op computes the first sum with the norm after it or, in inference on some CPUs, with the projection before it.

    Args:
        dim: channels C of a token.
        input_resolution: size (H, W) or (D, H, W) of the map for which the block is built, or None. On axes where this
            map is smaller than the window, the window and the bias table shrink to the map (as in timm, and in
            Microsoft's code for square maps). With None the window never shrinks. The block accepts maps of any size in
            either case.
        num_heads, qkv_bias, qk_scale, head_dim, small_maps, pad_order: as for :class:`WindowAttention`.
        window_size: tokens per axis, an int or one value for each of two or three axes.
        shift_size: tokens by which the windows are shifted. Published models alternate between 0 and window // 2. An
            axis that one window covers is not shifted.
        mlp_ratio: hidden channels of the MLP as a multiple of C.
        drop: dropout probability after the projection and in the MLP.
        attn_drop: dropout probability of attention weights.
        drop_path: probability of dropping a branch for a sample.
        act_layer: class or function that creates the MLP's activation.
        eps: added to the variance of the norms.
        backend: "auto", "cuda", "triton", "cpu", "torch" or "reference", for the attention; norms run on the same
            backend if it supports them.
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), S = (H, W) or (D, H, W), or a sequence (B, L, C) with ``size`` = S. The result has the shape and
        the dtype of x, also under autocast.

    Parameters: those of ``norm1``, ``attn``, ``norm2`` and ``mlp`` (``fc1``, ``fc2``). A checkpoint may also contain
    Microsoft's ``attn_mask``, which is computed here.

    Source: Swin Transformer (Liu et al., 2021), equation 3; ``SwinTransformerBlock`` of Microsoft's Swin-Transformer
    and timm, ``SwinTransformerBlock3D`` of Video-Swin.
    """

    _ATTENTION = WindowAttention

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int] | None,
        num_heads: int,
        window_size: Ints = 7,
        shift_size: Ints = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        *,
        head_dim: int | None = None,
        small_maps: str = "pad",
        pad_order: str = "pad_then_roll",
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            input_resolution,
            num_heads,
            window_size,
            shift_size,
            mlp_ratio,
            drop,
            drop_path,
            act_layer,
            eps,
            backend,
            {"device": device, "dtype": dtype},
            qkv_bias=qkv_bias,
            qk_scale=qk_scale,
            attn_drop=attn_drop,
            head_dim=head_dim,
            small_maps=small_maps,
            pad_order=pad_order,
        )

    def _run(self, x: Tensor, backend: str) -> Tensor:
        modules: Any = self._modules
        first, attn, drop_path1, second, mlp, drop_path2 = map(modules.get, self._CALLED)
        if self._is_of_halves(x):
            if fuses(x):  # the fused projection adds the residual; otherwise the op with the next norm does
                d, e = drop_path1.scale(x), drop_path2.scale(x)
                x = attn.run_half(x, first, drop_path_scale=d)
                return mlp.run_half(x, second, drop_path_scale=e, backend=backend)
            y = attn.run_half(x, first, residual=False)
            d, e = drop_path1.scale(y), drop_path2.scale(y)
            return mlp.run_half(x, second, branch=y, branch_scale=d, drop_path_scale=e, backend=backend)
        z = layer_norm(x, first.weight, first.bias, eps=first.eps, dtype=linear_dtype(x), backend=backend)
        y = attn(z)
        d = drop_path1.scale(y)
        s, z = residual_layer_norm(x, y, second.weight, second.bias, eps=second.eps, drop_path_scale=d, backend=backend)
        y = mlp(z)
        return add(s, y, drop_path2.scale(y))


class SwinTransformerBlockV2(_Block):
    r"""Shifted-window cosine attention and an MLP, each followed by a norm and a residual connection (Swin v2).

    .. math::
        s = x + LayerNorm(attention(x)), \quad y = s + LayerNorm(MLP(s))

    One op computes each norm and the sum after it.

    Args:
        dim, input_resolution, num_heads, window_size, shift_size, mlp_ratio, qkv_bias, drop, attn_drop, drop_path,
            act_layer, pad_order, eps, backend, device, dtype: as for :class:`SwinTransformerBlock`.
        pretrained_window_size: as for :class:`WindowAttentionV2`.

    Shape: as for :class:`SwinTransformerBlock`.

    Parameters: those of ``norm1``, ``attn`` (see :class:`WindowAttentionV2`), ``norm2`` and ``mlp``. A checkpoint may
    also contain Microsoft's ``attn_mask``, which is computed here. This block initialises the weights of the norms to
    1. The published models and :class:`swinkernels.models.SwinTransformer` initialise them to 0.

    Source: Swin Transformer V2 (Liu et al., 2022), section 3.2; ``SwinTransformerBlock`` of Microsoft's
    swin_transformer_v2.py, ``SwinTransformerV2Block`` of timm.
    """

    _ATTENTION = WindowAttentionV2

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int] | None,
        num_heads: int,
        window_size: Ints = 7,
        shift_size: Ints = 0,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        act_layer: Callable[[], nn.Module] = nn.GELU,
        pretrained_window_size: Ints = 0,
        *,
        pad_order: str = "pad_then_roll",
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim,
            input_resolution,
            num_heads,
            window_size,
            shift_size,
            mlp_ratio,
            drop,
            drop_path,
            act_layer,
            eps,
            backend,
            {"device": device, "dtype": dtype},
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            pretrained_window_size=pretrained_window_size,
            pad_order=pad_order,
        )

    def _run(self, x: Tensor, backend: str) -> Tensor:
        modules: Any = self._modules
        first, attn, drop_path1, second, mlp, drop_path2 = map(modules.get, self._CALLED)
        if self._is_of_halves(x):
            d, e = drop_path1.scale(x, linear_dtype(x)), drop_path2.scale(x, linear_dtype(x))
            s = attn.run_half(x, first, norm="post", drop_path_scale=d)
            return mlp.run_half(s, second, norm="post", drop_path_scale=e, backend=backend)
        y = attn(x)
        s = self._add_normed(x, y, first, drop_path1, backend)
        y = mlp(s)
        return self._add_normed(s, y, second, drop_path2, backend)

    @staticmethod
    def _add_normed(x: Tensor, y: Tensor, norm: nn.LayerNorm, drop_path: DropPath, backend: str) -> Tensor:
        d = drop_path.scale(y)
        return residual_post_norm(x, y, norm.weight, norm.bias, eps=norm.eps, drop_path_scale=d, backend=backend)


class BasicLayer(nn.Module):
    r"""A stage of Swin v1: blocks with alternating shifts, and patch merging or expanding before or after them.

    Args:
        dim: channels C of the blocks.
        input_resolution: size of the blocks' map, as for :class:`SwinTransformerBlock`, or None.
        depth: number of blocks; every other one is shifted by half a window.
        num_heads, window_size, mlp_ratio, qkv_bias, qk_scale, drop, attn_drop: as for :class:`SwinTransformerBlock`.
        drop_path: one value for all blocks, or a value for each block.
        downsample: class or function that creates the patch merging, or None for no merging. Merging follows the
            blocks, from C to 2C channels, as in Microsoft's code. With ``downsample_first`` it precedes them, from
            C / 2 to C channels, as in timm.
        use_checkpoint: True to store only the input of each block in training and recompute the rest in the backward
            pass.
        upsample: class or function that creates the patch expanding of the C channels after the blocks, as in
            Swin-Unet's decoder, or None for no expanding.
        options: further arguments of the blocks (``head_dim``, ``small_maps``, ``pad_order``, ``act_layer``, ``eps``).
        backend: backend of the blocks and, if it supports them, of merging and expanding.
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), or (B, L, C) with ``size`` = S, and (B, \*S, C / 2) with ``downsample_first``. The result is a
        map or a sequence, like x, with the size and the channels after merging or expanding.

    Parameters: ``blocks.<i>`` and, if there are any, ``downsample`` and ``upsample``.

    Source: ``BasicLayer`` of Microsoft's Swin-Transformer, Video-Swin and Swin-Unet, ``BasicLayer_up`` of Swin-Unet,
    ``SwinTransformerStage`` of timm.
    """

    _BLOCK: ClassVar[Any] = SwinTransformerBlock

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int] | None,
        depth: int,
        num_heads: int,
        window_size: Ints = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        *,
        downsample_first: bool = False,
        upsample: Callable[..., nn.Module] | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_count(op, "depth", depth, at_least=0)
        window = window_per_axis(op, window_size)
        rates = [drop_path] * depth if isinstance(drop_path, (int, float)) else list(drop_path)
        if len(rates) != depth:
            raise ValueError(f"{op}: drop_path must be one value or one for each of the {depth} blocks, got {rates}")
        if downsample_first and (downsample is None or dim % 2 != 0):
            raise ValueError(
                f"{op}: downsample_first needs an even dim and a downsample, which turns dim / 2 channels into dim, "
                f"got dim {dim} and downsample {downsample}"
            )
        self.dim = dim
        self.axes = len(window)
        self.downsample_first = downsample_first
        self.use_checkpoint = use_checkpoint
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        of_merging = {"backend": backend_beside("patch_merging", backend), **factory}
        if qk_scale is not None:
            options["qk_scale"] = qk_scale
        # Modules are created in the order of the published code, so that a seed gives the same initial parameters.
        self.downsample = downsample(dim // 2, **of_merging) if downsample is not None and downsample_first else None
        self.blocks = nn.ModuleList(
            self._BLOCK(
                dim,
                input_resolution,
                num_heads,
                window,
                tuple(w // 2 for w in window) if i % 2 else 0,
                mlp_ratio,
                qkv_bias,
                drop=drop,
                attn_drop=attn_drop,
                drop_path=rate,
                backend=backend,
                **factory,
                **options,
            )
            for i, rate in enumerate(rates)
        )
        if downsample is not None and not downsample_first:
            self.downsample = downsample(dim, **of_merging)
        of_expanding = {"backend": backend_beside("layer_norm", backend), **factory}
        self.upsample = None if upsample is None else upsample(dim, **of_expanding)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        width = self.dim // 2 if self.downsample_first else self.dim
        x = as_map(type(self).__name__, x, size, width, self.axes)
        if self.downsample is not None and self.downsample_first:
            x = self.downsample(x)
        x = self.run_blocks(x)
        if self.downsample is not None and not self.downsample_first:
            x = self.downsample(x)
        if self.upsample is not None:
            x = self.upsample(x)
        return as_given(x, size)

    def run_blocks(self, x: Tensor) -> Tensor:
        """Run only the blocks, on a map. Detection and segmentation models use the result before patch merging."""
        for block in self.blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def extra_repr(self) -> str:
        return f"dim={self.dim}, depth={len(self.blocks)}, use_checkpoint={self.use_checkpoint}"


class BasicLayerV2(BasicLayer):
    r"""A stage of Swin v2: a :class:`BasicLayer` with blocks of the class :class:`SwinTransformerBlockV2`.

    Args:
        pretrained_window_size: as for :class:`WindowAttentionV2`.
        others: as for :class:`BasicLayer`, except ``qk_scale``, ``head_dim`` and ``small_maps``.

    Shape, parameters and source: as for :class:`BasicLayer`; see also Swin Transformer V2 (Liu et al., 2022).
    """

    _BLOCK = SwinTransformerBlockV2

    def __init__(
        self,
        dim: int,
        input_resolution: Sequence[int] | None,
        depth: int,
        num_heads: int,
        window_size: Ints = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float | Sequence[float] = 0.0,
        downsample: Callable[..., nn.Module] | None = None,
        use_checkpoint: bool = False,
        pretrained_window_size: Ints = 0,
        **others: Any,
    ) -> None:
        super().__init__(
            dim,
            input_resolution,
            depth,
            num_heads,
            window_size,
            mlp_ratio,
            qkv_bias,
            None,
            drop,
            attn_drop,
            drop_path,
            downsample,
            use_checkpoint,
            pretrained_window_size=pretrained_window_size,
            **others,
        )
