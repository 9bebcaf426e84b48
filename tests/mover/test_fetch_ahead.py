"""The next network's first weights travel while another one computes: in order, within the budget, and given up where they must be."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, NetworkSpec, OffloadConfig, Region
from lib_async_lowvram.ahead import Ahead
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.staging import Staged
from lib_async_lowvram.device.streams import Event, Stream, Streams
from lib_async_lowvram.device.weight_file import FileMaster
from lib_async_lowvram.pinning import in_flight
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, call, handed_over, judged, pair, recorded, simulated
from tests.mover.test_failed_copies import BUS, failing
from tests.mover.trees import put_in_file

ROOMY = 1 << 20
FIRST, SECOND = 2, 5
"""Leaves of the two networks."""


class Rig:
    """Networks "one" and "two" (and "three") on one mover, each with a twin; all have learned and run. Budget in bytes."""

    def __init__(self, streams: Streams, budget: int = ROOMY, count: int = 2, warm: bool = True, **config: object) -> None:
        self.streams = streams
        self.names = ("one", "two", "three")[:count]
        self.nets, self.twins = {}, {}
        for name, leaves in zip(self.names, (FIRST, SECOND, 3), strict=False):
            self.nets[name], self.twins[name] = pair(lambda leaves=leaves: Chain(leaves))
        settings = {"budget_bytes": budget, "small_leaf_bytes": 0, "check_placement": True, **config}
        self.mover = AsyncModelMover(OffloadConfig(**settings), streams)
        self.mover.attach(dict(self.nets))
        for _ in range(3 if warm else 0):
            for name in self.names:
                self.run(name)
        self.inner = streams.inner if isinstance(streams, RecordingStreams) else streams

    def run(self, name: str) -> None:
        """A pass of it and of its twin: the same bits."""
        with torch.no_grad():
            expected = self.twins[name](torch.ones(1, 8))
        assert torch.equal(call(self.nets[name], self.streams), expected)

    def fetched(self, passes: int = 2) -> int:
        """"one" runs, with "two" expected after it. Device bytes held for "two" now."""
        for _ in range(passes):
            with torch.no_grad():
                self.mover.expect("two")
            self.run("one")
        return self.streams.allocated_bytes - FIRST * LEAF_BYTES

    def counted(self, key: str, name: str = "two") -> int:
        return self.mover.status()["networks"][name][key]

    def both(self, action: Callable[[nn.Module], object], name: str = "two") -> None:
        for model in (self.nets[name], self.twins[name]):
            with torch.no_grad():
                action(model)

    def finish(self, active: bool = True) -> None:
        """All of it still computes the same; the judges are content; everything is given back."""
        for name in (*self.names, *self.names):
            self.run(name)
        status = self.mover.status()
        assert status["placement_faults"] == 0, status["last_error"]
        assert (status["state"] == "active") == active
        self.mover.detach()
        assert self.streams.allocated_bytes == 0
        for name in self.names:
            for mine, theirs in zip(self.nets[name].parameters(), self.twins[name].parameters(), strict=True):
                assert torch.equal(mine, theirs)
        if isinstance(self.streams, RecordingStreams):
            self.streams.check()


class Waiting(SimulatedStreams):
    """While `hold` is set, whoever waits for a copy that is not done is noted, and gets it."""

    hold = None
    waited = 0

    def _note(self, event: Event) -> None:
        if self.hold is not None and not self.done(event):
            self.waited += 1
            self.hold.let_pass(1 << 30)

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        event = super().record(stream, timing=timing)
        if stream is self.onload_stream:
            self.copies.append(event)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        self._note(event)
        super().wait(stream, event)

    def synchronize(self, event: Event) -> None:
        if event in self.copies:  # not what the other engine is just getting to
            self._note(event)
        super().synchronize(event)

    @property
    def copies(self) -> list[Event]:
        return self.__dict__.setdefault("_copies", [])


# -- while another one computes ----------------------------------------------------------------------------------------
def test_copies_are_under_way_before_anybody_waits_and_arrive_once() -> None:
    streams = simulated(Waiting)
    rig = Rig(streams)
    rig.run("one")
    before = rig.counted("streamed_bytes")
    with streams.hold_copies("onload") as hold:
        streams.hold = hold
        assert rig.fetched(passes=1) == SECOND * LEAF_BYTES  # its pass has ended, and nobody has waited for anything
        assert rig.counted("fetched_ahead_bytes") == SECOND * LEAF_BYTES
        with torch.no_grad():
            rig.mover.drain(for_network="two")
        assert rig.mover.current_network is None and streams.allocated_bytes == SECOND * LEAF_BYTES
        assert streams.waited == 0  # leaving "one" waits for its own copies, not for those behind them
        hold.let_pass(1 << 30)
        rig.run("two")
        streams.hold = None
    assert rig.counted("streamed_bytes") - before == SECOND * LEAF_BYTES  # each weight once
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


def test_the_next_one_finds_its_weights_there_under_the_judge() -> None:
    rig = Rig(recorded())
    for _ in range(3):
        assert rig.fetched() == SECOND * LEAF_BYTES
        rig.run("two")
        rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == rig.counted("fetched_ahead_bytes") == 3 * SECOND * LEAF_BYTES
    rig.finish()


@pytest.mark.parametrize("elsewhere", [False, True])
def test_jittery_and_poisoned_and_taken_over_by_another_thread(elsewhere: bool) -> None:
    streams = recorded(bandwidth=2e8, latency=1e-5, jitter_seconds=2e-4, seed=4, poison=True)
    rig = Rig(streams)
    for _ in range(3):
        assert rig.fetched() == SECOND * LEAF_BYTES
        handed_over(lambda: rig.run("two"), streams) if elsewhere else rig.run("two")
    rig.finish()


def test_the_network_in_use_is_not_delayed_by_what_it_has_fetched() -> None:
    """Its own copies come first: what streams in its next pass was enqueued already, or follows; leaving waits for those alone."""
    rig = Rig(recorded(), budget=ROOMY)
    order = []
    real = rig.streams.copy

    def copy(destination: torch.Tensor, source: torch.Tensor, stream: object) -> None:
        order.append(destination.numel())
        real(destination, source, stream)

    rig.streams.copy = copy
    rig.run("one")
    own = len(order)
    assert own == FIRST
    rig.mover.expect("two")
    rig.run("one")
    assert len(order) == own + SECOND
    rig.finish()


def test_memory_is_taken_as_the_pass_begins_and_copies_are_enqueued_as_it_ends() -> None:
    rig = Rig(recorded())
    rig.run("one")
    seen = {}

    def look(_: Leaf) -> None:
        seen["held"] = rig.streams.allocated_bytes
        seen["copies"] = rig.inner.onload_stream.copies

    rig.nets["one"].leaves[0].inside = look
    before = rig.inner.onload_stream.copies
    rig.fetched(passes=1)
    assert seen == {"held": (FIRST + SECOND) * LEAF_BYTES, "copies": before}
    rig.finish()


def test_one_that_streams_in_part_is_fetched_in_part() -> None:
    rig = Rig(recorded(), budget=4 * LEAF_BYTES)
    resident = rig.counted("resident_bytes")
    assert 0 < resident < SECOND * LEAF_BYTES
    held = rig.fetched()
    assert held == min(resident, 2 * LEAF_BYTES)
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == held
    rig.finish()


@pytest.mark.parametrize("budget", [1, 3, 4, 5, 6, 7, 9])
def test_both_together_keep_to_the_budget(budget: int) -> None:
    rig = Rig(simulated(), budget=budget * LEAF_BYTES)
    rig.mover.status()
    for _ in range(2):
        rig.fetched()
        rig.run("two")
        rig.run("two")
    least = 2 * LEAF_BYTES
    assert rig.mover.status()["peak_weight_bytes"] <= max(least, budget * LEAF_BYTES)
    assert (rig.counted("adopted_ahead_bytes") > 0) == (budget > FIRST)
    rig.finish()


def test_an_automatic_budget_has_room_beside_what_is_held() -> None:
    streams = simulated(capacity_bytes=256 << 20)
    rig = Rig(streams, budget=0, reserve_bytes=64 << 20)
    assert rig.fetched() == SECOND * LEAF_BYTES
    hog = streams.allocate(streams.free_memory())  # another program
    rig.run("one")
    assert streams.allocated_bytes - hog.numel() == FIRST * LEAF_BYTES
    streams.free(hog)
    rig.finish()


def test_an_open_ended_network_is_followed_from_its_second_pass() -> None:
    """SD2's text encoder: nobody says that its pass is over; the next one says it of the one before."""
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.mover.detach(["one"])
    first = rig.nets["one"]
    rig.mover.attach({"one": NetworkSpec([Region(first, trigger=first.leaves[0])], span=first.leaves[0], open_ended=True)})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    rig.mover.expect("two")
    rig.run("one")
    assert streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.expect("two")
    rig.run("one")
    assert streams.allocated_bytes == (FIRST + SECOND) * LEAF_BYTES
    rig.mover.drain(for_network="two")
    assert rig.mover.current_network is None and streams.allocated_bytes == SECOND * LEAF_BYTES
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


# -- nothing is fetched ------------------------------------------------------------------------------------------------
def test_nothing_before_it_has_learned_or_for_one_that_is_in_use_or_unknown() -> None:
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.run("one")
    rig.run("one")
    assert rig.fetched() == 0
    for name in ("one", "nobody"):
        rig.mover.expect(name)
        rig.run("one")
        assert streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()


def test_nothing_after_a_pass_that_was_cut_short() -> None:
    rig = Rig(recorded())
    rig.run("one")

    def fail(_: Leaf) -> None:
        raise KeyboardInterrupt

    rig.nets["one"].leaves[1].inside = fail
    rig.mover.expect("two")
    with pytest.raises(KeyboardInterrupt):
        call(rig.nets["one"], rig.streams)
    rig.run("one")  # this is when the interrupt is noticed
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES  # asked once, for that pass
    rig.nets["one"].leaves[1].inside = fail
    rig.mover.expect("two")
    with pytest.raises(KeyboardInterrupt):
        call(rig.nets["one"], rig.streams)
    assert rig.streams.allocated_bytes == (FIRST + SECOND) * LEAF_BYTES  # taken as the pass began; it is still open
    rig.run("two")
    assert rig.streams.allocated_bytes == SECOND * LEAF_BYTES
    rig.finish()


def test_nothing_where_changes_leave_no_trace_or_masters_are_not_pinned_and_there_is_no_ring() -> None:
    rig = Rig(recorded(), always_write_back=True)
    rig.fetched()
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()
    rig = Rig(recorded(pinning="none"))
    rig.fetched()
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


def test_nothing_after_a_pass_with_gradients() -> None:
    rig = Rig(recorded())
    rig.mover.expect("two")
    with judged(rig.streams), torch.enable_grad():
        rig.nets["one"](torch.ones(1, 8))
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


def test_nothing_after_a_learning_pass() -> None:
    rig = Rig(recorded())
    rig.mover.detach(["one"])
    rig.mover.attach({"one": rig.nets["one"]})
    rig.mover.expect("two")
    rig.run("one")
    assert rig.counted("fetched_ahead_bytes") == 0
    rig.finish()


@pytest.mark.parametrize("how", ["modules", "plan"])
def test_nothing_for_one_that_will_learn_or_plan_anew(how: str) -> None:
    rig = Rig(recorded())
    rig.run("one")
    if how == "modules":
        rig.both(lambda net: setattr(net.leaves[1], "inner", nn.LayerNorm(2)))
    else:
        rig.mover.configure(dataclasses.replace(rig.mover.config, budget_bytes=ROOMY // 2))
        rig.run("one")
    assert rig.fetched() == 0
    rig.finish()


def test_nothing_where_memory_was_found_to_be_short() -> None:
    rig = Rig(recorded())
    rig.run("one")
    rig.mover._networks["one"].planning.most_bytes = ROOMY // 2  # as `shed` leaves it
    assert rig.fetched(passes=1) == 0
    rig.finish()


def test_memory_runs_out_quietly() -> None:
    streams = simulated(capacity_bytes=(FIRST + SECOND) * LEAF_BYTES)
    rig = Rig(streams)
    hog = streams.allocate(2 * LEAF_BYTES)
    rig.run("one")
    rig.mover.expect("two")
    rig.run("one")
    assert rig.counted("fetched_ahead_bytes") == (SECOND - 2) * LEAF_BYTES
    assert not rig.mover.last_error
    streams.free(hog)
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == (SECOND - 2) * LEAF_BYTES
    rig.finish()


# -- given up ----------------------------------------------------------------------------------------------------------
def gradients(rig: Rig) -> None:
    with judged(rig.streams), torch.enable_grad():
        rig.nets["one"](torch.ones(1, 8))


def error_in_a_pass(rig: Rig) -> None:
    """An error of the device in the pass of the network in use."""
    rig.mover._networks["one"].met(RuntimeError("told to fail"))


def fault(rig: Rig) -> None:
    with judged(rig.streams):
        rig.mover._networks["one"].give_way(AssertionError())


def reconfigured(**changes: object) -> Callable[[Rig], None]:
    def act(rig: Rig) -> None:
        rig.mover.configure(dataclasses.replace(rig.mover.config, **changes))
        rig.run("one")

    return act


def shed(rig: Rig) -> None:
    assert rig.mover.shed("one") >= SECOND * LEAF_BYTES


CASES: dict[str, Callable[[Rig], object]] = {
    "another network": lambda rig: rig.run("three"),
    "drain": lambda rig: rig.mover.drain(),
    "drain for another": lambda rig: rig.mover.drain(for_network="three"),
    "drain on another thread": lambda rig: handed_over(rig.mover.drain, rig.streams),
    "detach it": lambda rig: (rig.mover.detach(["two"]), rig.mover.attach({"two": rig.nets["two"]})),
    "detach the one in use": lambda rig: (rig.mover.detach(["one"]), rig.mover.attach({"one": rig.nets["one"]})),
    "gradients": gradients,
    "error": error_in_a_pass,
    "fault": fault,
    "shed": shed,
    "another budget": reconfigured(budget_bytes=ROOMY // 2),
    "another limit": reconfigured(pinned_limit_bytes=64 << 20),
}


@pytest.mark.parametrize("case", list(CASES))
@pytest.mark.parametrize("slow", [False, True])
def test_given_up(case: str, slow: bool) -> None:
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = Rig(streams, count=3)
    rig.fetched()
    assert SECOND * LEAF_BYTES in {copy.memory.numel() * SECOND for copy in rig.mover._networks["two"].kept._held.values()}
    CASES[case](rig)
    for name, network in rig.mover._networks.items():
        assert not network.kept._held, name
    assert streams.allocated_bytes <= 3 * LEAF_BYTES
    rig.finish(active=case != "fault")


def test_demoted_or_closed_gives_it_up() -> None:
    for end in (lambda mover: mover.demote("slow"), lambda mover: mover.close()):
        rig = Rig(recorded())
        rig.fetched()
        end(rig.mover)
        assert rig.streams.allocated_bytes == 0
        rig.streams.check()


def test_a_model_that_is_gone_is_forgotten_with_what_was_fetched_for_it() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.nets["two"].to("meta")
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.detach()
    rig.streams.check()


def test_nothing_of_a_detached_network_is_remembered() -> None:
    rig = Rig(recorded())
    rig.run("one")
    two = rig.mover._networks["two"]
    seen = []

    def detach(_: Leaf) -> None:
        rig.mover.detach(["two"])  # memory is taken already, and nothing is copied yet
        seen.append(rig.streams.allocated_bytes)

    rig.nets["one"].leaves[0].inside = detach
    rig.fetched(passes=1)
    assert seen == [FIRST * LEAF_BYTES] and not rig.mover._context.ahead.concerns(two)
    rig.mover.attach({"two": rig.nets["two"]})
    rig.finish()


def test_the_network_in_use_grows() -> None:
    """Somebody puts a larger weight there: no room is left for others."""
    rig = Rig(recorded(), budget=(FIRST + SECOND) * LEAF_BYTES)
    assert rig.fetched() == SECOND * LEAF_BYTES
    rig.both(grow, "one")
    rig.run("one")
    assert not rig.mover._networks["two"].kept._held
    assert rig.fetched() == (SECOND - 1) * LEAF_BYTES + LEAF_BYTES
    assert rig.mover.status()["peak_weight_bytes"] <= (FIRST + SECOND) * LEAF_BYTES
    rig.finish()


def test_the_network_in_use_is_entered_anew() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.mover._networks["one"].contents.resized = True
    held = []
    rig.nets["one"].leaves[0].inside = lambda _: held.append(rig.streams.allocated_bytes)
    rig.run("one")
    assert held == [FIRST * LEAF_BYTES]
    rig.finish()


def test_the_wish_is_over_with_the_pass_it_was_for() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.run("two")
    rig.run("one")
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.expect("two")
    rig.mover.drain()  # nor is it kept until somebody comes back
    rig.run("one")
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()


def test_expected_but_another_was_expected_before() -> None:
    rig = Rig(recorded(), count=3)
    rig.fetched()
    rig.mover.expect("three")
    rig.run("one")
    assert rig.streams.allocated_bytes == (FIRST + 3) * LEAF_BYTES
    rig.run("three")
    assert rig.counted("adopted_ahead_bytes", "three") == 3 * LEAF_BYTES
    rig.finish()


def test_another_plan_has_the_room_first() -> None:
    """The network in use takes up a larger plan in the middle of a job."""
    rig = Rig(recorded(), budget=ROOMY)
    rig.fetched()
    one = rig.mover._networks["one"]
    plan = one.plan
    one.planning.better = lambda *_: plan
    held = []
    one.streaming._changeover.to = lambda plan: held.append(rig.streams.allocated_bytes)
    rig.run("one")
    assert held == [FIRST * LEAF_BYTES]
    del one.planning.better
    rig.finish()


def test_given_up_in_flight_and_detached_the_masters_wait_for_the_copies() -> None:
    rig = Rig(recorded(bandwidth=3e6))
    rig.fetched()
    rig.mover._context.ahead.give_up()  # as where the network in use wants the room
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.mover.detach(["two"])
    rig.streams.check()
    rig.mover.attach({"two": rig.nets["two"]})
    rig.finish()


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("staging", [False, True])
def test_entered_and_left_at_once_while_copies_are_under_way(staging: bool, changed: bool) -> None:
    """Those that were fetched, and with `changed` one of its own among them."""
    rig = Rig(recorded(bandwidth=3e6), **({"pinned_limit_bytes": 3 * LEAF_BYTES} if staging else {}))
    rig.fetched()
    if changed:
        rig.both(write)
    with torch.no_grad():
        rig.mover.prepare("two")
    assert rig.counted("adopted_ahead_bytes") > 0
    rig.mover.drain()
    assert rig.streams.allocated_bytes == 0
    rig.streams.check()
    rig.finish()


@pytest.mark.parametrize("staging", [False, True])
def test_drained_nothing_is_in_flight(staging: bool) -> None:
    rig = Rig(recorded(bandwidth=3e6), **({"pinned_limit_bytes": 3 * LEAF_BYTES} if staging else {}))
    rig.fetched()
    units = rig.mover._networks["two"].contents.units
    assert any(unit.copied is not None for unit in units)
    rig.mover.drain()
    assert not any(in_flight(unit) for unit in units)
    rig.finish()


# -- out of date -------------------------------------------------------------------------------------------------------
def write(net: Chain) -> None:
    net.leaves[1].weight.mul_(0.5)


def replace(net: Chain) -> None:
    net.leaves[1].weight = nn.Parameter(net.leaves[1].weight * 0.5)


def shrink(net: Chain) -> None:
    net.leaves[1].weight = nn.Parameter(net.leaves[1].weight[:128] * 0.5)


def grow(net: Chain) -> None:
    net.leaves[1].weight = nn.Parameter(torch.cat([net.leaves[1].weight] * 2))


def add_a_bias(net: Chain) -> None:
    net.leaves[1].bias = nn.Parameter(torch.tensor([0.25]))


def load(net: Chain) -> None:
    net.load_state_dict({key: value * 0.75 for key, value in net.state_dict().items()})


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("change", [write, replace, shrink, grow, add_a_bias, load])
def test_changed_on_the_host_meanwhile(change: Callable[[Chain], None], slow: bool, masters: bool) -> None:
    """`masters`: somebody asks for them before the network is entered, so that the change is old news by then."""
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = Rig(streams)
    rig.fetched()
    rig.both(change)
    if masters:
        rig.mover.masters(["two"])
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") < SECOND * LEAF_BYTES
    rig.run("two")
    rig.finish()


def test_changed_before_it_is_fetched() -> None:
    """What is fetched is the new truth."""
    rig = Rig(recorded())
    rig.run("one")
    rig.both(write)
    rig.fetched(passes=1)
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == SECOND * LEAF_BYTES
    rig.finish()


def test_changed_without_a_trace_and_told() -> None:
    rig = Rig(recorded())
    rig.fetched()
    for net in (rig.nets["two"], rig.twins["two"]):
        net.leaves[2].weight.data.mul_(0.5)
    rig.mover.mark_dirty(rig.nets["two"].leaves[2])
    rig.run("two")
    assert rig.counted("adopted_ahead_bytes") == (SECOND - 1) * LEAF_BYTES
    rig.finish()


def test_changed_between_the_reservation_and_the_copy() -> None:
    rig = Rig(recorded())
    rig.run("one")
    changes = iter((grow, write, replace))

    def change(_: Leaf) -> None:
        with rig.mover._context.checker.suspended():
            rig.both(next(changes))

    for _ in range(3):
        rig.nets["one"].leaves[1].inside = change
        rig.fetched(passes=1)
        rig.run("two")
    rig.finish()


def test_modules_changed_meanwhile() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.both(lambda net: setattr(net.leaves[1], "inner", nn.LayerNorm(2)))
    rig.run("two")
    rig.finish()


def test_the_plan_changed_meanwhile() -> None:
    rig = Rig(recorded())
    rig.fetched()
    rig.mover.configure(dataclasses.replace(rig.mover.config, budget_bytes=4 * LEAF_BYTES))
    rig.mover.status()
    rig.run("two")
    assert rig.streams.allocated_bytes <= 4 * LEAF_BYTES
    rig.finish()


# -- masters that are not pinned, or in a file ---------------------------------------------------------------------------
def staged(streams: Streams, budget: int = ROOMY) -> Rig:
    """No master is pinned; there is a ring."""
    rig = Rig(streams, budget, pinned_limit_bytes=3 * LEAF_BYTES)
    assert rig.mover.status()["staging_bytes"] > 0
    return rig


@pytest.mark.parametrize("slow", [False, True])
def test_through_the_staging_ring(slow: bool) -> None:
    streams = recorded(**({"bandwidth": 3e6} if slow else {}))
    rig = staged(streams)
    for _ in range(2):
        rig.fetched()
        rig.run("two")
    assert rig.counted("fetched_ahead_bytes") == 2 * SECOND * LEAF_BYTES
    assert rig.counted("adopted_ahead_bytes") > 0 and rig.counted("staged_bytes") > 0
    rig.finish()


@pytest.mark.parametrize("case", ["another network", "drain", "gradients", "error", "shed", "another limit"])
def test_given_up_in_the_staging_ring(case: str) -> None:
    streams = recorded(bandwidth=3e6)
    rig = Rig(streams, count=3, pinned_limit_bytes=3 * LEAF_BYTES)
    assert rig.fetched() > 0
    CASES[case](rig)
    assert not rig.mover._networks["two"].kept._held
    rig.finish()


@pytest.mark.parametrize("change", [None, write, replace, grow])
def test_from_a_file(tmp_path: Path, change: Callable[[Chain], None] | None) -> None:
    streams = recorded()
    rig = Rig(streams, warm=False)
    rig.mover.detach(["two"])
    file = put_in_file(rig.nets["two"], tmp_path / "weights")
    rig.mover.host.files.append(file)
    rig.mover.attach({"two": rig.nets["two"]})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    for _ in range(2):
        rig.fetched()
        if change is not None:
            rig.both(change)
        rig.run("two")
    assert rig.counted("fetched_ahead_bytes") > 0
    rig.run("one")
    in_file = [unit.in_file is not None for unit in rig.mover._networks["two"].contents.units]
    rig.both(lambda net: net.leaves[3].weight.mul_(0.5))
    rig.fetched(passes=1)  # what was changed is not packed at the end of another network's pass
    assert [unit.in_file is not None for unit in rig.mover._networks["two"].contents.units] == in_file
    rig.finish()
    file.close()


def test_a_read_that_failed_is_tried_again_when_it_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded(), warm=False)
    rig.mover.detach(["two"])
    file = put_in_file(rig.nets["two"], tmp_path / "weights")
    rig.mover.host.files.append(file)
    rig.mover.attach({"two": rig.nets["two"]})
    for _ in range(3):
        for name in rig.names:
            rig.run(name)
    rig.run("one")
    real, failed = FileMaster.read, []

    def read(master: FileMaster, into: torch.Tensor, start: int) -> None:
        if not failed:
            failed.append(True)
            raise OSError(BUS)
        real(master, into, start)

    monkeypatch.setattr(FileMaster, "read", read)
    assert rig.fetched(passes=1) > 0
    wait_for_the_thread(rig)
    rig.run("two")
    assert failed and not rig.mover.last_error
    assert 0 < rig.counted("adopted_ahead_bytes") < SECOND * LEAF_BYTES
    rig.finish()
    file.close()


def wait_for_the_thread(rig: Rig) -> None:
    for copy in rig.mover._networks["two"].kept._held.values():
        if isinstance(copy.used, Staged):
            with contextlib.suppress(OSError):
                copy.used.event()


# -- errors ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", range(SECOND))
@pytest.mark.parametrize("then", ["two", "one", "drain"])
def test_a_copy_that_fails(number: int, then: str) -> None:
    device = simulated()
    streams = RecordingStreams(device)
    rig = Rig(streams)
    rig.run("one")
    rig.mover.expect("two")
    failing(device, "onload", number)
    try:
        rig.run("one")
        rig.mover.drain() if then == "drain" else rig.run(then)
    except RuntimeError as error:
        assert str(error) == BUS
    device.onload_stream.link.fail_copy = None
    for name in ("one", "two", "one"):
        try:
            rig.run(name)
        except RuntimeError as error:
            assert str(error) == BUS
    assert not rig.mover.demoted
    rig.finish()


def test_an_error_of_the_device_while_it_is_fetched_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    rig = Rig(recorded())
    rig.run("one")
    real = rig.streams.copy

    def copy(*_: object) -> None:
        raise RuntimeError(BUS)

    rig.streams.copy = copy
    assert rig.fetched(passes=1) == 0
    rig.streams.copy = real
    assert not rig.mover.demoted
    rig.finish()


def test_a_fault_of_ours_while_it_is_fetched_makes_way_for_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded())
    rig.run("one")

    def wrong(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Ahead, "_fetch", wrong)
    assert rig.fetched(passes=1) == 0
    rig.run("one")
    assert "fault of this extension" in rig.mover.demoted
    rig.run("two")
    assert rig.streams.allocated_bytes == 0
    rig.streams.check()


def test_an_interrupt_while_it_is_fetched_gives_everything_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(recorded())
    rig.run("one")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Ahead, "_fetch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rig.fetched(passes=1)
    monkeypatch.undo()
    assert rig.streams.allocated_bytes == FIRST * LEAF_BYTES
    rig.finish()
