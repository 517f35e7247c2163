"""Tests that the code blocks of the README and of docs/ work as described, and that the pages build without a warning.

The Python blocks of a page run in order, in one namespace. A text block after a Python block is the error that the
code raises. Commands that install or build get a dry run; commands that measure have only their arguments parsed.
"""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import swinkernels
from benchmarks import __main__ as benchmarks_main
from swinkernels import adapters, info, models

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PARSED = ("benchmarks.host_cost", "benchmarks.instructions")  # too slow to run


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    return [(m[1], m[2]) for m in BLOCK.finditer(page.read_text()) if m[1] in languages]


def lines(page: Path) -> Iterator[str]:
    """Yield the shell commands of ``page``, without comments."""
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


def test_a_block_of_text_is_an_error() -> None:
    """Every text block follows a Python block; otherwise it would not be checked."""
    for page in PAGES:
        found = blocks(page, "python", "text")
        assert all(found[i - 1][0] == "python" for i, (language, _) in enumerate(found) if language == "text")


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    """The command can run: the files that it names exist, and its arguments are valid."""
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
        assert benchmarks_main.parser().parse_args(words[3:]).command == words[3]
        return
    elif words[:2] == ["python", "-m"] and words[2] in PARSED:
        run = [*run[:3], "--help"]
    else:
        assert words[:3] == ["python", "-m", "swinkernels.info"], f"no test covers {command}"
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_to_files(page: Path) -> None:
    """Relative links lead to existing files, also in pages that are not part of the site."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        assert "://" in target or (page.parent / target).exists(), target


def test_readme_fits_on_a_page() -> None:
    """The README has at most 100 lines, and one picture, within the first 20 lines."""
    text = (ROOT / "README.md").read_text().splitlines()
    assert len(text) <= 100
    assert [i < 20 for i, line in enumerate(text) if line.startswith("![")] == [True]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the site, which must give no warnings, and return its folder."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed")
    pytest.importorskip("mkdocstrings", reason="mkdocstrings is not installed")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_are_built(site: Path) -> None:
    api = (site / "api" / "index.html").read_text()
    assert "<math" in api  # formulas are MathML, which needs no script
    assert 'id="swinkernels.adapters.Form.absorbs"' in api  # fields are documented by their comments
    for left_over in (".. math::", ":math:", ":func:", ":class:", "<details"):
        assert left_over not in api
    for page in (ROOT / "docs").rglob("*.md"):
        name = "" if page.stem == "index" else f"{page.relative_to(ROOT / 'docs').with_suffix('')}/"
        assert (site / f"{name}index.html").is_file()


PUBLIC = sorted({
    f"{module.__name__}.{name}"
    for module in (swinkernels, swinkernels.nn, models, swinkernels.ops, adapters)
    for name in module.__all__
})  # fmt: skip


def test_search_finds_every_public_name(site: Path) -> None:
    """The API reference has entries for all public classes and functions, and mentions all other public names."""
    index = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    entries = [entry for entry in index if entry["location"].startswith("api/")]
    titles = {html.unescape(re.sub(r"<[^>]+>", "", entry["title"])) for entry in entries}
    text = " ".join(entry["text"] for entry in entries)
    for public in PUBLIC:
        module, _, name = public.rpartition(".")
        if callable(getattr(sys.modules[module], name)):
            assert name in titles, f"docs/api.md has no entry for {public}"
        else:
            assert public in text, f"docs/api.md does not mention {public}"
