"""Replaces methods of library classes so that the adapters still take them for the published ones."""

from __future__ import annotations

from typing import Any

import pytest

from swinkernels.adapters import bypass


def publish(monkeypatch: pytest.MonkeyPatch, kind: Any, method: str, function: Any) -> None:
    """Replace ``kind``'s ``method`` with ``function``, as if the library had published it."""
    monkeypatch.setattr(kind, method, function)
    for watched, methods in {kind: (("forward", None), ("__call__", kind.__call__)), **bypass._PUBLISHED}.items():
        if getattr(watched, method, None) is function:  # a subclass may inherit the method
            now = tuple((name, function if name == method else published) for name, published in methods)
            monkeypatch.setitem(bypass._PUBLISHED, watched, now)


def refuse(monkeypatch: pytest.MonkeyPatch, kind: Any, method: str = "forward") -> None:
    """Make ``kind``'s ``method`` raise an error, so that a passing test proves that an op ran instead."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{kind.__name__}.{method} ran")

    publish(monkeypatch, kind, method, refused)
