"""Faults that the tests have to find: one edit of one file each, with a test that passes without it and fails with it.

They guard the tests: a test that is made faster, or a suite that is thinned out, still has to find all of them. A fault
is text to replace, so that it outlives changes elsewhere in its file; one that no longer applies has to be written
again for the code that took that text's place.
"""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``old``, which is in ``file`` once, becomes ``new``; then the test of this pytest node id fails."""

    file: str
    old: str
    new: str
    test: str

    def apply_to(self, source: str) -> str:
        """The source with the fault; ValueError if it does not have the text exactly once."""
        count = source.count(self.old)
        if count != 1:
            raise ValueError(
                f"{self.file} has the text to replace {count} times, not once: write the fault anew for the code as "
                f"it is now, in tests/faults/.\n{self.old}"
            )
        return source.replace(self.old, self.new)


def all_faults() -> dict[str, Fault]:
    """Every fault by its name."""
    from tests.faults import benchmarks, cpu, cuda, modules, reference, triton

    faults: dict[str, Fault] = {}
    for area in (cuda, cpu, triton, reference, modules, benchmarks):
        assert not faults.keys() & area.FAULTS.keys(), "two faults of one name"
        faults |= area.FAULTS
    return faults
