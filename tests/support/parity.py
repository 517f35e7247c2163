"""Compares the outputs and gradients of a model before and after ``accelerate``."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


def randomise(module: nn.Module) -> None:
    """Move parameters far from their initial values, so that bias, mask, scale, pad tokens and norms all matter."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("relative_position_bias_table", "qkv.bias", "q_bias", "v_bias")) or (
                "attention" in name and name.endswith("bias")
            ):
                p.normal_()
            elif name.endswith(("qkv.weight", "query.weight", "key.weight", "value.weight", "_proj.weight")):
                p.normal_(std=1.5 * p.shape[1] ** -0.5)
            elif name.endswith("logit_scale"):
                p.add_(torch.randn_like(p))
            elif name.endswith(("cpb_mlp.2.weight", "position_bias_mlp.2.weight")):
                p.normal_(std=0.1)
            elif "norm" in name and name.endswith("weight"):
                p.normal_(mean=1.0, std=0.2)


def run(model: nn.Module, x: Tensor, *others: Any) -> dict[str, Tensor]:
    """Return the output of ``model`` (or outputs by index), and the gradients of ``x`` and of all used parameters."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = model(x, *others)
    outs = {"out": out} if isinstance(out, Tensor) else {f"out.{i}": o for i, o in enumerate(out)}
    torch.manual_seed(2)
    douts = [torch.randn(o.shape, dtype=torch.float64).to(o.dtype) for o in outs.values()]
    torch.autograd.backward(list(outs.values()), douts)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert x.grad is not None
    return {**{name: o.detach() for name, o in outs.items()}, "x": x.grad, **grads}


def shaken(model: nn.Module, x: Tensor, dtype: torch.dtype, *others: Any) -> list[dict[str, Tensor]]:
    """Return the results of three float64 runs with input and parameters perturbed by a relative eps of ``dtype``.

    One run is not enough: the change of the largest element has varied by a factor of 13 between runs.
    """
    model = copy.deepcopy(model).double()
    found = []
    for seed in (4, 5, 6):
        generator = torch.Generator().manual_seed(seed)

        def shake(t: Tensor, generator: torch.Generator = generator) -> Tensor:
            up = torch.randint(0, 2, t.shape, generator=generator, dtype=t.dtype)
            return t * (1 + torch.finfo(dtype).eps * (2 * up - 1))

        moved = copy.deepcopy(model)
        for p in moved.parameters():
            p.data = shake(p.data)
        found.append(run(moved, shake(x.double()), *others))
    return found


def assert_as_good(
    got: dict[str, Tensor],
    plain: dict[str, Tensor],
    exact: dict[str, Tensor],
    moved: list[dict[str, Tensor]] | None = None,
) -> None:
    """Check that the errors of ``got`` against ``exact`` are at most twice those of ``plain``, plus a few eps.

    If large scores or cancelling sums magnify rounding errors, ``moved`` (the results of :func:`shaken`) raises the
    limit. A gradient that is zero in theory, such as that of a constant added to all scores, may be as large as the
    rounding error of the largest gradient.
    """
    assert got.keys() == plain.keys() == exact.keys()
    largest = max(t.abs().max() for t in exact.values())
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        eps = torch.finfo(got[name].dtype).eps * (256 if got[name].dtype == torch.float64 else 4)
        times = _times_of_plain_error(name)
        few = 1 + 20 / exact[name].numel()  # the error of a few elements, such as one per head, varies by chance
        error, base = got[name].double() - exact[name], plain[name].double() - exact[name]
        for measure in (lambda t: t.square().mean().sqrt(), lambda t: t.abs().max()):
            size = measure(exact[name])
            size = largest if size < 1e-9 * largest else size
            e, limit = measure(error), few * (times * measure(base) + eps * size)
            if moved is not None:
                limit = limit + few * 2 * max(measure(m[name] - exact[name]) for m in moved)
            assert e <= limit, f"{name}: error {e:.3g}, at most {limit:.3g}"


def _times_of_plain_error(name: str) -> int:
    """Return the allowed ratio of the error of the gradient ``name`` to the plain code's error.

    Gradients of key projections are sums that nearly cancel. The gradient of transformers' position MLP depends on a
    few dozen such sums. Accelerated models add their terms in another order, and the error of one sum spreads to the
    whole gradient.
    """
    return 4 if any(part in name for part in ("position_bias_mlp", ".k_proj.", ".key.")) else 2


def assert_as_noisy(got: dict[str, Tensor], plain: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Check that the errors of ``got`` against ``exact`` are about as large as those of ``plain``.

    In low precision, a whole model rounds dozens of times, so only the norms of the errors are comparable. The mean
    over all tensors leaves out those that are zero in theory, because their relative errors are arbitrary.
    """
    assert got.keys() == plain.keys() == exact.keys()
    errors, bases = [], []
    largest = max(t.norm() for t in exact.values())
    for name in exact:
        assert got[name].dtype == plain[name].dtype, name
        error, base = ((r[name].double() - exact[name]).norm() for r in (got, plain))
        size, few = exact[name].norm(), 1 + 20 / exact[name].numel()  # the error of a few elements varies by chance
        limit = few * (_times_of_plain_error(name) * base + 2**-8 * size)
        assert error <= limit, f"{name}: error {error / size:.3g}, plain {base / size:.3g}"
        if size > 1e-9 * largest:
            errors.append(error / size)
            bases.append(base / size)
    error, base = (torch.stack(e).square().mean().sqrt() for e in (errors, bases))
    assert error <= 1.5 * base + 2**-8, f"all tensors: error {error:.3g}, plain {base:.3g}"
