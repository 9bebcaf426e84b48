"""Device copies that outlive the learning pass: what stood on the device at its end and will be resident stays there.

Problem: a learning pass ends with its last region on the device, and a network of one region (the text encoder, usually all
resident) would give all of it back only to copy it again in the next pass. So those units of the last region that the plan
makes resident keep their memory, clean and unpublished, until the network is entered - or left.

Invariant: between put and take a unit is in state HOST, its parameters point at its master, and the memory here held the
master's bytes when it was put. Bytes held are within the plan's resident set, so within the budget (I2).

Filled by `region_pass`, emptied by `residents` and `network`, under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from lib_async_lowvram.device.streams import Event, Streams
from lib_async_lowvram.device.weights import Unit


class Kept:
    """See the module."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._held: dict[Unit, tuple[torch.Tensor, Event]] = {}

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._held

    def put(self, unit: Unit, memory: torch.Tensor, used: Event) -> None:
        """`memory` (uint8, from `Streams.allocate`) holds `unit`'s bytes; `used`: after its last use so far."""
        self._held[unit] = (memory, used)

    def take(self, unit: Unit) -> tuple[torch.Tensor, Event] | None:
        """What was put, which is the caller's from now on; None if nothing was."""
        return self._held.pop(unit, None)

    def reduce_to(self, units: Iterable[Unit]) -> None:
        """Give back the memory of all others."""
        wanted = set(units)
        for unit in [unit for unit in self._held if unit not in wanted]:
            memory, used = self._held.pop(unit)
            self._streams.free(memory, (used,))
