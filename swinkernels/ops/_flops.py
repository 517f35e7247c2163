"""FLOPs of the ops, for ``torch.utils.flop_counter.FlopCounterMode``.

Window attention has two matrix products forward and four backward, 2 * N * head_dim each per query: what the counter
finds in the libraries' plain code. Scores that a backward kernel computes again are not counted, and windows count
whole, so pad tokens do too. The other ops multiply no matrices and count zero, as torch's own copies and norms do.
"""

from __future__ import annotations

import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from swinkernels._extension import ops
from swinkernels.ops._arguments import frame_size
from swinkernels.window_spec import WindowSpec

_COUNTER = "torch.utils.flop_counter"
_WITHOUT_PRODUCTS = (
    "window_partition", "window_reverse", "patch_merging_norm_fwd", "patch_merging_norm_bwd", "layer_norm_fwd",
    "layer_norm_bwd", "residual_layer_norm_fwd", "residual_layer_norm_bwd", "residual_post_norm_fwd",
    "residual_post_norm_bwd",
)  # fmt: skip
_WITH_TRITON = ("window_attention", "window_partition", "window_reverse", "patch_merging")


def _attention(products: int, first_map: int, axes: int) -> Callable[..., int]:
    """The formula of an op that multiplies matrices ``products`` times.

    Args:
        products: matrix products per window.
        first_map: which argument of the op is qkv or q.
        axes: how many axes of that map follow those of its tokens.
    """

    def flops(*arguments: Any, **_: Any) -> int:
        batch, *size, num_heads, head_dim = arguments[first_map]
        spec = WindowSpec.parse(next(a for a in arguments if isinstance(a, str)), 1.0, 0.0, 0.0)
        tokens = batch * math.prod(frame_size(size[: len(size) + 2 - axes], spec.window_size))
        return products * 2 * tokens * spec.volume * num_heads * head_dim

    return flops


def _zero(*_: Any, **__: Any) -> int:
    return 0


FORMULAS: dict[str, Callable[..., int]] = dict.fromkeys(_WITHOUT_PRODUCTS, _zero)
for _form, _axes in (("window_attention_qkvpacked", 3), ("window_attention", 2)):
    FORMULAS[f"{_form}_fwd"] = _attention(2, 0, _axes)
    FORMULAS[f"{_form}_bwd"] = _attention(4, 1, _axes)
FORMULAS |= {f"{name}_triton": f for name, f in FORMULAS.items() if name.startswith(_WITH_TRITON)}


def _register(counter: ModuleType) -> None:
    for name, formula in FORMULAS.items():
        counter.register_flop_formula(getattr(ops, name))(formula)


class _AtImport(MetaPathFinder):
    """Registers the formulas once torch's counter is imported, which imports Triton: as slow as this package."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if _COUNTER in sys.modules:
    _register(sys.modules[_COUNTER])
else:
    sys.meta_path.insert(0, _AtImport())
