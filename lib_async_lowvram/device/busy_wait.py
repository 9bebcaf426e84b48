"""Waiting without sleeping, for measurements on the simulated device.

Problem: a thread that sleeps gives its processor away. A virtual one is then halted, and comes back up to a millisecond late and slow
at first; with hundreds of waits per pass that is most of what a benchmark would show. A GPU's engines do not doze off. So where times are
measured, waits are spent awake: in a computation that takes as long as one says - iterations of a hash - and needs neither memory nor the
interpreter's lock, since whatever else is measured needs both.

Any thread.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

AWAKE_SECONDS = 1e-3
"""Before a known time, the last of it spent awake."""

LOOK_SECONDS = 30e-6
"""Between two looks whether something has happened."""

LEAST_RATE = 1e5
"""Iterations per second that any processor does."""

SHARE = 0.9
"""Of the time that is left, computed through in one go: a few calls, and the lock is asked for as often."""


class BusyWait:
    """See the module."""

    def __init__(self) -> None:
        self._rate = LEAST_RATE  # iterations per second; measured below

    def until(self, when_s: float) -> None:
        """Return at `when_s` (`time.perf_counter`), or some microseconds later."""
        remaining = when_s - time.perf_counter()
        if remaining > AWAKE_SECONDS:
            time.sleep(remaining - AWAKE_SECONDS)
        while (remaining := when_s - time.perf_counter()) > 0:
            self._compute(remaining * SHARE)

    def until_true(self, reached: Callable[[], object]) -> None:
        """Return once `reached()` is true. Somebody else makes it so, and wakes nobody."""
        while not reached():
            self._compute(LOOK_SECONDS)

    def _compute(self, seconds: float) -> None:
        """For about so long."""
        iterations = max(1, int(seconds * self._rate))
        start = time.perf_counter()
        hashlib.pbkdf2_hmac("sha256", b"", b"", iterations)
        # As it went just now. Who was interrupted meanwhile computes too little next time, and looks at the clock once more.
        self._rate = max(LEAST_RATE, iterations / (time.perf_counter() - start))
