"""The result of accelerate, as data and as a table."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from swinkernels.adapters.check import Ran, run_and_watch


@dataclass(frozen=True)
class Replaced:
    """A module that now uses this package's ops."""

    path: str
    module_class: str
    adapter: str
    # The backend of the main part (a block's attention, a v2 block's norms): the requested one, or the choice of "auto"
    # for the module's device and dtype in eval mode. If the library's own code runs, this is the library's name.
    backend: str
    # The reasons why the requested backend, or a backend faster than the chosen one, cannot run a part of the module.
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A module that has an adapter or resembles a supported module, but was left unchanged."""

    path: str
    module_class: str
    adapter: str
    reason: str


@dataclass(frozen=True)
class NotRecomputed:
    """A replaced module for which recompute=True has no effect in training.

    Modules inside a replaced block are not listed.
    """

    path: str
    module_class: str
    adapter: str
    reason: str


@dataclass
class Report:
    """The outcome of :func:`swinkernels.accelerate`; ``print`` it for a table."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    # The replaced modules for which recompute=True has no effect; empty without recompute=True.
    not_recomputed: list[NotRecomputed] = field(default_factory=list)
    # If nothing was replaced or skipped, a sentence saying that the model contains no supported module, else None.
    reason: str | None = None
    # A weak reference to the model.
    _model: weakref.ref[nn.Module] | None = field(default=None, repr=False, compare=False)
    # Path -> the op of a module's main part, and a function that returns the reason why the library's own code runs, or
    # None.
    _parts: dict[str, tuple[str, Callable[[nn.Module], str | None]]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def check(self, *inputs: Any, **options: Any) -> Check:
        """Run the model once and list, for each replaced module, the ops that it called and their backends.

        The call is ``model(*inputs, **options)`` in the model's current mode, without gradients. The states of the
        random number generators are restored.

        Raises:
            RuntimeError: the model no longer exists, or this report was unpickled.
        """
        model = None if self._model is None else self._model()
        if model is None:
            raise RuntimeError("Report.check: the model of this report was deleted: call swinkernels.accelerate again")
        return Check(run_and_watch(model, self._parts, inputs, options))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_parts": {}}

    def __str__(self) -> str:
        outer = outermost(self.replaced)
        inside = f" ({len(self.replaced)} with those inside them)" if len(outer) < len(self.replaced) else ""
        lines = [f"swinkernels: {len(outer)} replaced{inside}, {len(self.skipped)} left as they were"]
        if self.reason is not None:
            lines.append(self.reason)
        remarks = list(dict.fromkeys(remark for entry in self.replaced for remark in entry.remarks))
        if self.replaced:
            rows = [("module", "class", "library", "backend")]
            for entry in self.replaced:
                marks = "".join(f" [{remarks.index(remark) + 1}]" for remark in entry.remarks)
                rows.append((_name(entry.path), entry.module_class, entry.adapter, entry.backend + marks))
            lines += ["", *_table(rows)]
        if self.skipped:
            lines += ["", *_table(_grouped("left as it was", self.skipped))]
        if self.not_recomputed:
            lines += ["", *_table(_grouped("recompute=True has no effect", self.not_recomputed))]
        if remarks:
            lines += ["", *(f"[{i}] {remark}" for i, remark in enumerate(remarks, start=1))]
        return "\n".join(lines)


@dataclass
class Check:
    """The ops that each replaced module called in a run of the model, with their backends; ``print`` it for a table."""

    modules: list[Ran]

    def __str__(self) -> str:
        ran = sum(bool(entry.calls) for entry in self.modules)
        rows = [("module", "class", "ran"), *((_name(e.path), e.module_class, str(e)) for e in self.modules)]
        return "\n".join([f"swinkernels: {ran} of {len(self.modules)} replaced modules called ops", "", *_table(rows)])


def outermost(entries: Sequence[Replaced]) -> list[Replaced]:
    """Return the ``entries`` whose modules are not inside the module of another entry."""
    return [e for e in entries if not any(_is_inside(e.path, other.path) for other in entries)]


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def _name(path: str) -> str:
    return path or "(the model itself)"


def _grouped(heading: str, entries: Sequence[Skipped | NotRecomputed]) -> list[tuple[str, ...]]:
    """Return the rows of a table: the heading, then one row for each combination of class, library and reason."""
    paths: dict[tuple[str, str, str], list[str]] = {}
    for entry in entries:
        paths.setdefault((entry.module_class, entry.adapter, entry.reason), []).append(entry.path)
    rows: list[tuple[str, ...]] = [(heading, "class", "library", "reason")]
    for of, of_kind in paths.items():
        more = f" and {len(of_kind) - 1} more" if len(of_kind) > 1 else ""
        rows.append((_name(of_kind[0]) + more, *of))
    return rows


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Format ``rows`` as lines of aligned columns, and underline the first line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
