"""How much main memory spilled activations may take.

Problem: what is spilled comes and goes within seconds and must not push anybody into swap, or bring the system to kill the process. The
system says what could be had now without swapping; half of that is taken at most.

Sources: `MemAvailable` of /proc/meminfo (proc(5)); `ullAvailPhys` of GlobalMemoryStatusEx; where there is neither, a quarter of the
physical memory. Pure but for asking; any thread.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

from lib_async_lowvram.device.host_memory import ram_bytes

SHARE, SHARE_OF_ALL = 0.5, 0.25


def spill_bytes(meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes, see the module."""
    available = _windows() if sys.platform == "win32" else _linux(meminfo)
    return int(SHARE_OF_ALL * ram_bytes() if available is None else SHARE * available)


def _linux(meminfo: Path) -> int | None:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
    except OSError:
        return None  # another Unix
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return int(found[0][1]) * 1024 if found else None  # kernels before 3.14 do not say


class _Status(ctypes.Structure):
    """`MEMORYSTATUSEX`: two 32-bit fields, then seven of 64 bits, of which the second is what is available."""

    _fields_ = [("length", ctypes.c_uint32), ("load", ctypes.c_uint32), ("sizes", ctypes.c_uint64 * 7)]


def _windows() -> int | None:
    status = _Status(length=ctypes.sizeof(_Status))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        return None
    return status.sizes[1]
