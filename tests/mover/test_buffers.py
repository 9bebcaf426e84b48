"""Buffers of a managed model: on the device while their network is in use, and true whenever it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import NetworkSpec, OffloadConfig, Region
from tests.mover.chains import Chain, attached, call, pair, recorded, same, simulated


class Cut(nn.Module):
    """Replaces its buffer by a part of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.register_buffer("table", torch.arange(8.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.table) > 4:
            self.table = self.table[:4]
        return self.chain(x) + self.table.sum()


@pytest.mark.parametrize("drain", [True, False])
def test_a_buffer_cut_down_to_a_part_of_itself_keeps_its_shape(drain: bool) -> None:
    streams = simulated()
    net, twin = pair(Cut)
    mover = attached(net, streams, passes=0)
    for _ in range(3):
        same(net, twin, streams)
        if drain:
            mover.drain()
    mover.detach()
    assert torch.equal(net.table, twin.table)


class Counting(nn.Module):
    """Writes its buffers, as batch norm does: one in place, one anew."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = Chain()
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add_(1.0)
        self.last = self.seen * 2
        return self.chain(x) + self.seen.sum() + self.last.sum()


@pytest.mark.parametrize("drain", [True, False])
def test_buffers_written_in_a_pass_keep_their_values(drain: bool) -> None:
    streams = recorded()
    net, twin = pair(Counting)
    mover = attached(NetworkSpec([Region(net)], net), streams, run=net, passes=0)
    for number in range(4):
        same(net, twin, streams)
        if drain:
            mover.drain()
            assert net.seen.tolist() == [number + 1.0] * 3
    mover.configure(OffloadConfig(budget_bytes=1 << 20, check_placement=True))
    same(net, twin, streams)
    mover.detach()
    assert torch.equal(net.seen, twin.seen)
    assert torch.equal(net.last, twin.last)
    streams.check()


def test_a_read_of_a_buffers_host_copy_is_a_placement_fault() -> None:
    streams = simulated()
    net, _ = pair(Cut)
    mover = attached(net, streams)
    mover.drain()
    alias = net.table.detach()  # over the host copy: on a GPU an operation that mixes the two fails
    call(net, streams)
    assert mover.status()["placement_faults"] == 0
    net.chain.register_forward_hook(lambda module, args, output: output + alias.sum())
    call(net, streams)
    assert mover.status()["placement_faults"] > 0
    mover.detach()
