"""A network in use: residents in their blocks, everything else through the ring, copies ahead of the computing.

Problem: at every acquire the unit's copy should long be done, and at every release the next copies should already be under
way, without the host ever waiting (I3), without allocating (I2), and without anybody reading a weight before its copy or
overwriting one before its last use.

How: `issue_ahead` walks the execution order from the position reached, enqueuing onloads on the copy stream until a unit's
place in the ring is taken; it runs at every acquire and release, and wraps into the next pass. Each onload waits on the copy
stream for the fences of whoever was there before. `acquire` makes the *consumer's current stream* wait for the copy, then
publishes (I4). `release` records the last use, drops a clean copy and writes a changed one back (I5), and vacates the slot
behind that event. A unit whose next use is already within the lookahead is kept instead.

The residents among them are `residents`' business; their onloads are enqueued here, in their place in the order.

Lives from `Network.enter` to `leave`. Called by `network` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.changeover import Changeover
from lib_async_lowvram.core.states import HOST, IN_USE, ONLOADING, READY, WRITE_BACK
from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.loose import LooseTensors
from lib_async_lowvram.device.streams import Event
from lib_async_lowvram.device.weights import LAYOUT, NONE, VALUES, Unit
from lib_async_lowvram.leaf_clock import LeafClock
from lib_async_lowvram.residents import Residents
from lib_async_lowvram.slots import Slots
from lib_async_lowvram.transfers import Transfers

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


SAMPLED = 64
"""One pass in so many carries timing events; the others carry none."""


class Streaming:
    """See the module. Raises torch's out-of-memory error from the constructor with nothing held."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._context = network.context
        self._streams = network.context.streams
        self._counters = network.counters
        self._order = network.order
        self._contents = network.contents
        self._units = units = network.contents.units
        plan = network.plan
        waited_for = {unit: units[unit].nbytes for unit in sorted(plan.resident) if units[unit] not in network.kept}
        self.arena = Arena(self._streams, plan.ring_bytes, waited_for)
        self._issued = 0  # occurrences after the order's position whose onload is issued
        self._blocked = False  # the next onload's place was taken when last looked, and nobody has left since
        self._in_use: dict[int, Unit] = {}
        self._started: dict[int, float] = {}  # for the trace only
        self._written_back: Event | None = None  # the newest of this pass
        self._since_timed = 0  # passes
        self._timed = False  # whether a complete pass was timed since the network was entered
        self._unseen = {unit.index for unit in units if not unit.resident}  # not onloaded since the network was entered
        self._consumer = self._streams.current_stream()  # of the last acquire or publication
        self._transfers = Transfers(network.context, network.counters)
        self._slots = Slots(self._streams, plan, units, self.arena, self._transfers)
        self._loose: LooseTensors | None = None
        try:
            self._loose = LooseTensors(self._streams, self._contents.modules(), self._contents.unmanaged)
            self._contents.guard_loose(self._loose, True)
            self._residents = Residents(network, self.arena, self._transfers)
            self._changeover = Changeover(network, self._slots, self._residents)
        except BaseException:
            # Residents nobody announces may be on their way already.
            streams = self._streams
            settled = streams.record(streams.onload_stream)
            streams.synchronize(settled)
            self._units_back()
            if self._loose is not None:
                self._leave_loose()
            self.arena.close((settled, streams.record(streams.current_stream())))
            raise

    def _leave_loose(self) -> None:
        self._contents.guard_loose(self._loose, False)
        self._loose.leave()

    @property
    def anything_in_use(self) -> bool:
        """Whether a streamed unit is between its acquire and its release."""
        return bool(self._in_use)

    # -- acquire -------------------------------------------------------------------------------------------------------
    def acquire(self, unit: Unit) -> None:
        """`unit` is about to be read by the calling thread's current stream."""
        if unit.depth:
            unit.depth += 1
            return
        if unit.resident:
            self._residents.arrive(unit)
            self._consumer = self._streams.current_stream()
            return
        counters = self._counters
        followed = self._order.advance(unit.index)
        if followed:
            if self._issued:
                self._issued -= 1
        else:
            counters.skipped += 1
            self.resynchronise()
        if unit.pending:
            unit.pending -= 1
        stale = self._check_master(unit)
        if unit.state is HOST or unit.state is WRITE_BACK:
            counters.misses += 1
            in_ring = self._slots.fits(unit)
            if in_ring and self._slots.evict(unit):
                self.resynchronise()
            self._slots.onload(unit, in_ring)
        elif stale:
            counters.refetches += 1
            self._transfers.onload(unit, behind=self._streams.current_stream())  # a copy that was kept may be in use yet
        else:
            counters.hits += 1
        self._transfers.wait_and_publish(unit)
        self._consumer = self._streams.current_stream()
        unit.to(IN_USE)
        unit.depth = 1
        self._in_use[unit.index] = unit
        if not self._blocked:
            self.issue_ahead()
        if self._context.trace is not None:
            self._started[unit.index] = time.perf_counter()

    def _check_master(self, unit: Unit) -> bool:
        """Look for changes made while the parameters pointed at the master. True when a copy already made is stale."""
        change = unit.host_change()
        if change is NONE and not unit.dirty:
            return False
        if change is LAYOUT:
            self._settle(unit)
            if unit.state is ONLOADING or unit.state is READY:
                self._slots.vacate(unit, self._streams.current_stream())
                self._blocked = False
            self._contents.adopt(unit)
            return False
        if unit.state is WRITE_BACK:
            self._settle(unit)
        unit.accept_versions()
        return unit.state is not HOST

    def _settle(self, unit: Unit) -> None:
        """Wait on the host for a write-back: the master is about to be read or replaced by the host."""
        if unit.state is WRITE_BACK:
            self._streams.synchronize(unit.written)
            unit.to(HOST)

    # -- release -------------------------------------------------------------------------------------------------------
    def release(self, unit: Unit) -> None:
        """The calling thread's current stream has been given its last work on `unit`. Tolerates an acquire that failed."""
        if unit.depth > 1:
            unit.depth -= 1
            return
        if unit.resident or unit.index not in self._in_use:
            return
        self._finish(unit)
        self.issue_ahead()

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
            self._written_back = unit.written
        unit.unpublish()
        unit.dirty = False
        if unit.pending:
            if unit.state is not READY:
                unit.to(READY)  # the copy kept here is the newer one
        else:
            self._slots.vacate(unit, consumer)
            self._changeover.released(unit)

    # -- onloads -------------------------------------------------------------------------------------------------------
    def issue_ahead(self) -> None:
        """Enqueue as many further onloads as there is room for, in execution order."""
        units, slots, residents = self._units, self._slots, self._residents
        sequence, awaited, unseen = self._order.sequence, self._changeover.grown, self._unseen
        self._blocked = False
        count, position = len(sequence), self._order.position + 1
        while self._issued < count:
            unit = units[sequence[(position + self._issued) % count]]
            if residents.expected:
                residents.onload_before(unit)
            if unit.state is HOST or unit.state is WRITE_BACK:
                if slots.outgrown(unit) or unit.index in awaited:
                    self._issued += 1
                    continue
                if not slots.free_unwanted(unit):
                    self._blocked = True
                    return
                if unit.index in unseen:
                    self._first_look(unit)
                slots.onload(unit)
            unit.pending += 1
            self._issued += 1
        while residents.expected:
            residents.onload_next()

    def _first_look(self, unit: Unit) -> None:
        """Values written while the network was left (a checkpoint loaded in place writes them all) are this onload's source, and
        no reason to fetch again. Other tensors put there are adopted when the unit is acquired."""
        self._unseen.discard(unit.index)
        if unit.state is HOST and unit.host_change() is not LAYOUT:
            unit.accept_versions()

    def resynchronise(self) -> None:
        """The order jumped: what is on the device stays, but nothing counts as issued any more."""
        self._issued = 0
        self._blocked = False
        for unit in self._slots.standing:
            unit.pending = 0

    # -- the end -------------------------------------------------------------------------------------------------------
    def finish_leftovers(self) -> None:
        """Release what a BaseException left in use."""
        for unit in list(self._in_use.values()):
            self._finish(unit)

    def begin_pass(self) -> None:
        """The order's position goes back to the start; what is issued already stays issued when it wrapped round."""
        self._join()
        self.finish_leftovers()
        self._residents.sweep()
        at_end = self._order.position == len(self._order) - 1
        fresh = self._order.position == -1
        if self._changes_over():
            at_end = fresh = False
        self._order.begin_pass()
        if not (at_end or fresh):
            self.resynchronise()
        self._since_timed += 1
        if not self._timed or self._network.planning.untimed or self._since_timed >= SAMPLED:
            self._since_timed = 0
            self._transfers.clock = LeafClock(self._streams, arriving=not self._timed)
            self._transfers.clock.start()
        self.issue_ahead()

    def _changes_over(self) -> bool:
        """Between two passes: to a better plan, if there is one by now. Whether the order is another one."""
        network = self._network
        changed = self._changeover.next_pass()
        if self._timed and not changed and not self._residents.expected:
            before = network.plan.budget_bytes
            plan = network.planning.better(self._units, network.context.budget(network.planning.key), network.context.config)
            if plan is not None:
                try:
                    self._changeover.to(plan)
                except torch.cuda.OutOfMemoryError:
                    network.planning.most_bytes = before  # and what was shed for more comes back by and by
                changed = True
        return changed

    def _join(self) -> None:
        """Another stream than last time's computes now (another thread, another request): it goes on behind that one."""
        streams, before = self._streams, self._consumer
        self._consumer = streams.current_stream()
        if self._consumer != before:
            streams.wait(self._consumer, streams.record(before))

    def end_pass(self, complete: bool) -> None:
        """The pass's last work has been enqueued."""
        self.finish_leftovers()
        clock, self._transfers.clock = self._transfers.clock, None
        if clock is not None and complete:
            clock.end()
            self._context.note_activations(self._network.planning.key)
            if [unit for unit in clock.units if unit in self._order] == list(self._order.sequence):
                self._network.planning.timed(clock)
            self._timed = True
        self._residents.all_arrived()
        self._residents.sweep()

    def settle(self) -> None:
        """Wait on the host for streamed units that were written back in this pass: others may read their masters before the
        next one (I5). A steady pass has none, and I3 is about those; counted apart."""
        newest, self._written_back = self._written_back, None
        if newest is not None:
            self._counters.write_back_waits += 1
            self._streams.synchronize(newest)

    def share(self) -> None:
        """Gradients are on: autograd may keep views of everything here. Nothing must be overwritten: `close` comes next."""
        consumer = self._streams.current_stream()
        self.arena.share(consumer)
        self._slots.share(consumer)
        self._loose.shared = True

    def _units_back(self) -> None:
        """Every unit points at its master. Nothing is in flight."""
        for unit in self._units:
            if unit.state is HOST and unit.memory is None:
                continue
            if unit.resident and unit.state in (READY, WRITE_BACK):
                unit.unpublish()
            if unit.state is not HOST:
                unit.to(HOST)
            unit.unbind()
            unit.pending = unit.depth = 0
            unit.copied = unit.written = None

    def close(self) -> None:
        """Masters true and published, nothing in flight, memory given back. Blocks the host."""
        streams = self._streams
        self._join()
        self.finish_leftovers()
        self._residents.sweep()
        for fence in self._slots.fences():
            streams.wait(streams.onload_stream, fence)
        settled = [streams.record(streams.onload_stream), streams.record(streams.offload_stream)]
        for event in settled:
            streams.synchronize(event)
        consumed = streams.record(streams.current_stream())
        self._units_back()
        self._leave_loose()
        self._slots.close((consumed, *settled))
        self.arena.close((consumed, *settled))
