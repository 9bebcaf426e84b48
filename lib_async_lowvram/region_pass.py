"""A pass moved as stock moves it: one whole region on the device at a time, both ways waited for.

Two uses. The *learning pass* of a network runs like this while every module is observed: which fire, in what order, nested
how, for how long. Only with a whole region on the device can a module that holds weights but never fires be found without
breaking anything.

And a pass with gradients enabled runs like this unobserved, because autograd keeps views of weights that a ring would
overwrite: their memory lives as long as the graph does. Its last region stays on the device until the network's next pass or
until it is left, as under stock: `backward` may read the Parameters themselves, and an optimiser step their gradients, which
move with them.

I2: at most one region's weights (plus loose tensors and weights outside all regions) are on the device: never more than
stock. Called by `network` on the sampling thread; every copy is waited for.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from lib_async_lowvram.core.states import UnitState
from lib_async_lowvram.device.loose import LooseTensors
from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.device.weights import Change, Unit

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


@dataclass(frozen=True)
class Observed:
    """What a learning pass saw.

    Attributes:
        firings: (id of module, seconds from its start to the start of the next firing, moves not counted).
        fired: ids of modules that fired. inside: id of a module -> ids of those that fired while it ran.
        bandwidth: of the moves to the device, bytes per second; 0.0 when nothing was moved.
    """

    firings: tuple[tuple[int, float], ...]
    fired: frozenset[int]
    inside: dict[int, frozenset[int]]
    bandwidth: float


class RegionPass:
    """Holds at most one region, and (when `observe`) writes down what fires."""

    def __init__(self, network: Network, observe: bool) -> None:
        self._network = network
        self._streams = network.context.streams
        self.observes = observe
        self._gradients = not observe  # whether they were on at any time
        self._held: int | None = None
        self._on_device: list[Unit] = []
        self._memory: dict[int, torch.Tensor] = {}  # theirs, by index
        self._loose: LooseTensors | None = None
        self._marks: list[tuple[int | None, Event]] = []  # (id of module, or None for the end of a move; when)
        self._fired: dict[int, weakref.ref[nn.Module]] = {}
        self._copies: list[tuple[int, Event, Event]] = []  # (bytes, start, end) of each onload
        self._running: list[int] = []  # ids of the observed modules running now, outermost first
        self._inside: dict[int, set[int]] = {}
        self._always: list[Unit] = []
        self._root_loose: LooseTensors | None = None
        self.consumer = self._streams.current_stream()

    def start(self) -> None:
        """Bring what is outside all regions. May raise torch's out-of-memory error; `rescue.abandon` cleans up."""
        network = self._network
        with network.judged(False):
            self._always = network.contents.units_of(None)
            self._load(self._always)
            self._root_loose = self._loose_of(None)
        self._mark(None)

    # -- what the hooks tell -------------------------------------------------------------------------------------------
    def before(self, module: nn.Module) -> None:
        """A module is about to run: hold its region."""
        self._gradients = self._gradients or torch.is_grad_enabled()
        self.consumer = self._streams.current_stream()
        region = self._network.contents.region_of(module)
        if region is not None and region != self._held:
            self._hold(region)
        if self.observes:
            key = id(module)
            self._fired.setdefault(key, weakref.ref(module))
            for outer in self._running:
                self._inside.setdefault(outer, set()).add(key)
            self._running.append(key)
            self._mark(key)

    def after(self, module: nn.Module) -> None:
        """It has run, and with it whatever an exception left running inside."""
        self._gradients = self._gradients or torch.is_grad_enabled()
        if id(module) in self._running:
            del self._running[self._running.index(id(module)) :]

    def _mark(self, what: int | None) -> None:
        if self.observes:
            streams = self._streams
            self._marks.append((what, streams.record(streams.current_stream(), timing=True)))

    # -- moves ---------------------------------------------------------------------------------------------------------
    def _hold(self, region: int) -> None:
        self._mark(None)  # what was computed so far ends here; the move is nobody's
        with self._network.judged(False):
            self._let_go()
            self._held = region
            self._load(self._network.contents.units_of(region))
            self._loose = self._loose_of(region)
        self._mark(None)

    def _loose_of(self, region: int | None) -> LooseTensors:
        contents = self._network.contents
        return LooseTensors(self._streams, contents.modules_of(region), contents.unmanaged)

    def _leave_loose(self, loose: LooseTensors | None) -> None:
        if loose is not None:
            loose.shared = self._gradients
            loose.leave()

    def _load(self, units: list[Unit]) -> None:
        streams, network = self._streams, self._network
        for unit in units:
            if unit.state is not UnitState.HOST:
                continue  # held for the whole pass already
            network.contents.true_up(unit)
            memory = self._memory[unit.index] = streams.allocate(unit.nbytes)
            unit.bind(memory)
            self._on_device.append(unit)
            unit.to(UnitState.ONLOADING)
            start = streams.record(streams.onload_stream, timing=True)
            source = unit.bytes_on_host()
            streams.copy(memory, source, streams.onload_stream)
            self._copies.append((unit.nbytes, start, streams.record(streams.onload_stream, timing=True)))
            if source is not unit.master:
                streams.synchronize(self._copies[-1][2])  # read for this copy alone
        streams.synchronize(streams.record(streams.onload_stream))
        for unit in units:
            if unit.state is UnitState.ONLOADING:
                unit.to(UnitState.READY)
                unit.publish()
                self._gradients_follow(unit)

    def _gradients_follow(self, unit: Unit) -> None:
        if not self._gradients:
            return
        for ref in unit.members:
            module = ref()
            for parameter in () if module is None else module._parameters.values():
                if parameter is not None and parameter.grad is not None and parameter.grad.device != parameter.device:
                    parameter.grad = parameter.grad.to(parameter.device)

    def _let_go(self, all_of_them: bool = False, keep: bool = False) -> None:
        self._leave_loose(self._loose)
        self._loose = None
        stay = [] if all_of_them else self._always
        for unit in self._on_device:
            if unit not in stay:
                self._unload(unit, keep)
        self._on_device = [unit for unit in self._on_device if unit in stay]
        self._held = None

    def _unload(self, unit: Unit, keep: bool) -> None:
        streams = self._streams
        memory = self._memory[unit.index]
        consumed = streams.record(self.consumer)  # not the calling thread's: another one may close the pass
        if self._gradients:
            streams.share(memory, self.consumer)
        change = unit.device_change()
        if change is Change.LAYOUT:
            unit.to(UnitState.WRITE_BACK)
            # Packing reads the device on the calling thread's stream - the consumer, or one that `close` has put behind it - and
            # before the memory goes.
            self._network.contents.adopt(unit)
            consumed = streams.record(streams.current_stream())
        else:
            if change is Change.VALUES:
                unit.to(UnitState.WRITE_BACK)
                unit.leave_file()
                streams.wait(streams.offload_stream, consumed)
                streams.copy(unit.master, memory, streams.offload_stream)
                streams.synchronize(streams.record(streams.offload_stream))
                self._network.counters.write_backs += 1
            unit.unpublish()
            unit.dirty = False
        self._gradients_follow(unit)
        unit.to(UnitState.HOST)
        unit.unbind()
        del self._memory[unit.index]
        if keep and change is not Change.LAYOUT:
            self._network.kept.put(unit, memory, consumed)
        else:
            streams.free(memory, (consumed,))

    # -- the end -------------------------------------------------------------------------------------------------------
    def close(self, keep: bool) -> Observed | None:
        """Everything back to the host; with `keep`, what is on the device now stays there as well, in the network's `kept`.
        What was observed, or None when nothing was."""
        self._mark(None)
        streams = self._streams
        if streams.current_stream() != self.consumer:  # another thread closes the pass; loose tensors leave on its stream
            streams.wait(streams.current_stream(), streams.record(self.consumer))
        with self._network.judged(False):
            self._let_go(all_of_them=True, keep=keep and not self._gradients)
            self._leave_loose(self._root_loose)
        if not self.observes:
            return None
        marks = self._marks
        if marks:
            streams.synchronize(marks[-1][1])
        firings = []
        for (what, when), (_, then) in zip(marks, marks[1:], strict=False):
            if what is not None:
                firings.append((what, max(0.0, streams.elapsed(when, then))))
        fired = frozenset(number for number, ref in self._fired.items() if ref() is not None)
        inside = {outer: frozenset(inner) for outer, inner in self._inside.items()}
        return Observed(tuple(firings), fired, inside, self._bandwidth())

    # -- after an error -----------------------------------------------------------------------------------------------
    unsaved = ()
    """Every write-back is waited for while its unit is still published."""

    @property
    def blocks(self) -> list[torch.Tensor]:
        """Device memory of units."""
        return list(self._memory.values())

    fences = ()

    def abandon(self) -> None:
        """Loose tensors go home; `blocks` are the caller's to free. Nothing is in flight, and units are home already."""
        for loose in (self._loose, self._root_loose):
            self._leave_loose(loose)

    def _bandwidth(self) -> float:
        """From the largest copies, which make up half of the bytes: in small ones the latency drowns the rate."""
        nbytes, seconds, half = 0, 0.0, sum(size for size, _, _ in self._copies) / 2
        for size, start, end in sorted(self._copies, key=lambda copy: -copy[0]):
            if nbytes >= half:
                break
            nbytes += size
            seconds += self._streams.elapsed(start, end)
        return nbytes / seconds if seconds > 0 else 0.0
