"""Tests a sample of the random edits of accelerated models that ``python -m tests.adapters.mutations`` draws."""

from __future__ import annotations

import itertools

import pytest

pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
pytest.importorskip("monai", reason="MONAI is not installed")
pytest.importorskip("mmpretrain", reason="mmpretrain is not installed")

from swinkernels.adapters import bypass, masks
from tests.adapters import mutations
from tests.support.sweeps import long_but

SEED = 0


@pytest.mark.parametrize("first", long_but(range(0, 300, 50), 0, 50))
def test_no_difference(first):
    found = [mutations.check(SEED, number) for number in range(first, first + 50)]
    assert not any(found), "\n".join(filter(None, found))


# The search for an edit begins at ``first``, because drawing a thousand edits takes most of a second.
@pytest.mark.parametrize(
    ("edit", "family", "owner", "name", "answer", "first"),
    [
        ("global hook", "timm", bypass, "all_modules_have_hooks", False, 13_670),
        ("forward hook", "torchvision", bypass, "has_own_hooks", False, 1810),
        ("assigned buffer", "MONAI", masks, "_compare", True, 1640),
        ("changed buffer", "timm v2", masks, "_compare", True, 4150),
    ],
)
def test_what_is_not_looked_at_is_found(monkeypatch, edit, family, owner, name, answer, first):
    monkeypatch.setattr(owner, name, lambda *args: answer)
    drawn = ((number, mutations.draw(SEED, number)) for number in range(first, first + 40_000))
    of_kind = (n for n, m in drawn if m.family == family and edit in m.kind.split(" + ") and not m.afterwards)
    assert any(mutations.check(SEED, number) for number in itertools.islice(of_kind, 25))
