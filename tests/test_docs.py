"""What the documentation says is so: its Python runs, its commands parse, messages it quotes are the program's, links lead somewhere.

Read from README.md and docs/*.md, so that a text that goes stale fails here. The diffusers example has a test of its own
(tests/standalone/test_library_example.py).
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, kind: str) -> list[str]:
    return [text for name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == kind]


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("number", range(len(blocks(ROOT / "docs" / "library.md", "python"))))
def test_python_in_the_library_page_runs(number: int) -> None:
    """Each block by itself, in a process of its own, as somebody would who copies it."""
    done = run(blocks(ROOT / "docs" / "library.md", "python")[number])
    assert done.returncode == 0, done.stderr
