"""Random calls of the ops and the error budget that a backend has to keep; used by the tests and the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swinkernels import reference


@dataclass(frozen=True)
class WindowAttentionCase:
    """One call of ``window_attention_qkvpacked``: its shapes and arguments, from which inputs are drawn."""

    batch: int
    size: tuple[int, ...]
    num_heads: int
    head_dim: int
    window_size: int | tuple[int, ...]
    shift_size: int | tuple[int, ...] = 0
    has_table: bool = True
    has_pad_qkv: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        size, window, shift = (
            "x".join(map(str, v)) if isinstance(v, tuple) else str(v)
            for v in (self.size, self.window_size, self.shift_size)
        )
        extra = "".join(f"-{k}" for k, v in {"table": self.has_table, "pad": self.has_pad_qkv}.items() if v)
        extra += "".join(f"-{k}={v}" for k, v in self.options.items() if not isinstance(v, Tensor))
        return f"b{self.batch}-{size}-h{self.num_heads}x{self.head_dim}-w{window}-s{shift}{extra}"

    def arguments(self) -> dict[str, Any]:
        return {
            "num_heads": self.num_heads,
            "window_size": self.window_size,
            "shift_size": self.shift_size,
            **self.options,
        }

    def inputs(self, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> dict[str, Tensor]:
        """qkv, dout and, where the case has them, bias_table (float32) and pad_qkv, already rounded to ``dtype``."""
        g = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        rank, channels = len(self.size), self.num_heads * self.head_dim
        inputs = {
            "qkv": draw(self.batch, *self.size, 3 * channels).to(dtype),
            "dout": draw(self.batch, *self.size, channels).to(dtype),
        }
        if self.has_table:
            table = self.options.get("table_window", self.window_size)
            table = table if isinstance(table, tuple) else (table,) * rank
            inputs["bias_table"] = draw(math.prod(2 * w - 1 for w in table), self.num_heads)
        if self.has_pad_qkv:
            inputs["pad_qkv"] = draw(3 * channels).to(dtype)
        return {name: x.to(device) for name, x in inputs.items()}


def run_case(op: Callable[..., Tensor], inputs: dict[str, Tensor], arguments: dict[str, Any]) -> dict[str, Tensor]:
    """The output of ``op`` and the gradient of every input: out, dqkv, and dbias_table and dpad_qkv if present."""
    dout = inputs["dout"]
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items() if name != "dout"}
    out = op(**leaves, **arguments)
    grads = torch.autograd.grad(out, list(leaves.values()), dout.to(out.dtype), allow_unused=True)
    results = {"out": out.detach()}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        results[f"d{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return results


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0


def assert_within_budget(got: Tensor, exact: Tensor, f32: Tensor, *, eps: float | None = None, name: str = "") -> None:
    """Fail unless ``got`` is as close to ``exact`` (float64) as its dtype allows.

    ``f32`` is the reference run in float32 on the same rounded inputs: its own error is granted on top, which is what
    counts where terms cancel. ``eps`` is that of the arithmetic, by default that of got's dtype (TF32: 2 ** -11). Two
    bars: RMS error at most 0.75 eps, and no element off by more than twice eps of the largest. NaN fails.
    """
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps if eps is None else eps
    error, base = got.double() - exact, f32.double() - exact
    rms, limit = _rms(error), 0.75 * eps * _rms(exact) + 2 * _rms(base)
    assert rms <= limit, f"{name}: RMS error {rms:.3g}, at most {limit:.3g} ({rms / (eps * _rms(exact) + 1e-300):.2f} eps)"
    worst = error.abs().max().item()
    limit = 2 * eps * exact.abs().max().item() + 4 * base.abs().max().item()
    assert worst <= limit, f"{name}: largest error {worst:.3g}, at most {limit:.3g}"


def check_window_attention(
    op: Callable[..., Tensor],
    case: WindowAttentionCase,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    eps: float | None = None,
    seed: int = 0,
    **arguments: Any,
) -> dict[str, Tensor]:
    """Compare output and every gradient of ``op`` (called with ``arguments`` too) with the float64 reference."""
    inputs = case.inputs(dtype, device, seed)
    got = run_case(op, inputs, {**case.arguments(), **arguments})
    exact, f32 = (
        run_case(
            reference.window_attention_qkvpacked,
            {name: x.to(wide) for name, x in inputs.items()},
            case.arguments(),
        )
        for wide in (torch.float64, torch.float32)
    )
    for name in got:
        rounded = eps if eps is not None else torch.finfo(dtype).eps
        assert_within_budget(got[name], exact[name], f32[name], eps=rounded, name=f"{case} {dtype} {name}")
    return got
