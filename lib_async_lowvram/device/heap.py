"""Free heap memory, given back to the system.

Problem: packing copies a model's weights into blocks of our own and lets go of where they were; glibc keeps what was freed
(its threshold for mapping large requests apart grows to 32 MB when such a one is freed, see mallopt(3)), so the process would
hold a model's size in pages nobody uses - on machines whose owners often have little RAM. Windows and macOS map and unmap
large requests themselves.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def _find_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not


_TRIM = _find_trim()


def trim_heap() -> bool:
    """Give free pages of the C heap back. False where the system's allocator has nothing of the kind, or nothing was free."""
    return _TRIM is not None and bool(_TRIM(0))
