"""Tests that dependencies only point down: a file's folder determines which imports and includes are allowed."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE, CSRC = ROOT / "swinkernels", ROOT / "csrc"

# The layer of each part of the package. A part may import itself and lower layers; unlisted parts are on top.
LAYERS = {
    "_version": 0, "_namespace": 0, "_at_import": 0, "_C": 0, "_state": 0, "window_spec": 0, "_extension": 1,
    "reference": 1, "triton": 1, "ops": 2, "nn": 3, "adapters": 4, "integrations": 5,
}  # fmt: skip
TOP = 6

TORCH_HEADER = re.compile(r'^\s*#\s*include\s*[<"](torch|ATen|c10|pybind11|Python\.h)', re.MULTILINE)
TORCH_NAME = re.compile(r"\b(torch|at|c10|pybind11)::|\bTORCH_\w+|\bPy_\w+")
QUOTED_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)


def parts_imported(source: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """Return the parts of swinkernels that ``source`` imports, also inside functions; "" is the top-level package."""
    found = set()

    def add(name: str) -> None:
        if name == "swinkernels" or name.startswith("swinkernels."):
            found.add(name.split(".")[1] if "." in name else "")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                add(alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: None if is_package else -1]
                parents = parents[: len(parents) - (node.level - 1)]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                add(name if name in modules else base)
        elif (
            isinstance(node, ast.Call)
            and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__")
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            add(str(node.args[0].value))
    return found


def wrong_imports(package: Path) -> list[str]:
    """List the imports that point upwards or sideways in ``package``, which has the layout of swinkernels."""
    files = sorted(package.rglob("*.py"))
    names = {}
    for path in files:
        parts = ["swinkernels", *path.relative_to(package).with_suffix("").parts]
        names[path] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    modules = set(names.values()) | {"swinkernels._C", "swinkernels._state"}
    wrong = []
    for path, name in names.items():
        own = name.split(".")[1] if "." in name else ""
        for part in parts_imported(path.read_text(), name, path.name == "__init__.py", modules):
            if part != own and own in LAYERS and LAYERS[own] <= LAYERS.get(part, TOP):
                wrong.append(f"{path.relative_to(package)} imports swinkernels{'.' * bool(part)}{part}")
    return wrong


def without_comments(source: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", source, flags=re.DOTALL)


def sources(*folders: str) -> list[Path]:
    kinds = {".h", ".cuh", ".cu", ".cpp", ".inl", ".inc"}
    return sorted(p for f in folders for p in (CSRC / f).rglob("*") if p.suffix in kinds)


def test_imports_point_down():
    assert len(list(PACKAGE.rglob("*.py"))) > 10
    assert wrong_imports(PACKAGE) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("reference/a.py", "from swinkernels.ops import b"),
        ("reference/a.py", "from swinkernels import _extension"),
        ("reference/a.py", "from ..ops import b"),
        ("reference/a.py", "from .. import ops"),
        ("reference/a.py", "import swinkernels"),
        ("reference/a.py", "import swinkernels.triton as t"),
        ("triton/a.py", "from swinkernels.reference import b"),
        ("triton/a.py", "def f():\n    from swinkernels.ops import b"),
        ("ops/a.py", "from swinkernels.nn import b"),
        ("ops/a.py", "from swinkernels import __version__"),
        ("ops/a.py", "from swinkernels.testing import b"),
        ("ops/a.py", "import importlib\nimportlib.import_module('swinkernels.nn')"),
        ("ops/__init__.py", "from ..nn import b"),
        ("nn/a.py", "from swinkernels.adapters import b"),
        ("adapters/a.py", "from swinkernels.integrations import b"),
        ("_extension.py", "from swinkernels.ops import b"),
    ],
)
def test_the_check_sees(tmp_path, path, line):
    """wrong_imports reports ``line`` in an otherwise valid package."""
    for part in ("reference", "triton", "ops", "nn", "adapters", "integrations"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "__init__.py").write_text("import math\n")
        (tmp_path / part / "b.py").write_text("")
    (tmp_path / "__init__.py").write_text("from swinkernels import reference\nfrom swinkernels.ops import b\n")
    (tmp_path / "_extension.py").write_text("import importlib\nimportlib.import_module('swinkernels._C')\n")
    allowed = "from ..ops.b import x\nfrom . import b\nfrom swinkernels.nn import b\n"
    (tmp_path / "integrations" / "c.py").write_text(allowed)
    assert wrong_imports(tmp_path) == []
    (tmp_path / path).write_text(line)
    assert len(wrong_imports(tmp_path)) == 1


def test_reference_needs_torch_alone():
    files = sorted((PACKAGE / "reference").glob("*.py"))
    assert len(files) > 5
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}: relative import"
                names = [node.module]
            for name in names:
                root = name.split(".")[0]
                assert root == "torch" or root in sys.stdlib_module_names or name.startswith("swinkernels.reference"), (
                    f"{path.name} imports {name}"
                )


def test_kernels_and_params_know_nothing_of_torch():
    files = sources("kernels", "params")
    assert len(files) > 3
    for path in files:
        text = without_comments(path.read_text())
        for pattern in (TORCH_HEADER, TORCH_NAME):
            found = pattern.search(text)
            assert found is None, f"{path.relative_to(ROOT)}: {found.group().strip()!r}"


def test_only_bindings_include_torch():
    """Under csrc, the bindings include torch's headers and the Python modules Python's, and nothing else does."""
    with_torch = {p.relative_to(CSRC).parts[0] for p in sources(".") if TORCH_HEADER.search(p.read_text())}
    assert with_torch == {"bindings", "python"}


@pytest.mark.parametrize(("folder", "allowed"), [("params", ("params",)), ("kernels", ("params", "kernels"))])
def test_includes_point_down(folder, allowed):
    """Every quoted include in params or kernels names a file in an allowed folder."""
    for path in sources(folder):
        for name in QUOTED_INCLUDE.findall(without_comments(path.read_text())):
            candidates = [p for p in (path.parent / name, CSRC / name, CSRC / "kernels" / name) if p.exists()]
            assert candidates, f"{path.relative_to(ROOT)} includes {name}, which is not in csrc"
            part = candidates[0].resolve().relative_to(CSRC).parts[0]
            assert part in allowed, f"{path.relative_to(ROOT)} includes {name} of csrc/{part}"
