"""The execution order of one network: learned once, followed every pass, and survived when a pass does not keep to it.

Problem: prefetching needs to know what fires next. Passes mostly repeat each other exactly, but blocks are skipped
(DeepCache, conditional branches), repeated, or reordered for a while. Others learned the order once and broke when it
changed (peers.md, 4). So: the order is a *cycle* of unit numbers; `advance` finds where in the cycle a firing unit stands,
jumping if it must; and an order other than the learned one replaces it only when two complete passes in a row agree on
it, so that one odd pass costs a few misses and not the order.

A unit may occur several times in the cycle. Unit numbers are opaque. Caller: `network`, under the mover's lock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable


class ExecutionOrder:
    """A cyclic order of unit numbers and a position in it (the occurrence that fired last, -1 before the first)."""

    def __init__(self, sequence: Iterable[int] = ()) -> None:
        self._candidate: tuple[int, ...] | None = None
        self._fired: list[int] = []
        self.learn(sequence)

    def learn(self, sequence: Iterable[int]) -> None:
        """Replace the cycle; the position goes back before its start."""
        self.sequence: tuple[int, ...] = tuple(sequence)
        self._places: dict[int, list[int]] = {}
        for place, unit in enumerate(self.sequence):
            self._places.setdefault(unit, []).append(place)
        self.position = -1

    def __len__(self) -> int:
        return len(self.sequence)

    def __contains__(self, unit: int) -> bool:
        return unit in self._places

    def begin_pass(self) -> None:
        """A pass starts: the next unit expected is the first of the cycle, whatever fired last."""
        self._fired.clear()
        self.position = -1

    def advance(self, unit: int) -> bool:
        """`unit` fires. Moves the position to its next occurrence in the cycle; True when that was the very next one.

        A unit that is not in the cycle leaves the position where it is and answers False.
        """
        self._fired.append(unit)
        expected = self.position + 1
        if expected == len(self.sequence):
            expected = 0
        if expected < len(self.sequence) and self.sequence[expected] == unit:
            self.position = expected
            return True
        places = self._places.get(unit)
        if places is not None:
            later = bisect_right(places, self.position)
            self.position = places[later] if later < len(places) else places[0]
        return False

    def follow(self, steps: int) -> None:
        """The same as `advance` for each of the first `steps` units of the cycle, in a pass in which nothing has fired yet."""
        self._fired.extend(self.sequence[:steps])
        self.position = steps - 1

    def ahead(self, steps: int) -> int:
        """The unit `steps` occurrences after the position (1 = the next), wrapping round the cycle."""
        return self.sequence[(self.position + steps) % len(self.sequence)]

    def end_pass(self, complete: bool = True) -> bool:
        """A pass ended; `complete` unless an exception or interrupt cut it short. True when the cycle was replaced."""
        fired = tuple(self._fired)
        self._fired.clear()
        if not complete or not fired or fired == self.sequence:
            self._candidate = None if fired == self.sequence else self._candidate
            return False
        if fired == self._candidate:
            self._candidate = None
            self.learn(fired)
            return True
        self._candidate = fired
        return False
