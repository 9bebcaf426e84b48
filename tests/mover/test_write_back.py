"""Changes made in the middle of a forward: they reach the master once, before anybody reads it, and nothing is overwritten."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, ObligingStreams, attached, call, judged, pair, recorded, same, simulated
from tests.mover.changes import assign, give_bias, halve, replace

EVERYTHING = 1 << 20


def to_half(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight.half()


CHANGES = [halve, replace, assign, give_bias, to_half]


@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_forward_is_written_back_once(change: Callable[[Leaf], None], budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    for leaf in (net.leaves[3], twin.leaves[3]):
        leaf.inside = change
    for _ in range(4):
        same(net, twin, streams)
        status = mover.status()  # under way by the pass's end, and once
        assert status["write_backs"] + status["adopted"] == 1
    assert status["placement_faults"] == 0
    mover.drain()
    for (name, mine), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
        assert not streams.owns(mine.data_ptr())
    streams.check()
    mover.detach()


@pytest.mark.parametrize("leafwise", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_inside_a_learning_pass(change: Callable[[Leaf], None], leafwise: bool) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(NetworkSpec([Region(leaf) for leaf in net.leaves], net) if leafwise else net, streams, passes=0)
    for leaf in (net.leaves[3], twin.leaves[3]):
        leaf.inside = change
    same(net, twin, streams)
    for (name, mine), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert streams.allocated_bytes == 0
    for _ in range(2):
        same(net, twin, streams)
    streams.check()
    mover.detach()


def test_a_master_is_true_right_after_a_learning_pass() -> None:
    streams = simulated(ObligingStreams)
    net, twin = pair()
    mover = attached(net, streams, passes=0)
    net.leaves[5].inside = twin.leaves[5].inside = halve
    with torch.no_grad():
        twin(torch.ones(1, 8))
    with streams.hold_copies("offload") as streams.hold:
        call(net, streams)
        assert torch.equal(net.leaves[5].weight, twin.leaves[5].weight)
    streams.hold = None
    mover.detach()


def test_a_bias_removed_inside_forward_stays_removed() -> None:
    streams = recorded()
    net, twin = pair()
    for chain in (net, twin):
        give_bias(chain.leaves[2])
    mover = attached(net, streams)
    for leaf in (net.leaves[2], twin.leaves[2]):
        leaf.inside = lambda leaf: setattr(leaf, "bias", None)
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["adopted"] == 1
    mover.detach()
    assert net.leaves[2].bias is None


def test_a_slot_is_not_overwritten_under_the_write_back_that_reads_it() -> None:
    # Leaf 0 fires twice in a row: changed in its first use, written back and kept; clean in its second, then its slot is vacated.
    streams = recorded()
    net, twin = pair(lambda: Chain(6, [0, 0, 1, 2, 3, 4, 5]))
    mover = attached(net, streams)
    net.leaves[0].inside = twin.leaves[0].inside = halve
    same(net, twin, streams)
    mover.drain()
    assert torch.equal(net.leaves[0].weight, twin.leaves[0].weight)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("changed", [False, True])
def test_a_kept_copy_is_fetched_again_behind_its_use_and_its_write_back(changed: bool) -> None:
    # Leaf 0 fires twice in a row and is kept in between, when somebody tells of a change. What its first use left under way - the
    # reading of the slot, and the write-back to the master where it was changed - comes before the second copy.
    streams = recorded()
    net, twin = pair(lambda: Chain(6, [0, 0, 1, 2, 3, 4, 5]))
    mover = attached(net, streams)
    if changed:
        net.leaves[0].inside = twin.leaves[0].inside = halve
    before = mover.status()["refetches"]
    handle = net.leaves[0].register_forward_hook(lambda leaf, *_: None if mover.mark_dirty(leaf) else None)
    same(net, twin, streams)
    handle.remove()
    assert mover.status()["refetches"] > before
    same(net, twin, streams)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("then", [1, 2, 3, 4, 5])
def test_a_changed_copy_that_was_kept_in_vain_gives_way_behind_its_write_back(then: int, poison: bool) -> None:
    streams = recorded(poison=poison)
    net, twin = pair(lambda: Chain(6, [0, 0, 1, 2, 3, 4, 5]))
    mover = attached(net, streams)
    net.leaves[0].inside = twin.leaves[0].inside = halve
    net.order = twin.order = [0, then, 5, 4, 3, 2, 1]
    for _ in range(2):
        same(net, twin, streams)
    streams.check()
    mover.detach()


def test_an_onload_waits_for_the_write_back_from_another_place() -> None:
    # Leaf 2 is called from within leaf 0 while that one stands in its place: it gets a block of its own and is changed there.
    # Its next onload goes to its place in the ring, whose fences know nothing of that block.
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)
    for chain in (net, twin):
        chain.leaves[0].register_forward_pre_hook(lambda _, args, other=chain.leaves[2]: (other(args[0]),))
        chain.leaves[2].inside = halve
    same(net, twin, streams)
    assert mover.status()["write_backs"] == 1
    same(net, twin, streams)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("poison", [True, False])
@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [0, 0, 1, 1, 2, 3, 3, 4, 5, 5], [0, 1, 0, 2, 3, 2, 4, 5, 4]])
def test_every_use_changed(order: list[int], budget: int, poison: bool) -> None:
    streams = recorded(poison=poison)
    net, twin = pair(lambda: Chain(6, order))
    mover = attached(net, streams, budget)
    for chain in (net, twin):
        for leaf in chain.leaves:
            leaf.register_forward_pre_hook(lambda leaf, _: leaf.weight.mul_(0.9))
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["write_backs"] >= 3 * len(net.leaves)
    streams.check()
    mover.detach()


def test_a_master_read_between_passes_is_true() -> None:
    streams = simulated(ObligingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    net.leaves[5].inside = twin.leaves[5].inside = halve
    with torch.no_grad():
        twin(torch.ones(1, 8))
    with streams.hold_copies("offload") as streams.hold:
        call(net, streams)
        seen = net.leaves[5].weight.clone()
    streams.hold = None
    assert torch.equal(seen, twin.leaves[5].weight)
    mover.detach()


def test_a_change_between_passes_is_not_overwritten_by_a_write_back() -> None:
    streams = simulated(ObligingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    net.leaves[5].inside = twin.leaves[5].inside = halve
    with torch.no_grad():
        twin(torch.ones(1, 8))
        with streams.hold_copies("offload") as streams.hold:
            call(net, streams)
            net.leaves[5].weight.mul_(3.0)
            twin.leaves[5].weight.mul_(3.0)
    streams.hold = None
    same(net, twin, streams)
    mover.detach()


def test_the_wait_at_a_passs_end_is_counted_apart() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams)
    call(net, streams)
    assert (mover.status()["host_waits"], mover.status()["write_back_waits"]) == (0, 0)
    net.leaves[1].inside = halve
    call(net, streams)
    call(net, streams)
    assert (mover.status()["host_waits"], mover.status()["write_back_waits"]) == (0, 1)
    mover.detach()


def test_a_change_through_data_that_was_told_of_is_written_back() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, EVERYTHING)
    net.leaves[4].weight.data.mul_(2.0)  # on the device; nothing counts it
    assert mover.mark_dirty(net.leaves[4])
    twin.leaves[4].weight.data.mul_(2.0)
    mover.drain()
    assert torch.equal(net.leaves[4].weight, twin.leaves[4].weight)
    assert not mover.mark_dirty(twin.leaves[4])
    mover.detach()


def test_a_host_change_through_data_that_was_told_of_is_fetched() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    for chain in (net, twin):
        chain.leaves[0].weight.data.mul_(2.0)
    mover.mark_dirty(net.leaves[0])  # its onload for the next pass is under way
    same(net, twin, streams)
    assert mover.status()["refetches"] == 1
    mover.detach()


@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES, EVERYTHING])
def test_weights_written_while_the_network_is_left_travel_once(budget: int) -> None:
    """A checkpoint loaded in place writes every master before the next pass."""
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)
    counts = []
    for factor in (None, 0.5, None):
        mover.drain()
        if factor is not None:
            with torch.no_grad():
                for parameter in (*net.parameters(), *twin.parameters()):
                    parameter.mul_(factor)
        before = mover.status()
        same(net, twin, streams)
        after = mover.status()
        counts.append({key: after[key] - before[key] for key in ("refetches", "adopted", "write_backs", "streamed_bytes")})
    assert counts[0] == counts[1] == counts[2]
    assert counts[1]["refetches"] == 0
    assert counts[1]["streamed_bytes"] > 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("always", [False, True])
def test_a_resident_changed_between_passes_and_again_in_the_next(always: bool) -> None:
    """Its write-back may still read it when the pass changes it."""
    streams = recorded(bandwidth=1e6)
    net, twin = pair()
    mover = attached(net, streams, 1 << 20, always_write_back=always)
    same(net, twin, streams)
    for model in (net, twin):
        with torch.no_grad(), judged(streams):
            model.leaves[1].weight.mul_(0.5)  # on the device, where there is no drain before
        model.leaves[1].inside = lambda leaf: leaf.weight.mul_(0.5)
    same(net, twin, streams)
    mover.drain()
    assert torch.equal(net.leaves[1].weight, twin.leaves[1].weight)
    mover.detach()
    streams.check()
