"""Patch embedding as a module: a convolution and a norm."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swinkernels.nn._features import check_module
from swinkernels.nn._inner import all_modules_have_hooks, is_bare
from swinkernels.ops._arguments import Ints, check_factor
from swinkernels.ops._fused_linear import Norm, joins
from swinkernels.ops._fused_patches import patch_linear, projects_patches
from swinkernels.ops._library import norm_dtype
from swinkernels.ops.layer_norm import layer_norm


class PatchEmbed(nn.Module):
    r"""Projects every patch of an image to one token and optionally normalises it.

    .. math:: y_i = LayerNorm(W \cdot patch_i + b)

    The projection is torch's convolution, with kernel and stride equal to the patch size. It runs in the channels-last
    memory format, so its result is already the feature map, and only the image is copied to another layout. In float32
    and bfloat16 inference on some CPUs, one op reads the patches where they lie and computes the norm, too. An image
    that is not a multiple of the patch size is padded with zeros at the end of each axis.

    Args:
        patch_size: pixels per axis, an int or one for each axis, in the order of the image's axes.
        in_chans: channels of the image.
        embed_dim: channels C of a token.
        spatial_dims: 2 for (H, W), 3 for (D, H, W).
        norm: True for a norm, as in the classification models; MONAI's SwinUNETR has none by default.
        bias: True for a bias of the convolution.
        eps: added to the variance of the norm.
        backend: "auto", "cuda", "torch" or "reference", for the norm. With "auto" and "torch", one op may compute
            projection and norm, see above.
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, in_chans, \*I), channels first, I = (H, W) or (D, H, W), gives a feature map (B, \*S, C), channels last,
        S = ceil(I / patch_size). ``.flatten(1, -2)`` turns it into the sequence of Microsoft's module,
        ``.movedim(-1, 1)`` into MONAI's layout, channels first. Under autocast the result is float32 with a norm, else
        in the autocast dtype.

    Parameters: ``proj.weight`` (C, in_chans, \*patch_size), ``proj.bias`` (C), ``norm.weight``, ``norm.bias`` (C).

    Source: Swin Transformer (Liu et al., 2021), section 3.1; ``PatchEmbed`` of Microsoft's Swin-Transformer, timm and
    MONAI, ``PatchEmbed3D`` of Video-Swin, ``features.0`` of torchvision.
    """

    norm: nn.LayerNorm | None

    def __init__(
        self,
        patch_size: Ints = 4,
        in_chans: int = 3,
        embed_dim: int = 96,
        *,
        spatial_dims: int = 2,
        norm: bool = True,
        bias: bool = True,
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = "PatchEmbed"
        check_module(op, in_chans=in_chans, embed_dim=embed_dim, spatial_dims=spatial_dims, eps=eps, backend=backend)
        for name, flag in (("norm", norm), ("bias", bias)):
            if not isinstance(flag, bool):
                raise TypeError(f"{op}: {name} must be a bool, got {flag!r}")
        self.patch_size = check_factor(op, patch_size, spatial_dims, "patch_size")
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.spatial_dims = spatial_dims
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        convolution: Any = nn.Conv2d if spatial_dims == 2 else nn.Conv3d
        self.proj = convolution(in_chans, embed_dim, self.patch_size, self.patch_size, bias=bias, **factory)
        self.norm = nn.LayerNorm(embed_dim, eps=eps, **factory) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"PatchEmbed: x must be a tensor, got {type(x).__name__}")
        image = x.shape[2:]
        if len(image) != self.spatial_dims or x.shape[1] != self.in_chans or any(n < 1 for n in image):
            axes = "(H, W)" if self.spatial_dims == 2 else "(D, H, W)"
            raise ValueError(
                f"PatchEmbed: x must be (B, {self.in_chans}, *I), I = {axes} of at least one pixel each, "
                f"got shape {tuple(x.shape)}"
            )
        pads = [-n % p for n, p in zip(image, self.patch_size, strict=True)]
        if any(pads):
            x = F.pad(x, [amount for pad in reversed(pads) for amount in (0, pad)])
        tokens = self._fused(x)
        if tokens is not None:
            return tokens
        channels_last = torch.channels_last if self.spatial_dims == 2 else torch.channels_last_3d
        tokens = self.proj(x.contiguous(memory_format=channels_last)).movedim(1, -1)
        if self.norm is None:
            return tokens
        norm = self.norm
        return layer_norm(tokens, norm.weight, norm.bias, eps=norm.eps, dtype=norm_dtype(tokens), backend=self.backend)

    def _fused(self, x: Tensor) -> Tensor | None:
        """Return the tokens of the image x, computed by one op, or None if the modules have to be called."""
        proj, norm = self.proj, self.norm
        if self.backend not in ("auto", "torch") or not joins(x) or all_modules_have_hooks():
            return None
        kind = nn.Conv2d if self.spatial_dims == 2 else nn.Conv3d
        if not (is_bare(proj, kind) and projects_patches(proj, self.patch_size)):
            return None
        if norm is not None and not is_bare(norm, nn.LayerNorm):
            return None
        of_norm = None if norm is None else Norm(norm.weight, norm.bias, norm.eps, "post")
        return patch_linear(x, proj.weight.flatten(1), proj.bias, of_norm, self.patch_size)

    def extra_repr(self) -> str:
        return (
            f"patch_size={self.patch_size}, in_chans={self.in_chans}, embed_dim={self.embed_dim}, "
            f"spatial_dims={self.spatial_dims}, backend={self.backend!r}"
        )
