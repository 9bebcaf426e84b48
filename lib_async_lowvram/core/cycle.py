"""A quick estimate of one steady pass, for searching: thousands of resident sets can be tried in the time of one picture.

Problem: `pipeline.simulate` plays every rule of the mover, with each unit in its place in the ring; finding places takes
milliseconds, and a search needs hundreds of tries. Most of what decides the time is simpler: the copies in order, each as
early as the ring has room.

Model: `pipeline.play`, with a ring that holds any units whose bytes sum up to its size (`core.places` comes near that), so
that the copy for a step waits for the newest step that does not fit beside it and all between; every firing is copied.

Pure; bytes and seconds. Caller: `core.search`.
"""

from __future__ import annotations

import math
from collections.abc import Container

from lib_async_lowvram.core.pipeline import Workload, play

PASSES = 3
"""The first has an empty ring, the second its consequences."""


class Cycle:
    """A workload, made ready for many estimates."""

    def __init__(self, workload: Workload) -> None:
        rate, overhead = workload.bandwidth, workload.copy_overhead_seconds
        nbytes = workload.nbytes
        self._lead = workload.lead_seconds
        self._step_overhead = workload.step_overhead_seconds
        self._steps = [(unit, seconds, nbytes[unit], overhead + nbytes[unit] / rate) for unit, seconds in workload.steps]

    def seconds(self, resident: Container[int], ring_bytes: int) -> float:
        """Per steady pass, with these units resident and the others streaming through a ring of `ring_bytes`. Infinity when
        a streamed unit does not fit."""
        more = self._step_overhead
        sizes: list[int] = []
        copies: list[float] = []
        computes = [self._lead]
        for unit, seconds, size, copy in self._steps:
            if unit in resident:
                computes[-1] += seconds
            else:
                computes.append(seconds + more)
                sizes.append(size)
                copies.append(copy)
        lead = computes.pop(0)
        if not sizes:
            return lead
        if max(sizes) > ring_bytes:
            return math.inf
        return play(copies, computes, _steps_back(sizes, ring_bytes), lead, PASSES, 1)


def _steps_back(sizes: list[int], ring_bytes: int) -> list[int]:
    """For each step of a cycle: how many steps back the newest one is that does not fit the ring with it and all between."""
    count = len(sizes)
    twice = sizes + sizes
    first = live = 0
    back = []
    for place, size in enumerate(twice):
        live += size
        while live > ring_bytes or place - first >= count:
            live -= twice[first]
            first += 1
        if place >= count:
            back.append(place - first + 1)
    return back
