"""Planted faults that the tests must detect: each is one edit of one file, and names a test that then fails.

The faults guard the tests: after a test is made faster, or a suite is thinned out, all faults must still be detected. A
fault is a text replacement, so it survives other changes to its file. If the text to replace is no longer in the file,
the fault has to be rewritten for the current code.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Replaces ``old``, which occurs once in ``file``, by ``new``, which makes ``test`` (a pytest node id) fail."""

    file: str
    old: str
    new: str
    test: str

    def apply_to(self, source: str) -> str:
        """Return ``source`` with the fault; raise ValueError unless ``old`` occurs exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file} contains the text to replace {count} times instead of once. Rewrite the fault in "
                f"tests/faults/ for the current code.\n{self.old}"
            )
        return source.replace(self.old, self.new)


def all_faults() -> dict[str, Fault]:
    """Return all faults by name."""
    from tests.faults import benchmarks, cpu, cuda, modules, reference, triton

    faults: dict[str, Fault] = {}
    for area in (cuda, cpu, triton, reference, modules, benchmarks):
        assert not faults.keys() & area.FAULTS.keys(), "two faults have the same name"
        faults |= area.FAULTS
    return faults
