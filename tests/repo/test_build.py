"""Tests that setup.py chooses what to build, reports errors, and packs a complete source archive."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
TORCH, CUDA = "2.14.1+cu130", "13.0"
EMPTY_PATH = {"PATH": "/nonexistent"}


@pytest.fixture(scope="module")
def build() -> ModuleType:
    """Return setup.py, imported as a module without building anything."""
    spec = importlib.util.spec_from_file_location("swinkernels_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def make_toolkit(home: Path, release: str) -> Path:
    """Create a fake CUDA toolkit in ``home`` with an nvcc that prints ``release``, and return ``home``."""
    (home / "include").mkdir(parents=True)
    (home / "include" / "cuda_runtime.h").touch()
    (home / "bin").mkdir()
    nvcc = home / "bin" / "nvcc"
    nvcc.write_text(f'#!/bin/sh\necho "Cuda compilation tools, release {release}, V{release}.1"\n')
    nvcc.chmod(0o755)
    return home


def assert_one_sentence(text: str) -> None:
    assert "\n" not in text.strip()
    assert "Traceback" not in text
    assert ": " in text  # the colon separates the problem from the remedy


# The choice of the CUDA toolkit


def test_toolkit_of_cuda_home_comes_first(build: ModuleType, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "a", "13.1")
    other = make_toolkit(tmp_path / "b", "12.4")
    assert build.find_toolkit({"CUDA_HOME": str(home), "CUDA_PATH": str(other)}) == build.Toolkit(home, "13.1")
    assert build.find_toolkit({"CUDA_PATH": str(other)}).home == other


def test_incomplete_toolkit_is_passed_over(build: ModuleType, tmp_path: Path) -> None:
    without_header = make_toolkit(tmp_path / "a", "13.1")
    (without_header / "include" / "cuda_runtime.h").unlink()
    whole = make_toolkit(tmp_path / "b", "13.0")
    assert build.find_toolkit({"CUDA_HOME": str(without_header), "CUDA_PATH": str(whole)}).home == whole


def test_wrapper_on_the_path_leads_to_the_real_toolkit(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = make_toolkit(tmp_path / "real", "13.0")
    wrapper = tmp_path / "bin" / "nvcc"
    wrapper.parent.mkdir()
    wrapper.write_text(f"#!/bin/sh\necho '#$ _NVVM_BRANCH_=nvvm'\necho '#$ _HERE_={home}/bin'\n")
    wrapper.chmod(0o755)
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda self: "/usr/local/cuda" not in str(self) and exists(self))
    assert build.find_toolkit({"PATH": str(wrapper.parent)}) == build.Toolkit(home, "13.0")
    assert build.find_toolkit(EMPTY_PATH) is None


# The plan


def test_matching_toolkit_builds_cuda_without_a_gpu(build: ModuleType, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda", "13.2")
    plan = build.make_plan({"CUDA_HOME": str(home)}, TORCH, CUDA, [])
    assert plan == build.Plan(True, build.Toolkit(home, "13.2"), None, ("8.0", "9.0+PTX"))


def test_a_build_to_compare_with_has_one_dtype_of_attention(build: ModuleType, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda", "13.0")
    whole, hot = (
        build.make_plan({"CUDA_HOME": str(home), "SWINKERNELS_BUILD": wanted}, TORCH, CUDA, [])
        for wanted in ("cuda", "hot")
    )
    assert (whole.bfloat16_alone, hot.bfloat16_alone) == (False, True)
    assert hot.toolkit == whole.toolkit


def test_none_needs_no_torch_and_builds_nothing(build: ModuleType) -> None:
    assert not build.make_plan({"SWINKERNELS_BUILD": "none"}, "1.0", None, []).compile


def test_cpu_leaves_cuda_out_and_says_so(build: ModuleType, tmp_path: Path) -> None:
    home = make_toolkit(tmp_path / "cuda", "13.0")
    plan = build.make_plan({"SWINKERNELS_BUILD": "cpu", "CUDA_HOME": str(home)}, TORCH, CUDA, [(9, 0)])
    assert plan.compile
    assert plan.toolkit is None
    assert "SWINKERNELS_BUILD=cpu" in plan.cuda_missing


@pytest.mark.parametrize(
    ("release", "torch_cuda", "expected"),
    [
        ("12.4", "13.0", "is version 12.4, but torch 2.14.1+cu130 is built for CUDA 13.0"),
        ("13.0", None, "has no CUDA: install a CUDA build of torch"),
        (None, "13.0", "no CUDA toolkit was found"),
    ],
    ids=["mismatch", "cpu-torch", "no-toolkit"],
)
def test_impossible_cuda(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str | None, torch_cuda, expected: str
) -> None:
    environ = dict(EMPTY_PATH)
    if release is None:
        monkeypatch.setattr(build, "find_toolkit", lambda environ: None)
    else:
        environ["CUDA_HOME"] = str(make_toolkit(tmp_path / "cuda", release))
    plan = build.make_plan(environ, TORCH, torch_cuda, [])
    assert plan.toolkit is None  # "auto" builds the CPU kernels alone, and the plan states the reason
    assert expected in plan.cuda_missing
    assert_one_sentence(plan.cuda_missing)
    with pytest.raises(build.BuildError, match=r"^SWINKERNELS_BUILD=cuda, but ") as error:
        build.make_plan({**environ, "SWINKERNELS_BUILD": "cuda"}, TORCH, torch_cuda, [])
    assert expected in str(error.value)
    assert_one_sentence(str(error.value))


def test_old_torch_is_refused(build: ModuleType) -> None:
    with pytest.raises(build.BuildError, match=r"torch 2\.11 or newer is needed, got 2\.10\.0"):
        build.make_plan({"SWINKERNELS_BUILD": "cpu"}, "2.10.0", None, [])
    for version in ("2.11.0", "2.14.1+cu130", "2.15.0a0+git1234", "3.0.0"):
        build.make_plan({"SWINKERNELS_BUILD": "cpu"}, version, None, [])


@pytest.mark.parametrize(
    ("asked", "visible", "expected"),
    [
        ("", [], ("8.0", "9.0+PTX")),
        ("", [(9, 0), (8, 0), (9, 0)], ("8.0", "9.0+PTX")),
        ("", [(7, 5)], ("8.0", "9.0+PTX")),
        ("native", [(8, 9)], ("8.9+PTX",)),
        ("8.6", [(9, 0)], ("8.6",)),
        ("7.5 8.0 9.0a 10.0+PTX", [], ("8.0", "9.0a", "10.0+PTX")),
        ("Ampere;9.0", [], ("Ampere", "9.0")),
    ],
)
def test_architectures(build: ModuleType, asked: str, visible, expected: tuple[str, ...]) -> None:
    assert build.choose_architectures({"TORCH_CUDA_ARCH_LIST": asked}, visible) == expected


def test_architectures_that_are_all_too_old(build: ModuleType) -> None:
    with pytest.raises(build.BuildError, match=r"TORCH_CUDA_ARCH_LIST=6\.0;7\.5") as error:
        build.choose_architectures({"TORCH_CUDA_ARCH_LIST": "6.0;7.5"}, [])
    assert_one_sentence(str(error.value))


# Tools


def fake_tools(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    return {"PATH": str(folder)}


def test_missing_tools(build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(build.BuildError, match=r"ninja was not found: pip install.*SWINKERNELS_BUILD=none") as error:
        build.require_tools(fake_tools(tmp_path, "c++"))
    assert_one_sentence(str(error.value))
    (tmp_path / "c++").unlink()
    environ = fake_tools(tmp_path, "ninja")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler .* \(c\+\+\).*SWINKERNELS_BUILD=none") as error:
        build.require_tools(environ)
    assert_one_sentence(str(error.value))
    with pytest.raises(build.BuildError, match=r"\(clang\+\+-99\)"):
        build.require_tools({**environ, "CXX": "ccache clang++-99"})
    build.require_tools(fake_tools(tmp_path, "ninja", "c++"))


def test_ninja_beside_the_interpreter_is_found(build: ModuleType, tmp_path: Path, monkeypatch) -> None:
    module = ModuleType("ninja")
    module.BIN_DIR = str(tmp_path / "elsewhere")
    monkeypatch.setitem(sys.modules, "ninja", module)
    environ = fake_tools(tmp_path, "c++")
    build.require_tools(environ)
    assert environ["PATH"].split(os.pathsep)[0] == module.BIN_DIR


# The script as users run it


def run_setup(*arguments: str, folder: Path = ROOT, **environ: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("SWINKERNELS_BUILD", "CUDA_HOME", "CUDA_PATH", "CXX")}
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**clean, **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def test_errors_are_one_line_without_a_stack_trace(tmp_path: Path) -> None:
    fake = make_toolkit(tmp_path / "cuda", "11.8")
    for environ, expected in (
        ({"SWINKERNELS_BUILD": "gpu"}, "SWINKERNELS_BUILD must be auto, cuda, hot, cpu or none, got gpu"),
        ({"SWINKERNELS_BUILD": "cuda", "CUDA_HOME": str(fake)}, "SWINKERNELS_BUILD=cuda, but "),
        ({"SWINKERNELS_BUILD": "cpu", "CXX": "no-such-compiler"}, "no C++ compiler was found (no-such-compiler)"),
    ):
        result = run_setup("build_ext", "--inplace", **environ)
        assert result.returncode == 1
        lines = result.stderr.strip().splitlines()
        assert lines[-1].startswith("swinkernels: " + expected)
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("package", ["torch", "pybind11"])
def test_missing_package_is_one_line(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(f"raise ImportError(\"No module named '{package}'\\nat all\")\n")
    result = run_setup("build_ext", "--inplace", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    expected = f"swinkernels: the extension cannot be compiled, No module named '{package}': pip install"
    assert result.stderr.startswith(expected)
    assert_one_sentence(result.stderr)


def test_pure_python_wheel_and_source_archive(tmp_path: Path) -> None:
    """Neither build needs torch or a compiler. Like pip, the test builds the wheel from the unpacked archive."""
    (tmp_path / "torch.py").write_text("raise ImportError('not here')\n")
    environ = {"PYTHONPATH": str(tmp_path), "CXX": "no-such-compiler"}
    result = run_setup("-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path), **environ)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("swinkernels-*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames() if file.getmember(name).isfile()}
        file.extractall(tmp_path, filter="data")
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*.*") if p.is_file()}
    assert sources
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "swinkernels/py.typed", "swinkernels/_C.pyi"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]

    unpacked = tmp_path / archive.name.removesuffix(".tar.gz")
    wheel = tmp_path / "wheel"
    result = run_setup("-q", "bdist_wheel", "-d", str(wheel), folder=unpacked, SWINKERNELS_BUILD="none", **environ)
    assert result.returncode == 0, result.stderr
    (built,) = wheel.glob("*.whl")
    assert built.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(built) as file:
        contents = {name for name in file.namelist() if ".dist-info/" not in name}
    assert {"swinkernels/py.typed", "swinkernels/_C.pyi", "swinkernels/ops/window_attention.py"} <= contents
    assert all(name.startswith("swinkernels/") for name in contents)
