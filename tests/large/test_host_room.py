"""How much main memory may be used for what is spilled."""

from __future__ import annotations

from pathlib import Path

import pytest

from lib_async_lowvram.device.host_memory import ram_bytes
from lib_async_lowvram.large import host_room


@pytest.mark.skipif(host_room.sys.platform == "win32", reason="asks the Windows API")
def test_half_of_what_is_available(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       16000000 kB\nMemFree:          100000 kB\nMemAvailable:    8000000 kB\n")
    assert host_room.spill_bytes(meminfo) == 4000000 * 1024


@pytest.mark.skipif(host_room.sys.platform == "win32", reason="asks the Windows API")
def test_where_nobody_says(tmp_path: Path) -> None:
    assert host_room.spill_bytes(tmp_path / "none") == ram_bytes() // 4
    old = tmp_path / "old"
    old.write_text("MemTotal: 16000000 kB\n")
    assert host_room.spill_bytes(old) == ram_bytes() // 4


def test_here() -> None:
    assert 0 < host_room.spill_bytes() <= ram_bytes()
