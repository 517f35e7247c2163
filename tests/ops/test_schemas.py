"""Tests that the compiled library and Python define the same ops, and that one file sets their namespace."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from swinkernels import _extension
from swinkernels._namespace import NAMESPACE

ROOT = Path(__file__).resolve().parents[2]
needs_extension = pytest.mark.skipif(_extension.build is None, reason=str(_extension.error))

DUMP = f"""
import json, torch
names = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("{NAMESPACE}::")]
print(json.dumps({{name: [str(s) for s in torch._C._jit_get_schemas_for_operator(name)] for name in names}}))
"""


def schemas(script: str, **environ: str) -> dict[str, list[str]]:
    """Run ``script`` in a new process, and return the schemas of the ops that it has registered, by name."""
    command = [sys.executable, "-c", script + DUMP]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_extension
def test_both_copies_are_equal(tmp_path: Path) -> None:
    compiled = schemas(f"import torch\ntorch.ops.load_library({str(_extension.find_library())!r})")
    in_python = schemas("import swinkernels", **{_extension.OTHER_LIBRARY: str(tmp_path / "none.so")})
    assert [compiled.pop(f"{NAMESPACE}::{fact}") for fact in ("build_info", "cpu_instruction_set")] == [
        [f"{NAMESPACE}::build_info() -> str"],
        [f"{NAMESPACE}::cpu_instruction_set() -> str"],
    ]
    assert compiled == in_python
    assert len(compiled) == 28


@needs_extension
def test_python_defines_nothing_beside_the_library() -> None:
    both = schemas("import swinkernels\nfrom swinkernels.ops import _library\nassert not _library.lib._op_defs")
    assert all(len(found) == 1 for found in both.values()), both


BESIDE = """
import torch, swinkernels, twin
from twin import _extension
from twin._namespace import NAMESPACE
assert NAMESPACE == "twin"
assert (_extension.error is None) is compiled, _extension.error
names = {name.partition("::") for name in torch._C._dispatch_get_all_op_names()}
ops = {n: {op for space, _, op in names if space == n} for n in ("swinkernels", "twin")}
assert ops["twin"] - {"build_info", "cpu_instruction_set"} == ops["swinkernels"] - {"build_info", "cpu_instruction_set"}

torch.manual_seed(0)
qkv, table = torch.randn(2, 9, 10, 48, requires_grad=True), torch.randn(49, 2, requires_grad=True)
results = []
for package in (swinkernels, twin):
    out = package.window_attention_qkvpacked(qkv, table, num_heads=2, window_size=4, shift_size=2)
    results.append((out, *torch.autograd.grad(out.square().sum(), (qkv, table))))
for one, other in zip(*results):
    torch.testing.assert_close(other, one, rtol=compiled * 1e-6 or 1e-4, atol=1e-5)

with torch._subclasses.FakeTensorMode():
    op = torch.ops.twin.window_reverse_triton
    assert op(torch.empty(8, 16, 3), [8, 16], [1, 4, 4], [0, 0, 0], False).shape == (1, 8, 16, 3)
"""


@pytest.mark.parametrize("build", ["none", pytest.param("cpu", marks=[pytest.mark.long, needs_extension])])
def test_a_copy_under_another_name(build: str, tmp_path: Path) -> None:
    """A copy of the package with another name and namespace can be imported in the same process as the original."""
    package = tmp_path / "twin"
    shutil.copytree(ROOT / "swinkernels", package, ignore=shutil.ignore_patterns("*.so", "*.pyd", "__pycache__"))
    for path in package.rglob("*.py"):
        code = re.sub(r"^(\s*(?:from|import) )swinkernels\b", r"\1twin", path.read_text(), flags=re.MULTILINE)
        path.write_text(code.replace("import swinkernels.", "import twin."))
    (package / "_namespace.py").write_text('NAMESPACE = "twin"\n')
    if build == "cpu":
        shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
        setup = (ROOT / "setup.py").read_text().replace('"swinkernels', '"twin')
        (tmp_path / "setup.py").write_text(setup)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        environ = {**os.environ, "SWINKERNELS_BUILD": "cpu"}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    script = f"compiled = {build == 'cpu'}\n{BESIDE}"
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
