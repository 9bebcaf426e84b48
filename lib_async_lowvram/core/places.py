"""Where in the ring each streamed unit goes: one fixed place per plan, and who must be gone before it can be taken.

Problem: units of very different sizes take turns in one slab in a known cyclic order. The longer ago those were used whose
bytes a unit takes, the sooner its copy may start; a ring whose free bytes were always in one piece would be best, and fixed
places come within half a percent of it (in seconds per pass, on the UNets of SD1.5 and SDXL).

The *skyline* is the slab in address order, as spans that each know which unit was placed there last. Offsets and sizes in
bytes. Pure. Callers: `core.plan`, `core.pipeline`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from heapq import nsmallest

ANCHORS = 24
"""Spans, the oldest, at whose ends a place is looked for."""


class _Skyline:
    """Spans [starts[i], starts[i + 1]) with the number of whoever was placed there last; -1: nobody."""

    def __init__(self, ring_bytes: int) -> None:
        self._starts = [0, ring_bytes]
        self._when = [-1]

    def newest(self, start: int, end: int) -> int:
        """The number of who was placed last anywhere in [start, end), which is not empty."""
        return max(self._when[bisect_right(self._starts, start) - 1 : bisect_left(self._starts, end)])

    def place(self, start: int, end: int, when: int) -> None:
        """[start, end), not empty, is `when`'s from now on."""
        starts, whens = self._starts, self._when
        first, after = bisect_right(starts, start) - 1, bisect_left(starts, end)
        new_starts, new_whens = [start], [when]
        if starts[first] < start:
            new_starts.insert(0, starts[first])
            new_whens.insert(0, whens[first])
        if end < starts[after]:
            new_starts.append(end)
            new_whens.append(whens[after - 1])
        starts[first:after] = new_starts
        whens[first:after] = new_whens

    def best(self, size: int, hint: int, spread: bool) -> int:
        """The offset for `size` bytes whose newest bytes are oldest, beginning or ending where a span does. Among equals the
        lowest; `spread`: where it leaves the largest hole beside itself. `hint`: an offset that is likely to be good."""
        starts, whens, newest_in = self._starts, self._when, self.newest
        last = starts[-1] - size
        found = min(hint, last)
        limit = self.newest(found, found + size)
        room = max(found, last - found)
        if limit == min(whens) >= 0:
            return found  # nothing is older than what it takes
        older = [(when, number) for number, when in enumerate(whens) if when <= limit]
        for when, number in sorted(older) if len(older) <= ANCHORS else nsmallest(ANCHORS, older):
            if when > limit:
                break
            for offset in (starts[number], starts[number + 1] - size):
                if 0 <= offset <= last:
                    newest = newest_in(offset, offset + size)
                    hole = max(offset, last - offset)
                    if newest < limit or (newest == limit and (hole > room if spread else offset < found)):
                        found, limit, room = offset, newest, hole
        return found


def assign_offsets(order: Sequence[int], nbytes: Mapping[int, int], ring_bytes: int, *, spread: bool = False) -> dict[int, int]:
    """A fixed place for every unit of the cyclic `order`: {unit: offset}.

    Greedy: each unit, in order of first use, goes where the units it must evict were used longest ago; among equals, to the
    lowest offset, which keeps what is live together. `spread`: among equals, where it leaves the largest hole beside itself,
    which is better in a ring of hardly more than two of the largest unit: one of them in the middle would leave no room for
    the other. (Tried as well: one behind the other from the start again, up to 1% more seconds per pass; onto the oldest bytes
    among equals, 2% more.)

    Raises `ValueError` when a unit is larger than the ring.
    """
    skyline = _Skyline(ring_bytes)
    offsets: dict[int, int] = {}
    hint = 0
    for now, unit in enumerate(dict.fromkeys(order)):
        size = nbytes[unit]
        if size > ring_bytes:
            raise ValueError(f"a unit of {size} bytes does not fit a ring of {ring_bytes} bytes")
        offset = skyline.best(size, hint, spread) if size else 0
        offsets[unit] = offset
        if size:
            hint = offset + size
            skyline.place(offset, hint, now)
    return offsets


def steps_back(order: Sequence[int], nbytes: Mapping[int, int], offsets: Mapping[int, int], ring_bytes: int) -> list[int]:
    """For each unit of a cycle in which each fires once: how many steps back the newest one is that stands in its place. At
    most the number of units: itself, one cycle ago."""
    count = len(order)
    skyline = _Skyline(ring_bytes)
    back = [count] * count
    for now in range(2 * count):
        unit = order[now % count]
        start, size = offsets[unit], nbytes[unit]
        if size:
            if now >= count:
                back[now - count] = min(count, now - skyline.newest(start, start + size))
            skyline.place(start, start + size, now)
    return back


def overlaps(offsets: Mapping[int, int], nbytes: Mapping[int, int]) -> dict[int, tuple[int, ...]]:
    """For each unit, the other units whose ranges share a byte with its own."""
    spans = sorted((offset, offset + nbytes[unit], unit) for unit, offset in offsets.items())
    found: dict[int, list[int]] = {unit: [] for unit in offsets}
    active: list[tuple[int, int]] = []  # (end, unit)
    for start, end, unit in spans:
        active = [(stop, other) for stop, other in active if stop > start]
        for _, other in active:
            if end > start:
                found[unit].append(other)
                found[other].append(unit)
        if end > start:
            active.append((end, unit))
    return {unit: tuple(others) for unit, others in found.items()}
