"""The pipeline's arithmetic, against cases worked out by hand and a clock that ticks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.pipeline import Workload, simulate


def workload(steps: list[tuple[int, float]], nbytes: dict[int, int], rate: float = 100.0, **rest: float) -> Workload:
    return Workload(steps=tuple(steps), nbytes=nbytes, bandwidth=rate, **rest)


def test_all_resident_is_only_computing() -> None:
    prediction = simulate(workload([(0, 2.0), (1, 3.0)], {0: 100, 1: 100}, lead_seconds=0.5), frozenset({0, 1}), {}, 0)
    assert (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes) == (5.5, 0.0, 0)


def test_what_fits_the_ring_entirely_is_kept() -> None:
    prediction = simulate(workload([(0, 1.0), (1, 1.0)], {0: 100, 1: 100}), frozenset(), {0: 0, 1: 100}, 200)
    assert (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes) == (2.0, 0.0, 0)


SLOTS = {0: 0, 1: 100, 2: 0}
"""Three units of 100 bytes in a ring of two: 0 and 2 take turns in one place."""


def test_three_units_in_two_slots() -> None:
    # 0 ends at t+1, then 2 is copied while 1 computes; 2 ends at t+3, then 0 is copied and nothing computes.
    prediction = simulate(workload([(0, 1.0), (1, 1.0), (2, 1.0)], dict.fromkeys(range(3), 100)), frozenset(), SLOTS, 200)
    assert (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes) == (4.0, 1.0, 300)


def test_lead_hides_a_copy() -> None:
    load = workload([(0, 1.0), (1, 1.0), (2, 1.0)], dict.fromkeys(range(3), 100), lead_seconds=2.0)
    prediction = simulate(load, frozenset(), SLOTS, 200)
    assert (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes) == (5.0, 0.0, 300)


def test_a_copy_costs_its_overhead() -> None:
    load = workload([(0, 1.0), (1, 1.0), (2, 1.0)], dict.fromkeys(range(3), 100), copy_overhead_seconds=0.5)
    # 2's copy takes 1.5 s behind 0's end while 1 computes 1 s; 0's takes 1.5 s behind 2's end; then 1's ends 1.5 s later.
    prediction = simulate(load, frozenset(), SLOTS, 200)
    assert prediction.seconds == pytest.approx(3.0 + 0.5 + 1.5 + 0.5)
    assert prediction.stall_seconds == pytest.approx(2.5)


def test_a_streamed_step_costs_its_overhead() -> None:
    load = workload([(0, 1.0), (1, 1.0), (3, 1.0), (2, 1.0)], dict.fromkeys(range(4), 100), step_overhead_seconds=0.25)
    prediction = simulate(load, frozenset({3}), SLOTS, 200)  # three of the four are streamed; behind the last, one copy is waited for
    assert (prediction.seconds, prediction.stall_seconds) == (4.0 + 3 * 0.25 + 1.0, 1.0)


def test_a_resident_computes_while_the_next_one_is_copied() -> None:
    load = workload([(0, 1.0), (1, 1.0), (3, 5.0), (2, 1.0)], {**dict.fromkeys(range(3), 100), 3: 10_000})
    prediction = simulate(load, frozenset({3}), SLOTS, 200)
    assert (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes) == (9.0, 1.0, 300)


def test_the_limit_is_the_larger_of_computing_and_copying() -> None:
    load = workload([(0, 1.0), (1, 1.0)], {0: 300, 1: 500}, fixed_bytes=100)
    assert load.total_bytes == 900
    assert load.limit_seconds(100) == 8.0
    assert load.limit_seconds(800) == 2.0


class Ticking:
    """The same rules, one second at a time: an engine, a computer, and the queue between them."""

    def __init__(self, load: Workload, resident: frozenset[int], offsets: dict[int, int]) -> None:
        self.sizes = load.nbytes
        self.streamed = [unit for unit, _ in load.steps if unit not in resident]
        self.seconds: list[int] = []
        self.lead = load.lead_seconds
        for unit, seconds in load.steps:
            if unit not in resident:
                self.seconds.append(seconds + load.step_overhead_seconds)
            elif self.seconds:
                self.seconds[-1] += seconds
            else:
                self.lead += seconds
        self.cost = {unit: load.copy_overhead_seconds + load.nbytes[unit] / load.bandwidth for unit in self.streamed}
        self.offsets = offsets

    def clash(self, one: int, other: int) -> bool:
        mine = set(range(self.offsets[one], self.offsets[one] + self.sizes[one]))
        return one != other and bool(mine & set(range(self.offsets[other], self.offsets[other] + self.sizes[other])))

    def run(self, passes: int) -> tuple[float, float, float]:
        count = len(self.streamed)
        wanted: list[int] = []  # firings issued and not over, by number
        queue: list[list] = []  # [unit, seconds of copying left]
        ends, stalls, copied = [0], [0], [0]
        firing = issued = stalled = moved = now = 0
        left, rest = 0, self.lead  # seconds left of what computes; before the next firing may start
        computing = False
        while firing < passes * count:
            if computing and not left:
                computing = False
                wanted.remove(firing)
                firing += 1
                rest = self.lead if firing % count == 0 else 0
            # issue -> start -> issue, until nothing more happens at this instant
            finished = not computing and firing and firing % count == 0 and len(ends) == firing // count
            while True:
                while issued < (firing + 1 if computing else firing) + count:
                    unit = self.streamed[issued % count]
                    live = {self.streamed[number % count] for number in wanted}
                    if unit not in live:
                        if any(self.clash(unit, other) for other in live):
                            break
                        queue.append([unit, self.cost[unit]])
                        moved += self.sizes[unit]
                    wanted.append(issued)
                    issued += 1
                if finished:
                    ends.append(now)
                    stalls.append(stalled)
                    copied.append(moved)
                    finished = False
                ready = not any(unit == self.streamed[firing % count] for unit, _ in queue)
                if computing or rest or not ready or firing == passes * count:
                    break
                computing, left = True, self.seconds[firing % count]
            if firing == passes * count:
                break
            if computing:
                left -= 1
            elif rest:
                rest -= 1
            else:
                stalled += 1
            if queue:
                queue[0][1] -= 1
                if not queue[0][1]:
                    queue.pop(0)
            now += 1
        half = passes // 2
        return tuple((series[passes] - series[passes - half]) / half for series in (ends, stalls, copied))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Workload, frozenset[int], dict[int, int], int]:
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    units = range(len(sizes))
    steps = draw(st.lists(st.tuples(st.sampled_from(units), st.integers(1, 4)), min_size=1, max_size=8))
    resident = frozenset(draw(st.sets(st.sampled_from(units), max_size=2)))
    ring = 2 * max(sizes) + draw(st.integers(0, 6))
    offsets = {unit: draw(st.integers(0, ring - sizes[unit])) for unit in units if unit not in resident}
    load = Workload(
        steps=tuple(steps),
        nbytes=dict(enumerate(sizes)),
        bandwidth=1.0,
        copy_overhead_seconds=draw(st.integers(0, 2)),
        step_overhead_seconds=draw(st.integers(0, 1)),
        lead_seconds=draw(st.integers(0, 3)),
    )
    return load, resident, offsets, ring


@given(cases(), st.integers(2, 6))
def test_against_a_clock_that_ticks(case: tuple[Workload, frozenset[int], dict[int, int], int], passes: int) -> None:
    load, resident, offsets, ring = case
    prediction = simulate(load, resident, offsets, ring, passes)
    found = (prediction.seconds, prediction.stall_seconds, prediction.streamed_bytes)
    if all(unit in resident for unit, _ in load.steps):
        assert found == (load.compute_seconds, 0.0, 0.0)
    else:
        assert found == pytest.approx(Ticking(load, resident, offsets).run(passes), rel=1e-12)
