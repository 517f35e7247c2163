"""The README's Python examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_example_runs(example):
    if "timm" in example:
        pytest.importorskip("timm")
    namespace: dict[str, object] = {}
    exec(compile(example, str(README), "exec"), namespace)
    if "out" in namespace:
        assert namespace["out"].shape == (2, 50, 70, 96)


def test_there_are_examples():
    assert len(EXAMPLES) >= 2
