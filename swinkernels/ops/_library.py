"""What the definitions of all ops share: the library, normal forms of arguments, autocast, double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

lib = torch.library.Library("swinkernels", "DEF")

# Read once: torch 2.11 cannot trace the question whether a kind of device has autocast.
_AUTOCAST_DEVICES = frozenset(d for d in ("cpu", "cuda", "mps", "xpu", "hpu") if torch.amp.is_autocast_available(d))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives to the products of x, or None where it is off or x is float64."""
    kind = x.device.type
    if x.dtype == torch.float64 or kind not in _AUTOCAST_DEVICES or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def three(values: Sequence, leading) -> list:
    """One value per axis, slowest first, with those of the axes that a 2D map does not have in front."""
    return [leading] * (3 - len(values)) + list(values)


def refuse_double_backward(name: str) -> Callable:
    """The autograd formula of an op that is itself a derivative."""

    def refuse(ctx, *_):
        raise NotImplementedError(
            f"{name}: a second derivative is only in the reference: use backend='reference' for double backward"
        )

    return refuse


def kernel_parameter(parameter: Tensor | None) -> Tensor | None:
    """A parameter in a dtype that kernels read: any but float64."""
    return parameter.float() if parameter is not None and parameter.dtype == torch.float64 else parameter


def parameter_gradients(
    parameters: Sequence[Tensor | None], sums: Sequence[Tensor], needed: Sequence[bool]
) -> list[Tensor | None]:
    """The float32 sums of a backward op in the dtypes of the parameters, None for what is not needed."""
    return [
        total.to(parameter.dtype) if need and parameter is not None else None
        for parameter, total, need in zip(parameters, sums, needed, strict=True)
    ]


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """torch's Linear without a bias, in the autocast dtype if that is on, else in the dtype of x."""
    if autocast_dtype(x) is None or weight.dtype == torch.float64:  # which autocast leaves alone
        weight = weight.to(x.dtype)
    return F.linear(x, weight)
