"""Copies run ahead of the computing: across the pass's end, up to a wish, and counted as stalls when they are late."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lib_async_lowvram.core.stats import Trace
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import ALIGNMENT, Stream, align
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, ObligingStreams, attached, call, pair, recorded, same, simulated


class CountingStreams(SimulatedStreams):
    """Counts onloads as they are enqueued."""

    enqueued = 0

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self.enqueued += stream is self.onload_stream
        super().copy(destination, source, stream)


def test_the_next_passs_first_onloads_are_enqueued_before_the_pass_ends() -> None:
    streams = simulated(CountingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    before = streams.enqueued
    ahead: list[int] = []

    def inside(_: Leaf) -> None:
        ahead.append(streams.enqueued - before)

    net.leaves[5].inside = inside
    same(net, twin, streams)
    # Two places. Leaves 0 and 1 were there at the pass's start; 4 more, and leaf 0 again once 4's use is over.
    assert ahead == [5]
    assert streams.enqueued - before == 6
    assert mover.status()["misses"] == 0
    mover.detach()


def test_after_a_jump_the_next_onload_is_enqueued_before_the_leaf_computes() -> None:
    streams = simulated(CountingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    before = streams.enqueued
    ahead: list[int] = []
    net.order = twin.order = [4, 5, 0, 1, 2, 3]
    net.leaves[4].inside = lambda _: ahead.append(streams.enqueued - before)
    same(net, twin, streams)
    assert ahead == [2]  # its own, which nobody had foreseen, and the next one's, where a prefetched copy gave way
    assert mover.status()["misses"] == 1
    mover.detach()


def test_a_pass_hits_every_time_and_moves_every_byte_once() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams)
    before = mover.status()
    for _ in range(3):
        same(net, twin, streams)
    after = mover.status()
    assert after["hits"] - before["hits"] == 18
    assert after["misses"] == after["refetches"] == after["skipped"] == after["host_waits"] == 0
    assert after["streamed_bytes_per_pass"] == 6 * LEAF_BYTES
    assert after["peak_weight_bytes"] == after["budget_bytes"] == after["ring_bytes"] == 2 * LEAF_BYTES
    mover.detach()


def test_residents_move_once() -> None:
    streams = simulated()
    net, twin = pair()
    mover = attached(net, streams, 4 * LEAF_BYTES)
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert status["resident_bytes"] == 2 * LEAF_BYTES
    assert status["streamed_bytes_per_pass"] == 4 * LEAF_BYTES
    assert status["peak_weight_bytes"] == 4 * LEAF_BYTES
    assert sum(bool(leaf._forward_pre_hooks) for leaf in net.leaves) == 4  # those that have arrived are called as ever
    mover.detach()


def test_stalls_are_counted_when_copies_are_held() -> None:
    streams = simulated(ObligingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    with streams.hold_copies("onload") as streams.hold:
        same(net, twin, streams)
    streams.hold = None
    status = mover.status()
    assert status["stall_seconds"] > 0
    assert status["host_waits"] == 0
    mover.detach()


def test_prepare_starts_the_first_onloads_and_waits_for_nothing() -> None:
    streams = simulated(CountingStreams)
    net, twin = pair()
    mover = attached(net, streams)
    mover.drain()
    before, waits = streams.enqueued, streams.host_waits
    with streams.hold_copies(), torch.no_grad():
        mover.prepare("net")
        mover.prepare("net")
    assert (streams.enqueued - before, streams.host_waits - waits) == (2, 0)
    assert mover.current_network == "net"
    same(net, twin, streams)
    assert mover.status()["misses"] == 0
    mover.detach()


def test_prepare_before_learning_and_with_gradients_does_nothing() -> None:
    streams = simulated(CountingStreams)
    net, _ = pair()
    mover = attached(net, streams, passes=0)
    with torch.no_grad():
        mover.prepare("net")
        mover.prepare("no such network")
    assert streams.enqueued == 0
    call(net, streams)
    learned = streams.enqueued
    mover.prepare("net")
    assert streams.enqueued == learned
    mover.detach()


@pytest.mark.parametrize(("wish", "ring"), [(1, 2), (3 * LEAF_BYTES, 3), (100 * LEAF_BYTES, 5)])
def test_a_lookahead_wish(wish: int, ring: int) -> None:
    streams = recorded()
    net, twin = pair(lambda: Chain(8))
    mover = attached(net, streams, 5 * LEAF_BYTES, lookahead_bytes=wish)
    for _ in range(2):
        same(net, twin, streams)
    assert mover.status()["ring_bytes"] == ring * LEAF_BYTES
    assert mover.status()["misses"] == 0
    streams.check()
    mover.detach()


@pytest.mark.parametrize("odd", [0, 64, 100])
@pytest.mark.parametrize("rows", [256, 250, 3])
def test_weights_are_aligned_wherever_they_stand(rows: int, odd: int) -> None:
    streams = simulated()
    net, twin = pair(lambda: Chain(8, rows=rows))
    for chain in (net, twin):
        for leaf in chain.leaves:
            leaf.bias = nn.Parameter(torch.ones(8))
    size = align(rows * 8 * 4) + ALIGNMENT
    mover = attached(net, streams, 6 * size + odd, lookahead_bytes=3 * size + odd)
    places: list[int] = []
    for leaf in net.leaves:
        leaf.register_forward_pre_hook(lambda leaf, _: places.extend([leaf.weight.data_ptr(), leaf.bias.data_ptr()]))
    same(net, twin, streams)
    assert all(streams.owns(place) and place % ALIGNMENT == 0 for place in places)
    assert mover.status()["ring_bytes"] % ALIGNMENT == 0
    mover.detach()


def test_an_order_that_stays_changed_is_learned() -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)
    net.order = twin.order = [3, 1, 4, 0, 5, 2]
    for _ in range(2):
        same(net, twin, streams)
    assert mover.status()["networks"]["net"]["relearned"] == 1
    before = mover.status()
    for _ in range(2):
        same(net, twin, streams)
    after = mover.status()
    assert (after["misses"], after["skipped"]) == (before["misses"], before["skipped"])
    assert after["hits"] - before["hits"] == 12
    mover.drain()
    for _ in range(2):
        same(net, twin, streams)  # and kept when the network is entered again
    assert mover.status()["skipped"] == before["skipped"]
    streams.check()
    mover.detach()


def test_a_traced_pass_is_the_same_pass() -> None:
    streams = recorded()
    net, twin = pair()
    mover = attached(net, streams)
    mover.trace = Trace()
    same(net, twin, streams)
    lanes = {span.lane for span in mover.trace.spans}
    assert lanes == {"compute", "stall"}  # the demo adds "copy" and "write-back" from the device's own clock
    computed = [span.name for span in mover.trace.spans if span.lane == "compute"]
    assert computed == [f"leaves.{number}" for number in range(6)]
    assert all(span.end_seconds >= span.start_seconds for span in mover.trace.spans)
    streams.check()
    mover.detach()
