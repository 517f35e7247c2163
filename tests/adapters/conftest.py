"""Fixtures for the tests of the adapters."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list to which each call of window attention appends the backend that it requests."""
    module, seen = sys.modules["swinkernels.ops.window_attention"], []
    attend = module._attend
    monkeypatch.setattr(module, "_attend", lambda *args: seen.append(args[6]) or attend(*args))
    return seen
