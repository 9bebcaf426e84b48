"""A network in use: residents in their blocks, everything else through the ring, copies ahead of the computing.

Problem: device memory, residents, ring, clocks and plan changes belong together from the moment a network is entered until it
is left; what happens at each unit in between is in `uses`. A pass begins with whatever the last one left behind, on another
stream perhaps, cut short perhaps, and ends with masters that others may read.

Lives from `Network.enter` to `leave`. Called by `network` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.changeover import Changeover
from lib_async_lowvram.core.states import HOST, READY, WRITE_BACK
from lib_async_lowvram.device.arena import Arena
from lib_async_lowvram.device.loose import LooseTensors
from lib_async_lowvram.device.streams import Event, Stream
from lib_async_lowvram.leaf_clock import LeafClock
from lib_async_lowvram.rescue import attempt
from lib_async_lowvram.residents import Residents
from lib_async_lowvram.slots import Slots
from lib_async_lowvram.transfers import Transfers
from lib_async_lowvram.uses import Uses

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
        network.context.pinning.make_ready(units)
        waited_for = {unit: units[unit].nbytes for unit in sorted(plan.resident) if units[unit] not in network.kept}
        self.arena = Arena(self._streams, plan.ring_bytes, waited_for)
        self._since_timed = 0  # passes
        self._timed = False  # whether a complete pass was timed since the network was entered
        self._transfers = Transfers(network.context, network.counters)
        self._slots = Slots(self._streams, plan, units, self.arena, self._transfers)
        self._loose: LooseTensors | None = None
        try:
            self._loose = LooseTensors(self._streams, self._contents.modules(), self._contents.unmanaged)
            self._contents.guard_loose(self._loose, True)
            self._residents = Residents(network, self.arena, self._transfers)
            self._changeover = Changeover(network, self._slots, self._residents)
            self.uses = Uses(network, self._slots, self._residents, self._changeover, self._transfers)
        except BaseException:
            # Residents nobody announces may be on their way already: the memory is free behind that, and `rescue.abandon`, which
            # comes next, waits for it.
            streams = self._streams
            self._context.stager.settle()
            settled = streams.record(streams.onload_stream)
            self._units_back()
            if self._loose is not None:
                attempt("bringing buffers to the host", self._leave_loose)
            self.arena.close((settled, streams.record(streams.current_stream())))
            raise

    def _leave_loose(self) -> None:
        self._contents.guard_loose(self._loose, False)
        self._loose.leave()

    # -- passes --------------------------------------------------------------------------------------------------------
    def begin_pass(self) -> None:
        """The order's position goes back to the start; what is issued already stays issued when it wrapped round."""
        self._join()
        self.uses.finish_leftovers()
        self._residents.sweep(starting=True)
        at_end = self._order.position == len(self._order) - 1
        fresh = self._order.position == -1
        if self._changes_over():
            at_end = fresh = False
        self._order.begin_pass()
        if not (at_end or fresh):
            self.uses.resynchronise()
        self._since_timed += 1
        looked_at = self._context.timeline.due(self._network.name)
        if looked_at or not self._timed or self._network.planning.untimed or self._since_timed >= SAMPLED:
            self._since_timed = 0
            self._transfers.clock = LeafClock(self._streams, arriving=not self._timed, every_copy=looked_at)
            self._transfers.clock.start()
        self.uses.begin_pass(quiet=self._transfers.clock is None and self._context.trace is None and not self._residents.expected)

    def _changes_over(self) -> bool:
        """Between two passes: to a better plan, if there is one by now. Whether the order is another one."""
        network = self._network
        changed = self._changeover.next_pass()
        if self._timed and not changed and not self._residents.expected:
            before = network.plan.budget_bytes
            plan = network.planning.better(self._units, network.context.budget(network.planning.key), network.context.config)
            if plan is not None:
                self._context.ahead.give_up()  # the new plan may want the room
                try:
                    self._changeover.to(plan)
                except torch.cuda.OutOfMemoryError:
                    network.planning.most_bytes = before  # and what was shed for more comes back by and by
                changed = True
        return changed

    def _join(self) -> None:
        """Another stream than last time's computes now (another thread, another request): it goes on behind that one."""
        streams, before = self._streams, self.uses.consumer
        self.uses.consumer = streams.current_stream()
        if self.uses.consumer != before:
            streams.wait(self.uses.consumer, streams.record(before))

    def end_pass(self, complete: bool) -> None:
        """The pass's last work has been enqueued."""
        self._join()  # another thread may end what was cut short on this one
        self.uses.finish_leftovers()
        clock, self._transfers.clock = self._transfers.clock, None
        if clock is not None and complete:
            clock.end()
            self._context.note_activations(self._network.planning.key)
            self._context.timeline.passed(clock, self._network.name, [unit.name for unit in self._units])
            if [unit for unit in clock.units if unit in self._order] == list(self._order.sequence):
                self._network.planning.timed(clock)
            self._timed = True
        self._residents.all_arrived()
        self._residents.sweep()

    def settle(self) -> None:
        """Wait on the host for streamed units that were written back in this pass: others may read their masters before the
        next one (I5). A steady pass has none, and I3 is about those; counted apart."""
        newest, self.uses.written_back = self.uses.written_back, None
        if newest is not None:
            self._counters.write_back_waits += 1
            self._streams.synchronize(newest)
        self._transfers.forget_saved()

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
        """Masters true and published, nothing of its own in flight, memory given back. Blocks the host."""
        streams = self._streams
        self._join()
        self.uses.finish_leftovers()
        self._residents.sweep()
        # Not for all that the onload stream was given: behind our copies there may be those for the network that comes next.
        offload = streams.offload_stream
        for event in (*self._slots.fences().values(), self._transfers.called_off(self._units)):
            if event is not None:
                streams.wait(offload, event)
        settled = streams.record(offload)
        streams.synchronize(settled)
        consumed = streams.record(streams.current_stream())
        self._units_back()
        self._leave_loose()
        self._slots.close((consumed, settled))
        self.arena.close((consumed, settled))

    # -- after an error -----------------------------------------------------------------------------------------------
    @property
    def consumer(self) -> Stream:
        """The stream that computed last."""
        return self.uses.consumer

    @property
    def unsaved(self) -> list[tuple[torch.Tensor, torch.Tensor, Event]]:
        """See `Transfers`."""
        return self._transfers.unsaved

    @property
    def blocks(self) -> list[torch.Tensor]:
        """Device memory that is held, but for the loose tensors' own."""
        return [*self._slots.own_blocks, *self.arena.blocks]

    @property
    def fences(self) -> tuple[Event, ...]:
        """What `blocks` are free behind, beyond what the host has waited for: a device may have something to do with what was
        discarded."""
        return self.uses.fences()

    def abandon(self) -> None:
        """Loose tensors go home; `blocks` are the caller's to free. Nothing is in flight, and units are home already."""
        self._leave_loose()
