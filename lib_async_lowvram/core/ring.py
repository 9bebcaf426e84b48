"""The ring: which piece of the preallocated device memory each streamed unit passes through, and when it may be reused.

Problem: units of very different sizes stream through one slab in a known cyclic order. A slot may be overwritten only
after its last reader; nothing may be allocated on the way (I2).

Every streamed unit has one fixed place in the slab, chosen once per plan (`core.places`). Fixed places mean that the
tensors over a slot are made once, and that the units whose ranges overlap are known beforehand: a unit can be onloaded
exactly when none of those is live. For each unit that left, the ring keeps a *fence* - the event after which its bytes may
be overwritten - and hands the newcomer those it still has to wait for. All onloads go through one copy
stream in order, so a fence that stream has already waited for, or an older one of the same consumer stream, is not waited
for again.

Offsets and sizes in bytes. Fences are opaque. Caller: `network`, under the mover's lock; pure logic.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any


class Ring:
    """Occupancy of the slab: which units are live, and the fences of those that were."""

    def __init__(self, offsets: Mapping[int, int], nbytes: Mapping[int, int], ring_bytes: int) -> None:
        self.offsets = dict(offsets)
        self.nbytes = {unit: nbytes[unit] for unit in offsets}
        self.ring_bytes = ring_bytes
        self.live: set[int] = set()
        self.live_bytes = 0
        self._ends = {unit: offset + self.nbytes[unit] for unit, offset in self.offsets.items()}
        # Who left, and the fence not yet waited for: (start, end, serial, stream key, event). A few entries, as many as fit
        # the slab: looking through them is cheaper than knowing all overlaps.
        self._left: list[tuple[int, int, int, Hashable, Any]] = []
        self._serial = 0

    def move(self, offsets: Mapping[int, int], nbytes: Mapping[int, int]) -> None:
        """Other places from now on, for units that had none, too; those that are live keep the one they are in."""
        for unit, offset in offsets.items():
            if unit not in self.live:
                self.offsets[unit], self.nbytes[unit], self._ends[unit] = offset, nbytes[unit], offset + nbytes[unit]

    def blockers(self, unit: int) -> list[int]:
        """The live units that stand where `unit` goes."""
        start, end = self.offsets[unit], self._ends[unit]
        return [other for other in self.live if self.offsets[other] < end and start < self._ends[other] and other != unit]

    def is_free(self, unit: int) -> bool:
        """Whether `unit` could be placed now."""
        start, end, offsets, ends = self.offsets[unit], self._ends[unit], self.offsets, self._ends
        for other in self.live:
            if offsets[other] < end and start < ends[other] and other != unit:
                return False
        return True

    def occupy(self, unit: int) -> list[Any]:
        """Make `unit` live. Returns the fences its onload must wait for, at most one per consumer stream; they count as waited
        for by the copy stream from then on.

        Raises `ValueError` when it is live already or a live unit stands there.
        """
        if unit in self.live or not self.is_free(unit):
            raise ValueError(f"unit {unit} cannot be placed: live {sorted(self.blockers(unit))}")
        self.live.add(unit)
        self.live_bytes += self.nbytes[unit]
        start, end = self.offsets[unit], self._ends[unit]
        latest: dict[Hashable, tuple[int, Any]] = {}
        for low, high, serial, key, event in self._left:
            if low < end and start < high and serial > latest.get(key, (0, None))[0]:
                latest[key] = (serial, event)
        if latest:
            # Older fences of the same stream lie before the one waited for.
            self._left = [left for left in self._left if left[2] > latest.get(left[3], (0, None))[0]]
        return [event for _, event in latest.values()]

    def vacate(self, unit: int, stream_key: Hashable, fence: Any) -> None:
        """`unit` is live no longer; its bytes may be overwritten after `fence`, recorded on stream `stream_key`.

        Fences of one stream key must be handed in the order in which they were recorded.
        """
        self.live.remove(unit)
        self.live_bytes -= self.nbytes[unit]
        self._serial += 1
        self._left.append((self.offsets[unit], self._ends[unit], self._serial, stream_key, fence))

    def fences(self) -> list[Any]:
        """What must have passed, beside what the copy stream was told to wait for, before the whole slab may be given back:
        the newest fence of every stream."""
        latest = {key: event for _, _, _, key, event in self._left}
        return list(latest.values())
