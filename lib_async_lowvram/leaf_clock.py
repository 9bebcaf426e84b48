"""How long each unit computes, measured where hooks are anyway: in the first streamed pass after a network is entered.

Problem: the learning pass times every leaf, but under observers, cold caches and first-run compilation. The pass in which
the residents arrive has acquire hooks on every unit too, so it can be timed with two events per unit, around its wait for
the copy; later passes carry no timing events at all. What lies between one unit's wait and the next one's is the first
one's computing. Of several measurements the smallest counts: noise only ever adds.

The copies made meanwhile are timed, too, from when the copy stream gets to them: the link as it is while the device computes.

Called by `transfers` and `streaming` under the mover's lock. Events are read when they are long done; nobody waits.
"""

from __future__ import annotations

from lib_async_lowvram.device.streams import Event, Streams

LARGE = 1 << 20
"""Bytes of a copy that says something about the link."""

Stretch = tuple[int, float, float]
"""(unit, start, end), seconds from the pass's start"""

Copied = tuple[int, int, float, float]
"""(unit, bytes, start, end), seconds from the pass's start"""


class LeafClock:
    """Measures one pass. `arriving`: the one in which residents arrive, which waits for more than later ones. `every_copy`: small
    ones are timed as well, for somebody to look at."""

    def __init__(self, streams: Streams, arriving: bool = False, every_copy: bool = False) -> None:
        self.arriving = arriving
        self._every_copy = every_copy
        self._streams = streams
        self._marks: list[tuple[int, Event, Event]] = []  # (unit, before its wait, after it)
        self._start: Event | None = None
        self._before: Event | None = None
        self._end: Event | None = None
        self._copies: list[tuple[int, int, Event, Event]] = []  # (unit, bytes, start, end)

    def _now(self) -> Event:
        return self._streams.record(self._streams.current_stream(), timing=True)

    def start(self) -> None:
        """The pass starts."""
        self._start = self._now()

    def before_wait(self) -> None:
        """The calling thread's stream is about to wait for a copy."""
        self._before = self._now()

    def after_wait(self, unit: int) -> None:
        """It has been told to: from here on `unit` computes."""
        self._marks.append((unit, self._before, self._now()))

    def copies(self, nbytes: int) -> bool:
        """Whether a copy of that size is worth two timing events."""
        return self._every_copy or nbytes >= LARGE

    def copied(self, unit: int, nbytes: int, start: Event, end: Event) -> None:
        """Timing events of the copy stream around one copy."""
        self._copies.append((unit, nbytes, start, end))

    def read_waits(self) -> float:
        """Seconds that computing waited for copies, once `read` gave figures."""
        return sum(max(0.0, self._streams.elapsed(before, after)) for _, before, after in self._marks)

    def read_copies(self) -> tuple[int, float]:
        """(bytes, seconds) of all large copies that are done."""
        streams = self._streams
        large = [copy for copy in self._copies if copy[1] >= LARGE]
        done = [(nbytes, streams.elapsed(start, end)) for _, nbytes, start, end in large if streams.done(end)]
        return sum(nbytes for nbytes, _ in done), sum(seconds for _, seconds in done)

    @property
    def units(self) -> list[int]:
        """Those seen to fire, in order."""
        return [unit for unit, _, _ in self._marks]

    def end(self) -> None:
        """The pass ends."""
        self._end = self._now()

    def read(self) -> tuple[float, list[tuple[int, float]]] | None:
        """(seconds before the first unit, (unit, seconds) per firing), or None while the device is not there yet."""
        if self._end is None or not self._marks or not self._streams.done(self._end):
            return None
        elapsed = self._streams.elapsed
        ends = [before for _, before, _ in self._marks[1:]] + [self._end]
        steps = [(unit, max(0.0, elapsed(after, end))) for (unit, _, after), end in zip(self._marks, ends, strict=True)]
        return max(0.0, elapsed(self._start, self._marks[0][1])), steps

    def since_start(self, event: Event) -> float:
        """Seconds from the pass's start to a timing event that is done; negative before it."""
        return self._streams.elapsed(self._start, event)

    def timeline(self) -> tuple[float, list[Stretch], list[Stretch], list[Copied]] | None:
        """(seconds of the pass, waits, computing, copies), each a list in order: (unit, start, end), copies with their bytes behind the
        unit; seconds from the pass's start. None while the device is not done with the pass and its copies."""
        copies_done = all(self._streams.done(end) for _, _, _, end in self._copies)
        if self._end is None or not self._marks or not self._streams.done(self._end) or not copies_done:
            return None
        at = self.since_start
        waits = [(unit, at(before), at(after)) for unit, before, after in self._marks]
        seconds = at(self._end)
        ends = [start for _, start, _ in waits[1:]] + [seconds]
        computes = [(unit, after, end) for (unit, _, after), end in zip(waits, ends, strict=True)]
        return seconds, waits, computes, [(unit, nbytes, at(start), at(end)) for unit, nbytes, start, end in self._copies]
