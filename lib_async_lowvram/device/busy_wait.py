"""Waiting without sleeping, for measurements on the simulated device.

Problem: a thread that sleeps gives its processor away. A virtual one is then halted, and comes back up to a millisecond late and slow
at first; with hundreds of waits per pass that is most of what a benchmark would show. A GPU's engines do not doze off. So where times are
measured, waits are spent awake - in C, without the interpreter's lock nearly all of the time, which other threads need.

Any thread; each needs a `BusyWait` of its own only for speed: two that share one write the same bytes.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable

BYTES = 256 << 10
"""Written over and over: some ten microseconds, within the processor's own cache."""

ASLEEP_SECONDS = 1e-3
"""Before a known time, the last of it spent awake."""


class BusyWait:
    """See the module."""

    def __init__(self) -> None:
        self._block = ctypes.create_string_buffer(BYTES)
        self._address = ctypes.addressof(self._block)

    def until(self, when_s: float) -> None:
        """Return at `when_s` (`time.perf_counter`), or some microseconds later."""
        remaining = when_s - time.perf_counter()
        if remaining > ASLEEP_SECONDS:
            time.sleep(remaining - ASLEEP_SECONDS)
        while time.perf_counter() < when_s:
            ctypes.memset(self._address, 0, BYTES)

    def until_true(self, reached: Callable[[], object]) -> None:
        """Return once `reached()` is true. Somebody else makes it so, and wakes nobody."""
        while not reached():
            ctypes.memset(self._address, 0, BYTES)
