"""The resident set of a network in use: how it arrives, and how changes to it are seen.

Problem: residents must be on the device before they are used, but loading them all before the first pass would leave the
device idle meanwhile. So they are onloaded in execution order, among the streamed units, during the first pass after the
network is entered; each has hooks only until it has arrived. From then on they cost nothing per use: one sweep at each
pass's start and end compares them with what was published (I5).

Called by `streaming` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from lib_async_lowvram.core.states import UnitState
from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.staging import last_of
from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.device.weights import Change, Unit
from lib_async_lowvram.transfers import Transfers

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


def place_of(network: Network, unit: Unit) -> int:
    """Place of the unit's first firing in the learned pass; after all others when it did not fire."""
    learned = network.learned
    return learned.first.get(unit.index, len(learned.steps))


def in_firing_order(network: Network) -> list[Unit]:
    """The residents of its plan: those nobody announces first, then as they fire."""
    announced = network.contents.announced
    units = (network.contents.units[index] for index in network.plan.resident)
    return sorted(units, key=lambda unit: (unit.index in announced, place_of(network, unit), unit.index))


class Residents:
    """See the module."""

    def __init__(self, network: Network, arena: Arena, transfers: Transfers) -> None:
        self._network = network
        self._contents = network.contents
        self._arena = arena
        self._transfers = transfers
        self._streams = network.context.streams
        self.expected = deque(in_firing_order(network))
        """Those that have not been onloaded yet, in the order in which they will be."""
        self._arrived: list[Unit] = []
        while self.expected and not self._announced(self.expected[0]):
            self.onload_next()

    def _announced(self, unit: Unit) -> bool:
        return unit.index in self._contents.announced

    def place(self, unit: Unit) -> int:
        """See `place_of`."""
        return place_of(self._network, unit)

    def onload_before(self, unit: Unit) -> None:
        """Onload those that fire before `unit`."""
        place = self.place(unit)
        while self.expected and self.place(self.expected[0]) < place:
            self.onload_next()

    def onload_next(self) -> None:
        """Onload the one that is wanted next."""
        self._onload(self.expected[0])

    def _onload(self, unit: Unit) -> None:
        self.expected.remove(unit)
        if unit.state is UnitState.WRITE_BACK:
            unit.to(UnitState.HOST)  # changed in the pass it streamed for the last time; the copy stream waits for that
        self._contents.true_up(unit)
        kept = self._network.kept.take(unit)
        true = kept is not None and kept.is_true(unit)
        if kept is not None and not true:
            used = last_of(kept.used, self._streams)  # the learning pass may read it still, or a copy be on its way there
            if kept.memory.numel() < unit.nbytes:
                self._streams.free(kept.memory, (used,))
                kept = None
            else:
                self._streams.wait(self._streams.onload_stream, used)
        if kept is not None:
            self._arena.adopt(unit.index, kept.memory)
        unit.bind(self._arena.block(unit.index, unit.nbytes))
        if true:
            unit.to(UnitState.ONLOADING)
            unit.copied = kept.used  # this copy was made by the learning pass, or ahead
            if kept.arriving:
                self._transfers.adopted(unit)
        else:
            self._transfers.onload(unit)
        self._arrived.append(unit)
        if not self._announced(unit):
            self._transfers.wait_and_publish(unit, self._streams.current_stream())

    def make_room(self, unit: Unit) -> None:
        """Take the block in which a streamed unit will be resident. Raises torch's out-of-memory error."""
        self._arena.block(unit.index, unit.nbytes)

    def give_up_room(self, unit: Unit) -> None:
        """It will not be resident after all."""
        self._arena.release_block(unit.index, ())

    def expect(self, unit: Unit) -> None:
        """A streamed unit that is on the host becomes a resident: its next onload, in its turn, is the last one."""
        unit.resident = True
        self.expected.append(unit)
        self.expected = deque(sorted(self.expected, key=lambda each: (self.place(each), each.index)))

    def shed(self, unit: Unit) -> None:
        """An arrived resident streams from now on: its device copy is dropped behind what may still read it. After `sweep`."""
        after = [self._streams.record(self._streams.current_stream())]
        if unit.state is UnitState.WRITE_BACK:
            self._streams.synchronize(unit.written)  # changed just before: from here on its master may be read
        elif unit.written is not None:
            after.append(unit.written)
        self._arrived.remove(unit)
        unit.unpublish()
        unit.to(UnitState.HOST)
        unit.unbind()
        unit.resident = False
        self._arena.release_block(unit.index, tuple(after))
        self._network.hooks.unit_on(unit)

    def arrive(self, unit: Unit) -> None:
        """`unit` is used for the first time since the network was entered."""
        if unit.state is UnitState.HOST and unit not in self.expected:
            known, planned = unit in self._contents.units, unit.index in self._network.plan.resident
            raise AssertionError(f"{unit} is not expected: arrived {unit in self._arrived}, known {known}, planned {planned}")
        if unit.state is UnitState.HOST or (unit.state is UnitState.WRITE_BACK and unit in self.expected):
            self._onload(unit)
        self._publish(unit)

    def _publish(self, unit: Unit) -> None:
        if unit.state is UnitState.ONLOADING:
            change = unit.host_change()
            if change is not Change.NONE or unit.dirty:
                # Changed on the host after its onload was enqueued: that copy is stale.
                self._network.counters.refetches += 1
                self._contents.true_up(unit)
                unit.bind(self._arena.block(unit.index, unit.nbytes))
                self._transfers.onload(unit)
            self._transfers.wait_and_publish(unit, self._streams.current_stream())
        self._network.hooks.unit_off(unit)

    def all_arrived(self) -> None:
        """A pass has ended: those that did not fire in it are published as well."""
        while self.expected:
            self.onload_next()
        for unit in self._arrived:
            self._publish(unit)

    def sweep(self, starting: bool = False) -> None:
        """Look for changes in those that are published, and write them back. `starting`: a pass is, and may change them again."""
        streams = self._network.context.streams
        consumer = streams.current_stream()
        written: Event | None = None
        for unit in self._arrived:
            if unit.state is UnitState.WRITE_BACK:
                streams.wait(consumer, unit.written)  # it may be changed again, under the write-back
                unit.to(UnitState.READY)
            if unit.state is not UnitState.READY:
                continue
            change = unit.device_change()
            if change is Change.VALUES:
                self._transfers.write_back(unit, consumer)
                unit.accept_versions()
                written = unit.written
            elif change is Change.LAYOUT:
                self._contents.adopt(unit)
                unit.bind(self._arena.block(unit.index, unit.nbytes))
                self._transfers.onload(unit, behind=consumer)
                self._transfers.wait_and_publish(unit, self._streams.current_stream())
        if starting and written is not None:
            streams.wait(consumer, written)  # the newest: write-backs are done in order
