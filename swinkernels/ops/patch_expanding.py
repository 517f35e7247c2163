"""Patch expanding: torch's Linear, then one pass that rearranges its result into tokens and normalises them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from swinkernels.ops import _arguments
from swinkernels.ops._arguments import Ints
from swinkernels.ops._fused_linear import cast_linear
from swinkernels.ops._library import autocast_dtype
from swinkernels.ops.layer_norm import normalise_parts


def patch_expanding(
    x: Tensor,
    weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *,
    factor: Ints = 2,
    eps: float = 1e-5,
    backend: str = "auto",
) -> Tensor:
    r"""Expand every token linearly into several neighbouring tokens and normalise each of them.

    .. math:: y_{b, i \cdot f + o} = LayerNorm((W x_{b, i})_{o})

    where W x is divided into f_1 f_2 ... parts of contiguous channels, in row-major order of their offset o.
    The rearrangement and the norm together read and write the map once; the Linear is torch's.

    Args:
        x: (B, \*S, C), S = (H, W) or (D, H, W), float32, float16, bfloat16, or float64 (torch and reference only).
        weight: (K * out, C), K the product of the factors: K * out = 2C with factor 2 in Swin-Unet's ``PatchExpand``
            (out = C / 2), 16C with factor 4 in its ``FinalPatchExpand_X4`` (out = C). None for no Linear.
        norm_weight, norm_bias: (out,), or None for ones and zeros.
        factor: tokens per axis that one token becomes, an int or one per axis; (1, 2, 2) keeps a 3D map's depth.
        eps: added to the variance of the norm.
        backend: "auto", "cuda", "torch" or "reference", for the rearrangement and the norm.

    Returns:
        (B, \*(S * factor), out), contiguous, in the dtype of x; under autocast in float32, like torch's LayerNorm on a
        GPU. An empty batch gives an empty result. Differentiable in x and all parameters, each gradient in its tensor's
        dtype; twice with backend="torch" or "reference".

    Raises:
        ValueError, TypeError: an argument is wrong; the message names the value given and the values accepted.
        NotImplementedError: the requested backend cannot run this call; the message lists the reasons.

    Source: Swin-Unet (Cao et al., 2021), section 3.4; ``PatchExpand`` and ``FinalPatchExpand_X4`` of its code.
    """
    op = "patch_expanding"
    _arguments.check_features(op, "x", x)
    factors = _arguments.check_factor(op, factor, x.dim() - 2)
    eps = _arguments.check_eps(op, eps)
    parts, width = math.prod(factors), x.shape[-1]
    if weight is not None:
        _arguments.check_weight(op, x, weight, x.shape[-1])
        width = weight.shape[0]
    if width % parts != 0:
        raise ValueError(
            f"{op}: the number of {'channels of x' if weight is None else 'rows of weight'} must be a multiple of "
            f"prod(factor) = {parts} for factor {factors}, got {width}"
        )
    _arguments.check_parameters(op, x, (width // parts,), norm_weight=norm_weight, norm_bias=norm_bias)
    dtype = x.dtype if autocast_dtype(x) is None else torch.float32
    wide = x if weight is None else cast_linear(x, weight)
    return normalise_parts(op, wide, norm_weight, norm_bias, factors, eps, dtype, backend)
