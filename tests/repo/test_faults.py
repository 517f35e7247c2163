"""Tests that the planted faults apply to the current sources; ``make faults`` checks that the tests detect them."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from tests.faults import Fault, all_faults

ROOT = Path(__file__).resolve().parents[2]
FAULTS = all_faults()


def marks_of(path: Path, function: str) -> set[str]:
    """Return the attribute names in the decorators of the test ``function`` in ``path``, such as its marks."""
    tree = ast.parse(path.read_text())
    (test,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    return {node.attr for d in test.decorator_list for node in ast.walk(d) if isinstance(node, ast.Attribute)}


def test_there_are_fifty_and_some_of_every_area() -> None:
    assert len(FAULTS) >= 50
    areas = {name.partition("-")[0] for name in FAULTS}
    assert areas >= {"cuda", "cpu", "bindings", "triton", "reference", "ops", "nn", "adapters", "benchmarks"}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_applies_and_its_test_is_run_by_make_test(name: str) -> None:
    fault = FAULTS[name]
    assert fault.apply_to((ROOT / fault.file).read_text())
    file, _, test = fault.test.partition("::")
    function, _, value = test.removesuffix("]").partition("[")
    assert "long" not in marks_of(ROOT / file, function)
    if file.startswith("tests/triton/"):
        check = importlib.import_module(file.removesuffix(".py").replace("/", ".")).check
        assert value in check.all.keys() - check.long


@pytest.mark.parametrize("source", ["nothing of it", "a b a"], ids=["gone", "twice"])
def test_a_fault_that_does_not_apply_says_so(source: str) -> None:
    with pytest.raises(ValueError, match=r"x\.py contains the text to replace \d times instead of once\. Rewrite"):
        Fault("x.py", "a", "c", "tests/test_x.py").apply_to(source)
