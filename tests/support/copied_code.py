"""Replaces methods of copies in a way that their snapshots do not detect."""

from __future__ import annotations

from typing import Any

import pytest

from swinkernels.adapters.copies import snapshot
from tests.support.published import refuse


def refuse_forward(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Make the forward of a class and of its subclasses fail, which proves that an op ran instead."""

    is_code = snapshot._is_code
    refuse(monkeypatch, kind)
    monkeypatch.setattr(snapshot, "_is_code", lambda cls, *code: issubclass(cls, kind) or is_code(cls, *code))
