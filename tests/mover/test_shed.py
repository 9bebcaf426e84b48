"""Memory runs out in the middle of a pass: residents are given up, the pass can be tried again, and what was given up comes back."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_async_lowvram import AsyncModelMover
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, attached, call, on_thread, pair, same, simulated

RING = 2 * LEAF_BYTES


def rigged(budget: int = 5 * LEAF_BYTES, **settings: object) -> tuple[SimulatedStreams, Chain, Chain, AsyncModelMover]:
    streams = simulated(**settings)
    net, twin = pair()
    return streams, net, twin, attached(net, streams, budget)


def starved(streams: SimulatedStreams) -> Callable[[Leaf], None]:
    """What a leaf calls whose activations need all that is free, and a leaf's weights more."""

    def inside(leaf: Leaf) -> None:
        streams.free(streams.allocate(streams.free_memory() + LEAF_BYTES))

    return inside


@pytest.mark.parametrize("place", range(6))
def test_the_same_pass_goes_through_with_less(place: int) -> None:
    streams, net, twin, mover = rigged(capacity_bytes=8 * LEAF_BYTES)
    held = streams.allocated_bytes
    net.leaves[place].inside = starved(streams)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, streams)
    assert streams.allocated_bytes == held  # a pass that failed keeps what it has
    assert mover.shed("net") == held - RING
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    same(net, twin, streams)
    assert streams.allocated_bytes == RING
    status = mover.status()
    assert (status["ring_bytes"], status["resident_bytes"], status["sheds"], status["state"]) == (RING, 0, 1, "active")
    assert mover.shed("net") == 0  # there is nothing left to give up
    assert streams.allocated_bytes == RING
    mover.drain()
    same(net, twin, streams)
    same(net, twin, streams)
    assert streams.allocated_bytes == held
    mover.detach()
    assert streams.allocated_bytes == 0


def test_what_was_changed_before_memory_ran_out_is_kept() -> None:
    streams, net, twin, mover = rigged(capacity_bytes=8 * LEAF_BYTES)
    for model in (net, twin):
        for place in (0, 1, 2):
            model.leaves[place].inside = lambda leaf: leaf.weight.mul_(0.5)
    net.leaves[3].inside = starved(streams)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, streams)
    assert mover.shed("net") > 0
    with torch.no_grad():
        expected = twin(torch.ones(1, 8))
    assert torch.equal(call(net, streams), expected)
    mover.detach()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_there_is_nothing_to_give_up() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 5 * LEAF_BYTES, passes=0)
    assert mover.shed("net") == 0  # it has not learned
    assert mover.shed("another") == 0
    same(net, twin, streams)
    same(net, twin, streams)
    assert on_thread(lambda: mover.shed("net")) > 0  # no pass is open
    same(net, twin, streams)
    inside: list[int] = []
    net.leaves[2].inside = lambda leaf: inside.append(on_thread(lambda: mover.shed("net")))
    mover.drain()
    same(net, twin, streams)
    assert inside == [0]  # another thread is in the middle of a pass
    mover.detach()


def test_where_all_of_it_is_resident() -> None:
    streams, net, twin, mover = rigged(budget=1 << 20, capacity_bytes=16 * LEAF_BYTES)
    assert mover.shed("net") == 6 * LEAF_BYTES - RING
    same(net, twin, streams)
    same(net, twin, streams)
    assert streams.allocated_bytes == RING
    mover.detach()
