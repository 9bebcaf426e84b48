"""What the learning pass left on the device: taken over by the next pass without a copy, unless something happened to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, on_thread, pair, recorded, same, simulated

ROOMY = 1 << 20


def test_a_network_of_one_region_is_copied_once() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)
    same(net, twin, streams)
    assert streams.allocated_bytes == 6 * LEAF_BYTES
    same(net, twin, streams)
    status = mover.status()
    assert status["streamed_bytes"] == 0
    assert status["passes"] == 1
    mover.detach()
    assert streams.allocated_bytes == 0


def test_only_what_will_be_resident_is_kept_and_the_budget_holds() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 4 * LEAF_BYTES, passes=0)
    same(net, twin, streams)
    assert 0 < streams.allocated_bytes <= 4 * LEAF_BYTES
    for _ in range(2):
        same(net, twin, streams)
    assert mover.status()["peak_weight_bytes"] <= 4 * LEAF_BYTES
    mover.detach()


def test_of_several_regions_the_last_one_is_kept() -> None:
    streams = simulated()
    net, twin = pair()
    spec = NetworkSpec([Region(leaf) for leaf in net.leaves], span=net)
    mover = attached(spec, streams, ROOMY, run=net, passes=0)
    same(net, twin, streams)
    assert streams.allocated_bytes == LEAF_BYTES
    same(net, twin, streams)
    assert mover.status()["streamed_bytes"] == 5 * LEAF_BYTES
    mover.detach()


def test_a_change_in_the_learning_pass_is_kept_with_it() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)

    def add(leaf: nn.Module) -> None:
        leaf.weight += 1

    net.leaves[2].inside = twin.leaves[2].inside = add
    same(net, twin, streams)
    same(net, twin, streams)
    assert mover.status()["streamed_bytes"] == 0
    mover.detach()
    assert torch.equal(net.leaves[2].weight, twin.leaves[2].weight)


def test_what_was_written_on_the_host_meanwhile_is_copied_again() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)
    same(net, twin, streams)
    with torch.no_grad():
        for each in (net, twin):
            each.leaves[1].weight += 1
            each.leaves[4].weight = nn.Parameter(each.leaves[4].weight[:128] * 2, requires_grad=False)
            each.leaves[5].weight = nn.Parameter(torch.cat([each.leaves[5].weight] * 2), requires_grad=False)
    same(net, twin, streams)
    same(net, twin, streams)
    mover.detach()
    assert streams.allocated_bytes == 0


def test_nothing_is_kept_by_a_pass_that_was_cut_short_or_whose_network_is_left() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)

    def fail(_: nn.Module) -> None:
        raise KeyboardInterrupt

    net.leaves[3].inside = fail
    try:
        call(net, streams)
    except KeyboardInterrupt:
        pass
    mover.drain()
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    mover.drain()
    assert streams.allocated_bytes == 0
    same(net, twin, streams)
    mover.detach()


def test_a_device_that_got_fuller_meanwhile_gets_back_what_no_longer_fits() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)
    same(net, twin, streams)
    mover.configure(mover.config.__class__(budget_bytes=3 * LEAF_BYTES, small_leaf_bytes=0))
    same(net, twin, streams)
    assert streams.allocated_bytes <= 3 * LEAF_BYTES
    mover.detach()


def test_taken_over_on_another_thread_everything_is_ordered() -> None:
    streams = recorded()
    net, twin = pair(lambda: Chain(3))
    mover = attached(net, streams, ROOMY, passes=0)
    same(net, twin, streams)
    on_thread(lambda: same(net, twin, streams))
    with torch.no_grad():
        net.leaves[0].weight += 1
        twin.leaves[0].weight += 1
    same(net, twin, streams)
    mover.detach()
    streams.check()


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("grows", [False, True])
def test_what_is_kept_is_not_overwritten_while_the_learning_pass_reads_it(elsewhere: bool, grows: bool) -> None:
    """The master was changed on the host since: the copy kept is out of date, or too small, and freed."""
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, ROOMY, passes=0)
    same(net, twin, streams)
    for model in (net, twin):
        with torch.no_grad():
            model.leaves[2].weight.mul_(0.5)
            if grows:
                model.leaves[2].weight = nn.Parameter(torch.cat([model.leaves[2].weight] * 2))
    if elsewhere:
        on_thread(lambda: same(net, twin, streams))
    else:
        same(net, twin, streams)
    mover.detach()
    streams.check()
