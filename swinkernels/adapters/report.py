"""What accelerate did, as data and as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Replaced:
    """A module that now runs on this package's ops."""

    path: str
    module_class: str
    adapter: str
    # What runs its main part (a block's attention, a v2 block's norms): the backend asked for, or what "auto" takes for
    # the module's device and dtype in eval mode, or the library's name where its own code runs.
    backend: str
    # Per part, why a faster backend does not run it, or why the one asked for cannot.
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Skipped:
    """A module that an adapter knows, left as it was."""

    path: str
    module_class: str
    adapter: str
    reason: str


@dataclass
class Report:
    """The outcome of :func:`swinkernels.accelerate`; ``print`` it for a table."""

    replaced: list[Replaced] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    # Why nothing was replaced, if nothing was.
    reason: str | None = None

    def __str__(self) -> str:
        lines = [f"swinkernels: {len(self.replaced)} replaced, {len(self.skipped)} left as they were"]
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
            rows = [("left as it was", "class", "library", "reason")]
            rows += [(_name(entry.path), entry.module_class, entry.adapter, entry.reason) for entry in self.skipped]
            lines += ["", *_table(rows)]
        if remarks:
            lines += ["", *(f"[{i}] {remark}" for i, remark in enumerate(remarks, start=1))]
        return "\n".join(lines)


def _name(path: str) -> str:
    return path or "(the model itself)"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of aligned columns, the first one underlined."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * w for w in widths), *lines[1:]]
