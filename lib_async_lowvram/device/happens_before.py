"""Happens-before over memory: vector clocks and access histories. Pure logic, no torch.

Problem: to say whether two accesses to the same bytes are ordered *however late each stream runs*, not whether they
happened to come in the right order this time.

Terms: an **actor** is whatever does things in order (a stream, a host thread). Each operation gets the next **tick** of
its actor. An actor's **clock** maps every actor to the last of its ticks that surely lies before the actor's next
operation; an event carries a copy of one. Operation `a` is before `b` exactly when b's clock has reached a's tick.

`AccessHistory` keeps, per byte range, the last write and each actor's last read since: enough to find a conflict with
whatever comes next, because an actor's older accesses lie before its newer ones. A write replaces what it covers, so
the history stays as small as the memory is varied, not as long as the run. (The algorithm is FastTrack's: Flanagan and
Freund, PLDI 2009.)

Called by `recorder.py` under its lock.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

Clock = dict[int, int]
"""Actor id -> tick. An actor that is missing counts as tick 0."""


def join(into: Clock, other: Clock) -> None:
    """Raise `into` to what `other` knows as well."""
    for actor, tick in other.items():
        if into.get(actor, 0) < tick:
            into[actor] = tick


@dataclass(frozen=True, slots=True)
class Operation:
    """One logged operation: the `number`th of all, the `tick`th of its actor."""

    number: int
    actor: int
    tick: int
    actor_name: str
    what: str

    def before(self, clock: Clock) -> bool:
        """Whether this operation is surely over for somebody who has `clock`."""
        return clock.get(self.actor, 0) >= self.tick

    def __str__(self) -> str:
        return f"op {self.number} on {self.actor_name}: {self.what}"


class OrderingViolation(AssertionError):
    """Conflicting accesses that nothing orders, or a question that nobody could answer yet."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Two accesses to the bytes [start, end), at least one a write, that nothing orders."""

    earlier: Operation
    earlier_writes: bool
    later: Operation
    later_writes: bool
    start: int
    end: int
    place: str = ""

    def __str__(self) -> str:
        verbs = ("reads", "writes")
        where = self.place or f"{self.start:#x}..{self.end:#x}"
        return (
            f"{where} ({self.end - self.start} bytes):\n"
            f"    {self.earlier}  [{verbs[self.earlier_writes]}]\n"
            f"    {self.later}  [{verbs[self.later_writes]}]\n"
            f"    nothing makes op {self.later.number} wait for op {self.earlier.number}"
        )


class _Segment:
    __slots__ = ("end", "reads", "start", "write")

    def __init__(self, start: int, end: int, write: Operation | None, reads: dict[int, Operation]) -> None:
        self.start, self.end, self.write, self.reads = start, end, write, reads


class AccessHistory:
    """Who last touched which bytes."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._segments: list[_Segment] = []

    def __len__(self) -> int:
        """How many segments are kept."""
        return len(self._segments)

    def access(self, start: int, end: int, operation: Operation, writes: bool, clock: Clock) -> list[Violation]:
        """Log that `operation`, whose actor has `clock` (its own tick included), touches [start, end). Returns the
        conflicts with earlier accesses, one for each of them."""
        if end <= start:
            return []
        first, last = self._span(start, end)
        found: dict[tuple[int, bool], Violation] = {}
        kept: list[_Segment] = []
        position = start
        for segment in self._segments[first:last]:
            low, high = max(start, segment.start), min(end, segment.end)
            self._conflicts(segment, low, high, operation, writes, clock, found)
            if segment.start < low:
                kept.append(_Segment(segment.start, low, segment.write, segment.reads))
            if not writes:
                if position < low:
                    kept.append(_Segment(position, low, None, {operation.actor: operation}))
                kept.append(_Segment(low, high, segment.write, {**segment.reads, operation.actor: operation}))
            elif high == end or segment is self._segments[last - 1]:
                kept.append(_Segment(start, end, operation, {}))
            if high < segment.end:
                kept.append(_Segment(high, segment.end, segment.write, segment.reads))
            position = high
        if writes and first == last:
            kept.append(_Segment(start, end, operation, {}))
        elif not writes and position < end:
            kept.append(_Segment(position, end, None, {operation.actor: operation}))
        self._replace(first, last, kept)
        return list(found.values())

    def forget(self, start: int, end: int) -> None:
        """Drop everything known about [start, end): the memory began a new life."""
        first, last = self._span(start, end)
        kept = []
        for segment in self._segments[first:last]:
            if segment.start < start:
                kept.append(_Segment(segment.start, start, segment.write, segment.reads))
            if end < segment.end:
                kept.append(_Segment(end, segment.end, segment.write, segment.reads))
        self._replace(first, last, kept)

    def _span(self, start: int, end: int) -> tuple[int, int]:
        """Slice indices of the segments that share a byte with [start, end)."""
        first = bisect_right(self._starts, start) - 1
        if first < 0 or self._segments[first].end <= start:
            first += 1
        return first, bisect_left(self._starts, end, lo=first)

    def _replace(self, first: int, last: int, kept: list[_Segment]) -> None:
        self._segments[first:last] = kept
        self._starts[first:last] = [segment.start for segment in kept]

    @staticmethod
    def _conflicts(
        segment: _Segment, low: int, high: int, operation: Operation, writes: bool, clock: Clock, found: dict
    ) -> None:
        rivals = [(segment.write, True)] if segment.write is not None else []
        if writes:
            rivals += [(read, False) for read in segment.reads.values()]
        for rival, rival_writes in rivals:
            if rival.before(clock):
                continue
            key = (rival.number, rival_writes)
            known = found.get(key)
            begin = low if known is None else known.start
            found[key] = Violation(rival, rival_writes, operation, writes, begin, high)
