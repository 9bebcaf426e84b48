"""Two networks and a mover that fetches the second one's residents while the first computes: for the tests of `ahead`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import nn

from lib_async_lowvram import AsyncModelMover, OffloadConfig
from lib_async_lowvram.device.recorder import RecordingStreams
from lib_async_lowvram.device.simulated import SimulatedStreams
from lib_async_lowvram.device.streams import Event, Stream, Streams
from tests.mover.chains import LEAF_BYTES, Chain, call, handed_over, judged, pair

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


# -- changes made meanwhile --------------------------------------------------------------------------------------------
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
