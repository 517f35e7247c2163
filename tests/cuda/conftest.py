"""Provides the emulated window attention kernels to the test files of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import emulation


@pytest.fixture
def library() -> Iterator[emulation.WindowAttentionLibrary]:
    """Yield the library of emulated kernels, and reset its settings before and after the test."""
    built = emulation.window_attention_library()
    built.configure()
    yield built
    built.configure()
