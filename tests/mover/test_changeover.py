"""Another plan in the middle of a job: residents are shed at once and grow as they stream past, and nothing is copied twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover
from lib_async_lowvram.core.states import UnitState
from lib_async_lowvram.device.recorder import RecordingStreams
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, recorded, same, simulated

RING = 2 * LEAF_BYTES
SLOW = 2e7
"""Bytes per second: a copy takes longer than anything else here, so that every resident pays."""


def resident(mover: AsyncModelMover) -> set[int]:
    return {unit.index for unit in mover._networks["net"].contents.units if unit.resident and unit.state is UnitState.READY}


def change(mover: AsyncModelMover, leaves: int) -> None:
    """The budget of the network in use is another one now, as the automatic one may become between two passes."""
    mover._context.budget = lambda key: RING + leaves * LEAF_BYTES


DEVICES = {
    "jittery": lambda: simulated(bandwidth=SLOW, latency=1e-5, jitter_seconds=1e-4, seed=5),
    "recorded": lambda: recorded(bandwidth=SLOW),
}


@pytest.mark.parametrize("device", list(DEVICES))
def test_there_and_back(device: str) -> None:
    streams = DEVICES[device]()
    net, twin = pair()
    mover = attached(net, streams, RING + 2 * LEAF_BYTES, lookahead_bytes=RING)
    same(net, twin, streams)
    for leaves in (0, 3, 1, 3, 2, 0):
        change(mover, leaves)
        for _ in range(3):
            same(net, twin, streams)
            assert streams.allocated_bytes <= RING + leaves * LEAF_BYTES
        assert len(resident(mover)) == leaves
        before = mover.status()
        same(net, twin, streams)
        after = mover.status()
        assert after["streamed_bytes"] - before["streamed_bytes"] == (6 - leaves) * LEAF_BYTES
        assert after["misses"] == 0
    status = mover.status()
    assert status["replanned"] == 6
    assert status["learning_passes"] == 1
    assert status["placement_faults"] in (0, None)
    mover.drain()
    assert streams.allocated_bytes == 0
    mover.detach()
    if isinstance(streams, RecordingStreams):
        streams.check()


def test_nothing_is_copied_that_would_not_have_been() -> None:
    """Growing: every pass copies each unit at most once; from the second one on, residents not at all."""
    streams = simulated(bandwidth=SLOW)
    net, twin = pair()
    mover = attached(net, streams, RING, lookahead_bytes=RING)
    same(net, twin, streams)
    change(mover, 3)
    copied = []
    for _ in range(4):
        before = mover.status()["streamed_bytes"]
        same(net, twin, streams)
        copied.append((mover.status()["streamed_bytes"] - before) // LEAF_BYTES)
    # First all six stream for the last time, less what of the next pass is not prefetched any more; then the three arrive.
    assert sum(copied[:2]) <= 12
    assert copied[2:] == [3, 3]
    assert mover.status()["refetches"] == 0
    mover.detach()


def test_a_resident_that_was_changed_is_written_back_before_it_is_shed() -> None:
    streams = simulated(bandwidth=SLOW)
    net, twin = pair()
    mover = attached(net, streams, RING + 3 * LEAF_BYTES, lookahead_bytes=RING)
    same(net, twin, streams)
    with mover._context.checker.suspended() if mover._context.checker else torch.no_grad():
        for model in (net, twin):
            def double(leaf: nn.Module) -> None:
                with torch.no_grad():
                    leaf.weight.mul_(2.0)
                leaf.inside = None

            for leaf in model.leaves:
                leaf.inside = double
        same(net, twin, streams)
    change(mover, 0)
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["write_backs"] == 6
    mover.detach()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_was_changed_between_passes_and_is_shed_then_may_be_read_on_the_host_at_once() -> None:
    """Whoever reads the master in that pass, before the unit is used, reads what was written."""
    streams = recorded(bandwidth=SLOW)
    net, twin = pair()
    mover = attached(net, streams, RING + 3 * LEAF_BYTES, lookahead_bytes=RING)
    same(net, twin, streams)
    last = max(resident(mover))
    for model in (net, twin):
        with torch.no_grad():
            model.leaves[last].weight.mul_(0.5)
    change(mover, 0)
    read = []
    net.leaves[0].inside = lambda _: read.append(net.leaves[last].weight.clone())
    same(net, twin, streams)
    assert last > 0 and torch.equal(read[0], twin.leaves[last].weight)
    assert mover.status()["replanned"] == 1
    mover.detach()
    streams.check()


@pytest.mark.parametrize("device", list(DEVICES))
def test_the_first_that_is_also_the_last(device: str) -> None:
    """It has streamed for the last time after its first use, and is fetched again for its further ones (which make it the one to keep,
    whatever times were measured). It is not kept for the next
    pass as well, in which it is a resident: the ring would give its place away, and it would be nowhere."""
    streams = DEVICES[device]()
    net, twin = pair(lambda: Chain(order=[0, 1, 2, 3, 0, 4, 5, 0]))
    mover = attached(net, streams, RING, lookahead_bytes=RING)
    same(net, twin, streams)
    change(mover, 1)
    for model in (net, twin):
        model.order = [0, 1, 2, 3, 0, 4, 0]  # one is left out: what was issued ahead counts no longer
    same(net, twin, streams)
    streaming = mover._networks["net"].streaming
    assert streaming._changeover.grown == {0}
    assert 0 not in [unit.index for unit in streaming._slots.standing]
    for model in (net, twin):
        model.order = [0, 1, 2, 3, 0, 4, 5, 0]
    for _ in range(4):
        same(net, twin, streams)
    assert resident(mover) == {0} and mover.status()["state"] == "active"
    mover.detach()
    assert streams.allocated_bytes == 0
    if isinstance(streams, RecordingStreams):
        streams.check()


def test_no_room_to_grow() -> None:
    """Somebody else took the memory: what was shed stays shed, the job goes on, and the wish is not repeated at every pass."""
    streams = simulated(bandwidth=SLOW, capacity_bytes=RING + 3 * LEAF_BYTES)
    net, twin = pair()
    mover = attached(net, streams, RING, lookahead_bytes=RING)
    same(net, twin, streams)
    hog = streams.allocate(2 * LEAF_BYTES)
    change(mover, 3)
    for _ in range(4):
        same(net, twin, streams)
    assert len(resident(mover)) <= 1
    assert mover.status()["replanned"] <= 2
    streams.free(hog)
    mover.drain()
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    assert len(resident(mover)) == 3
    mover.detach()


def cut_short(_: nn.Module) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("at", [0, 2, 5])
@pytest.mark.parametrize("inside", [cut_short])
def test_a_pass_cut_short_while_growing(at: int, inside: Callable[[nn.Module], None]) -> None:
    streams = recorded(bandwidth=SLOW)
    net, twin = pair()
    mover = attached(net, streams, RING, lookahead_bytes=RING)
    same(net, twin, streams)
    change(mover, 3)
    net.leaves[at].inside = inside
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        call(net, streams)
    net.leaves[at].inside = None
    for _ in range(4):
        same(net, twin, streams)
    assert len(resident(mover)) == 3
    mover.detach()
    streams.check()


@pytest.mark.parametrize("device", list(DEVICES))
@pytest.mark.parametrize("order", [None, [0, 0, 1, 2, 2, 3, 4, 5]])
def test_while_every_use_changes_the_weights(device: str, order: list[int] | None) -> None:
    """Write-backs under way when a unit becomes a resident, or stops being one."""
    streams = DEVICES[device]()
    net, twin = pair(lambda: Chain(6, order))
    mover = attached(net, streams, RING + 2 * LEAF_BYTES, lookahead_bytes=RING)
    for chain in (net, twin):
        for leaf in chain.leaves:
            leaf.register_forward_pre_hook(lambda leaf, _: leaf.weight.mul_(0.9))
    for leaves in (0, 3, 1, 2, 0, 3):
        change(mover, leaves)
        for _ in range(3):
            same(net, twin, streams)
    assert mover.status()["replanned"] >= 4
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    mover.detach()
    if isinstance(streams, RecordingStreams):
        streams.check()


def test_room_to_grow_is_given_back_when_the_plan_changes_again() -> None:
    """A pass cut short leaves units with a block in reserve; the next plan does not want them."""
    streams = recorded(bandwidth=SLOW)
    net, twin = pair()
    mover = attached(net, streams, RING, lookahead_bytes=RING)
    same(net, twin, streams)
    change(mover, 3)
    net.leaves[0].inside = cut_short
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        call(net, streams)
    assert streams.allocated_bytes == RING + 3 * LEAF_BYTES
    change(mover, 0)
    for _ in range(3):
        same(net, twin, streams)
    assert streams.allocated_bytes == RING
    mover.detach()
    streams.check()
