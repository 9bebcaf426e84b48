"""Run by the WebUI at every start, in a process of its own. Nothing to install: says so, and says what would not work.

The extension uses only what the WebUI brings. Never raises, and does not import torch: a start would take seconds longer.
"""

from __future__ import annotations

import sys
from importlib import metadata

LEAST_PYTHON = (3, 10)
LEAST_TORCH = (2, 1)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.1.2+cu121" -> (2, 1, 2), "2.13.0a0" -> (2, 13, 0), "unknown" -> ()."""
    numbers = []
    for part in version.split("+")[0].split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def problems(python: tuple[int, ...], torch: str | None) -> list[str]:
    """What keeps the extension from working with this Python and this version of torch (None: not installed)."""
    found = []
    if tuple(python[:2]) < LEAST_PYTHON:
        found.append(f"Python {'.'.join(map(str, python[:3]))} is older than {'.'.join(map(str, LEAST_PYTHON))}")
    if torch is None:
        found.append("torch is not installed")
    elif not release(torch):
        found.append(f"torch has a version that cannot be read: {torch!r}")
    elif release(torch)[:2] < LEAST_TORCH:
        found.append(f"torch {torch} is older than {'.'.join(map(str, LEAST_TORCH))}")
    return found


def torch_version() -> str | None:
    """The version of the installed torch by its metadata; None when there are none, or they cannot be read."""
    try:
        return metadata.version("torch")
    except Exception:  # broken metadata raise all sorts of things, and this script must not stop the WebUI from starting
        return None


def main() -> None:
    found = problems(tuple(sys.version_info[:3]), torch_version())
    if found:
        print(f"[Async LowVRAM] will not work here: {'; '.join(found)}. The WebUI starts without it.")
    else:
        print("[Async LowVRAM] nothing to install.")


if __name__ == "__main__":
    main()
