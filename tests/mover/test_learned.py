"""What is kept of a learning pass: times only ever get smaller, and a new order keeps every resident in it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.learned import Learned


def learned(steps: list[tuple[int, float]], lead: float = 0.0) -> Learned:
    first: dict[int, int] = {}
    for place, (unit, _) in enumerate(steps):
        first.setdefault(unit, place)
    return Learned(tuple(steps), lead, 1e9, first, 0)


def test_the_smaller_of_two_measurements_counts() -> None:
    base = learned([(0, 3.0), (1, 1.0), (0, 2.0)], lead=1.0)
    better = base.refined(0.5, [(0, 2.0), (1, 4.0), (0, 1.0)])
    assert better.steps == ((0, 2.0), (1, 1.0), (0, 1.0))
    assert better.lead_seconds == 0.5


def test_a_pass_that_fired_others_says_nothing() -> None:
    base = learned([(0, 3.0), (1, 1.0)])
    assert base.refined(0.0, [(0, 0.1), (2, 0.1)]) is base
    assert base.refined(0.0, [(1, 0.1), (0, 0.1)]) is base


def test_what_is_measured_between_two_streamed_units_is_shared_out_over_the_residents_there() -> None:
    base = learned([(9, 1.0), (0, 4.0), (1, 2.0), (0, 2.0), (8, 2.0)], lead=1.0)
    better = base.refined(1.0, [(0, 3.0), (0, 2.0)])
    assert better.steps == ((9, 0.5), (0, 2.0), (1, 1.0), (0, 1.0), (8, 1.0))
    assert better.lead_seconds == 0.5
    slower = base.refined(1.0, [(0, 12.0), (0, 2.0)])
    assert slower.steps == ((9, 0.5), (0, 4.0), (1, 2.0), (0, 1.0), (8, 1.0))  # each the smaller one


def test_times_of_another_size_give_way() -> None:
    base = learned([(0, 4.0), (1, 2.0)], lead=1.0)
    larger = base.refined(4.0, [(0, 16.0), (1, 9.0)], known=False)
    assert (larger.lead_seconds, larger.steps) == (4.0, ((0, 16.0), (1, 9.0)))
    assert base.refined(1.0, [(0, 4.1), (1, 2.0)], known=False) is base


def test_times_that_are_remembered_and_a_link() -> None:
    base = learned([(0, 4.0), (1, 2.0)])
    assert base.timed(1.0, ((0, 1.0), (1, 3.0))).steps == ((0, 1.0), (1, 3.0))
    assert base.timed(1.0, ((1, 1.0), (0, 3.0))) is base
    assert base.linked(None) is base
    assert base.linked(1.04e9) is base
    assert base.linked(2e9).bandwidth == 2e9


def test_reordered_keeps_residents_behind_what_they_followed() -> None:
    base = learned([(9, 0.9), (0, 0.1), (8, 0.8), (1, 0.2), (7, 0.7), (2, 0.3)])
    other = base.reordered([2, 0, 0, 5], frozenset({7, 8, 9}))
    assert [unit for unit, _ in other.steps] == [9, 2, 0, 8, 0, 5, 7]
    assert dict(other.steps)[5] == 0.0
    assert other.first == {9: 0, 2: 1, 0: 2, 8: 3, 5: 5, 7: 6}


timed = st.tuples(st.integers(0, 9), st.floats(0.0, 1.0))


@given(st.lists(timed, min_size=1, max_size=20), st.lists(st.integers(0, 9), max_size=20), st.data())
def test_reordering_loses_no_resident(steps: list[tuple[int, float]], streamed: list[int], data: st.DataObject) -> None:
    units = sorted({unit for unit, _ in steps})
    resident = frozenset(data.draw(st.lists(st.sampled_from(units), unique=True)))
    order = [unit for unit in streamed if unit not in resident]
    other = learned(steps).reordered(order, resident)
    assert [unit for unit, _ in other.steps if unit not in resident] == order
    assert {unit for unit, _ in other.steps if unit in resident} == {unit for unit, _ in steps if unit in resident}


class Sized:
    def __init__(self, index: int, nbytes: int) -> None:
        self.index, self.nbytes, self.must_reside = index, nbytes, False


def test_a_little_of_the_budget_stays_free_for_residents_that_grow() -> None:
    mib = 1 << 20
    units = [Sized(index, mib) for index in range(64)]
    base = learned([(index, 1e-3) for index in range(64)])
    plan = base.plan(units, 32 * mib, 0, 0)
    held = len(plan.resident) * mib + plan.ring_bytes
    assert plan.budget_bytes == 32 * mib
    assert 64 * 1024 <= plan.budget_bytes - held < 2 * mib
    least = base.plan(units, 2 * mib, 0, 0)
    assert (least.ring_bytes, least.budget_bytes, least.notes) == (2 * mib, 2 * mib, ())
    assert base.plan(units, 64 * mib, 0, 0).resident == frozenset(range(64))
