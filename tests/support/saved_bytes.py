"""Counts the bytes that a call saves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


def kept_bytes(function: Callable[[], Any], parameters: Iterable[Tensor]) -> int:
    """Return the bytes of the storages that ``function()`` saves for backward, except those of ``parameters``."""
    of_parameters = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            kept[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function()
    assert result.requires_grad
    return sum(storage.nbytes() for storage in kept.values())
