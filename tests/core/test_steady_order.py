"""What a steady pass comes to: the same as asking the ring each time, and one wait per batch suffices and costs nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.places import assign_offsets
from lib_async_lowvram.core.ring import Ring
from lib_async_lowvram.core.states import AT_ONCE, transition
from lib_async_lowvram.core.steady import steady_order

STEP = 512


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[int], dict[int, int], dict[int, int], int]:
    """(order, offsets, sizes, ring's size), as a plan has them."""
    sizes = draw(st.lists(st.integers(0, 40).map(lambda n: STEP * n), min_size=2, max_size=16))
    nbytes = dict(enumerate(sizes))
    order = draw(st.permutations(list(nbytes)))
    ring_bytes = max(2 * max(sizes), STEP) + STEP * draw(st.integers(0, 60))
    return order, assign_offsets(order, nbytes, ring_bytes), nbytes, ring_bytes


def overlap(one: int, other: int, offsets: dict[int, int], nbytes: dict[int, int]) -> bool:
    return offsets[one] < offsets[other] + nbytes[other] and offsets[other] < offsets[one] + nbytes[one]


@given(rings())
def test_followed_for_three_passes(layout: tuple[list[int], dict[int, int], dict[int, int], int]) -> None:
    order, offsets, nbytes, ring_bytes = layout
    count = len(order)
    steady = steady_order(order, offsets, nbytes, ring_bytes)
    if steady is None:
        ring = Ring(offsets, nbytes, ring_bytes)  # which must be because all stay
        assert all(not ring.occupy(unit) for unit in order)
        return
    assert sum(steady.batches) == count and 0 < steady.ahead < count
    ring = Ring(offsets, nbytes, ring_bytes)
    for unit in order[: steady.ahead]:
        ring.occupy(unit)  # raises where there is no room
    issued = steady.ahead
    for step in range(3 * count):
        unit = order[step % count]
        assert unit in ring.live, "never missing"
        ring.vacate(unit, "consumer", step)
        batch = [order[(issued + each) % count] for each in range(steady.batches[step % count])]
        for number, arriving in enumerate(batch):
            # The wait for this last use, with which the batch begins, costs nothing: the first of the batch that takes any room has to.
            if not any(nbytes[each] for each in batch[:number]) and nbytes[arriving]:
                assert overlap(arriving, unit, offsets, nbytes)
            ring.occupy(arriving)
        issued += len(batch)
        following = order[issued % count]
        assert issued - step == count or not ring.is_free(following), "nor later than could be"
    assert issued == 3 * count + steady.ahead


def test_what_is_not_steady() -> None:
    nbytes, offsets = {0: STEP, 1: STEP, 2: STEP}, {0: 0, 1: STEP, 2: 0}
    assert steady_order((0, 1, 2), offsets, nbytes, 2 * STEP) is not None
    assert steady_order((), offsets, nbytes, 2 * STEP) is None
    assert steady_order((0, 1, 0, 2), offsets, nbytes, 2 * STEP) is None, "a unit that is used twice"
    assert steady_order((0, 1, 3), offsets, nbytes, 2 * STEP) is None, "a unit that has no place"
    assert steady_order((0, 1), offsets, nbytes, 2 * STEP) is None, "all stay"


@pytest.mark.parametrize(("start", "end"), AT_ONCE)
def test_states_changed_at_once_are_changes_in_turn(start, end) -> None:
    for state in (*AT_ONCE[start, end], end):
        start = transition(start, state)
    assert start is end


def test_the_ring_goes_on_from_what_others_kept_account_of() -> None:
    nbytes, offsets = {0: STEP, 1: STEP, 2: 2 * STEP, 3: 0}, {0: 0, 1: STEP, 2: 0, 3: 0}
    ring = Ring(offsets, nbytes, 2 * STEP)
    ring.occupy(0)
    ring.vacate(0, "consumer", "old")
    ring.restore([1, 3], {"consumer": "used", "write-back": "written"})
    assert ring.live_bytes == STEP and set(ring.live) == {1, 3} and ring.blockers(2) == [1] and ring.is_free(0)
    assert ring.fences() == {"consumer": "used", "write-back": "written"}
    assert set(ring.occupy(0)) == {"used", "written"}
    assert not ring.fences()
    ring.vacate(1, "consumer", "later")
    assert ring.blockers(2) == [0]
