"""Keeping a time budget: how many repeats fit, and which rows, before they are measured.

Problem: a benchmark on a borrowed machine ends when the machine's time does, and what was not written then is lost. So what is
to be measured is estimated from warm-up passes, and shortened in this order: rounds, passes per round, rows (the dearest
first; never those that the others are judged by). Whatever was left out is told, in words, in the JSON.

Pure, but for the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

LEAST_PASSES = 2


class Deadline:
    """`seconds` from now; None: as long as it takes."""

    def __init__(self, seconds: float | None) -> None:
        self._end = None if seconds is None else perf_counter() + seconds

    def left(self) -> float:
        """Seconds; infinite where there is no deadline, negative when it is past."""
        return float("inf") if self._end is None else self._end - perf_counter()

    def part(self, share: float) -> Deadline:
        """A share of what is left."""
        return Deadline(None if self._end is None else max(0.0, share * self.left()))


@dataclass(frozen=True)
class Costed:
    """A row to be measured. `seconds`: of a pass, as estimated. `settling`: passes before the timed ones, in every round.
    `needed`: others are judged by it."""

    key: str
    seconds: float
    settling: int
    needed: bool


@dataclass(frozen=True)
class Fit:
    """What will be measured. `dropped`: one line for everything that will not."""

    rounds: int
    passes: int
    keys: tuple[str, ...]
    dropped: tuple[str, ...]


def fit(rows: Sequence[Costed], rounds: int, passes: int, seconds: float) -> Fit:
    """As much as fits into `seconds`; at least one round of `LEAST_PASSES` (or `passes`, if that is less) of the needed rows."""
    kept = list(rows)
    wanted_rounds, wanted_passes = rounds, passes

    def cost() -> float:
        return rounds * sum((row.settling + passes) * row.seconds for row in kept)

    while rounds > 1 and cost() > seconds:
        rounds -= 1
    while passes > LEAST_PASSES and cost() > seconds:
        passes -= 1
    dropped = []
    while cost() > seconds and (spare := [row for row in kept if not row.needed]):
        dearest = max(spare, key=lambda row: row.seconds)
        kept.remove(dearest)
        dropped.append(f"{dearest.key}: no time for it ({dearest.seconds:.2f} s per pass)")
    told = []
    if rounds < wanted_rounds:
        told.append(f"rounds: {rounds} instead of {wanted_rounds}")
    if passes < wanted_passes:
        told.append(f"passes per round: {passes} instead of {wanted_passes}")
    return Fit(rounds, passes, tuple(row.key for row in kept), tuple(told + dropped))
