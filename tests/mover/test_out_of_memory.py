"""Somebody else holds the device's memory: the error reaches the caller, nothing stays behind, and the next pass works."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, Region
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, pair, same, simulated


class Buffered(nn.Module):
    """A chain with buffers of half a leaf each."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        for number in range(4):
            self.register_buffer(f"buffer{number}", torch.randn(1024))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x) + self.buffer0[0] + self.buffer3[1]


def by_leaf(net: Chain) -> NetworkSpec:
    return NetworkSpec([Region(leaf) for leaf in net.leaves], net)


def whole(net: nn.Module) -> NetworkSpec:
    return NetworkSpec([Region(net)], net)


@pytest.mark.parametrize(("spec", "left"), [(by_leaf, LEAF_BYTES // 2), (whole, 3 * LEAF_BYTES), (whole, 0)])
def test_in_a_learning_pass(spec: Callable[[Chain], NetworkSpec], left: int) -> None:
    streams = simulated(capacity_bytes=8 * LEAF_BYTES)
    net, twin = pair()
    mover = attached(spec(net), streams, passes=0)
    hog = streams.allocate(8 * LEAF_BYTES - left)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, streams)
    streams.free(hog)
    mover.drain()
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    assert streams.allocated_bytes == 0


@pytest.mark.parametrize("blocks", [0, 1, 2, 3])
def test_while_buffers_are_moved(blocks: int) -> None:
    # Room for the ring and for `blocks` of the four buffers.
    capacity = 16 * LEAF_BYTES
    streams = simulated(capacity_bytes=capacity)
    net, twin = pair(Buffered)
    mover = attached(whole(net), streams, run=net)
    mover.drain()
    hog = streams.allocate(capacity - 2 * LEAF_BYTES - blocks * 4096)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, streams)
    mover.drain()
    streams.free(hog)
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    assert streams.allocated_bytes == 0


def test_a_budget_that_is_not_there_gives_way_to_the_least() -> None:
    streams = simulated(capacity_bytes=8 * LEAF_BYTES)
    net, twin = pair()
    mover = attached(net, streams, 5 * LEAF_BYTES)
    mover.drain()
    hog = streams.allocate(5 * LEAF_BYTES)
    same(net, twin, streams)
    same(net, twin, streams)
    status = mover.status()
    assert (status["ring_bytes"], status["resident_bytes"]) == (2 * LEAF_BYTES, 0)
    assert streams.allocated_bytes == 7 * LEAF_BYTES
    mover.drain()
    streams.free(hog)
    mover.detach()


@pytest.mark.parametrize(("capacity", "budget"), [(256 << 20, 128 << 20), (120 << 20, 2 * LEAF_BYTES)])
def test_the_automatic_budget_is_what_is_free_less_the_reserve(capacity: int, budget: int) -> None:
    # 156 MB are left, rounded down to whole steps of 32 MB; or 20 MB, less than a step, which is raised to the least.
    streams = simulated(capacity_bytes=capacity)
    net, _ = pair()
    mover = attached(net, streams, 0, reserve_bytes=100 << 20)
    call(net, streams)  # what the network holds by now counts as free
    assert mover.status()["budget_bytes"] == budget
    mover.detach()


class Silent(nn.Module):
    """Two leaves that never fire: their weights are read from outside, so they are resident, and on their way at once."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.first = nn.Linear(8, 256, bias=False)
        self.second = nn.Linear(8, 256, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(x) + self.first.weight.sum() + self.second.weight.sum()


def test_while_residents_are_on_their_way() -> None:
    capacity = 32 * LEAF_BYTES
    streams = simulated(capacity_bytes=capacity)
    net, twin = pair(Silent)
    mover = attached(whole(net), streams, run=net)
    ring = mover.status()["ring_bytes"]
    mover.drain()
    for each in (net, twin):
        each.second.weight = nn.Parameter(torch.cat([each.second.weight.detach()] * 4), requires_grad=False)
    hog = streams.allocate(capacity - ring - 3 * LEAF_BYTES)  # enough for both as they were
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, streams)
    mover.drain()
    streams.free(hog)
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    assert streams.allocated_bytes == 0
