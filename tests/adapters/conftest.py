"""Fixtures of the adapters' tests."""

from __future__ import annotations

import sys

import pytest


@pytest.fixture
def attention_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the calls of window attention by the requested backend."""
    module, seen = sys.modules["swinkernels.ops.window_attention"], []
    attend = module._attend
    monkeypatch.setattr(module, "_attend", lambda *args: seen.append(args[6]) or attend(*args))
    return seen
