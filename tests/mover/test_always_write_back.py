"""`always_write_back`: weights written without a trace, through `.data`, on the device and between passes, are kept."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram import OffloadConfig
from tests.mover.chains import LEAF_BYTES, Leaf, attached, pair, recorded, same, simulated

BUDGETS = [1, 5 * LEAF_BYTES, 1 << 20]


def untraced(leaf: Leaf) -> None:
    leaf.weight.data.mul_(0.5)


@pytest.mark.parametrize("passes", [0, 2])
@pytest.mark.parametrize("budget", BUDGETS)
def test_untraced_writes_are_kept(budget: int, passes: int) -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams, budget, passes=passes, always_write_back=True)
    for place in (1, 4):
        net.leaves[place].inside = twin.leaves[place].inside = untraced
        same(net, twin, streams)
    for leaf in (net.leaves[2], twin.leaves[2]):
        untraced(leaf)  # between two passes
    for _ in range(2):
        same(net, twin, streams)
    status = mover.status()
    assert status["placement_faults"] == 0
    assert status["write_backs"] >= 6 * status["passes"]
    mover.detach()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    streams.check()


def test_switched_on_and_off_between_passes() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 5 * LEAF_BYTES)
    same(net, twin, streams)
    assert mover.status()["write_backs"] == 0
    mover.configure(OffloadConfig(budget_bytes=5 * LEAF_BYTES, small_leaf_bytes=0, always_write_back=True))
    same(net, twin, streams)
    assert mover.status()["write_backs"] >= 6
    net.leaves[1].inside = twin.leaves[1].inside = untraced
    same(net, twin, streams)
    before = mover.status()["write_backs"]
    mover.configure(OffloadConfig(budget_bytes=5 * LEAF_BYTES, small_leaf_bytes=0))
    for _ in range(2):
        same(net, twin, streams)
    assert mover.status()["write_backs"] == before
    mover.detach()


def test_an_untraced_write_right_after_the_learning_pass() -> None:
    """Nothing that the learning pass left on the device hides it."""
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 1 << 20, passes=0, always_write_back=True)
    same(net, twin, streams)
    for leaf in (net.leaves[2], twin.leaves[2]):
        untraced(leaf)
    same(net, twin, streams)
    mover.detach()
