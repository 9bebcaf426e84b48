"""The ordering judge: a `Streams` that proves, for one run, that events order everything that must be ordered.

Problem: the simulated device computes in step with the host, and even a GPU usually runs in the lucky order. A missing
wait shows only now and then, as wrong pixels. `RecordingStreams` wraps any `Streams`, logs every operation, and decides
with vector clocks (`happens_before.py`) whether each conflicting pair of accesses is ordered *as if every stream ran as
late as it may*.

What orders what:
- operations on one stream, among themselves; a wait orders everything after it on that stream behind the event;
- an operation enqueued by host thread H starts after what H had *waited for on the host* (`synchronize`, `done` that
  said True) and after what H itself did in host memory. Not after what H enqueued on other streams before;
- the compute stream is a stream like any other, although the simulated one runs in step (host run-ahead);
- uses of host blocks by computing are done by the host thread itself; a blocking operation between host and device
  memory makes the host wait for its stream;
- `free`: everything that touched the block must lie before the `after` events or be known done to the caller. That holds
  for the current stream's own uses too: record an event and pass it;
- `allocate`: the new block may be used at once on both copy streams and on the caller's current stream; from any other
  stream only after waiting for one of these;
- `discard`: what touched the memory must lie before `after`; who writes next must wait for the event it *returned*;
- host memory that is unpinned or forgotten: its last copy must be known done to at least one host thread.

Host blocks are known by themselves from the first copy that touches them (weakly: HostRanges), or by `register_host`.
Invariants judged: I4, I8 and the ordering rules in DESIGN.md. Any thread may call; log and inner call are atomic, except
for calls that block.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from .address_ranges import AddressRanges, HostRanges
from .happens_before import AccessHistory, Clock, Operation, OrderingViolation, Violation, join
from .op_access import byte_range
from .recorder_actors import Actors
from .recorder_hosts import HostWork
from .streams import Event, Stream, Streams


class RecordedEvent(Event):
    """An event of the inner device, and everything that lies before it."""

    __slots__ = ("clock", "inner", "operation")

    def __init__(self, inner: Event, clock: Clock, operation: Operation) -> None:
        self.inner, self.clock, self.operation = inner, clock, operation


class RecordingStreams(HostWork):
    """Wraps `inner`; attributes it does not have itself (a simulated device's `hold_copies`, say) are the inner's.

    Attributes:
        inner: the device that does the work.
        violations: what was found so far, at most `keep`.
    """

    def __init__(self, inner: Streams, *, keep: int = 1000, log_length: int = 10_000) -> None:
        self._wrap(inner)
        self.violations: list[Violation] = []
        self._keep = keep
        self._lock = threading.RLock()
        self._actors = Actors(log_length)
        self._history = AccessHistory()
        self._blocks = AddressRanges()
        self._host_ranges = HostRanges(on_drop=self._history.forget)
        self._discarded: deque[tuple[Clock, tuple[int, int]]] = deque(maxlen=1000)
        self._pinned: dict[int, int] = {}
        self._unpinned: deque[tuple[int, int]] = deque()
        self._memory = self._actors.new("the allocator")
        self._name_streams("the")

    def _wrap(self, inner: Streams) -> None:
        self.inner = inner
        self.device, self.name = inner.device, f"recording {inner.name}"
        self.onload_stream, self.offload_stream = inner.onload_stream, inner.offload_stream

    def _name_streams(self, whose: str) -> None:
        self._actors.stream(self.onload_stream, f"{whose} onload stream")
        self._actors.stream(self.offload_stream, f"{whose} offload stream")

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not constructed yet
            raise AttributeError(name)
        return getattr(self.inner, name)

    # -- verdict -------------------------------------------------------------------------------------------------------
    def check(self, show: int = 5) -> None:
        """Raise `OrderingViolation` telling the first `show` conflicts, if any were found so far."""
        with self._lock:
            self._settle()
            if self.violations:
                stories = "\n".join(f"{index + 1}. {violation}" for index, violation in enumerate(self.violations[:show]))
                raise OrderingViolation(f"{len(self.violations)} unordered conflict(s) in {self.operations} operations\n{stories}")

    @property
    def log(self) -> deque[Operation]:
        """The last operations, newest last."""
        return self._actors.log

    @property
    def operations(self) -> int:
        """How many operations were logged."""
        return self._actors.operations

    # -- uses ----------------------------------------------------------------------------------------------------------
    def use(
        self,
        *,
        reads: Iterable[torch.Tensor] = (),
        writes: Iterable[torch.Tensor] = (),
        what: str = "use",
        blocking: bool = True,
    ) -> None:
        """Log that the calling thread's current stream reads and writes these tensors, as far as they lie in device
        blocks or known host blocks. `blocking`: an operation that joins both kinds holds up the host until it is done."""
        ranges = [(*where, False) for where in map(byte_range, reads) if where is not None]
        ranges += [(*where, True) for where in map(byte_range, writes) if where is not None]
        if not ranges:
            return
        with self._lock:
            self._settle()
            on_device = [item for item in ranges if self._blocks.overlaps(*item[:2])]
            on_host = [item for item in ranges if item not in on_device and self._host_ranges.overlaps(*item[:2])]
            if on_device:
                stream = self._actors.stream(self.inner.current_stream())
                self._touch(self._actors.enqueue(stream, what), stream.clock, on_device + on_host)
                if on_host and blocking:
                    join(self._actors.host().clock, stream.clock)
            elif on_host:
                host = self._actors.host()
                self._touch(self._actors.tick(host, what), host.clock, on_host)

    def register_host(self, tensor: torch.Tensor) -> None:
        """Watch the storage of `tensor` as a host block for as long as it lives."""
        with self._lock:
            self._host_ranges.add(tensor)

    def forget_host(self, tensor: torch.Tensor) -> None:
        """`tensor`'s storage is about to be freed or used for something unrelated: copies must be known done."""
        with self._lock:
            where = byte_range(tensor)
            if where is not None:
                self._end_host_life(*where, "host memory given up")
                self._host_ranges.remove(tensor)

    # -- streams and events --------------------------------------------------------------------------------------------
    def current_stream(self) -> Stream:
        return self.inner.current_stream()

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        with self._lock:
            self._settle()
            actor = self._actors.stream(stream)
            operation = self._actors.enqueue(actor, "record")
            return RecordedEvent(self.inner.record(stream, timing=timing), dict(actor.clock), operation)

    def wait(self, stream: Stream, event: Event) -> None:
        event = self._mine(event)
        with self._lock:
            self._settle()
            actor = self._actors.stream(stream)
            self._actors.enqueue(actor, f"wait for op {event.operation.number}")
            join(actor.clock, event.clock)
            if stream in (self.onload_stream, self.offload_stream):
                self.inner.wait(stream, event.inner)
                return
        self.inner.wait(stream, event.inner)  # may block the calling thread: not under the lock

    def done(self, event: Event) -> bool:
        event = self._mine(event)
        if not self.inner.done(event.inner):
            return False
        with self._lock:
            join(self._actors.host().clock, event.clock)
        return True

    def synchronize(self, event: Event) -> None:
        event = self._mine(event)
        self.inner.synchronize(event.inner)
        with self._lock:
            host = self._actors.host()
            self._actors.tick(host, f"synchronize with op {event.operation.number}")
            join(host.clock, event.clock)

    # -- copies --------------------------------------------------------------------------------------------------------
    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        with self._lock:
            self._settle()
            actor = self._actors.stream(stream)
            ranges = []
            for tensor, writes in ((source, False), (destination, True)):
                where = byte_range(tensor)
                if where is not None:
                    ranges.append((*where, writes))
                    if not self._blocks.overlaps(*where):
                        self._host_ranges.add(tensor)
            operation = self._actors.enqueue(actor, f"copy {destination.numel()} bytes")
            self._touch(operation, actor.clock, ranges)
            self.inner.copy(destination, source, stream)

    def discard(self, memory: torch.Tensor, after: Event) -> Event:
        after = self._mine(after)
        with self._lock:
            self._settle()
            clock = dict(after.clock)
            join(clock, self._actors.host().clock)
            lane = self._actors.lane(clock)
            lane.clock = clock
            operation = self._actors.tick(lane, f"discard after op {after.operation.number}")
            where = byte_range(memory)
            if where is not None:
                self._touch(operation, clock, [(*where, True)])
                self._note_discard(after, where)
            return RecordedEvent(self.inner.discard(memory, after.inner), dict(clock), operation)

    # -- device memory -------------------------------------------------------------------------------------------------
    def share(self, block: torch.Tensor, stream: Stream) -> None:
        self.inner.share(block, stream)

    def allocate(self, nbytes: int) -> torch.Tensor:
        with self._lock:
            self._settle()
            block = self.inner.allocate(nbytes)
            where = byte_range(block)
            operation = self._actors.enqueue(self._memory, f"allocate {nbytes} bytes")
            if where is not None:
                self._history.forget(*where)
                self._blocks.add(*where)
                self._touch(operation, self._memory.clock, [(*where, True)])
            for stream in (self.onload_stream, self.offload_stream, self.inner.current_stream()):
                join(self._actors.stream(stream).clock, self._memory.clock)
            return block

    def free(self, block: torch.Tensor, after: Sequence[Event] = ()) -> None:
        events = [self._mine(event) for event in after]
        with self._lock:
            self._settle()
            where = byte_range(block)
            self.inner.free(block, tuple(event.inner for event in events))
            operation = self._actors.tick(self._memory, f"free {block.numel()} bytes")
            # What this block is free behind says nothing of the next one: the allocator itself learns nothing.
            known = {**self._actors.host().clock, self._memory.id: operation.tick}
            for event in events:
                join(known, event.clock)
            if where is not None:
                self._touch(operation, known, [(*where, True)])
                self._blocks.remove(where[0])
                self._history.forget(*where)

    @property
    def allocated_bytes(self) -> int:
        return self.inner.allocated_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        return self.inner.peak_allocated_bytes

    def reset_peak(self) -> None:
        self.inner.reset_peak()

    def free_memory(self) -> int:
        return self.inner.free_memory()

    def total_memory(self) -> int | None:
        return self.inner.total_memory()

    def other_bytes(self) -> int:
        return self.inner.other_bytes()

    def activation_growth(self) -> int:
        return self.inner.activation_growth()

    # -- host memory ---------------------------------------------------------------------------------------------------
    def pin(self, address: int, nbytes: int) -> bool:
        with self._lock:
            self._settle()
            pinned = self.inner.pin(address, nbytes)
            if pinned:
                self._pinned[address] = nbytes
            return pinned

    def unpin(self, address: int) -> None:
        # No lock and no history here: the garbage collector may call this in the middle of any other method.
        nbytes = self._pinned.pop(address, None)
        if nbytes is not None:
            self._unpinned.append((address, nbytes))
        self.inner.unpin(address)

    # -- life ----------------------------------------------------------------------------------------------------------
    @property
    def knows_stalls(self) -> bool:
        return self.inner.knows_stalls

    @property
    def stall_seconds(self) -> float:
        return self.inner.stall_seconds

    @property
    def host_waits(self) -> int:
        return self.inner.host_waits

    def aside(self) -> AbstractContextManager[None]:
        return self.inner.aside()

    def sibling(self) -> RecordingStreams:
        """One recording of both: they share memory, so the judge must see what either does to it."""
        other = RecordingStreams.__new__(RecordingStreams)
        other.__dict__.update(self.__dict__)
        other._wrap(self.inner.sibling())
        with self._lock:
            other._name_streams("a sibling's")
        return other

    def close(self) -> None:
        self.inner.close()

    # -- inside, under the lock ----------------------------------------------------------------------------------------
    def _touch(self, operation: Operation, clock: Clock, ranges: Iterable[tuple[int, int, bool]]) -> None:
        for start, end, writes in ranges:
            for found in self._history.access(start, end, operation, writes, clock):
                if len(self.violations) < self._keep:
                    self.violations.append(found)

    def _settle(self) -> None:
        """Judge what was unpinned since the last operation."""
        while self._unpinned:
            address, nbytes = self._unpinned.popleft()
            self._end_host_life(address, address + nbytes, "unpin")

    def _end_host_life(self, start: int, end: int, what: str) -> None:
        """Whichever thread gives host memory up, some thread must have seen its copies done."""
        host = self._actors.host()
        known = dict(host.clock)
        for other in self._actors.hosts:
            join(known, other.clock)
        operation = self._actors.tick(host, what)
        known[host.id] = operation.tick
        self._touch(operation, known, [(start, end, True)])
        self._history.forget(start, end)

    @staticmethod
    def _mine(event: Event) -> RecordedEvent:
        if not isinstance(event, RecordedEvent):
            raise TypeError(f"{type(event).__name__} is not an event of this recorder")
        return event
