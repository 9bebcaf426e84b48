"""The search for a resident set: rules that come near, then small changes that help.

Problem: which units should stay on the device has no closed answer; trying all sets is for a dozen of units. Two things decide
(DESIGN.md, Why this plan): where the link is the bottleneck, the copy engine must never wait for a free place, so what streams
should be what computes long per byte; where computing is, each copy must be done in time, and lookahead carries only a ring's
worth of bytes through a stretch that computes little.

- `quiet_stretches`: resident is what lies where, over about half a ring of bytes, little is computed per byte. Good when the
  link is the bottleneck.
- `in_pace`: a leaky bucket, filled by computing at a steady rate and never fuller than the lookahead; what the bucket can
  pay for streams, the rest is resident. The rate is the least at which the residents fit. Good near balance.
- `improve`: units join, leave or change places, drawn at random from a fixed seed.

Everything is judged by `core.cycle.Cycle`. Pure; bytes and seconds. Caller: `core.plan`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence

from lib_async_lowvram.core.pipeline import Workload

RATES = 8
"""Halvings of the range of rates that `in_pace` looks through."""


class Stretch:
    """The units that may be resident or not, in order of first use, with what they weigh and compute."""

    def __init__(self, workload: Workload, units: Iterable[int]) -> None:
        wanted = set(units)
        seconds: dict[int, float] = dict.fromkeys(dict.fromkeys(unit for unit, _ in workload.steps if unit in wanted), 0.0)
        for unit, each in workload.steps:
            if unit in wanted:
                seconds[unit] += each
        self.units = list(seconds)
        self.silent = sorted(wanted - seconds.keys())  # they never fire in the learned order: worth no place
        self.nbytes = workload.nbytes
        self._workload = workload
        self._fits = wanted
        self._seconds = [seconds[unit] for unit in self.units]
        self._ends = [0]  # bytes up to and with each unit
        self._computed = [0.0]
        for unit in self.units:
            self._ends.append(self._ends[-1] + workload.nbytes[unit])
            self._computed.append(self._computed[-1] + seconds[unit])

    def quiet_stretches(self, room: int, span_bytes: int) -> set[int]:
        """Up to `room` bytes of residents. `span_bytes`: over how much the computing per byte is taken."""
        ends, computed, count = self._ends, self._computed, len(self.units)
        density = []
        low = high = 0
        for number in range(count):
            middle = (ends[number] + ends[number + 1]) // 2
            start, end = middle - span_bytes // 2, middle + span_bytes // 2
            while ends[low] < start:  # both grow with `middle`
                low += 1
            while high < count and ends[high + 1] <= end:
                high += 1
            first, after = min(low, number), max(high, number + 1)
            density.append((computed[after] - computed[first]) / ((ends[after] - ends[first]) or 1))
        return self.within(room, [self.units[number] for number in sorted(range(count), key=density.__getitem__)])

    def in_pace(self, room: int, ring_bytes: int) -> set[int]:
        """Up to `room` bytes of residents."""
        nbytes, wanted = self.nbytes, self._fits
        steps = [(unit, nbytes[unit] if unit in wanted else 0, seconds) for unit, seconds in self._workload.steps]
        lead, most = self._workload.lead_seconds, ring_bytes / 2

        def residents(rate: float) -> tuple[set[int], int]:
            credit = most
            for _ in range(2):  # the first time round finds the credit to begin with
                chosen: set[int] = set()
                held = 0
                credit = min(most, credit + rate * lead)
                for unit, size, seconds in steps:
                    if size <= credit:
                        credit -= size
                    elif unit not in chosen:
                        chosen.add(unit)
                        held += size
                    credit += rate * seconds
                    if credit > most:
                        credit = most
            return chosen, held

        low, high = self._workload.bandwidth / 64, self._workload.bandwidth * 1024
        best: set[int] = set()
        for _ in range(RATES):
            rate = (low * high) ** 0.5
            chosen, held = residents(rate)
            if held <= room:
                high, best = rate, chosen
            else:
                low = rate
        left = room - sum(nbytes[unit] for unit in best)
        return best | self.within(left, (unit for unit in self.units if unit not in best))

    def level(self, room: int) -> set[int]:
        """Up to `room` bytes of residents."""
        total, computed, nbytes = self._ends[-1], self._computed, self.nbytes
        share = (total - room) / (computed[-1] or 1.0)
        streamed, left = 0, room
        chosen: set[int] = set()
        for number, unit in enumerate(self.units):
            size = nbytes[unit]
            if size <= left and streamed + size > share * computed[number + 1]:
                chosen.add(unit)
                left -= size
            else:
                streamed += size
        return chosen

    def within(self, room: int, ranked: Iterable[int]) -> set[int]:
        """As many of the ranked as fit."""
        chosen: set[int] = set()
        for unit in ranked:
            size = self.nbytes[unit]
            if size <= room:
                chosen.add(unit)
                room -= size
        return chosen


def improve(
    start: frozenset[int],
    units: Sequence[int],
    judge: Callable[[frozenset[int]], float],
    tries: int,
    heat: float,
    enough: float,
    jumps: bool = False,
) -> list[frozenset[int]]:
    """The sets of residents that were the best so far, the last one first, in `tries` tries: up to three of `units` in, out or
    exchanged; `jumps`: now and then any of them at once, for few units. `judge`: seconds, infinite where a set is not allowed.
    Stops at `enough` seconds, or when all sets there are have been tried.

    Simulated annealing: a set that is worse by a share s is taken with probability exp(-s / heat), and the heat falls to 0.
    """
    draw = random.Random(0)
    known = {start: judge(start)}
    here = best = start
    bests: list[frozenset[int]] = []
    for number in range(tries if units else 0):
        if known[best] <= enough or len(known) == 1 << len(units):
            break
        if jumps and number % 3 == 0:
            odds = draw.random()
            tried = here.difference(units).union(unit for unit in units if draw.random() < odds)
        else:
            tried = here.symmetric_difference({draw.choice(units) for _ in range(draw.choice((1, 2, 2, 3)))})
        if tried not in known:
            known[tried] = judge(tried)
        worse = known[tried] / known[here] - 1.0
        if worse <= 0 or draw.random() < math.exp(-worse / (heat * (1 - number / tries))):
            here = tried
            if known[here] < known[best]:
                best = here
                bests.insert(0, best)
        elif draw.random() < 0.02:
            here = best
    return bests
