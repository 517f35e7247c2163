"""Defines WindowSpec, which contains the arguments of a window-attention call other than its tensors, in normal form.

The public functions and the adapters build a spec with ``ops._arguments.make_window_spec``. Support checks, fakes and
the plain-PyTorch backends read its fields. Kernels receive a spec as ``wire()``, a string, and ``numbers``, three
floats that compilers can make symbolic. A string is a single argument: exporters preserve it, printed graphs show it
readably, and passing it costs one pointer. A new option needs a field and a conversion in this file, a check in
make_window_spec, an argument of the public functions and of the reference, and code in each backend that supports it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WindowSpec:
    """Arguments of a window-attention call other than its tensors; per-axis values are given slowest axis first.

    Fields are documented under the argument of the same name of :func:`swinkernels.window_attention_qkvpacked`, with
    these exceptions. If ``needs_lse`` is False, as in calls without a gradient, the op returns an empty lse. If
    ``allow_tf32`` is True, float32 products may be rounded to TF32. If ``axis_tables`` is True, the op's bias consists
    of the tables of all axes, concatenated. ``table_types`` is the number of window types in the bias table.
    """

    window_size: tuple[int, ...]
    shift_size: tuple[int, ...]
    table_window: tuple[int, ...]
    pad_before: tuple[int, ...]
    periodic: tuple[bool, ...]
    key_window: tuple[int, ...]
    table_pairs: tuple[bool, ...]
    pad_order: str = "pad_then_roll"
    grid: bool = False
    scale: float = 1.0
    mask_value: float = -100.0
    dropout_p: float = 0.0
    allow_tf32: bool = False
    needs_lse: bool = True
    axis_tables: bool = False
    table_types: int = 1

    @property
    def volume(self) -> int:
        """Return N, the number of tokens in a window."""
        return math.prod(self.window_size)

    @property
    def key_volume(self) -> int:
        """Return M, the number of tokens in a key window."""
        return math.prod(self.key_window)

    @property
    def table_rows(self) -> int:
        """Return the number of rows of the bias table."""
        # Lists, because torch.compile cannot trace a generator here.
        if self.key_window != self.window_size:
            return math.prod([w + m - 1 for w, m in zip(self.window_size, self.key_window, strict=True)])
        per_axis = zip(self.table_window, self.table_pairs, strict=True)
        return math.prod([t * t if pairs else 2 * t - 1 for t, pairs in per_axis])

    def options(self) -> dict[str, Any]:
        """Return the spec as keyword arguments of the public functions and the plain-PyTorch backends."""
        return {name: getattr(self, name) for name in _OPTIONS}

    @property
    def numbers(self) -> tuple[float, float, float]:
        return self.scale, self.mask_value, self.dropout_p

    def wire(self, *, allow_tf32: bool = False, needs_lse: bool = True) -> str:
        """Format the fields, except those in ``numbers``, as ``name=value;...``; fields at their default are left out.

        Per-axis values are joined by commas. ``allow_tf32`` and ``needs_lse`` replace the fields of the same name,
        whose values are known only when the op is called.
        """
        return _write((*(getattr(self, name) for name in _GEOMETRY), allow_tf32, needs_lse))

    @classmethod
    @functools.lru_cache(maxsize=4096)
    def parse(cls, wire: str, scale: float, mask_value: float, dropout_p: float) -> WindowSpec:
        """Build a spec from the results of ``wire()`` and ``numbers``."""
        written = dict(item.split("=") for item in wire.split(";"))
        window = _FIELDS["window_size"].read(written["window_size"])
        fields = {
            name: field.read(written[name]) if name in written else field.default(window)
            for name, field in _FIELDS.items()
        }
        return cls(scale=scale, mask_value=mask_value, dropout_p=dropout_p, **fields)


@dataclass(frozen=True)
class _Field:
    """Converts a field to the wire format and back, and gives its default, which may depend on the window."""

    write: Callable[[Any], str]
    read: Callable[[str], Any]
    default: Callable[[tuple[int, ...]], Any]


def _per_axis(kind: Callable[[str], Any], default: Callable[[int], Any]) -> _Field:
    return _Field(
        lambda values: ",".join(str(int(v)) for v in values),
        lambda text: tuple(kind(v) for v in text.split(",")),
        lambda window: tuple(default(w) for w in window),
    )


def _flag(default: bool) -> _Field:
    return _Field(lambda value: str(int(value)), lambda text: text == "1", lambda window: default)


# The fields of the wire format. The window is first; the two fields that are known only when the op is called are last.
# csrc/bindings/window_spec.h reads the same names and has the same defaults.
_FIELDS = {
    "window_size": _per_axis(int, lambda w: None),
    "shift_size": _per_axis(int, lambda w: 0),
    "table_window": _per_axis(int, lambda w: w),
    "pad_before": _per_axis(int, lambda w: 0),
    "periodic": _per_axis(lambda text: text == "1", lambda w: False),
    "key_window": _per_axis(int, lambda w: w),
    "table_pairs": _per_axis(lambda text: text == "1", lambda w: False),
    "table_types": _Field(str, int, lambda window: 1),
    "pad_order": _Field(str, str, lambda window: "pad_then_roll"),
    "grid": _flag(False),
    "axis_tables": _flag(False),
    "allow_tf32": _flag(False),
    "needs_lse": _flag(True),
}
_GEOMETRY = tuple(_FIELDS)[:-2]
_OF_TENSORS = ("axis_tables", "table_types")  # derived from the tensors of a call
_OPTIONS = (*(name for name in _GEOMETRY if name not in _OF_TENSORS), "scale", "mask_value", "dropout_p")


def _write(values: tuple[Any, ...]) -> str:
    """Format ``values``, one per field of the wire format. Compilers treat the string as a constant."""
    return _written(values)


@functools.lru_cache(maxsize=4096)
def _written(values: tuple[Any, ...]) -> str:
    written = zip(_FIELDS.items(), values, strict=True)
    return ";".join(f"{name}={field.write(v)}" for (name, field), v in written if v != field.default(values[0]))


_write._dynamo_marked_constant = True  # type: ignore[attr-defined]  # see ops._library.constant_when_compiled
