"""What can go wrong, and in which kind of pass: the faults and phases of `fault_table`."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from lib_async_lowvram import AsyncModelMover, NetworkSpec, Region
from lib_async_lowvram.device.simulated import SimulatedStreams
from tests.mover.chains import LEAF_BYTES, Chain, Leaf, X, attached, call, on_thread, pair, simulated

BUDGET = 4 * LEAF_BYTES  # a ring for two, and two residents
CAPACITY = 32 * LEAF_BYTES
RAISED = "raised by the fault table"


class Interrupt(BaseException):
    """As the WebUI interrupts: past every `except Exception`."""


class FaultyStreams(SimulatedStreams):
    """Lets the n-th allocation or the n-th enqueuing of a copy fail, counted from `arm`. Pins `pins_left` times, and at most
    `pinned_most` bytes at once."""

    def __init__(self, pins_left: float = math.inf, pinned_most: float = math.inf, **settings: Any) -> None:
        super().__init__(**settings)
        self.pins_left, self.pinned_most = pins_left, pinned_most
        self.pinned: dict[int, int] = {}
        self.counts: dict[str, int] = {}
        self.fails: tuple[str, int] | None = None
        self.fail_copy = self._on_engine

    def arm(self, what: str, number: int) -> None:
        self.counts.clear()
        self.fails = (what, number)

    def disarm(self) -> None:
        self.fails = None

    def _comes(self, what: str) -> bool:
        self.counts[what] = self.counts.get(what, 0) + 1
        return self.fails == (what, self.counts[what])

    def _on_engine(self, number: int) -> RuntimeError | None:
        lane = threading.current_thread().name.removeprefix("async-lowvram-")
        return RuntimeError(RAISED) if self._comes(f"{lane} fails") else None

    def pin(self, address: int, nbytes: int) -> bool:
        self.pins_left -= 1
        if self.pins_left < 0 or sum(self.pinned.values()) + nbytes > self.pinned_most or not super().pin(address, nbytes):
            return False
        self.pinned[address] = nbytes
        return True

    def unpin(self, address: int) -> None:
        self.pinned.pop(address, None)
        super().unpin(address)

    def allocate(self, nbytes: int) -> torch.Tensor:
        if self._comes("allocate"):
            raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. ({RAISED})")
        return super().allocate(nbytes)

    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Any) -> None:
        if self._comes(f"{stream.lane} refused"):
            raise RuntimeError(RAISED)
        super().copy(destination, source, stream)


@dataclass
class Rig:
    """What a try is made with."""

    streams: FaultyStreams
    net: Chain
    twin: Chain
    mover: AsyncModelMover
    after: list[Callable[[], object]] = field(default_factory=list)
    """What ends the fault."""

    def next_pass(self) -> bool:
        with torch.no_grad():
            expected = self.twin(X)
        return torch.equal(call(self.net, self.streams), expected)


def change(leaf: Leaf) -> None:
    leaf.weight.mul_(0.5)


def changed(net: Chain) -> None:
    """The job changes every leaf's weights, in its forward."""
    for leaf in net.leaves:
        leaf.inside = change


# -- phases: what kind of pass the job is ------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Phase:
    """`passes`: before the job; `left`: the network was left since; `changing`: every leaf's weights; `grad`: with gradients; `budget`:
    bytes, from the job on, which takes `longer` passes then."""

    name: str
    passes: int
    left: bool = False
    changing: bool = False
    grad: bool = False
    budget: int = BUDGET
    longer: int = 0

    def rig(self, **limits: float) -> Rig:
        streams = simulated(FaultyStreams, capacity_bytes=CAPACITY, bandwidth=2e9, **limits)
        net, twin = pair()
        for each in (net, twin):
            each.register_buffer("shift", torch.arange(8.0))
            each.register_forward_hook(lambda module, args, output: output + module.shift)
        spec = NetworkSpec([Region(leaf) for leaf in net.leaves], net, roots=[net])
        made = Rig(streams, net, twin, attached(spec, streams, BUDGET, run=net, passes=self.passes))
        made.mover._context.budget = lambda key: self.budget
        if self.left:
            made.mover.drain()
        if self.changing:
            changed(net)
        return made

    def job(self, rig: Rig) -> bool:
        """Run it; whether it gave the twin's bits. The twin is changed as far as the job came."""
        error: BaseException | None = None
        try:
            for _ in range(self.longer):
                if not rig.next_pass():
                    return False
            got = rig.net(X) if self.grad else call(rig.net, rig.streams)
        except BaseException as raised:
            error = raised
        if self.changing:
            with torch.no_grad():
                for mine, theirs in zip(rig.net.leaves, rig.twin.leaves, strict=True):
                    if mine.inside is not change:
                        change(theirs)
                    mine.inside = None
        if error is not None:
            raise error
        with torch.no_grad():
            return torch.equal(got.detach(), rig.twin(X))


PHASES = [
    Phase("learning", 0),
    Phase("learning, weights changed", 0, changing=True),
    Phase("entering", 2, left=True),
    Phase("entering, weights changed", 2, left=True, changing=True),
    Phase("streaming", 3),
    Phase("streaming, weights changed", 3, changing=True),
    Phase("regions (gradients on)", 3, grad=True),
    Phase("residents grow", 3, budget=BUDGET + 2 * LEAF_BYTES, longer=3),
    Phase("residents are shed", 3, budget=BUDGET - LEAF_BYTES, longer=3),
]


# -- faults ------------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """`arm(rig, number)`; `places(rig)`: how many there are, after a job armed with number 0. `raises`: what may reach the caller."""

    name: str
    arm: Callable[[Rig, int], None]
    places: Callable[[Rig], int]
    raises: tuple[type[BaseException], ...]
    lingers: bool = False
    """It may be found after the pass it happened in: then the job is that pass, another one, and leaving."""
    limits: Callable[[int], dict[str, float]] = lambda number: {}
    """What the device will do from the start."""


def counted(what: str, *raises: type[BaseException]) -> Fault:
    names = {
        "allocate": "device memory refused",
        "onload fails": "onload fails on its way",
        "offload fails": "write-back fails on its way",
        "onload refused": "onload refused at once",
        "offload refused": "write-back refused at once",
    }
    return Fault(
        names[what], lambda rig, number: rig.streams.arm(what, number), lambda rig: rig.streams.counts.get(what, 0), raises, "fails" in what
    )


def at_leaf(name: str, action: Callable[[Rig], None], *raises: type[BaseException], late: bool = False) -> Fault:
    """`late`: after the leaf has changed its weights, if it does; else before."""

    def arm(rig: Rig, number: int) -> None:
        if not number:
            return
        leaf = rig.net.leaves[number - 1]
        if not late:
            handle = leaf.register_forward_pre_hook(lambda *_: action(rig))
        else:
            handle = leaf.register_forward_hook(lambda *_: action(rig))
        rig.after.append(handle.remove)

    return Fault(name, arm, lambda rig: len(rig.net.leaves), raises)


def take_all(rig: Rig) -> None:
    others = rig.streams.sibling()
    block = others.allocate(rig.streams.free_memory() // 512 * 512)
    rig.after.append(lambda: (others.free(block), others.close()))


def need_too_much(rig: Rig) -> None:
    rig.streams.free(rig.streams.sibling().allocate(rig.streams.free_memory() + 512))


def slow_down(rig: Rig) -> None:
    streams = rig.streams
    streams.bandwidth, streams.latency = 2e7, 5e-4
    rig.after.append(lambda: (setattr(streams, "bandwidth", 2e9), setattr(streams, "latency", 0.0)))


def fail(error: BaseException) -> Callable[[Rig], None]:
    def action(rig: Rig) -> None:
        raise error

    return action


def elsewhere(action: Callable[[Rig], object]) -> Callable[[Rig], None]:
    return lambda rig: on_thread(lambda: action(rig))


def from_the_start(name: str, limits: Callable[[int], dict[str, float]]) -> Fault:
    return Fault(name, lambda rig, number: None, lambda rig: len(rig.net.leaves), (), limits=limits)


OOM = torch.cuda.OutOfMemoryError
FAULTS = [
    from_the_start("pinning refused from the n-th time on", lambda number: {"pins_left": number - 1}),
    from_the_start("no more than n - 1/2 masters can be pinned", lambda number: {"pinned_most": (number - 0.5) * LEAF_BYTES}),
    counted("allocate", OOM),
    counted("onload fails", RuntimeError),
    counted("offload fails", RuntimeError),
    counted("onload refused", RuntimeError),
    counted("offload refused", RuntimeError),
    at_leaf("memory taken by somebody else from a leaf on", take_all, OOM),
    at_leaf("computing runs out of memory", need_too_much, OOM),
    at_leaf("a hundred times slower from a leaf on", slow_down),
    at_leaf("exception before a leaf", fail(ValueError(RAISED)), ValueError),
    at_leaf("exception behind a leaf", fail(ValueError(RAISED)), ValueError, late=True),
    at_leaf("interrupt before a leaf", fail(Interrupt()), Interrupt),
    at_leaf("interrupt behind a leaf", fail(Interrupt()), Interrupt, late=True),
    at_leaf("drain in the pass", lambda rig: rig.mover.drain()),
    at_leaf("drain by another thread", elsewhere(lambda rig: rig.mover.drain())),
    at_leaf("detach in the pass", lambda rig: rig.mover.detach()),
    at_leaf("detach by another thread", elsewhere(lambda rig: rig.mover.detach())),
]
