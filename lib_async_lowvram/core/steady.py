"""A steady pass: how many onloads follow each release, when nothing happens but what happened in the pass before.

Problem: which onload the next release makes room for is found by looking who stands in whose place, hundreds of times a pass;
and the answer is the same in every pass that keeps to the order. So it is found once, here, and looked up from then on.

A steady pass waits for one event per batch. An onload was not possible before the release that it follows, so the unit that has
just left stood in its place, or in that of an onload before it in the same batch; and the copy stream does everything in order.
So a wait for that last use alone puts every onload of the batch behind all that were before, at no cost in time.

Pure. Caller: `steady`, under the mover's lock.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lib_async_lowvram.core.ring import Ring

PASSES = 6
"""After so many it has become periodic, or is left alone. (One fills the ring, another shows that nothing changes any more.)"""


@dataclass(frozen=True)
class SteadyOrder:
    """`ahead`: onloads of a pass that were issued before it began. `batches`: for each step, how many follow its release, in the cyclic
    order; their sum is the number of steps."""

    ahead: int
    batches: tuple[int, ...]


def steady_order(sequence: Sequence[int], offsets: Mapping[int, int], nbytes: Mapping[int, int], ring_bytes: int) -> SteadyOrder | None:
    """What passes over `sequence` come to, with each unit in its place in the ring. Offsets and sizes in bytes.

    None where there is no such thing: a unit is used twice in a pass, has no place, or all stay, so that nothing is onloaded.
    """
    count = len(sequence)
    if not count or len(set(sequence)) < count or any(unit not in offsets for unit in sequence):
        return None
    ring = Ring({unit: offsets[unit] for unit in sequence}, nbytes, ring_bytes)
    issued = 0  # steps from the next one to be used

    def issue() -> int:
        nonlocal issued
        before = issued
        while issued < count and ring.is_free(unit := sequence[(step + issued) % count]):
            ring.occupy_free(unit)
            issued += 1
        return issued - before

    step = 0
    issue()
    last: SteadyOrder | None = None
    for _ in range(PASSES):
        ahead, batches = issued, []
        for step in range(1, count + 1):
            if issued == count:
                return None
            issued -= 1
            ring.vacate(sequence[step - 1], None, None)
            batches.append(issue())
        found = SteadyOrder(ahead, tuple(batches))
        if found == last:
            return found
        last = found
    return None
