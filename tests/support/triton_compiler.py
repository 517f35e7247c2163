"""Compiles the kernels that a launch function of the Triton backend would launch, without a GPU.

The launch function runs on meta tensors with recorders in place of the kernels, so the kernels are compiled as for a
call: with the same argument types, flags, tiles, warps and stages.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import os
import re
import subprocess
import tempfile
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on"):
    pytest.skip("Triton's interpreter replaces the compiler (TRITON_INTERPRET is set)", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction, mangle_type  # noqa: E402

OLD_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # the maximum for one block
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Launch(NamedTuple):
    name: str
    function: JITFunction
    arguments: dict[str, Any]
    options: dict[str, int]


class _Recorder:
    """A stand-in for the kernel ``function`` that records the arguments of its launches."""

    def __init__(self, function: JITFunction, launches: list[Launch]):
        self.function, self.launches = function, launches

    def __getitem__(self, grid):
        assert all(0 < n < limit for n, limit in zip(grid, (2**31, 2**16, 2**16), strict=False))

        def launch(*args, **kwargs):
            options = {
                k: kwargs.pop(k) for k in ("num_warps", "num_stages", "maxnreg", "enable_fp_fusion") if k in kwargs
            }
            arguments = {**dict(zip(self.function.arg_names, args, strict=False)), **kwargs}
            self.launches.append(Launch(self.function.__name__, self.function, arguments, options))

        return launch


def kernels_of(module: ModuleType) -> dict[str, JITFunction]:
    """Return the kernels of ``module`` by name: its JIT functions whose names do not begin with an underscore."""
    return {
        name: f
        for name, f in vars(module).items()
        if isinstance(f, JITFunction) and f.__module__ == module.__name__ and not name.startswith("_")
    }


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Record the launches of the kernels of ``modules``, without running any."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            for name, function in kernels_of(module).items():
                patch.setattr(module, name, _Recorder(function, launches))
        yield launches


def _type_of(value: Any, path: tuple[int, ...], specialized: bool, constants: dict, attributes: dict) -> Any:
    """Return the type of a non-constexpr argument as Triton specialises it; update ``constants`` and ``attributes``."""
    if isinstance(value, tuple):
        types = [_type_of(v, (*path, i), True, constants, attributes) for i, v in enumerate(value)]
        return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
    if value is None:
        constants[path] = None
        return "constexpr"
    if isinstance(value, int) and specialized and value == 1:
        constants[path] = 1
        return "constexpr"
    if hasattr(value, "data_ptr") or (isinstance(value, int) and specialized and value % 16 == 0):
        attributes[path] = [["tt.divisibility", 16]]
    return mangle_type(value)


def compile_launch(launch: Launch, arch: int) -> Any:
    """Compile the kernel of ``launch`` for sm_``arch``, and return it."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
        else:
            specialized = not parameter.do_not_specialize
            signature[parameter.name] = _type_of(value, (i,), specialized, constants, attributes)
    source = ASTSource(launch.function, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def resources(launch: Launch, arch: int) -> dict[str, int]:
    """Compile the kernel of ``launch``; return its number of registers and bytes of stack, local and shared memory."""
    compiled = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", report))
    return {**{k: int(v) for k, v in found.items()}, "SHARED": compiled.metadata.shared}


def check_source(function: Callable) -> None:
    """Check that ``function`` avoids what Triton before 3.8 does not support.

    In those versions, a field of a constexpr tuple is a plain Python value, which cannot be an argument of a JIT
    function or an element of a list. A function also cannot return a conditional expression that may be None.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))

    def fields(nodes: list[ast.expr]) -> list[str]:
        return [ast.unparse(n) for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "STATIC"]

    for node in ast.walk(tree):
        if isinstance(node, ast.List):
            assert not fields(node.elts), ast.unparse(node)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert not fields([*node.args, *(k.value for k in node.keywords)]), ast.unparse(node)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.IfExp):
            assert "None" not in (ast.unparse(node.value.body), ast.unparse(node.value.orelse)), ast.unparse(node)
