"""Runs timm's patch embedding with one op, for inference on a CPU, if it returns a map with the channels last.

Swin and SAM use it in this form. Otherwise, and in training, timm's own code runs.

Source: timm.layers.patch_embed, timm 0.9.16 and newer.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.format import Format
from torch import Tensor, nn

from swinkernels.adapters.adapter import Accelerated, Adapter
from swinkernels.adapters.bypass import (
    child,
    class_of,
    first_weight,
    replaced_method,
    watch,
    weight_and_bias,
    why_not_absorbed,
    why_not_norm,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.part import Part
from swinkernels.ops._backends import backend_beside, choose, patch_embed_reasons
from swinkernels.ops._fused_linear import Norm, joins
from swinkernels.ops._fused_patches import patch_linear, projects_patches

watch(PatchEmbed)


def _returns_map(embed: Any) -> bool:
    """Return True if the result is a map with the channels last."""
    return getattr(embed, "flatten", True) is False and getattr(embed, "output_fmt", None) == Format.NHWC


def _why_not(embed: Any) -> str | None:
    """Return the reason why timm's own code has to run for every image, or None."""
    return replaced_method(embed, PatchEmbed) if _returns_map(embed) else "it does not return a map"


def _why_own_code(embed: Any, channels: int, height: int, width: int) -> str | None:
    """Return the reason why timm's own code has to run for an image of this size, or None."""
    proj, norm = child(embed, "proj"), child(embed, "norm")
    reason = _why_not(embed) or why_not_absorbed("proj", proj, nn.Conv2d, "an nn.Conv2d")
    if reason is not None:
        return reason
    if class_of(norm) is nn.Identity:
        reason = why_not_absorbed("norm", norm, nn.Identity, "an nn.Identity")
    else:
        reason = why_not_norm("norm", norm, proj.out_channels)
    patch = embed.patch_size
    if not projects_patches(proj, patch) or proj.in_channels != channels:
        return "proj is not a convolution of whole patches"
    if embed.img_size is not None and embed.strict_img_size and (height, width) != tuple(embed.img_size):
        return "the image does not have img_size"  # timm's own code raises its own error
    if height % patch[0] or width % patch[1]:
        return "the image does not consist of whole patches"
    return reason


class AcceleratedPatchEmbed(Accelerated, PatchEmbed):
    """timm's patch embedding, computed by one op in inference on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        out = None if self._swinkernels_own_code(x) else _embedded(self, x)
        return super().forward(x) if out is None else out


def _embedded(embed: AcceleratedPatchEmbed, x: Tensor) -> Tensor | None:
    """Return the tokens of the image x, computed by the op, or None if timm's code has to run."""
    if torch.compiler.is_compiling() and not joins(x):
        return None  # before the sizes, on which a compiler would put guards
    if x.dim() != 4 or settled(embed, _why_own_code, *x.shape[1:]) is not None:
        return None
    requested = backend_beside("patch_embed", embed._swinkernels_backend)
    backend = choose("patch_embed", requested, x.device, lambda b: patch_embed_reasons(b, x.device))
    if backend != "torch" or not joins(x):
        return None
    (weight, bias), norm = weight_and_bias(child(embed, "proj")), child(embed, "norm")
    of_norm = Norm(*weight_and_bias(norm), norm.eps, "post") if class_of(norm) is nn.LayerNorm else None
    return patch_linear(x, weight.flatten(1), bias, of_norm, embed.patch_size)


def _reasons(embed: Any, backend: str, training: bool) -> list[str]:
    return patch_embed_reasons(backend, first_weight(embed).device)


def _run(embed: Any, image: Tensor) -> Tensor:
    return type(embed).forward(embed, image.permute(0, 3, 1, 2))


ADAPTERS = (
    Adapter(
        name="timm",
        original=PatchEmbed,
        accelerated=AcceleratedPatchEmbed,
        reason_to_skip=_why_not,
        concerns=_returns_map,
        parts=(Part("patch embedding", "patch_embed", _why_not, _reasons),),
        input_shape=lambda embed: (*(embed.img_size or (2 * p for p in embed.patch_size)), embed.proj.in_channels),
        weight=first_weight,
        run=_run,
    ),
)
