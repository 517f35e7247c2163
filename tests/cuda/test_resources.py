"""Tests that no CUDA kernel spills registers or uses local memory, and that the build stays within its budget.

The tests cover the built extension, and every source for each architecture that the compiler supports. This file is
also a command: ``python -m tests.cuda.test_resources FILE...`` prints the resources of every kernel in these object
files or libraries, and fails if a kernel uses local memory.
"""

from __future__ import annotations

import csv
import os
import re
import resource
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.commit import commit
from benchmarks.compiled import (
    ARCHITECTURES,
    ROOT,
    architectures,
    command,
    compile_one,
    compiler,
    missing,
    run,
    sources,
    tool,
)

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
# An abridged report of cuobjdump 13.1 on these kernels.
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
    """The resources of one kernel on one architecture; bytes are per thread except shared_bytes, which is per block."""

    arch: str
    kernel: str  # mangled
    registers: int
    stack_bytes: int
    shared_bytes: int
    local_bytes: int

    @property
    def uses_local_memory(self) -> bool:
        return self.stack_bytes > 0 or self.local_bytes > 0


NOT_THERE = missing("nvcc", "cuobjdump")
needs_compiler = pytest.mark.skipif(NOT_THERE is not None, reason=str(NOT_THERE))


def parse_resource_usage(report: str) -> list[KernelResources]:
    """Parse the output of ``cuobjdump --dump-resource-usage``."""
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
    """Return the resources of each kernel in an object file or library, for each architecture."""
    return parse_resource_usage(run([tool("cuobjdump"), "--dump-resource-usage", path]))


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
    if (reason := missing("cuobjdump")) is not None:
        pytest.skip(reason)
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
    if "TORCH_CUDA_ARCH_LIST" not in os.environ and not torch.cuda.is_available():  # the default architectures
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


@needs_compiler
def test_spills_are_caught(tmp_path):
    (tmp_path / "kernels.cu").write_text(_KERNEL_WITH_LOCAL_ARRAY)
    archs = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in (80, 90)]
    run([tool("nvcc"), *archs, "-c", tmp_path / "kernels.cu", "-o", tmp_path / "kernels.o"])
    kernels = resource_usage(tmp_path / "kernels.o")
    assert {k.arch for k in kernels} == {"sm_80", "sm_90"}
    assert len(kernels) == 6
    _check_offenders(kernels)


SOURCES = sources(ROOT)


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_source_spills_on_any_architecture(arch: str, source: Path) -> None:
    if arch not in architectures():
        pytest.skip(f"{compiler()} does not compile for {arch}")
    assert_no_local_memory(resource_usage(compile_one(ROOT, arch, source)))


# Group -> the sources whose kernels most bfloat16 calls run, for short and for long windows. For each architecture and
# group, build.csv has the size of the objects in MB, their compile time in CPU seconds, and the ratio of this time to
# the time for _YARDSTICK, which is compiled in the same run so that the speed and load of the machine cancel.
HOT_SOURCES = {
    "short": ("fwd_bfloat16", "bwd_bfloat16"),
    "long": ("fwd_long_bfloat16", "bwd_long_bfloat16", "fwd_axis_bfloat16", "bwd_axis_bfloat16"),
}
BUDGET_CSV = ROOT / "benchmarks" / "results" / "build.csv"
MOST_GROWTH = 1.2
_YARDSTICK = """
template <int kSteps> __device__ float mix(float x) {
  float a[16];
  #pragma unroll
  for (int i = 0; i < 16; ++i) a[i] = x * i;
  #pragma unroll
  for (int i = 0; i < kSteps; ++i) a[i % 16] = fmaf(a[(i + 5) % 16], x, __shfl_xor_sync(~0u, a[(i + 9) % 16], i % 32));
  float sum = 0.0f;
  for (int i = 0; i < 16; ++i) sum += a[i];
  return sum;
}
template <int kSteps> __global__ void yardstick(float* x) { x[threadIdx.x] = mix<kSteps>(x[threadIdx.x]); }
template __global__ void yardstick<1000>(float*);
template __global__ void yardstick<1500>(float*);
template __global__ void yardstick<2000>(float*);
template __global__ void yardstick<2500>(float*);
"""


def _cpu_seconds(arch: str, source: Path, out: Path) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(command(ROOT, arch, source, out))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure_build(arch: str, group: str, folder: Path) -> dict[str, str]:
    """Compile a group of HOT_SOURCES and the yardstick for ``arch`` in ``folder``, and return a row of build.csv."""
    (folder / "yardstick.cu").write_text(_YARDSTICK)
    seconds = size = 0.0
    unit = _cpu_seconds(arch, folder / "yardstick.cu", folder / "yardstick.o")
    for source in SOURCES:
        if source.stem in HOT_SOURCES[group]:
            seconds += _cpu_seconds(arch, source, folder / "hot.o")
            size += (folder / "hot.o").stat().st_size
    unit = (unit + _cpu_seconds(arch, folder / "yardstick.cu", folder / "yardstick.o")) / 2
    return {
        "arch": arch,
        "sources": group,
        "compiler": compiler(),
        "megabytes": f"{size / 1e6:.2f}",
        "cpu_seconds": f"{seconds:.1f}",
        "yardsticks": f"{seconds / unit:.2f}",
        "commit": commit()[:7],
    }


@needs_compiler
@pytest.mark.long
@pytest.mark.parametrize("group", HOT_SOURCES)
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_the_hot_sources_stay_within_the_budget_of_the_build(arch: str, group: str, tmp_path: Path) -> None:
    with BUDGET_CSV.open(newline="") as file:
        rows = list(csv.DictReader(file))
    allowed = {(row["arch"], row["sources"], row["compiler"]): row for row in reversed(rows)}  # the first row counts
    if (arch, group, compiler()) not in allowed:
        pytest.skip(f"{BUDGET_CSV.name} has no budget of {group} for {arch} and {compiler()}; add measure_build's row")
    budget, now = allowed[arch, group, compiler()], measure_build(arch, group, tmp_path)
    for column in ("megabytes", "yardsticks"):
        assert float(now[column]) <= MOST_GROWTH * float(budget[column]), (column, now, budget)


if __name__ == "__main__":
    everything = [k for path in sys.argv[1:] for k in resource_usage(path)]
    for k in everything:
        print(f"{k.arch}  {k.registers:3d} registers  {k.stack_bytes:4d} stack  {k.local_bytes:4d} local  {k.kernel}")
    assert_no_local_memory(everything)
