"""Methods of copies replaced behind the back of their snapshots, which would notice."""

from __future__ import annotations

from typing import Any

import pytest

from swinkernels.adapters.copies import snapshot


def refuse_forward(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Let the forward of a class and of its subclasses fail, so that a test shows that an op ran in its place."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{kind.__name__}.forward ran")

    is_code = snapshot._is_code
    monkeypatch.setattr(kind, "forward", refused)
    monkeypatch.setattr(snapshot, "_is_code", lambda cls, *code: issubclass(cls, kind) or is_code(cls, *code))
