"""Prints the test files for the changes since a commit, for ``make check``: ``python tests/changed.py --since main``.

tests/ mirrors the folders of the sources. The tests of a source file are the files in the corresponding folder whose
names contain its name or, if there are none, all files of the folder. Tests that are too slow for every change, such as
those of the emulated CUDA kernels, are left to ``make test``.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ALWAYS = ("tests/repo/test_layering.py",)  # takes a second, and checks the imports of all files
# Prefix of a source's path -> folder or prefix of its tests; the longest matching prefix applies.
FOLDERS = {
    "swinkernels": "repo",
    "swinkernels/adapters": "adapters",
    "swinkernels/integrations": "adapters",
    "swinkernels/models": "nn",
    "swinkernels/nn": "nn",
    "swinkernels/ops": "ops",
    "swinkernels/reference": "reference",
    "swinkernels/triton": "triton",
    "benchmarks": "benchmarks",
    "csrc/bindings": "cpu",
    "csrc/kernels/cpu": "cpu",
    "csrc/kernels/cpu/position_bias.cpp": "ops/test_position_bias",
    "csrc/kernels/cpu/position_bias.inl": "ops/test_position_bias",
    "csrc/kernels/common": "cuda",
    "csrc/kernels/cuda": "cuda",
    "docs": "repo/test_docs",
    "examples": "repo/test_examples",
    "CONTRIBUTING.md": "repo/test_docs",
    "Makefile": "repo/test_make",
    "README.md": "repo/test_docs",
    "constraints.txt": "repo/test_make",
    "mkdocs.yml": "repo/test_docs",
    "pyproject.toml": "repo/test_build",
    "release": "repo/test_wheel",
    "release/hub.py": "interop/test_kernel_hub",
    "release/kernel_hub": "interop/test_kernel_hub",
    "setup.py": "repo/test_build",
    "swinkernels/_extension.py": "repo/test_info",
    "swinkernels/demo": "repo/test_demo",
    "swinkernels/testing.py": "ops",
}


def changed_files(since: str) -> list[str]:
    """List the files that differ from the merge base with ``since``, including uncommitted and untracked files."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"git {' '.join(arguments)}: {done.stderr.strip()}. Name another commit: make check BASE=..."
            )
        return done.stdout

    start = git("merge-base", since, "HEAD").strip()
    found = git("diff", "--name-only", start) + git("ls-files", "--others", "--exclude-standard")
    return sorted(set(found.splitlines()))


def tests_of(source: str, tests: Iterable[str]) -> list[str]:
    """List the files of ``tests`` that belong to the file ``source``."""
    path = Path(source)
    if path.parts[0] == "tests":
        if path.name.startswith("test_"):
            return [test for test in tests if test == source]
        module = ".".join(path.with_suffix("").parts)
        return [test for test in tests if module in (ROOT / test).read_text() and path.name != "__init__.py"]
    root = next((name for name in (source, *map(str, path.parents)) if name in FOLDERS), None)
    if root is None:
        return []
    of_folder = [test for test in tests if test.startswith(f"tests/{FOLDERS[root]}")]
    # For adapters/libraries/timm/swin.py: tests with timm_swin in their names, else swin, else timm.
    words = [part.strip("_") for part in source[len(root) :].rpartition(".")[0].split("/") if part.strip("_")]
    for name in ("_".join(words[-2:]), *words[::-1]):
        if named := [test for test in of_folder if name in Path(test).stem]:
            return named
    return of_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="main", help="a commit")
    tests = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py"))
    files = changed_files(parser.parse_args().since)
    print(*dict.fromkeys((*ALWAYS, *(test for file in files for test in tests_of(file, tests)))))


if __name__ == "__main__":
    main()
