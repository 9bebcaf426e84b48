"""The CPU as the mover's device: its memory is main memory, and the link a copy within it.

Problem: the simulated device does all that a mover asks of a device, on the CPU; but it keeps freed memory for later, fills it with NaN and
pretends a link. Here memory that is given back is given back, and copies are as fast as they are.

What it is for: a model that stays in its file, of which main memory holds the ring and some residents, read ahead by a thread.

glibc keeps what is freed in pieces below a threshold that grows to 32 MB (mallopt(3)), and a thread's pieces apart from the others'. With
activations of a few megabytes that are freed all the time, the process holds far more than it uses. `return_freed_memory` sets the
threshold.
"""

from __future__ import annotations

import ctypes
import math
import sys

import torch

from lib_async_lowvram.device.simulated import SimulatedStreams

THRESHOLD = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


class MainMemory(SimulatedStreams):
    """See the module."""

    def __init__(self) -> None:
        super().__init__(capacity_bytes=1 << 50, bandwidth=math.inf, latency=0.0, poison=False)
        self.name = "main memory"
        self._memory.recycle = _forget


def _forget(block: torch.Tensor) -> None:
    """Whoever held it last has let go of it."""


def return_freed_memory() -> bool:
    """From now on, memory of `THRESHOLD` bytes or more goes back to the system when it is freed. False where the C library has no such
    setting (Windows and macOS do so anyway)."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it, musl has not
    if mallopt is None:
        return False
    settings = {_MMAP_THRESHOLD: THRESHOLD, _TRIM_THRESHOLD: THRESHOLD, _ARENA_MAX: 2}
    return all([bool(mallopt(name, value)) for name, value in settings.items()])
