"""Faults that the tests must find: each is one edit of one file, with a test that passes without it and fails with it.

They guard the tests: after a test is made faster, or a suite is thinned out, all faults must still be found. A fault is
a text replacement, so it survives other changes to its file; one that no longer applies has to be rewritten for the
code that replaced its text.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """Replaces ``old``, which occurs once in ``file``, by ``new``, so that the test of this pytest node id fails."""

    file: str
    old: str
    new: str
    test: str

    def apply_to(self, source: str) -> str:
        """Return the source with the fault; raise ValueError unless it contains the text exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file} contains the text to replace {count} times instead of once. Rewrite the fault in "
                f"tests/faults/ for the current code.\n{self.old}"
            )
        return source.replace(self.old, self.new)


def all_faults() -> dict[str, Fault]:
    """Return every fault by name."""
    from tests.faults import benchmarks, cpu, cuda, modules, reference, triton

    faults: dict[str, Fault] = {}
    for area in (cuda, cpu, triton, reference, modules, benchmarks):
        assert not faults.keys() & area.FAULTS.keys(), "two faults have the same name"
        faults |= area.FAULTS
    return faults
