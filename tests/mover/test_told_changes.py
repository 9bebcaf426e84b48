"""Changes that leave no trace, told of by `mark_dirty`: whatever stands on the device then, or is on its way there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, recorded, same, simulated

ROOMY = 1 << 20
BUDGETS = [1, 4 * LEAF_BYTES, ROOMY]


def untraced(chain: Chain, place: int) -> None:
    version = chain.leaves[place].weight._version
    chain.leaves[place].weight.data.mul_(0.5)
    assert chain.leaves[place].weight._version == version


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("passes", [1, 2, 3])
@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize("place", [0, 3, 5])
def test_written_between_passes(place: int, drained: bool, passes: int, budget: int) -> None:
    # After one pass the learning pass's copies are kept for the next, if there is room: stale then.
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, budget, passes=passes)
    if drained:
        mover.drain()
    on_device = streams.owns(net.leaves[place].weight.data_ptr())
    for chain in (net, twin):
        untraced(chain, place)
    assert mover.mark_dirty(net.leaves[place])
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["write_backs"] == on_device  # told once; what the host wrote is never written back
    assert mover.status()["placement_faults"] == 0
    mover.detach()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("place", [0, 3, 5])
def test_written_inside_a_forward(place: int, budget: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget)

    def write(leaf: nn.Module) -> None:
        leaf.weight.data.mul_(0.5)

    twin.leaves[place].inside = write
    net.leaves[place].inside = lambda leaf: (write(leaf), mover.mark_dirty(leaf))
    for _ in range(3):
        same(net, twin, streams)
        assert mover.status()["write_backs"] == 1
    mover.drain()
    assert torch.equal(net.leaves[place].weight, twin.leaves[place].weight)
    streams.check()
    mover.detach()


class Skipping(nn.Module):
    """Its second half runs only when told so."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Chain(3), Chain(3)
        self.short = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x if self.short else self.second(x)


def test_residents_that_do_not_fire_are_there_all_the_same_and_carry_no_hooks() -> None:
    streams = recorded()
    net, twin = pair(Skipping)
    mover = attached(net, streams, ROOMY)
    mover.drain()
    for each in (net, twin):
        each.short = True
    same(net, twin, streams)
    assert all(streams.owns(parameter.data_ptr()) for parameter in net.parameters())
    assert not any(leaf._forward_pre_hooks for leaf in (*net.first.leaves, *net.second.leaves))
    with torch.no_grad():
        for each in (net, twin):
            each.second.leaves[1].weight.mul_(0.5)  # on the device, where it stands unused
    for each in (net, twin):
        each.short = False
    same(net, twin, streams)
    assert mover.status()["write_backs"] == 1
    mover.drain()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    streams.check()
    mover.detach()


@pytest.mark.parametrize("how", ["between", "inside"])
def test_a_unit_that_outgrew_its_place_gets_a_new_one_with_the_next_plan(how: str) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)

    def grow(leaf: nn.Module) -> None:
        leaf.weight = nn.Parameter(torch.cat([leaf.weight.data, leaf.weight.data]))

    for chain in (net, twin):
        if how == "inside":
            chain.leaves[3].inside = grow
        else:
            grow(chain.leaves[3])
    for _ in range(2):
        same(net, twin, streams)
    before = mover.status()
    for _ in range(3):
        call(net, streams)
    after = mover.status()
    assert after["misses"] == before["misses"]
    streamed = sum(not unit.resident for unit in mover._networks["net"].contents.units)
    assert streamed >= 5  # what is twice as large may be resident, where that is the faster plan
    assert after["hits"] - before["hits"] == 3 * streamed
    streams.check()
    mover.detach()
