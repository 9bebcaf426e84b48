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

from bisect import bisect_left, bisect_right
from collections.abc import Hashable, Iterable, Mapping
from typing import Any


class Ring:
    """Occupancy of the slab: which units are live, and the fences of those that were."""

    def __init__(self, offsets: Mapping[int, int], nbytes: Mapping[int, int], ring_bytes: int) -> None:
        self.offsets = dict(offsets)
        self.nbytes = {unit: nbytes[unit] for unit in offsets}
        self.ring_bytes = ring_bytes
        self.live: dict[int, tuple[int, int]] = {}  # unit -> where it stands
        self.live_bytes = 0
        # The same in address order: no two of them overlap. Without those that are empty.
        self._starts: list[int] = []
        self._standing: list[int] = []
        self._spans = {unit: (offset, offset + self.nbytes[unit]) for unit, offset in self.offsets.items()}
        # Who left, and the fence not yet waited for: (start, end, serial, stream key, event). A few entries, as many as fit
        # the slab: looking through them is cheaper than knowing all overlaps.
        self._left: list[tuple[int, int, int, Hashable, Any]] = []
        self._serial = 0

    def move(self, offsets: Mapping[int, int], nbytes: Mapping[int, int]) -> None:
        """Other places from now on, for units that had none, too; those that are live keep the one they are in."""
        for unit, offset in offsets.items():
            if unit not in self.live:
                self.offsets[unit], self.nbytes[unit] = offset, nbytes[unit]
                self._spans[unit] = (offset, offset + nbytes[unit])

    def blockers(self, unit: int) -> list[int]:
        """The live units that stand where `unit` goes."""
        start, end = self._spans[unit]
        starts, standing = self._starts, self._standing
        if start == end or not starts:
            return []
        first = bisect_right(starts, start)
        after = bisect_left(starts, end, first)
        if first and self.live[standing[first - 1]][1] > start:
            first -= 1
        found = standing[first:after]
        return [other for other in found if other != unit] if unit in self.live else found

    def is_free(self, unit: int) -> bool:
        """Whether `unit` could be placed now."""
        return not self.blockers(unit)

    def occupy(self, unit: int) -> list[Any]:
        """Make `unit` live. Returns the fences its onload must wait for, at most one per consumer stream; they count as waited
        for by the copy stream from then on.

        Raises `ValueError` when it is live already or a live unit stands there.
        """
        if unit in self.live or self.blockers(unit):
            raise ValueError(f"unit {unit} cannot be placed: live {sorted(self.blockers(unit))}")
        return self.occupy_free(unit)

    def occupy_free(self, unit: int) -> list[Any]:
        """The same for a place that was found free just now."""
        start, end = self.live[unit] = self._spans[unit]
        if start != end:
            self.live_bytes += end - start
            place = bisect_right(self._starts, start)
            self._starts.insert(place, start)
            self._standing.insert(place, unit)
        latest: dict[Hashable, tuple[int, Any]] | None = None
        for low, high, serial, key, event in self._left:
            if low < end and start < high:
                if latest is None:
                    latest = {key: (serial, event)}
                elif serial > latest.get(key, (0, None))[0]:
                    latest[key] = (serial, event)
        if latest is None:
            return []
        # Older fences of the same stream lie before the one waited for.
        self._left = [left for left in self._left if left[3] not in latest or left[2] > latest[left[3]][0]]
        return [event for _, event in latest.values()]

    def vacate(self, unit: int, stream_key: Hashable, fence: Any) -> None:
        """`unit` is live no longer; its bytes may be overwritten after `fence`, recorded on stream `stream_key`.

        Fences of one stream key must be handed in the order in which they were recorded.
        """
        start, end = self.live.pop(unit)
        if start != end:
            self.live_bytes -= end - start
            place = bisect_left(self._starts, start)
            del self._starts[place], self._standing[place]
        self._serial += 1
        self._left.append((start, end, self._serial, stream_key, fence))

    def restore(self, live: Iterable[int], left: Mapping[Hashable, Any]) -> None:
        """Others have kept account of who came and left: `live` are here now, and anything may be overwritten only after the fences in
        `left`, by stream key. Nothing else has to be waited for."""
        self.live = {unit: self._spans[unit] for unit in live}
        standing = sorted((start, unit) for unit, (start, end) in self.live.items() if start != end)
        self._starts, self._standing = [start for start, _ in standing], [unit for _, unit in standing]
        self.live_bytes = sum(end - start for start, end in self.live.values())
        self._left.clear()
        for key, fence in left.items():
            self._serial += 1
            self._left.append((0, self.ring_bytes, self._serial, key, fence))

    def fences(self) -> dict[Hashable, Any]:
        """What must have passed, beside what the copy stream was told to wait for, before the whole slab may be given back:
        the newest fence of every stream, by its key."""
        return {key: event for _, _, _, key, event in self._left}
