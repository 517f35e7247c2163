"""Find the commit of the measured sources.

This module imports neither torch nor numpy, because GPU runs use it in a process that must not load them.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit(but: str = "") -> str:
    """Return the commit of the sources, followed by "+" if a tracked file outside the path ``but`` was edited since.

    Outside a git repository, the result is "unknown". A folder made by ``python -m gpu bundle`` stores the commit in a
    file.
    """
    if (ROOT / "COMMIT").exists():
        return (ROOT / "COMMIT").read_text().strip()

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    status = ["status", "--porcelain", "-uno", "--", ".", *([f":(exclude){but}"] if but else [])]
    try:
        # An unpacked archive may lie inside another repository.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT:
            return "unknown"
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git(*status) else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
