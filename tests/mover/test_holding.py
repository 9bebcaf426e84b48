"""`AsyncModelMover.holding`: a part that is run several times in a row has its weights travel once, and leaves no other trace."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover
from lib_async_lowvram.device.streams import Streams
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, handed_over, judged, on_thread, pair, recorded, same, simulated

pytestmark = pytest.mark.usefixtures("one_plan")


class Parts(nn.Module):
    """Runs groups of leaves, each group `times` times, inside `hold`."""

    def __init__(self, groups: tuple[int, ...] = (2, 2, 1, 1), times: int = 3) -> None:
        super().__init__()
        self.groups = nn.ModuleList(Chain(number) for number in groups)
        self.times = times
        self.hold: Callable[[nn.Module], AbstractContextManager] = lambda part: nullcontext()

    @property
    def leaves(self) -> list[Leaf]:
        return [leaf for group in self.groups for leaf in group.leaves]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for group in self.groups:
            with self.hold(group):
                for _ in range(self.times):
                    x = group(x)
        return x


class Stop(BaseException):
    pass


def made(streams: Streams, budget: int = 1, make: Callable[[], Parts] = Parts, **config: object) -> tuple[Parts, Parts, AsyncModelMover]:
    """A managed network that has learned its order from single runs, and its twin; from now on groups run three times."""
    net, twin = pair(make)
    times, net.times = net.times, 1
    mover = attached(net, streams, budget, **config)
    net.times, net.hold = times, mover.holding
    return net, twin, mover


def counted(mover: AsyncModelMover, work: Callable[[], None], *names: str) -> list[int]:
    """How much these of the status grew."""
    before = mover.status()
    work()
    after = mover.status()
    return [after[name] - before[name] for name in names]


@pytest.mark.parametrize("budget", [1, 5 * LEAF_BYTES])
def test_weights_travel_once(budget: int) -> None:
    streams = recorded()
    net, twin, mover = made(streams, budget)
    steady = counted(mover, lambda: same_once(net, twin, streams), "streamed_bytes")
    for _ in range(3):
        names = ("streamed_bytes", "misses", "skipped", "refetches", "relearned")
        streamed, *others = counted(mover, lambda: same(net, twin, streams), *names)
        assert [streamed] == steady and not any(others)
    streams.check()
    assert mover.status()["peak_weight_bytes"] <= mover.status()["networks"]["net"]["budget_bytes"]


def same_once(net: Parts, twin: Parts, streams: Streams) -> None:
    """A pass that runs each group once."""
    for each in (net, twin):
        each.times = 1
    same(net, twin, streams)
    for each in (net, twin):
        each.times = 3


def test_without_it_they_travel_each_time() -> None:
    streams = recorded()
    net, twin, mover = made(streams)
    net.hold = lambda part: nullcontext()
    [streamed] = counted(mover, lambda: same(net, twin, streams), "streamed_bytes")
    assert streamed > 2 * 6 * LEAF_BYTES


def test_a_part_that_the_ring_cannot_hold() -> None:
    """It is fetched again as often as need be; memory stays within the budget."""
    streams = recorded()
    net, twin, mover = made(streams, make=lambda: Parts((7, 1)))
    for _ in range(3):
        same(net, twin, streams)
    streams.check()
    status = mover.status()
    assert status["peak_weight_bytes"] <= status["networks"]["net"]["budget_bytes"] < 7 * LEAF_BYTES


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_cut_short(place: int, error: type[BaseException], budget: int) -> None:
    streams = recorded()
    net, twin, mover = made(streams, budget)

    def stop(leaf: Leaf) -> None:
        raise error

    for _ in range(2):
        net.leaves[place].inside = stop
        with pytest.raises(error):
            call(net, streams)
        same(net, twin, streams)
    mover.drain()
    assert streams.allocated_bytes == 0
    streams.check()


@pytest.mark.parametrize("place", range(6))
def test_changed_inside(place: int) -> None:
    """A leaf patched in the first of three runs is the patched one in all of them, and its master is true afterwards."""
    streams = recorded()
    net, twin, mover = made(streams)
    for _ in range(2):
        for each in (net, twin):
            each.leaves[place].inside = lambda leaf: leaf.weight.mul_(0.5)
        [written] = counted(mover, lambda: same(net, twin, streams), "write_backs")
        assert written == 1
        assert torch.equal(net.leaves[place].weight.cpu() if mover.drain() is None else X, twin.leaves[place].weight)
        same(net, twin, streams)
    streams.check()


@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("elsewhere", [False, True])
def test_drained_inside(place: int, elsewhere: bool) -> None:
    """By this thread the network is left in the middle of the hold, and entered again by the next leaf; another thread's wish waits."""
    streams = recorded()
    net, twin, mover = made(streams)
    for _ in range(2):
        net.leaves[place].inside = lambda leaf: handed_over(mover.drain, streams) if elsewhere else None
        if not elsewhere:
            net.groups[1].register_forward_pre_hook(lambda *_: mover.drain())
        same(net, twin, streams)
    streams.check()


@pytest.mark.parametrize("place", range(6))
def test_gradients_turned_on_inside(place: int) -> None:
    """In the middle of a hold the pass goes on as stock moves it; the hold's end finds nothing to let go of."""
    streams = recorded()
    net, twin, mover = made(streams)
    for each in (net, twin):
        each.requires_grad_(False)
    with torch.no_grad():
        expected = twin(X)

    def turn_on(*_: object) -> None:
        torch.set_grad_enabled(True)

    handle = net.leaves[place].register_forward_pre_hook(turn_on)
    with judged(streams):
        assert torch.equal(net(X), expected)
        assert torch.is_grad_enabled()
    handle.remove()
    same(net, twin, streams)
    streams.check()


def test_inside_each_other() -> None:
    """The outer one decides."""
    streams = recorded()
    net, twin, mover = made(streams)
    [once] = counted(mover, lambda: same_once(net, twin, streams), "streamed_bytes")

    class Both(Parts):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for group in self.groups:
                with self.hold(group):
                    x = group(x)
                    with self.hold(group):
                        x = group(x)
                    x = group(x)
            return x

    net.__class__ = twin.__class__ = Both
    [streamed] = counted(mover, lambda: same(net, twin, streams), "streamed_bytes")
    assert streamed == once
    streams.check()


def test_where_nothing_streams() -> None:
    """Before the first pass, in the learning pass, between passes, on another thread: nothing happens."""
    streams = simulated()
    net, twin = pair(Parts)
    mover = AsyncModelMover(device=streams)
    mover.attach({"net": net})
    with mover.holding(net):
        pass
    net.hold = mover.holding
    same(net, twin, streams)
    with mover.holding(net.groups[0]):
        same(net, twin, streams)
    opened: list[bool] = []

    def elsewhere(leaf: Leaf) -> None:
        def other() -> None:
            with mover.holding(net.groups[0]):
                opened.append(True)

        on_thread(other)

    net.leaves[1].inside = elsewhere
    same(net, twin, streams)
    assert opened
    mover.detach()
    with mover.holding(net):
        pass


def test_a_fault_of_ours_at_its_end_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture goes on as stock makes it."""
    streams = simulated()
    net, twin, mover = made(streams)

    def broken(self: object) -> None:
        raise AssertionError("a fault")

    monkeypatch.setattr("lib_async_lowvram.uses.Uses.let_go", broken)
    same(net, twin, streams)
    assert "fault" in mover.demoted
    same(net, twin, streams)
    assert streams.allocated_bytes == 0
