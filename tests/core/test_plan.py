"""The planner: what it must never do on any workload, and how near it comes to known times on real architectures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.pipeline import Workload
from lib_async_lowvram.core.plan import GRAIN, Plan, least_budget, make_plan
from tests.core.unet_shapes import SD15, SDXL, Architecture, Tape


@st.composite
def workloads(draw: st.DrawFn, largest: int = 60) -> Workload:
    sizes = draw(st.lists(st.integers(0, largest), min_size=1, max_size=12))
    units = range(len(sizes))
    return Workload(
        steps=tuple(draw(st.lists(st.tuples(st.sampled_from(units), st.integers(0, 1000).map(lambda count: count * 1e-6)), max_size=24))),
        nbytes={unit: GRAIN * size for unit, size in zip(units, sizes, strict=True)},
        bandwidth=draw(st.sampled_from([1e5, 1e7, 1e9])),
        must_reside=frozenset(draw(st.sets(st.sampled_from(units), max_size=3))),
        fixed_bytes=GRAIN * draw(st.integers(0, 20)),
        copy_overhead_seconds=8e-6,
        lead_seconds=draw(st.sampled_from([0.0, 1e-3])),
    )


def check(load: Workload, plan: Plan, wish: int) -> None:
    nbytes, streamed = load.nbytes, set(load.nbytes) - plan.resident
    assert plan.budget_bytes == max(wish, least_budget(load))
    assert sum(nbytes[unit] for unit in plan.resident) + plan.ring_bytes + load.fixed_bytes <= plan.budget_bytes
    assert plan.resident >= load.must_reside
    assert plan.ring_bytes >= 2 * max((nbytes[unit] for unit in streamed), default=0)
    assert plan.ring_bytes % GRAIN == 0
    assert set(plan.offsets) == streamed
    for unit, offset in plan.offsets.items():
        assert offset % GRAIN == 0
        assert 0 <= offset <= plan.ring_bytes - nbytes[unit]
    assert plan.prediction.seconds >= load.compute_seconds - 1e-12
    assert plan.limit_seconds == load.limit_seconds(plan.budget_bytes)
    assert any("budget raised" in note for note in plan.notes) == (wish < least_budget(load))
    if load.total_bytes <= wish:
        assert plan.resident == frozenset(nbytes)
        assert plan.ring_bytes == 0


@given(workloads(), st.integers(0, 800 * GRAIN), st.sampled_from([0, 0, 1, 5 * GRAIN, 1 << 30]), st.sampled_from([0, 3 * GRAIN, 1 << 20]))
def test_invariants(load: Workload, wish: int, lookahead: int, small: int) -> None:
    check(load, make_plan(load, wish, lookahead_bytes=lookahead, small_unit_bytes=small), wish)


@given(workloads(), st.integers(-1, 1))
def test_a_budget_is_raised_exactly_below_the_least(load: Workload, beside: int) -> None:
    wish = max(0, least_budget(load) + beside)
    check(load, make_plan(load, wish), wish)


@given(workloads(largest=20_000), st.integers(0, 1 << 27), st.integers(1, 1 << 27))
def test_a_lookahead_wish_is_met_or_clamped_with_a_note(load: Workload, wish: int, lookahead: int) -> None:
    plan = make_plan(load, wish, lookahead_bytes=lookahead)
    check(load, plan, wish)
    if plan.ring_bytes:
        free = [size for unit, size in load.nbytes.items() if unit not in load.must_reside]
        room = plan.budget_bytes - load.fixed_bytes - sum(load.nbytes[unit] for unit in load.must_reside)
        met = 2 * max(free) <= lookahead <= room // GRAIN * GRAIN
        if met:
            assert 0 <= plan.ring_bytes - lookahead < GRAIN
        assert any("lookahead" in note for note in plan.notes) == (abs(plan.ring_bytes - lookahead) >= 1 << 20)


@given(workloads(), st.integers(0, 400 * GRAIN))
def test_small_units_come_first(load: Workload, wish: int) -> None:
    small = 4 * GRAIN
    plan = make_plan(load, wish, small_unit_bytes=small)
    if any(load.nbytes[unit] < small for unit in plan.offsets):
        # One was left out for want of room, so nothing larger was taken in its place.
        assert all(load.nbytes[unit] < small for unit in plan.resident - load.must_reside)


def test_least_budget() -> None:
    sizes = {0: 100, 1: 300, 2: 700, 3: 50, 4: 250}
    load = Workload(steps=(), nbytes=sizes, bandwidth=1.0, must_reside=frozenset({2, 3}), fixed_bytes=11)
    assert least_budget(load) == 11 + 750 + 2 * 300
    assert least_budget(Workload(steps=(), nbytes={0: 100, 1: 10}, bandwidth=1.0)) == 110  # all of it is less than two of the largest


def test_residents_are_those_that_would_stall() -> None:
    # Two that compute nothing, among four that compute as long as a copy takes: only with those two resident can the copies of
    # the others hide.
    size = 4 * GRAIN
    steps = tuple((unit, 0.0 if unit in (1, 2) else 1.0) for unit in range(6))
    plan = make_plan(Workload(steps=steps, nbytes=dict.fromkeys(range(6), size), bandwidth=size), 4 * size)
    assert plan.resident == frozenset({1, 2})
    assert (plan.prediction.seconds, plan.prediction.stall_seconds) == (4.0, 0.0)


KNOWN = [
    *((SD15, 512, 9.3e12, share, milliseconds) for share, milliseconds in ((10, 264), (25, 237), (30, 227), (50, 190), (70, 178))),
    *((SDXL, 1024, 12e12, share, milliseconds) for share, milliseconds in ((10, 1318), (25, 1152), (30, 1134))),
]


@pytest.mark.parametrize(("architecture", "parameters"), [(SD15, 859_520_964), (SDXL, 2_567_463_684)])
def test_the_shapes_are_those_of_the_published_models(architecture: Architecture, parameters: int) -> None:
    assert Tape(architecture).run(512).parameters == parameters


@pytest.mark.parametrize(("architecture", "pixels", "speed", "share", "milliseconds"), KNOWN)
def test_near_the_best_known_schedule(architecture: Architecture, pixels: int, speed: float, share: int, milliseconds: int) -> None:
    load = Tape(architecture).run(pixels).workload(speed)
    wish = load.total_bytes * share // 100
    plan = make_plan(load, wish, small_unit_bytes=1 << 20)
    check(load, plan, wish)
    assert plan.prediction.seconds <= 1.07 * milliseconds / 1000
    assert plan.prediction.seconds >= plan.limit_seconds * (1 - 1e-9)
