"""Helpers for the modules: conversion between feature maps and sequences, and checks of arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from swinkernels.ops import _arguments
from swinkernels.ops._backends import check_backend


def check_module(op: str, *, spatial_dims: Any, eps: Any, backend: Any, **counts: Any) -> None:
    """Check the arguments common to all constructors. ``counts``, such as channels, must be positive integers."""
    for name, count in counts.items():
        _arguments.check_count(op, name, count)
    if isinstance(spatial_dims, bool) or spatial_dims not in (2, 3):
        raise ValueError(f"{op}: spatial_dims must be 2 or 3, got {spatial_dims!r}")
    _arguments.check_eps(op, eps)
    check_backend(op, backend)


def refuse_tracing(op: str) -> None:
    """Raise an error under torch.jit.trace, which cannot record the ops and would raise an obscure error instead."""
    if torch.jit.is_tracing():
        raise RuntimeError(
            f"{op}: torch.jit.trace cannot record window attention. Use torch.export.export or torch.compile, or trace "
            "a timm, torchvision or transformers model with these weights"
        )


def as_map(op: str, x: Any, size: Sequence[int] | None, dim: int, spatial_dims: int) -> Tensor:
    """Return ``x``, a map or a sequence of tokens (B, L, dim) with ``size`` = S, as a map (B, *S, dim)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if size is not None:
        size = _arguments.check_size(op, size)
    if x.dim() not in ((4, 5) if size is None else (3,)):
        raise ValueError(
            f"{op}: x must be a map (B, *S, C) if size is None, or a sequence (B, L, C) if size=S is given, where S is "
            f"(H, W) or (D, H, W); got shape {tuple(x.shape)} and size={size}"
        )
    if size is not None:
        if x.shape[1] != math.prod(size):
            raise ValueError(
                f"{op}: x must have the L = {math.prod(size)} tokens of size={size}, got shape {tuple(x.shape)}"
            )
        x = x.unflatten(1, size)
    if x.dim() - 2 < spatial_dims:
        raise ValueError(
            f"{op}: x must have at least {spatial_dims} spatial axes for spatial_dims={spatial_dims}, got S = "
            f"{tuple(x.shape[1:-1])}"
        )
    _arguments.check_features(op, "x", x)
    # With a wrong number of channels, the op could infer wrong merged axes from the widths and compute a wrong result.
    if x.shape[-1] != dim:
        raise ValueError(f"{op}: x must have dim = {dim} channels, got {x.shape[-1]}")
    return x


def as_given(y: Tensor, size: Sequence[int] | None) -> Tensor:
    """Return the map ``y`` in the form of the input: as a sequence if the input had a ``size``, else as a map."""
    return y if size is None else y.flatten(1, -2)


def forgive(unexpected_keys: list[str], prefix: str, names: Sequence[str]) -> None:
    """Remove ``names``, buffers that only published checkpoints contain, from a module's ``unexpected_keys``."""
    unexpected_keys[:] = [key for key in unexpected_keys if key not in {prefix + name for name in names}]
