"""Patch merging of Swin v1 and v2, as modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from swinkernels.nn._features import as_given, as_map, check_module
from swinkernels.ops._arguments import check_choice
from swinkernels.ops.patch_merging import ORDERS, patch_merging


class _PatchMerging(nn.Module):
    _NORM: ClassVar[str]  # "pre": norm before the reduction; "post": norm after it

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        spatial_dims: int = 2,
        order: str = "swin",
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
        check_choice(op, "order", order, ORDERS)
        self.dim = dim
        self.out_dim = 2 * dim if out_dim is None else out_dim
        self.spatial_dims = spatial_dims
        self.order = order
        self.backend = backend
        merged = 2**spatial_dims * dim
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm = nn.LayerNorm(merged if self._NORM == "pre" else self.out_dim, eps=eps, **factory)
        self.reduction = nn.Linear(merged, self.out_dim, bias=False, **factory)

    def forward(self, x: Tensor, size: Sequence[int] | None = None) -> Tensor:
        x = as_map(type(self).__name__, x, size, self.dim, self.spatial_dims)
        norm, weight = self.norm, self.reduction.weight
        merged = patch_merging(
            x, norm.weight, norm.bias, weight, eps=norm.eps, order=self.order, norm=self._NORM, backend=self.backend
        )
        return as_given(merged, size)

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, out_dim={self.out_dim}, spatial_dims={self.spatial_dims}, order={self.order!r}, "
            f"backend={self.backend!r}"
        )


class PatchMerging(_PatchMerging):
    r"""Concatenates the channels of neighbouring tokens, two per axis, normalises and reduces them (Swin v1).

    .. math:: y = W \cdot LayerNorm(concat(x_{2i + o}))

    over the offsets o in {0, 1} per merged axis. For details, see :func:`swinkernels.patch_merging`.

    Args:
        dim: channels C of a token.
        out_dim: channels of a merged token, 2C by default.
        spatial_dims: number of merged axes, the last ones: 2, which merges a 3D map frame by frame (Video-Swin,
            Aurora), or 3.
        order: order of the neighbours' channels. In 2D all libraries use "swin" except mmcv and mmpretrain ("unfold")
            and Aurora ("row_major"). With spatial_dims=3: "monai" for MONAI's ``PatchMerging`` since 1.5,
            "monai_legacy" up to 1.4, "row_major" for its ``PatchMergingV2``, whose norm also precedes the reduction.
        eps: added to the variance of the norm.
        backend: "auto", "cuda", "triton", "torch" or "reference".
        device, dtype: device and dtype of the parameters.

    Shape:
        x: (B, \*S, C), S = (H, W) or (D, H, W), gives (B, \*S', out_dim), S' = ceil(S / 2) on the merged axes: odd
        sizes are padded with zeros. A sequence (B, L, C) with ``size`` = S gives a sequence (B, L', out_dim).
        Under autocast the result has the autocast dtype.

    Parameters: ``norm.weight``, ``norm.bias`` (K C), ``reduction.weight`` (out_dim, K C), K = 2 ** spatial_dims.

    Source: ``PatchMerging`` of Microsoft's Swin-Transformer, Swin-Unet, timm, torchvision, transformers, MONAI.
    """

    _NORM = "pre"


class PatchMergingV2(_PatchMerging):
    r"""Concatenates the channels of neighbouring tokens, two per axis, reduces and normalises them (Swin v2).

    .. math:: y = LayerNorm(W \cdot concat(x_{2i + o}))

    MONAI's module of the same name is different; it corresponds to :class:`PatchMerging` with ``order="row_major"``.

    Args:
        dim, out_dim, spatial_dims, order, eps, backend, device, dtype: as for :class:`PatchMerging`.

    Shape:
        As for :class:`PatchMerging`, but under autocast the result is float32.

    Parameters: ``reduction.weight`` (out_dim, K C), ``norm.weight``, ``norm.bias`` (out_dim), K = 2 ** spatial_dims.

    Source: ``PatchMerging`` of Microsoft's swin_transformer_v2.py, timm and transformers, torchvision's
    ``PatchMergingV2``.
    """

    _NORM = "post"
