"""What passes have shown, kept for as long as the process lives: how long each unit computes, and what the link carries.

Problem: how long a leaf computes depends on the network, the picture's size and the batch; the same ones come back job after
job, and after another model had its turn. A network that is attached anew need not find out again.

Seconds, bytes, bytes per second. Called by `planning` under the mover's lock.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable
from statistics import median

Steps = tuple[tuple[int, float], ...]
"""(unit index, seconds from its start to the next one's), in firing order."""

RECENT = 5
"""Passes whose copies count for the bandwidth."""

LEAST_BYTES = 8 << 20
"""Copied in one pass, below which it says nothing about the link."""


class Measured:
    """One device's figures. `key`: (bytes of each unit, shapes of the arguments): networks of the same sizes compute alike."""

    def __init__(self) -> None:
        self._passes: dict[Hashable, tuple[float, Steps]] = {}
        self._rates: deque[float] = deque(maxlen=RECENT)

    def recall(self, key: Hashable) -> tuple[float, Steps] | None:
        """(seconds before the first unit, steps) of such a pass, if one was timed."""
        return self._passes.get(key)

    def remember(self, key: Hashable, lead_seconds: float, steps: Steps) -> None:
        """The newest figures for such passes."""
        self._passes[key] = (lead_seconds, steps)

    def copied(self, nbytes: int, seconds: float) -> None:
        """So many bytes took so long on the link, in one pass; small copies, which are all overhead, left out."""
        if nbytes >= LEAST_BYTES and seconds > 0:
            self._rates.append(nbytes / seconds)

    @property
    def bandwidth(self) -> float | None:
        """Host to device, the median of recent passes; None before the first."""
        return median(self._rates) if self._rates else None
