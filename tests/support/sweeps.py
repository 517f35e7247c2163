"""Combinations of arguments, of which ``make test`` runs a few and ``make test-all`` the rest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def in_turn(values: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """Combine each of ``values`` with each of ``others``, for parametrize. Each value has one combination that is not
    ``long``; from value to value, it moves on to the next of ``others``.
    """
    return [
        pytest.param(value, other, id=f"{value}-{other}", marks=[] if j == i % len(others) else pytest.mark.long)
        for i, value in enumerate(values)
        for j, other in enumerate(others)
    ]


def long_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return every value, for parametrize; values that are not kept are ``long``."""
    return [pytest.param(value, marks=[] if value in kept else pytest.mark.long) for value in values]
