"""Simulated devices end with the test that made them; what every test of staging must keep."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest

from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.planning import Planning
from tests.mover import chains, staging_rig
from tests.mover.steady_rig import Asked


@pytest.fixture(autouse=True)
def close_devices() -> Iterator[None]:
    yield
    while chains.OPEN:
        chains.OPEN.pop().close()


@pytest.fixture
def one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is resident stays so, whatever was measured."""
    monkeypatch.setattr(Planning, "better", lambda *args: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    """See there; from now on."""
    return Asked(monkeypatch)


@pytest.fixture
def the_limit_holds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Asserted whenever anything is pinned; what was pinned then, in bytes. And no copy thread stays behind."""
    seen: list[int] = []
    pin = HostMemory.pin

    def judged_pin(self: HostMemory, *args: Any) -> bool:
        pinned = pin(self, *args)
        seen.append(self.pinned_bytes)
        assert self.pinned_bytes <= self.pinned_limit_bytes
        return pinned

    monkeypatch.setattr(HostMemory, "pin", judged_pin)
    yield seen
    gc.collect()
    for thread in staging_rig.staging_threads():
        thread.join(10)
    assert not staging_rig.staging_threads()
