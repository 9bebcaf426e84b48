"""Device memory of each contender in total: weights, activations, and whatever else it holds.

Problem: several contenders live in one process, and torch's counters are of the process. But they act strictly in turn, so what
a contender holds is the sum of what the counter grew by during its own turns, and its peak is the counter's during its turn,
less what the others held at that time.

CUDA only: the simulated device counts weights (`Streams.peak_allocated_bytes`), and nobody counts activations there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lib_async_lowvram.device.streams import Streams


class DeviceMemory:
    """Of one contender.

    Attributes:
        held: bytes now. peak: the most in its last turn; None where nobody counts.
    """

    def __init__(self, streams: Streams) -> None:
        self._device = streams.device if streams.device.type == "cuda" else None
        self.held = 0
        self.peak: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Whatever the contender does, it does inside."""
        if self._device is None:
            yield
            return
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device) - before + self.held
            self.held += torch.cuda.memory_allocated(self._device) - before
