"""What the rules for residents propose for several ring sizes, and what each is estimated to take.

Rules and sizes are tried on a coarse grid, then the best pairs with sizes near theirs. Pure. Caller: `core.plan`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.search import Stretch

FINER = (0.85, 0.92, 1.08, 1.17)
"""Times the ring sizes of the best pairs."""

RULES = 3
"""Tried with every size; the others are variants."""

ENOUGH = 3
"""Sets that are fast enough, after which no more are looked for; not one, since their places in the ring may still cost time."""


class Proposals:
    """`held`: residents in every set. `room`: bytes for the others and the ring. `ring_sizes`: to try, bytes; `finer`: others near
    them, too. `estimate`: residents -> seconds, infinite where the ring cannot carry the rest. `enough`: seconds at which a search
    may end."""

    def __init__(
        self,
        workload: Workload,
        held: frozenset[int],
        room: int,
        ring_sizes: Sequence[int],
        finer: bool,
        estimate: Callable[[frozenset[int]], float],
        enough: float,
    ) -> None:
        self._nbytes = workload.nbytes
        self._held = held
        self._room = room
        self._ring_sizes = ring_sizes
        self._finer = finer
        self._estimate = estimate
        self._enough = enough
        self._reached = 0
        self._others = [unit for unit in workload.nbytes if unit not in held]
        stretch = Stretch(workload, self._others)
        self._rules: tuple[Callable[[int, int], set[int]], ...] = (
            lambda space, ring_bytes: stretch.quiet_stretches(space, ring_bytes // 2),
            stretch.in_pace,
            lambda space, ring_bytes: stretch.level(space),
            # Variants of the first, for the sizes that did best.
            lambda space, ring_bytes: stretch.quiet_stretches(space, ring_bytes // 4),
            lambda space, ring_bytes: stretch.quiet_stretches(space, ring_bytes),
        )
        self.seconds = math.inf
        """Of the best."""
        self._found: dict[frozenset[int], float] = {}
        self._tried: dict[tuple[int, int], float] = {}  # (ring size asked for, number of the rule) -> seconds

    def ranked(self) -> list[tuple[float, frozenset[int]]]:
        """(seconds, residents), the best first."""
        return sorted(((seconds, resident) for resident, seconds in self._found.items() if seconds < math.inf), key=lambda each: each[0])

    def look(self) -> None:
        """Every rule with some sizes, then the best rules with finer ones."""
        for ring_bytes in reversed(self._ring_sizes):  # what reaches the limit with a large ring has time to spare
            for rule in range(RULES):
                self._try(ring_bytes, rule)
        for ring_bytes, _ in self._best():
            for rule in range(RULES, len(self._rules)):
                self._try(ring_bytes, rule)
        if self._finer:
            for ring_bytes, rule in self._best():
                for factor in FINER:
                    self._try(int(ring_bytes * factor), rule)

    def look_as(self, other: Proposals) -> None:
        """Only what was best there, and the first size, which works if any does."""
        for ring_bytes, rule in [*other._best(), *((size, 0) for size in self._ring_sizes[:1])]:
            self._try(ring_bytes, rule)

    def _best(self) -> list[tuple[int, int]]:
        return sorted(self._tried, key=self._tried.__getitem__)[:2]

    def _try(self, ring_bytes: int, rule: int) -> None:
        if (ring_bytes, rule) in self._tried or self._reached == ENOUGH:
            return
        large = [unit for unit in self._others if 2 * self._nbytes[unit] > ring_bytes]  # no ring of this size carries them
        space = self._room - ring_bytes - sum(self._nbytes[unit] for unit in large)
        if space < 0:
            return
        resident = self._held.union(large, self._rules[rule](space, ring_bytes))
        if resident not in self._found:
            self._found[resident] = self._estimate(resident)
            self.seconds = min(self.seconds, self._found[resident])
            self._reached += self._found[resident] <= self._enough
        self._tried[ring_bytes, rule] = self._found[resident]
