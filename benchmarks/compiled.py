"""Find the object files of CUDA sources in the last build, or compile the sources if the build is out of date."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")


class Missing(Exception):
    """A required program or the CUDA sources are missing; the message names what is missing and the remedy."""


def tool(name: str) -> str:
    """Return the path of a program of the CUDA toolkit, or of the copy in the triton package."""
    folders = [os.path.join(home, "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(str(Path(triton.origin).parent / "backends" / "nvidia" / "bin"))
    for folder in (*folders, None):
        found = shutil.which(name, path=folder)
        if found is not None:
            return found
    raise Missing(f"no {name} in $CUDA_HOME/bin, PATH or the triton package: install a CUDA toolkit")


def missing(*names: str) -> str | None:
    """Return an error message that names the first missing program of ``names``, or None if none is missing."""
    try:
        for name in names:
            tool(name)
    except Missing as error:
        return str(error)
    return None


def run(command: Sequence[str | Path], cwd: str | None = None) -> str:
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True, cwd=cwd)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stderr[-4000:]}")
    return done.stdout


@functools.cache
def compiler() -> str:
    """Return the name and version of the CUDA compiler, such as "nvcc 13.0.88"."""
    version = re.search(r"V(\d+\.\d+\.\d+)", run([tool("nvcc"), "--version"]))
    return f"nvcc {version[1]}" if version else "nvcc"


@functools.cache
def architectures() -> tuple[str, ...]:
    """Return the members of ARCHITECTURES that the compiler supports."""
    known = run([tool("nvcc"), "--list-gpu-arch"]).split()
    return tuple(arch for arch in ARCHITECTURES if arch.replace("sm_", "compute_") in known)


def sources(root: Path, pattern: str = "**/*.cu") -> list[Path]:
    """List the CUDA sources of a checkout."""
    found = sorted((root / "csrc" / "kernels" / "cuda").glob(pattern))
    if not found:
        raise Missing(f"no {pattern} in {root / 'csrc/kernels/cuda'}: pass the folder of a checkout of this project")
    return found


def command(root: Path, arch: str, source: Path, out: Path) -> list[str]:
    """Return the nvcc command that compiles one file: a CUDA source for ``arch``, or C++ for the host."""
    includes = [f"-I{root / 'csrc'}", "-c", str(source), "-o", str(out)]
    if source.suffix != ".cu":
        return [tool("nvcc"), "-std=c++17", "-O1", "-Xcompiler", "-fPIC", *includes]
    code = f"-gencode=arch=compute_{arch[3:]},code={arch}"
    return [tool("nvcc"), "-O3", "-std=c++17", "-Xcompiler", "-fPIC", code, *includes]


def machine_code(path: Path, arch: str) -> list[bytes]:
    """Return the ELF files for ``arch`` in an object file or library."""
    with tempfile.TemporaryDirectory() as scratch:
        run([tool("cuobjdump"), "-arch", arch, "-xelf", "all", path.resolve()], cwd=scratch)
        return [elf.read_bytes() for elf in sorted(Path(scratch).iterdir())]


def _built(root: Path, arch: str, source: Path, headers: Sequence[Path]) -> Path | None:
    """Return the object file of ``make build`` if it is newer than its sources, and has this compiler's code."""
    if not source.is_relative_to(root):
        return None
    newest = max(path.stat().st_mtime for path in (*headers, source))
    version = compiler().replace("nvcc ", "V").encode()
    for path in (root / "build").glob(f"temp.*/{source.relative_to(root).with_suffix('.o')}"):
        if path.stat().st_mtime > newest and any(version in elf for elf in machine_code(path, arch)):
            return path
    return None


def compile_one(root: Path, arch: str, source: Path) -> Path:
    """Return the path of a source's object file, from the build, the cache or the compiler.

    An object of the build may also contain code for other architectures.
    """
    headers = sorted((root / "csrc").rglob("*.*h"))
    if built := _built(root, arch, source, headers):
        return built
    cache = Path(tempfile.gettempdir()) / f"swinkernels-compiled-{os.getuid()}"
    cache.mkdir(mode=0o700, exist_ok=True)
    key = hashlib.sha256(repr((compiler(), arch, command(Path(), arch, Path(source.name), Path()))).encode())
    for path in (*headers, source):
        name = path.relative_to(root) if path.is_relative_to(root) else path.name
        key.update(str(name).encode() + b"\0" + path.read_bytes())
    out = cache / f"{source.stem}-{key.hexdigest()[:24]}.o"
    if not out.exists():
        part = out.with_suffix(f".{os.getpid()}.part.o")
        run(command(root, arch, source, part))
        part.replace(out)
    return out
