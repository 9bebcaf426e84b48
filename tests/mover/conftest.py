"""Simulated devices end with the test that made them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.mover import chains


@pytest.fixture(autouse=True)
def close_devices() -> Iterator[None]:
    yield
    while chains.OPEN:
        chains.OPEN.pop().close()
