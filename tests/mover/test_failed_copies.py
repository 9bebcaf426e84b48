"""Copies that fail, under the ordering judge; and what each part of the clearing up is for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, Region
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Stream
from lib_async_lowvram.device.weights import Unit
from tests.mover.chains import LEAF_BYTES, Chain, attached, call, judged, on_thread, pair, same, simulated
from tests.mover.test_out_of_memory import Buffered

BUS = "bus"


def failing(streams: SimulatedStreams, lane: str, number: int) -> None:
    """The `number`-th copy of that lane from now on fails, counted from 0."""
    engine = streams.onload_stream if lane == "onload" else streams.offload_stream
    wanted = engine.copies + number
    engine.link.fail_copy = lambda count: RuntimeError(BUS) if count == wanted else None


def rigged(budget: int = 4 * LEAF_BYTES) -> tuple[SimulatedStreams, RecordingStreams, Chain, Chain, AsyncModelMover]:
    device = simulated()
    streams = RecordingStreams(device)
    net, twin = pair()
    return device, streams, net, twin, attached(net, streams, budget)


@pytest.mark.parametrize("lane", ["onload", "offload"])
@pytest.mark.parametrize("number", range(6))
def test_under_the_judge(lane: str, number: int) -> None:
    device, streams, net, twin, mover = rigged()
    for model in (net, twin):
        for leaf in model.leaves:
            leaf.inside = lambda leaf: leaf.weight.mul_(0.5)
    failing(device, lane, number)
    try:
        call(net, streams)
        call(net, streams)
        mover.drain()
    except RuntimeError as error:
        assert str(error) == BUS
    with torch.no_grad():
        for mine, theirs in zip(net.leaves, twin.leaves, strict=True):
            if mine.inside is None:
                theirs.weight.mul_(0.5)
            mine.inside = theirs.inside = None
    for _ in range(3):
        same(net, twin, streams)
    assert not mover.demoted
    mover.detach()
    assert streams.allocated_bytes == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    streams.check()


@pytest.mark.parametrize("number", range(3))
def test_weights_outside_all_regions_that_do_not_arrive(number: int) -> None:
    """A learning pass begins with them; some are on their way when there is no room for the next."""
    device = simulated(bandwidth=2e7)
    streams = RecordingStreams(device)
    net, twin = pair()
    spec = NetworkSpec([Region(leaf) for leaf in net.leaves[:3]], net, roots=[net])
    mover = attached(spec, streams, run=net, passes=0)
    allocate, left = device.allocate, [number]

    def refusing(nbytes: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] == -1:
            raise torch.cuda.OutOfMemoryError(BUS)
        return allocate(nbytes)

    device.allocate = refusing
    with pytest.raises(torch.cuda.OutOfMemoryError, match=BUS):
        call(net, streams)
    assert left[0] == -1 and streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    streams.check()


class Tied(Chain):
    """Leaves share weights two by two: nobody's call announces them, so they are resident, and fetched as the network is entered."""

    def __init__(self) -> None:
        super().__init__()
        for first, second in ((0, 1), (2, 3)):
            self.leaves[second].weight = self.leaves[first].weight


def test_residents_on_their_way_while_the_network_is_entered() -> None:
    device = simulated(bandwidth=2e7)
    streams = RecordingStreams(device)
    net, twin = pair(Tied)
    mover = attached(NetworkSpec([Region(leaf) for leaf in net.leaves], net, roots=[net]), streams, 6 * LEAF_BYTES, run=net)
    mover.drain()
    copy, copies = device.copy, []

    def refusing(destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        copies.append(destination)
        if len(copies) == 2:
            raise RuntimeError(BUS)
        copy(destination, source, stream)

    device.copy = refusing
    with pytest.raises(RuntimeError, match=BUS):
        call(net, streams)
    assert len(copies) == 2 and streams.allocated_bytes == 0
    with judged(streams):
        net.leaves[0].weight.mul_(0.5)  # nothing reads it any more
    with torch.no_grad():
        twin.leaves[0].weight.mul_(0.5)
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    streams.check()


def test_what_the_learning_pass_kept_is_freed_behind_its_last_use() -> None:
    """The network is entered for the first time, on another thread: one resident is there already, and the next one, which got other
    weights in the learning pass, is fetched in vain."""
    device = simulated()
    streams = RecordingStreams(device)
    net, twin = pair(Tied)
    spec = NetworkSpec([Region(leaf) for leaf in net.leaves], net, roots=[net])
    mover = attached(spec, streams, 6 * LEAF_BYTES, run=net, passes=0)
    for model in (net, twin):

        def replace(_: nn.Module, model: Chain = model) -> None:
            model.leaves[2].weight = model.leaves[3].weight = nn.Parameter(model.leaves[2].weight.detach() * 0.5)

        model.leaves[3].inside = replace
    same(net, twin, streams)
    device.copy = refuse
    with pytest.raises(RuntimeError, match=BUS):
        on_thread(lambda: call(net, streams))
    del device.copy
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    streams.check()


def test_a_place_just_given_up_is_freed_behind_that(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy of a unit is dropped because its weights were replaced, and then there is no memory for these on the host."""
    _, streams, net, twin, mover = rigged(2 * LEAF_BYTES)
    weight = torch.randn_like(net.leaves[0].weight)
    for model in (net, twin):
        model.leaves[0].weight = nn.Parameter(weight.clone())
    monkeypatch.setattr(Unit, "pack", refuse)
    with pytest.raises(RuntimeError, match=BUS):
        call(net, streams)
    monkeypatch.undo()
    assert streams.allocated_bytes == 0
    for _ in range(3):
        same(net, twin, streams)
    mover.detach()
    streams.check()


def test_a_buffer_that_does_not_arrive_holds_no_memory() -> None:
    streams = simulated()
    net, twin = pair(Buffered)
    mover = attached(net, streams, 2 * LEAF_BYTES)
    mover.drain()
    for number in range(4):
        failing(streams, "onload", number)
        with pytest.raises(RuntimeError, match=BUS):
            call(net, streams)
        assert streams.allocated_bytes == 0
    same(net, twin, streams)
    mover.detach()


@pytest.mark.parametrize("number", range(4))
def test_a_buffer_that_cannot_be_saved_at_once_is_saved_then(number: int) -> None:
    streams = simulated()
    net, twin = pair(Buffered)
    mover = attached(net, streams, 2 * LEAF_BYTES)
    for model in (net, twin):
        model.chain.leaves[5].inside = lambda leaf, model=model: [buffer.mul_(2.0) for buffer in model.buffers()]
    same(net, twin, streams)
    failing(streams, "offload", number)
    mover.drain()  # the weights and buffers are saved in the end, so nobody need know
    assert streams.allocated_bytes == 0 and BUS in mover.status()["last_error"]
    for mine, theirs in zip(net.buffers(), twin.buffers(), strict=True):
        assert torch.equal(mine, theirs)
    same(net, twin, streams)
    mover.detach()


def refuse(*_: object) -> None:
    raise RuntimeError(BUS)


def test_weights_that_cannot_be_saved_at_all_are_an_error(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 1 << 20)
    net.leaves[3].inside = lambda leaf: leaf.weight.mul_(0.5)
    call(net, streams)
    monkeypatch.setattr(streams, "copy", refuse)
    with torch.no_grad(), pytest.raises(RuntimeError, match=BUS):
        net.leaves[2].weight.mul_(0.5)
        mover.drain()
    assert any("not all on the host" in record.getMessage() for record in caplog.records)
    assert streams.allocated_bytes == 0
    mover.detach()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
