"""The pipeline as arithmetic: what one steady pass takes for a given resident set and ring.

Problem: a plan must be judged before it is used, and a measured pass afterwards. This plays the mover's own rules - onloads
in execution order on one copy stream, a unit's slot free once every unit that overlaps it has been released, lookahead
wrapping into the next pass, a unit whose next use is already within the lookahead kept instead of copied again - with
numbers instead of streams.

Model: a copy of n bytes takes `copy_overhead_seconds + n / bandwidth`; it starts when the copy stream is free and its slot
is; step k computes for `seconds[k]` once its unit is there. Seconds, bytes, bytes per second. Pure; no torch.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from lib_async_lowvram.core.places import overlaps, steps_back


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


@dataclass(frozen=True)
class Streamed:
    """The streamed steps of a workload under a resident set; what the residents compute is given to the streamed step before
    them, since nothing else can happen in between.

    Attributes:
        units: in firing order. computes: seconds of each, what follows it included. copies: seconds of each one's copy.
        lead_seconds: computing before the first.
    """

    units: list[int]
    computes: list[float]
    copies: list[float]
    lead_seconds: float

    @classmethod
    def of(cls, workload: Workload, resident: Container[int]) -> Streamed:
        units: list[int] = []
        seconds: list[float] = [workload.lead_seconds]
        for unit, step in workload.steps:
            if unit in resident:
                seconds[-1] += step
            else:
                units.append(unit)
                seconds.append(step + workload.step_overhead_seconds)
        rate, overhead, nbytes = workload.bandwidth, workload.copy_overhead_seconds, workload.nbytes
        return cls(units, seconds[1:], [overhead + nbytes[unit] / rate for unit in units], seconds[0])


def play(copies: Sequence[float], computes: Sequence[float], back: Sequence[int], lead_seconds: float, passes: int, counted: int) -> float:
    """Seconds per pass, over the last `counted` of `passes`, when each step's copy waits for the one before it and for the
    release `back[i]` steps ago. With r(i) the release of step i, e(i) the end of its copy, c and s seconds of copying and
    computing:

        e(i) = max(e(i - 1), r(i - back(i))) + c(i)        r(i) = max(r(i - 1), e(i)) + s(i)
    """
    released = [0.0] * len(copies)
    now = copied = ended = 0.0
    place = len(copies)
    for turn in range(passes):
        if turn == passes - counted:
            ended = now
        now += lead_seconds
        for copy, compute, steps in zip(copies, computes, back):  # noqa: B905 - equally long, and this is the innermost loop
            free = released[place - steps]
            copied = (free if free > copied else copied) + copy
            if copied > now:
                now = copied
            now += compute
            released.append(now)
            place += 1
    return (now - ended) / counted


def simulate(workload: Workload, resident: frozenset[int], offsets: Mapping[int, int], ring_bytes: int, passes: int = 4) -> Prediction:
    """Play `passes` passes and average the second half. `offsets`: every streamed unit's place in the ring."""
    streamed = Streamed.of(workload, resident)
    units = streamed.units
    if not units:
        return Prediction(workload.compute_seconds, 0.0, 0.0)
    if len(set(units)) == len(units):
        back = steps_back(units, workload.nbytes, offsets, ring_bytes)
        if any(steps < len(units) for steps in back):
            seconds = play(streamed.copies, streamed.computes, back, streamed.lead_seconds, passes, passes // 2)
            stalled = seconds - streamed.lead_seconds - sum(streamed.computes)
            return Prediction(seconds, max(0.0, stalled), float(sum(workload.nbytes[unit] for unit in units)))
    return _simulate_repeats(workload, streamed, offsets, passes)


def _simulate_repeats(workload: Workload, streamed: Streamed, offsets: Mapping[int, int], passes: int) -> Prediction:
    """Where a unit fires more than once, or everything fits the ring: then a copy may serve several firings."""
    nbytes = workload.nbytes
    steps = list(zip(streamed.units, streamed.computes, streamed.copies, strict=True))
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
            unit, _, copy = steps[issued % count]
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
                copy_free = start + copy
                copied += nbytes[unit]
                ready[unit] = copy_free
                pending[unit] = 1
            issued += 1

    for turn in range(passes):
        now += streamed.lead_seconds
        for place, (unit, seconds, _) in enumerate(steps):
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
