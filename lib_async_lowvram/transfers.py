"""The three things that happen to one unit's bytes: onload, publication, write-back - each with its events.

Shared by `streaming` (units that pass through the ring) and `residents`. Enqueues only; the host never waits here (I3), except for
units whose masters are not pinned: those go through the staging ring (`device.staging`), or straight where there is none.
Called under the mover's lock, on the thread that runs the network.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

import torch

from lib_async_lowvram.core.states import ONLOADING, READY, WRITE_BACK
from lib_async_lowvram.core.stats import Counters
from lib_async_lowvram.device.staging import Staged, last_of
from lib_async_lowvram.device.streams import Event, Stream
from lib_async_lowvram.device.weights import Unit
from lib_async_lowvram.leaf_clock import LeafClock

if TYPE_CHECKING:
    from collections.abc import Iterable

    from lib_async_lowvram.context import Context


class Transfers:
    """See the module. `clock`: times each unit while set."""

    def __init__(self, context: Context, counters: Counters, clock: LeafClock | None = None) -> None:
        self.clock = clock
        self.unsaved: list[tuple[torch.Tensor, torch.Tensor, Event]] = []
        """(master, device memory, event) of each write-back that is not known to have happened."""
        self._context = context
        self._streams = context.streams
        self._stager = context.stager
        self._counters = counters
        self._newest: Event | Staged | None = None  # of the onloads made here, else of those taken over
        self._made = False

    def onload(self, unit: Unit, behind: Stream | None = None) -> None:
        """Enqueue the copy of the master into the memory the unit is bound to, behind a write-back still under way, and
        behind what `behind` has been given so far, if that may still read the memory."""
        streams = self._streams
        stream = streams.onload_stream
        last_of(unit.copied, streams)
        unit.to(ONLOADING)
        if behind is not None:
            streams.wait(stream, streams.record(behind))
        self._enqueue(unit, unit.memory)
        self._newest, self._made = unit.copied, True

    def onload_again(self, unit: Unit) -> None:
        """The same for a unit as most are in most passes: on the host, bound to memory of its size, its master pinned and true, and no copy
        of it under way. (Not asked here.) Nor are there timing events."""
        streams = self._streams
        stream = streams.onload_stream
        unit.state = ONLOADING
        self._counters.streamed_bytes += unit.nbytes
        streams.copy(unit.memory, unit.master, stream)
        self._newest = unit.copied = streams.record(stream)
        self._made = True

    def fetch(self, unit: Unit, memory: torch.Tensor) -> None:
        """The same into `memory`, for a unit of a network that is not in use: its state stays HOST, and it is bound to nothing."""
        last_of(unit.copied, self._streams)
        self._enqueue(unit, memory)

    def adopted(self, unit: Unit) -> None:
        """What `fetch` enqueued has become this network's onload of the unit."""
        self._counters.adopted_ahead_bytes += unit.nbytes
        if not self._made:
            self._newest = unit.copied

    def called_off(self, units: Iterable[Unit]) -> Event | None:
        """Behind all onloads made here or taken over, of `units`, which are all there are: nothing more of them is enqueued. Those of
        others, that were enqueued since then, go on. None where there were none. May block the host while a piece is being staged."""
        staged = [unit.copied for unit in units if type(unit.copied) is Staged]
        for copied in reversed(staged):  # what has begun last: nothing follows it
            copied.let_go()
        if staged or type(self._newest) is Staged:
            return self._streams.record(self._streams.onload_stream)
        return self._newest

    def _enqueue(self, unit: Unit, memory: torch.Tensor) -> None:
        streams = self._streams
        stream = streams.onload_stream
        memory = memory if memory.numel() == unit.nbytes else memory[: unit.nbytes]
        written = unit.written
        if written is not None:
            streams.wait(stream, written)
            unit.written = None
        timed = self.clock is not None and self.clock.copies(unit.nbytes)
        self._counters.streamed_bytes += unit.nbytes
        if self._stager.ring_bytes and (unit.in_file is not None or not self._context.host.is_pinned(unit.master)):
            # The thread reads the master itself: behind the write-back, which counts until it has waited for that.
            unit.written = written
            self._counters.staged_bytes += unit.nbytes
            told = partial(self.clock.copied, unit.index) if timed else None
            unit.copied = self._stager.submit(memory, unit.in_file or unit.master, written, told)
            return
        start = streams.record(stream, timing=True) if timed else None
        source = unit.bytes_on_host()
        streams.copy(memory, source, stream)
        if timed:
            unit.copied = streams.record(stream, timing=True)
            self.clock.copied(unit.index, unit.nbytes, start, unit.copied)
        else:
            unit.copied = streams.record(stream)
        if source is not unit.master:
            streams.synchronize(unit.copied)  # read for this copy alone

    def wait_and_publish(self, unit: Unit, consumer: Stream) -> None:
        """`consumer`, the calling thread's current stream, waits for the copy; then the parameters point there (I4)."""
        streams, trace, clock = self._streams, self._context.trace, self.clock
        if clock is not None:
            clock.before_wait()
        if trace is None:
            streams.wait(consumer, self._arriving(unit))
        else:
            start = time.perf_counter()
            streams.wait(consumer, self._arriving(unit))
            trace.add("stall", unit.name, start, time.perf_counter())
        if unit.written is not None:
            streams.wait(consumer, unit.written)  # changed before and kept: it may be changed again, under that write-back
        if clock is not None:
            clock.after_wait(unit.index)
        if unit.state is ONLOADING:
            unit.to(READY)
        unit.publish()

    def _arriving(self, unit: Unit) -> Event:
        """The event of the unit's onload. A staged one is waited for on the host until it is enqueued (I8); raises what went wrong."""
        copied = unit.copied
        if type(copied) is not Staged:
            return copied
        if not copied.enqueued:
            self._counters.staging_waits += 1
        try:
            unit.copied = copied.event()
        except BaseException:
            unit.dirty = True  # nothing arrived: its next use fetches it again
            raise
        if unit.written is copied.after:
            unit.written = None  # the thread has waited for it, and told
        return unit.copied

    def write_back(self, unit: Unit, consumer: Stream) -> None:
        """Enqueue the copy of a changed unit to its master, after what `consumer` has been given so far (I5). Straight, whatever
        the master's tier: changes are rare, and the host waits for them at the pass's end anyway (`Streaming.settle`)."""
        streams = self._streams
        unit.to(WRITE_BACK)
        unit.leave_file()
        changed = streams.record(consumer)
        streams.wait(streams.offload_stream, changed)
        streams.copy(unit.master, unit.memory[: unit.nbytes], streams.offload_stream)
        unit.written = streams.record(streams.offload_stream)
        self.unsaved.append((unit.master, unit.memory[: unit.nbytes], unit.written))
        self._counters.write_backs += 1

    def forget_saved(self) -> None:
        """Between passes: those that have happened need not be known any more."""
        streams = self._streams
        if self.unsaved:
            self.unsaved = [each for each in self.unsaved if not streams.done(each[2]) or streams.failed(each[2])]
