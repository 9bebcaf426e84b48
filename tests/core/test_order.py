"""The execution order: followed, resynchronised, and replaced only by what two passes in a row agree on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lib_async_lowvram.core.order import ExecutionOrder

sequences = st.lists(st.integers(0, 9), min_size=1, max_size=12)


def play(order: ExecutionOrder, units: list[int], complete: bool = True) -> list[bool]:
    order.begin_pass()
    followed = [order.advance(unit) for unit in units]
    order.end_pass(complete)
    return followed


@given(sequences)
def test_a_pass_that_keeps_to_the_order_is_followed_throughout(sequence: list[int]) -> None:
    order = ExecutionOrder(sequence)
    for _ in range(3):
        assert all(play(order, sequence))
    assert order.sequence == tuple(sequence)


@given(sequences, st.data())
def test_skipping_finds_the_way_back(sequence: list[int], data: st.DataObject) -> None:
    """After any skip the unit that fires is where the position stands, and the next one is expected."""
    order = ExecutionOrder(sequence)
    order.begin_pass()
    kept = data.draw(st.lists(st.sampled_from(range(len(sequence))), unique=True).map(sorted))
    for place in kept:
        order.advance(sequence[place])
        assert sequence[order.position] == sequence[place]
        assert order.ahead(1) == sequence[(order.position + 1) % len(sequence)]


@given(sequences, sequences)
def test_one_odd_pass_costs_nothing_and_two_equal_ones_teach(sequence: list[int], other: list[int]) -> None:
    order = ExecutionOrder(sequence)
    play(order, other)
    assert order.sequence == tuple(sequence)
    play(order, sequence)
    play(order, other)
    assert order.sequence == tuple(sequence)
    play(order, other)
    assert order.sequence == tuple(other)


@given(sequences, sequences)
def test_a_pass_cut_short_teaches_nothing(sequence: list[int], other: list[int]) -> None:
    order = ExecutionOrder(sequence)
    for _ in range(3):
        play(order, other, complete=False)
    assert order.sequence == tuple(sequence)


def test_an_unknown_unit_leaves_the_position() -> None:
    order = ExecutionOrder([1, 2, 3])
    order.begin_pass()
    order.advance(1)
    assert not order.advance(9)
    assert order.position == 0
    assert order.advance(2)


def test_ahead_wraps() -> None:
    order = ExecutionOrder([4, 5, 6])
    order.begin_pass()
    order.advance(6)
    assert [order.ahead(step) for step in (1, 2, 3, 4)] == [4, 5, 6, 4]


def test_repeated_units_are_told_apart_by_their_place() -> None:
    order = ExecutionOrder([1, 2, 1, 3])
    order.begin_pass()
    assert [order.advance(unit) for unit in (1, 2, 1, 3)] == [True] * 4
    assert order.position == 3


def test_an_empty_order() -> None:
    order = ExecutionOrder()
    order.begin_pass()
    assert not order.advance(1)
    assert len(order) == 0
    assert order.position == -1
