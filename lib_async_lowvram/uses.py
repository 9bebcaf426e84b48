"""The uses of a network's streamed units: acquire and release of each, and the onloads that run ahead of them.

Problem: at every acquire the unit's copy should long be done, and at every release the next copies should already be under
way, without the host ever waiting (I3), without allocating (I2), and without anybody reading a weight before its copy or
overwriting one before its last use. This runs twice per unit and pass; what it costs is the host's share of a pass.

How: `issue_ahead` walks the execution order from the position reached, enqueuing onloads on the copy stream until a unit's
place in the ring is taken; it runs at every acquire and release, and wraps into the next pass. Each onload waits on the copy
stream for the fences of whoever was there before. `acquire` makes the *consumer's current stream* wait for the copy, then
publishes (I4). `release` records the last use, drops a clean copy and writes a changed one back (I5), and vacates the slot
behind that event. A unit whose next use is already within the lookahead is kept instead.

The residents among them are `residents`' business; their onloads are enqueued here, in their place in the order.
Made by `streaming`, called by it and `network` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lib_async_lowvram.changeover import Changeover
from lib_async_lowvram.core.states import HOST, IN_USE, ONLOADING, READY, WRITE_BACK
from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.device.weights import LAYOUT, NONE, VALUES, Change, Unit
from lib_async_lowvram.residents import Residents
from lib_async_lowvram.slots import Slots
from lib_async_lowvram.steady import SteadyPass
from lib_async_lowvram.transfers import Transfers

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class Uses:
    """See the module.

    Attributes:
        consumer: the stream of the last acquire or publication. written_back: the newest write-back's event, until taken.
    """

    def __init__(self, network: Network, slots: Slots, residents: Residents, changeover: Changeover, transfers: Transfers) -> None:
        self._context = network.context
        self._streams = network.context.streams
        self._counters = network.counters
        self._order = network.order
        self._contents = network.contents
        self._units = network.contents.units
        self._slots = slots
        self._residents = residents
        self._changeover = changeover
        self._transfers = transfers
        self._issued = 0  # occurrences after the order's position whose onload is issued
        self._blocked = False  # the next onload's place was taken when last looked, and nobody has left since
        self._in_use: dict[int, Unit] = {}
        self._holding = False
        self._used: dict[int, Unit] = {}  # of those in use: were released while `hold` was on, so that only it keeps them (at depth 1)
        self._started: dict[int, float] = {}  # for the trace only
        self._unseen = {unit.index for unit in self._units if not unit.resident}  # not onloaded since the network was entered
        self._steady = SteadyPass(network, slots, transfers)
        self.consumer = self._streams.current_stream()
        self.written_back: Event | None = None

    @property
    def any(self) -> bool:
        """Whether a streamed unit is between its acquire and its release."""
        return bool(self._in_use) or self._steady.in_use is not None

    def fences(self) -> tuple[Event, ...]:
        """What whoever overwrites the ring must have waited for."""
        return (*self._slots.fences().values(), *self._steady.fences())

    # -- passes --------------------------------------------------------------------------------------------------------
    def begin_pass(self, quiet: bool) -> None:
        """After `finish_leftovers`, with the order's position at the start. `quiet`: nobody wants to be told of this pass, and no resident
        is on its way."""
        self.issue_ahead()
        changing = self._changeover.under_way or self._unseen
        self._steady.begin(self.consumer, quiet and not changing)

    def _see_to_it(self, ended: bool = False) -> None:
        """From here on this pass is not followed as a steady one any more, if it was. `ended`: because it is over."""
        steady = self._steady
        if steady.on:
            unit = steady.in_use
            self._issued, self._blocked = steady.stop(ended), False
            if unit is not None:
                self._in_use[unit.index] = unit

    # -- acquire -------------------------------------------------------------------------------------------------------
    def acquire(self, unit: Unit) -> None:
        """`unit` is about to be read by the calling thread's current stream."""
        steady = self._steady
        if steady.on and steady.acquire(unit):
            return
        if unit.depth:
            unit.depth += 1
            return
        if steady.on:
            self._see_to_it()
        if unit.resident:
            self._residents.arrive(unit)
            self.consumer = self._streams.current_stream()
            return
        counters = self._counters
        if self._order.advance(unit.index):
            if self._issued:
                self._issued -= 1
        else:
            counters.skipped += 1
            self.resynchronise()
        if unit.pending:
            unit.pending -= 1
        change = unit.host_change()
        stale = (change is not NONE or unit.dirty) and self._deal_with(unit, change)
        consumer, state = self._streams.current_stream(), unit.state
        if state is HOST or state is WRITE_BACK:
            counters.misses += 1
            in_ring = self._slots.fits(unit)
            if not in_ring and self._used:
                self._finish_used(self._slots.blockers(unit))
                in_ring = self._slots.fits(unit)
            if in_ring and self._slots.evict(unit):
                self.resynchronise()
            self._slots.onload(unit, in_ring)
        elif stale:
            counters.refetches += 1
            self._transfers.onload(unit, behind=consumer)  # a copy that was kept may be in use yet
        else:
            counters.hits += 1
        self._transfers.wait_and_publish(unit, consumer)
        self.consumer = consumer
        unit.to(IN_USE)
        unit.depth = 1
        self._in_use[unit.index] = unit
        if not self._blocked:
            self.issue_ahead()
        if self._context.trace is not None:
            self._started[unit.index] = time.perf_counter()

    def _deal_with(self, unit: Unit, change: Change) -> bool:
        """Somebody changed the unit while its parameters pointed at the master. True when a copy already made is stale."""
        if change is LAYOUT:
            if unit.state is ONLOADING or unit.state is READY:
                self._slots.vacate(unit, self._streams.current_stream())
                self._blocked = False
            self._contents.adopt(unit)  # which waits for a write-back, too: it lets go of the master
            if unit.state is WRITE_BACK:
                unit.to(HOST)
            return False
        unit.accept_versions()
        return unit.state is not HOST

    # -- release -------------------------------------------------------------------------------------------------------
    def release(self, unit: Unit) -> None:
        """The calling thread's current stream has been given its last work on `unit`. Tolerates an acquire that failed."""
        if unit.depth > 1:
            unit.depth -= 1
            return
        steady = self._steady
        if steady.on:
            if steady.release(unit):
                return
            self._see_to_it()
        if unit.resident or unit.index not in self._in_use:
            return
        if self._holding:
            self._used[unit.index] = unit
            return
        self._finish(unit)
        self.issue_ahead()

    def hold(self) -> bool:
        """From now on units stay until `let_go` instead of leaving after their use: they are about to be used again. False where that
        is so already."""
        self._see_to_it()
        before, self._holding = self._holding, True
        return not before

    def let_go(self) -> None:
        """End of `hold`: what was used leaves now."""
        self._see_to_it()
        self._holding = False
        self._finish_used(list(self._used.values()))
        self._used.clear()
        self.issue_ahead()

    def _finish_used(self, units: Iterable[Unit]) -> None:
        """Those of `units` that nothing but the hold keeps."""
        for unit in units:
            if unit.depth == 1 and self._used.pop(unit.index, None) is not None:
                self._finish(unit)

    def _finish(self, unit: Unit) -> None:
        unit.depth = 0
        del self._in_use[unit.index]
        if self._started:
            started = self._started.pop(unit.index, None)
            if started is not None and self._context.trace is not None:
                self._context.trace.add("compute", unit.name, started, time.perf_counter())
        consumer = self._streams.current_stream()
        change = unit.device_change()
        if change is LAYOUT:
            unit.to(WRITE_BACK)
            self._contents.adopt(unit)
            unit.to(HOST)
            self._slots.vacate(unit, consumer)
            return
        if change is VALUES:
            self._transfers.write_back(unit, consumer)
            self.written_back = unit.written
        unit.unpublish()
        unit.dirty = False
        if unit.pending:
            if unit.state is not READY:
                unit.to(READY)  # the copy kept here is the newer one
        else:
            self._slots.vacate(unit, consumer)
            self._changeover.released(unit)

    def finish_leftovers(self) -> None:
        """A pass is over: release what a BaseException left in use."""
        self._see_to_it(ended=True)
        self._holding = False
        self._used.clear()
        for unit in list(self._in_use.values()):
            self._finish(unit)

    # -- onloads -------------------------------------------------------------------------------------------------------
    def issue_ahead(self) -> None:
        """Enqueue as many further onloads as there is room for, in execution order."""
        units, slots, residents = self._units, self._slots, self._residents
        order, awaited, unseen = self._order, self._changeover.grown, self._unseen
        sequence = order.sequence
        count, position, issued = len(sequence), order.position + 1, self._issued
        self._blocked = False
        while issued < count:
            unit = units[sequence[(position + issued) % count]]
            if residents.expected:
                residents.onload_before(unit)
            if awaited and unit.index in awaited:
                # Also one that is fetched again, and used, after its last turn: kept for the next pass, it would be there twice.
                issued += 1
                continue
            state = unit.state
            if state is HOST or state is WRITE_BACK:
                if slots.outgrown(unit):
                    issued += 1
                    continue
                if not slots.free_unwanted(unit):
                    self._issued = issued
                    self._blocked = True
                    return
                if unseen:
                    self._first_look(unit)
                slots.onload(unit)
            unit.pending += 1
            issued += 1
            self._issued = issued  # whatever may be raised next
        self._issued = issued
        while residents.expected:
            residents.onload_next()

    def _first_look(self, unit: Unit) -> None:
        """Values written while the network was left (a checkpoint loaded in place writes them all) are this onload's source, and
        no reason to fetch again. Other tensors put there are adopted when the unit is acquired."""
        if unit.index in self._unseen:
            self._unseen.discard(unit.index)
            if unit.state is HOST and unit.host_change() is not LAYOUT:
                unit.accept_versions()

    def resynchronise(self) -> None:
        """The order jumped: what is on the device stays, but nothing counts as issued any more."""
        self._see_to_it()
        self._issued = 0
        self._blocked = False
        for unit in self._slots.standing:
            unit.pending = 0
