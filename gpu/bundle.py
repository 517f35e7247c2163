"""Makes a folder for a machine with a GPU: a build that loads under several versions of Python and torch, and packages.

The folder contains ``swinkernels`` with its compiled ``_ops``, the tests, the benchmarks and ``gpu``, all at one
commit, and the pure Python packages that these need in addition to torch and Triton, fetched by pip. In this folder,
``make gpu-check`` needs neither a network nor a compiler.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.commit import commit
from gpu import ROOT

MOST_MIB = 40
SOURCES = ("swinkernels", "tests", "benchmarks", "gpu", "csrc", "Makefile", "pyproject.toml", "LICENSE")
# Pure Python packages. pytest needs those in the second line only under Python 3.10.
CARRIED = ("pytest", "hypothesis", "tabulate", "einops",
           "exceptiongroup", "tomli")  # fmt: skip
CARRIED_ALONE = ("monai",)  # installed without their dependencies, torch and numpy
PIP = ("install", "--quiet", "--no-compile", "--only-binary=:all:", "--platform=any", "--python-version=3.10")


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
    notes = []
    for packages, options in ((CARRIED, ()), (CARRIED_ALONE, ("--no-deps",))):
        pip = [sys.executable, "-m", "pip", *PIP, *options, f"--target={out / 'carried'}", *packages]
        if subprocess.run(pip).returncode != 0:
            notes.append(f"{', '.join(packages)}: pip found no pure Python release, or no package index")
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 2**20
    print(f"{out}: {size:.1f} MiB, commit {commit()}" + "".join(f"\nnot carried: {note}" for note in notes))
    if size > MOST_MIB:
        advice = "build for one architecture, TORCH_CUDA_ARCH_LIST=9.0"
        print(f"gpu bundle: more than {MOST_MIB} MiB: {advice}", file=sys.stderr)
    return int(size > MOST_MIB)
