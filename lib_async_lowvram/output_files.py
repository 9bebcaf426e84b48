"""Files that commands write: found unwritable before any work, not after it. Standard library only."""

from __future__ import annotations

from pathlib import Path


def why_not_writable(path: Path | None) -> str:
    """One line, or "" where a file can be written there (or none is wanted). Leaves what is there alone."""
    if path is None:
        return ""
    try:
        existed = path.exists()
        with path.open("ab"):
            pass
        if not existed:
            path.unlink()
    except OSError as error:
        return f"cannot write {path}: {error.strerror or error}"
    return ""
