"""Makes copies of published classes raise errors when called, while the adapters' snapshots of them still match."""

from __future__ import annotations

from typing import Any

import pytest

from swinkernels.adapters.copies import snapshot
from tests.support.published import refuse


def refuse_forward(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Make ``kind.forward`` raise an error, also where inherited, so that a passing test proves that an op ran."""

    is_code = snapshot._is_code
    refuse(monkeypatch, kind)
    monkeypatch.setattr(snapshot, "_is_code", lambda cls, *code: issubclass(cls, kind) or is_code(cls, *code))
