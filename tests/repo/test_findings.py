"""Tests that the scripts in findings/ are isolated, pin their packages, and do not mention swinkernels."""

import os
import re
import subprocess
from pathlib import Path

import pytest

FINDINGS = Path(__file__).parents[2] / "findings"
SCRIPTS = sorted(FINDINGS.glob("*.sh"))


def test_readme_lists_every_script():
    listed = re.findall(r"\]\((\w+\.sh)\)", (FINDINGS / "README.md").read_text())
    assert listed == [script.name for script in SCRIPTS]
    assert len(SCRIPTS) >= 8


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_script_is_isolated_and_pinned(script):
    text = script.read_text()
    head = re.match(r"#!/usr/bin/env bash\n((?:#.*\n)+)set -euo pipefail\ntmp=\$\(mktemp -d\)\ntrap 'rm -rf", text)
    assert head, "the script starts with its head comment, stops at errors, and removes its temporary folder"
    assert all(f"\n# {word} " in head[1] for word in ("Packages", "Expected", "Seen"))
    assert os.access(script, os.X_OK)
    assert "swinkernels" not in text.lower()
    subprocess.run(["bash", "-n", script], check=True)

    arguments = re.search(r'pip" install --quiet (.+)', text)[1].split()
    pins = dict(re.fullmatch(r'"([\w\[\]-]+)==([\w.]+)"', argument).groups() for argument in arguments)
    named = re.search(r"# Packages +(.+)", head[1])[1].replace(" (CPU)", "")
    for package, version in (entry.split(" ") for entry in named.split(", ")):
        assert version in (pins.get(package), pins.get(f"{package}[cpu]")), f"{package} {version} is not pinned"
