"""Host memory tiers: what may not be pinned travels through the staging ring, with the same pixels, and the limit holds exactly."""

from __future__ import annotations

import copy
import gc
import logging
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.core.states import ONLOADING
from lib_async_lowvram.device.host_memory import HostMemory
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.staging import Progress, Staged, Stager
from lib_async_lowvram.device.streams import Event
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, on_thread, pair, same, simulated
from tests.mover.zoo import EVERYTHING, MIXED, Rig, Zoo

ALL = 6 * LEAF_BYTES
SLOW = {"bandwidth": 2e8, "latency": 1e-5, "jitter_seconds": 2e-5, "seed": 7}


class Stop(BaseException):
    """As the WebUI's interrupt."""


@pytest.fixture(autouse=True)
def the_limit_holds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Asserted whenever anything is pinned; what was pinned then, in bytes. And no copy thread stays behind."""
    seen: list[int] = []
    pin = HostMemory.pin

    def judged_pin(self: HostMemory, *args: Any) -> bool:
        pinned = pin(self, *args)
        seen.append(self.pinned_bytes)
        assert self.pinned_bytes <= self.pinned_limit_bytes
        return pinned

    monkeypatch.setattr(HostMemory, "pin", judged_pin)
    yield seen
    gc.collect()
    for thread in staging_threads():
        thread.join(10)
    assert not staging_threads()


def staging_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "async-lowvram-staging"]


def judged(**settings: Any) -> RecordingStreams:
    return RecordingStreams(simulated(**{**SLOW, **settings}))


def staged(limit: int, streams: Any = None, budget: int = 1, passes: int = 2, **more: Any) -> tuple[Chain, Chain, AsyncModelMover, Any]:
    streams = streams or judged()
    net, twin = pair()
    return net, twin, attached(net, streams, budget, passes=passes, pinned_limit_bytes=limit, **more), streams


def finished(mover: AsyncModelMover, streams: Any, net: nn.Module, twin: nn.Module) -> None:
    """Weights are right, nothing is held, judges are content."""
    assert not mover.status()["placement_faults"], mover.status()["last_error"]
    mover.detach()
    assert mover.status()["pinned_bytes"] == 0 and streams.allocated_bytes == 0
    assert not staging_threads()
    for mine, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    if isinstance(streams, RecordingStreams):
        streams.check()


# -- the same pixels ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("limit", [1, 1023, 1024, 4096, LEAF_BYTES, LEAF_BYTES + 1, *range(2 * LEAF_BYTES, ALL + 1, LEAF_BYTES // 2)])
def test_the_same_bits_under_every_limit(limit: int, budget: int) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)
    mover.drain()  # or what is kept from the learning pass is never copied again
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    expected = "pinned" if limit >= ALL else "staged" if limit >= 1024 else "pageable"
    assert status["tier"] == expected
    assert status["pinned_bytes"] <= limit
    assert (status["staging_bytes"] > 0) == (expected == "staged")
    assert status["staging_bytes"] <= 2 * LEAF_BYTES
    assert (status["unpinned_bytes"] > 0) == (limit < ALL)
    assert status["unpinned_units"] * LEAF_BYTES == status["unpinned_bytes"]
    assert status["pinned_bytes"] == status["staging_bytes"] + ALL - status["unpinned_bytes"]
    assert (status["staged_bytes"] > 0) == (expected == "staged")
    assert (status["host_waits"] > 0) == (expected == "pageable" and budget < EVERYTHING)  # I3, but for the last tier
    mover.drain()
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("budget", [1, MIXED, EVERYTHING])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9, 1.0])
def test_the_zoo_under_every_limit(share: float, budget: int) -> None:
    streams = judged()
    weights = sum(p.numel() * p.element_size() for p in Zoo().parameters())
    rig = Rig(streams, budget, passes=0)
    limit = max(1, int(share * weights))
    rig.mover.configure(OffloadConfig(budget_bytes=budget, small_leaf_bytes=0, check_placement=True, pinned_limit_bytes=limit))
    rig.passes(3)
    rig.both(lambda net: net.blocks[1].wide.weight.data.mul_(0.5))
    rig.mover.mark_dirty(rig.net.blocks[1].wide)
    rig.passes(2)
    rig.mover.drain()
    rig.passes(2)
    rig.mover.detach()
    rig.same_weights()
    streams.check()


def test_the_ring_is_kept_back_when_not_everything_can_be_pinned() -> None:
    """Or masters would be pinned at first only to give way when the network is entered."""
    net, twin, mover, streams = staged(3 * LEAF_BYTES, passes=0)
    assert mover.status()["pinned_bytes"] == LEAF_BYTES
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["pinned_bytes"] == 3 * LEAF_BYTES
    finished(mover, streams, net, twin)


def test_the_ring_takes_pieces_of_units_that_are_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    net, twin, mover, streams = staged(3000)
    for _ in range(3):
        same(net, twin, streams)
    assert mover.status()["staging_bytes"] == 2 * 1024
    finished(mover, streams, net, twin)


# -- refusals ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("limit", [ALL, 3 * LEAF_BYTES + 512])
@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("number", range(1, 9))
def test_pinning_refused_at_any_point(number: int, once: bool, limit: int, caplog: pytest.LogCaptureFixture) -> None:
    asked = [0]

    def pinning(address: int, nbytes: int) -> bool:
        asked[0] += 1
        return asked[0] != number if once else asked[0] < number

    with caplog.at_level(logging.WARNING, "async_lowvram"):
        net, twin, mover, streams = staged(limit, judged(pinning=pinning))
        for _ in range(3):
            same(net, twin, streams)
    status = mover.status()
    refused = mover.host.refusals
    assert len([record for record in caplog.records if "pinned memory refused" in record.message]) == min(1, refused)
    assert (status["tier"] == "pinned") == (status["unpinned_units"] == 0)
    if not once and number == 1:
        assert status["tier"] == "pageable" and status["pinned_bytes"] == 0 and status["host_waits"] > 0
    elif not once and refused:
        assert status["tier"] in ("staged", "pageable")
    elif refused:
        assert status["tier"] in ("pinned", "staged") and status["host_waits"] == 0  # masters are tried again after learning
    finished(mover, streams, net, twin)


def test_masters_give_way_to_the_ring_where_the_device_has_no_more() -> None:
    """As under WSL: the driver refuses long before the limit."""
    pinned: dict[int, int] = {}

    class Narrow(SimulatedStreams):
        def pin(self, address: int, nbytes: int) -> bool:
            fits = sum(pinned.values()) + nbytes <= 3 * LEAF_BYTES
            if fits and super().pin(address, nbytes):
                pinned[address] = nbytes
                return True
            return False

        def unpin(self, address: int) -> None:
            pinned.pop(address, None)
            super().unpin(address)

    net, twin, mover, streams = staged(EVERYTHING, RecordingStreams(simulated(Narrow, **SLOW)))
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["staging_bytes"], status["pinned_bytes"]) == ("staged", 2 * LEAF_BYTES, 3 * LEAF_BYTES)
    assert status["host_waits"] == 0
    finished(mover, streams, net, twin)


# -- changes -----------------------------------------------------------------------------------------------------------
def halve(leaf: Leaf) -> None:
    leaf.weight.mul_(0.5)


def replace(leaf: Leaf) -> None:
    leaf.weight = nn.Parameter(leaf.weight * 0.5)


def assign(leaf: Leaf) -> None:
    leaf.weight.data = leaf.weight * 0.5


def give_bias(leaf: Leaf) -> None:
    leaf.bias = nn.Parameter(torch.linspace(0.0, 1.0, 8))


CHANGES = [halve, replace, assign, give_bias]


@pytest.mark.parametrize("limit", [LEAF_BYTES, 4 * LEAF_BYTES])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES, EVERYTHING])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("change", CHANGES)
def test_changes_inside_a_pass(change: Callable[[Leaf], None], place: int, budget: int, limit: int) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)
    for leaf in (net.leaves[place], twin.leaves[place]):
        leaf.inside = change
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_the_thread_is_told_of_write_backs_until_it_has_waited_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """An onload of a changed unit that is let go of leaves the wait to the next one."""
    told: list[tuple[int, Event | None]] = []
    submit = Stager.submit

    def spy(self: Stager, memory: torch.Tensor, master: torch.Tensor, after: Event | None = None, timed: Any = None) -> Staged:
        told.append((master.data_ptr(), after))
        return submit(self, memory, master, after, timed)

    monkeypatch.setattr(Stager, "submit", spy)
    net, twin, mover, streams = staged(LEAF_BYTES)
    net.leaves[0].inside = twin.leaves[0].inside = halve
    same(net, twin, streams)
    unit = mover._networks["net"].contents.units[0]
    mine = [after for address, after in told if address == unit.master.data_ptr()]
    assert mine[-1] is not None and unit.written is mine[-1]
    assert mine[:-1] == [None] * (len(mine) - 1)
    told.clear()
    streaming = mover._networks["net"].streaming
    assert unit.state is ONLOADING
    streaming._slots.vacate(unit, streams.current_stream())
    streaming._slots.onload(unit)
    assert told == [(unit.master.data_ptr(), mine[-1])]
    same(net, twin, streams)
    assert unit.written is None
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("place", range(6))
@pytest.mark.parametrize("change", CHANGES)
def test_changes_between_passes(change: Callable[[Leaf], None], place: int, ahead: bool) -> None:
    """Also while onloads of the next pass are queued, or waiting in the ring."""
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW))  # the judge would be right to complain of `ahead`
    for _ in range(2):
        if not ahead:
            mover.drain()
        with torch.no_grad():
            change(net.leaves[place])
            change(twin.leaves[place])
        same(net, twin, streams)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("place", range(6))
def test_changes_of_staged_units_deeper_in_the_pass(place: int) -> None:
    """A leaf changes another one, whose copy is on its way or queued."""
    for other in range(6):
        net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), check_placement=False)  # it would mind the write
        for model in (net, twin):
            model.leaves[place].inside = lambda _, model=model, other=other: model.leaves[other].weight.mul_(0.5)
        for _ in range(3):
            same(net, twin, streams)
        finished(mover, streams, net, twin)


# -- cut short ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
@pytest.mark.parametrize("limit", [LEAF_BYTES, ALL])
@pytest.mark.parametrize("place", range(6))
def test_passes_that_are_cut_short(place: int, limit: int, budget: int, error: type[BaseException]) -> None:
    net, twin, mover, streams = staged(limit, budget=budget)

    def stop(leaf: Leaf) -> None:
        raise error

    for then in (lambda: None, mover.drain, lambda: on_thread(mover.drain)):
        net.leaves[place].inside = stop
        with suppress(error):
            call(net, streams)
        then()
        same(net, twin, streams)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("what", ["drain", "detach", "configure"])
@pytest.mark.parametrize("place", range(6))
def test_others_that_interfere(place: int, what: str) -> None:
    net, twin, mover, streams = staged(LEAF_BYTES)
    other = OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=(place % 4) * LEAF_BYTES + 1)
    action = {"drain": mover.drain, "detach": mover.detach, "configure": lambda: mover.configure(other)}[what]
    net.leaves[place].inside = lambda leaf: on_thread(action)
    for _ in range(4):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_orders_that_jump_drop_what_is_queued() -> None:
    streams = judged()
    net, twin = pair(lambda: Chain(6))
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    for order in ([0, 3, 1, 5], [5, 4, 3, 2, 1, 0], [2], [0, 0, 1, 1], [0, 1, 2, 3, 4, 5]):
        net.order = twin.order = order
        for _ in range(3):
            same(net, twin, streams)
    finished(mover, streams, net, twin)


# -- several networks, limits that change ------------------------------------------------------------------------------
def test_several_networks_under_one_limit(the_limit_holds: list[int]) -> None:
    """The first has everything pinned, and gives way to the ring that the second one needs."""
    streams = judged()
    nets = [pair() for _ in range(3)]
    mover = attached(nets[0][0], streams, pinned_limit_bytes=ALL)
    assert mover.status()["tier"] == "pinned"
    mover.attach({"second": nets[1][0], "third": nets[2][0]})
    for _ in range(3):
        for net, twin in nets:
            same(net, twin, streams)
            same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["host_waits"], status["pinned_bytes"]) == ("staged", 0, ALL)
    assert status["staging_bytes"] == 2 * LEAF_BYTES
    mover.detach(["second", "third"])
    same(*nets[0], streams)
    assert mover.status()["tier"] == "staged"  # what gave way stays so until masters are pinned anew
    mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=ALL + 1))
    same(*nets[0], streams)
    assert mover.status()["tier"] == "pinned" and not staging_threads()
    assert max(the_limit_holds) == ALL
    finished(mover, streams, *nets[0])


def test_masters_give_way_to_a_ring_of_full_size() -> None:
    """Not only where there is no room at all for one."""
    streams = judged()
    (net, twin), (other, its_twin) = pair(), pair()
    mover = attached(net, streams, pinned_limit_bytes=ALL + 1024)
    mover.attach({"other": other})
    for _ in range(3):
        same(other, its_twin, streams)
        same(net, twin, streams)
    assert mover.status()["staging_bytes"] == 2 * LEAF_BYTES
    finished(mover, streams, net, twin)


def test_the_limit_changes_in_the_middle(the_limit_holds: list[int]) -> None:
    net, twin, mover, streams = staged(ALL)
    for limit in (LEAF_BYTES, ALL, 1, 3 * LEAF_BYTES, 2000, 0):
        mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, check_placement=True, pinned_limit_bytes=limit))
        same(net, twin, streams)
        assert mover.status()["pinned_bytes"] <= (limit or ALL)
        same(net, twin, streams)
    finished(mover, streams, net, twin)


# -- errors ------------------------------------------------------------------------------------------------------------
@contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, method: str, number: int, error: BaseException) -> Iterator[None]:
    """The `number`th call of a method on the staging thread raises."""
    original, calls = getattr(SimulatedStreams, method), [0]

    def stand_in(self: SimulatedStreams, *args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "async-lowvram-staging":
            calls[0] += 1
            if calls[0] == number:
                raise error
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SimulatedStreams, method, stand_in)
        yield
    assert calls[0] >= number, "the thread does not come by here"


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
@pytest.mark.parametrize("number", [1, 2, 5])
@pytest.mark.parametrize("method", ["copy_on_host", "copy", "record", "outwait"])
@pytest.mark.parametrize("error", [RuntimeError("CUDA error: unspecified launch failure"), MemoryError("no"), Stop()])
def test_what_goes_wrong_on_the_thread_reaches_who_waits(
    error: BaseException, method: str, number: int, budget: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = simulated(**SLOW)
    net, twin = pair()
    mover = attached(net, streams, budget, passes=1, pinned_limit_bytes=LEAF_BYTES)
    met = []
    with failing(monkeypatch, method, number, error):
        for _ in range(4):
            try:
                same(net, twin, streams)
            except (type(error)) as raised:
                met.append(raised)
    assert met in ([error], []), "raised once, or of a copy that nobody wanted in the end"
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


@pytest.mark.parametrize("number", range(8))
def test_a_copy_that_fails_on_the_device(number: int) -> None:
    streams = simulated(**SLOW)
    net, twin = pair()
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    first = streams.onload_stream.copies
    streams.fail_copy = lambda copies: RuntimeError("link down") if copies == first + number else None
    failures = 0
    for _ in range(3):
        try:
            same(net, twin, streams)
        except RuntimeError as error:
            assert "link down" in str(error)
            failures += 1
    streams.fail_copy = None
    assert failures <= 1
    with suppress(RuntimeError):
        mover.drain()
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_no_thread_to_spare(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    start = threading.Thread.start

    def refuse(self: threading.Thread) -> None:
        if self.name == "async-lowvram-staging":
            raise RuntimeError("can't start new thread")
        start(self)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        net, twin, mover, streams = staged(LEAF_BYTES)
        same(net, twin, streams)
        assert mover.status()["tier"] == "pageable" and "no thread for staged copies" in caplog.text
    mover.drain()
    same(net, twin, streams)
    assert mover.status()["tier"] == "staged"
    finished(mover, streams, net, twin)


# -- waits -------------------------------------------------------------------------------------------------------------
def test_the_host_waits_only_until_the_copy_is_enqueued() -> None:
    """And not for the copy: the thread that runs the network goes on launching (here: it comes as far as its own stream's wait)."""
    order: list[str] = []
    gate = threading.Event()

    class Watched(SimulatedStreams):
        def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            gate.wait(60)
            super().copy_on_host(destination, source)

        def wait(self, stream: Any, event: Event) -> None:
            if stream not in (self.onload_stream, self.offload_stream):
                order.append("waits for a copy")
            super().wait(stream, event)

    streams = simulated(Watched)
    gate.set()
    net, twin, mover, streams = staged(2 * LEAF_BYTES, streams, passes=3)
    mover.drain()
    before = mover.status()["staging_waits"]
    gate.clear()
    order.clear()
    done = threading.Thread(target=lambda: same(net, twin, streams))
    done.start()
    while mover._networks["net"].counters.staging_waits == before:
        assert done.is_alive()
    assert order == []  # held up before its stream was given anything to wait for
    gate.set()
    done.join()
    assert mover.status()["staging_waits"] > before
    finished(mover, streams, net, twin)


def test_what_is_queued_is_let_go_of_before_its_place_is_given_away_or_its_master_read_anew() -> None:
    gate = threading.Event()

    class Gated(SimulatedStreams):
        def copy_on_host(self, destination: torch.Tensor, source: torch.Tensor) -> None:
            assert gate.wait(60)
            super().copy_on_host(destination, source)

    gate.set()
    net, twin, mover, streams = staged(LEAF_BYTES, RecordingStreams(simulated(Gated)))
    mover.drain()
    gate.clear()
    with torch.no_grad():
        mover.prepare("net")
    network = mover._networks["net"]
    streaming, (first, second) = network.streaming, network.contents.units[:2]
    assert first.copied.progress is Progress.RUNNING or not first.copied.enqueued
    job = second.copied
    assert job.progress is Progress.QUEUED  # behind the first one, which the gate holds up
    streaming._slots.vacate(second, streams.current_stream())
    assert job.progress is Progress.OVER and not isinstance(second.copied, Staged)
    streaming._slots.onload(second)
    job = second.copied
    assert job.progress is Progress.QUEUED
    streaming._transfers.onload(second)  # fetched again: a change was seen
    assert job.progress is Progress.OVER and second.copied.progress is Progress.QUEUED
    second.pending = 1
    gate.set()
    for _ in range(3):
        same(net, twin, streams)
    finished(mover, streams, net, twin)


# -- life --------------------------------------------------------------------------------------------------------------
def test_threads_come_and_go() -> None:
    net, twin, mover, streams = staged(ALL)
    assert not staging_threads()
    mover.configure(OffloadConfig(budget_bytes=1, small_leaf_bytes=0, pinned_limit_bytes=LEAF_BYTES))
    for _ in range(3):
        same(net, twin, streams)
        assert len(staging_threads()) == 1
        mover.drain()
    mover.close()
    assert not staging_threads()
    assert mover.host.pinned_bytes == 0


def test_a_dropped_mover_ends_its_thread() -> None:
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), check_placement=False)
    same(net, twin, streams)
    thread, gone = staging_threads()[0], weakref.ref(mover)
    del mover, net  # hooks keep a mover for as long as a model has them
    gc.collect()
    assert gone() is None
    thread.join(10)
    assert not thread.is_alive()


def test_a_dropped_model_is_not_kept_by_what_is_queued() -> None:
    streams = simulated()
    other, net = pair()
    mover = attached(net, streams, pinned_limit_bytes=LEAF_BYTES)
    mover.attach({"other": other})
    gone = weakref.ref(net)
    del net
    gc.collect()
    assert gone() is None
    call(other, streams)
    assert list(mover.status()["networks"]) == ["other"]
    mover.drain()
    gc.collect()
    assert mover.status()["host_bytes"] == ALL + mover.status()["staging_bytes"]
    mover.detach()


@pytest.mark.parametrize("budget", [1, 4 * LEAF_BYTES])
def test_a_copy_of_a_model_is_whole_and_unmanaged(budget: int) -> None:
    net, twin, mover, streams = staged(LEAF_BYTES, simulated(**SLOW), budget=budget)
    clone = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(clone(X), twin(X))
    same(net, twin, streams)
    finished(mover, streams, net, twin)


def test_nothing_of_it_where_everything_is_pinned() -> None:
    net, twin, mover, streams = staged(0)
    for _ in range(3):
        same(net, twin, streams)
    status = mover.status()
    assert (status["tier"], status["staging_bytes"], status["staged_bytes"], status["staging_waits"]) == ("pinned", 0, 0, 0)
    assert not staging_threads()
    finished(mover, streams, net, twin)
