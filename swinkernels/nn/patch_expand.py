"""Swin-Unet's patch expanding as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from swinkernels.nn._features import as_given, as_map, check_module
from swinkernels.ops._arguments import Ints, check_factor
from swinkernels.ops.patch_expanding import patch_expanding


class PatchExpand(nn.Module):
    r"""Expands every token linearly into several neighbouring tokens and normalises each of them (Swin-Unet).

    .. math:: y_{i \cdot f + o} = LayerNorm((W x_i)_o)

    where W x is divided into parts of ``out_dim`` contiguous channels, one for each offset o in row-major order.
    For details, see :func:`swinkernels.patch_expanding`.

    Args:
        dim: channels C of a token.
        out_dim: channels of each resulting token, C / 2 by default.
        factor: number of tokens per axis into which a token is expanded, an int or one for each of the spatial_dims
            axes.
        spatial_dims: number of expanded axes, the last ones: 2, which expands a 3D map frame by frame, or 3.
        eps: added to the variance of the norm.
        backend: "auto", "cuda", "torch" or "reference".
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), S = (H, W) or (D, H, W), gives (B, \*(S * factor), out_dim). A sequence (B, L, C) with
        ``size`` = S gives a sequence (B, L * prod(factor), out_dim). Under autocast the result is float32.

    Parameters: ``expand.weight`` (prod(factor) * out_dim, C), ``norm.weight``, ``norm.bias`` (out_dim).

    Source: Swin-Unet (Cao et al., 2021), section 3.4; ``PatchExpand`` of its code.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        factor: Ints = 2,
        spatial_dims: int = 2,
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        op = type(self).__name__
        check_module(
            op, dim=dim, out_dim=1 if out_dim is None else out_dim, spatial_dims=spatial_dims, eps=eps, backend=backend
        )
        if out_dim is None and dim % 2 != 0:
            raise ValueError(f"{op}: dim must be even unless out_dim is given (the default is dim / 2), got {dim}")
        self.dim = dim
        self.out_dim = dim // 2 if out_dim is None else out_dim
        self.factor = check_factor(op, factor, spatial_dims)
        self.spatial_dims = spatial_dims
        self.backend = backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.expand = nn.Linear(dim, math.prod(self.factor) * self.out_dim, bias=False, **factory)
        self.norm = nn.LayerNorm(self.out_dim, eps=eps, **factory)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        x = as_map(type(self).__name__, x, size, self.dim, self.spatial_dims)
        factor = (1,) * (x.dim() - 2 - self.spatial_dims) + self.factor
        norm, weight = self.norm, self.expand.weight
        expanded = patch_expanding(x, weight, norm.weight, norm.bias, factor=factor, eps=norm.eps, backend=self.backend)
        return as_given(expanded, size)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, out_dim={self.out_dim}, factor={self.factor}, spatial_dims={self.spatial_dims}, "
            f"backend={self.backend!r}"
        )


class FinalPatchExpandX4(PatchExpand):
    r"""Patch expanding to four tokens per axis with C channels each, used in the last layer of Swin-Unet's decoder.

    Args:
        dim: channels C of a token, before and after.
        spatial_dims, eps, backend, device, dtype: as for :class:`PatchExpand`.

    Shape and parameters: as for :class:`PatchExpand` with ``out_dim`` = C and ``factor`` = 4.

    Source: Swin-Unet (Cao et al., 2021), section 3.4; ``FinalPatchExpand_X4`` of its code.
    """

    def __init__(
        self,
        dim: int,
        *,
        spatial_dims: int = 2,
        eps: float = 1e-5,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            dim, dim, factor=4, spatial_dims=spatial_dims, eps=eps, backend=backend, device=device, dtype=dtype
        )
