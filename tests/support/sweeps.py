"""Builds combinations of test arguments; ``make test`` runs a few of them, and ``make test-all`` runs all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest


def in_turn(values: Iterable[Any], others: Sequence[Any]) -> list[Any]:
    """Combine each of ``values`` with each of ``others``, for parametrize.

    Each value has exactly one combination without the mark ``long``: value i with ``others[i % len(others)]``.
    """
    return [
        pytest.param(value, other, id=f"{value}-{other}", marks=[] if j == i % len(others) else pytest.mark.long)
        for i, value in enumerate(values)
        for j, other in enumerate(others)
    ]


def long_but(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return every value, for parametrize; values other than ``kept`` are marked ``long``."""
    return [pytest.param(value, marks=[] if value in kept else pytest.mark.long) for value in values]
