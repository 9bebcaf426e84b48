"""Everything here needs the extra `standalone`; where its packages are missing, nothing is collected."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

NEEDED = ("diffusers", "transformers", "tokenizers")
MISSING = [name for name in NEEDED if find_spec(name) is None]

WITHOUT = {"test_request.py", "test_families.py", "test_shares.py", "test_disk_room.py", "test_command.py"}
"""What runs without them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if MISSING and Path(__file__).parent in item.path.parents and item.path.name not in WITHOUT:
            item.add_marker(pytest.mark.skip(reason=f"needs {', '.join(MISSING)}: the extra `standalone`"))
