"""Every code block of the README and of docs/ does what the text says, and the pages build without a warning.

Python runs, block after block of a page in one namespace; where a block of text follows, it is the error that the code
raises. Of shell commands those that install or build are run dry, and those that measure are parsed.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import __main__ as benchmarks_main
from swinkernels import info

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSED = ("benchmarks.host_cost", "benchmarks.instructions")  # they take minutes


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    return [(m[1], m[2]) for m in BLOCK.finditer(page.read_text()) if m[1] in languages]


def lines(page: Path) -> Iterator[str]:
    """The commands of a page, without comments."""
    for _, code in blocks(page, "bash", "sh"):
        for line in code.replace("\\\n", " ").splitlines():
            if command := line.partition("  #")[0].strip():
                yield command


COMMANDS = sorted({command for page in PAGES for command in lines(page)})


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_runs(page: Path) -> None:
    for library in ("timm", "torchvision"):
        if library in page.read_text():
            pytest.importorskip(library)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for (language, code), (next_language, text) in itertools.pairwise([*blocks(page, "python", "text"), ("", "")]):
        if language != "python":
            continue
        compiled = compile(code, str(page), "exec", dont_inherit=True)
        if next_language == "text":
            with pytest.raises(Exception) as error:  # noqa: PT011 the text says which
                exec(compiled, namespace)
            assert f"{type(error.value).__name__}: {error.value}" == text.strip()
        else:
            exec(compiled, namespace)
    if page.name == "README.md":
        assert namespace["out"].shape == (2, 50, 70, 96)


def test_a_block_of_text_is_an_error() -> None:
    """Text belongs to the code before it, or it would not be looked at."""
    for page in PAGES:
        found = blocks(page, "python", "text")
        assert all(found[i - 1][0] == "python" for i, (language, _) in enumerate(found) if language == "text")


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    """That it would run: what it names exists, and takes the arguments."""
    words = shlex.split(command)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, _, value = words.pop(0).partition("=")
        env[name] = value
    run = [sys.executable, *words[1:]] if words[0] == "python" else words
    if words[0] == "git":
        assert command == "git clone <this repository> && cd swinkernels"
        return
    if env.get("SWINKERNELS_BUILD") == "cuda" and not (info.collect()["build"] or {}).get("cuda"):
        pytest.skip("the extension was built without CUDA")
    if words[0] == "make":
        run = ["make", "--dry-run", *words[1:]]
    elif words[:2] == ["pip", "install"]:
        run = [sys.executable, "-m", "pip", *words[1:], "--dry-run", *(["--no-deps"] if "." in words else [])]
    elif words[:3] == ["python", "-m", "benchmarks"]:
        if "report" not in words and "compare" not in words:
            assert benchmarks_main.parser().parse_args(words[3:]).command == words[3]
        run = [*run[:3], *words[3:4], "--help"]
    elif words[:2] == ["python", "-m"] and words[2] in PARSED:
        run = [*run[:3], "--help"]
    else:
        assert words[:3] == ["python", "-m", "swinkernels.info"], f"no test knows what to do with {command}"
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_pages_build_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    api = (tmp_path / "api" / "index.html").read_text()
    assert "<math" in api  # formulas are shown without a script
    for left_over in (".. math::", ":func:", ":class:"):
        assert left_over not in api
    for page in (ROOT / "docs").rglob("*.md"):
        name = "" if page.stem == "index" else f"{page.relative_to(ROOT / 'docs').with_suffix('')}/"
        assert (tmp_path / f"{name}index.html").is_file()
