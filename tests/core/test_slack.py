"""Plans that hold when computing is quicker than measured: what they gain, and that they cost nothing."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.floor import floor_seconds
from lib_async_lowvram.core.pipeline import Workload, simulate
from lib_async_lowvram.core.plan import GRAIN, Plan, least_budget, make_plan
from lib_async_lowvram.core.slack import AS_FAST, make_plan_with_slack
from tests.core.test_plan import check, workloads
from tests.core.unet_shapes import SD15, SDXL, Architecture, Tape

FOURTH = [(SD15, 512, 9.3e12), (SDXL, 1024, 12e12)]
SMALL = 1 << 20


def faster(load: Workload, share: float) -> Workload:
    return replace(load, steps=tuple((unit, seconds * share) for unit, seconds in load.steps), lead_seconds=load.lead_seconds * share)


def played(load: Workload, plan: Plan) -> float:
    return simulate(load, plan.resident, plan.offsets, plan.ring_bytes).seconds


def slow_link(architecture: Architecture, pixels: int, speed: float) -> tuple[Workload, int]:
    """Nine tenths of the weights on the device, and a link that needs four times the computing for all of them."""
    load = Tape(architecture).run(pixels).workload(speed)
    return replace(load, bandwidth=load.bandwidth / 4), load.total_bytes * 9 // 10


@pytest.mark.parametrize(("architecture", "pixels", "speed"), FOURTH)
def test_computing_may_be_quicker_than_measured(architecture: Architecture, pixels: int, speed: float) -> None:
    load, budget = slow_link(architecture, pixels, speed)
    quick = faster(load, 0.8)
    floor = floor_seconds(quick, budget)
    fastest = make_plan(load, budget, small_unit_bytes=SMALL)
    plan = make_plan_with_slack(load, budget, small_unit_bytes=SMALL)
    check(load, plan, budget)
    assert played(quick, fastest) > 1.05 * floor, "else this says nothing"
    assert played(quick, plan) < 1.01 * floor
    assert plan.prediction.seconds < fastest.prediction.seconds * (1 + AS_FAST)
    assert plan.prediction.seconds == played(load, plan)
    assert plan.prediction.streamed_bytes < fastest.prediction.streamed_bytes


@pytest.mark.parametrize(("architecture", "pixels", "speed"), FOURTH)
def test_searches_again_only_where_there_is_something_to_gain(
    architecture: Architecture, pixels: int, speed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches: list[Plan] = []

    def counted(*args: Any, **kwargs: Any) -> Plan:
        searches.append(make_plan(*args, **kwargs))
        return searches[-1]

    monkeypatch.setattr("lib_async_lowvram.core.slack.make_plan", counted)
    slow, budget = slow_link(architecture, pixels, speed)
    make_plan_with_slack(slow, budget, small_unit_bytes=SMALL)
    assert len(searches) == 2
    searches.clear()
    # Where the link is the bottleneck, nothing can be spared; hooks cost what they cost.
    balanced = replace(slow, bandwidth=slow.bandwidth * 4)
    hooked = replace(balanced, step_overhead_seconds=0.4 * balanced.compute_seconds / len(balanced.steps))
    cases = ((slow, 10), (slow, 50), (slow, 70), (balanced, 10), (balanced, 25), (balanced, 90), (hooked, 90))
    for number, (load, share) in enumerate(cases, 1):
        budget = load.total_bytes * share // 100
        assert make_plan_with_slack(load, budget, small_unit_bytes=SMALL) == searches[-1]
        assert len(searches) == number


def test_costs_nothing() -> None:
    draw = random.Random(0)
    taken = 0
    for _ in range(300):
        count = draw.randint(4, 12)
        nbytes = {unit: GRAIN * draw.choice((1, 2, 3, 5, 8, 13, 30, 60)) for unit in range(count)}
        steps = tuple((unit, draw.choice((0.1, 1.0, 1.0, 3.0, 10.0))) for unit in range(count))
        balanced = sum(nbytes.values()) / sum(seconds for _, seconds in steps)
        load = Workload(steps, nbytes, bandwidth=balanced * draw.choice((0.5, 1.0, 2.0)), copy_overhead_seconds=0.01)
        budget = int(least_budget(load) + draw.random() * (load.total_bytes - least_budget(load))) // GRAIN * GRAIN
        lookahead = draw.choice((0, budget // 2))
        fastest = make_plan(load, budget, lookahead_bytes=lookahead)
        plan = make_plan_with_slack(load, budget, lookahead_bytes=lookahead)
        check(load, plan, budget)
        assert plan.prediction.seconds <= fastest.prediction.seconds * (1 + AS_FAST)
        if lookahead:
            assert plan.ring_bytes == fastest.ring_bytes
        taken += plan.resident != fastest.resident
    assert taken >= 10


@given(workloads(), st.integers(0, 800 * GRAIN), st.sampled_from([0, 0, 1, 5 * GRAIN, 1 << 30]), st.sampled_from([0, 3 * GRAIN, 1 << 20]))
def test_a_plan_as_any_other(load: Workload, wish: int, lookahead: int, small: int) -> None:
    plan = make_plan_with_slack(load, wish, lookahead_bytes=lookahead, small_unit_bytes=small)
    check(load, plan, wish)
    fastest = make_plan(load, wish, lookahead_bytes=lookahead, small_unit_bytes=small)
    if plan.ring_bytes:
        assert plan.prediction.seconds == played(load, plan)
    assert (plan.budget_bytes, plan.notes, plan.limit_seconds) == (fastest.budget_bytes, fastest.notes, fastest.limit_seconds)


@pytest.mark.parametrize("link", [0.25, 1.0, 4.0])
@pytest.mark.parametrize(("architecture", "pixels", "speed"), FOURTH)
def test_automatic_is_as_good_as_the_best_setting_by_hand(architecture: Architecture, pixels: int, speed: float, link: float) -> None:
    """Both sliders at 0: all of the budget there is, and a ring as large as is best. Within 3% of any other ring, and of less memory."""
    load = Tape(architecture).run(pixels).workload(speed)
    load = replace(load, bandwidth=load.bandwidth * link)
    for share in (25, 60):
        budget = load.total_bytes * share // 100
        automatic = make_plan_with_slack(load, budget, small_unit_bytes=SMALL).prediction.seconds
        rings = [(budget, megabytes << 20) for megabytes in (64, 112, 192, 320)]
        by_hand = [*rings, (budget * 9 // 10, 0), (budget * 9 // 10, 128 << 20)]
        times = [make_plan(load, least, lookahead_bytes=ring, small_unit_bytes=SMALL).prediction.seconds for least, ring in by_hand]
        assert automatic <= 1.03 * min(times), (share, automatic, times)
        assert link >= 1 or max(times) > 1.05 * automatic  # and not because all are equally good
