"""The pipeline as arithmetic: what one steady pass takes for a given resident set and ring.

Problem: a plan must be judged before it is used, and a measured pass afterwards. This plays the mover's own rules - onloads
in execution order on one copy stream, a unit's slot free once every unit that overlaps it has been released, lookahead
wrapping into the next pass, a unit whose next use is already within the lookahead kept instead of copied again - with
numbers instead of streams.

Model: a copy of n bytes takes `copy_overhead_seconds + n / bandwidth`; it starts when the copy stream is free and its slot
is; step k computes for `seconds[k]` once its unit is there. Seconds, bytes, bytes per second. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from lib_async_lowvram.core.ring import overlaps


@dataclass(frozen=True)
class Workload:
    """One pass of a network, as numbers.

    Attributes:
        steps: (unit, seconds) for every firing in execution order; the seconds run from this unit's start to the next
            one's, so that work between leaves (attention, additions) is somebody's.
        nbytes: bytes of every unit, those that never fire included.
        must_reside: units that cannot stream (shared storage, nested in another unit, silent without an ancestor).
        fixed_bytes: device bytes that are neither resident units nor ring (buffers).
        bandwidth: of the link, host to device, bytes per second.
        copy_overhead_seconds: per copy, whatever its size.
        step_overhead_seconds: per firing of a streamed unit, where the host computes in step with the device, so that acquire
            and release cost compute time; 0 where the host runs ahead.
        lead_seconds: computing (or host time) between the last step of a pass and the first of the next.
    """

    steps: tuple[tuple[int, float], ...]
    nbytes: Mapping[int, int]
    bandwidth: float
    must_reside: frozenset[int] = frozenset()
    fixed_bytes: int = 0
    copy_overhead_seconds: float = 0.0
    step_overhead_seconds: float = 0.0
    lead_seconds: float = 0.0

    @property
    def total_bytes(self) -> int:
        """All weight bytes, fixed ones included."""
        return sum(self.nbytes.values()) + self.fixed_bytes

    @property
    def compute_seconds(self) -> float:
        """Seconds per pass with everything resident."""
        return self.lead_seconds + sum(seconds for _, seconds in self.steps)

    def limit_seconds(self, budget_bytes: int) -> float:
        """max(compute, (weights - budget) / bandwidth): no schedule is faster (DESIGN.md, Words: limit). Weights that neither
        fire nor must reside need not be on the device at all."""
        needed = {unit for unit, _ in self.steps} | self.must_reside
        weights = self.fixed_bytes + sum(self.nbytes[unit] for unit in needed)
        return max(self.compute_seconds, (weights - budget_bytes) / self.bandwidth)


@dataclass(frozen=True)
class Prediction:
    """Per steady pass: seconds, seconds of it stalled, bytes copied."""

    seconds: float
    stall_seconds: float
    streamed_bytes: float


def simulate(workload: Workload, resident: frozenset[int], offsets: Mapping[int, int], passes: int = 4) -> Prediction:
    """Play `passes` passes and average the second half. `offsets`: every streamed unit's place in the ring."""
    nbytes, rate, overhead = workload.nbytes, workload.bandwidth, workload.copy_overhead_seconds
    # Fold what the residents compute into the streamed step before them: nothing can happen in between.
    steps: list[list] = []
    lead = workload.lead_seconds
    for unit, seconds in workload.steps:
        if unit in resident:
            if steps:
                steps[-1][1] += seconds
            else:
                lead += seconds
        else:
            steps.append([unit, seconds + workload.step_overhead_seconds])
    if not steps:
        return Prediction(workload.compute_seconds, 0.0, 0.0)

    count = len(steps)
    neighbours = overlaps(offsets, nbytes)
    pending: dict[int, int] = {}  # live unit -> uses within the lookahead still to come
    ready: dict[int, float] = {}
    released: dict[int, float] = {}
    now = copy_free = stalled = 0.0
    issued = 0  # number of the next step to look at, counted over all passes
    copied = 0
    marks: list[tuple[float, float, int]] = [(0.0, 0.0, 0)]

    def issue(firing: int) -> None:
        nonlocal issued, copy_free, copied
        while issued < firing + count:
            unit = steps[issued % count][0]
            if unit in pending:
                pending[unit] += 1
            else:
                start = max(copy_free, released.get(unit, 0.0))
                for other in neighbours[unit]:
                    if other in pending:
                        return
                    freed = released.get(other, 0.0)
                    if freed > start:
                        start = freed
                copy_free = start + overhead + nbytes[unit] / rate
                copied += nbytes[unit]
                ready[unit] = copy_free
                pending[unit] = 1
            issued += 1

    for turn in range(passes):
        now += lead
        for place, (unit, seconds) in enumerate(steps):
            issue(turn * count + place)
            if ready[unit] > now:
                stalled += ready[unit] - now
                now = ready[unit]
            issue(turn * count + place + 1)
            now += seconds
            pending[unit] -= 1
            if not pending[unit]:
                del pending[unit]
                released[unit] = now
            issue(turn * count + place + 1)
        marks.append((now, stalled, copied))
    half = passes // 2
    first, last, span = marks[passes - half], marks[-1], half
    return Prediction((last[0] - first[0]) / span, (last[1] - first[1]) / span, (last[2] - first[2]) / span)
