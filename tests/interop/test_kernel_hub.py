"""Tests that the kernel hub project follows kernel-builder's rules, and that a build of it loads with ``kernels``."""

from __future__ import annotations

import ast
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from release import hub

ROOT = Path(__file__).resolve().parents[2]
ID = "_swinkernels_cpu_0f1e2d3"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "swinkernels"
    hub.write(folder)
    return folder


def test_imports(project: Path) -> None:
    """Absolute imports name the standard library, torch or Triton; relative imports a file, a folder or ``_ops``."""
    package = project / "torch-ext" / "swinkernels"
    files = sorted(package.rglob("*.py"))
    assert len(files) > 30
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            elif isinstance(node, ast.ImportFrom):
                base = path.parents[node.level - 1].joinpath(*(node.module or "").split(".") if node.module else ())
                assert base.with_suffix(".py").exists() or base.is_dir() or base.name == "_ops", (path, node.module)
                continue
            else:
                continue
            for name in names:
                top = name.partition(".")[0]
                assert top in {*sys.stdlib_module_names, "torch", "triton"}, f"{path}: {name}"


def test_relative_imports() -> None:
    source = (
        "from swinkernels._library import a\nimport swinkernels.triton  # b\nfrom swinkernels.ops import x\nimport re\n"
    )
    assert hub.relative(source, "swinkernels.ops", True) == (
        "from .._library import a\nfrom .. import triton  # b\nfrom . import x\nimport re\n"
    )
    assert hub.relative("from swinkernels import nn\n", "swinkernels.ops.a", False) == "from .. import nn\n"


def test_a_folder_with_files_is_refused(project: Path) -> None:
    with pytest.raises(SystemExit, match="is not empty"):
        hub.write(project)


def test_build_toml(project: Path) -> None:
    """``build.toml`` lists every source, and kernel-builder's own parser accepts it."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML")
    build = tomllib.loads((project / "build.toml").read_text())
    listed = {part: build[part]["src"] if part == "torch" else build["kernel"][part]["src"] for part in ("torch",)}
    listed |= {part: section["src"] for part, section in build["kernel"].items()}
    for paths in listed.values():
        assert all((project / path).is_file() for path in paths)
        assert len({*paths}) == len(paths)
    named = {path for paths in listed.values() for path in paths}
    there = {
        str(p.relative_to(project)) for p in project.rglob("*") if p.suffix in (".cpp", ".cu", ".h", ".cuh", ".inl")
    }
    assert named == there

    rust = pytest.importorskip("kernels._rust", reason="kernels is not installed")
    assert rust.Build.open(project).general.backends == [rust.Backend.CPU, rust.Backend.CUDA]


# Stand-ins for two files that kernel-builder generates.
REGISTRATION = """\
#include <Python.h>
#define SHOWN_(name) #name
#define SHOWN(name) SHOWN_(name)
#define INIT_(name) PyInit_##name
#define INIT(name) INIT_(name)
#define REGISTER_EXTENSION(name)                                                      \\
  PyMODINIT_FUNC INIT(name)() {                                                       \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, SHOWN(name), nullptr, 0, nullptr}; \\
    return PyModule_Create(&module);                                                  \\
  }
"""
OPS = f"""\
import torch
from . import {ID}
ops = torch.ops.{ID}
def add_op_namespace_prefix(name):
    return f"{ID}::{{name}}"
"""


def build_for_the_cpu(project: Path, variant: Path) -> None:
    """Build the CPU variant of ``project`` in the folder ``variant``, as kernel-builder does."""
    import tomllib

    build = tomllib.loads((project / "build.toml").read_text())
    (project / "registration.h").write_text(REGISTRATION)
    shutil.copytree(project / "torch-ext" / "swinkernels", variant)
    (variant / "_ops.py").write_text(OPS)
    metadata = {"name": "swinkernels", "id": ID, "version": 1, "license": "MIT", "backend": {"type": "cpu"}}
    (variant / "metadata.json").write_text(json.dumps({**metadata, "python-depends": [], "digest": None}))
    home = Path(torch.__file__).parent
    includes = [project, *(project / path for path in build["torch"]["include"]), home / "include"]
    includes += [home / "include/torch/csrc/api/include", Path(sysconfig.get_paths()["include"])]
    sources = [path for path in build["torch"]["src"] + build["kernel"]["cpu"]["src"] if path.endswith(".cpp")]
    oldest = "".join(f"{int(part):02x}" for part in build["torch"]["stable-abi"]["cpu"].split("."))
    flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DCPU_KERNEL", "-DPy_LIMITED_API=0x03090000"]
    flags += [f"-DTORCH_EXTENSION_NAME={ID}", f"-DTORCH_TARGET_VERSION=0x{oldest}000000000000"]
    command = [
        "g++",
        "-shared",
        *flags,
        *(f"-I{path}" for path in includes),
        *(str(project / path) for path in sources),
    ]
    command += [f"-L{home / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(variant / f"{ID}.abi3.so")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


USE = """
import sys, torch
from pathlib import Path
from kernels import LocalLayerRepository, Mode, get_local_kernel, kernelize, replace_kernel_forward_from_hub
from kernels import use_kernel_mapping
from timm.models import swin_transformer as timm_swin

folder, variant, ID = sys.argv[1:]
hub = get_local_kernel(Path(folder), backend="cpu")
assert hub.__name__ == ID and "swinkernels" not in sys.modules
assert hub.ops._backends.NOT_INSTALLED["cpu"] is None

def results(package, backend):
    torch.manual_seed(0)
    qkv, table = torch.randn(2, 9, 10, 96, requires_grad=True), torch.randn(49, 2, requires_grad=True)
    out = package.window_attention_qkvpacked(
        qkv, table, num_heads=2, window_size=4, shift_size=2, backend=backend
    )
    return out.detach(), *torch.autograd.grad(out.square().sum(), (qkv, table))

fast = results(hub, "cpu")
torch.testing.assert_close(fast, results(hub, "reference"), rtol=1e-4, atol=1e-4)

import swinkernels  # the original package, in the same process
assert swinkernels._extension.NAMESPACE == "swinkernels" and hub.ops._library.NAMESPACE == ID
torch.testing.assert_close(fast, results(swinkernels, "reference"), rtol=1e-4, atol=1e-4)
compiled = torch.compile(lambda q, t: hub.window_attention_qkvpacked(q, t, num_heads=2, window_size=4),
                         fullgraph=True, backend="aot_eager")
q, t = torch.randn(1, 8, 8, 96), torch.randn(49, 2)
torch.testing.assert_close(
    compiled(q, t), hub.window_attention_qkvpacked(q, t, num_heads=2, window_size=4), rtol=1e-5, atol=1e-5
)

# Layers: kernelize replaces the forward of timm's modules.
calls = []
for name in ("window_attention_qkvpacked", "patch_merging"):
    def counted(*args, _op=getattr(hub.layers, name), _name=name, **kwargs):
        calls.append(_name)
        return _op(*args, **kwargs)
    setattr(hub.layers, name, counted)

def model():
    torch.manual_seed(0)
    return timm_swin.SwinTransformer(
        img_size=32, patch_size=2, num_classes=5, embed_dim=16, depths=(2, 2), num_heads=(1, 2), window_size=4
    )

def train(module):
    module.train()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    out = module(x)
    out.square().sum().backward()
    return {"": out.detach(), **{name: p.grad for name, p in module.named_parameters()}}

want = train(model())
mapping = {}
for name in ("WindowAttention", "PatchMerging"):
    replace_kernel_forward_from_hub(getattr(timm_swin, name), name)
    mapping[name] = {"cpu": LocalLayerRepository(Path(variant), layer_name=name)}
with use_kernel_mapping(mapping, inherit_mapping=False):
    got = train(kernelize(model(), device="cpu", mode=Mode.TRAINING))
assert calls.count("window_attention_qkvpacked") == 4 and calls.count("patch_merging") == 1, calls
for name, value in want.items():
    torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=lambda m: f"{name}: {m}")
"""


@pytest.mark.long
@pytest.mark.tool("Hugging Face's `kernels`", "kernels", "the ops and two layers ([the kernel hub](dev/kernel-hub.md))")
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_kernels_loads_it(project: Path, tmp_path: Path) -> None:
    pytest.importorskip("kernels", reason="kernels is not installed")
    pytest.importorskip("tomllib", reason="Python 3.10 has no TOML")
    variant = tmp_path / "build" / f"torch-stable-abi211-cpu-{platform.machine()}-linux"
    build_for_the_cpu(project, variant)
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path), str(variant), ID],
        cwd=tmp_path, env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
