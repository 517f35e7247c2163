"""Tests that every function, class and file named in docs/architecture.md exists in the place given there."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.splitlines()
    if line.startswith("|") and not line.startswith("|--")
]
NAME = r"[\w.]+"
# A table row has its function and its file in separate cells; in running text the file follows in parentheses.
NAMED = [
    (re.findall(f"`({NAME})`", cell)[0], re.findall("`(.+)`", after)[0])
    for row in ROWS
    for cell, after in itertools.pairwise(row)
    if re.fullmatch(f"`{NAME}`", cell) and re.fullmatch(r"`[\w./]+\.(py|cpp|h|cu|cuh)`", after)
] + re.findall(rf"`({NAME})` \(`([\w./]+)`\)", TEXT)
# The helpers listed in the last cell of a row may be defined anywhere in the sources.
ASKED = sorted({name for row in ROWS for name in re.findall(f"`({NAME})`", row[-1]) if "/" not in name})
PYTHON = sorted((ROOT / "swinkernels").rglob("*.py"))
CPP = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp", ".inl"))


def defined_in_python(path: Path) -> set[str]:
    """Return a module's functions, classes and constants, and the methods and fields of its classes as Class.name."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        if isinstance(node, ast.Assign):
            names.update(t.id for t in node.targets if isinstance(t, ast.Name))
        if isinstance(node, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    names.add(f"{node.name}.{inner.name}")
                if isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    names.add(f"{node.name}.{inner.target.id}")
                if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    names.add(f"{node.name}.{inner.attr}")
    return names


def is_defined(name: str, path: Path) -> bool:
    if path.suffix == ".py":
        return name in defined_in_python(path)
    code = re.sub(r"//[^\n]*", "", path.read_text())
    return re.search(rf"[\w>&*)](?<!return)\s+{name}\(|\b(?:struct|class) {name} \{{", code) is not None


def test_the_page_names_both_paths() -> None:
    assert len(NAMED) > 25
    assert ("_attend", "swinkernels/ops/window_attention.py") in NAMED
    assert ("attended", "swinkernels/adapters/libraries/timm/_blocks.py") in NAMED


@pytest.mark.parametrize(("name", "file"), NAMED)
def test_a_named_function_is_in_its_file(name: str, file: str) -> None:
    assert is_defined(name, ROOT / file)


@pytest.mark.parametrize("name", ASKED)
def test_a_function_that_a_row_asks_exists(name: str) -> None:
    assert any(is_defined(name, path) for path in [*PYTHON, *CPP])


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:swinkernels|csrc|tests|docs)/[\w./*]+)`", TEXT))))
def test_a_named_path_exists(path: str) -> None:
    if path != "swinkernels/_ops*.so":  # a build result
        assert (ROOT / path).exists()


@pytest.mark.parametrize(("name", "file"), [("_attend", "ops/_library.py"), ("gone", "window_spec.py")])
def test_the_check_sees_what_is_gone(name: str, file: str) -> None:
    assert not is_defined(name, ROOT / "swinkernels" / file)
    assert not is_defined("forward", ROOT / "csrc" / "bindings" / "layer_norm.cpp")
