"""Each lane slow in turn - copies to the device, write-backs, computing - and somebody else's memory: the same bits.

The same scenarios on the simulated device and, where there is one, on a GPU, whose lanes are held up by kernels that spin: what is
enqueued too early there really comes too early.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from lib_async_lowvram.device.cuda import CudaStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Stream, Streams
from tests.mover.chains import Chain, X, attached, call, simulated

CYCLES = 10_000_000
"""Some milliseconds on any GPU: much longer than everything else here."""


class SlowLink(SimulatedStreams):
    """Copies of one lane come late."""

    lane = ""

    def slow_down(self, lane: str) -> None:
        self.lane = lane
        for stream in (self.onload_stream, self.offload_stream):
            stream.link.latency = 2e-3 if self._named(stream) else 0.0

    def _named(self, stream: Stream) -> bool:
        return stream.lane == self.lane

    def before_computing(self) -> None:
        """The host is the device here: it is as slow as it is."""


class SlowKernels(CudaStreams):
    """One lane spins before each of its works."""

    lane = ""

    def slow_down(self, lane: str) -> None:
        self.lane = lane

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        if self.lane == ("onload" if stream == self.onload_stream else "offload"):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(CYCLES)
        super().copy(destination, source, stream)

    def before_computing(self) -> None:
        if self.lane == "compute":
            torch.cuda._sleep(CYCLES)


@dataclass
class Bench:
    """A device, and the size of a leaf that fits it: `rows` of 32 bytes."""

    streams: SlowLink | SlowKernels
    rows: int

    @property
    def leaf_bytes(self) -> int:
        return self.rows * 32

    def pair(self) -> tuple[Chain, Chain]:
        made = []
        for _ in range(2):
            torch.manual_seed(0)
            made.append(Chain(rows=self.rows).eval())
        for leaf in made[0].leaves:
            leaf.register_forward_pre_hook(lambda *_: self.streams.before_computing())
        return made[0], made[1].to(self.streams.device)

    def same(self, net: nn.Module, twin: nn.Module) -> None:
        with torch.no_grad():
            expected = twin(X.to(self.streams.device))
        assert torch.equal(call(net, self.streams), expected)

    def hog(self, left: int) -> Callable[[], None]:
        """Take all memory but about `left` bytes. What gives it back."""
        others: Streams = self.streams.sibling()
        block = others.allocate((self.streams.free_memory() - left) // 512 * 512)

        def give_back() -> None:
            nonlocal block
            others.free(block)
            block = None
            torch.cuda.empty_cache()

        return give_back


@pytest.fixture(params=["simulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def bench(request: pytest.FixtureRequest) -> Bench:
    if request.param == "simulated":
        return Bench(simulated(SlowLink, capacity_bytes=16 * 256 * 32), 256)
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA GPU here")
    return Bench(SlowKernels(), 1 << 20)


def halve(leaf: nn.Module) -> None:
    leaf.weight.mul_(0.5)


@pytest.mark.parametrize("lane", ["onload", "offload", "compute"])
@pytest.mark.parametrize("leaves", [2, 4])
def test_one_lane_is_slow(bench: Bench, lane: str, leaves: int) -> None:
    """Steady passes, weights changed in a pass and between two, leaving and coming back."""
    net, twin = bench.pair()
    mover = attached(net, bench.streams, leaves * bench.leaf_bytes, check_placement=False)
    bench.streams.slow_down(lane)
    for number in range(9):
        if number % 3 == 1:
            for leaf in (*net.leaves, *twin.leaves):
                leaf.inside = halve
        if number % 3 == 2:
            for each in (net, twin):
                with torch.no_grad():
                    each.leaves[number // 3].weight.add_(0.25)
        bench.same(net, twin)
        if number == 4:
            mover.drain()
    bench.same(net, twin)
    status = mover.status()
    assert status["write_backs"] >= 3 * 6 and status["streamed_bytes"] > 0 and status["state"] == "active"
    assert bench.streams.peak_allocated_bytes <= leaves * bench.leaf_bytes
    mover.detach()
    assert bench.streams.allocated_bytes == 0
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs.cpu())


def test_memory_that_somebody_else_holds(bench: Bench) -> None:
    net, twin = bench.pair()
    mover = attached(net, bench.streams, 4 * bench.leaf_bytes, check_placement=False)
    mover.drain()
    give_back = bench.hog(bench.leaf_bytes // 2)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, bench.streams)
    give_back()
    for _ in range(3):
        bench.same(net, twin)
    mover.detach()
    assert bench.streams.allocated_bytes == 0


def test_computing_that_needs_what_residents_hold(bench: Bench) -> None:
    """It fails with them, and not without: the pass tried again is the twin's."""
    net, twin = bench.pair()
    mover = attached(net, bench.streams, 5 * bench.leaf_bytes, check_placement=False)
    held = bench.streams.allocated_bytes

    def needs_too_much(_: nn.Module) -> None:
        bench.streams.free(bench.streams.allocate(bench.streams.free_memory() + bench.leaf_bytes))

    net.leaves[3].inside = needs_too_much
    with pytest.raises(torch.cuda.OutOfMemoryError):
        call(net, bench.streams)
    assert mover.shed("net") == held - 2 * bench.leaf_bytes
    for _ in range(3):
        bench.same(net, twin)
    assert bench.streams.allocated_bytes == 2 * bench.leaf_bytes
    mover.detach()
    assert bench.streams.allocated_bytes == 0
