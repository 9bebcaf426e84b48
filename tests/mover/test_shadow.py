"""A shadow: the same network on another thread over the same masters, without a second copy and without touching the original."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.shadow import Shadow
from tests.mover.chains import LEAF_BYTES, Chain, X, attached, call, on_thread, pair, same, simulated


def shadow_of(mover: AsyncModelMover, net: nn.Module) -> Shadow:
    masters = mover.masters(["net"])
    return Shadow(net, lambda parameter: masters.get(id(parameter)))


def moved(mover: AsyncModelMover, shadow: Shadow, streams, budget: int = 1) -> AsyncModelMover:
    own = AsyncModelMover(OffloadConfig(budget_bytes=budget, small_leaf_bytes=0, check_placement=True), streams, host=mover.host)
    return own.attach({"shadow": NetworkSpec([Region(leaf) for leaf in shadow.module.leaves], span=shadow.module)})


@pytest.mark.parametrize("budget", [1, 1 << 20])
def test_the_same_result_on_another_thread_from_the_same_memory(budget: int) -> None:
    streams = simulated()
    sibling = streams.sibling()
    net, twin = pair()
    mover = attached(net, streams, budget)
    before = mover.host.host_bytes
    shadow = shadow_of(mover, net)
    own = moved(mover, shadow, sibling, budget)
    assert mover.host.host_bytes == before
    for mine, theirs in zip(shadow.module.parameters(), net.parameters(), strict=True):
        assert mine is not theirs
    seen = []

    def preview(_: nn.Module) -> None:
        # In the middle of the original's pass, on another thread.
        seen.append(on_thread(lambda: call(shadow.module, sibling)))

    with torch.no_grad():
        expected = twin(X)
    for _ in range(3):
        net.leaves[3].inside = preview
        same(net, twin, streams)
    assert all(torch.equal(got, expected) for got in seen) and len(seen) == 3
    assert own.status()["placement_faults"] == mover.status()["placement_faults"] == 0
    assert own.status()["write_backs"] + own.status()["adopted"] == 0
    own.close()
    assert sibling.allocated_bytes == 0
    same(net, twin, streams)
    mover.detach()
    sibling.close()


def test_each_device_counts_its_own_bytes_of_one_memory() -> None:
    streams = simulated(capacity_bytes=8 * LEAF_BYTES)
    sibling = streams.sibling()
    block = sibling.allocate(6 * LEAF_BYTES)
    assert (streams.allocated_bytes, sibling.allocated_bytes) == (0, 6 * LEAF_BYTES)
    assert streams.free_memory() == sibling.free_memory() == 2 * LEAF_BYTES
    with pytest.raises(torch.cuda.OutOfMemoryError):
        streams.allocate(3 * LEAF_BYTES)
    sibling.free(block)
    assert streams.free_memory() == 8 * LEAF_BYTES
    sibling.close()


def test_a_change_in_place_is_seen_and_a_replacement_is_told() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    mover.drain()
    shadow = shadow_of(mover, net)

    def holds() -> bool:
        masters = mover.masters(["net"])
        return shadow.holds(lambda parameter: masters.get(id(parameter)))

    assert holds()
    with torch.no_grad():
        net.leaves[1].weight.mul_(2)
    assert holds() and torch.equal(shadow.module.leaves[1].weight, net.leaves[1].weight)
    with torch.no_grad():
        net.leaves[2].weight = nn.Parameter(net.leaves[2].weight * 2, requires_grad=False)
    assert not holds()
    shadow = shadow_of(mover, net)
    assert torch.equal(shadow.module.leaves[2].weight, net.leaves[2].weight)
    mover.detach()


def test_hooks_and_methods_put_over_the_original_stay_there() -> None:
    streams = simulated()
    net, _ = pair()
    mover = attached(net, streams)
    net.leaves[0].forward = lambda x: (_ for _ in ()).throw(AssertionError("the original's"))
    shadow = shadow_of(mover, net)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in shadow.module.modules())
    assert "forward" not in vars(shadow.module.leaves[0])
    del net.leaves[0].forward
    mover.detach()


def test_what_has_no_master_cannot_be_shared() -> None:
    with pytest.raises(ValueError, match="no master"):
        Shadow(Chain(1), lambda parameter: None)


def test_nobody_else_shares_a_master() -> None:
    """A leaf given a Parameter over another leaf's master gets a copy: under stock, too, they part when they are moved."""
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    mover.drain()
    for each in (net, twin):
        shared = each.leaves[1].weight.data
        each.leaves[2].weight = nn.Parameter(shared if each is net else shared.clone(), requires_grad=False)

    def double(leaf: nn.Module) -> None:
        leaf.weight.mul_(2)

    net.leaves[2].inside = twin.leaves[2].inside = double
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()


def test_whose_masters_they_are_pins_and_unpins_them() -> None:
    """Or every job with previews would leave the VAE's masters unpinned."""
    streams = simulated()
    sibling = streams.sibling()
    net, _ = pair()
    mover = attached(net, streams)
    pinned = mover.host.pinned_bytes
    assert pinned == 6 * LEAF_BYTES
    own = moved(mover, shadow_of(mover, net), sibling)
    own.close()
    assert mover.host.pinned_bytes == pinned
    mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=1))
    call(net, streams)
    own = moved(mover, shadow_of(mover, net), sibling)
    assert mover.host.pinned_bytes == 0
    own.close()
    mover.detach()
    sibling.close()


@pytest.mark.parametrize("give_back", ["a lower limit", "detach"])
def test_masters_are_unpinned_when_nobody_copies_from_them(give_back: str) -> None:
    streams = RecordingStreams(simulated(bandwidth=1e6))
    sibling = streams.sibling()
    net, _ = pair()
    mover = attached(net, streams)
    shadow = shadow_of(mover, net)
    own = moved(mover, shadow, sibling)
    call(shadow.module, sibling)
    call(shadow.module, sibling)  # the onloads of the next pass are on their way
    if give_back == "detach":
        mover.detach()
    else:
        mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=1))
        call(net, streams)
    streams.check()
    own.close()
    mover.detach()
    sibling.close()
    streams.check()
