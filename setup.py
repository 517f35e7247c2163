"""Compile csrc/ with ninja, using torch's extension tools.

The script builds three extensions. ``swinkernels._ops`` contains the kernels and their op bindings on torch's stable
ABI; it is loaded by torch and is not a Python module. ``swinkernels._state`` is a module on Python's stable ABI that
compares torch modules with an earlier state. ``swinkernels._C`` is a pybind11 module from which programs can read the
build information without torch. These environment variables are read:

SWINKERNELS_BUILD        auto (default): CPU kernels, and CUDA kernels if a CUDA toolkit of torch's major version is
                         found, with or without a GPU; cuda: CPU and CUDA kernels, or an error; hot: like cuda, with
                         window attention in bfloat16 only, to compare builds; cpu: CPU kernels; none: pure Python
CUDA_HOME                the toolkit, if it is neither /usr/local/cuda nor the one whose nvcc is on the PATH
TORCH_CUDA_ARCH_LIST     architectures to compile for; default: the visible GPUs', or without a GPU 8.0 and 9.0+PTX
SWINKERNELS_WHEEL=1      set by release/wheel.py: a wheel for every Python, without swinkernels._C and tagged py3-none
MAX_JOBS, CXX, NVCC_APPEND_FLAGS    as in torch's extension tools, setuptools and nvcc
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)
OLDEST_CAPABILITY = (8, 0)
DEFAULT_ARCH_LIST = "8.0;9.0+PTX"
FOR_EVERY_PYTHON = os.environ.get("SWINKERNELS_WHEEL") == "1"
# The commands that compile. All others (sdist, egg_info, ...) need neither torch nor a compiler.
COMPILING = {"build", "build_ext", "bdist_wheel", "editable_wheel", "develop", "install"}


class BuildError(Exception):
    """Raised if the requested build is impossible. The message states reason and remedy; no traceback is shown."""


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: str  # version of nvcc, such as "13.0"


@dataclass(frozen=True)
class Plan:
    compile: bool = True
    toolkit: Toolkit | None = None
    cuda_missing: str | None = None  # the reason why CUDA kernels are not built, or None
    arch_list: tuple[str, ...] = ()
    bfloat16_alone: bool = False  # compile window attention on CUDA in bfloat16 only


def _output(*command: str | Path) -> str:
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError:
        return ""
    return result.stdout


def find_toolkit(environ: Mapping[str, str]) -> Toolkit | None:
    """Return the first complete CUDA toolkit, or None.

    nvcc on the PATH may be a wrapper, so it is asked for the folder of the compiler.
    """
    candidates = [environ.get("CUDA_HOME"), environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc", path=environ.get("PATH"))
    if nvcc is not None:
        here = re.search(r"_HERE_=(.+)", _output(nvcc, "--dryrun", "-x", "cu", os.devnull))
        candidates.append(os.path.dirname(here[1].strip()) if here else None)
    for home in (Path(c) for c in candidates if c):
        if (home / "include" / "cuda_runtime.h").exists() and (home / "bin" / "nvcc").exists():
            release = re.search(r"release (\d+\.\d+)", _output(home / "bin" / "nvcc", "--version"))
            if release is not None:
                return Toolkit(home, release[1])
    return None


def why_no_cuda(toolkit: Toolkit | None, torch_version: str, torch_cuda: str | None) -> str | None:
    if torch_cuda is None:
        return f"torch {torch_version} has no CUDA: install a CUDA build of torch"
    major = torch_cuda.split(".")[0]
    if toolkit is None:
        return (
            "no CUDA toolkit was found (bin/nvcc and include/cuda_runtime.h in CUDA_HOME, CUDA_PATH, /usr/local/cuda "
            f"or around the nvcc on the PATH): install CUDA {major} and set CUDA_HOME to its folder"
        )
    if toolkit.version.split(".")[0] != major:
        return (
            f"the CUDA toolkit at {toolkit.home} is version {toolkit.version}, but torch {torch_version} is built for "
            f"CUDA {torch_cuda}: set CUDA_HOME to a CUDA {major} toolkit, or install a torch for CUDA "
            f"{toolkit.version.split('.')[0]}"
        )
    return None


def choose_architectures(environ: Mapping[str, str], visible: list[tuple[int, int]]) -> tuple[str, ...]:
    """Return the architectures in TORCH_CUDA_ARCH_LIST, or default ones, without those that are not supported.

    torch's container images set the variable to a list that includes unsupported architectures.
    """
    asked = environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if not asked or asked == "native":
        supported = [f"{major}.{minor}" for major, minor in sorted({*visible}) if (major, minor) >= OLDEST_CAPABILITY]
        return (*supported[:-1], supported[-1] + "+PTX") if supported else tuple(DEFAULT_ARCH_LIST.split(";"))

    def too_old(arch: str) -> bool:
        number = re.match(r"(\d+)\.(\d+)", arch)  # None for a name such as Ampere, which torch resolves
        return number is not None and (int(number[1]), int(number[2])) < OLDEST_CAPABILITY

    architectures = tuple(arch for arch in asked.split(";") if arch and not too_old(arch))
    if not architectures:
        raise BuildError(
            f"TORCH_CUDA_ARCH_LIST={asked} has no architecture that the CUDA kernels support: name 8.0 or newer, "
            "unset it, or set SWINKERNELS_BUILD=cpu"
        )
    return architectures


def make_plan(
    environ: Mapping[str, str], torch_version: str, torch_cuda: str | None, visible: list[tuple[int, int]]
) -> Plan:
    """Return the build plan for the environment variables, the installed torch and the visible GPUs."""
    wanted = environ.get("SWINKERNELS_BUILD", "auto")
    if wanted == "none":
        return Plan(compile=False)
    if tuple(int(n) for n in re.findall(r"\d+", torch_version)[:2]) < OLDEST_TORCH:
        raise BuildError(f"torch 2.11 or newer is needed, got {torch_version}: pip install --upgrade torch")
    if wanted == "cpu":
        remedy = "build again without that setting, or with make build CUDA=1"
        return Plan(cuda_missing=f"only CPU kernels were requested (SWINKERNELS_BUILD=cpu): {remedy}")
    toolkit = find_toolkit(environ)
    missing = why_no_cuda(toolkit, torch_version, torch_cuda)
    if missing is None:
        return Plan(toolkit=toolkit, arch_list=choose_architectures(environ, visible), bfloat16_alone=wanted == "hot")
    if wanted in ("cuda", "hot"):
        raise BuildError(f"SWINKERNELS_BUILD={wanted}, but {missing}")
    return Plan(cuda_missing=missing)


def require_tools(environ: dict[str, str]) -> None:
    """Raise BuildError if ninja or a C++ compiler is missing. If pip installed ninja, put its folder on the PATH."""
    without = "or set SWINKERNELS_BUILD=none to install the pure Python package"
    if shutil.which("ninja", path=environ.get("PATH")) is None:
        try:
            import ninja
        except ImportError:
            raise BuildError(f"ninja was not found: pip install ninja, {without}") from None
        environ["PATH"] = os.pathsep.join([ninja.BIN_DIR, environ.get("PATH", os.defpath)])
    compiler = environ.get("CXX", "c++").split()[-1]  # for example g++ if CXX is "ccache g++"
    if shutil.which(compiler, path=environ.get("PATH")) is None:
        raise BuildError(
            f"no C++ compiler was found ({compiler}): install one (apt-get install g++, dnf install gcc-c++, "
            f"xcode-select --install) or set CXX, {without}"
        )


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob(pattern))


def write_facts(plan: Plan, torch_version: str, torch_cuda: str | None, cuda_sources: list[str]) -> Path:
    """Write build_facts.h, the header with which the bindings report this build, and return its folder.

    With macros on the command line instead of a header, every source would be recompiled when a fact changes.
    """

    def constant(module: str) -> str:
        return re.findall(r'= "(.+)"', (ROOT / "swinkernels" / f"{module}.py").read_text())[0]

    facts = {
        "version": constant("_version"),
        "torch_version": torch_version,
        "torch_cuda": torch_cuda,
        "cuda": plan.toolkit is not None,
        "cuda_missing": plan.cuda_missing,
        "cuda_version": plan.toolkit.version if plan.toolkit else None,
        "arch_list": list(plan.arch_list),
        "cuda_sources": cuda_sources,
    }
    header = ROOT / "build" / "facts" / "build_facts.h"
    text = (
        f"#define SWINKERNELS_NAMESPACE {constant('_namespace')}\n"
        f'#define SWINKERNELS_BUILD_FACTS R"json({json.dumps(facts)})json"\n'
    )
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def make_extensions(plan: Plan, torch_version: str, torch_cuda: str | None) -> list[Extension]:
    import pybind11
    from torch.utils.cpp_extension import CppExtension, CUDAExtension

    cuda = sources("kernels/cuda/**/*.cu") if plan.toolkit else []
    if plan.bfloat16_alone:
        cuda = [path for path in cuda if "window_attention/instantiations" not in path or "bfloat16" in path]
    includes = [str(ROOT / "csrc"), str(write_facts(plan, torch_version, torch_cuda, cuda))]
    with_cuda = [("SWINKERNELS_WITH_CUDA", None)] if plan.toolkit else []
    if plan.bfloat16_alone:
        with_cuda += [("SWINKERNELS_BFLOAT16_ALONE", None)]
    cxx_flags = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden"]
    # torch's tools disable the operators of half and bfloat16, but the kernels use them.
    allow = [f"-U__CUDA_NO_{x}__" for x in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS")]
    nvcc_flags = ["-O3", "-std=c++17", "--threads=2", *allow, "-U__CUDA_NO_BFLOAT16_CONVERSIONS__"]
    nvcc_flags.append("-Xfatbin=-compress-all")  # compresses machine code, too: 15.6 MB instead of 41.3 MB
    ops = (CUDAExtension if plan.toolkit else CppExtension)(
        "swinkernels._ops",
        [*sources("bindings/**/*.cpp"), *sources("kernels/cpu/**/*.cpp"), *cuda],
        include_dirs=includes,
        # Use the stable ABI of the oldest supported torch: the library loads in that version and every newer one.
        define_macros=[("TORCH_TARGET_VERSION", "0x{:02x}{:02x}000000000000".format(*OLDEST_TORCH)), *with_cuda]
        + ([("USE_CUDA", None)] if plan.toolkit else []),
        extra_compile_args={"cxx": cxx_flags, "nvcc": nvcc_flags},
        # Report an undefined symbol during the build instead of at import.
        extra_link_args=["-Wl,--no-undefined"] if sys.platform == "linux" else [],
        py_limited_api=True,
    )
    state = Extension(
        "swinkernels._state",
        ["csrc/python/state.cpp"],
        extra_compile_args={"cxx": cxx_flags},
        language="c++",
        py_limited_api=True,
    )
    # A free-threaded Python has no stable ABI.
    for_every_python = [ops] if sysconfig.get_config_var("Py_GIL_DISABLED") else [ops, state]
    if FOR_EVERY_PYTHON:
        return for_every_python
    without_torch = Extension(
        "swinkernels._C",
        ["csrc/python/build_info.cpp"],
        include_dirs=[*includes, pybind11.get_include()]
        + ([str(plan.toolkit.home / "include")] if plan.toolkit else []),
        define_macros=with_cuda,
        extra_compile_args={"cxx": cxx_flags},
        language="c++",
    )
    return [*for_every_python, without_torch]


def wheel_for_every_python() -> type:
    """Return a bdist_wheel class that tags wheels py3-none-PLATFORM.

    The op library does not depend on Python, and where Python cannot import ``swinkernels._state``, the package does
    without it.
    """
    from setuptools.command.bdist_wheel import bdist_wheel

    class WheelForEveryPython(bdist_wheel):
        def get_tag(self) -> tuple[str, str, str]:
            return ("py3", "none", super().get_tag()[2])

    return WheelForEveryPython


def configure() -> dict:
    """Return the ext_modules and cmdclass of setup(), and set the environment variables that torch's tools read."""
    if os.environ.get("SWINKERNELS_BUILD", "auto") not in ("auto", "cuda", "hot", "cpu", "none"):
        got = os.environ["SWINKERNELS_BUILD"]
        raise BuildError(f"SWINKERNELS_BUILD must be auto, cuda, hot, cpu or none, got {got}")
    if os.environ.get("SWINKERNELS_BUILD") == "none":
        return {}
    try:
        import pybind11  # noqa: F401
        import torch
    except ImportError as error:
        reason = str(error).partition("\n")[0]
        raise BuildError(
            f"the extension cannot be compiled, {reason}: pip install torch pybind11 ninja, then pip install "
            "--no-build-isolation . (with build isolation pip would download a second torch), or set "
            "SWINKERNELS_BUILD=none to install the pure Python package"
        ) from None
    visible = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    plan = make_plan(os.environ, torch.__version__, torch.version.cuda, visible)
    require_tools(os.environ)
    if plan.toolkit is not None:
        os.environ["CUDA_HOME"] = str(plan.toolkit.home)  # torch's tools read it on import
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(plan.arch_list)
        print(f"swinkernels: CPU and CUDA kernels for {' '.join(plan.arch_list)}, with {plan.toolkit.home}", flush=True)
    else:
        print(f"swinkernels: only CPU kernels: {plan.cuda_missing}", flush=True)
    from torch.utils.cpp_extension import BuildExtension

    commands = {"build_ext": BuildExtension}
    if FOR_EVERY_PYTHON:
        commands["bdist_wheel"] = wheel_for_every_python()
    return {
        "ext_modules": make_extensions(plan, torch.__version__, torch.version.cuda),
        "cmdclass": commands,
    }


if __name__ == "__main__":
    try:
        if sys.version_info < (3, 10):  # noqa: UP036 (pip checks this, but the script can be run directly)
            raise BuildError(f"Python 3.10 or newer is needed, got {sys.version.split()[0]}")
        setup(license="MIT", **(configure() if COMPILING & {*sys.argv} else {}))
    except BuildError as error:
        sys.exit(f"swinkernels: {error}")
