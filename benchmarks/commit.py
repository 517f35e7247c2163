"""Which sources a measurement is of; imports nothing that a run on a GPU has to watch over."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit(but: str = "") -> str:
    """The commit of the sources, with "+" if they, ``but`` one file, were edited since; "unknown" without a git
    repository.

    A folder that ``python -m gpu bundle`` made says it in a file.
    """
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    status = ["status", "--porcelain", "-uno", "--", ".", *([f":(exclude){but}"] if but else [])]
    try:
        # An unpacked archive may lie inside somebody else's repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
