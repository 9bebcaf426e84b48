"""A pass that goes as the one before: its uses and onloads are looked up instead of worked out.

Problem: what `uses` does at every acquire and release - who is next in the order, whose place is free, which fences to wait for - takes
the host longer than the calls that do the work, and comes to the same in every pass. On a fast device that is time per pass.

How: once a pass has ended as a steady one does (`core.steady`), the next one is followed here. At each acquire and release it is checked
that this is the unit that is due, that it is in the state it should be in, that nobody has changed it (I5), and that the stream is still
the same; the copy is waited for and published (I4), or the place is left and the batch enqueued that follows, behind that use. At
the first thing that is otherwise `stop` brings order and ring up to date, and `uses` goes on from there as if it had always been at work:
nothing has been done yet for the call that was not as expected, but that the stream may wait for a copy that is fetched again.

States, depths and events of units are true at all times. Order, ring and what `uses` counts as issued are so when `stop` has been called.

Made and called by `uses` under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING

from lib_async_lowvram.core.states import HOST, IN_USE, ONLOADING, WRITE_BACK
from lib_async_lowvram.core.steady import SteadyOrder
from lib_async_lowvram.device.staging import Staged
from lib_async_lowvram.device.streams import Event, Stream
from lib_async_lowvram.device.weights import NONE, Unit
from lib_async_lowvram.slots import Slots
from lib_async_lowvram.transfers import Transfers

if TYPE_CHECKING:
    from lib_async_lowvram.network import Network


class SteadyPass:
    """See the module.

    Attributes:
        on: a pass is followed here. in_use: the unit between its acquire and its release, or None.
    """

    def __init__(self, network: Network, slots: Slots, transfers: Transfers) -> None:
        self._streams = network.context.streams
        self._counters = network.counters
        self._order = network.order
        self._contents = network.contents
        self._pinning = network.context.pinning
        self._slots = slots
        self._transfers = transfers
        self.on = False
        self.in_use: Unit | None = None
        self._known: tuple[object, int] | None = None  # what the next three are true of: an order, and packs
        self._steady: SteadyOrder | None = None
        self._units: list[Unit | None] = []  # by step, and None after the last one
        self._batches: list[tuple[Unit, ...]] = []  # by step: onloads that follow its release
        self._bound = False  # each unit's views are over its place
        self._pinned = False  # and all masters are pinned, too
        self._ended = False  # the last pass was followed until it ended
        self._step = 0  # the next one
        self._issued = 0  # onloads so far, counted from the pass's first step; those of the next pass go on from there
        self._consumer: Stream = None
        self._left: dict[Hashable, Event] = {}  # fences that the copy stream has not been told to wait for, by the stream's key

    # -- a pass --------------------------------------------------------------------------------------------------------
    def begin(self, consumer: Stream, quiet: bool) -> None:
        """A pass begins, on the stream `consumer`: follow it, if all is as it is when steady ones do. `quiet`: nothing else is to be
        seen to in it, and nothing is in use."""
        self._bound, self._ended = self._bound and self._ended, False
        if not quiet:
            return
        known = (self._order.sequence, self._contents.packings)
        if self._known is None or self._known[0] is not known[0] or self._known[1] != known[1]:
            self._learn(known)
        if self._steady is None or not self._as_expected():
            return
        self.on = True
        self._step, self._issued, self._consumer = 0, self._steady.ahead, consumer
        self._left = self._slots.fences()

    def _learn(self, known: tuple[tuple[int, ...], int]) -> None:
        sequence = known[0]
        self._known, self._bound = known, False
        units = self._contents.units
        self._steady = self._slots.steady_order(sequence)
        if self._steady is None:
            return
        around = [units[index] for index in sequence] * 2
        self._units = [*around[: len(sequence)], None]
        self._batches = []
        first = self._steady.ahead
        for count in self._steady.batches:
            self._batches.append(tuple(around[first : first + count]))
            first = (first + count) % len(sequence)

    def _as_expected(self) -> bool:
        """Whether exactly the first units of the order stand in the ring, and all are bound to their places there."""
        ahead = self._units[: self._steady.ahead]
        if {unit.index for unit in self._slots.standing} != {unit.index for unit in ahead}:
            return False
        if not self._bound:  # and remain so while passes are followed
            units = self._units[:-1]
            self._bound = all(self._slots.is_bound(unit) for unit in units)
            self._pinned = next(self._pinning.unpinned(units), None) is None
        return self._bound

    def stop(self, ended: bool) -> int:
        """Follow no longer: order and ring are as they would be had they been asked all the time. `ended`: the pass has, else something is
        otherwise. How many onloads are issued after the order's position. Only while `on`."""
        self.on = False
        fired = self._step + (self.in_use is not None)
        self._ended = ended
        self._order.follow(fired)
        around = self._units[:-1] * 2
        live = around[self._step : self._issued]
        self._slots.restore(live, self._left)
        self._left = {}
        self.in_use = None
        return self._issued - fired

    def fences(self) -> tuple[Event, ...]:
        """What was left in this pass, and no onload has waited for."""
        return tuple(self._left.values())

    # -- uses ----------------------------------------------------------------------------------------------------------
    def acquire(self, unit: Unit) -> bool:
        """See `Uses.acquire`. False: this is not as expected, and nothing has been done, but perhaps the stream waits for the copy."""
        if unit is not self._units[self._step] or unit.state is not ONLOADING:
            return False
        streams, copied = self._streams, unit.copied
        consumer = streams.current_stream()
        if consumer != self._consumer:
            return False
        if type(copied) is Staged:
            if unit.dirty or unit.host_change() is not NONE:
                return False
            self._transfers.wait_and_publish(unit, consumer)
        else:
            streams.wait(consumer, copied)
            if not unit.publish_unchanged():
                return False
        self._counters.hits += 1
        unit.state = IN_USE
        unit.pending = 0
        unit.depth = 1
        self.in_use = unit
        return True

    def release(self, unit: Unit) -> bool:
        """See `Uses.release`. False: this is not as expected, and nothing has been done."""
        if unit is not self.in_use or not unit.unpublish_unchanged():
            return False
        streams, left, step = self._streams, self._left, self._step
        consumer = streams.current_stream()
        used = streams.record(consumer)
        unit.depth = 0
        unit.state = HOST
        self.in_use = None
        self._step = step + 1
        vacant = streams.discard(unit.memory, used)
        key = consumer if vacant is used else ("discard", unit.index)
        batch = self._batches[step]
        if batch:
            stream = streams.onload_stream
            if left:
                left.pop(key, None)  # that was before
                for fence in left.values():
                    streams.wait(stream, fence)
                left.clear()
            streams.wait(stream, vacant)
            self._issued += len(batch)
            transfers, pinned = self._transfers, self._pinned
            for unit in batch:
                if pinned and unit.state is HOST and unit.written is None:
                    transfers.onload_again(unit)
                else:
                    if unit.state is WRITE_BACK:
                        unit.to(HOST)  # for the copy stream, which waits for that
                    transfers.onload(unit)
                unit.pending = 1
        else:
            left[key] = vacant
        return True
