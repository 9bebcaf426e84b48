"""Device copies of a network that is not in use: what its learning pass left there, and what was fetched ahead.

Problem: a learning pass ends with its last region on the device, and a network of one region (the text encoder, usually all
resident) would give all of it back only to copy it again in the next pass. So those units of the last region that the plan
makes resident keep their memory, clean and unpublished, until the network is entered - or left. And residents of a network that
comes next are copied while another one computes (`ahead`).

Invariant: between put and take a unit is in state HOST, its parameters point at its master, and the memory here holds, or will hold
behind an event, the master's bytes as they were when it was put. Bytes held are within the plan's resident set, so within the budget
(I2). Masters may not be let go of while copies that were fetched read them: `settle` waits for those that were given up,
`Unit.copied` tells of the others.

Filled by `region_pass` and `ahead`, emptied by `residents`, `ahead` and `network`, under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lib_async_lowvram.device.staging import Staged, last_of
from lib_async_lowvram.device.streams import Event, Streams, align
from lib_async_lowvram.device.weights import Unit


@dataclass(frozen=True)
class Copy:
    """`memory`: uint8, from `Streams.allocate`. `used`: after its last use so far, the copy that fills it perhaps. `accepted`: the
    unit's count when it was put. `arriving`: the copy was under way then."""

    memory: torch.Tensor
    used: Event | Staged
    accepted: int
    arriving: bool

    def is_true(self, unit: Unit) -> bool:
        """Whether it holds, or will hold, the bytes that the master has now, as far as changes were dealt with (`true_up`)."""
        if type(self.used) is Staged and self.used.came_to_nothing:
            return False
        return self.accepted == unit.accepted


class Kept:
    """See the module."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._held: dict[Unit, Copy] = {}
        self._given_up: list[tuple[Unit, Event]] = []  # while their copies were under way, perhaps

    def __contains__(self, unit: Unit) -> bool:
        return unit in self._held

    def put(self, unit: Unit, memory: torch.Tensor, used: Event | Staged, arriving: bool = False) -> None:
        """See `Copy`."""
        self._held[unit] = Copy(memory, used, unit.accepted, arriving)

    def take(self, unit: Unit) -> Copy | None:
        """What was put, which is the caller's from now on; None if nothing was."""
        return self._held.pop(unit, None)

    def reduce_to(self, units: Iterable[Unit]) -> int:
        """Give back the memory of all others, behind what uses it. Bytes."""
        wanted, freed = set(units), 0
        for unit in [unit for unit in self._held if unit not in wanted]:
            copy = self._held.pop(unit)
            used = last_of(copy.used, self._streams)
            if copy.arriving:
                self._given_up.append((unit, used))
                unit.copied = used
            freed += align(copy.memory.numel())
            self._streams.free(copy.memory, (used,))
        return freed

    def settle(self) -> None:
        """Wait on the host until no copy that was given up reads a master any more. Raises what such a copy raised."""
        given_up, self._given_up = self._given_up, []
        for unit, used in given_up:
            if unit.copied is used:
                unit.copied = None
        if given_up:
            self._streams.synchronize(given_up[-1][1])  # the newest: they are done in order
