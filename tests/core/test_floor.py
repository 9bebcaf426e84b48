"""The floor: by hand, against every schedule there is on small cases, and under whatever the planner finds."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload, simulate
from lib_async_lowvram.core.plan import GRAIN, make_plan
from tests.core.test_plan import workloads
from tests.core.unet_shapes import SD15, SDXL, Architecture, Tape


def byte_load(sizes: list[int], seconds: list[int], lead: int = 0) -> Workload:
    """One byte travels in one second."""
    steps = tuple((unit, float(each)) for unit, each in enumerate(seconds))
    return Workload(steps, dict(enumerate(sizes)), bandwidth=1.0, lead_seconds=float(lead))


def test_a_long_stretch_with_few_weights_is_not_for_copying():
    """Eight seconds of computing use one byte; the eight bytes of the others cannot all come meanwhile: two fit beside that byte."""
    load = byte_load([1, 4, 4], [8, 1, 1])
    assert load.limit_seconds(3) == 10
    # From the start of the second step to that of the third 8 bytes are needed and 3 there: 5 seconds, in which 1 is computed.
    assert floor_seconds(load, 3) == 10 + 5 - 1
    assert floor_seconds(load, 9) == 10


def test_a_stretch_may_run_over_the_end_of_a_pass_and_what_lies_between_two_passes_computes_in_it():
    load = byte_load([4, 1, 4], [1, 8, 1])
    assert floor_seconds(load, 3) == 10 + 5 - 1
    assert floor_seconds(replace(load, lead_seconds=3.0), 3) == 13 + 5 - 1 - 3


def test_a_unit_that_fires_twice_travels_once():
    load = replace(byte_load([4, 4], [0, 0]), steps=((0, 0.0), (1, 0.0), (0, 0.0), (1, 0.0)))
    assert floor_seconds(load, 4) == 4


def test_what_must_reside_takes_its_share_of_the_budget():
    load = replace(byte_load([5, 4, 4], [1, 1, 1]), must_reside=frozenset({0}), fixed_bytes=1)
    assert floor_seconds(load, 8) == max(load.limit_seconds(8), 3 + 8 - 1 - 2)


def test_nothing_to_do():
    assert floor_seconds(Workload((), {0: 4}, bandwidth=1.0, lead_seconds=2.0), 0) == 2
    assert floor_seconds(byte_load([0, 0], [1, 2]), 0) == 3


# -- every schedule there is -----------------------------------------------------------------------------------------------
State = tuple[int, int, frozenset[int], tuple[int, int] | None]
"""Steps done, seconds left of the running one (0: not begun), units on the device, and (unit, seconds left) on the link."""


def subsets(units: frozenset[int]) -> Iterator[frozenset[int]]:
    for count in range(len(units) + 1):
        yield from map(frozenset, itertools.combinations(sorted(units), count))


def least_from(load: Workload, budget: int, first: int) -> int:
    """Seconds of one pass that begins with step `first`, with the best that can be on the device then, by trying everything: at every
    full second anything may be dropped that is not in use, and any copy begun that there is room for."""
    order = [load.steps[(first + number) % len(load.steps)] for number in range(len(load.steps))]
    lasts = [int(seconds) for _, seconds in order]
    size = {unit: int(nbytes) for unit, nbytes in load.nbytes.items()}
    every = frozenset(size)

    def weight(held: frozenset[int], link: tuple[int, int] | None) -> int:
        return sum(size[unit] for unit in held) + (size[link[0]] if link else 0)

    starts = {(0, 0, held, None) for held in subsets(every)}
    for held in subsets(every):
        starts |= {(0, 0, held, (unit, left)) for unit in every - held for left in range(1, size[unit])}
    frontier: set[State] = {state for state in starts if weight(state[2], state[3]) <= budget}
    seen: set[State] = set()
    for now in itertools.count():
        ready: set[State] = set()
        waiting = list(frontier)
        while waiting:  # what happens at this moment, before any second passes
            done, left, held, link = waiting.pop()
            if (done, left, held, link) in seen:
                continue
            seen.add((done, left, held, link))
            if done == len(order):
                return now
            ready.add((done, left, held, link))
            unit = order[done][0]
            if not left and unit in held:
                waiting.append((done, lasts[done], held, link) if lasts[done] else (done + 1, 0, held, link))
            for dropped in held - ({unit} if left else frozenset()):
                waiting.append((done, left, held - {dropped}, link))
            if link is None:
                for other in every - held:
                    if weight(held, None) + size[other] <= budget:
                        waiting.append((done, left, held, (other, size[other])))
        frontier = set()
        for done, left, held, link in ready:  # a second passes
            if link is not None:
                link = (link[0], link[1] - 1)
                if not link[1]:
                    held, link = held | {link[0]}, None
            if left == 1:
                frontier.add((done + 1, 0, held, link))
            else:
                frontier.add((done, left - 1 if left else 0, held, link))


def test_no_schedule_of_small_cases_beats_it_and_some_reach_it():
    draw = random.Random(0)
    reached = cases = 0
    for _ in range(60):
        count = draw.randint(2, 4)
        load = byte_load([draw.randint(1, 3) for _ in range(count)], [draw.randint(0, 3) for _ in range(count)])
        total = sum(load.nbytes.values())
        budget = draw.randint(max(load.nbytes.values()), total)
        floor = floor_seconds(load, budget)
        exact = max(least_from(load, budget, first) for first in range(count))
        assert floor <= exact, (load, budget)
        if floor > load.limit_seconds(budget):
            cases += 1
            reached += floor == exact
    # Units that weigh a byte or three arrive whole or not at all, which the floor does not ask for: few cases reach it.
    assert cases == 21 and reached == 5


# -- under the planner -------------------------------------------------------------------------------------------------------
PASSES = 64


@given(workloads(), st.integers(0, 800 * GRAIN))
def test_no_plan_beats_it(load: Workload, wish: int):
    plan = make_plan(load, wish)
    played = simulate(load, plan.resident, plan.offsets, plan.ring_bytes, passes=PASSES)
    # What stood in the ring when counting began was not copied in the counted half.
    saved = plan.ring_bytes / load.bandwidth / (PASSES // 2)
    assert played.seconds + saved >= floor_seconds(load, plan.budget_bytes) * (1 - 1e-9)
    assert floor_seconds(load, plan.budget_bytes) >= plan.limit_seconds


def exact(architecture: Architecture, link: float) -> Workload:
    pixels, flops = (512, 9.3e12) if architecture is SD15 else (1024, 12e12)
    balanced = Tape(architecture).run(pixels).workload(flops)
    return replace(balanced, bandwidth=balanced.bandwidth * link)


@pytest.mark.parametrize("architecture", [SD15, SDXL], ids=["sd15", "sdxl"])
@pytest.mark.parametrize("link", [0.25, 1, 4])
@pytest.mark.parametrize("percent", [10, 30, 50, 70, 90])
def test_on_exact_shapes_the_planner_comes_near_it(architecture: Architecture, link: float, percent: int):
    """So that what is missing to the limit is known to be the workload's, and not the planner's."""
    load = exact(architecture, link)
    plan = make_plan(load, load.total_bytes * percent // 100)
    floor = floor_seconds(load, plan.budget_bytes)
    assert 0.96 * plan.prediction.seconds <= floor <= plan.prediction.seconds * (1 + 1e-9)


def test_the_limit_is_out_of_reach_on_a_slow_link():
    """SD1.5 at 70% of its weights and a link that takes four passes for all of them: nobody gets within a sixth of the limit."""
    load = exact(SD15, 0.25)
    budget = load.total_bytes * 70 // 100
    assert load.limit_seconds(budget) / floor_seconds(load, budget) == pytest.approx(0.807, abs=0.002)
