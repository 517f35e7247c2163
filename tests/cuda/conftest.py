"""The emulated kernels of window attention, for the test files of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests import emulation


@pytest.fixture
def library() -> Iterator[emulation.WindowAttentionLibrary]:
    """Lend the library of emulated kernels, with its default settings before and after."""
    built = emulation.window_attention_library()
    built.configure()
    yield built
    built.configure()
