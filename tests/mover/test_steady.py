"""Passes that are followed instead of worked out: the same work in the same order, and whatever comes between, at every place."""

from __future__ import annotations

import pytest
import torch

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.bench.null_streams import NullStreams
from lib_async_lowvram.core.stats import Trace
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Event, Stream
from lib_async_lowvram.steady import SteadyPass
from lib_async_lowvram.transfers import Transfers
from tests.mover.chains import LEAF_BYTES, Chain, X, attached, pair, recorded, same, simulated
from tests.mover.steady_rig import BUDGETS, LEAVES, Asked, Uneven, made, uneven

pytestmark = pytest.mark.usefixtures("one_plan")


# -- when --------------------------------------------------------------------------------------------------------------
def test_the_order_is_asked_until_it_is_known(asked: Asked) -> None:
    net, twin, mover, streams = made(passes=0)
    asking = [asked.during(lambda: same(net, twin, streams)) for _ in range(6)]
    assert asking == [(0, 0), (LEAVES, 0), *[(0, LEAVES)] * 4]  # learned, timed, followed
    status = mover.status()
    assert status["misses"] == 0 and status["hits"] == 5 * LEAVES and status["networks"]["net"]["relearned"] == 0
    streams.check()


def test_who_wants_to_be_told_of_a_pass_is(asked: Asked) -> None:
    net, twin, mover, streams = made()
    mover.timeline()  # looked at: the next pass is timed
    assert asked.during(lambda: same(net, twin, streams)) == (LEAVES, 0)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    mover.trace = Trace()
    assert asked.during(lambda: same(net, twin, streams)) == (LEAVES, 0)
    assert sum(span.lane == "compute" for span in mover.trace.spans) == LEAVES
    mover.trace = None
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)


def test_a_unit_that_is_used_twice_is_looked_up_each_time(asked: Asked) -> None:
    streams = recorded()
    net, twin = pair(lambda: Chain(4, order=[0, 1, 2, 1, 3]))
    attached(net, streams, passes=4)
    for _ in range(2):
        assert asked.during(lambda: same(net, twin, streams)) == (5, 0)
    streams.check()


# -- the same work -----------------------------------------------------------------------------------------------------
class Noting(NullStreams):
    """What it is told to do, in order: copies, waits of the copy stream, ends of uses, what is not wanted any more. Addresses are numbered
    as they come up."""

    def __init__(self) -> None:
        super().__init__()
        self.forget()

    def forget(self) -> None:
        self.told: list[tuple] = []
        self._numbers: dict[int, int] = {}

    def _number(self, tensor: torch.Tensor) -> int:
        return self._numbers.setdefault(tensor.data_ptr(), len(self._numbers))

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        if stream is not self.onload_stream:
            self.told.append(("used",))
        return super().record(stream, timing=timing)

    def wait(self, stream: Stream, event: Event) -> None:
        if stream is self.onload_stream:
            self.told.append(("wait",))

    def discard(self, memory: torch.Tensor, after: Event) -> Event:
        self.told.append(("discard", self._number(memory)))
        return after

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        self.told.append(("copy", self._number(source), self._number(destination), source.numel()))


@pytest.mark.parametrize("budget", [1, 60_000, 70_000])
def test_the_same_copies_after_the_same_uses(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    for followed in (False, True):
        with monkeypatch.context() as patched:
            if not followed:
                patched.setattr(SteadyPass, "begin", lambda *args, **kwargs: None)
            streams = Noting()
            torch.manual_seed(0)
            net = Uneven()
            mover = AsyncModelMover(OffloadConfig(budget_bytes=budget, small_leaf_bytes=0), streams)
            mover.attach({"net": net})
            with torch.no_grad():
                net(X)  # the learning pass's memory is anywhere
                streams.forget()
                for _ in range(7):
                    streams.told.append(("pass",))
                    net(X)
            told.append(streams.told)
            status = mover.status()
            assert status["misses"] == 0
            mover.close()
    worked_out, followed = told
    assert sum(each[0] == "copy" for each in followed) > 7 * 2
    assert [each for each in worked_out if each[0] != "wait"] == [each for each in followed if each[0] != "wait"]
    assert followed.count(("wait",)) <= worked_out.count(("wait",))


def test_the_figures_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    for followed in (False, True):
        with monkeypatch.context() as patched:
            if not followed:
                patched.setattr(SteadyPass, "begin", lambda *args, **kwargs: None)
            *_, mover, streams = made(passes=7)
            status = mover.status()
            names = ("hits", "misses", "refetches", "streamed_bytes", "streamed_bytes_per_pass", "passes", "host_waits")
            figures.append({name: status[name] for name in names})
    assert figures[0] == figures[1] and figures[1]["hits"] == 6 * LEAVES


@pytest.mark.parametrize("budget", BUDGETS)
def test_leaves_of_all_sizes(budget: int, asked: Asked) -> None:
    """Several onloads follow some uses, none follow others; each discarded place is waited for."""
    net, twin, mover, streams = uneven(budget)
    for _ in range(3):
        by_order, followed = asked.during(lambda: same(net, twin, streams))
        assert by_order == 0 and followed >= 3
    streams.check()


# -- slower tiers ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [1, 4 * LEAF_BYTES, 0])
def test_followed_however_masters_travel(limit: int, asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    again = [0]
    onload_again = Transfers.onload_again

    def counted(transfers: Transfers, unit: object) -> None:
        again[0] += 1
        onload_again(transfers, unit)

    monkeypatch.setattr(Transfers, "onload_again", counted)
    net, twin, mover, streams = made(pinned_limit_bytes=limit)
    assert asked.during(lambda: same(net, twin, streams)) == (0, LEAVES)
    assert (again[0] > 0) is (limit == 0)
    streams.check()


def test_a_slow_link_and_a_jittery_one() -> None:
    for settings in ({"bandwidth": 2e7, "latency": 1e-4}, {"bandwidth": 1e8, "jitter_seconds": 5e-4, "seed": 5}):
        streams: SimulatedStreams = simulated(poison=True, **settings)
        net, twin = pair()
        attached(net, streams)
        for _ in range(6):
            same(net, twin, streams)
