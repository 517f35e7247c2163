"""Computes the libraries' residual connections, norms and patch merging with ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from swinkernels.adapters.adapter import Adapter, original_class
from swinkernels.adapters.bypass import (
    child,
    class_of,
    first_weight,
    replaced_forward,
    replaced_method,
    watch,
    weight_and_bias,
    why_not_absorbed,
    why_not_linear,
    why_not_norm,
)
from swinkernels.adapters.checks import settled
from swinkernels.adapters.part import Part, norm_part
from swinkernels.adapters.repeated import repeated
from swinkernels.ops import layer_norm, patch_merging, residual_layer_norm, residual_post_norm
from swinkernels.ops._backends import backend_beside, patch_merging_reasons, residual_reasons
from swinkernels.ops._fused_linear import joins
from swinkernels.ops._library import autocast_dtype, linear_dtype


def norm_dtype(x: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the output dtype of torch's LayerNorm for an input of ``dtype`` on the device of ``x``.

    Under autocast it is float32, except on a CPU; otherwise it is ``dtype``.
    """
    return torch.float32 if autocast_dtype(x) is not None and x.device.type != "cpu" else dtype


def norm_for_linear(block: Any, name: str, x: Tensor, width: int) -> Tensor:
    """Return the output for ``x`` of the block's norm ``name``, which only a Linear layer reads.

    Under autocast, the result has the dtype of the Linear layer's input.
    """
    norm, dtype = child(block, name), autocast_dtype(x)
    if dtype is None or settled(block, _why_not_norm_of, name, width) is not None:
        return norm(x)
    backend = backend_beside("layer_norm", block._swinkernels_backend)
    return layer_norm(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, backend=backend)


def _why_not_norm_of(block: Any, name: str, width: int) -> str | None:
    return why_not_norm(name, child(block, name), width)


def in_another_dtype(x: Tensor, *parameters: Tensor | None) -> bool:
    """Return True if the device or, outside autocast, the dtype of a parameter differs from that of ``x``.

    The library's own code handles such calls.
    """
    return are_elsewhere(parameters, x.device, None if autocast_dtype(x) is not None else x.dtype)


def are_elsewhere(parameters: Iterable[Tensor | None], device: torch.device, dtype: torch.dtype | None) -> bool:
    """Return True if a parameter is not on ``device`` or, unless ``dtype`` is None, does not have this dtype."""
    return any(p is not None and (p.device != device or (dtype or p.dtype) != p.dtype) for p in parameters)


def norm_row(norm: str) -> Callable[[Any], int]:
    """Return a function that, given a block, returns the row length of its module ``norm``, or 0 if that is unknown."""

    def row(block: Any) -> int:
        shape = getattr(child(block, norm), "normalized_shape", ())
        return shape[-1] if shape else 0

    return row


def drop_path_scale(drop_path: Any, y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the per-sample factors by which timm's DropPath would multiply ``y``, or None if they are 1.

    The factors are computed from the same random numbers as in timm.
    """
    if class_of(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    scale = y.new_empty(y.shape[0], dtype=dtype).bernoulli_(keep)
    return scale.div_(keep) if keep > 0.0 and drop_path.scale_by_keep else scale


def floored_drop_path_scale(drop_path: Any, y: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the per-sample factors by which the DropPath of transformers or mmcv would multiply y, or None if 1.

    They are computed from the same random numbers as in these libraries.
    """
    if class_of(drop_path) is nn.Identity or drop_path.drop_prob == 0.0 or not drop_path.training:
        return None
    keep = 1 - drop_path.drop_prob
    return torch.floor(torch.rand(y.shape[0], dtype=dtype, device=y.device) + keep).div_(keep)


@dataclass(frozen=True, eq=False)
class Residual:
    """Describes a block's residual connection and the norm next to it, which one op computes together."""

    # The names of two modules of the block; drop_path is None if the branch itself ends with the drop path.
    norm: str
    drop_path: str | None = None
    # The library's DropPath class and its name in messages. An nn.Identity means p = 0.
    kind: type[nn.Module] = nn.Identity
    known_as: str = "an nn.Identity"
    # Returns True if, under autocast, a Linear casts the norm's result before other code can read it.
    casts_its_input: Callable[[Any], bool] = lambda block: False
    # Returns the number of the block's channels.
    width: Callable[[Any], int] = lambda block: block.dim
    # Returns the per-sample factors by which the library's DropPath would multiply the branch, computed from the same
    # random numbers, or None if they are 1.
    scale: Callable[[Any, Tensor, torch.dtype], Tensor | None] = drop_path_scale

    def why_not(self, block: Any) -> str | None:
        """Return the reason why the library's own code currently has to run, or None."""
        reason = why_not_norm(self.norm, child(block, self.norm), self.width(block))
        if reason is not None or self.drop_path is None:
            return reason
        drop = child(block, self.drop_path)
        kind = nn.Identity if class_of(drop) is nn.Identity else self.kind
        return why_not_absorbed(self.drop_path, drop, kind, self.known_as)

    def add_then_norm(self, block: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor] | None:
        """Return s = x + drop_path(y) and norm(s), or None if the library's own code has to run."""
        # The op returns s in x's dtype and norm(s) in y's. Under autocast, torch's norm(s) may be wider than y, so the
        # op may replace it only if the next Linear casts norm(s) anyway.
        if torch.promote_types(x.dtype, y.dtype) != x.dtype or not (
            y.dtype == norm_dtype(x, x.dtype) or (y.dtype == autocast_dtype(x) and self.casts_its_input(block))
        ):
            return None
        norm = child(block, self.norm)
        if settled(block, self.why_not) is not None or in_another_dtype(x, *weight_and_bias(norm)):
            return None
        return residual_layer_norm(x, y, **self._arguments(block, y, y.dtype))

    def add_normed(self, block: Any, x: Tensor, y: Tensor) -> Tensor | None:
        """Return x + drop_path(norm(y)), or None if the library's own code has to run."""
        dtype = norm_dtype(y, y.dtype)
        # The op returns the sum in the dtype of x.
        if torch.promote_types(x.dtype, dtype) != x.dtype or settled(block, self.why_not) is not None:
            return None
        if in_another_dtype(y, *weight_and_bias(child(block, self.norm))):
            return None
        return residual_post_norm(x, y, **self._arguments(block, y, dtype))

    def _arguments(self, block: Any, y: Tensor, dtype: torch.dtype) -> dict[str, Any]:
        """Return the op's arguments after the residual stream and the branch, with drop path factors of ``dtype``."""
        norm = child(block, self.norm)
        weight, bias = weight_and_bias(norm)
        return {
            "weight": weight,
            "bias": bias,
            "eps": norm.eps,
            "drop_path_scale": None if self.drop_path is None else self.scale(child(block, self.drop_path), y, dtype),
            "backend": backend_beside("residual_layer_norm", block._swinkernels_backend),
        }

    def part(self, weight: Callable[[Any], Tensor]) -> Part:
        """Return the :class:`Part` of the connection; ``weight`` returns a tensor with the block's dtype and device."""
        return norm_part(
            "residual and norm",
            "residual_layer_norm",
            weight,
            residual_reasons,
            lambda block: (self.width(block),),
            lambda block: replaced_forward(block) or self.why_not(block),
        )


def why_no_residual(residuals: Sequence[Residual], block: Any) -> str | None:
    """Return the reason why the library's own code has to run all residual connections of a block, or None."""
    reasons = [residual.why_not(block) for residual in residuals]
    return None if None in reasons else "; ".join(dict.fromkeys(map(str, reasons)))


def residuals_adapter(
    name: str,
    original: type[nn.Module],
    accelerated: type[nn.Module],
    residuals: Sequence[Residual],
    attention_size: Callable[[Any], tuple[int, ...]],
    **options: Any,
) -> Adapter:
    """Create the adapter of a block whose attention has a separate adapter.

    ``attention_size`` returns the size of a map for ``block.attn``; ``options`` are further fields of :class:`Adapter`.
    """
    watch(original)
    return Adapter(
        name,
        original,
        accelerated,
        reason_to_skip=lambda block: why_no_residual(residuals, block),
        parts=tuple(residual.part(first_weight) for residual in residuals),
        input_shape=lambda block: (*attention_size(block.attn), residuals[-1].width(block)),
        weight=first_weight,
        looks_inside=True,
        **options,
    )


@dataclass(frozen=True, eq=False)
class Merging:
    """Describes patch merging with the modules ``norm`` and ``reduction``, which one op replaces."""

    # "pre" (v1) if the norm precedes the reduction, "post" (v2) if it follows.
    norm: str
    # Returns the length of the rows that the norm normalises.
    width: Callable[[Any], int]
    # (number of the map's axes) -> the ``order`` argument of the op, which names the order of the neighbours.
    order: Callable[[int], str] = lambda axes: "swin"
    # Returns the reason why a module currently does not compute ordinary patch merging, or None.
    why_not_usual: Callable[[Any], str | None] = lambda merging: None

    def why_not(self, merging: Any) -> str | None:
        """Return the reason why the library's own code currently has to run, or None."""
        unusual = replaced_method(merging, original_class(merging)) or self.why_not_usual(merging)
        if unusual is not None:
            return unusual
        reduction = child(merging, "reduction")
        reason = why_not_linear("reduction", reduction)
        if reason is None and reduction.bias is not None:
            reason = "reduction has a bias"
        return reason or why_not_norm("norm", child(merging, "norm"), self.width(merging))

    def run(self, merging: Any, x: Tensor) -> Tensor | None:
        """Return the merged map, or None if the library's own code has to run."""
        return repeated(merging, self, x, lambda: self._run(merging, x)) if joins(x) else self._run(merging, x)

    def _run(self, merging: Any, x: Tensor) -> Tensor | None:
        if settled(merging, self.why_not) is not None:
            return None
        norm, weight = child(merging, "norm"), child(merging, "reduction").weight
        is_plain = type(weight) in (Tensor, nn.Parameter, FakeTensor)  # the op may reorder the weight's columns
        if not is_plain or in_another_dtype(x, norm.weight, norm.bias, weight):
            return None
        out = patch_merging(
            x,
            norm.weight,
            norm.bias,
            weight,
            eps=norm.eps,
            order=self.order(x.dim() - 2),
            norm=self.norm,
            backend=backend_beside("patch_merging", merging._swinkernels_backend),
        )
        return out if self.norm == "pre" else out.to(norm_dtype(x, linear_dtype(x)))

    def part(self) -> Part:
        """Return the :class:`Part` of the patch merging."""
        return norm_part(
            "patch merging",
            "patch_merging",
            lambda merging: merging.reduction.weight,
            patch_merging_reasons,
            lambda merging: (self.norm, self.width(merging)),
            lambda merging: replaced_forward(merging) or self.why_not(merging),
        )

    def adapter(
        self,
        name: str,
        original: type[nn.Module],
        accelerated: type[nn.Module],
        input_shape: Callable[[Any], tuple[int, ...]],
        **options: Any,
    ) -> Adapter:
        """Create the adapter of a library's patch merging; ``options`` are further fields of :class:`Adapter`."""
        watch(original, methods=("maybe_pad",))
        given = {
            "reason_to_skip": self.why_not,
            "weight": lambda merging: merging.reduction.weight,
            "why_not_recompute": lambda merging: "only blocks recompute, not patch merging",
            **options,
        }
        return Adapter(name, original, accelerated, parts=(self.part(),), input_shape=input_shape, **given)
