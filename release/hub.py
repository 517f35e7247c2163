"""Write a kernel-builder project for Hugging Face's kernel hub: ``python -m release.hub FOLDER``.

    FOLDER/build.toml, flake.nix    the build: sources and options for the CPU and for CUDA, on torch's stable ABI
    FOLDER/csrc                     the kernels, unchanged
    FOLDER/torch-ext                the bindings and the package: the ops, their reference and stateless layers

The package is a copy of swinkernels without ``accelerate``, modules and models. All imports are relative, and the files
that depend on the build come from ``release/kernel_hub``. Several versions of a kernel may be loaded in one process,
because each build has its own module name and op namespace.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB = ROOT / "release" / "kernel_hub"
PACKAGE = ROOT / "swinkernels"
SHIPPED = ("_at_import.py", "window_spec.py", "ops", "reference", "triton")
OLDEST_TORCH = "2.11"
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")
# The same flags as in setup.py: they enable operators that the kernels use and torch's tools disable.
CUDA_FLAGS = [f"-U__CUDA_NO_{x}__" for x in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
CUDA_FLAGS += ["-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]

# kernel-builder defines CUDA_KERNEL in CUDA builds, and TORCH_EXTENSION_NAME as the namespace of the ops.
BINDING = """\
#ifdef CUDA_KERNEL
#define SWINKERNELS_WITH_CUDA
#ifndef USE_CUDA  // torch's headers declare the functions for CUDA under it
#define USE_CUDA
#endif
#endif
"""
MODULE = """\
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
"""
FACTS = """\
#define SWINKERNELS_NAMESPACE TORCH_EXTENSION_NAME
#ifdef CUDA_KERNEL
#define SWINKERNELS_BUILD_FACTS R"json({cuda})json"
#else
#define SWINKERNELS_BUILD_FACTS R"json({cpu})json"
#endif
"""


def relative(source: str, module: str, is_package: bool) -> str:
    """Return ``source``, the code of ``module``, with its imports from swinkernels rewritten as relative imports."""
    parents = module.split(".") if is_package else module.split(".")[:-1]
    lines = source.splitlines(keepends=True)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in (n for n in names if n == "swinkernels" or n.startswith("swinkernels.")):
            line, path = lines[node.lineno - 1], name.split(".")
            shared = next((i for i, (a, b) in enumerate(zip(parents, path, strict=False)) if a != b), None)
            shared = min(len(parents), len(path)) if shared is None else shared
            dots = "." * (len(parents) - shared + 1)
            if isinstance(node, ast.ImportFrom):
                new = line.replace(f"from {name} import", f"from {dots}{'.'.join(path[shared:])} import")
            else:  # a bare `import swinkernels.a.b`, which only loads the module
                shared = min(shared, len(path) - 1)
                dots = "." * (len(parents) - shared + 1)
                new = line.replace(f"import {name}", f"from {dots}{'.'.join(path[shared:-1])} import {path[-1]}")
            assert new != line, f"{module}, line {node.lineno}: {line.strip()}"
            lines[node.lineno - 1] = new
    return "".join(lines)


def write_package(folder: Path) -> None:
    """Write the Python package to ``folder``."""
    for part in SHIPPED:
        for path in sorted((PACKAGE / part).rglob("*.py")) if (PACKAGE / part).is_dir() else [PACKAGE / part]:
            below = path.relative_to(PACKAGE)
            names = ["swinkernels", *below.with_suffix("").parts]
            is_package = names[-1] == "__init__"
            target = folder / below
            target.parent.mkdir(parents=True, exist_ok=True)
            module = ".".join(names[:-1] if is_package else names)
            target.write_text(relative(path.read_text(), module, is_package))
    for path in HUB.glob("*.py"):
        shutil.copy(path, folder)


def facts(cuda: bool) -> str:
    """Return, as JSON, those facts of setup.py's write_facts that are known before kernel-builder runs."""
    version = re.findall(r'"(.+)"', (PACKAGE / "_version.py").read_text())[0]
    return json.dumps(
        {
            "version": version,
            "torch_version": OLDEST_TORCH,
            "cuda": cuda,
            "cuda_missing": None if cuda else "this is the kernel's CPU build",
            "arch_list": [*ARCHITECTURES[:-1], f"{ARCHITECTURES[-1]}+PTX"] if cuda else [],
        }
    )


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def build_toml(bindings: list[str]) -> str:
    """Return the text of build.toml. The sources include headers, because kernel-builder copies only listed files."""
    headers = [path for pattern in ("**/*.h", "**/*.cuh", "**/*.inl") for path in sources(pattern)]
    cpu = sources("kernels/cpu/**/*.cpp")

    def listed(paths: list[str]) -> str:
        return "[\n" + "".join(f'  "{path}",\n' for path in paths) + "]"

    torch = [
        "torch-ext/torch_binding.cpp",
        "torch-ext/build_facts.h",
        *(f"torch-ext/{name}" for name in bindings),
        *headers,
    ]
    return f"""\
[general]
name = "swinkernels"
version = 1
edition = 5
license = "MIT"
backends = ["cpu", "cuda"]

[torch]
include = ["csrc", "csrc/bindings", "torch-ext"]
src = {listed(torch)}

[torch.stable-abi]
cpu = "{OLDEST_TORCH}"
cuda = "{OLDEST_TORCH}"

[kernel.cpu]
backend = "cpu"
depends = ["torch"]
include = ["csrc"]
src = {listed([*cpu, *headers])}

[kernel.cuda]
backend = "cuda"
depends = ["torch"]
cuda-capabilities = {json.dumps([*ARCHITECTURES])}
cuda-flags = {json.dumps(CUDA_FLAGS)}
include = ["csrc"]
src = {listed([*cpu, *sources("kernels/cuda/**/*.cu"), *headers])}
"""


def write(folder: Path) -> None:
    """Write the project to ``folder``, which must be new or empty."""
    if folder.exists() and any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty: name another folder, or remove it")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=shutil.ignore_patterns("python"))
    write_package(folder / "torch-ext" / "swinkernels")
    bindings = []
    for path in sorted((folder / "csrc" / "bindings").glob("*.cpp")):
        (folder / "torch-ext" / path.name).write_text(BINDING + path.read_text())
        bindings.append(path.name)
        path.unlink()
    (folder / "torch-ext" / "torch_binding.cpp").write_text(MODULE)
    (folder / "torch-ext" / "build_facts.h").write_text(FACTS.format(cuda=facts(True), cpu=facts(False)))
    (folder / "build.toml").write_text(build_toml(bindings))
    shutil.copy(HUB / "flake.nix", folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write(parser.parse_args().folder)


if __name__ == "__main__":
    main()
