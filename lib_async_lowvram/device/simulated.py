"""A device on the CPU, with real concurrency: what tests and the demo run on where there is no GPU.

Problem: the mover's mistakes are mistakes of timing and ownership. So this device really copies on two other threads
(`copy_engine.py`), at a set bandwidth and latency and with random delays from a seed; device memory has a hard cap and
raises torch's out-of-memory error; memory that holds nothing (fresh, discarded, freed) is filled with NaN; and a copy
from host memory that is not pinned blocks its caller, as CUDA's does.

What it cannot show: the compute stream is the calling thread itself, in step with the host. Host run-ahead is judged by
`recorder.py`.

Invariants: I2 (the cap), I3 (`host_waits` counts every blocking of a host thread, but `outwait`s; `wait` on the compute stream is
stall), I8 (events are made by `record` only). Threads: any, for every method. `unpin` takes no lock, as the garbage collector may
call it anywhere.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch

from .address_ranges import PinnedRanges
from .busy_wait import BusyWait
from .copy_engine import CopyEngine, CopyOperation, Link, SimulatedEvent
from .simulated_link import SimulatedLink, positive
from .simulated_memory import SimulatedMemory, poison
from .streams import Event, Stream, Streams

COPIES_KNOWN = 1 << 14
"""That were found to be from or to pinned memory: a network has a few thousand."""

Pinning = Literal["all", "none"] | Callable[[int, int], bool]


class ComputeStream:
    """The compute stream of one host thread: that thread."""

    __slots__ = ("name",)

    def __init__(self) -> None:
        self.name = threading.current_thread().name

    def __repr__(self) -> str:
        return f"<simulated compute stream of {self.name}>"


class SimulatedStreams(SimulatedLink, Streams):
    """See the module's docstring. `poison` may be changed at any time, as all of `SimulatedLink` may: memory freed from then on follows."""

    knows_stalls = True

    def __init__(
        self,
        capacity_bytes: int = 8 << 30,
        bandwidth: float = 12e9,
        latency: float = 20e-6,
        jitter_seconds: float = 0.0,
        seed: int = 0,
        poison: bool = True,
        pinning: Pinning = "all",
        offload_bandwidth: float | None = None,
        fail_copy: Callable[[int], BaseException | None] | None = None,
        on_copy: Callable[[str, float, float, int], None] | None = None,
        busy: bool = False,
    ) -> None:
        """`busy`: for measurements: who waits stays awake (`busy_wait`), but for `outwait`."""
        self.device, self.name = torch.device("cpu"), "simulated"
        self.poison, self.pinning = poison, pinning
        self._memory = SimulatedMemory(capacity_bytes)
        self._shared: dict[int, int] = {}  # [start, end) of blocks that others may keep views of
        self.stall_seconds, self.host_waits = 0.0, 0
        self._lock = threading.Lock()
        self._local = threading.local()
        self._pinned = PinnedRanges()
        self._pinned_copies: dict[tuple, tuple[object, object]] = {}  # engine, addresses and bytes -> versions of memory and pinning
        self._busy = BusyWait() if busy else None
        self._open_link(Link(positive(bandwidth), latency, jitter_seconds, fail_copy, on_copy), offload_bandwidth, seed, busy)

    # -- streams and events --------------------------------------------------------------------------------------------
    def current_stream(self) -> Stream:
        stream = getattr(self._local, "stream", None)
        if stream is None:
            stream = self._local.stream = ComputeStream()
        return stream

    def record(self, stream: Stream, *, timing: bool = False) -> Event:
        now = time.perf_counter()
        if isinstance(stream, ComputeStream):
            return SimulatedEvent(timing=timing, reached_s=now)
        event = SimulatedEvent(timing=timing)
        self._engine(stream).submit(lambda engine: event.reach(max(engine.last_reached_s, now), engine.error))
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        event = _simulated(event)
        if not isinstance(stream, ComputeStream):
            # What is reached already comes before anything submitted from here on.
            if not event.reached or event.error is not None:
                self._engine(stream).submit(lambda engine: engine.inherit(event))
            return
        if stream is not self.current_stream():
            raise ValueError(f"{stream!r} is another thread: only that one can make it wait")
        if not event.reached:
            begin = time.perf_counter()
            self._block(event)
            with self._lock:
                self.stall_seconds += time.perf_counter() - begin
        self._tell(event)

    def done(self, event: Event) -> bool:
        return _simulated(event).reached

    def synchronize(self, event: Event) -> None:
        with self._lock:
            self.host_waits += 1
        event = _simulated(event)
        self._block(event)
        self._tell(event)

    def _block(self, event: SimulatedEvent) -> None:
        if self._busy is not None:
            self._busy.until_true(lambda: event.reached)
        event.block()

    def outwait(self, event: Event) -> None:
        _simulated(event).block()

    def _tell(self, event: SimulatedEvent) -> None:
        if event.error is not None:
            for engine in self._engines:
                engine.forget(event.error)
            raise event.error

    def failed(self, event: Event) -> bool:
        event = _simulated(event)
        return event.reached and event.error is not None

    def elapsed(self, start: Event, end: Event) -> float:
        start, end = _simulated(start), _simulated(end)
        if not (start.timing and end.timing and start.reached and end.reached):
            raise ValueError("elapsed needs two timing events that are both done")
        return end.reached_s - start.reached_s

    # -- copies --------------------------------------------------------------------------------------------------------
    def copy(self, destination: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        engine = self._engine(stream)
        host, device = (source, destination) if engine is self.onload_stream else (destination, source)
        for tensor in (destination, source):
            if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError(f"copies take one-dimensional contiguous uint8 tensors, not {tuple(tensor.shape)} {tensor.dtype}")
        if destination.numel() != source.numel():
            raise ValueError(f"copy of {source.numel()} bytes into {destination.numel()}")
        if not source.numel():
            return
        # The same copy again, and nothing was allocated, freed, pinned or unpinned since: what was found then is true.
        known, places = (self._memory.version, self._pinned.version), (engine, destination.data_ptr(), source.data_ptr(), host.numel())
        pinned = self._pinned_copies.get(places) == known
        if not pinned:
            pinned = self._check_copy(engine, host, device)
            if pinned:
                self._pinned_copies[places] = known
        engine.submit(CopyOperation(destination, source))
        if not pinned:
            self.synchronize(self.record(stream))

    def _check_copy(self, engine: CopyEngine, host: torch.Tensor, device: torch.Tensor) -> bool:
        """Whether the host side is pinned. ValueError where one of the two is not on its side."""
        begin = host.data_ptr()
        if not self._memory.holds(device):
            raise ValueError(f"{engine.lane} copy: the device side is not inside a living block of this device")
        if self._memory.overlaps(begin, begin + host.numel()):
            raise ValueError(f"{engine.lane} copy: the host side lies in device memory")
        if len(self._pinned_copies) >= COPIES_KNOWN:
            self._pinned_copies.clear()
        return self.is_pinned(begin, host.numel())

    def discard(self, memory: torch.Tensor, after: Event) -> Event:
        if not self.poison:
            return after
        after = _simulated(after)
        if not self._memory.holds(memory):
            raise ValueError("discard of memory that is not inside a living block of this device")
        with self._lock:
            shared = any(start <= memory.data_ptr() < end for start, end in self._shared.items())
        if shared:
            return after
        event = SimulatedEvent()
        if after.reached:
            # On the onload engine, which is idle or asleep most of the time and writes to most discarded memory next.
            def on_engine(engine: CopyEngine) -> None:
                if after.error is None:
                    poison(memory)
                event.reach(max(engine.last_reached_s, after.reached_s), after.error)

            self.onload_stream.submit(on_engine)
        else:
            # On whatever thread reaches `after`: queued behind a wait on an engine it would hold up that engine's copies.
            def when_reached() -> None:
                if after.error is None:  # else this may be the only copy of what should have been saved
                    poison(memory)
                event.reach(after.reached_s, after.error)

            after.on_reach(when_reached)
        return event

    # -- device memory -------------------------------------------------------------------------------------------------
    def allocate(self, nbytes: int) -> torch.Tensor:
        block = self._memory.allocate(nbytes)
        if self.poison:
            poison(block)
        return block

    def share(self, block: torch.Tensor, stream: Stream) -> None:
        if not self._memory.holds(block):
            raise ValueError("share of memory that is not a living block of this device")
        with self._lock:
            self._shared[block.data_ptr()] = block.data_ptr() + block.numel()

    def free(self, block: torch.Tensor, after: tuple[Event, ...] = ()) -> None:
        events = [_simulated(event) for event in after]
        self._memory.free(block)
        with self._lock:
            shared = self._shared.pop(block.data_ptr(), 0)
        if shared:
            return
        # The tensor lives on in the callback: its memory goes to nobody else before the last event. Poisoned memory is not
        # handed out again, so that who still reads it goes on reading NaN.
        # Nor is what a failed copy should have saved from there.
        _when_all_reached(events, lambda: any(event.error for event in events) or (poison if self.poison else self._memory.recycle)(block))

    @property
    def allocated_bytes(self) -> int:
        return self._memory.allocated_bytes

    @property
    def peak_allocated_bytes(self) -> int:
        return self._memory.peak_bytes

    def reset_peak(self) -> None:
        self._memory.reset_peak()

    def total_memory(self) -> int:
        return self._memory.capacity_bytes  # the hard cap on `allocated_bytes`

    def free_memory(self) -> int:
        return self._memory.free_bytes

    def live_memory_ranges(self) -> list[tuple[int, int]]:
        """[start, end) of every block that is allocated now, for the judges."""
        return self._memory.ranges()

    def owns(self, address: int) -> bool:
        """Whether `address` lies in a block that is allocated now."""
        return self._memory.overlaps(address, address + 1)

    # -- host memory ---------------------------------------------------------------------------------------------------
    def pin(self, address: int, nbytes: int) -> bool:
        if address % mmap.PAGESIZE or nbytes <= 0:
            raise ValueError(f"cannot pin {nbytes} bytes at {address:#x}: whole pages only")
        allowed = bool(self.pinning(address, nbytes)) if callable(self.pinning) else self.pinning == "all"
        return allowed and self._pinned.add(address, nbytes)  # CUDA, too, refuses what is registered already

    def unpin(self, address: int) -> None:
        self._pinned.remove(address)

    def is_pinned(self, address: int, nbytes: int) -> bool:
        """Whether [address, address + nbytes) is pinned now."""
        return self._pinned.contains(address, nbytes)

    # -- others on the same device ---------------------------------------------------------------------------------
    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()  # every thread is a compute stream of its own

    def sibling(self) -> SimulatedStreams:
        link = self.onload_stream.link
        other = SimulatedStreams(self.total_memory(), link.bandwidth, link.latency, link.jitter_seconds, poison=self.poison)
        other._memory, other._pinned = self._memory.part(), self._pinned
        return other


def _simulated(event: Event) -> SimulatedEvent:
    if not isinstance(event, SimulatedEvent):
        raise TypeError(f"{type(event).__name__} is not an event of a simulated device")
    return event


def _when_all_reached(events: list[SimulatedEvent], action: Callable[[], None]) -> None:
    """Run `action` once all are reached: now, or on the thread that reaches the last."""
    for number, event in enumerate(events):
        if not event.reached:
            event.on_reach(lambda rest=events[number + 1 :]: _when_all_reached(rest, action))
            return
    action()
