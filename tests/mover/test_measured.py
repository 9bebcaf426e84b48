"""Passes of another size are other passes: their times are measured apart, kept, and recalled; the link's are those of large copies."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram.learned import Learned
from lib_async_lowvram.measured import LEAST_BYTES, Measured
from lib_async_lowvram.mover import AsyncModelMover
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, simulated

RING = 2 * LEAF_BYTES


def shape_of(mover: AsyncModelMover) -> tuple:
    return mover._networks["net"].planning._shape


def test_a_shape_is_followed_when_it_comes_twice_in_a_row() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING)
    assert shape_of(mover) == ((1, 8),)
    small, large = torch.ones(1, 8), torch.ones(5, 8)
    for x in (large, small, large, small):
        call(net, streams, x)
        assert shape_of(mover) == ((1, 8),)
    for _ in range(2):
        call(net, streams, large)
    assert shape_of(mover) == ((5, 8),)
    mover.detach()


def test_a_network_just_entered_follows_at_once() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING)
    mover.drain()
    call(net, streams, torch.ones(5, 8))
    assert shape_of(mover) == ((5, 8),)
    mover.detach()


def test_times_are_recalled_by_a_network_attached_anew() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, RING, passes=4)
    call(net, streams, torch.ones(1, 8))
    measured = mover._context.measured
    before = {key: kept for key, kept in measured._passes.items()}
    assert [key[1] for key in before] == [((1, 8),)]
    mover.detach()
    mover.attach({"again": twin})
    call(twin, streams)
    learned = mover._networks["again"].learned
    assert (learned.lead_seconds, learned.steps) == before[((LEAF_BYTES,) * 6, ((1, 8),))]
    mover.detach()


def test_other_times_are_not_mixed() -> None:
    """Each size has its own; a pass of an unknown size is timed the next time it comes."""
    streams = simulated()
    net, _ = pair(lambda: Chain(3))
    mover = attached(net, streams, RING, passes=4)
    for _ in range(4):
        call(net, streams, torch.ones(7, 8))
    assert {key[1] for key in mover._context.measured._passes} == {((1, 8),), ((7, 8),)}
    mover.detach()


def test_the_links_bandwidth_is_the_median_of_passes_that_copied_enough() -> None:
    measured = Measured()
    measured.copied(LEAST_BYTES - 1, 1.0)
    measured.copied(LEAST_BYTES, 0.0)
    assert measured.bandwidth is None
    for seconds in (1.0, 4.0, 2.0):
        measured.copied(LEAST_BYTES, seconds)
    assert measured.bandwidth == pytest.approx(LEAST_BYTES / 2.0)


def test_another_mover_may_be_given_what_is_known() -> None:
    streams = simulated()
    net, twin = pair()
    first = attached(net, streams, RING, passes=4)
    call(net, streams)
    first.detach()
    second = AsyncModelMover(first.config, streams)
    second.known = first.known
    second.attach({"net": twin})
    call(twin, streams)
    learned = second._networks["net"].learned
    assert (learned.lead_seconds, learned.steps) == first.known[0].recall(((LEAF_BYTES,) * 6, ((1, 8),)))
    second.detach()


def test_two_sizes_in_turn_are_planned_once_each(monkeypatch) -> None:
    """Hires fix: the network is left in between, and its plans come again with every picture."""
    monkeypatch.setattr(Learned, "refined", lambda self, *args, **kwargs: self)  # figures stay as they are
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams, RING, passes=4)
    planning = mover._networks["net"].planning
    monkeypatch.setattr(planning, "_read_clocks", lambda: None)
    made = []
    plan = type(planning.learned).plan
    monkeypatch.setattr(type(planning.learned), "plan", lambda *args: made.append(args) or plan(*args))
    for _ in range(3):
        for budget in (RING, RING + LEAF_BYTES):
            mover.drain()
            monkeypatch.setattr(mover._context, "budget", lambda key, budget=budget: budget)
            call(net, streams)
    assert len(made) == 1  # the first of the two was there already
    mover.detach()
