"""No CUDA kernel of the built extension spills registers or keeps an array in local memory.

Also a command: ``python tests/cuda/test_resources.py object_or_library...`` prints what every kernel in it takes and
fails if one uses the stack.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

_KERNEL_WITH_LOCAL_ARRAY = """
__global__ void local_array(float* x, const int* n) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i];
  for (int i = 0; i < 64; ++i) a[n[i] % 64] += x[n[i]];
  for (int i = 0; i < 64; ++i) x[i] = a[i];
}
__global__ void __launch_bounds__(1024, 2) spilling(float* x) {
  float a[64];
  for (int i = 0; i < 64; ++i) a[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = a[i] * a[(i * 7 + 3) % 64];
}
__global__ void plain(float* x) { x[threadIdx.x] = 1.0f; }
"""
# What cuobjdump 13.1 prints for it.
_REPORT = """
Fatbin elf code:
================
arch = sm_80
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5plainPf:
  REG:8 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z8spillingPf:
  REG:32 STACK:288 SHARED:0 LOCAL:0 CONSTANT[0]:360 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _Z11local_arrayPfPKi:
  REG:40 STACK:256 SHARED:0 LOCAL:0 CONSTANT[0]:368 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin elf code:
================
arch = sm_90
code version = [1,8]
host = linux
compile_size = 64bit

Resource usage:
 Common:
  GLOBAL:0
 Function _Z5plainPf:
  REG:8 STACK:0 SHARED:16 LOCAL:0 CONSTANT[0]:536 TEXTURE:0 SURFACE:0 SAMPLER:0

Fatbin ptx code:
================
arch = sm_90
code version = [9,0]
"""


class KernelResources(NamedTuple):
    """What one kernel takes on one architecture; bytes are per thread but for shared_bytes, which is per block."""

    arch: str
    kernel: str  # mangled
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


def find_cuobjdump() -> str | None:
    """From $CUDA_HOME, PATH, the usual place of the toolkit, or the copy that Triton brings."""
    folders = [Path(home) / "bin" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        folders.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = (shutil.which("cuobjdump", path=str(folder)) for folder in folders)
    return next((path for path in (*found, shutil.which("cuobjdump")) if path is not None), None)


def parse_resource_usage(report: str) -> list[KernelResources]:
    """The kernels in the output of ``cuobjdump --dump-resource-usage``."""
    kernels, arch, kernel = [], None, None
    for line in report.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            arch = match[1]
        elif match := re.match(r"Function (\S+):", line.strip()):
            kernel = match[1]
        elif (usage := dict(re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", line))) and "REG" in usage:
            assert arch is not None and kernel is not None, f"unexpected report: {line}"
            numbers = (int(usage[name]) for name in ("REG", "STACK", "SHARED", "LOCAL"))
            kernels.append(KernelResources(arch, kernel, *numbers))
            kernel = None
    return kernels


def resource_usage(path: str | Path) -> list[KernelResources]:
    """What the kernels in an object file or library take, per architecture."""
    cuobjdump = find_cuobjdump()
    assert cuobjdump is not None, "no cuobjdump in $CUDA_HOME/bin, PATH or the triton package"
    command = [cuobjdump, "--dump-resource-usage", str(path)]
    return parse_resource_usage(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def assert_no_local_memory(kernels: list[KernelResources]) -> None:
    offenders = [k for k in kernels if k.uses_local_memory]
    assert not offenders, "spills or local arrays in\n" + "\n".join(map(str, offenders))


@pytest.fixture(scope="module")
def built() -> list[KernelResources]:
    from swinkernels import _extension

    if _extension.build is None:
        pytest.skip(_extension.error)
    if not _extension.build["cuda"]:
        pytest.skip(f"built without CUDA: {_extension.build['cuda_missing']}")
    if find_cuobjdump() is None:
        pytest.skip("no cuobjdump in $CUDA_HOME/bin, PATH or the triton package")
    (library,) = Path(_extension.__file__).parent.glob("_ops*.so")
    return resource_usage(library)


def test_built_kernels_use_no_local_memory(built):
    assert len(built) > 0
    assert_no_local_memory(built)


def test_every_kernel_is_built_for_every_architecture(built):
    import torch

    from swinkernels import _extension

    kernels = defaultdict(set)
    for k in built:
        kernels[k.arch].add(k.kernel)
    assert len(set(map(frozenset, kernels.values()))) == 1, {arch: len(names) for arch, names in kernels.items()}
    listed = (re.fullmatch(r"(\d+)\.(\d+[af]?)(\+PTX)?", a) for a in _extension.build["arch_list"])
    assert kernels.keys() >= {f"sm_{m[1]}{m[2]}" for m in listed if m}
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():  # the default
        assert kernels.keys() >= {"sm_80", "sm_90"}


def _check_offenders(kernels: list[KernelResources]) -> None:
    assert {k.kernel for k in kernels if k.uses_local_memory} == {"_Z8spillingPf", "_Z11local_arrayPfPKi"}
    with pytest.raises(AssertionError, match="_Z8spillingPf"):
        assert_no_local_memory(kernels)
    assert_no_local_memory([k for k in kernels if k.kernel == "_Z5plainPf"])


def test_report_is_understood():
    kernels = parse_resource_usage(_REPORT)
    assert len(kernels) == 4
    assert kernels[1] == KernelResources("sm_80", "_Z8spillingPf", 32, 288, 0, 0)
    assert kernels[3] == KernelResources("sm_90", "_Z5plainPf", 8, 0, 16, 0)
    _check_offenders(kernels)


def test_spills_are_caught(tmp_path):
    nvcc = shutil.which("nvcc", path=os.pathsep.join(["/usr/local/cuda/bin", os.environ.get("PATH", "")]))
    if nvcc is None or find_cuobjdump() is None:
        pytest.skip("no nvcc or no cuobjdump")
    (tmp_path / "kernels.cu").write_text(_KERNEL_WITH_LOCAL_ARRAY)
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    command = [nvcc, *archs, "-c", str(tmp_path / "kernels.cu"), "-o", str(tmp_path / "kernels.o")]
    subprocess.run(command, check=True, capture_output=True)
    kernels = resource_usage(tmp_path / "kernels.o")
    assert {k.arch for k in kernels} == {"sm_80", "sm_90"}
    assert len(kernels) == 6
    _check_offenders(kernels)


if __name__ == "__main__":
    everything = [k for path in sys.argv[1:] for k in resource_usage(path)]
    for k in everything:
        print(f"{k.arch}  {k.registers:3d} registers  {k.stack_bytes:4d} stack  {k.local_bytes:4d} local  {k.kernel}")
    assert_no_local_memory(everything)
