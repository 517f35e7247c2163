"""Compares the results and all gradients of two implementations of a function in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def randomised(module: nn.Module, seed: int = 0) -> nn.Module:
    """Return ``module`` in float64 and evaluation mode, with random values in place of its initial parameters."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    with torch.no_grad():
        for name, p in module.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            spread = 0.3 if p.dim() > 1 else 0.5
            p.copy_(centre + spread * torch.randn(p.shape, generator=g, dtype=torch.float64))
    return module


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(
    ours: Callable[[], Tensor], theirs: Callable[[], Tensor], leaves: Iterable[Tensor | None], tolerance: float = 1e-10
) -> None:
    """Check that ``ours`` and ``theirs`` give the same result and the same gradients for all ``leaves``."""
    leaves = [leaf.requires_grad_() for leaf in leaves if leaf is not None]
    got, expected = ours(), theirs()
    assert got.shape == expected.shape
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    dout = draw(*expected.shape, seed=2)
    got_grads = torch.autograd.grad(got, leaves, dout, allow_unused=True)
    expected_grads = torch.autograd.grad(expected, leaves, dout, allow_unused=True)
    assert expected_grads[0].abs().max() > 0
    for i, (a, b, leaf) in enumerate(zip(got_grads, expected_grads, leaves, strict=True)):
        a, b = (torch.zeros_like(leaf) if g is None else g for g in (a, b))
        limit = tolerance * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=tolerance, atol=limit, msg=lambda m, i=i: f"gradient of leaf {i}: {m}")
