"""A folder to carry to a machine with a GPU: a build that any Python and torch there can load, and lacking packages.

It has the package with its built ``_ops``, tests, benchmarks and this package, at one commit, and the pure Python
packages that a machine with no more than torch and Triton lacks for them, from the environment at hand or by pip. There
``make gpu-check`` needs neither network nor compiler.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.commit import commit
from gpu import ROOT

MOST_MIB = 40
SOURCES = ("swinkernels", "tests", "benchmarks", "gpu", "csrc", "Makefile", "pyproject.toml", "LICENSE")
CARRIED = ("pytest", "hypothesis", "tabulate", "monai", "einops")
THERE = ("torch", "numpy", "typing-extensions")  # compiled for that machine's Python


def _installed(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirements(package: str) -> set[str]:
    """A package and all that it needs, by their normal names."""
    found, to_do = set(), [package]
    while to_do:
        name = re.sub(r"[-_.]+", "-", to_do.pop()).lower()
        if name in found or name in THERE or (name != package and _installed(name) is None):
            continue
        found.add(name)
        for requirement in importlib.metadata.requires(name) or ():
            needed, _, marker = requirement.partition(";")
            if not re.search("extra|python|platform", marker):
                to_do.append(re.split(r"[\s<>=!~\[(]", needed.strip(), maxsplit=1)[0])
    return found


def _carry(name: str, target: Path) -> str | None:
    """Copy an installed package, or fetch its last release in pure Python; why it cannot be carried, or None."""
    distribution = importlib.metadata.distribution(name)
    files = [f for f in distribution.files or () if ".." not in f.parts and "__pycache__" not in f.parts]
    if any(f.suffix in (".so", ".pyd") for f in files):
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-compile", "--only-binary=:all:"]
        done = subprocess.run([*pip, "--platform=any", f"--target={target}", name])
        return None if done.returncode == 0 else f"{name} is compiled for one Python, and pip found no other"
    for file in files:
        source = Path(str(distribution.locate_file(file)))
        if source.is_file():
            (target / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target / file)
    return None


def make(out: Path) -> int:
    if not list((ROOT / "swinkernels").glob("_ops*.so")):
        print("gpu bundle: the op library is not built: make gpu-bundle builds it", file=sys.stderr)
        return 1
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    skipped = shutil.ignore_patterns("__pycache__", "_C.*.so", "images", "*.png")
    for source in (ROOT / name for name in SOURCES):
        if source.is_dir():
            shutil.copytree(source, out / source.name, ignore=skipped)
        else:
            shutil.copy(source, out)
    (out / "COMMIT").write_text(f"{commit()}\n")
    for library in (out / "swinkernels").glob("_ops*.so"):
        subprocess.run(["strip", "--strip-unneeded", str(library)], check=False)
    notes = [f"{package} is not installed here" for package in CARRIED if _installed(package) is None]
    wanted = {name for package in CARRIED if _installed(package) for name in _requirements(package)}
    notes += [why for name in sorted(wanted) if (why := _carry(name, out / "carried"))]
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(f"{out}: {size:.1f} MiB, commit {commit()}" + "".join(f"\nnot carried: {note}" for note in notes))
    if size > MOST_MIB:
        advice = "build for one architecture, TORCH_CUDA_ARCH_LIST=9.0"
        print(f"gpu bundle: more than {MOST_MIB} MiB: {advice}", file=sys.stderr)
    return int(size > MOST_MIB)
