"""Compares an accelerated module with the original on random inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from swinkernels.adapters.adapter import Adapter, restore_class, swap_class
from swinkernels.adapters.bypass import remove_hooks

_BATCH = 2  # with one image, a wrong stride between images would go unnoticed


class VerificationError(RuntimeError):
    """Raised if the results of an accelerated module are less accurate than allowed."""


def verify(adapters: Mapping[nn.Module, Adapter], path: str, module: nn.Module, backend: str, recompute: bool) -> None:
    """Raise VerificationError unless the accelerated module's output and gradients are as accurate as the original's.

    Copies of both, without hooks and in eval mode, run on the same random input, and are compared with a float64 copy
    of the original. The error of the accelerated module may be at most the sum of three terms: twice the error of the
    original (four times for parameter gradients in float32 and float64, and more for tensors with few elements), the
    rounding of the result to the dtype, and twice the change of the result when every element of the input and the
    parameters changes by eps times its value. A result that should be zero may be as large as a rounding error of the
    largest result. The module, its gradients and the state of every random number generator do not change.

    Args:
        adapters: module -> adapter, for every module to accelerate, including ``module`` and those inside it.
        path, module: a module's path in the model, and the module to compare with its accelerated copy.
        backend, recompute: the arguments of accelerate.
    """
    adapter = adapters[module]
    weight = adapter.weight(module)
    if weight.is_meta:
        raise ValueError(f"accelerate: verify=True needs parameters with values, but {path!r} is on the meta device")
    dtype, device = weight.dtype, weight.device
    shape = (_BATCH, *adapter.input_shape(module))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator("cpu").manual_seed(0)
        x = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        plain = copy.deepcopy(module).eval().requires_grad_(True)
        for m in plain.modules():
            restore_class(m)
        remove_hooks(plain)
        fast = copy.deepcopy(plain)
        for m, m_of_fast in zip(module.modules(), fast.modules(), strict=True):
            if m in adapters:
                swap_class(adapters[m], m_of_fast, backend, recompute)
        plain64 = copy.deepcopy(plain).to(torch.float64)
        with torch.no_grad():
            # Run a copy, because the module may cache tensors that it creates without gradients.
            shape = adapter.run(copy.deepcopy(plain), x).shape
            dout = torch.randn(shape, generator=generator, device="cpu").to(device, dtype)
        shaken64 = copy.deepcopy(plain64)
        shaken_x = _shake(x.double(), dtype, generator)
        for p in shaken64.parameters():
            p.data = _shake(p.data, dtype, generator)
        results = [
            _run(adapter, m, x_of_m, dout.to(x_of_m.dtype))
            for m, x_of_m in ((fast, x), (plain, x), (shaken64, shaken_x), (plain64, x.double()))
        ]
    exact = results[-1]
    largest = max(t.abs().max().item() for t in exact.values() if t.numel() > 0)
    for name in exact:
        _check(path, name, *(result[name] for result in results), largest=largest)


def _shake(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return x with every element increased or decreased, at random, by the dtype's eps times the element."""
    up = torch.randint(0, 2, x.shape, generator=generator, dtype=x.dtype, device="cpu").to(x.device)
    return x * (1 + torch.finfo(dtype).eps * (2 * up - 1))


def _run(adapter: Adapter, module: nn.Module, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    out = adapter.run(module, x)
    leaves = {"the input": x, **dict(module.named_parameters())}
    grads = torch.autograd.grad(out, list(leaves.values()), dout, allow_unused=True)
    gradients = {f"the gradient of {name}": g for name, g in zip(leaves, grads, strict=True) if g is not None}
    return {"the output": out.detach(), **gradients}


def _check(path: str, name: str, got: Tensor, plain: Tensor, shaken: Tensor, exact: Tensor, *, largest: float) -> None:
    finite = plain.isfinite()  # NaN is possible: timm's v2 computes 0 / 0 in float16 for pad tokens
    got, plain, shaken, exact = got[finite], plain[finite], shaken[finite], exact[finite]
    if got.numel() == 0:
        return
    eps = torch.finfo(got.dtype).eps
    # The result of a sum of a thousand terms, which may cancel, depends on the order of addition. In float32 this error
    # is added to the rounding of the result. In float64 it is the only error, because the reference is float64, too.
    rounding = {torch.float64: 256, torch.float32: 4}.get(got.dtype, 1) * eps
    # The gradient of a parameter is a sum over all tokens, which the original adds in a different order. The gradients
    # of v2's position MLP depend on a table of a few dozen such sums, which cancel, so an error in one sum spreads to
    # all elements.
    of_parameter = name.startswith("the gradient of") and not name.endswith("the input")
    times = 4 if of_parameter and got.dtype in (torch.float32, torch.float64) else 2
    # A tensor of few elements, such as one per head, gives a poor estimate of how large rounding errors may be.
    few = 1 + 20 / got.numel()
    # Large scores and sums that cancel magnify rounding errors, and the modules round different intermediate results.
    error, base, magnified = got.double() - exact, plain.double() - exact, shaken - exact
    for measure, of in (("RMS", lambda t: t.square().mean().sqrt()), ("largest", lambda t: t.abs().max())):
        size = of(exact).item()
        if size < 1e-9 * largest:
            size = largest  # only rounding errors, as in the gradient of a constant that is added to all scores
        e, limit = of(error).item(), few * ((times * of(base) + 2 * of(magnified)).item() + rounding * size)
        if not e <= limit:  # NaN fails
            where = path or "the model itself"
            raise VerificationError(
                f"accelerate: {where}: {name} is off by {e:.3g} ({measure} error against float64); "
                f"{limit:.3g} is allowed, and the original is off by {of(base).item():.3g}. The model is unchanged."
            )
