"""Compares masks and position indices from other libraries with the values that the ops compute.

If the values differ, the module runs the library's own code. Accelerated modules call ``is_window_index``,
``is_stored_mask`` and ``holds`` in every forward, to detect a buffer that was assigned, loaded or changed in place
after ``accelerate``. The values are compared once per tensor and version; reading a cached result takes 0.4 us.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from swinkernels.ops._library import constant_when_compiled


def frame_of(size: Sequence[int], window: Sequence[int]) -> tuple[int, ...]:
    """Return the size, per axis, of a map of ``size`` after padding to whole windows."""
    return tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))


def shift_regions(
    frame: Sequence[int], window: Sequence[int], shift: Sequence[int], device: torch.device | str = "cpu"
) -> Tensor:
    """Return the region, as an integer, of each token in each window of the shifted map, (num_windows, N)."""
    rank = len(frame)
    region = torch.zeros([1] * rank, dtype=torch.long, device=device)
    for axis, (p, w, s) in enumerate(zip(frame, window, shift, strict=True)):
        g = torch.arange(p, device=device)
        on_axis = (g >= p - w).long() + (g >= p - s).long() if s > 0 else torch.zeros_like(g)
        region = 3 * region + on_axis.reshape([-1 if i == axis else 1 for i in range(rank)])
    cut = [n for p, w in zip(frame, window, strict=True) for n in (p // w, w)]
    order = [*range(0, 2 * rank, 2), *range(1, 2 * rank, 2)]
    return region.reshape(cut).permute(order).reshape(-1, math.prod(window))


def shift_mask(
    frame: Sequence[int],
    window: Sequence[int],
    shift: Sequence[int],
    value: float = -100.0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the standard mask, (num_windows, N, N): ``value`` between tokens of different regions, 0 elsewhere.

    Libraries add this mask to the scores.
    """
    region = shift_regions(frame, window, shift, device)
    apart = region[:, :, None] != region[:, None, :]
    return torch.zeros(apart.shape, device=device).masked_fill(apart, value)


# Replaces -inf in a mask, because kernels cannot subtract -inf from -inf. The exponential of both values is 0. In a
# standard mask no row is masked completely, because a token is never masked from itself.
MASKED = -1e9


def window_index(window: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return relative_position_index, (N, N): for each query and key, the row of a row-major bias table."""
    tokens = torch.cartesian_prod(*(torch.arange(w, device=device) for w in window))
    tokens = tokens.reshape(-1, len(window))
    index = torch.zeros(len(tokens), len(tokens), dtype=torch.long, device=device)
    for axis, w in enumerate(window):
        index = (2 * w - 1) * index + tokens[:, None, axis] - tokens[None, :, axis] + w - 1
    return index


# id of a tensor -> a weak reference to the tensor, its version, the formula it was compared with, and the result.
_SEEN: dict[int, tuple[Callable[[], Any], int, tuple[Any, ...], bool]] = {}


def holds(x: Any, asked: tuple[Any, ...]) -> bool:
    """Return True if ``x`` is a tensor with the values that a formula gives; the shapes may differ.

    If the values cannot be read, the result is False; on the meta device, only the numbers of elements are compared.
    The function also works while a compiler or torch.export traces the code; under torch.export it returns the result
    cached for the real tensor.

    Args:
        x: the stored tensor. For any other object the result is False.
        asked: (function, *arguments): the formula, and its arguments except the device.
    """
    if torch.compiler.is_dynamo_compiling():
        return _holds_when_traced(x, *_constants(asked))
    seen = _SEEN.get(id(x))
    if seen is not None and seen[0]() is x and seen[1] == x._version and seen[2] == asked and not x.requires_grad:
        return seen[3]
    return _compare(x, asked)


def _constants(asked: Any) -> Any:
    """Convert the arguments of a formula to constants, because dynamo may have made a module's sizes dynamic."""
    if isinstance(asked, tuple):
        return tuple(_constants(value) for value in asked)
    return operator.index(asked) if isinstance(asked, int) else asked


def is_window_index(x: Any, window: Sequence[int]) -> bool:
    """Return True if ``x``, a stored index into the bias table, equals :func:`window_index`."""
    return holds(x, (window_index, tuple(window)))


def is_stored_mask(mask: Any, frame: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Return True if the stored ``mask`` equals :func:`shift_mask`."""
    return holds(mask, (shift_mask, tuple(frame), tuple(window), tuple(shift)))


def is_shift_mask(mask: Any, frame: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> bool:
    """Return True if ``mask``, passed to a module, equals :func:`shift_mask`; always False under a compiler.

    Compilers cannot read values. The result is cached for all modules that receive the same mask, because reading a
    mask on a GPU synchronises the CPU with the GPU.
    """
    return not torch.compiler.is_compiling() and is_stored_mask(mask, frame, window, shift)


def value_of_mask(mask: Any, frame: Sequence[int], window: Sequence[int], shift: Sequence[int]) -> float | None:
    """Return the op's mask_value if ``mask`` equals :func:`shift_mask` with -100 or -inf, else None."""
    if is_shift_mask(mask, frame, window, shift):
        return -100.0
    infinite = (shift_mask, tuple(frame), tuple(window), tuple(shift), -math.inf)
    return MASKED if not torch.compiler.is_compiling() and holds(mask, infinite) else None


@constant_when_compiled
def _holds_when_traced(x: Any, *asked: Any) -> bool:
    """Compute :func:`holds` under dynamo, which passes the real tensor and compiles the result as a constant."""
    return _compare(x, asked)


def _compare(x: Any, asked: tuple[Any, ...]) -> bool:
    formula, *geometry = asked
    if hasattr(x, "fake_mode"):
        return _seen_behind(x, asked)
    if type(x) not in (Tensor, nn.Parameter) or x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    with _disable_current_modes(), torch.no_grad():
        expected = formula(*geometry, device=x.device)
        if x.is_meta:  # no values
            return x.numel() == expected.numel()
        same = x.numel() == expected.numel() and torch.equal(x.reshape(-1).to(expected.dtype), expected.reshape(-1))
    if not x.is_inference():  # inference tensors have no version counter
        key = id(x)
        _SEEN[key] = weakref.ref(x, lambda gone: _forget(key, gone)), x._version, asked, same
    return same


def _forget(key: int, gone: weakref.ref[Tensor]) -> None:
    seen = _SEEN.get(key)
    if seen is not None and seen[0] is gone:
        del _SEEN[key]


def _seen_behind(fake: Any, asked: tuple[Any, ...]) -> bool:
    """Return the result cached for the real tensor behind ``fake``, a fake tensor of torch.export, or False."""
    converter = fake.fake_mode.fake_tensor_converter.meta_converter
    for reference, version, compared_with, same in list(_SEEN.values()):
        real = reference()
        if real is not None and compared_with == asked and real._version == version:
            number = converter.describer.lookup_tensor.get(real)
            if number is not None and converter.tensor_memo.get(number) is fake:
                return same
    return False
